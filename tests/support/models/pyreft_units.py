"""A base and units whose weights pyreft was given, too, for expected values that are pyreft's own.

They were recorded with pyreft at dafd099, pyvene 0.1.8 and transformers 4.45.1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import reftnoise as rn

WIDTH, RANK = 32, 4
IDS = torch.tensor([[1, 5, 6, 7, 8, 9], [1, 15, 16, 17, 18, 19]])
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
SIZES: dict[str, Any] = {"embed_dim": WIDTH, "low_rank_dimension": RANK, "dtype": torch.float32}


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def rotated(unit: Any, seed: int = 5) -> Any:
    """A unit with R, with the weights that pyreft's had."""
    drawn = torch.Generator().manual_seed(seed)
    matrix = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=drawn))[0]
    weight = torch.randn(RANK, WIDTH, generator=drawn)
    bias = torch.randn(RANK, generator=drawn)
    unit.load_state_dict({"rotate_layer": matrix, "weight": weight, "bias": bias}, strict=False)
    return unit


def projected(unit: Any, seed: int = 5) -> Any:
    """A unit with W₂, with the weights that pyreft's had."""
    drawn = torch.Generator().manual_seed(seed)
    source = unit.learned_source
    with torch.no_grad():
        for weight in (unit.proj_layer.weight, source.weight, source.bias):
            weight.copy_(0.2 * torch.randn(weight.shape, generator=drawn))
    return unit


def wrapped(layers: Sequence[int], make: Callable[[int], Any], **fields: Any) -> rn.ReftModel:
    """The base with a unit of each layer, at the last prompt token unless the fields say more."""
    entries = [
        {"layer": layer, "component": "block_output", "intervention": make(5 + number), **fields}
        for number, layer in enumerate(layers)
    ]
    return rn.get_reft_model(base(), rn.ReftConfig(entries)).eval()


def at(*locations: Any) -> dict[str, Any]:
    """Locations as a call has them, of each unit."""
    return {"sources->base": (None, list(locations))}


def signature(outputs: Any) -> list[float]:
    """What stands for the logits of a call."""
    logits: Tensor = outputs.logits
    return [round(value, 4) for value in logits[:, :, 7].flatten().tolist()]
