"""How far an adapter is from its base on neutral texts, against distributions computed by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from transformers import T5Config, T5ForConditionalGeneration

import reftnoise as rn
from reftnoise.data.tokenization import prompt_tokens
from reftnoise.evaluation.forgetting import (
    NEUTRAL,
    NeutralText,
    forgetting,
    neutral_texts,
    read_neutral,
    token_kl,
    written_by_base,
)
from support.adapters import moved
from support.tolerance import assert_close

TEXTS = [
    NeutralText("Where does a bear live?", " In a forest, not in a house."),
    NeutralText("Who", " are you?"),
    NeutralText([{"role": "user", "content": "Can a bee fly?"}], "Yes, a bee can fly."),
]


def loaded(positions: str, intervention: str = "loreft") -> tuple[rn.ReftModel, Any]:
    base, tokenizer = rn.load_tiny_model()
    entry = {"layer": "all", "intervention": intervention, "low_rank_dimension": 2}
    reft_model = rn.get_reft_model(base, rn.ReftConfig(entry | {"positions": positions}))
    return moved(reft_model).eval(), tokenizer


def distributions(model: Any, prompt: list[int], rest: list[int]) -> Categorical:
    """At the tokens before each of `rest`, by a pass of this row alone."""
    inputs = {"input_ids": torch.tensor([prompt + rest])}
    if isinstance(model, rn.ReftModel):
        inputs["prompt_lengths"] = torch.tensor([len(prompt)])
    with torch.no_grad():
        return Categorical(logits=model(**inputs).logits[0, len(prompt) - 1 : -1])


@pytest.mark.parametrize("positions", ["l1", "f1+l1", "all", "all+decode"])
def test_divergence_and_losses_are_those_of_each_text_alone(positions: str) -> None:
    reft_model, tokenizer = loaded(positions)
    result = forgetting(reft_model, tokenizer, TEXTS, batch_size=2)
    base, _ = rn.load_tiny_model()
    for index, text in enumerate(TEXTS):
        prompt = prompt_tokens(tokenizer, text.prompt)
        if isinstance(text.prompt, str):
            whole = tokenizer(text.prompt + text.completion)["input_ids"]
        else:
            turns = [*text.prompt, {"role": "assistant", "content": text.completion}]
            whole = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        rest = whole[len(prompt) :]
        p, q = (distributions(model, prompt, rest) for model in (base, reft_model))
        target = torch.tensor(rest)
        assert result.tokens[index] == len(rest)
        expected = (kl_divergence(p, q), -p.log_prob(target), -q.log_prob(target))
        measured = (result.kl, result.base_loss, result.adapted_loss)
        scale = float(max(p.logits.abs().max(), q.logits.abs().max()))  # of what is subtracted
        for values, tokens in zip(measured, expected, strict=True):
            assert_close(torch.tensor(values[index]), tokens.mean(), scale=scale)
        change = result.adapted_loss[index] - result.base_loss[index]
        assert result.loss_change[index] == change
        assert result.kl[index] > 0


def test_a_base_may_be_another_model_than_the_adapted_one() -> None:
    """Trained weights of the base are compared with its original ones, which answer prompts."""
    base, tokenizer = rn.load_tiny_model()
    config = rn.ReftConfig([], modules_to_save=["layers"])
    reft_model = rn.get_reft_model(rn.load_tiny_model()[0], config).eval()
    with torch.no_grad():
        for parameter in reft_model.get_trainable_parameters():
            parameter.mul_(1.1)
    with pytest.raises(ValueError, match="base: expected one with its original weights"):
        forgetting(reft_model, tokenizer, TEXTS)
    result = forgetting(reft_model, tokenizer, TEXTS, base=base.train())
    assert base.training
    base.eval()
    for index, text in enumerate(TEXTS[:2]):
        prompt = prompt_tokens(tokenizer, text.prompt)
        rest = tokenizer(text.prompt + text.completion)["input_ids"][len(prompt) :]
        p, q = (distributions(model, prompt, rest) for model in (base, reft_model))
        scale = float(max(p.logits.abs().max(), q.logits.abs().max()))
        assert_close(torch.tensor(result.kl[index]), kl_divergence(p, q).mean(), scale=scale)
        assert result.kl[index] > 0
    (own,) = written_by_base(reft_model, tokenizer, ["Where"], base=base, max_new_tokens=4)
    ids = torch.tensor([prompt_tokens(tokenizer, "Where")])
    tokens = base.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert own.completion == tokenizer.decode(tokens, skip_special_tokens=True)


def test_without_edits_nothing_is_forgotten() -> None:
    reft_model, tokenizer = loaded("all")
    with reft_model.using(scale=0.0):
        result = forgetting(reft_model, tokenizer, TEXTS)
    assert result.kl == [0.0] * 3
    assert result.loss_change == [0.0] * 3


def test_the_adapter_of_the_block_is_measured(tmp_path: Path) -> None:
    other, tokenizer = loaded("l1", "noreft")
    other.save_pretrained(tmp_path)
    reft_model, _ = loaded("all")
    reft_model.load_adapter(tmp_path, "other")
    with reft_model.using(adapter="other"):
        chosen = forgetting(reft_model, tokenizer, TEXTS)
    assert chosen.kl == pytest.approx(forgetting(other, tokenizer, TEXTS).kl, rel=1e-4)
    assert chosen.kl != pytest.approx(forgetting(reft_model, tokenizer, TEXTS).kl, rel=1e-2)


def test_the_divergence_is_torchs() -> None:
    logits = torch.randn(2, 5, 7)
    expected = kl_divergence(Categorical(logits=logits[0]), Categorical(logits=logits[1]))
    assert_close(token_kl(*logits.log_softmax(-1)), expected, scale=float(logits.abs().max()))
    same = logits[0].log_softmax(-1)
    assert token_kl(same, same + 1e-8).min() >= 0


def test_a_prompt_alone_is_followed_by_the_base() -> None:
    reft_model, tokenizer = loaded("all")
    chat = [{"role": "user", "content": "Can a bee fly?"}]
    written = written_by_base(reft_model, tokenizer, ["Where", chat, TEXTS[0]], max_new_tokens=4)
    assert written[2] == TEXTS[0]
    base, _ = rn.load_tiny_model()
    for prompt, text in zip(("Where", chat), written, strict=False):
        ids = torch.tensor([prompt_tokens(tokenizer, prompt)])
        tokens = base.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        assert text == NeutralText(prompt, tokenizer.decode(tokens, skip_special_tokens=True))
    whole = forgetting(reft_model, tokenizer, ["Where"], max_new_tokens=4)
    assert whole.tokens == [4]


def test_the_texts_of_the_library() -> None:
    _, tokenizer = rn.load_tiny_model()
    texts = neutral_texts(tokenizer)
    assert {kind: len(rows) for kind, rows in texts.items()} == {"prompts": 36, "texts": 24}
    assert all(text.completion is None for text in texts["prompts"])
    passages = [row["text"] for row in read_neutral() if "text" in row]
    for passage, text in zip(passages, texts["texts"], strict=True):
        assert text.prompt + text.completion == passage
        assert len(text.prompt.split()) == len(passage.split()) // 4
    questions = [row["prompt"] for row in read_neutral() if "prompt" in row]
    assert [text.prompt[0]["content"] for text in texts["prompts"]] == questions
    tokenizer.chat_template = None
    assert [text.prompt for text in neutral_texts(tokenizer)["prompts"]] == questions
    lines = NEUTRAL.read_text(encoding="utf-8").splitlines()
    assert len(set(lines)) == len(lines)


def test_texts_of_a_file(tmp_path: Path) -> None:
    _, tokenizer = rn.load_tiny_model()
    path = tmp_path / "texts.jsonl"
    rows = [{"text": "One two"}, {"prompt": "Who?", "completion": " I.", "note": 3}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    texts = neutral_texts(tokenizer, path)
    assert texts["texts"] == [NeutralText("One", " two")]
    assert texts["prompts"] == [NeutralText([{"role": "user", "content": "Who?"}], " I.")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"txt": "a b"}', r"line 1: expected a text, or a prompt.*got txt"),
        ('{"text": "a b", "prompt": "c"}', "got text, prompt"),
        ('{"prompt": 3}', "line 1: prompt 3: expected a text"),
        ('{"prompt": " "}', "expected a text"),
        ('{"text": "a"}', "expected at least two words"),
        ("[]", "line 1"),
        ("", "no texts in it"),
    ],
)
def test_files_that_hold_something_else(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        read_neutral(path)


def test_what_cannot_be_measured() -> None:
    reft_model, tokenizer = loaded("all")
    with pytest.raises(ValueError, match="no texts"):
        forgetting(reft_model, tokenizer, [])
    with pytest.raises(ValueError, match="batch_size 0"):
        forgetting(reft_model, tokenizer, TEXTS, batch_size=0)
    config = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    translator = rn.get_reft_model(T5ForConditionalGeneration(config))
    with pytest.raises(ValueError, match="needs a causal language model, got T5"):
        forgetting(translator, tokenizer, TEXTS)
