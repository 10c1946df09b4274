"""Find what a call edits: the tokens of its prompts, for each stack of the base."""

import functools
import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._util.errors import warn_once
from ..config.components import Stack
from ..config.positions import Positions
from .base.peft import inner_model, virtual_tokens
from .base.running import is_transformed
from .base.sites import can_generate, stacks_of
from .calls import CachedEdits, DeferredPlan, EditPlan, Gates, Notes, Plan
from .hooks import Engine
from .layout import (
    Batch,
    PromptLayout,
    Selection,
    explicit_selection,
    has_token_labels,
    read_layout,
)
from .locations import EditedPlace, EditedPlaces, EveryColumn, parse_unit_locations
from .settings import CallChoices

logger = logging.getLogger(__name__)

FROZEN_UNITS = (
    "all units are frozen, as by prepare_model_for_kbit_training, get_peft_model or "
    "requires_grad_(False) of the whole model: call those on the base, or give the ReftConfig a "
    "peft section; reft_model.interventions.requires_grad_(True) trains the units again"
)


class Planner:
    """Plans what calls of a base edit.

    Args:
        engine: the base with the units that act.
        gates: how much each row of the batch gets of them, as an `EditPlan` has it.
    """

    def __init__(self, engine: Engine, gates: Mapping[str, Gates] | None = None) -> None:
        self.engine, self._gates = engine, gates or {}
        self.continues = can_generate(engine.base)
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
        mask = batch.inputs.get("attention_mask")
        if getattr(mask, "ndim", 2) == 4 and virtual_tokens(self.engine.base):
            raise ValueError(
                "attention_mask of 4 dimensions: PEFT puts the columns of its virtual tokens "
                "before masks of 2 dimensions alone"
            )
        is_known = self.stacks == (None,) and batch.tokens is not None  # the length of sequences
        places = self._places(batch, batch.length if is_known else None)
        choices = self.engine.settings.now.for_rows(batch.rows, batch.copies)
        if is_known:
            layout = read_layout(batch, continues=self.labels_end_prompts)
            plan = self._plan(layout, places, batch, choices)
            if batch.past and batch.length > 1 and batch.prompt_lengths is not None:
                expect_same_edits(batch.inputs["past_key_values"], plan, batch.past)
            return [plan]
        has_columns = any(isinstance(place, Tensor) for place in places.values())
        if has_columns or batch.prompt_lengths is not None:
            raise ValueError(
                f"{type(inner_model(self.engine.base)).__name__} tells the length of its "
                "sequences only when it runs, so unit_locations and prompt_lengths cannot be "
                "given: use the config's positions"
            )
        notes, decodes = Notes(), _decodes(places)
        settle = functools.partial(self._settle, batch, places, choices, notes)
        return [
            DeferredPlan(functools.partial(settle, stack), stack, decodes, choices, notes)
            for stack in self.stacks
        ]

    def _settle(
        self,
        batch: Batch,
        places: EditedPlaces,
        choices: CallChoices,
        notes: Notes,
        stack: Stack | None,
        attended: Tensor,
        past: int,
    ) -> EditPlan:
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
        plan = self._plan(PromptLayout(attended, lengths), places, batch, choices, stack)
        return replace(plan, notes=notes)

    def _places(self, batch: Batch, width: int | None) -> EditedPlaces:
        """Where units edit: as the call says, or else the config."""
        units = [placed for placed in self.engine.units if placed.positions is not None]
        if batch.unit_locations is None:
            if overlap := next((placed.overlap for placed in units if placed.overlap), None):
                raise ValueError(overlap)
            return {placed.key: placed.positions for placed in units if placed.positions}
        rows = batch.rows // batch.copies
        places = parse_unit_locations(batch.unit_locations, len(units), rows, width)
        located = zip(units, places, strict=True)
        return {placed.key: place for placed, place in located if place is not None}

    def _plan(
        self,
        layout: PromptLayout,
        places: EditedPlaces,
        batch: Batch,
        choices: CallChoices,
        stack: Stack | None = None,
    ) -> EditPlan:
        def select(place: EditedPlace, prefix: int, suffix: int) -> Selection:
            if isinstance(place, Positions):
                return layout.select(place, prefix, suffix)
            if isinstance(place, EveryColumn):
                every = torch.ones_like(layout.attended)
                return Selection(None, every, place.decode, range(every.shape[1]))
            columns = place.to(layout.attended.device).repeat(batch.copies, 1)
            return explicit_selection(columns, layout.attended.shape[1])

        # Sites with equal places share one selection, hence one computation of row indices.
        share: Any = select
        if not torch.compiler.is_compiling():  # whose graph has equal operations once anyway
            share = functools.cache(select)
        selections = {
            placed.key: share(places[placed.key], placed.prefix, placed.suffix)
            for placed in self.engine.units
            if placed.key in places and placed.site.stack == stack
        }
        gates = {key: gate.repeat(batch.copies, 1) for key, gate in self._gates.items()}
        return EditPlan(
            layout,
            selections,
            gates,
            stack,
            decodes=_decodes(places),
            in_turn=batch.unit_locations is not None,
            choices=choices,
            notes=Notes(),
        )


def expect_same_edits(cache: Any, plan: Plan, past: int) -> None:
    """Warn of cached tokens that keep edits which a pass over the whole prompt would not make."""
    if torch.compiler.is_compiling() or not isinstance(plan, EditPlan):
        return
    edits = CachedEdits.of(cache)
    if edits is not None and edits.differ_from(plan, past):
        warn_once(
            logger,
            "past_key_values: cached tokens were edited at other positions than this prompt's, so "
            "logits differ from those without the cache: give prompt_lengths beyond the input to "
            "the call that fills a cache which the prompt goes on after, or leave the cache of an "
            "earlier turn out",
        )


def _decodes(places: EditedPlaces) -> bool:
    return any(not isinstance(place, Tensor) and place.decode for place in places.values())


class TrainingChecks:
    """Warns where training hardly does what was meant."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._has_looked_at_labels = False

    def check(self, plan: Plan, batch: Batch) -> None:
        """Warn of frozen units, noise that acts twice, and prompts that hardly are prompts."""
        self._check_noise()
        self._check_frozen()
        is_located = batch.prompt_lengths is not None or batch.unit_locations is not None
        units = self._planner.engine.units
        after_prompt = any(placed.positions and placed.positions.decode for placed in units)
        is_clear = is_located or after_prompt or not self._planner.continues or is_transformed()
        if not isinstance(plan, EditPlan) or is_clear or not torch.is_grad_enabled():
            return
        # Edits in what counts as a prompt and is none would be trained where generation has none.
        if batch.labels is None:
            warn_once(
                logger,
                "training without labels or prompt_lengths: every token counts as the prompt's, so "
                "positions such as 'l1' are counted from the end of the completion",
            )
        elif not self._has_looked_at_labels:  # in the first pass alone: it waits for the device
            self._has_looked_at_labels, prompt = True, plan.layout.prompt
            if not (prompt[:, 1:] & prompt[:, :-1]).any():
                warn_once(
                    logger,
                    "labels begin with each row's first token, which alone counts as its prompt, "
                    "so that positions such as 'l1' mean this token: set labels of prompts to -100",
                )

    def _check_frozen(self) -> None:
        """Helpers of other libraries freeze every parameter of what they take for a base."""
        units = [placed.unit for placed in self._planner.engine.units]
        parameters = [parameter for unit in units for parameter in unit.parameters()]
        if parameters and torch.is_grad_enabled() and not any(p.requires_grad for p in parameters):
            warn_once(logger, FROZEN_UNITS)

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
