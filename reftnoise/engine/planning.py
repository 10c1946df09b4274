"""Find what a call edits: the tokens of its prompts, for each stack of the base."""

import functools
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..config.components import Stack
from .base.peft import inner_model
from .base.sites import stacks_of
from .calls import DeferredPlan, EditPlan, Gates, Plan
from .hooks import Engine
from .layout import (
    Batch,
    PromptLayout,
    Selection,
    UnitLocations,
    explicit_selection,
    has_token_labels,
    read_layout,
)

logger = logging.getLogger(__name__)


class Planner:
    """Plans what calls of a base edit.

    Args:
        engine: the base with the units that act.
        gates: how much each row of the batch gets of them, as an `EditPlan` has it.
    """

    def __init__(self, engine: Engine, gates: Mapping[str, Gates] | None = None) -> None:
        self.engine, self._gates = engine, gates or {}
        self.continues = bool(inner_model(engine.base).can_generate())
        """Whether the base writes tokens after a prompt."""
        self.stacks = stacks_of(engine.base)

    @property
    def labels_end_prompts(self) -> bool:
        """Whether labels are what the base writes after a prompt, so that they tell its end."""
        return self.continues and self.stacks == (None,)

    def plans(self, batch: Batch) -> list[Plan]:
        """What to edit, in each stack.

        Raises:
            ValueError: inputs that do not tell where their tokens are.
        """
        if batch.inputs.get("cache_params") is not None:
            raise ValueError(
                "cache_params hold states, which do not tell how many tokens they are of: give the "
                "whole input, or use generate"
            )
        if self.stacks == (None,) and batch.tokens is not None:  # whose length is known
            layout = read_layout(batch, continues=self.labels_end_prompts)
            if batch.unit_locations is None:
                return [self._plan(layout, batch.copies)]
            selections = self._located(batch.unit_locations, batch)
            return [EditPlan(layout, selections, self._gates_of(batch.copies))]
        if batch.unit_locations is not None or batch.prompt_lengths is not None:
            raise ValueError(
                f"{type(inner_model(self.engine.base)).__name__} tells the length of its "
                "sequences only when it runs, so unit_locations and prompt_lengths cannot be "
                "given: use the config's positions"
            )
        return [
            DeferredPlan(functools.partial(self._settle, batch, stack), stack)
            for stack in self.stacks
        ]

    def _settle(self, batch: Batch, stack: Stack | None, attended: Tensor, past: int) -> EditPlan:
        labels, lengths = batch.labels, None
        if stack == "decoder":  # which reads a start token, then what it writes or labels say
            is_padded = batch.inputs.get("decoder_attention_mask") is None
            if labels is not None and is_padded and has_token_labels(labels, attended):
                # Padded labels are padding, but for the start token before them.
                attended = (labels != -100).flip(1).cummax(1).values.flip(1) & attended
                attended[:, 0] = True
            lengths = attended.sum(1).clamp(max=1)
        elif past:
            lengths = attended[:, :past].sum(1)
        return self._plan(PromptLayout(attended, lengths), batch.copies, stack)

    def _plan(self, layout: PromptLayout, copies: int, stack: Stack | None = None) -> EditPlan:
        # Sites with equal positions share one selection, hence one computation of row indices.
        select: Any = layout.select
        if not torch.compiler.is_compiling():  # whose graph has equal operations once anyway
            select = functools.cache(select)
        selections = {
            placed.key: select(placed.positions, placed.prefix, placed.suffix)
            for placed in self.engine.units
            if placed.positions is not None and placed.site.stack == stack
        }
        return EditPlan(layout, selections, self._gates_of(copies), stack)

    def _gates_of(self, copies: int) -> dict[str, Gates]:
        return {key: gate.repeat(copies, 1) for key, gate in self._gates.items()}

    def _located(self, locations: UnitLocations, batch: Batch) -> dict[str, Selection]:
        units = [placed for placed in self.engine.units if placed.positions is not None]
        rows, copies = batch.rows // batch.copies, batch.copies
        columns = parse_unit_locations(locations, len(units), rows, batch.length)
        device = self.engine.base.device
        return {
            placed.key: explicit_selection(c.to(device).repeat(copies, 1))
            for placed, c in zip(units, columns, strict=True)
            if c is not None
        }


def parse_unit_locations(
    unit_locations: UnitLocations, interventions: int, batch: int, width: int
) -> list[Int[Tensor, "batch positions"] | None]:
    """Read pyvene's `{"sources->base": (None, locations)}`.

    `locations` nests interventions × batch × positions; None instead of an intervention's part
    leaves it out, and a single integer stands for that column everywhere.

    Raises:
        ValueError: another nesting, or a column outside the input.
    """
    expected = (
        f"expected {{'sources->base': (None, locations)}} with locations nested as "
        f"{interventions} interventions × {batch} rows × positions"
    )
    try:
        _, locations = unit_locations["sources->base"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"unit_locations {unit_locations!r}: {expected}") from None
    if isinstance(locations, int):
        locations = [[[locations]] * batch] * interventions
    if isinstance(locations, Tensor) and locations.dim():
        locations = list(locations)
    if not isinstance(locations, list | tuple) or len(locations) != interventions:
        raise ValueError(f"unit_locations {locations!r}: {expected}")
    parsed: list[Tensor | None] = []
    for index, part in enumerate(locations):
        if part is None:
            parsed.append(None)
            continue
        try:
            columns = torch.as_tensor(part)
        except (TypeError, ValueError):
            columns = torch.empty(0)
        if columns.dim() != 2 or columns.shape[0] != batch or columns.is_floating_point():
            raise ValueError(f"unit_locations of intervention {index}, {part!r}: {expected}")
        if ((columns < 0) | (columns >= width)).any():
            raise ValueError(
                f"unit_locations of intervention {index}, {part!r}: expected columns from 0 to "
                f"{width - 1}, the input's last"
            )
        parsed.append(columns.long())
    return parsed


class TrainingChecks:
    """Warns where training hardly does what was meant."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._has_looked_at_labels = False

    def check(self, plan: Plan, batch: Batch) -> None:
        """Warn of noise that acts twice, and of prompts that hardly are prompts."""
        self._check_noise()
        is_located = batch.prompt_lengths is not None or batch.unit_locations is not None
        units = self._planner.engine.units
        after_prompt = any(placed.positions and placed.positions.decode for placed in units)
        is_clear = is_located or after_prompt or not self._planner.continues
        if not isinstance(plan, EditPlan) or is_clear or not torch.is_grad_enabled():
            return
        # Edits in what counts as a prompt and is none would be trained where generation has none.
        if batch.labels is None:
            _warn_once(
                "training without labels or prompt_lengths: every token counts as the prompt's, so "
                "positions such as 'l1' are counted from the end of the completion"
            )
        elif not self._has_looked_at_labels:  # in the first pass alone: it waits for the device
            self._has_looked_at_labels, prompt = True, plan.layout.prompt
            if not (prompt[:, 1:] & prompt[:, :-1]).any():
                _warn_once(
                    "labels begin with each row's first token, which alone counts as its prompt, "
                    "so that positions such as 'l1' mean this token: set labels of prompts to -100"
                )

    def _check_noise(self) -> None:
        """transformers' NEFTune acts on the embeddings, after a noise of the config."""
        for placed in self._planner.engine.units:
            alpha = getattr(placed.site.module, "neftune_noise_alpha", None)
            if alpha is None or not (placed.site.is_embeddings and placed.positions is None):
                continue
            warnings.warn(
                f"the embeddings are noised twice: by the config's {type(placed.unit).__name__} "
                f"and by transformers' NEFTune (neftune_noise_alpha={alpha}); leave one of them "
                "out",
                stacklevel=4,
            )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
