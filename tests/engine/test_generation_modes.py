"""Ways to generate that `test_engine` leaves out, and transformers' pipelines."""

from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import QuantizedCache, TextIteratorStreamer, TextStreamer, pipeline

import reftnoise as rn
from support.adapters import moved
from support.models.architectures import tiny_model
from support.padded_rows import generated, padded, reference, rows, wrapped
from support.waiting import PATIENCE

POSITIONS = ["l1", "f2+l3", "all", "all+decode"]
NEW = 8


def alone(index: int) -> dict[str, Tensor]:
    row = rows()[index][None]
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}


def seeded(model: Any, batch: dict[str, Tensor], **settings: Any) -> Tensor:
    torch.manual_seed(3)
    tokens = model.generate(**batch, max_new_tokens=NEW, eos_token_id=None, **settings)
    return tokens[:, batch["input_ids"].shape[1] :]


# -- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_sampling(positions: str) -> None:
    model = wrapped(tiny_model(), positions)
    for index in range(3):
        batch = alone(index)
        ids = batch["input_ids"]
        prompt = torch.tensor([ids.shape[1]])
        torch.manual_seed(3)
        for _ in range(NEW):
            logits = model(input_ids=ids, prompt_lengths=prompt).logits[:, -1]
            drawn = torch.multinomial((logits / 0.8).softmax(-1), 1)
            ids = torch.cat([ids, drawn], dim=1)
        settings = {"do_sample": True, "temperature": 0.8, "top_k": 0}
        assert torch.equal(seeded(model, batch, **settings), ids[:, prompt:])
        row = {name: value[index : index + 1] for name, value in padded("left").items()}
        assert torch.equal(seeded(model, row, **settings), ids[:, prompt:])


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "do_sample": True},
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
        {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
@torch.no_grad()
def test_padding_makes_no_difference(settings: dict[str, Any]) -> None:
    for positions in POSITIONS:
        model = wrapped(tiny_model(), positions)
        found = [seeded(model, alone(index), **settings) for index in range(3)]
        batch = padded("left")
        for index in range(3):
            row = {name: value[index : index + 1] for name, value in batch.items()}
            assert torch.equal(seeded(model, row, **settings), found[index])
        if not settings.get("do_sample"):  # rows of a batch would draw other numbers
            assert torch.equal(seeded(model, batch, **settings), torch.cat(found))
        with model.disabled():
            assert not torch.equal(seeded(model, alone(0), **settings), found[0])


@torch.no_grad()
def test_dropout_of_a_model_in_training_mode_acts_in_generation_too() -> None:
    base = tiny_model()
    entry = {"layer": "all", "intervention": "noreft", "low_rank_dimension": 4, "dropout": 0.5}
    config = rn.ReftConfig([entry | {"positions": "decode"}])
    model = moved(rn.get_reft_model(base, config))
    batch = alone(0)
    for training in (True, False):
        model.train(training)
        logits = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            outputs = model.generate(
                **batch, max_new_tokens=4, eos_token_id=None, do_sample=False,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            logits.append(outputs.logits[1])
        assert torch.equal(*logits) is not training


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_prompt_lookup(positions: str) -> None:
    model = wrapped(tiny_model(), positions)
    lengths = set()
    model.model.model.register_forward_hook(lambda *call: lengths.add(call[-1][0].shape[1]))
    for index in range(3):
        tokens = generated(model, alone(index), prompt_lookup_num_tokens=3)
        assert torch.equal(tokens[0], reference(model, rows()[index]))
    assert lengths - {1, *map(len, rows())}, "no candidates were checked"


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_a_quantized_cache(positions: str) -> None:
    model, batch = wrapped(tiny_model(), positions), alone(0)
    settings = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    cache = QuantizedCache("fp8", config=model.config)
    ids, expected = batch["input_ids"], []
    for _ in range(NEW):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        expected.append(ids[0, 0])
    assert torch.equal(generated(model, batch, **settings)[0], torch.stack(expected))


@torch.no_grad()
def test_new_tokens_alone_beside_a_cache_do_not_tell_the_prompt() -> None:
    model, ids = wrapped(tiny_model(), "l1"), alone(0)["input_ids"]
    cache = model(input_ids=ids, use_cache=True).past_key_values
    mask = torch.ones(1, ids.shape[1] + 2).long()
    with pytest.raises(ValueError, match="input_ids of 2 tokens, attention_mask of"):
        model.generate(input_ids=ids[:, :2], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_a_decoding_loop_of_the_callers(positions: str) -> None:
    """What modes that transformers moved out of itself are: contrastive search, group beams."""

    def decode(model: Any, input_ids: Tensor, **inputs: Any) -> Tensor:
        cache, new = inputs["past_key_values"], input_ids
        for _ in range(NEW):
            logits = model(input_ids=new, past_key_values=cache, use_cache=True).logits
            new = logits[:, -1].argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, new], dim=1)
        return input_ids

    model = wrapped(tiny_model(), positions)
    tokens = generated(model, alone(1), custom_generate=decode)
    assert torch.equal(tokens[0], reference(model, rows()[1]))


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_what_is_returned_beside_tokens(positions: str) -> None:
    model, batch = wrapped(tiny_model(), positions), padded("left")
    settings = {"output_logits": True, "output_hidden_states": True, "output_attentions": True}
    found = model.generate(
        **batch, max_new_tokens=NEW, eos_token_id=None, return_dict_in_generate=True, **settings
    )
    width = batch["input_ids"].shape[1]
    for index, row in enumerate(rows()):
        ids = torch.cat([row, found.sequences[index, width:]])[None]
        whole = model(
            input_ids=ids, prompt_lengths=torch.tensor([len(row)]), output_hidden_states=True
        )
        for step in range(NEW):
            column = len(row) - 1 + step
            torch.testing.assert_close(
                found.logits[step][index], whole.logits[0, column], atol=1e-4, rtol=1e-4
            )
            torch.testing.assert_close(
                found.hidden_states[step][-1][index, -1],
                whole.hidden_states[-1][0, column],
                atol=1e-4,
                rtol=1e-4,
            )


@torch.no_grad()
def test_logits_processors_and_stopping_criteria() -> None:
    model, batch = wrapped(tiny_model(), "all+decode"), padded("left")
    free = generated(model, batch)
    banned = int(free[0, 1])
    ids = rows()[0][None]
    for _ in range(NEW):
        logits = model(input_ids=ids, prompt_lengths=torch.tensor([12])).logits[:, -1]
        logits[:, banned] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated(model, batch, bad_words_ids=[[banned]])[0], ids[0, 12:])

    def third(tokens: Tensor, _: Any) -> Tensor:
        return torch.full((len(tokens),), tokens.shape[1] >= 12 + 3)

    assert torch.equal(generated(model, batch, stopping_criteria=[third]), free[:, :3])


# -- text ----------------------------------------------------------------------------------------

TEXTS = ["Where does a bear live?", "What colour is the big yellow banana?", "Who?"]
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


def chat_model(positions: str = "f1+l1") -> tuple[rn.ReftModel, Any]:
    base, tokenizer = rn.load_tiny_model()
    return wrapped(base, positions), tokenizer


def text_of(
    model: rn.ReftModel, tokenizer: Any, prompt: str, /, special: bool = True, **settings: Any
) -> str:
    """What is generated after one prompt, without padding."""
    batch = tokenizer(prompt, add_special_tokens=special, return_tensors="pt")
    tokens = model.generate(**batch, **(GREEDY | settings))[0, batch["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def test_streamers(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = chat_model()
    batch = tokenizer(TEXTS[0], return_tensors="pt")
    expected = text_of(model, tokenizer, TEXTS[0])
    streamer = TextIteratorStreamer(
        tokenizer, skip_prompt=True, timeout=PATIENCE, skip_special_tokens=True
    )
    thread = Thread(target=model.generate, kwargs={**batch, **GREEDY, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected
    assert len(pieces) > 2
    capsys.readouterr()
    printer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**batch, **GREEDY, streamer=printer)
    assert capsys.readouterr().out.strip() == expected.strip()


def test_stop_strings() -> None:
    model, tokenizer = chat_model()
    whole = text_of(model, tokenizer, TEXTS[0])
    stopped = text_of(model, tokenizer, TEXTS[0], stop_strings=[whole[1]], tokenizer=tokenizer)
    assert stopped == whole[:2] != whole


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_pipeline(positions: str) -> None:
    model, tokenizer = chat_model(positions)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert generator.model is model
    expected = [text_of(model, tokenizer, text) for text in TEXTS]
    with model.disabled():
        assert [text_of(model, tokenizer, text) for text in TEXTS] != expected
    one = generator(TEXTS[0], return_full_text=False, **GREEDY)
    assert one[0]["generated_text"] == expected[0]
    batched = generator(TEXTS, batch_size=2, return_full_text=False, **GREEDY)
    assert [answers[0]["generated_text"] for answers in batched] == expected


def test_the_pipeline_with_chat_messages() -> None:
    model, tokenizer = chat_model()
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    prompts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        for chat in chats
    ]
    expected = [text_of(model, tokenizer, p, special=False) for p in prompts]
    for size in (1, 2):
        answers = generator(chats, batch_size=size, **GREEDY)
        assert [answer[0]["generated_text"][-1]["content"] for answer in answers] == expected
