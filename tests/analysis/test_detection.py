"""Concepts in texts: activations by hand, the area under the curve, fitted vectors, pictures."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reftnoise as rn
from reftnoise.analysis.detection.fit import concept_direction
from reftnoise.analysis.detection.scores import auroc
from reftnoise.analysis.detection.token_states import pieces_of

TEXTS = ["A bee can fly.", "Yes.", "A fox lives in the forest and not in the sea."]
CHAT = [{"role": "user", "content": "Can a bee fly?"}, {"role": "assistant", "content": "Yes."}]


def wrapped(**entry: Any) -> tuple[rn.ReftModel, Any]:
    base, tokenizer = rn.load_tiny_model()
    return rn.get_reft_model(base, rn.ReftConfig([entry])).eval(), tokenizer


def states(reft_model: Any, tokenizer: Any, text: str, layer: int) -> Tensor:
    """The base's states of a text's tokens after a layer."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        outputs = reft_model.model(ids, output_hidden_states=True)
    of_layer: Tensor = outputs.hidden_states[layer + 1][0]
    return of_layer


def test_a_vectors_activations_are_projections_on_it() -> None:
    reft_model, tokenizer = wrapped(layer=[1, 2], intervention="addition")
    vectors = [torch.randn(128), torch.randn(128)]
    for placed, vector in zip(reft_model.engine.units, vectors, strict=True):
        placed.unit.vector.copy_(vector)
    detected = rn.detect(reft_model, tokenizer, TEXTS, batch_size=2)
    assert list(detected) == [placed.key for placed in reft_model.engine.units]
    for layer, vector, detection in zip((1, 2), vectors, detected.values(), strict=True):
        for index, text in enumerate(TEXTS):
            expected = states(reft_model, tokenizer, text, layer) @ vector / vector.norm()
            activations = detection.activations[index][:, 0]
            torch.testing.assert_close(activations, expected, rtol=1e-4, atol=1e-4)
            assert float(detection.scores[index]) == float(activations.max())
            assert "".join(detection.tokens[index]) == text
    [later, _] = rn.detect(reft_model, tokenizer, TEXTS[::2], skip=2).values()
    assert later.skip == 2
    for number, index in enumerate((0, 2)):
        whole = next(iter(detected.values())).activations[index]
        torch.testing.assert_close(later.scores[number], whole[2:].amax(0), rtol=1e-4, atol=1e-4)


def test_reftr1_activates_in_the_bare_base() -> None:
    reft_model, tokenizer = wrapped(layer=2, intervention="reftr1", low_rank_dimension=3, skip=2)
    [placed] = reft_model.engine.units
    with torch.no_grad():
        placed.unit.weight.normal_()
        placed.unit.largest.fill_(5.0)  # its edit, which detection must not see
    [detection] = rn.detect(reft_model, tokenizer, TEXTS[::2]).values()
    for number, index in enumerate((0, 2)):
        expected = (states(reft_model, tokenizer, TEXTS[index], 2) @ placed.unit.weight.T).relu()
        torch.testing.assert_close(detection.activations[number], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            detection.scores[number], detection.activations[number][2:].amax(0)
        )
    torch.testing.assert_close(detection.largest, detection.scores.max(0).values)
    assert len(detection.auroc([True, False])) == 3


def test_a_conversation_is_read_to_its_end() -> None:
    reft_model, tokenizer = wrapped(layer=1, intervention="bias")
    with torch.no_grad():
        next(reft_model.interventions.parameters()).normal_()
    [detection] = rn.detect(reft_model, tokenizer, [CHAT]).values()
    assert "".join(detection.tokens[0]) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert detection.skip == 2  # tokens that begin all: of texts, and of the user's turns
    [plain] = rn.detect(reft_model, tokenizer, TEXTS).values()
    assert plain.skip == 0


def test_long_texts_lose_their_end(caplog: pytest.LogCaptureFixture) -> None:
    reft_model, tokenizer = wrapped(layer=1, intervention="bias")
    with torch.no_grad():
        next(reft_model.interventions.parameters()).normal_()
    limit = reft_model.config.max_position_embeddings
    with caplog.at_level("WARNING", "reftnoise"):
        [detection] = rn.detect(reft_model, tokenizer, ["bee " * 2 * limit, "bee"]).values()
    assert len(detection.activations[0]) == limit
    assert f"1 of 2 texts were longer than {limit} tokens and lost their end" in caplog.text


@pytest.mark.parametrize("ties", [False, True])
def test_the_area_is_the_share_of_pairs_in_order(ties: bool) -> None:
    generator = np.random.default_rng(0)
    for _ in range(5):
        scores = generator.integers(0, 4, 30).astype(float) if ties else generator.normal(size=30)
        labels = generator.random(30) < 0.4
        above, below = scores[labels][:, None], scores[~labels][None]
        expected = ((above > below) + 0.5 * (above == below)).mean()
        score = auroc(torch.tensor(scores), torch.tensor(labels))
        assert score == pytest.approx(expected, rel=1e-12)


def test_directions_of_concepts_are_their_formulas() -> None:
    positive, negative = torch.randn(40, 6) * torch.arange(1.0, 7.0) + 2, torch.randn(25, 6)
    mean = positive.mean(0) - negative.mean(0)
    torch.testing.assert_close(concept_direction("mean", positive, negative), mean / mean.norm())
    centred = (positive - positive.mean(0)).numpy()
    first = torch.tensor(np.linalg.svd(centred)[2][0])
    expected = first * torch.sign(first @ mean)
    direction = concept_direction("pca", positive, negative)
    torch.testing.assert_close(direction, expected, rtol=1e-4, atol=1e-4)
    # Along the one axis in which they differ, the others being alike.
    apart = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[-1.0, 1.0], [-1.0, -1.0]])
    torch.testing.assert_close(concept_direction("probe", *apart), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="no direction parts them"):
        concept_direction("mean", negative, negative)


def test_tokens_of_one_state_have_no_principal_component() -> None:
    alike = torch.randn(1, 6).repeat(5, 1)
    alike[2:] *= 1 + 1e-7  # as batches round
    with pytest.raises(ValueError, match="pca: all tokens with the concept have the same state"):
        concept_direction("pca", alike, torch.randn(4, 6))


@pytest.mark.parametrize("method", ["mean", "pca", "probe"])
def test_fitted_vectors_are_as_long_as_the_largest_activation(method: Any) -> None:
    reft_model, tokenizer = wrapped(layer="all", intervention="addition")
    positive, negative = ["It is red.", "Red and red.", "A red fox."], ["It is.", "A fox lives."]
    largest = rn.fit_concept_vectors(reft_model, tokenizer, positive, negative, method=method)
    detected = rn.detect(reft_model, tokenizer, positive)
    assert len(largest) == len(detected) == 4
    for placed in reft_model.engine.units:
        norm = float(placed.unit.vector.norm())
        assert float(detected[placed.key].largest) == pytest.approx(largest[placed.key], rel=1e-4)
        assert norm == pytest.approx(
            largest[placed.key] if largest[placed.key] > 0 else 1.0, rel=1e-4
        )
    if method == "mean":
        layer = 2
        parts = [
            torch.cat([states(reft_model, tokenizer, text, layer) for text in texts]).mean(0)
            for texts in (positive, negative)
        ]
        expected = parts[0] - parts[1]
        vector = reft_model.engine.units[layer].unit.vector
        torch.testing.assert_close(
            vector / vector.norm(), expected / expected.norm(), rtol=1e-3, atol=1e-4
        )


def test_units_of_some_heads_read_those() -> None:
    """What reaches the projection of layer 1, of which heads 1 and 3 are read."""
    some, tokenizer = wrapped(
        layer=1, component="head_output", heads=[1, 3], intervention="addition"
    )
    every = wrapped(layer=1, component="head_output", intervention="addition", heads="all")[0]
    [part], [whole] = some.engine.units, every.engine.units
    width = part.site.head_width
    vector = torch.randn(2, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        part.unit.vector.copy_(vector.flatten())
        whole.unit.vector.zero_()
        whole.unit.vector.view(-1, width)[[1, 3]] = vector
    of_part, of_whole = (
        rn.detect(m, tokenizer, TEXTS)[u.key] for m, u in ((some, part), (every, whole))
    )
    torch.testing.assert_close(of_part.scores, of_whole.scores)
    for fit in (rn.fit_concept_vectors, rn.fit_steering_vectors):
        fit(some, tokenizer, TEXTS[:1], TEXTS[2:])
        fit(every, tokenizer, TEXTS[:1], TEXTS[2:])
        chosen = whole.unit.vector.view(-1, width)[[1, 3]].flatten()
        cosine = torch.cosine_similarity(part.unit.vector, chosen, dim=0)
        assert float(cosine) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("positive", "negative", "options", "error"),
    [
        ("A bee can fly.", TEXTS, {}, "positive: expected a list of texts, got a single one"),
        (TEXTS, "A bee can fly.", {}, "negative: expected a list of texts, got a single one"),
        ([], TEXTS, {}, "positive: expected at least one"),
        (TEXTS, [], {}, "negative: expected at least one"),
        (TEXTS, TEXTS, {"skip": -1}, "skip -1: expected at least 0"),
        (TEXTS[2:], TEXTS[:2], {"skip": 3}, "text 2 has 2 tokens: expected more than skip, 3"),
        (TEXTS[1:2], TEXTS, {"skip": 1, "method": "pca"}, "pca: expected at least 2 tokens"),
    ],
)
def test_texts_that_no_vector_is_fitted_to(
    positive: Any, negative: Any, options: Any, error: str
) -> None:
    reft_model, tokenizer = wrapped(layer=1, intervention="addition")
    with pytest.raises(ValueError, match=error):
        rn.fit_concept_vectors(reft_model, tokenizer, positive, negative, **options)
    assert not reft_model.engine.units[0].unit.vector.any()


def test_texts_are_coloured_by_activation(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'reftnoise[plots]'")
    tokens = [["<s>", "a <", " 🦊"], ["<s>", "b"]]
    values = [torch.tensor([[99.0], [0.0], [3.0]]), torch.tensor([[99.0], [6.0]])]
    scores = torch.tensor([[3.0], [6.0]])
    detection = rn.Detection(tokens, values, scores, 1)
    foreign = rn.Detection([["שלום", " $x$", " 日"]], [torch.ones(3, 1)], torch.ones(1, 1), 0)
    foreign.write(tmp_path / "new", name="hebrew")  # warnings are errors
    page = detection.write(tmp_path / "new", texts=range(2), title="Foxes")
    assert (tmp_path / "new" / "hebrew.html").is_file()
    assert (tmp_path / "new" / "detection.png").read_bytes().startswith(b"\x89PNG")
    text = page.read_text(encoding="utf-8")
    spans = re.findall(r'<span style="--share: (\d+)%" title="([^"]*)">([^<]*)</span>', text)
    assert spans == [
        ("0", "99", "&lt;s&gt;"),
        ("0", "0", "a &lt;"),
        ("50", "3", " 🦊"),
        ("0", "99", "&lt;s&gt;"),
        ("100", "6", "b"),
    ]


@pytest.mark.parametrize("text", ["naïve 日本語 🙂!", "A bee.\n\n  Two", "日", "It's , odd"])
def test_pieces_are_the_text(text: str) -> None:
    """Letters of several tokens are whole."""
    _, tokenizer = rn.load_tiny_model()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    if text == "日":
        assert pieces[:-1] == [""] * (len(ids) - 1)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"texts": []}, r"texts \[\]: expected numbers from 0 to 1"),
        ({"texts": [0, 2]}, r"texts \[0, 2\]: expected numbers from 0 to 1"),
        ({"concept": 1}, "concept 1: expected one from 0 to 0"),
    ],
)
def test_what_no_picture_shows(tmp_path: Path, options: Any, error: str) -> None:
    detection = rn.Detection([["a"], ["b"]], [torch.ones(1, 1)] * 2, torch.ones(2, 1), 0)
    with pytest.raises(ValueError, match=error):
        detection.write(tmp_path, **options)


def test_what_detects_nothing() -> None:
    reft_model, tokenizer = wrapped(layer=1, intervention="loreft", low_rank_dimension=2)
    with pytest.raises(ValueError, match="no unit detects: expected reftr1, or one whose edit"):
        rn.detect(reft_model, tokenizer, TEXTS)
    with pytest.raises(ValueError, match="no unit whose intervention is 'addition'"):
        rn.fit_concept_vectors(reft_model, tokenizer, TEXTS, TEXTS)
    reft_model, tokenizer = wrapped(layer=1, intervention="addition")
    with pytest.raises(ValueError, match="its vector is 0: expected one that was set"):
        rn.detect(reft_model, tokenizer, TEXTS)
    with pytest.raises(ValueError, match="texts: expected a list of texts, got a single one"):
        rn.detect(reft_model, tokenizer, "A text")
    with pytest.raises(ValueError, match="texts: expected at least one"):
        rn.detect(reft_model, tokenizer, [])
    with pytest.raises(ValueError, match="text 1 has 2 tokens: expected more than skip, 3"):
        rn.detect(reft_model, tokenizer, TEXTS, skip=3)
    with pytest.raises(ValueError, match="labels: 3 of 3 texts show the concept"):
        auroc(torch.ones(3), [True] * 3)
    with pytest.raises(ValueError, match="labels: expected 3, one per text, got 2"):
        auroc(torch.ones(3), [True, False])
