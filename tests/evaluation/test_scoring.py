"""Evaluation in batches, against one row at a time without padding."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import reftnoise as rn
from reftnoise.data.tasks.base import Task, parse_rows
from reftnoise.data.tasks.registry import get_task
from reftnoise.evaluation import Evaluation, evaluate
from reftnoise.evaluation.generation import generated
from reftnoise.evaluation.likelihood import choice_log_probs, without_beginnings
from support.data import rendered
from support.models.architectures import tiny_model
from support.models.tiny_models import new_model
from support.tolerance import assert_close

LABELS = ["in the forest", "in a big house", "no"]
ROWS = [
    {"prompt": "Where does a bear live?", "completion": " in the forest"},
    {"prompt": "What colour is the big house that you see?", "completion": " no"},
    {"prompt": "Who?", "completion": " no"},
    {"prompt": "Is it here?\nOr is it in the house, or behind it?", "completion": " no"},
    {"prompt": "Where?", "completion": " in the forest"},
]
PROMPTS = [row["prompt"] for row in ROWS]
PADDINGS = pytest.mark.parametrize(
    ("side", "pads_with"),
    [("left", "pad"), ("left", "eos"), ("right", "eos"), ("right", "nothing")],
)


def task_of_labels() -> Task:
    return get_task({"name": "classification", "labels": LABELS})


def loaded(positions: str | None = "f1+l1", architecture: str = "tiny") -> tuple[Any, Any]:
    """A base, or with positions a `ReftModel`, and the tokenizer."""
    base, tokenizer = rn.load_tiny_model()
    if architecture != "tiny":
        base = tiny_model(architecture, vocab_size=len(tokenizer), n_positions=256)
    if positions is None:
        return base, tokenizer
    loreft = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}
    torch.manual_seed(1)
    model = rn.get_reft_model(base, rn.ReftConfig(loreft | {"positions": positions}))
    return model.eval(), tokenizer


def padding(tokenizer: Any, side: str, pads_with: str) -> None:
    tokenizer.padding_side = side
    if pads_with != "pad":
        tokenizer.pad_token = tokenizer.eos_token if pads_with == "eos" else None


@torch.no_grad()
def log_prob(model: Any, prompt: list[int], rest: list[int]) -> float:
    """Of a text after a prompt, by one forward pass of this row alone."""
    given: dict[str, Tensor] = {"input_ids": torch.tensor([prompt + rest])}
    if isinstance(model, rn.ReftModel):
        given["prompt_lengths"] = torch.tensor([len(prompt)])
    log_probs = model(**given).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(log_probs[torch.arange(len(rest)), torch.tensor(rest)].sum())


def text_of(model: Any, tokenizer: Any, ids: list[int], **settings: Any) -> str:
    """What is generated after a prompt by itself, up to the first end of text."""
    prompt = torch.tensor([ids])
    given = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0, "do_sample": False}
    found = model.generate(input_ids=prompt, **given | settings)[0, prompt.shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return str(tokenizer.decode(found[: found.index(end)] if end in found else found))


WAYS = pytest.mark.parametrize("by", ["generation", "likelihood", "loss"])

# -- by likelihood ---------------------------------------------------------------------------------


@PADDINGS
@pytest.mark.parametrize("positions", [None, "f1+l1", "all"])
def test_likelihood_is_that_of_each_row_alone(
    positions: str | None, side: str, pads_with: str
) -> None:
    model, tokenizer = loaded(positions)
    padding(tokenizer, side, pads_with)
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        rest = [tokenizer(f"{prompt} {label}").input_ids[len(ids) :] for label in LABELS]
        expected.append([log_prob(model, ids, one) for one in rest])
    choices = [[f" {label}" for label in LABELS]] * len(PROMPTS)
    for size in (1, 4, 64):
        found = torch.stack(choice_log_probs(model, tokenizer, PROMPTS, choices, batch_size=size))
        assert_close(found, expected)
    assert tokenizer.padding_side == side

    answers = evaluate(model, tokenizer, task_of_labels(), ROWS, by="likelihood", batch_size=4)
    best = [LABELS[row.index(max(row))] for row in expected]
    assert answers.predictions == best
    assert answers.texts == [f" {label}" for label in best]
    assert answers.answers == [row["completion"].strip() for row in ROWS]
    assert answers.right == [a == b for a, b in zip(best, answers.answers, strict=True)]
    mean = [[p / len(c) for p, c in zip(row, LABELS, strict=True)] for row in expected]
    normalised = [LABELS[row.index(max(row))] for row in mean]
    right = sum(a == b for a, b in zip(normalised, answers.answers, strict=True))
    assert answers.scores == {
        "accuracy": sum(answers.right) / len(ROWS),
        "accuracy_normalised": right / len(ROWS),
    }


@PADDINGS
def test_likelihood_with_prompts_that_are_kept(side: str, pads_with: str) -> None:
    model, tokenizer = loaded("l1")
    padding(tokenizer, side, pads_with)
    choices = [[f" {label}" for label in LABELS]] * len(PROMPTS)
    expected = torch.stack(choice_log_probs(model, tokenizer, PROMPTS, choices))
    model.prefix_cache = rn.PrefixCache()
    for size in (1, 64):
        sums = torch.stack(choice_log_probs(model, tokenizer, PROMPTS, choices, batch_size=size))
        assert_close(sums, expected)
    kept = len(model.prefix_cache)
    assert 0 < kept == model.prefix_cache.misses <= len(PROMPTS)
    assert model.prefix_cache.hits >= len(PROMPTS)


@pytest.mark.parametrize("template", ["plain", "chat", "alpaca", "Q: {prompt}\nA:"])
def test_likelihood_in_a_template(template: str) -> None:
    model, tokenizer = loaded()
    answers = evaluate(model, tokenizer, task_of_labels(), ROWS, by="likelihood", template=template)
    for row, text in zip(ROWS, answers.texts, strict=True):
        prompt, adds = rendered(tokenizer, template, row)
        end = [] if adds else [tokenizer.eos_token_id]  # this chat template ends a turn with it
        ids = tokenizer(prompt, add_special_tokens=adds).input_ids
        sums = []
        for label in LABELS:
            whole = tokenizer(f"{prompt} {label}", add_special_tokens=adds).input_ids
            sums.append(log_prob(model, ids, whole[len(ids) :] + end))
        assert text == f" {LABELS[sums.index(max(sums))]}"


def test_absolute_positions_count_no_padding() -> None:
    model, tokenizer = loaded(architecture="gpt2")
    choices = [[" no", " in a big house"]] * len(PROMPTS)
    alone, together = (
        torch.stack(choice_log_probs(model, tokenizer, PROMPTS, choices, batch_size=size))
        for size in (1, 64)
    )
    assert_close(together, alone)
    texts = [
        generated(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=size) for size in (1, 64)
    ]
    assert texts[0] == texts[1]


# -- by generation ---------------------------------------------------------------------------------


@PADDINGS
@pytest.mark.parametrize("positions", [None, "f1+l1", "all+decode"])
def test_generation_is_that_of_each_row_alone(
    positions: str | None, side: str, pads_with: str
) -> None:
    model, tokenizer = loaded(positions)
    expected = [
        text_of(model, tokenizer, tokenizer(prompt).input_ids, max_new_tokens=12)
        for prompt in PROMPTS
    ]
    assert len(set(expected)) > 1
    padding(tokenizer, side, pads_with)
    for size in (2, 64):
        found = generated(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=size)
        assert found == expected
    assert tokenizer.padding_side == side
    rows = [row | {"completion": text} for row, text in zip(ROWS, expected, strict=True)]
    rows[0]["completion"] = "something else"
    answers = evaluate(model, tokenizer, get_task("text"), rows, max_new_tokens=12)
    assert answers.texts == expected
    assert answers.prompts == PROMPTS
    assert answers.scores == {"exact_match": 1 - 1 / len(ROWS)}
    assert answers.right == [False] + [True] * (len(ROWS) - 1)


def chat_ids(tokenizer: Any, prompt: str) -> list[int]:
    turn = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"])


@pytest.mark.parametrize("pads_with", ["pad", "eos"])
def test_repetition_penalties_leave_padding_out(pads_with: str) -> None:
    model, tokenizer = loaded(None)
    rows = [{"instruction": prompt, "output": "no"} for prompt in PROMPTS]
    settings = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 2}
    expected = [
        text_of(model, tokenizer, tokenizer(prompt).input_ids, max_new_tokens=20, **settings)
        for prompt in PROMPTS
    ]
    padding(tokenizer, "right", pads_with)
    seen: list[Tensor] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    task = get_task({"name": "instruct", **settings})
    answers = evaluate(model, tokenizer, task, rows, max_new_tokens=20)
    assert answers.texts == expected
    # What pads a row would count as written.
    own = [frozenset(tokenizer(prompt).input_ids) for prompt in PROMPTS]
    assert {frozenset(row.tolist()) for row in seen[0]} == set(own)


def test_a_text_ends_where_the_base_ends_it() -> None:
    model, tokenizer = loaded()
    whole = generated(model, tokenizer, PROMPTS, max_new_tokens=12)
    end = tokenizer(whole[0], add_special_tokens=False).input_ids[2]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    found = generated(model, tokenizer, PROMPTS, max_new_tokens=12)
    word = tokenizer.decode([end])
    assert found[0] == whole[0].split(word)[0]
    for text, longer in zip(found, whole, strict=True):
        assert word not in text
        assert longer.startswith(text)


def test_generation_in_a_chat() -> None:
    model, tokenizer = loaded()
    answers = evaluate(model, tokenizer, get_task("text"), ROWS, template="chat", max_new_tokens=8)
    for prompt, text in zip(PROMPTS, answers.texts, strict=True):
        assert text == text_of(model, tokenizer, chat_ids(tokenizer, prompt), max_new_tokens=8)


def test_as_many_tokens_as_the_longest_label() -> None:
    model, tokenizer = loaded(None)
    answers = evaluate(model, tokenizer, task_of_labels(), ROWS)
    prompt = tokenizer(PROMPTS[0]).input_ids
    longest = max(len(tokenizer(f"{PROMPTS[0]} {one}").input_ids) for one in LABELS) - len(prompt)
    for text, one in zip(answers.texts, PROMPTS, strict=True):
        ids = tokenizer(one).input_ids
        assert text == text_of(model, tokenizer, ids, max_new_tokens=longest + 1)


def test_draws_are_the_seeds_and_no_others() -> None:
    model, tokenizer = loaded()
    task = get_task({"name": "svamp", "sampling": True})
    rows = [{"instruction": prompt, "output": "", "answer": "1"} for prompt in PROMPTS]
    state = torch.get_rng_state()
    found = [
        evaluate(model, tokenizer, task, rows, max_new_tokens=24, seed=seed).texts
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]
    assert torch.equal(torch.get_rng_state(), state)


# -- by loss ---------------------------------------------------------------------------------------


@PADDINGS
@pytest.mark.parametrize("positions", [None, "f1+l1", "all"])
def test_loss_is_that_of_each_row_alone(positions: str | None, side: str, pads_with: str) -> None:
    model, tokenizer = loaded(positions)
    padding(tokenizer, side, pads_with)
    expected = []
    for row in ROWS:
        ids = tokenizer(row["prompt"]).input_ids
        rest = tokenizer(row["prompt"] + row["completion"]).input_ids[len(ids) :]
        rest.append(tokenizer.eos_token_id)
        expected.append(-log_prob(model, ids, rest) / len(rest))
    for size in (1, 4, 64):
        found = evaluate(model, tokenizer, task_of_labels(), ROWS, by="loss", batch_size=size)
        assert found.losses is not None
        assert_close(torch.tensor(found.losses), expected)
        assert found.scores == {"loss": pytest.approx(sum(expected) / len(ROWS), rel=1e-4)}
        assert found.right == found.predictions == found.texts == []
        assert [row["loss"] for row in found.rows()] == found.losses


@pytest.mark.parametrize("max_length", [None, 12, 4])
def test_loss_is_that_of_training(max_length: int | None) -> None:
    model, tokenizer = loaded("f1+l1")
    row = {"prompt": PROMPTS[0], "completion": " yes indeed"}
    limit: Any = {"max_length": max_length}
    found = evaluate(model, tokenizer, get_task("text"), [row], by="loss", template="chat", **limit)
    data = rn.make_last_position_supervised_data_module(
        tokenizer, model, [row["prompt"]], [row["completion"]], chat_template=True, **limit
    )
    if max_length is not None:
        assert len(data["train_dataset"][0]["input_ids"]) == max_length
    batch = data["data_collator"](list(data["train_dataset"]))
    with torch.no_grad():
        assert found.scores["loss"] == pytest.approx(float(model(**batch).loss), rel=1e-4)


# -- all -------------------------------------------------------------------------------------------


@WAYS
def test_without_its_units_a_model_is_its_base(by: Any) -> None:
    def found(model: Any) -> Evaluation:
        return evaluate(model, tokenizer, task_of_labels(), ROWS, by=by)

    model, tokenizer = loaded("all")
    base = loaded(None)[0]
    with model.disabled():
        assert found(model) == found(base)
    if by != "likelihood":
        assert found(model) != found(base)


@pytest.mark.parametrize("by", ["generation", "likelihood"])
def test_what_was_learnt_is_scored(by: Any) -> None:
    model, tokenizer = loaded("all")
    task = task_of_labels()
    before = evaluate(model, tokenizer, task, ROWS, by=by)
    data = rn.make_last_position_supervised_data_module(
        tokenizer, model, PROMPTS, [row["completion"] for row in ROWS]
    )
    batch = data["data_collator"](list(data["train_dataset"]))
    optimizer = torch.optim.Adam(model.interventions.parameters(), lr=2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    after = evaluate(model, tokenizer, task, ROWS, by=by)
    assert before.scores["accuracy"] < after.scores["accuracy"] == 1.0


@WAYS
def test_parsed_rows_are_not_parsed_again(by: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded()
    task = task_of_labels()
    expected = evaluate(model, tokenizer, task, ROWS, by=by)
    parsed = parse_rows(task, ROWS)
    monkeypatch.setattr(task, "question", None)
    assert evaluate(model, tokenizer, task, parsed, by=by) == expected


def test_a_model_is_left_as_it_was() -> None:
    model, tokenizer = loaded()
    model.train()
    model.model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    for by in ("generation", "likelihood"):
        evaluate(model, tokenizer, task_of_labels(), ROWS[:2], by=by)  # type: ignore[arg-type]
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


@WAYS
def test_progress(by: Any) -> None:
    model, tokenizer = loaded()
    calls: list[tuple[int, int]] = []
    evaluate(
        model,
        tokenizer,
        task_of_labels(),
        iter(ROWS),
        by=by,
        batch_size=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == sorted(calls)
    assert calls[-1] == (len(ROWS), len(ROWS))


def test_prompts_that_are_too_long_lose_their_beginning(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = loaded()
    tokenizer.model_max_length = 20
    long = f"{tokenizer.bos_token}{'Where is the bear? ' * 9}Who?"
    rows = [{"prompt": long, "completion": " no"}, ROWS[2]]
    ids = tokenizer(long).input_ids
    assert ids[0] == tokenizer.bos_token_id != ids[1]
    with caplog.at_level(logging.WARNING):
        answers = evaluate(model, tokenizer, get_task("text"), rows, max_new_tokens=6)
    assert "1 of 2 prompts had no room in 14 tokens and lost their beginning" in caplog.text
    kept = ids[:1] + ids[-13:]  # the beginning-of-text token stays
    assert answers.texts[0] == text_of(model, tokenizer, kept, max_new_tokens=6)
    assert answers.prompts[0] == long

    found = choice_log_probs(model, tokenizer, [long, "Who?"], [[" no"]] * 2)
    rest = tokenizer(f"{long} no").input_ids[len(ids) :]
    kept = ids[:1] + ids[len(rest) - 19 :]
    assert_close(float(found[0]), log_prob(model, kept, rest))


def test_completions_that_are_too_long_lose_their_end(caplog: pytest.LogCaptureFixture) -> None:
    _, tokenizer = loaded()
    pairs = [([5, 6], [7, 8]), ([5], list(range(20, 30))), ([5, 6, 7], list(range(20, 30)))]
    with caplog.at_level(logging.WARNING):
        kept = without_beginnings(tokenizer, pairs, 6)
    assert kept == [([5, 6], [7, 8]), ([5], [20, 21, 22, 23, 24]), ([7], [20, 21, 22, 23, 24])]
    assert [record.message for record in caplog.records] == [
        "1 of 3 prompts had no room in 6 tokens and lost their beginning",
        "2 of 3 completions had no room in 6 tokens and lost their end",
    ]


def test_a_task_gets_half_the_context(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = loaded()
    tokenizer.model_max_length = 40
    rows = [{"instruction": "Who?", "output": "1", "answer": "1"}]
    (text,) = evaluate(model, tokenizer, get_task("svamp"), rows).texts
    assert "task 'svamp' needs 512 new tokens, of a context of 40 it gets 20" in caplog.text
    ids = tokenizer("Who?\n").input_ids
    assert text == text_of(model, tokenizer, ids, max_new_tokens=20)


# -- classifiers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("subset", ["mnli", "stsb"])
@torch.no_grad()
def test_classifiers(subset: str, side: str) -> None:
    task: Any = get_task({"name": "glue", "subset": subset})
    _, tokenizer = loaded(None)
    tokenizer.padding_side = side
    base = new_model(
        AutoModelForSequenceClassification,
        "bert",
        num_labels=task.num_labels,
        vocab_size=len(tokenizer),
    )
    loreft = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2, "positions": "f2"}
    model = rn.get_reft_model(base, rn.ReftConfig(loreft)).eval()
    first, second = task.subset.texts
    rows = [
        {first: prompt, second: PROMPTS[index - 1], "label": index % 3}
        for index, prompt in enumerate(PROMPTS)
    ]
    expected = [
        model(**tokenizer(*task.texts(row), return_tensors="pt")).logits[0].tolist() for row in rows
    ]
    found = evaluate(model, tokenizer, task, rows, batch_size=2)
    if subset == "mnli":
        assert found.predictions == [task.classes[row.index(max(row))] for row in expected]
        assert found.scores == {"accuracy": sum(found.right) / len(rows)}
    else:
        numbers = [float(prediction) for prediction in found.predictions]
        assert numbers == pytest.approx([row[0] for row in expected], rel=1e-4)
        assert list(found.scores) == ["pearson"]
    other: Any = get_task({"name": "glue", "subset": "rte"})
    row = {"sentence1": "a", "sentence2": "b", "label": 0}
    expected_error = f"the model gives \\[{task.num_labels}\\] numbers .* needs a head of 2"
    with pytest.raises(ValueError, match=expected_error):
        evaluate(model, tokenizer, other, [row])
    with pytest.raises(ValueError, match="template 'chat': a classifier reads its texts as they"):
        evaluate(model, tokenizer, other, [row], template="chat")
    with pytest.raises(ValueError, match="needs a causal language model, got Bert"):
        evaluate(model, tokenizer, task_of_labels(), ROWS)


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rows": []}, "no rows: expected at least one to evaluate"),
        ({"rows": [*ROWS, {"prompt": "a"}]}, "task 'text', row 5: no column 'completion' in pro"),
        ({"by": "luck"}, "by 'luck': expected generation, likelihood, loss"),
        ({"by": "likelihood"}, "task 'text' has no choices: evaluate by generation"),
        ({"batch_size": 0}, "batch_size 0: expected at least 1"),
        ({"template": "plane"}, "template 'plane': expected plain, chat, alpaca, or a text with"),
        ({"max_new_tokens": 0}, "max_new_tokens 0: expected at least 1 and at most 254"),
        ({"max_new_tokens": 255}, "max_new_tokens 255: .* at most 254, for a context of 256"),
    ],
)
def test_mistakes(settings: dict[str, Any], expected: str) -> None:
    model, tokenizer = loaded(None)
    with pytest.raises(ValueError, match=expected):
        evaluate(model, tokenizer, get_task("text"), **({"rows": ROWS} | settings))


def test_a_chat_without_its_template() -> None:
    model, tokenizer = loaded(None)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="template 'chat': the tokenizer has no chat template"):
        evaluate(model, tokenizer, get_task("text"), ROWS, template="chat")
