"""Run a base model's forward passes with units applied at their sites.

Our hooks are on the base only while one of our passes runs, so a bare call of the base, other
libraries' hooks and an exception are all unaffected. What a pass needs to know is computed once,
as tensors, and shared by all layers: no loop over the batch, no synchronisation per layer.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, KeysView, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from ..interventions import edited_columns, shared_factors
from .base.peft import inner_model, may_add_to_loss, virtual_tokens
from .base.running import (
    as_written,
    calls_as_written,
    can_edit_outside,
    checkpointed_modules,
    checkpointing,
    edited_outside,
    exclusive,
    gather_for,
    hook_first,
    innermost,
    is_spread,
    module_at,
)
from .base.sites import Site, find_stack
from .base.threads import undone_in_children
from .calls import AnyCall, CachedEdits, Call, CallReader, Hidden, Plan
from .edits import apply_units
from .layout import cached_length
from .settings import CallChoices, CallSettings
from .units import PlacedUnit

CallAt: TypeAlias = Callable[[Site], AnyCall | None]


class Engine:
    """Applies placed units to the forward passes of a base model.

    Args:
        base: the model whose sites the units edit.
        units: in the order in which they act where several share a site.
        settings: choices of calls that make none.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        units: Sequence[PlacedUnit],
        settings: CallSettings | None = None,
    ) -> None:
        self.base, self.settings = base, settings or CallSettings()
        self._place(units)
        self._call: AnyCall | None = None
        self._is_inside = False
        """Whether that call of the base goes on, so that embeddings belong to it."""

    def __reduce__(self) -> Any:
        return Engine, (self.base, self.units, self.settings)

    def _place(self, units: Sequence[PlacedUnit]) -> None:
        self.units = list(units)
        self._by_site: dict[Site, list[PlacedUnit]] = defaultdict(list)
        for placed in units:
            self._by_site[placed.site].append(placed)

    @property
    def sites(self) -> KeysView[Site]:
        """The sites that have units."""
        return self._by_site.keys()

    def follow_base(self) -> None:
        """Take the modules that are at the sites now: some may have been replaced since.

        Raises:
            ValueError: the base has no module at a site any more.
        """
        base, modules = inner_model(self.base), {}
        for site in self.sites:
            try:
                modules[site] = module_at(base, site.name)
            except AttributeError:
                raise ValueError(f"{site}: the model has no such module any more") from None
        if any(module is not site.module for site, module in modules.items()):
            sites = {site: replace(site, module=module) for site, module in modules.items()}
            self._place([replace(placed, site=sites[placed.site]) for placed in self.units])

    @contextlib.contextmanager
    def running(
        self, *plans: Plan, is_generation: bool = False, is_assisted: bool = False
    ) -> Iterator[Callable[[], bool]]:
        """Apply plans, one for each stack of the base, to every call of it within the block.

        Yields whether the innermost pass on the base is this one.

        In a generation there is no noise, and none of our hooks stays on the base once the prompt
        is in the cache, unless a unit edits generated tokens, or the base drafts for itself
        (`is_assisted`), so that it reads the prompt more than once.
        """
        base = inner_model(self.base)
        checkpointed = checkpointed_modules(self.base)
        with exclusive(base), undone_in_children() as stack:
            self.follow_base()
            readers = [CallReader(plan, is_noised=not is_generation) for plan in plans]
            if not any(reader.has(placed) for reader in readers for placed in self.units):
                if not is_generation:  # whose caller may put hooks on the base
                    stack.enter_context(as_written(self.base, self._hooked_modules(base)))
                yield stack.enter_context(innermost(base))
                return
            stack.enter_context(self._apart_from_outer_call())
            for placed in self.units:
                for method in ("delta", "row_delta", "added_loss"):
                    if hasattr(placed.unit, method):
                        gather_for(placed.unit, method)
            # What is recomputed in the backward pass must not depend on what is computed outside:
            # with reentrant checkpointing, a shared basis would be differentiated several times.
            if not checkpointed:
                acting = [p for p in self.units if any(reader.has(p) for reader in readers)]
                stack.enter_context(self.sharing_factors(acting, plans[0].choices))
            for module in checkpointed:
                stack.enter_context(checkpointing(module, self._repeatable))
            hooks = stack.enter_context(contextlib.ExitStack())
            is_ours = hooks.enter_context(self._hooked(base))
            edits_decode = any(plan.decodes for plan in plans)
            leaves_early = is_generation and not (edits_decode or is_assisted)
            for reader in readers:
                self._follow_calls(reader, is_ours, hooks, leaves_early)
            yield is_ours

    @contextlib.contextmanager
    def _apart_from_outer_call(self) -> Iterator[None]:
        """Within the block, there is no call yet: this pass may be within another's."""
        outer = self._call, self._is_inside
        self._call, self._is_inside = None, False
        try:
            yield
        finally:
            self._call, self._is_inside = outer

    @contextlib.contextmanager
    def expecting_no_edit(self, name: str) -> Iterator[None]:
        """Within the block, a module that units edit must not run.

        Args:
            name: method of the base that runs within the block.

        Raises:
            ValueError: such a module runs, which would be without its edits.
        """

        def refuse(*_: Any) -> None:
            raise ValueError(
                f"{name} runs layers that units edit, and would leave edits out: call the model "
                f"itself, or reft_model.model.{name} for the bare base"
            )

        with exclusive(inner_model(self.base)), contextlib.ExitStack() as hooks:
            self.follow_base()
            for site, units in self._by_site.items():
                if any(placed.positions is not None for placed in units):
                    hooks.callback(site.module.register_forward_pre_hook(refuse).remove)
            yield

    # -- the calls of a pass -----------------------------------------------------------------------

    def _follow_calls(
        self,
        reader: CallReader,
        is_ours: Callable[[], bool],
        hooks: contextlib.ExitStack,
        leaves_early: bool,
    ) -> None:
        entry = self._entry(reader.plan)

        def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if not is_ours():
                return args, kwargs
            self._is_inside = True
            virtual = virtual_tokens(self.base, reader.plan.stack)
            self._call = reader.read(module, args, kwargs, virtual)
            return args, self.with_edited_embeddings(self._call, kwargs)

        def end(_: nn.Module, __: Any, output: Any) -> None:
            if is_ours():
                self._is_inside = False
                CachedEdits.note(getattr(output, "past_key_values", None), self._call)

        def leave(_: nn.Module, __: Any, kwargs: dict[str, Any], ___: Any) -> None:
            """Remove our hooks once the whole prompt is in the cache."""
            if reader.width is None or not is_ours():
                return
            width = reader.width + virtual_tokens(self.base)
            if cached_length(kwargs.get("past_key_values")) >= width:
                hooks.close()

        handles = [
            entry.register_forward_pre_hook(begin, with_kwargs=True),
            entry.register_forward_hook(end, always_call=True),
        ]
        if leaves_early and reader.plan.stack is None:
            handles.append(entry.register_forward_hook(leave, with_kwargs=True))
        for handle in handles:
            hooks.callback(handle.remove)

    def _entry(self, plan: Plan) -> nn.Module:
        """The module whose calls are the calls of a plan."""
        base = inner_model(self.base)
        if plan.stack is not None:
            return find_stack(base, plan.stack)
        # Some of PEFT's methods call the `forward` of the model inside, or parts of it, past hooks.
        calls_parts = virtual_tokens(self.base) or may_add_to_loss(self.base)
        return base.get_decoder() if calls_parts else base

    def _repeatable(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which edits the current call also when our hooks have left the base."""
        call = self._call

        def run(*inputs: Any, **named: Any) -> Any:
            if self._call is call:
                return function(*inputs, **named)
            self._call, outer = call, self._call
            try:
                with self._hooked(inner_model(self.base)):
                    return function(*inputs, **named)
            finally:
                self._call = outer

        return run

    # -- the edits of a call, at each site ---------------------------------------------------------

    @contextlib.contextmanager
    def _hooked(self, base: nn.Module) -> Iterator[Callable[[], bool]]:
        with innermost(base) as is_ours, contextlib.ExitStack() as stack:

            def call_at(site: Site) -> AnyCall | None:
                # A call of the embedding before the base's own makes its `inputs_embeds`.
                if site.is_embeddings and not self._is_inside:
                    return None
                if not is_ours():
                    return None
                if self._call is None:
                    raise RuntimeError("a layer of the base ran, but not the base's own forward")
                return self._call

            stack.enter_context(as_written(self.base, self._hooked_modules(base)))
            stack.enter_context(calls_as_written(base))
            for site, edit in self.edits(call_at):
                put: Any = edited_outside if can_edit_outside(site.module) else hook_first
                stack.enter_context(put(site.module, edit, is_input=site.is_input))
            yield is_ours

    def _hooked_modules(self, base: nn.Module) -> list[nn.Module]:
        return [base, *(site.module for site in self.sites)]

    def edits(self, call_at: CallAt) -> Iterator[tuple[Site, Callable[..., Any]]]:
        """The hook for each site, which edits the call that `call_at` returns."""
        for site, units in self._by_site.items():
            yield site, self._hook(units, call_at)

    def _hook(self, units: list[PlacedUnit], call_at: CallAt) -> Callable[..., Any]:
        site = units[0].site

        def edit_output(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            if (call := call_at(site)) is None:
                return output
            read = None
            if site.is_parallel:
                read = args[0] if args else kwargs["hidden_states"]
            if isinstance(output, tuple):
                return (self._apply(units, call, output[0], read), *output[1:])
            return self._apply(units, call, output, read)

        def edit_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if (call := call_at(site)) is None:
                return args, kwargs
            if args:
                return (self._apply(units, call, args[0]), *args[1:]), kwargs
            hidden = self._apply(units, call, kwargs["hidden_states"])
            return args, kwargs | {"hidden_states": hidden}

        return edit_input if site.is_input else edit_output

    def _apply(
        self,
        units: list[PlacedUnit],
        call: AnyCall,
        hidden: Hidden,
        read: Hidden | None = None,
    ) -> Hidden:
        if units[0].site.stack != call.plan.stack:  # an embedding that two stacks share
            return hidden
        if (columns := units[0].site.columns) is not None:
            return edited_columns(hidden, columns, lambda part: self._edit(units, call, part, read))
        return self._edit(units, call, hidden, read)

    def _edit(
        self,
        units: list[PlacedUnit],
        call: AnyCall,
        hidden: Hidden,
        read: Hidden | None = None,
    ) -> Hidden:
        ready = call.ready.get(units[0].key) if isinstance(call, Call) else None
        edited = apply_units(units, call, hidden, read) if ready is None else ready(hidden)
        if call.plan.choices.observer is not None:
            call.plan.choices.observer(units, hidden, edited)
        return edited

    def with_edited_embeddings(self, call: AnyCall, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a call, with the edits of embeddings that the base will not make itself."""
        embeds: Any = inputs.get("inputs_embeds")
        if embeds is None:
            return inputs
        stack = call.plan.stack
        units = [p for p in self.units if p.site.is_embeddings and p.site.stack == stack]
        if not units:
            return inputs
        return inputs | {"inputs_embeds": self._apply(units, call, embeds)}

    def sharing_factors(
        self, placed_units: Sequence[PlacedUnit], choices: CallChoices
    ) -> contextlib.AbstractContextManager[None]:
        """Within the block, what is computed of units' weights alone is computed once."""
        whole = [placed.unit for placed in placed_units if not is_spread(placed.unit)]
        weights = inner_model(self.base).parameters()
        dtype = next((w.dtype for w in weights if w.is_floating_point()), torch.float32)
        return shared_factors(whole, dtype, is_wide=choices.arithmetic == "wide")
