"""Steering vectors from pairs of prompts that differ in one thing, without training."""

import contextlib
from collections.abc import Iterator, Sequence
from threading import get_ident
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..config.positions import Positions
from ..data.conversations import Messages
from ..data.tokenization import prompt_tokens
from ..engine.base.threads import undone_in_children
from ..engine.layout import named_tokens
from ..engine.units import PlacedUnit
from ..evaluation.scoring import evaluating
from ..interventions import AdditionIntervention
from ..model import ReftModel

Method = Literal["mean", "pca"]


def fit_steering_vectors(
    reft_model: ReftModel,
    tokenizer: Any,
    positive: Sequence[str | Messages],
    negative: Sequence[str | Messages],
    *,
    method: Method = "mean",
    positions: str | list[int] = "l1",
    batch_size: int = 16,
) -> None:
    r"""Set the vector of every `addition` unit from contrastive pairs of prompts.

    $\delta_i = h(x_i^+) - h(x_i^-)$ is the difference of the bare base's states at the unit's site,
    averaged over `positions`, and $\bar\delta$ is its mean over pairs.

    - `"mean"`: $v = \bar\delta$, the difference of means (CAA, arXiv:2312.06681);
    - `"pca"`: $v = (\bar\delta^\top u)\,u$ with u the first principal component of the δᵢ about
      zero (as in representation engineering, arXiv:2310.01405).

    Args:
        reft_model: model whose units are set; its `scale` and adapters' scales multiply them.
        tokenizer: tokenizer of its base.
        positive: prompts, texts or conversations, that show the wanted behaviour.
        negative: as many prompts that show the opposite, each the other half of a pair.
        method: how v is computed from the differences.
        positions: tokens of the prompts at which states are read.
        batch_size: number of prompts per forward pass.

    Raises:
        ValueError: no `addition` unit, unequal numbers of prompts, an unknown method, a prompt
            without a token at `positions`, or states that are not finite.
    """
    placed = [p for p in reft_model.engine.units if isinstance(p.unit, AdditionIntervention)]
    units: dict[str, Any] = {p.key: p.unit for p in placed}
    if not units:
        raise ValueError("the config has no unit whose intervention is 'addition'")
    if method not in ("mean", "pca"):
        raise ValueError(f"method {method!r}: expected 'mean' or 'pca'")
    if isinstance(positive, str) or isinstance(negative, str):
        raise ValueError("positive and negative: expected lists of prompts, got a single text")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: expected at least 1")
    if len(positive) != len(negative) or not positive:
        raise ValueError(
            f"{len(positive)} positive and {len(negative)} negative prompts: expected pairs"
        )
    where = Positions.parse(positions)
    states = [
        _states(reft_model, tokenizer, prompts, placed, where, batch_size)
        for prompts in (positive, negative)
    ]
    for key, unit in units.items():
        differences = states[0][key] - states[1][key]
        mean = differences.mean(0)
        if method == "pca":
            component = torch.linalg.svd(differences, full_matrices=False).Vh[0]
            mean = (mean @ component) * component
        unit.vector.copy_(mean)


def _states(
    reft_model: ReftModel,
    tokenizer: Any,
    prompts: Sequence[str | Messages],
    units: Sequence[PlacedUnit],
    positions: Positions,
    batch_size: int,
) -> dict[str, Float[Tensor, "prompts hidden"]]:
    """The bare base's states at each unit's site, by unit key."""
    states: dict[str, list[Tensor]] = {unit.key: [] for unit in units}
    tokens = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    with evaluating(reft_model), reft_model.disabled(), torch.no_grad():
        for start in range(0, len(tokens), batch_size):
            rows = tokens[start : start + batch_size]
            width = max(map(len, rows))
            ids = torch.tensor([row + row[:1] * (width - len(row)) for row in rows])
            lengths = torch.tensor([len(row) for row in rows])
            mask = torch.arange(width) < lengths[:, None]
            named = named_tokens(positions, torch.arange(width), lengths[:, None])
            weights = (named & mask).double()
            counts = weights.sum(1, keepdim=True)
            if not counts.all():
                lacking = prompts[start + int(counts.argmin())]
                raise ValueError(
                    f"positions {positions.spec()!r}: prompt {lacking!r} has no such token"
                )
            weights /= counts
            device = reft_model.model.device
            with _recorded(units) as seen:
                reft_model(input_ids=ids.to(device), attention_mask=mask.long().to(device))
            for key, hidden in seen.items():
                mean = torch.einsum("bt,btd->bd", weights.to(hidden.device), hidden.double())
                if not mean.isfinite().all():
                    raise ValueError(f"{key}: the base's states there are not finite")
                states[key].append(mean)
    return {key: torch.cat(parts) for key, parts in states.items()}


@contextlib.contextmanager
def _recorded(units: Sequence[PlacedUnit]) -> Iterator[dict[str, Tensor]]:
    """The states that reach each unit's site within the block, by unit key."""
    seen: dict[str, Tensor] = {}
    thread = get_ident()  # others may run the base meanwhile
    with undone_in_children() as stack:
        for unit in units:

            def record(
                _: Any, args: Any, kwargs: Any, output: Any, unit: PlacedUnit = unit
            ) -> None:
                if get_ident() != thread:
                    return
                if unit.site.is_input:
                    output = args[0] if args else kwargs["hidden_states"]
                seen[unit.key] = output[0] if isinstance(output, tuple) else output

            handle = unit.site.module.register_forward_hook(record, with_kwargs=True)
            stack.callback(handle.remove)
        yield seen
