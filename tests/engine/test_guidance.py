"""Classifier-free guidance against both of its passes written out, row by row."""

from typing import Any

import pytest
import torch
from torch import Tensor

import reftnoise as rn
from support.models.architectures import PAD, tiny_model
from support.padded_rows import generated, padded, rows, wrapped

SCALE = 1.7
NEW = 8
POSITIONS = ["l1", "f2+l3", "all", "decode", "all+decode", [0, -1]]
CASES: list[Any] = [(positions, True) for positions in POSITIONS] + [("f2+l3", False)]
CASES += [
    pytest.param(positions, False, marks=pytest.mark.slow)
    for positions in POSITIONS
    if positions != "f2+l3"
]
NEGATIVE = [[7, 8, 9, 10, 11], [12, 13], [14, 15, 16]]


def log_probs(model: rn.ReftModel, prompt: list[int], new: list[int], **choice: Any) -> Tensor:
    """Of the next token, by a whole forward pass without padding or cache."""
    logits = model(
        input_ids=torch.tensor([prompt + new]),
        prompt_lengths=torch.tensor([len(prompt)]),
        **choice,
    ).logits
    return logits[0, -1].log_softmax(-1)


def reference(
    model: rn.ReftModel, prompt: list[int], negative: list[int], **choice: Any
) -> list[int]:
    new: list[int] = []
    for _ in range(NEW):
        without = log_probs(model, negative, new, **choice)
        scores = without + SCALE * (log_probs(model, prompt, new, **choice) - without)
        new.append(int(scores.argmax()))
    return new


@pytest.mark.parametrize(("positions", "use_cache"), CASES, ids=str)
@torch.no_grad()
def test_guidance_away_from_the_last_token(positions: Any, use_cache: bool) -> None:
    base = tiny_model()
    model = wrapped(base, positions)
    expected = torch.tensor([reference(model, r.tolist(), [int(r[-1])]) for r in rows()])
    settings = {"guidance_scale": SCALE, "use_cache": use_cache}
    assert torch.equal(generated(model, padded("left"), **settings), expected)
    assert not torch.equal(generated(model, padded("left"), use_cache=use_cache), expected)
    model.train()
    assert torch.equal(generated(model, padded("left"), **settings), expected)


@pytest.mark.parametrize(("positions", "use_cache"), CASES, ids=str)
@torch.no_grad()
def test_guidance_away_from_a_negative_prompt(positions: Any, use_cache: bool) -> None:
    model = wrapped(tiny_model(), positions)
    expected = torch.tensor(
        [reference(model, row.tolist(), other) for row, other in zip(rows(), NEGATIVE, strict=True)]
    )
    width = max(map(len, NEGATIVE))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in NEGATIVE])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in NEGATIVE])
    negative = {"negative_prompt_ids": ids, "negative_prompt_attention_mask": mask}
    settings = {"guidance_scale": SCALE, "use_cache": use_cache, **negative}
    assert torch.equal(generated(model, padded("left"), **settings), expected)


@torch.no_grad()
def test_rows_keep_their_subspaces_in_both_prompts() -> None:
    model, chosen = wrapped(tiny_model(), "all"), [[0, 2], None, []]
    expected = torch.tensor(
        [
            reference(model, row.tolist(), [int(row[-1])], subspaces=[dimensions])
            for row, dimensions in zip(rows(), chosen, strict=True)
        ]
    )
    settings = {"guidance_scale": SCALE, "subspaces": chosen}
    assert torch.equal(generated(model, padded("left"), **settings), expected)


@torch.no_grad()
def test_guidance_beside_other_settings() -> None:
    """Guidance comes first, as where transformers sets it up, and beams go on from its scores."""
    base = tiny_model()
    model = wrapped(base, "f2+l3")
    for unit in model.interventions.values():  # an edit by nothing
        for parameter in unit.learned_source.parameters():
            parameter.zero_()
        unit.learned_source.weight.copy_(unit.rotate_layer())
    row = rows()[2][None]
    batch = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    for more in ({"repetition_penalty": 1.6, "no_repeat_ngram_size": 2}, {"num_beams": 3}):
        settings = {"guidance_scale": SCALE, **more}
        assert torch.equal(generated(model, batch, **settings), generated(base, batch, **settings))


def test_explicit_locations_say_nothing_about_the_other_prompt() -> None:
    model = wrapped(tiny_model())
    row = rows()[0][None]
    locations = {"sources->base": (None, [[[3]]] * 3)}
    with pytest.raises(ValueError, match="guidance_scale: unit_locations tell no places"):
        model.generate(row, unit_locations=locations, guidance_scale=SCALE, max_new_tokens=2)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call
def test_virtual_tokens_would_be_missing() -> None:
    pytest.importorskip("peft", reason="needs the extra [test]: peft")
    section = {"peft_type": "prompt_tuning", "num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
    loreft = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}
    model = rn.get_reft_model(tiny_model(), rn.ReftConfig(loreft, peft=section))
    with pytest.raises(ValueError, match="would lack PEFT's virtual tokens"):
        model.generate(rows()[0][None], guidance_scale=SCALE, max_new_tokens=2)
