r"""Which attention heads an adapter scales most, and the entries that edit these heads alone."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..adapters.frozen import FrozenAdapter
from ..engine.base.sites import layer_of
from ..model import ReftModel

_FIRST_STEP = (
    "{'layer': 'all', 'component': 'head_output', 'intervention': 'lofit', 'trained': 'scaling', "
    "'l1': 0.0005}"
)


class _Head(NamedTuple):
    component: str
    layer: int
    head: int
    norm: float


def head_norms(
    reft_model: ReftModel, component: str = "head_output"
) -> Float[Tensor, "layers heads"]:
    """How much units scale each head: LoFiT's ‖A‖, JoLA's ‖g₂A‖; NaN where no unit does.

    Args:
        reft_model: a model with units at heads.
        component: `head_output`, of an encoder-decoder's decoder with `decoder.` before it.

    Raises:
        ValueError: no unit scales heads there.
    """
    heads = [head for head in _heads(reft_model) if head.component == component]
    if not heads:
        raise _no_heads(component)
    shape = max(head.layer for head in heads) + 1, max(head.head for head in heads) + 1
    norms = torch.full(shape, torch.nan)
    for head in heads:
        norms[head.layer, head.head] = head.norm
    return norms


def select_heads(
    reft_model: ReftModel, k: int | None = None, entry: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The entries of LoFiT's second step: those of the k heads that the first has scaled most.

    Layers with the same heads share an entry.

    Args:
        reft_model: a model whose units scale heads, such as `lofit` of `trained: scaling`.
        k: number of heads; a tenth of all for None.
        entry: what the entries have besides `layer`, `component` and `heads`; `lofit` for None.

    Raises:
        ValueError: no unit scales heads, or fewer of them are scaled, as of an adapter that was
            not trained.

    Paper: LoFiT (arXiv:2406.01563), section 3.
    """
    heads = sorted(_heads(reft_model), key=lambda head: -head.norm)
    if not heads:
        raise _no_heads("head_output")
    count = max(1, len(heads) // 10) if k is None else k
    if type(count) is not int or not 1 <= count <= len(heads):
        raise ValueError(f"k {k!r}: expected a number of heads from 1 to {len(heads)}")
    if (scaled := sum(head.norm > 0 for head in heads)) < count:
        which = "none" if not scaled else f"only {scaled}"
        raise ValueError(
            f"k {count}: {which} of {len(heads)} heads is scaled at all, so there is no choice: "
            "train the first step, or choose a smaller k"
        )
    by_layer = defaultdict[tuple[str, int], list[int]](list)
    for head in heads[:count]:
        by_layer[head.component, head.layer].append(head.head)
    layers = defaultdict[tuple[str, tuple[int, ...]], list[int]](list)
    for (component, layer), chosen in sorted(by_layer.items()):
        layers[component, tuple(sorted(chosen))].append(layer)
    return [
        {"layer": alike, "component": component, "heads": list(chosen)}
        | dict(entry or {"intervention": "lofit"})
        for (component, chosen), alike in layers.items()
    ]


def _heads(reft_model: ReftModel) -> Iterator[_Head]:
    for unit, factors in FrozenAdapter.of(reft_model.engine.units).factors():
        site, width = unit.site, unit.site.head_width
        if width is None or factors.diagonal is None:
            continue
        component = "decoder.head_output" if site.stack == "decoder" else "head_output"
        layer = layer_of(reft_model.model, site)
        runs = site.columns or ((0, unit.width),)
        numbers = [start // width for run in runs for start in range(*run, width)]
        norms = factors.diagonal.sum(0).view(-1, width).float().norm(dim=1).tolist()
        for head, norm in zip(numbers, norms, strict=True):
            yield _Head(component, layer or 0, head, norm)


def _no_heads(component: str) -> ValueError:
    return ValueError(f"no unit scales heads at {component!r}: train one such as {_FIRST_STEP}")
