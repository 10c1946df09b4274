"""Passes of a base with its units while `torch.compile` traces them: one graph, without a break.

Hooks that come and go cannot be traced. Those of traced passes stay on the base, and do nothing in
any other pass.
"""

import itertools
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.utils.hooks import RemovableHandle

from ..base.peft import inner_model
from ..base.running import hook_first, put_in_order, uncompiled
from ..base.sites import Site
from ..calls import AnyCall, Call, EditPlan, Plan, TokenlessCall
from ..hooks import Engine
from ..layout import Batch
from ..units import PlacedUnit

# torch.compile, which can call only functions of plain values while it traces, finds tracers here.
_TRACERS: "WeakValueDictionary[str, Tracer]" = WeakValueDictionary()
_NUMBERS = itertools.count()


class Tracer:
    """Runs traced passes of an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._call: AnyCall | None = None
        self._standing: dict[Site, RemovableHandle] = {}
        """The hooks at sites."""
        self._number = str(next(_NUMBERS))  # torch.compile may take ints for variables
        _TRACERS[self._number] = self

    def __reduce__(self) -> Any:
        return Tracer, (self._engine,)  # a copy has a number, and hooks, of its own

    def run(self, plan: Plan, batch: Batch) -> Any:
        """One call of the base.

        Raises:
            ValueError: the base has two stacks.
        """
        if plan.stack is not None:
            raise ValueError(
                "torch.compile of a ReftModel takes bases with one sequence: compile the layers of "
                "this encoder-decoder model one by one, layer.compile()"
            )
        _stand_on_base(self._number)
        base = self._engine.base
        call: AnyCall
        if isinstance(plan, EditPlan):
            call = Call(plan, batch.past, batch.length, batch.rows)
        else:
            call = TokenlessCall(plan, inner_model(base), batch.inputs.get("attention_mask"))
        self._call = call
        try:
            with self._engine.sharing_factors(self._acting(plan), plan.choices):
                return base(**self._engine.with_edited_embeddings(call, batch.inputs))
        finally:
            self._call = None

    def _acting(self, plan: Plan) -> list[PlacedUnit]:
        """The units that a plan edits with."""
        units = self._engine.units
        return [p for p in units if not isinstance(plan, EditPlan) or p.key in plan.selections]

    def stand_on_base(self) -> None:
        """Put the hooks of traced passes on the base, once."""
        self._engine.follow_base()
        if self._standing.keys() == self._engine.sites:
            return
        for handle in self._standing.values():  # modules were replaced
            handle.remove()
        self._standing = {}
        for site, edit in self._engine.edits(lambda _: self._call):
            module = uncompiled(site.module)  # which is the one that is traced
            hook = _StandingHook(edit)
            self._standing[site] = hook_first(module, hook, is_input=site.is_input)
            put_in_order(module)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch's
def _stand_on_base(number: str) -> None:
    _TRACERS[number].stand_on_base()


class _StandingHook(partial[Any]):
    """A hook of traced passes; what copies or pickles the base gets one that does nothing."""

    def __reduce__(self) -> Any:
        return partial, (_no_edit,)


def _no_edit(*_: Any) -> None:
    """Leave a module's input or output as it is."""
