"""Find what a call edits: the tokens of its prompts, for each stack of the base."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..config.components import Stack
from .base.peft import inner_model
from .base.sites import is_encoder_decoder
from .calls import Located, Pass
from .hooks import Engine
from .layout import (
    PromptLayout,
    Selection,
    UnitLocations,
    cached_length,
    explicit_selection,
    has_token_labels,
    parse_unit_locations,
    read_layout,
    size_of,
    tokens_of,
)


class Locator:
    """Makes the passes of calls of a base.

    Args:
        engine: the base with the units that act.
        gates: what each row of the batch gets of them, as a `Pass` has it.
    """

    def __init__(
        self, engine: Engine, gates: Mapping[str, Float[Tensor, "batch k"]] | None = None
    ) -> None:
        self.engine, self._gates = engine, gates or {}
        self.continues = bool(inner_model(engine.base).can_generate())
        """Whether the base writes tokens after a prompt."""
        self.stacks: tuple[Stack | None, ...] = (None,)
        """With a sequence each; None for that of a base that has one."""
        if is_encoder_decoder(engine.base):
            self.stacks = ("encoder", "decoder")

    @property
    def labels_end_prompts(self) -> bool:
        """Whether labels are what the base writes after a prompt, so that they tell its end."""
        return self.continues and self.stacks == (None,)

    def reads_tokens(self, inputs: Mapping[str, Any]) -> bool:
        """Whether inputs are the tokens of one sequence, whose length is known before it runs."""
        return self.stacks == (None,) and tokens_of(inputs) is not None

    def passes(
        self,
        inputs: Mapping[str, Any],
        prompt_lengths: Tensor | None,
        unit_locations: UnitLocations | None = None,
        times: int = 1,
    ) -> list[Pass]:
        """What to edit, in each stack.

        Args:
            inputs: of the base.
            prompt_lengths: as `ReftModel.forward` takes them.
            unit_locations: likewise.
            times: how often the batch holds each example.

        Raises:
            ValueError: inputs that do not tell where their tokens are.
        """
        if inputs.get("cache_params") is not None:
            raise ValueError(
                "cache_params hold states, which do not tell how many tokens they are of: give the "
                "whole input, or use generate"
            )
        gates = {key: gate.repeat(times, 1) for key, gate in self._gates.items()}
        if self.reads_tokens(inputs):
            layout = read_layout(
                inputs,
                prompt_lengths,
                past=cached_length(inputs.get("past_key_values")),
                continues=self.labels_end_prompts,
            )
            if unit_locations is None:
                selections = self._select(layout, None)
            else:
                batch, width = size_of(inputs)
                selections = self._chosen(unit_locations, batch // times, width, times)
            return [Pass(layout, selections, gates)]
        if unit_locations is not None or prompt_lengths is not None:
            raise ValueError(
                f"{type(inner_model(self.engine.base)).__name__} tells the length of its "
                "sequences only when it runs, so unit_locations and prompt_lengths cannot be "
                "given: use the config's positions"
            )
        locate = functools.partial(self._locate, inputs)
        return [
            Pass(gates=gates, locate=functools.partial(locate, one), stack=one)
            for one in self.stacks
        ]

    def _locate(
        self, inputs: Mapping[str, Any], stack: Stack | None, attended: Tensor, past: int
    ) -> Located:
        labels: Any = inputs.get("labels")
        lengths = None
        if stack == "decoder":  # which reads a start token, then what it writes or labels say
            is_padded = inputs.get("decoder_attention_mask") is None
            if is_padded and has_token_labels(labels, attended):
                # Padded labels are padding, but for the start token before them.
                attended = (labels != -100).flip(1).cummax(1).values.flip(1) & attended
                attended[:, 0] = True
            lengths = attended.sum(1).clamp(max=1)
        elif past:
            lengths = attended[:, :past].sum(1)
        layout = PromptLayout(attended, lengths)
        return layout, self._select(layout, stack)

    def _chosen(
        self, unit_locations: UnitLocations, batch: int, width: int, times: int
    ) -> dict[str, Selection | None]:
        units = [one for one in self.engine.units if one.positions is not None]
        found = parse_unit_locations(unit_locations, len(units), batch, width)
        device = self.engine.base.device
        chosen = [
            None if c is None else explicit_selection(c.to(device).repeat(times, 1)) for c in found
        ]
        return {one.key: columns for one, columns in zip(units, chosen, strict=True)}

    def _select(self, layout: PromptLayout, stack: Stack | None) -> dict[str, Selection | None]:
        # Sites with equal positions share one selection, hence one computation of row indices.
        select: Any = layout.select
        if not torch.compiler.is_compiling():  # whose graph has equal operations once anyway
            select = functools.cache(select)
        return {
            one.key: select(one.positions, one.prefix, one.suffix)
            for one in self.engine.units
            if one.positions is not None and one.site.stack == stack
        }
