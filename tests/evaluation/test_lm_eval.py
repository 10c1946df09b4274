"""lm-evaluation-harness over a `ReftModel`, against scoring one row at a time without padding."""

# ruff: noqa: E402  # what comes after importorskip needs the package
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import reftnoise as rn
from support.models.architectures import tiny_model
from support.tolerance import assert_close

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'reftnoise[lm-eval]'")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from reftnoise.evaluation.lm_eval import ReftLM, evaluate_with_harness

ROWS = [
    {"question": "Where does a bear live?", "choices": ["in the forest", "sea", "the bed"]},
    {"question": "What colour is it?", "choices": ["yellow", "blue and red", "a dog", "red"]},
    {"question": "Who is the big brown animal in the forest?", "choices": ["a bear", "🐟", "a"]},
    {"question": "", "choices": ["Where is it?", "What"]},
]
GOLD = 1
PAIRS = [(row["question"], f" {choice}") for row in ROWS for choice in row["choices"]]
UNTIL = ["e", "\n"]


def wrapped(architecture: str = "tiny", positions: str = "f1+l1") -> tuple[rn.ReftModel, Any]:
    base, tokenizer = rn.load_tiny_model()
    if architecture != "tiny":
        base = tiny_model(architecture, vocab_size=len(tokenizer), n_positions=256)
    base.generation_config.max_new_tokens = None  # it would go before the task's max_gen_toks
    loreft = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}
    torch.manual_seed(1)
    return rn.get_reft_model(base, rn.ReftConfig(loreft | {"positions": positions})), tokenizer


def tokens_of(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Of the prompt, and of what is scored after it."""
    if not context:
        scored = tokenizer(continuation, add_special_tokens=False).input_ids
        return [tokenizer.bos_token_id], scored
    prompt = tokenizer(context).input_ids
    return prompt, tokenizer(context + continuation).input_ids[len(prompt) :]


@torch.no_grad()
def score(model: rn.ReftModel, prompt: list[int], scored: list[int]) -> tuple[float, bool]:
    """log p(scored | prompt) by one forward pass of this row alone."""
    ids = torch.tensor([prompt + scored])
    logits = model(input_ids=ids, prompt_lengths=torch.tensor([len(prompt)])).logits[0]
    log_probs = logits[len(prompt) - 1 : -1].log_softmax(-1)
    tokens = torch.tensor(scored)
    total = log_probs[torch.arange(len(scored)), tokens].sum()
    return float(total), torch.equal(log_probs.argmax(-1), tokens)


def scores(model: rn.ReftModel, tokenizer: Any) -> list[tuple[float, bool]]:
    return [score(model, *tokens_of(tokenizer, *pair)) for pair in PAIRS]


def accuracy(answers: list[Any]) -> float:
    values = iter(answers)
    rows = [[next(values)[0] for _ in row["choices"]] for row in ROWS]
    return sum(row.index(max(row)) == GOLD for row in rows) / len(ROWS)


def assert_same(answers: list[Any], expected: list[tuple[float, bool]]) -> None:
    assert [flag for _, flag in answers] == [flag for _, flag in expected]
    mine, theirs = (torch.tensor([value for value, _ in found]) for found in (answers, expected))
    assert_close(mine, theirs)


def ask(lm: Any, kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    """What the harness does with a task's requests."""
    requests = [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]
    return getattr(lm, kind)(requests)


# -- whole tasks ---------------------------------------------------------------------------------


def tasks(folder: Path) -> list[dict[str, Any]]:
    """Multiple choice by log-likelihood and generation, over a local file."""
    path = folder / "rows.json"
    path.write_text(json.dumps([row | {"gold": GOLD} for row in ROWS]), encoding="utf-8")
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    choices = {
        "task": "choices",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", **mean}],
    }
    answers = {
        "task": "answers",
        "output_type": "generate_until",
        "doc_to_text": "{{question}} It",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": UNTIL, "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", **mean}],
    }
    return [shared | choices, shared | answers]


@pytest.mark.parametrize("positions", ["l1", "f1+l1", "all", "all+decode"])
@pytest.mark.parametrize("architecture", ["tiny", "gpt2"])
def test_tasks(architecture: str, positions: str, tmp_path: Path) -> None:
    model, tokenizer = wrapped(architecture, positions)
    found = lm_eval.simple_evaluate(
        model=ReftLM(model, tokenizer, batch_size=3),
        tasks=tasks(tmp_path),
        task_manager=TaskManager(include_defaults=False),  # reading the harness' own takes seconds
        bootstrap_iters=0,
    )
    responses = {
        name: [r[0] for s in sorted(rows, key=lambda s: s["doc_id"]) for r in s["resps"]]
        for name, rows in found["samples"].items()
    }

    expected = scores(model, tokenizer)
    assert_same(responses["choices"], expected)
    assert found["results"]["choices"]["acc,none"] == accuracy(expected)
    with model.disabled():
        bare = scores(model, tokenizer)
    assert max(abs(a[0] - b[0]) for a, b in zip(expected, bare, strict=True)) > 1e-2

    for row, answer in zip(ROWS, responses["answers"], strict=True):
        prompt = tokenizer(f"{row['question']} It", return_tensors="pt")
        tokens = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0]
        new = tokens[prompt["input_ids"].shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        assert answer == min((text.split(stop)[0] for stop in UNTIL), key=len)


def test_tasks_by_name(tmp_path: Path) -> None:
    for task in tasks(tmp_path):
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(task), encoding="utf-8")
    model, tokenizer = wrapped()
    settings = {"batch_size": 3, "include_path": str(tmp_path)}
    names = ["choices", "answers"]
    found = evaluate_with_harness(model, tokenizer, names, **settings)
    assert found == {
        "choices": {"acc": accuracy(scores(model, tokenizer))},
        "answers": {"exact_match": 0.0},
    }
    with model.disabled():
        bare = evaluate_with_harness(model, tokenizer, ["choices"], **settings)
    assert bare == evaluate_with_harness(model.model, tokenizer, ["choices"], **settings)
    limited = evaluate_with_harness(model, tokenizer, ["choices"], limit=1, **settings)
    assert limited["choices"]["acc"] in (0.0, 1.0)
    with pytest.raises(ValueError, match=r"lm_eval task 'choises' .* did you mean 'choices'"):
        evaluate_with_harness(model, tokenizer, ["answers", "choises"], **settings)


def test_a_trained_adapter_scores_otherwise_than_its_base() -> None:
    model, tokenizer = wrapped(positions="l1")
    optimizer = torch.optim.Adam(model.interventions.parameters(), lr=2e-2)
    for _ in range(15):
        for row in ROWS:
            prompt, scored = tokens_of(tokenizer, row["question"], f" {row['choices'][GOLD]}")
            ids = torch.tensor([prompt + scored])
            labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(prompt), -100)
            optimizer.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
    lm = ReftLM(model, tokenizer, batch_size=4)
    adapted = accuracy(ask(lm, "loglikelihood", *PAIRS))
    with model.disabled():
        assert accuracy(ask(lm, "loglikelihood", *PAIRS)) < adapted == 1.0


# -- log-likelihoods -----------------------------------------------------------------------------


def test_one_text_whose_context_ends_at_several_places() -> None:
    model, tokenizer = wrapped(positions="l1")
    text = "Where does the big brown bear live?"
    pairs = [(text[:end], text[end:]) for end in (5, 10, 14, 18, len(text) - 1)]
    answers = ask(ReftLM(model, tokenizer, batch_size=8), "loglikelihood", *pairs)
    assert_same(answers, [score(model, *tokens_of(tokenizer, *pair)) for pair in pairs])
    direct = ask(HFLM(pretrained=model, tokenizer=tokenizer), "loglikelihood", pairs[0])
    assert abs(direct[0][0] - answers[0][0]) > 1e-2, "HFLM has learnt where contexts end"


def test_a_context_that_is_too_long_loses_its_beginning(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = wrapped()
    pairs = [("Where does the big brown bear live?", " in the forest"), ("What", " is it?")]
    (prompt, scored), short = (tokens_of(tokenizer, *pair) for pair in pairs)
    limit = len(scored) + 3  # tokens that are read, of which the last is not scored's last
    answers = ask(ReftLM(model, tokenizer, batch_size=2, max_length=limit), "loglikelihood", *pairs)
    assert "1 of 2 requests exceed max_length" in caplog.text
    assert len(prompt) > 4
    assert_same(answers, [score(model, prompt[-4:], scored), score(model, *short)])


@pytest.mark.parametrize("size", ["auto", "auto:2", 1, 64])
def test_batch_sizes(size: str | int) -> None:
    model, tokenizer = wrapped()
    lm = ReftLM(model, tokenizer, batch_size=size, max_batch_size=4, max_length=32)
    assert_same(ask(lm, "loglikelihood", *PAIRS), scores(model, tokenizer))


@pytest.mark.parametrize("size", [1, 3, "auto"])
@pytest.mark.parametrize("limit", [7, 64])
def test_rolling(limit: int, size: int | str) -> None:
    model, tokenizer = wrapped(positions="l1")
    texts = [row["question"] for row in ROWS if row["question"]]
    expected = []
    for text in texts:
        windows = get_rolling_token_windows(
            token_list=tokenizer(text).input_ids,
            prefix_token=tokenizer.bos_token_id,
            max_seq_len=limit,
            context_len=1,
        )
        expected.append(sum(score(model, *make_disjoint_window(w))[0] for w in windows))
    lm = ReftLM(model, tokenizer, batch_size=size, max_batch_size=2, max_length=limit)
    answers = ask(lm, "loglikelihood_rolling", *[(text,) for text in texts])
    assert_close(answers, expected)


def test_answers_are_kept_by_the_harness_cache(tmp_path: Path) -> None:
    model, tokenizer = wrapped()
    lm = CachingLM(ReftLM(model, tokenizer, batch_size=3), str(tmp_path / "answers.db"))
    first = ask(lm, "loglikelihood", *PAIRS)
    with model.disabled():
        assert ask(lm, "loglikelihood", *PAIRS) == first


def test_dtypes_are_those_of_hflm() -> None:
    model, tokenizer = wrapped()
    settings = {"batch_size": 2, "mixed_precision_dtype": "bfloat16", "softmax_dtype": "float32"}
    theirs = ask(
        HFLM(pretrained=model.model, tokenizer=tokenizer, **settings), "loglikelihood", *PAIRS
    )
    with model.disabled():
        mine = ask(ReftLM(model, tokenizer, **settings), "loglikelihood", *PAIRS)
        full = ask(ReftLM(model, tokenizer, batch_size=2), "loglikelihood", *PAIRS)
    rounding = max(abs(a[0] - b[0]) for a, b in zip(full, theirs, strict=True))
    assert rounding > 1e-3
    assert max(abs(a[0] - b[0]) for a, b in zip(mine, theirs, strict=True)) < rounding / 2


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call
def test_virtual_tokens_before_the_prompt() -> None:
    pytest.importorskip("peft", reason="needs the extra [test]: peft")
    base, tokenizer = rn.load_tiny_model()
    loreft = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}
    section = {"peft_type": "prompt_tuning", "num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
    model = rn.get_reft_model(base, rn.ReftConfig(loreft, peft=section)).eval()
    expected = []
    for context, continuation in PAIRS:
        prompt, scored = tokens_of(tokenizer, context, continuation)
        labels = torch.tensor([[-100] * len(prompt) + scored])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([prompt + scored]), labels=labels).loss
        expected.append(-float(loss) * len(scored))
    answers = ask(ReftLM(model, tokenizer, batch_size=3), "loglikelihood", *PAIRS)
    assert_close([value for value, _ in answers], expected)


@torch.no_grad()
def test_an_encoder_decoder_model() -> None:
    _, tokenizer = rn.load_tiny_model()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        d_kv=8,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    base = T5ForConditionalGeneration(config).eval()
    for parameter in base.parameters():  # larger than default weights
        parameter.mul_(3)
    loreft = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}
    decoder = loreft | {"component": "decoder.block_output", "positions": "decode"}
    model = rn.get_reft_model(base, rn.ReftConfig([loreft | {"positions": "f1+l1"}, decoder]))
    pairs = [pair for pair in PAIRS if pair[0]]
    expected = []
    for context, continuation in pairs:
        ids = tokenizer(context, return_tensors="pt").input_ids
        labels = tokenizer(continuation, add_special_tokens=False, return_tensors="pt").input_ids
        log_probs = model(input_ids=ids, labels=labels).logits[0].log_softmax(-1)
        total = log_probs.gather(1, labels[0][:, None]).sum()
        expected.append((float(total), torch.equal(log_probs.argmax(-1), labels[0])))
    assert_same(ask(ReftLM(model, tokenizer, batch_size=3), "loglikelihood", *pairs), expected)


# -- mistakes ------------------------------------------------------------------------------------


def test_a_model_without_edits_is_refused() -> None:
    base, tokenizer = rn.load_tiny_model()
    with pytest.raises(ValueError, match="expected a ReftModel, got LlamaForCausalLM"):
        ReftLM(base, tokenizer)


@pytest.mark.parametrize("continuation", ["", " a" * 40])
def test_a_continuation_that_cannot_be_scored(continuation: str) -> None:
    lm = ReftLM(*wrapped(), max_length=16)
    with pytest.raises(ValueError, match=r"of continuation; expected some of each, and at most 16"):
        ask(lm, "loglikelihood", ("Who?", continuation))
