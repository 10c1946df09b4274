"""The public names and the modules that they come from, for type checkers and `__init__.py`."""

from .analysis.detection.conditions import Condition as Condition
from .analysis.detection.conditions import fit_conditions as fit_conditions
from .analysis.detection.detect import Detection as Detection
from .analysis.detection.detect import detect as detect
from .analysis.detection.fit import fit_concept_vectors as fit_concept_vectors
from .analysis.heads import head_norms as head_norms
from .analysis.heads import select_heads as select_heads
from .analysis.steering.fit import fit_steering_vectors as fit_steering_vectors
from .config.positions import Positions as Positions
from .config.preference import PreferenceObjective as PreferenceObjective
from .config.representations import ReftConfig as ReftConfig
from .config.representations import RepresentationConfig as RepresentationConfig
from .data.collation import ReftDataCollator as ReftDataCollator
from .data.collation import (
    make_last_position_supervised_data_module as make_last_position_supervised_data_module,
)
from .engine.base.loading import load_base as load_base
from .engine.base.tiny import load_tiny_examples as load_tiny_examples
from .engine.base.tiny import load_tiny_model as load_tiny_model
from .engine.training_pass.prefix_cache import PrefixCache as PrefixCache
from .inference.export.exporting import export_adapter as export_adapter
from .inference.verification.verifying import verify_server as verify_server
from .interventions import AblationIntervention as AblationIntervention
from .interventions import AdapterIntervention as AdapterIntervention
from .interventions import AdditionIntervention as AdditionIntervention
from .interventions import BernoulliNoiseIntervention as BernoulliNoiseIntervention
from .interventions import BiasIntervention as BiasIntervention
from .interventions import ConsreftIntervention as ConsreftIntervention
from .interventions import DireftIntervention as DireftIntervention
from .interventions import GaussianNoiseIntervention as GaussianNoiseIntervention
from .interventions import HypeIntervention as HypeIntervention
from .interventions import JolaIntervention as JolaIntervention
from .interventions import LobireftIntervention as LobireftIntervention
from .interventions import LofitIntervention as LofitIntervention
from .interventions import LoreftIntervention as LoreftIntervention
from .interventions import LowRankRotation as LowRankRotation
from .interventions import NeftuneIntervention as NeftuneIntervention
from .interventions import NodireftIntervention as NodireftIntervention
from .interventions import NoiseIntervention as NoiseIntervention
from .interventions import NoreftIntervention as NoreftIntervention
from .interventions import R3fIntervention as R3fIntervention
from .interventions import RedIntervention as RedIntervention
from .interventions import ReftIntervention as ReftIntervention
from .interventions import ReftR1Intervention as ReftR1Intervention
from .interventions import RowStrengths as RowStrengths
from .interventions import SmartIntervention as SmartIntervention
from .interventions import SymNoiseIntervention as SymNoiseIntervention
from .interventions import register_intervention as register_intervention
from .model import ReftModel as ReftModel
from .model import get_reft_model as get_reft_model
from .pyreft import dataset as dataset
from .pyreft import reft_model as reft_model
from .pyreft import reft_trainer as reft_trainer
from .pyreft import utils as utils
from .pyreft.dataset import ReftDataset as ReftDataset
from .pyreft.dataset import ReftGenerationDataset as ReftGenerationDataset
from .pyreft.dataset import ReftPreferenceDataset as ReftPreferenceDataset
from .pyreft.dataset import ReftRawDataset as ReftRawDataset
from .pyreft.dataset import ReftRewardCollator as ReftRewardCollator
from .pyreft.dataset import ReftRewardDataset as ReftRewardDataset
from .pyreft.dataset import ReftSupervisedDataset as ReftSupervisedDataset
from .pyreft.dataset import get_intervention_locations as get_intervention_locations
from .pyreft.dataset import (
    make_multiple_position_supervised_data_module as make_multiple_position_supervised_data_module,
)
from .pyreft.dataset import parse_positions as parse_positions
from .pyreft.utils import TaskType as TaskType
from .training.preference.data import make_preference_data_module as make_preference_data_module
from .training.preference.trainer import ReftPreferenceTrainer as ReftPreferenceTrainer
from .training.steps.watching import TrainingProgress as TrainingProgress
from .training.trainer import ReftTrainer as ReftTrainer
from .training.trainer import ReftTrainerForCausalLM as ReftTrainerForCausalLM
from .training.trainer import (
    ReftTrainerForCausalLMDistributed as ReftTrainerForCausalLMDistributed,
)
from .training.trainer import (
    ReftTrainerForSequenceClassification as ReftTrainerForSequenceClassification,
)

__version__: str
