"""Where in a base's weights an edit of hidden states can go, found by passes of the base.

An edit of what a module returns can go into a linear layer that makes these very states, or into
all that read them. A constant can also go into the last layer whose output is added to them. Where
modules have which names says nothing about that: norms, other readers and experts stand between. So
passes of the base decide: a change at the edited place, and the same change at the layers, must
lead to the same logits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...analysis.changed_passes import ModuleChange, changing
from ...engine.base.sites import Site
from .folding import is_foldable

ModulePlace: TypeAlias = tuple[str, bool]
"""A module's name, and whether its input is meant and not its output."""

_MOST_TRIED = 8
"""Layers that are tried for a constant, backwards from the place that it is added at."""
_TOLERANCE = 0.02
"""Share of a change's effect that rounding may explain, in bfloat16 as well."""


@dataclass(frozen=True)
class Route:
    """Layers whose weights can take an edit."""

    names: tuple[str, ...]
    is_input: bool
    """Whether the layers read the edited states, and do not make them."""
    is_exact_for_all: bool = True
    """Whether any edit can go there, and not constants alone."""

    @property
    def places(self) -> list[ModulePlace]:
        """The layers' inputs or outputs."""
        return [(name, self.is_input) for name in self.names]

    def __str__(self) -> str:
        return ", ".join(f"{name}.{'input' if self.is_input else 'output'}" for name in self.names)


class Passes:
    """Passes of a base on a few random tokens, with and without changes.

    Args:
        base: model, in evaluation mode.
        sites: places of which edits are to find a way into weights.
    """

    def __init__(self, base: Any, sites: Sequence[Site]) -> None:
        self.base = base
        self.modules: dict[str, Any] = dict(base.named_modules())
        size = base.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(size, (2, 8), generator=generator)
        self._tokens: Int[Tensor, "rows tokens"] = tokens.to(base.device)
        self._states: dict[ModulePlace, list[tuple[int, Tensor]]] = {}
        self._count = 0
        layers = {n: m for n, m in self.modules.items() if is_foldable(m)}
        places: set[ModulePlace] = {(name, False) for name in layers}
        places |= {(n, True) for n, m in layers.items() if not isinstance(m, nn.Embedding)}
        self._names = {module: name for name, module in self.modules.items()}
        places |= {self._place(site) for site in sites}
        self._layers = layers
        self._logits = self._run([self._at(p, partial(self._note, p)) for p in sorted(places)])

    def when(self, site: Site) -> int:
        """The order of places in a pass."""
        return self._states[self._place(site)][0][0]

    def routes(self, site: Site) -> Iterator[Route]:
        """Ways into weights, those of any edit first; each is verified when it is asked for.

        Raises:
            ValueError: the site's module does not run once in a pass.
        """
        calls = self._states.get(self._place(site), [])
        if len(calls) != 1:
            raise ValueError(
                f"{site.name} runs {len(calls)} times in a pass, and its weights hold one edit"
            )
        for route in self._candidates(site):
            if self._is_equivalent(site, route):
                yield route

    def _place(self, site: Site) -> ModulePlace:
        return self._names[site.module], site.is_input  # a dotted path may have [1] for .1

    def _candidates(self, site: Site) -> Iterator[Route]:
        [(when, states)] = self._states[self._place(site)]
        single = {place: calls[0] for place, calls in self._states.items() if len(calls) == 1}
        layers = {place: call for place, call in single.items() if place[0] in self._layers}
        alike = {p: at for p, (at, other) in layers.items() if _is_same(other, states)}
        makers = [name for name, is_input in alike if not is_input]
        yield from (Route((name,), is_input=False) for name in makers)
        inside = set(site.module.modules())
        readers = tuple(
            name
            for (name, is_input), at in sorted(alike.items(), key=lambda item: item[1])
            if is_input and (self.modules[name] in inside if site.is_input else at > when)
        )
        if readers:
            yield Route(readers, is_input=True)
        earlier = [
            (at, name)
            for (name, is_input), (at, other) in layers.items()
            if not is_input and at < when and other.shape == states.shape and name not in makers
        ]
        for _, name in sorted(earlier, reverse=True)[:_MOST_TRIED]:
            yield Route((name,), is_input=False, is_exact_for_all=False)

    def _is_equivalent(self, site: Site, route: Route) -> bool:
        """Whether a change at a site and the same change at a route's layers have one effect."""
        [(_, states)] = self._states[self._place(site)]
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(2, states.shape[-1], generator=generator).to(states)
        scaling, constant = 0.3 * rows[0], states.float().std().to(states) * rows[1]
        if not route.is_exact_for_all:
            scaling = torch.zeros_like(scaling)

        def change(hidden: Tensor) -> Tensor:
            return hidden + scaling * hidden + constant

        at_site = self._run([self._at(self._place(site), change)])
        at_layers = self._run([self._at(place, change) for place in route.places])
        effect = (at_site - self._logits).norm()
        return bool((at_layers - at_site).norm() <= _TOLERANCE * effect)

    def _run(self, changes: Sequence[ModuleChange]) -> Float[Tensor, "rows tokens vocabulary"]:
        with torch.no_grad(), changing(changes):
            logits: Tensor = self.base(input_ids=self._tokens, use_cache=False).logits
        return logits.float()

    def _at(self, place: ModulePlace, function: Callable[[Tensor], Tensor]) -> ModuleChange:
        name, is_input = place
        return self.modules[name], is_input, function

    def _note(self, place: ModulePlace, states: Tensor) -> Tensor:
        self._states.setdefault(place, []).append((self._count, states.detach().clone()))
        self._count += 1
        return states


def _is_same(states: Tensor, others: Tensor) -> bool:
    return states.shape == others.shape and torch.equal(states, others)
