"""pyreft's `interventions` module."""

from ..interventions import (
    ConsreftIntervention,
    DireftIntervention,
    LobireftIntervention,
    LoreftIntervention,
    LowRankRotateLayer,
    NodireftIntervention,
    NoreftIntervention,
)

__all__ = [
    "ConsreftIntervention",
    "DireftIntervention",
    "LobireftIntervention",
    "LoreftIntervention",
    "LowRankRotateLayer",
    "NodireftIntervention",
    "NoreftIntervention",
]
