"""Prompts whose beginning is in a cache of the caller's: logits are those without the cache."""

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import reftnoise as rn
from reftnoise._util.errors import warn_once
from support.adapters import moved
from support.models.architectures import tiny_model
from support.tolerance import assert_close

KEPT, ASKED = 8, 4
OPEN = 2**40
"""A length of prompts whose end is not known yet."""
WRITTEN: dict[str, Any] = {
    "max_new_tokens": 3,
    "min_new_tokens": 3,
    "do_sample": False,
    "pad_token_id": 0,
    "output_logits": True,
    "return_dict_in_generate": True,
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    warn_once.cache_clear()
    with torch.no_grad():
        yield


def adapted(positions: Any, base: Any = None) -> rn.ReftModel:
    bias = {"layer": "all", "intervention": "bias", "positions": positions}
    base = tiny_model(num_hidden_layers=2) if base is None else base
    return moved(rn.get_reft_model(base, rn.ReftConfig([bias]))).eval()


def prompts(side: str) -> dict[str, Tensor]:
    mask = torch.ones(3, KEPT + ASKED, dtype=torch.long)
    if side == "left":
        mask[1, :3] = mask[2, : KEPT - 1] = 0
    if side == "right":
        mask[1, -1:] = mask[2, -3:] = 0
    ids = torch.arange(5, 5 + mask.numel()).view(mask.shape)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def part(inputs: dict[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    tokens = {name: value[:, start:end] for name, value in inputs.items()}
    return tokens | {"attention_mask": inputs["attention_mask"][:, :end]}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("positions", ["l1", "f1", "f2+l1", "all", "all+decode", "decode", [0, -1]])
def test_a_prefilled_beginning(positions: Any, side: str) -> None:
    model, inputs = adapted(positions), prompts(side)
    lengths = inputs["attention_mask"].sum(1)
    whole = model(**inputs, prompt_lengths=lengths).logits[:, KEPT:]
    is_static = side == "left"
    config = model.model.config
    cache = StaticCache(config, max_cache_len=32) if is_static else DynamicCache(config=config)
    told = lengths if side == "right" else torch.full_like(lengths, OPEN)
    model(**part(inputs, 0, KEPT), past_key_values=cache, prompt_lengths=told)
    kept = copy.deepcopy(cache)
    rest = part(inputs, KEPT, KEPT + ASKED)
    logits = model(**rest, past_key_values=cache, prompt_lengths=lengths).logits
    attended = inputs["attention_mask"][:, KEPT:].bool()
    assert_close(logits[attended], whole[attended])
    if side != "right":  # on which no generation begins
        del inputs["position_ids"]
        expected = model.generate(**inputs, **WRITTEN)
        generated = model.generate(**inputs, **WRITTEN, past_key_values=kept)
        assert torch.equal(generated.sequences, expected.sequences)
        assert_close(torch.stack(generated.logits), torch.stack(expected.logits))


@pytest.mark.parametrize(
    ("positions", "is_equal"),
    [("f2", True), ("all+decode", True), ([0, 1], True), ("l1", False), ("all", False)],
)
def test_the_next_turn(positions: Any, is_equal: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(positions)
    first = model.generate(torch.arange(5, 11)[None], **WRITTEN)
    turn = torch.cat([first.sequences, torch.arange(20, 24)[None]], 1)
    expected = torch.stack(model.generate(turn, **WRITTEN).logits)
    with caplog.at_level(logging.WARNING):
        second = model.generate(turn, **WRITTEN, past_key_values=first.past_key_values)
    assert torch.allclose(torch.stack(second.logits), expected, atol=1e-4) is is_equal
    assert ("cached tokens were edited at other positions" in caplog.text) is not is_equal


def test_a_beginning_that_was_taken_for_the_whole_prompt(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = adapted("l1"), torch.arange(5, 11)[None]
    cache = model(ids[:, :4], use_cache=True).past_key_values
    with caplog.at_level(logging.WARNING):
        model.generate(ids, **WRITTEN, past_key_values=cache)
    assert "give prompt_lengths beyond the input" in caplog.text


def test_steps_of_a_loop_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = adapted("l1"), torch.arange(5, 11)[None]
    cache, lengths = DynamicCache(config=model.model.config), torch.tensor([4])
    whole = model(ids, prompt_lengths=lengths).logits
    with caplog.at_level(logging.WARNING):
        model(ids[:, :4], past_key_values=cache)
        steps = [model(ids[:, n : n + 1], past_key_values=cache).logits for n in (4, 5)]
    assert_close(torch.cat(steps, 1), whole[:, 4:])
    assert not caplog.text
