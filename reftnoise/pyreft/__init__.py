"""pyreft's names in pyreft's modules: `import reftnoise.pyreft as pyreft`."""

from .config import ReftConfig as ReftConfig
from .dataset import ReftDataCollator as ReftDataCollator
from .dataset import ReftDataset as ReftDataset
from .dataset import ReftGenerationDataset as ReftGenerationDataset
from .dataset import ReftPreferenceDataset as ReftPreferenceDataset
from .dataset import ReftRawDataset as ReftRawDataset
from .dataset import ReftRewardCollator as ReftRewardCollator
from .dataset import ReftRewardDataset as ReftRewardDataset
from .dataset import ReftSupervisedDataset as ReftSupervisedDataset
from .dataset import get_intervention_locations as get_intervention_locations
from .dataset import (
    make_last_position_supervised_data_module as make_last_position_supervised_data_module,
)
from .dataset import (
    make_multiple_position_supervised_data_module as make_multiple_position_supervised_data_module,
)
from .dataset import parse_positions as parse_positions
from .interventions import ConsreftIntervention as ConsreftIntervention
from .interventions import DireftIntervention as DireftIntervention
from .interventions import LobireftIntervention as LobireftIntervention
from .interventions import LoreftIntervention as LoreftIntervention
from .interventions import NodireftIntervention as NodireftIntervention
from .interventions import NoreftIntervention as NoreftIntervention
from .reft_model import ReftModel as ReftModel
from .reft_trainer import ReftTrainer as ReftTrainer
from .reft_trainer import ReftTrainerForCausalLM as ReftTrainerForCausalLM
from .reft_trainer import ReftTrainerForCausalLMDistributed as ReftTrainerForCausalLMDistributed
from .reft_trainer import (
    ReftTrainerForSequenceClassification as ReftTrainerForSequenceClassification,
)
from .utils import TaskType as TaskType
from .utils import get_reft_model as get_reft_model
