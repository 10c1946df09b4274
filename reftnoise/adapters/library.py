"""Adapters by name on one base, and which of them the rows of a batch get."""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import EllipsisType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import Self

from .._util.errors import is_finite_number, nearest
from .._util.recent import RecentlyUsed
from ..config.positions import POSITION_FIELDS, Positions
from ..engine.base.peft import inner_model
from ..engine.base.running import exclusive
from ..engine.base.sharding import device_of
from ..engine.base.sites import Site, layer_of, num_layers, stacks_of
from ..engine.hooks import Engine
from ..engine.planning import Planner
from ..engine.units import PlacedUnit
from ..interventions import RowStrengths
from .frozen import FrozenAdapter, UnitShape, stacked_units

AdapterChoice: TypeAlias = str | Sequence[str] | Mapping[str, float] | None
"""An adapter, the sum of several, or of several each times a scale; None for the bare base."""

OWN = "default"
"""The name of the units that a model was built or loaded with, for `adapter_names`."""

_LISTED = 20
"""The most names that an error lists."""

_KEPT = 2
"""How many sets of adapters stay stacked after they acted, in memory of their own."""


class AdapterLibrary(Mapping[str, FrozenAdapter]):
    """Adapters by name, for inference on one base.

    Args:
        own: the base with the units that it was wrapped with, whose name is `default`.
    """

    def __init__(self, own: Engine) -> None:
        self._own, self._base = own, own.base
        self._adapters: dict[str, FrozenAdapter] = {}
        self._shapes: dict[tuple[UnitShape, ...], tuple[UnitShape, ...]] = {}
        self._engines = RecentlyUsed[tuple[FrozenAdapter, ...], Engine](_KEPT)
        self._frozen_own: FrozenAdapter | None = None
        self._own_state: list[Any] = []

    def __getitem__(self, name: str) -> FrozenAdapter:
        return self._adapters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    @property
    def active(self) -> AdapterChoice:
        """The choice for calls that make none."""
        choice: AdapterChoice = self._own.settings.now.adapter
        return choice

    @property
    def _device(self) -> torch.device:
        return device_of(self._base) or torch.device("cpu")

    def put(self, name: str, adapter: FrozenAdapter) -> None:
        """Add an adapter. One of the same name is replaced.

        Raises:
            ValueError: the name is taken for the model's own units.
        """
        self.expect_free(name)
        adapter.weights = adapter.weights.to(self._device)
        adapter.shapes = self._shapes.setdefault(adapter.shapes, adapter.shapes)
        self._forget(self._adapters.get(name))
        self._adapters[name] = adapter

    def derive(
        self,
        name: str,
        source: str,
        *,
        layers: Collection[int] | None = None,
        positions: Collection[str] | None = None,
    ) -> None:
        """Add a part of an adapter as an adapter of its own, to see what the part does.

        Args:
            name: name of the part. An adapter of that name is replaced.
            source: name of the whole adapter; `default` for the model's own units.
            layers: layers whose edits it keeps, with those outside of layers; None for all.
            positions: fields of `Positions` (`first`, `last`, `all`, `decode`, `indices`) where
                it keeps editing; None for all.

        Raises:
            ValueError: the source is not loaded, the name is taken for the model's own units, the
                base has no such layer, or a position has another name.
        """
        self.expect_free(name)
        for field in positions or ():
            if field not in POSITION_FIELDS:
                raise ValueError(f"positions {field!r}; {nearest(field, POSITION_FIELDS)}")
        count = max(num_layers(self._base, stack) for stack in stacks_of(self._base))
        if beyond := [layer for layer in layers or () if layer not in range(count)]:
            raise ValueError(f"layers {beyond}: the model has layers 0 to {count - 1}")

        def keep(site: Site, whole: Positions) -> Positions | None:
            layer = layer_of(self._base, site)
            if layers is not None and layer is not None and layer not in layers:
                return None
            kept = whole if positions is None else whole.only(positions)
            return kept if kept.edits_prompt or kept.decode else None

        _, (whole,) = self._chosen([{source: 1.0}])
        self.put(name, whole.part(keep))

    def delete(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            ValueError: the adapter is not loaded, or it is active.
        """
        if name in _scales(self.active):
            raise ValueError(f"adapter {name!r} is active: set_adapter another first")
        self._forget(self._find(name))
        del self._adapters[name]

    def expect_free(self, name: str) -> None:
        """Raise a ValueError for a name that no adapter can have."""
        if not isinstance(name, str) or not name or name == OWN:
            raise ValueError(f"adapter name {name!r}: expected a name other than {OWN!r}")

    def _find(self, name: str) -> FrozenAdapter:
        if name not in self._adapters:
            many = f"reft_model.adapters lists {len(self)}" if len(self) > _LISTED else None
            hint = nearest(name, [*self._adapters, OWN], many)
            raise ValueError(f"adapter {name!r} is not loaded; {hint}")
        return self._adapters[name]

    def _forget(self, adapter: FrozenAdapter | None) -> None:
        with exclusive(inner_model(self._base)):
            self._engines.forget(lambda adapters: adapter in adapters)

    def activate(self, choice: AdapterChoice) -> None:
        """Set the choice for calls that make none."""
        self._own.settings.set("adapter", self.checked(choice))

    def checked(self, choice: AdapterChoice) -> AdapterChoice:
        """A choice as it is; a ValueError for one that no row can have."""
        self._chosen([_scales(choice)])
        return choice

    def planner(self, rows: Sequence[AdapterChoice], batch: int) -> Planner:
        """The units that act in a pass, and what each row gets of them.

        Args:
            rows: a choice for each row of the batch.
            batch: number of rows.

        Raises:
            ValueError: another number of choices, a name that is not loaded, or a scale that is
                not a finite number.
        """
        if isinstance(rows, str | Mapping) or not isinstance(rows, Sequence) or len(rows) != batch:
            raise ValueError(
                f"adapter_names {rows!r}: expected a list of {batch}, one choice per row of the "
                "batch; set_adapter chooses for all"
            )
        choices = [_scales(choice) for choice in rows]
        names, adapters = self._chosen(choices)
        engine = self._engine(adapters)
        if len(names) == 1 and all(choice == {names[0]: 1.0} for choice in choices):
            return Planner(engine)
        scales = [[choice.get(name, 0.0) for name in names] for choice in choices]
        gates = torch.tensor(scales, device=self._device)
        return Planner(engine, {placed.key: gates for placed in engine.units})

    def _chosen(
        self, choices: Sequence[Mapping[str, float]]
    ) -> tuple[list[str], tuple[FrozenAdapter, ...]]:
        """The adapters that occur in choices, and their names."""
        names = sorted({name for choice in choices for name in choice})
        return names, tuple(self._freeze_own() if n == OWN else self._find(n) for n in names)

    def _freeze_own(self) -> FrozenAdapter:
        """The model's own units as they are now; the same object as long as they stay the same."""
        with exclusive(inner_model(self._base)):
            state = _state_of(self._own.units)
            if self._frozen_own is None or not _are_equal(self._own_state, state):
                self._forget(self._frozen_own)
                self._frozen_own, self._own_state = FrozenAdapter.of(self._own.units), state
            return self._frozen_own

    def _engine(self, adapters: tuple[FrozenAdapter, ...]) -> Engine:
        def stacked() -> Engine:
            with torch.inference_mode(False), torch.no_grad():
                return Engine(self._base, stacked_units(adapters), self._own.settings)

        with exclusive(inner_model(self._base)):  # a server may run a thread for each adapter
            return self._engines.get(adapters, stacked)


def _state_of(units: Sequence[PlacedUnit]) -> list[Any]:
    """What units are, and bytes of all their tensors."""
    tensors = defaultdict[tuple[torch.dtype, torch.device], list[Tensor]](list)
    for placed in units:
        for tensor in (*placed.unit.parameters(), *placed.unit.buffers()):
            tensors[tensor.dtype, tensor.device].append(tensor.detach().flatten())
    acts = [getattr(placed.unit, "act_fn", None) for placed in units]
    joint = [torch.cat(parts).view(torch.uint8) for parts in tensors.values()]
    return [list(units), acts, list(tensors), *joint]


def _are_equal(before: Sequence[Any], now: Sequence[Any]) -> bool:
    return len(before) == len(now) and all(
        torch.equal(a, b) if isinstance(b, Tensor) else a == b
        for a, b in zip(before, now, strict=True)
    )


def _scales(choice: AdapterChoice) -> dict[str, float]:
    """The scales of the adapters that edit a row, by name."""
    scales: Any = {} if choice is None else choice
    if isinstance(choice, str):
        scales = {choice: 1.0}
    elif isinstance(choice, Sequence) and all(isinstance(name, str) for name in choice):
        scales = Counter(choice)
    if not isinstance(scales, Mapping) or not all(
        isinstance(name, str) and is_finite_number(scale) for name, scale in scales.items()
    ):
        raise ValueError(
            f"adapter_names {choice!r}: expected a name, a list of names, a mapping from names to "
            "finite scales, or None for the bare base"
        )
    return {name: float(scale) for name, scale in scales.items()}


class CallChoiceMixin:
    """What the calls of a model choose: adapters, the scale of edits, or the bare base."""

    adapters: AdapterLibrary
    """Loaded adapters by name."""
    engine: Engine
    """The base with the model's own units."""

    def set_adapter(self, choice: AdapterChoice) -> None:
        """Choose what acts in calls that do not choose; values as in their `adapter_names`."""
        self.adapters.activate(choice)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Forget a loaded adapter, or several, that are not active."""
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            self.adapters.delete(name)

    @property
    def scale(self) -> float:
        """s in h + s·edit(h), for evaluation and generation: 1 as trained, 0 without edits.

        Saving multiplies steering vectors by it; with other units it is not saved. It concerns
        neither noise nor a `peft` section.
        """
        return self.engine.settings.now.scale

    @scale.setter
    def scale(self, value: float) -> None:
        self.engine.settings.set("scale", _checked_scale(value))

    @contextlib.contextmanager
    def disabled(self) -> Iterator[Self]:
        """Within the block, the model is its bare base; other threads' calls are not concerned."""
        with self.engine.settings.block(is_disabled=True):
            yield self

    @contextlib.contextmanager
    def using(
        self,
        *,
        adapter: AdapterChoice | EllipsisType = ...,
        scale: float | None = None,
        strengths: RowStrengths | None = None,
    ) -> Iterator[Self]:
        """Within the block, calls have another adapter or scale; other threads' calls do not.

        `set_adapter` and `scale = …` are for all threads; within a block that chooses the same,
        they change what the block chooses. A thread that is started within the block is in it if it
        runs in a copy of the context: `Thread(target=contextvars.copy_context().run, args=…)`.

        Args:
            adapter: choice as of `set_adapter`; by default the present one.
            scale: factor as of `scale`; by default the present one.
            strengths: further factors, one for each row of a batch, also in training.

        Raises:
            ValueError: an adapter that is not loaded, or a scale that is not a finite number.
        """
        changes: dict[str, Any] = {}
        if not isinstance(adapter, EllipsisType):
            changes["adapter"] = self.adapters.checked(adapter)
        if scale is not None:
            changes["scale"] = _checked_scale(scale)
        if strengths is not None:
            changes["strengths"] = strengths
        with self.engine.settings.block(**changes):
            yield self


def _checked_scale(value: float) -> float:
    if not is_finite_number(value):
        raise ValueError(f"scale {value!r}: expected a finite number, 1.0 for edits as trained")
    return float(value)
