"""Masks of pairs of tokens, which transformers takes in place of one entry per token."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import reftnoise as rn
from reftnoise.engine.layout import Batch
from reftnoise.engine.training_pass.pairs import in_pairs
from support.adapters import moved
from support.models.architectures import tiny_model
from support.tolerance import assert_close

IDS = torch.arange(5, 17).view(2, 6)
KINDS = ["bool", "float"]


@pytest.fixture
def reft_model() -> rn.ReftModel:
    bias = {"layer": "all", "intervention": "bias", "positions": "f1+l1"}
    base = tiny_model(num_hidden_layers=2)
    base.set_attn_implementation("sdpa")
    return moved(rn.get_reft_model(base, rn.ReftConfig([bias]))).eval()


def pairs(attended: Tensor, kind: str) -> Any:
    """A causal mask [batch, 1, length, length]."""
    width = attended.shape[1]
    sees = torch.ones(width, width).tril().bool() & attended[:, None, None, :].bool()
    if kind == "bool":
        return sees
    hidden = torch.finfo(torch.float32).min if kind == "float" else float(kind)
    return torch.zeros(sees.shape).masked_fill(~sees, hidden)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_they_edit_what_flat_masks_edit(reft_model: rn.ReftModel, kind: str, side: str) -> None:
    attended = torch.ones_like(IDS)
    if side != "none":
        attended[1, :2] = 0
        attended = attended.flip(1) if side == "right" else attended
    places = (attended.cumsum(1) - 1).clamp(min=0)
    labels = torch.where(torch.arange(6) < 4, -100, IDS).masked_fill(attended == 0, -100)
    inputs = {"input_ids": IDS, "position_ids": places, "labels": labels}
    expected = reft_model(**inputs, attention_mask=attended)
    actual = reft_model(**inputs, attention_mask=pairs(attended, kind))
    rows = attended.bool()
    assert_close(actual.logits[rows], expected.logits[rows])
    assert_close(actual.loss, expected.loss)


@pytest.mark.parametrize("kind", [*KINDS, "-10000"])
def test_masks_by_kind_of_layer(kind: str) -> None:
    attended = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    masks = {"sliding_attention": None, "full_attention": pairs(attended, kind)}
    batch = Batch.of({"input_ids": IDS, "attention_mask": masks, "labels": IDS})
    assert torch.equal(batch.attended, attended.bool())
    doubled = in_pairs(batch)
    assert torch.equal(doubled.attended, attended.bool().repeat(2, 1))


def test_one_mask_for_all_rows_and_a_cache(reft_model: rn.ReftModel) -> None:
    lengths, cache = torch.tensor([6, 6]), DynamicCache(config=reft_model.model.config)
    whole = reft_model(IDS, attention_mask=pairs(torch.ones(1, 6), "bool")).logits
    reft_model(IDS[:, :4], past_key_values=cache, prompt_lengths=lengths)
    mask = pairs(torch.ones(1, 6), "bool")[:, :, 4:]
    rest = reft_model(
        IDS[:, 4:], past_key_values=cache, attention_mask=mask, prompt_lengths=lengths
    ).logits
    assert_close(rest, whole[:, 4:])


def test_documents_in_a_row(reft_model: rn.ReftModel) -> None:
    document = torch.tensor([[0, 0, 0, 1, 1, 1]])
    mask = pairs(torch.ones(1, 6), "bool") & (document[:, :, None] == document[:, None, :])[:, None]
    places = torch.tensor([[0, 1, 2, 0, 1, 2]])
    packed = reft_model(IDS[:1], attention_mask=mask, position_ids=places).logits
    apart = reft_model(IDS[:1].view(2, 3)).logits
    assert_close(packed.view(apart.shape), apart)


@pytest.mark.parametrize("noise", ["neftune", "symnoise"])
def test_training_with_noise(noise: str) -> None:
    entries = [{"layer": 0, "intervention": "bias"}, {"intervention": noise}]
    model = rn.get_reft_model(tiny_model(num_hidden_layers=2), rn.ReftConfig(entries)).train()
    losses = []
    for mask in (torch.ones_like(IDS), *(pairs(torch.ones_like(IDS), kind) for kind in KINDS)):
        torch.manual_seed(3)
        labels = torch.where(torch.arange(6) < 4, -100, IDS)
        losses.append(model(IDS, attention_mask=mask, labels=labels).loss)
    for loss in losses[1:]:
        assert_close(loss, losses[0])


@pytest.mark.parametrize("shape", [(2, 5), (2, 1, 5, 5), (3, 1, 6, 6), None])
def test_what_is_no_mask(reft_model: rn.ReftModel, shape: Any) -> None:
    mask: Any = 1 if shape is None else torch.ones(shape)
    with pytest.raises(ValueError, match=r"^attention_mask .*: expected \(2, 6\), one entry per"):
        reft_model(IDS, attention_mask=mask)
