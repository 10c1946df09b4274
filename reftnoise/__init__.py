"""reftnoise: adapt language models by editing their hidden states.

A frozen base model is wrapped with low-rank interventions (ReFT) at chosen layers and positions,
trained together with embedding noise. Names are imported when they are first used, so that the
command line starts quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "config": ("ReftConfig", "RepresentationConfig"),
    "data": ("ReftDataCollator", "make_last_position_supervised_data_module"),
    "interventions": (
        "BernoulliNoiseIntervention",
        "ConsreftIntervention",
        "DireftIntervention",
        "GaussianNoiseIntervention",
        "LobireftIntervention",
        "LoreftIntervention",
        "LowRankRotation",
        "NeftuneIntervention",
        "NodireftIntervention",
        "NoiseIntervention",
        "NoreftIntervention",
        "ReftIntervention",
        "SymNoiseIntervention",
        "register_intervention",
    ),
    "model": ("ReftModel", "get_reft_model"),
    "positions": ("Positions",),
    "tiny": ("load_tiny_examples", "load_tiny_model"),
    "trainer": ("ReftTrainer", "ReftTrainerForCausalLM"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]  # noqa: PLE0604  # names are strings

if TYPE_CHECKING:
    from .config import ReftConfig, RepresentationConfig
    from .data import ReftDataCollator, make_last_position_supervised_data_module
    from .interventions import (
        BernoulliNoiseIntervention,
        ConsreftIntervention,
        DireftIntervention,
        GaussianNoiseIntervention,
        LobireftIntervention,
        LoreftIntervention,
        LowRankRotation,
        NeftuneIntervention,
        NodireftIntervention,
        NoiseIntervention,
        NoreftIntervention,
        ReftIntervention,
        SymNoiseIntervention,
        register_intervention,
    )
    from .model import ReftModel, get_reft_model
    from .positions import Positions
    from .tiny import load_tiny_examples, load_tiny_model
    from .trainer import ReftTrainer, ReftTrainerForCausalLM


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
