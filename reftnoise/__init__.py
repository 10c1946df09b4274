"""reftnoise: adapt language models by editing their hidden states.

A frozen base model is wrapped with low-rank interventions (ReFT) at chosen layers and positions,
trained together with embedding noise. Names are imported when they are first used, so that the
command line starts quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOME = {
    "config.representations": ("ReftConfig", "RepresentationConfig"),
    "data.collation": ("ReftDataCollator", "make_last_position_supervised_data_module"),
    "interventions": (
        "AdapterIntervention",
        "AdditionIntervention",
        "BernoulliNoiseIntervention",
        "BiasIntervention",
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
    "config.positions": ("Positions",),
    "engine.training_pass.prefix_cache": ("PrefixCache",),
    "analysis.steering": ("fit_steering_vectors",),
    "engine.base.tiny": ("load_tiny_examples", "load_tiny_model"),
    "training.trainer": (
        "ReftTrainer",
        "ReftTrainerForCausalLM",
        "ReftTrainerForSequenceClassification",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = list(_MODULE_OF)

if TYPE_CHECKING:  # `as` marks a name as public for type checkers
    from .analysis.steering import fit_steering_vectors as fit_steering_vectors
    from .config.positions import Positions as Positions
    from .config.representations import ReftConfig as ReftConfig
    from .config.representations import RepresentationConfig as RepresentationConfig
    from .data.collation import ReftDataCollator as ReftDataCollator
    from .data.collation import (
        make_last_position_supervised_data_module as make_last_position_supervised_data_module,
    )
    from .engine.base.tiny import load_tiny_examples as load_tiny_examples
    from .engine.base.tiny import load_tiny_model as load_tiny_model
    from .engine.training_pass.prefix_cache import PrefixCache as PrefixCache
    from .interventions import AdapterIntervention as AdapterIntervention
    from .interventions import AdditionIntervention as AdditionIntervention
    from .interventions import BernoulliNoiseIntervention as BernoulliNoiseIntervention
    from .interventions import BiasIntervention as BiasIntervention
    from .interventions import ConsreftIntervention as ConsreftIntervention
    from .interventions import DireftIntervention as DireftIntervention
    from .interventions import GaussianNoiseIntervention as GaussianNoiseIntervention
    from .interventions import LobireftIntervention as LobireftIntervention
    from .interventions import LoreftIntervention as LoreftIntervention
    from .interventions import LowRankRotation as LowRankRotation
    from .interventions import NeftuneIntervention as NeftuneIntervention
    from .interventions import NodireftIntervention as NodireftIntervention
    from .interventions import NoiseIntervention as NoiseIntervention
    from .interventions import NoreftIntervention as NoreftIntervention
    from .interventions import ReftIntervention as ReftIntervention
    from .interventions import SymNoiseIntervention as SymNoiseIntervention
    from .interventions import register_intervention as register_intervention
    from .model import ReftModel as ReftModel
    from .model import get_reft_model as get_reft_model
    from .training.trainer import ReftTrainer as ReftTrainer
    from .training.trainer import ReftTrainerForCausalLM as ReftTrainerForCausalLM
    from .training.trainer import (
        ReftTrainerForSequenceClassification as ReftTrainerForSequenceClassification,
    )


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
