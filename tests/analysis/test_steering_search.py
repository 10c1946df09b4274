"""Layer and strength of a steering vector, against passes without caches and closed forms."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import reftnoise as rn
from reftnoise.analysis.steering.options import SteerOptions
from reftnoise.analysis.steering.pairs import Contrast, PairRow, read_pairs, split_pairs
from reftnoise.analysis.steering.search import neutral_pairs, search, tokenized_pairs
from reftnoise.analysis.steering.sweep import (
    Candidate,
    NeutralPrompts,
    Questions,
    fitted_candidates,
    sweep,
)
from reftnoise.cli.main import main
from reftnoise.config.positions import Positions
from reftnoise.evaluation.forgetting import forgetting, written_by_base
from reftnoise.evaluation.likelihood import choice_log_probs, next_token_log_probs
from support.tolerance import assert_close

POSITIONS = ["l1+decode", "l3+decode", "all+decode", "f1", "l50"]


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def steered(positions: str) -> tuple[rn.ReftModel, Any]:
    """Two vectors by name, at two layers."""
    base, tokenizer = rn.load_tiny_model()
    entry = {"layer": "all", "intervention": "addition", "positions": positions}
    reft_model = rn.get_reft_model(base, rn.ReftConfig(entry)).eval()
    generator = torch.Generator().manual_seed(0)
    for unit in reft_model.interventions.values():
        unit.vector.copy_(torch.randn(unit.vector.shape, generator=generator))
    for layer in (1, 3):
        reft_model.adapters.derive(f"mean-{layer}", "default", layers=[layer])
    return reft_model, tokenizer


CHOICES: list[Any] = [None, {"mean-1": 2.0}, {"mean-3": -1.0}, "mean-1"]


@pytest.mark.parametrize("positions", POSITIONS)
def test_cached_prompts_answer_as_whole_ones(positions: str) -> None:
    reft_model, tokenizer = steered(positions)
    texts = ["Can a bee fly?", "Where does a big brown bear live?", "Hi", "Does a hen lay eggs?"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    answers = [tokenizer(text)["input_ids"] for text in (" Yes", " No, not at all", " A")]
    pairs = [
        Contrast(row, answers[number % 2], answers[2 - number % 2])
        for number, row in enumerate(rows)
    ]
    questions = Questions(reft_model, pairs, positions=Positions.parse(positions), rows=8)
    cached = questions.matching(CHOICES)
    for choice, values in zip(CHOICES, cached, strict=True):
        for pair, value in zip(pairs, values, strict=True):
            sums = []
            for answer in (pair.matching, pair.other):
                with reft_model.using(adapter=choice):
                    (log_probs,) = next_token_log_probs(reft_model, [(pair.prompt, answer)])
                sums.append(float(log_probs.gather(1, torch.tensor(answer)[:, None]).sum()))
            expected = torch.tensor(sums).softmax(0)[0]
            assert_close(value, expected)


@pytest.mark.parametrize("positions", ["l1+decode", "all+decode"])
def test_the_divergence_is_that_of_forgetting(positions: str) -> None:
    reft_model, tokenizer = steered(positions)
    texts = written_by_base(
        reft_model, tokenizer, [chat("Can a bee fly?"), chat("Where is a bear?")], max_new_tokens=4
    )
    pairs = []
    for text in texts:
        prompt = tokenizer.apply_chat_template(
            text.prompt, add_generation_prompt=True, tokenize=False
        )
        ids = [
            tokenizer(part, add_special_tokens=False)["input_ids"]
            for part in (prompt, prompt + text.completion)
        ]
        pairs.append((ids[0], ids[1][len(ids[0]) :]))
    given = Positions.parse(positions)
    kl = NeutralPrompts(reft_model, pairs, positions=given, rows=8).divergence(CHOICES)
    torch.testing.assert_close(kl[0], torch.zeros(2), rtol=0, atol=1e-6)
    plain = [
        type(texts[0])(tokenizer.decode(prompt), tokenizer.decode(rest)) for prompt, rest in pairs
    ]
    for choice, values in zip(CHOICES[1:], kl[1:], strict=True):
        with reft_model.using(adapter=choice):
            expected = torch.tensor(forgetting(reft_model, tokenizer, plain).kl)
        torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-6)


class Told:
    """Answers that are told instead of computed; names in the order of the questions."""

    def __init__(self, values: dict[str, Sequence[float]]) -> None:
        self.values, self.asked = values, list[str]()

    def matching(self, choices: Sequence[Any]) -> torch.Tensor:
        if choices == [None]:
            return torch.zeros(1, 2)
        ((name, _),) = choices[0].items()
        self.asked.append(name)
        return torch.tensor(self.values[name])[:, None].expand(-1, 2)

    divergence = matching


def test_the_largest_shift_within_the_budget_is_chosen() -> None:
    candidates = [Candidate("mean", layer, 0.1, (1.0, 2.0)) for layer in range(4)]
    shifts = {"mean-0": [0.1, 0.3], "mean-1": [0.2, 0.9], "mean-2": [0.0, 0.1], "mean-3": [0.4, 0]}
    costs = {"mean-0": [0.1, 0.4], "mean-1": [0.3, 0.8], "mean-2": [0, 0], "mean-3": [0.6, 2]}
    neutral: Any = Told(costs)
    questions: Any = Told(shifts)
    result = sweep(candidates, questions, neutral, budget=0.5)
    assert result.chosen == (candidates[0], 2.0)  # .9 and .4 cost more than .5
    assert neutral.asked == ["mean-1", "mean-3", "mean-0"]  # nothing that cannot be chosen
    reason = r"budget 0.05: no vector is within it, .* is 0.1 nats .*: try smaller sizes"
    with pytest.raises(ValueError, match=reason):
        sweep(candidates[:2], questions, neutral, budget=0.05)
    with pytest.raises(ValueError, match="try smaller scales"):
        sweep(candidates[:2], questions, neutral, budget=0.05, sized_by="scales")


def test_all_vectors_come_from_one_pass() -> None:
    base, tokenizer = rn.load_tiny_model()
    entry = {"layer": "all", "intervention": "addition", "positions": "all"}
    reft_model = rn.get_reft_model(base, rn.ReftConfig(entry)).eval()
    halves = ["I love the cat.", "Go on, dog"], ["I hate the cat.", "Go off, dog"]
    tokens = [[tokenizer(text)["input_ids"] for text in half] for half in halves]
    pairs = [Contrast.of(*pair) for pair in zip(*tokens, strict=True)]
    passes = []
    base.register_forward_hook(lambda *_: passes.append(1))
    fitted = fitted_candidates(
        reft_model, pairs, SteerOptions(methods=["mean", "probe"], sizes=[0.1, 0.4])
    )
    assert len(passes) == 1
    assert [candidate.name for candidate in fitted] == [
        f"{method}-{layer}" for method in ("mean", "probe") for layer in range(4)
    ]
    for method in ("mean", "probe"):
        other = rn.get_reft_model(rn.load_tiny_model()[0], rn.ReftConfig(entry | {"layer": 2}))
        ratios = rn.fit_steering_vectors(
            other, tokenizer, *halves, method=method, positions="differing"
        )
        (unit,) = other.interventions.values()
        ((_, factors),) = reft_model.adapters[f"{method}-2"].factors()
        torch.testing.assert_close(factors.up[0], unit.vector, rtol=1e-4, atol=1e-5)
        (candidate,) = (c for c in fitted if c.name == f"{method}-2")
        assert candidate.ratio == pytest.approx(*ratios.values(), rel=1e-4)
        sizes = [scale * candidate.ratio for scale in candidate.scales]
        assert sizes == pytest.approx([0.1, 0.4])


def contrasts(count: int) -> list[Contrast]:
    return [Contrast([1, number], [number % 2], [1 - number % 2]) for number in range(count)]


@pytest.mark.parametrize("limit", [None, 40])
def test_pairs_are_split_in_three_alike(limit: int | None) -> None:
    split = split_pairs([*contrasts(80), *contrasts(20)], limit=limit, seed=0)
    count = limit or 80
    assert {name: len(part) for name, part in split.items()} == {
        "fit": count // 2, "choose": count // 4, "test": count // 4,
    }  # fmt: skip
    prompts = [tuple(pair.prompt) for part in split.values() for pair in part]
    assert len(set(prompts)) == count
    for part in split.values():
        assert sum(pair.matching == [1] for pair in part) == len(part) / 2
    assert split == split_pairs(contrasts(80), limit=limit, seed=0)
    assert split != split_pairs(contrasts(80), limit=limit, seed=1)


def test_a_question_is_asked_as_in_a_chat() -> None:
    _, tokenizer = rn.load_tiny_model()
    row = PairRow("line 1", " Yes", " No", "Can a bee fly?", {})
    (pair,) = tokenized_pairs(tokenizer, [row])
    prompt = tokenizer.apply_chat_template(chat("Can a bee fly?"), add_generation_prompt=True)
    assert pair.prompt == list(prompt["input_ids"])
    assert [tokenizer.decode(part) for part in (pair.matching, pair.other)] == ["Yes", "No"]
    (plain,) = tokenized_pairs(tokenizer, [row], "plain")
    assert tokenizer.decode(plain.prompt + plain.matching).endswith("fly? Yes")


PERSONA = {
    "question": "Q?",
    "answer_matching_behavior": " Yes",
    "answer_not_matching_behavior": "N",
}


@pytest.mark.parametrize(
    ("row", "positive", "negative", "question"),
    [
        (PERSONA, " Yes", "N", "Q?"),
        ({"prompt": "Q?", "matching": "a", "not_matching": "b"}, "a", "b", "Q?"),
        ({"positive": "I love it", "negative": "I hate it"}, "I love it", "I hate it", None),
    ],
)
def test_the_columns_of_pairs(
    tmp_path: Path, row: dict[str, str], positive: str, negative: str, question: str | None
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 8)
    assert read_pairs(path)[0] == PairRow("line 1", positive, negative, question, row)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"a": "b"}] * 8, "line 1: expected the columns positive and negative, or question"),
        ([{"positive": "a", "negative": 1}] * 8, "line 1: negative 1: expected a text"),
        ([{"positive": "a", "negative": "b"}] * 7, "7 pairs: expected at least 8"),
    ],
)
def test_pairs_that_cannot_be_read(tmp_path: Path, rows: list[Any], reason: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(ValueError, match=reason):
        read_pairs(path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scales": [0.0]}, "scales 0.0: expected numbers above 0"),
        ({"sizes": [0.1, 0.1]}, "sizes .*: expected at least one, and each once"),
        ({"scales": []}, "scales .*: expected at least one"),
        ({"methods": ["prob"]}, "method 'prob': did you mean 'probe'?"),
        ({"budget": 0}, "budget 0: expected nats above 0"),
        ({"limit": 4}, "limit 4: expected at least 8"),
        ({"positions": "q1"}, "positions 'q1'"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SteerOptions(**options)


def test_halves_that_are_equal_are_named_with_their_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    row = {"positive": "I like tea", "negative": "I like tea"}
    path.write_text((json.dumps(row) + "\n") * 8, encoding="utf-8")
    with pytest.raises(ValueError, match=r"pairs\.jsonl: line 1: the two are equal"):
        search(str(path), "tiny-chat", tmp_path / "out", SteerOptions())


def test_neutral_prompts_that_are_too_long_lose_their_beginning(tmp_path: Path) -> None:
    reft_model, tokenizer = steered("l1+decode")
    path = tmp_path / "neutral.jsonl"
    path.write_text(json.dumps({"prompt": "Can a bee fly? " * 200}) + "\n")
    limit = reft_model.model.config.max_position_embeddings
    options = SteerOptions(neutral=str(path), neutral_tokens=4)
    ((prompt, rest),) = neutral_pairs(reft_model, tokenizer, options)
    assert len(tokenizer("Can a bee fly? " * 200)["input_ids"]) > limit
    assert limit - 8 < len(prompt) + len(rest) <= limit


@pytest.mark.parametrize(
    ("names", "overwrite", "reason"),
    [
        (["recipe.yaml", "adapter"], True, "holds recipe.yaml already: choose another"),
        (["adapter"], True, "holds adapter already: choose another --output_dir$"),
        (["adapter", "steering.json"], False, "holds steering.json already.* --overwrite it"),
        (["adapter", "steering.json"], True, None),
        (["notes.txt"], False, None),
    ],
)
def test_a_search_replaces_nothing_but_a_search(
    names: list[str], overwrite: bool, reason: str | None, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises((ValueError, OSError), match=reason or "nowhere.jsonl: no such file"):
        search("nowhere.jsonl", "tiny-chat", tmp_path, SteerOptions(), overwrite=overwrite)
    options = ["--output_dir", str(tmp_path), *(["--overwrite"] if overwrite else [])]
    assert main(["steer", "nowhere.jsonl", "--model", "tiny-chat", *options]) == 2


def test_a_search_writes_an_adapter_that_does_what_it_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = rn.load_tiny_examples("train") + rn.load_tiny_examples("test")
    asked = [e.prompt for e in words if e.words.startswith("Yes, ")]
    rows = [{"question": q, "matching": "No", "not_matching": "Yes"} for q in asked]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    arguments = ["--model", "tiny-chat", "--layers", "1-3", "--neutral_limit", "4", "--budget", "9"]
    arguments += ["--dtype", "float32", "--positions", "all+decode", "--scales", "[1.0, 2.0]"]

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # between the adapter and its test
        patch.setattr(rn.ReftModel, "from_pretrained", killed)
        assert main(["steer", str(path), *arguments]) == 130
    assert "test" not in json.loads((tmp_path / "steering" / "steering.json").read_text())
    assert main(["steer", str(path), *arguments, "--overwrite"]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "steering" / "steering.json").read_text())
    test, chosen = results["test"], results["chosen"]
    assert f"layer {chosen['layer']}, scale {chosen['scale']:.3g}" in printed
    assert test["shift"]["mean"] > 0
    assert test["shift"]["low"] <= test["shift"]["mean"] <= test["shift"]["high"]
    assert (tmp_path / "steering" / "steering.png").stat().st_size > 10_000

    base, tokenizer = rn.load_tiny_model()
    adapted = rn.ReftModel.from_pretrained(base, tmp_path / "steering" / "adapter")
    (entry,) = adapted.reft_config.to_dict()["representations"]
    assert entry["layer"] == chosen["layer"]
    split = split_pairs(tokenized_pairs(tokenizer, read_pairs(path)), limit=None, seed=0)
    prompts = {tuple(pair.prompt) for pair in split["test"]}
    probabilities = []
    for question in asked:
        text = tokenizer.apply_chat_template(
            chat(question), add_generation_prompt=True, tokenize=False
        )
        if tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) in prompts:
            (sums,) = choice_log_probs(adapted, tokenizer, [text], [["No", "Yes"]])
            probabilities.append(float(sums.softmax(0)[0]))
    assert len(probabilities) == results["pairs"]["test"]
    assert sum(probabilities) / len(probabilities) == pytest.approx(test["steered"], abs=1e-4)
