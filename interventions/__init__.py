"""The mathematics: interventions on hidden states, free of any model, config or file."""

from .adapters import AdapterIntervention, AdditionIntervention, BiasIntervention
from .base import LowRankIntervention, NoiseIntervention, ReftIntervention
from .factors import Factors, StackedEdit, side_by_side
from .noise import (
    BernoulliNoiseIntervention,
    GaussianNoiseIntervention,
    NeftuneIntervention,
    SymNoiseIntervention,
)
from .reft import (
    ConsreftIntervention,
    DireftIntervention,
    LobireftIntervention,
    LoreftIntervention,
    NodireftIntervention,
    NoreftIntervention,
)
from .registry import (
    INTERVENTIONS,
    Unit,
    intervention_class,
    intervention_name,
    register_intervention,
)
from .rotation import LowRankRotation, orthonormal_rows, shared_bases

__all__ = [
    "INTERVENTIONS",
    "AdapterIntervention",
    "AdditionIntervention",
    "BernoulliNoiseIntervention",
    "BiasIntervention",
    "ConsreftIntervention",
    "DireftIntervention",
    "Factors",
    "GaussianNoiseIntervention",
    "LobireftIntervention",
    "LoreftIntervention",
    "LowRankIntervention",
    "LowRankRotation",
    "NeftuneIntervention",
    "NodireftIntervention",
    "NoiseIntervention",
    "NoreftIntervention",
    "ReftIntervention",
    "StackedEdit",
    "SymNoiseIntervention",
    "Unit",
    "intervention_class",
    "intervention_name",
    "orthonormal_rows",
    "register_intervention",
    "shared_bases",
    "side_by_side",
]
