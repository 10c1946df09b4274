"""Run a base model's forward passes with units applied at their sites.

Hooks stand on the base only while one of our passes runs, so a bare call of the base, other
libraries' hooks and an exception are all unaffected. What a pass needs to know is computed once,
as tensors, and shared by all layers: no loop over the batch, no synchronisation per layer.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, KeysView, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..interventions import LowRankRotation, shared_bases
from .base.peft import inner_model, may_add_to_loss, virtual_tokens
from .base.running import (
    as_written,
    calls_as_written,
    can_edit_outside,
    checkpointed_modules,
    checkpointing,
    edit_outside,
    exclusive,
    hook_first,
    innermost,
)
from .base.sharding import gather_for, is_part
from .base.sites import Site, find_stack, site_now
from .calls import Chunk, Pass, TokenlessChunk, chunk_of_call
from .editing import apply_units
from .layout import cached_length
from .units import PlacedUnit

ChunkOf: TypeAlias = Callable[[Site], Chunk | TokenlessChunk | None]
Observer: TypeAlias = Callable[[Sequence[PlacedUnit], Tensor, Tensor], None]


class Engine:
    """Applies placed units to the forward passes of a base model.

    Args:
        base: the model whose sites the units edit.
        units: in the order in which they act where several share a site.
        scale: by which edits are multiplied.
    """

    def __init__(
        self, base: PreTrainedModel, units: Sequence[PlacedUnit], scale: float = 1.0
    ) -> None:
        self.base, self.scale = base, scale
        self.observer: Observer | None = None
        """Called with the units of a site, and the hidden states before and after them."""
        self._place(units)
        self._chunk: Chunk | TokenlessChunk | None = None
        self._is_inside = False
        """Whether a call that the chunk is of goes on, so that embeddings belong to it."""

    def __reduce__(self) -> Any:
        return Engine, (self.base, self.units, self.scale)

    def _place(self, units: Sequence[PlacedUnit]) -> None:
        self.units = list(units)
        self._by_site: dict[Site, list[PlacedUnit]] = defaultdict(list)
        for placed in units:
            self._by_site[placed.site].append(placed)

    @property
    def sites(self) -> KeysView[Site]:
        """Where units are."""
        return self._by_site.keys()

    def follow_base(self) -> None:
        """Take the modules that are at the sites now: some may have been replaced since."""
        current = {site: site_now(inner_model(self.base), site) for site in self.sites}
        if any(now is not site for site, now in current.items()):
            self._place([replace(placed, site=current[placed.site]) for placed in self.units])

    @contextlib.contextmanager
    def running(self, *passes: Pass) -> Iterator[Callable[[], bool]]:
        """Apply passes, one for each stack of the base, to every call of it within the block.

        Yields whether the innermost passes on the base are these.

        In a generation, nothing of ours stays on the base once the prompt is in the cache, unless
        a unit edits generated tokens.
        """
        base = inner_model(self.base)
        checkpointed = checkpointed_modules(self.base)
        with exclusive(base), contextlib.ExitStack() as stack:
            self.follow_base()
            if not any(current.has(one) for current in passes for one in self.units):
                if not passes[-1].is_generation:  # whose caller may put hooks on the base
                    stack.enter_context(as_written(self.base, self._hooked_modules(base)))
                yield stack.enter_context(innermost(base))
                return
            outer = self._chunk
            for placed in self.units:
                gather_for(placed.unit, "delta")
            # What is recomputed in the backward pass must not depend on what is computed outside:
            # with reentrant checkpointing, a shared basis would be differentiated several times.
            if not checkpointed:
                stack.enter_context(self.sharing_bases())
            for module in checkpointed:
                stack.enter_context(checkpointing(module, self._repeatable))
            hooks = stack.enter_context(contextlib.ExitStack())
            is_ours = hooks.enter_context(self._hooked(base))
            for current in passes:
                self._follow_calls(current, is_ours, hooks)
            try:
                yield is_ours
            finally:
                self._chunk = outer

    # -- the calls of a pass, and the chunk that each sees ---------------------------------------

    def _follow_calls(
        self, current: Pass, is_ours: Callable[[], bool], hooks: contextlib.ExitStack
    ) -> None:
        entry = self._entry(current)
        start = partial(self._start_chunk, current, is_ours)
        leave = partial(self._leave_call, is_ours)
        handles = [
            entry.register_forward_pre_hook(start, with_kwargs=True),
            entry.register_forward_hook(leave, always_call=True),
        ]
        edits_decode = any(one.positions and one.positions.decode for one in self.units)
        if current.is_generation and not (current.stack or edits_decode or current.is_assisted):
            end = partial(self._end_chunk, current, is_ours, hooks)
            handles.append(entry.register_forward_hook(end, with_kwargs=True))
        for handle in handles:
            hooks.callback(handle.remove)

    def _entry(self, current: Pass) -> nn.Module:
        """The module whose call begins a chunk of a pass."""
        base = inner_model(self.base)
        if current.stack is not None:
            return find_stack(base, current.stack)
        # Some of PEFT's methods call the `forward` of the model inside, or parts of it, past hooks.
        calls_parts = virtual_tokens(self.base) or may_add_to_loss(self.base)
        return base.get_decoder() if calls_parts else base

    def _start_chunk(
        self,
        current: Pass,
        is_ours: Callable[[], bool],
        entry: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not is_ours():
            return args, kwargs
        self._is_inside = True
        virtual = virtual_tokens(self.base, current.stack)
        self._chunk = chunk_of_call(current, entry, args, kwargs, virtual)
        return args, self.with_edited_embeddings(self._chunk, kwargs)

    def _leave_call(self, is_ours: Callable[[], bool], *_: Any) -> None:
        if is_ours():
            self._is_inside = False

    def _end_chunk(
        self,
        current: Pass,
        is_ours: Callable[[], bool],
        hooks: contextlib.ExitStack,
        entry: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        if current.layout is None or not is_ours():
            return
        width = current.layout.attended.shape[1] + virtual_tokens(self.base)
        if cached_length(kwargs.get("past_key_values")) >= width:
            hooks.close()

    def _repeatable(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which edits the chunk of now also when our hooks have left the base."""
        chunk = self._chunk

        def run(*inputs: Any, **named: Any) -> Any:
            if self._chunk is chunk:
                return function(*inputs, **named)
            self._chunk, outer = chunk, self._chunk
            try:
                with self._hooked(inner_model(self.base)):
                    return function(*inputs, **named)
            finally:
                self._chunk = outer

        return run

    # -- the edits of a chunk, at each site ------------------------------------------------------

    @contextlib.contextmanager
    def _hooked(self, base: nn.Module) -> Iterator[Callable[[], bool]]:
        with innermost(base) as is_ours, contextlib.ExitStack() as stack:

            def chunk(site: Site) -> Chunk | TokenlessChunk | None:
                # Whoever calls the embedding first will give the base `inputs_embeds`.
                if site.is_embeddings and not self._is_inside:
                    return None
                if is_ours() and self._chunk is None:
                    raise RuntimeError("a layer of the base ran, but not the base's own forward")
                return self._chunk if is_ours() else None

            stack.enter_context(as_written(self.base, self._hooked_modules(base)))
            stack.enter_context(calls_as_written(base))
            for site, edit in self.edits(chunk):
                put = edit_outside if can_edit_outside(site.module) else hook_first
                stack.callback(put(site.module, edit, is_input=site.is_input))
            yield is_ours

    def _hooked_modules(self, base: nn.Module) -> list[nn.Module]:
        return [base, *(site.module for site in self.sites)]

    def edits(self, chunk_of: ChunkOf) -> Iterator[tuple[Site, Callable[..., Any]]]:
        """The hook for each site, by which its units edit the chunk that `chunk_of` tells."""
        for site, placed in self._by_site.items():
            edit = self._edit_input if site.is_input else self._edit_output
            yield site, partial(edit, placed, chunk_of)

    def _edit_output(
        self,
        placed: list[PlacedUnit],
        chunk_of: ChunkOf,
        module: nn.Module,
        args: tuple[Any, ...],
        output: Any,
    ) -> Any:
        chunk = chunk_of(placed[0].site)
        if chunk is None:
            return output
        if isinstance(output, tuple):
            return (self._apply(placed, chunk, output[0]), *output[1:])
        return self._apply(placed, chunk, output)

    def _edit_input(
        self,
        placed: list[PlacedUnit],
        chunk_of: ChunkOf,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        chunk = chunk_of(placed[0].site)
        if chunk is None:
            return args, kwargs
        if args:
            return (self._apply(placed, chunk, args[0]), *args[1:]), kwargs
        hidden = self._apply(placed, chunk, kwargs["hidden_states"])
        return args, kwargs | {"hidden_states": hidden}

    def _apply(
        self,
        placed: list[PlacedUnit],
        chunk: Chunk | TokenlessChunk,
        hidden: Float[Tensor, "batch length hidden"],
    ) -> Float[Tensor, "batch length hidden"]:
        if placed[0].site.stack != chunk.current.stack:  # an embedding that two stacks share
            return hidden
        found = apply_units(placed, chunk, hidden, self.scale)
        if self.observer is not None:
            self.observer(placed, hidden, found)
        return found

    def with_edited_embeddings(
        self, chunk: Chunk | TokenlessChunk, inputs: dict[str, Any]
    ) -> dict[str, Any]:
        """The inputs of a call, with the edits of embeddings that the base will not make itself."""
        embeds: Any = inputs.get("inputs_embeds")
        stack = chunk.current.stack
        units = [one for one in self.units if one.site.is_embeddings and one.site.stack == stack]
        if embeds is None or not units:
            return inputs
        return inputs | {"inputs_embeds": self._apply(units, chunk, embeds)}

    def sharing_bases(self) -> contextlib.AbstractContextManager[None]:
        """Within the block, each unit's orthonormal rows are computed once."""
        modules = [module for placed in self.units for module in placed.unit.modules()]
        rotations = [module for module in modules if isinstance(module, LowRankRotation)]
        return shared_bases([module for module in rotations if not is_part(module.weight)])
