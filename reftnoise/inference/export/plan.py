"""What of an adapter goes into which layer of its base, or why it cannot."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ...engine.units import PlacedUnit
from ...interventions import NoiseIntervention, intervention_name
from ...model import ReftModel
from .folding import FoldedLayer, LinearEdit, is_foldable
from .routes import Passes, Route


@dataclass(frozen=True)
class RoutedEdit:
    """An edit, and the layers that take it."""

    placed: PlacedUnit
    edit: LinearEdit
    route: Route


def expect_plain_base(reft_model: ReftModel) -> None:
    """Raise a ValueError for a base of which no checkpoint of plain weights is written."""
    if reft_model.reft_config.peft is not None:
        raise ValueError(
            "peft: the adapter has layers of PEFT under its units. Save a base into which they are "
            "merged, and the units on it, as examples/guides/exports.md shows, and export these"
        )
    base = reft_model.model
    if getattr(base, "hf_quantizer", None) is not None:
        raise ValueError(
            "the base is quantised, and its weights hold no exact edit: name the base in full "
            "precision as model"
        )


def acting_edits(reft_model: ReftModel) -> list[tuple[PlacedUnit, LinearEdit]]:
    """The units that edit in evaluation; a ValueError names one that is no linear map."""
    edits = []
    for placed in reft_model.engine.units:
        if isinstance(placed.unit, NoiseIntervention):
            continue
        try:
            edits.append((placed, LinearEdit.of(placed)))
        except ValueError as error:
            raise refusal(placed, error) from None
    return edits


def refusal(placed: PlacedUnit, reason: object) -> ValueError:
    """That a unit is not exported, and why."""
    name = intervention_name(type(placed.unit))
    return ValueError(f"{name} at {placed.place}, has no exact export: {reason}")


class WeightPlan:
    """Finds the layers that take the edits of an adapter.

    Args:
        base: model in evaluation mode, whose weights are not changed here.
        edits: units and their edits.
        as_lora: whether the layers get additions by a LoRA, and not other weights: then the base's
            matrices may be shared, but there are no diagonal parts, nor embeddings.
    """

    def __init__(
        self, base: Any, edits: Sequence[tuple[PlacedUnit, LinearEdit]], *, as_lora: bool
    ) -> None:
        self.base, self._as_lora = base, as_lora
        self._passes = Passes(base, [placed.site for placed, _ in edits])
        self._modules = self._passes.modules
        self.routed = [self._routed(placed, edit) for placed, edit in edits]

    def folded(self, name: str) -> FoldedLayer:
        """A layer with its edits, in the order in which they act around it."""
        layer = FoldedLayer(self._modules[name])
        own = [routed for routed in self.routed if name in routed.route.names]
        own.sort(key=lambda routed: self._passes.when(routed.placed.site))
        # The first to act on an input is the last before the matrix: W M₂ M₁ x.
        for routed in reversed([r for r in own if r.route.is_input]):
            layer.fold_before(routed.edit)
        for routed in [r for r in own if not r.route.is_input]:
            layer.fold_after(routed.edit)
        return layer

    @property
    def names(self) -> list[str]:
        """The layers that take edits, in the base's order."""
        names = {name for routed in self.routed for name in routed.route.names}
        return [name for name in self._modules if name in names]

    def flags_for(self, names: Sequence[str]) -> list[str]:
        """The flags of the base's config that give biases to layers, which all can have one."""
        lacking, flags = {n for n in names if not self._has_bias(n)}, []
        for flag, layers in self._biased_by_flag.items():
            if lacking & layers:
                flags.append(flag)
                lacking -= layers
        return flags

    def biased_by(self, flags: Sequence[str]) -> set[str]:
        """The layers that get a bias by flags."""
        return {name for flag in flags for name in self._biased_by_flag[flag]}

    # -- one unit ----------------------------------------------------------------------------------

    def _routed(self, placed: PlacedUnit, edit: LinearEdit) -> RoutedEdit:
        reasons: list[str] = []
        try:
            for route in self._passes.routes(placed.site):
                if not (route.is_exact_for_all or edit.is_constant):
                    continue
                reason = next(
                    filter(None, (self._problem(n, route, edit) for n in route.names)), ""
                )
                if not reason:
                    return RoutedEdit(placed, edit, route)
                reasons.append(reason)
        except ValueError as error:
            raise refusal(placed, error) from None
        raise refusal(placed, reasons[0] if reasons else _no_route(edit))

    def _problem(self, name: str, route: Route, edit: LinearEdit) -> str:
        """Why a layer cannot take an edit; nothing where it can."""
        module = self._modules[name]
        is_embedding = isinstance(module, nn.Embedding)
        if self._as_lora:
            if is_embedding:
                return f"a LoRA of {name} changes no bias of embeddings; exact is --to merged"
            if edit.scaling is not None:
                return "its diagonal part has full rank, which no LoRA has; exact is --to merged"
            return ""
        others = self._others_with_matrix(name)
        if others and (is_embedding or not edit.is_constant):
            return f"the matrix of {name} is that of {others[0]}, too, where nothing is edited"
        columns = module.weight.T if not isinstance(module, nn.Linear) else module.weight
        shift = edit.constant
        if route.is_input:
            shift = columns.detach().cpu().double()[:, edit.columns] @ shift
        has_slot = is_embedding or self._has_bias(name) or name in self._can_have_bias
        if self._needs_bias(shift) and not has_slot:
            return (
                f"{name} has no bias, and no flag of {type(self.base.config).__name__} gives it "
                "one; exact is --to lora, with the bias that PEFT reads"
            )
        return ""

    @staticmethod
    def _needs_bias(shift: Any) -> bool:
        return bool(shift.any())

    def _has_bias(self, name: str) -> bool:
        return getattr(self._modules[name], "bias", None) is not None

    def _others_with_matrix(self, name: str) -> list[str]:
        weight = self._modules[name].weight
        modules = self._modules.items()
        return [n for n, m in modules if n != name and getattr(m, "weight", None) is weight]

    # -- biases ------------------------------------------------------------------------------------

    @property
    def _can_have_bias(self) -> set[str]:
        return self.biased_by(list(self._biased_by_flag))

    @cached_property
    def _biased_by_flag(self) -> dict[str, set[str]]:
        """By flag of the config, the layers that get a bias by it, and nothing else changes."""
        config = self.base.config.get_text_config()
        flags = [n for n, value in vars(config).items() if "bias" in n and value is False]
        layers = {flag: self._layers_with(flag) for flag in flags}
        return {flag: names for flag, names in layers.items() if names}

    def _layers_with(self, flag: str) -> set[str]:
        config = copy.deepcopy(self.base.config)
        setattr(config.get_text_config(), flag, True)
        with torch.device("meta"):
            model = type(self.base)(config)
        before, after = set(self.base.state_dict()), set(model.state_dict())
        added = {name.rpartition(".") for name in after - before}
        is_usual = before <= after and all(end == "bias" for _, _, end in added)
        names = {path for path, _, _ in added}
        is_usual = is_usual and all(
            n in self._modules and is_foldable(self._modules[n]) for n in names
        )
        return names if is_usual else set()


def _no_route(edit: LinearEdit) -> str:
    """That no layers stand where an edit is, as passes of the base have shown."""
    if edit.is_constant:
        return (
            "a norm or another change stands between these states and all linear layers; exact is "
            "a constant at mlp_output or attention_output"
        )
    return (
        "a norm, a product or the residual stream stands between these states and all linear "
        "layers; exact are mlp_output and attention_output of a dense model, and its linear layers"
    )
