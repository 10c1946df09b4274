"""What users of a model set and read of its training passes."""

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..base.peft import inner_model
from ..hooks import Engine
from .fused_head import EditedBackbone, expect_plain_head
from .prefix_cache import PrefixCache
from .runner import ForwardPasses, SplitMode


class TrainingMixin:
    """The part of `ReftModel` that concerns training passes."""

    model: PreTrainedModel
    engine: Engine
    forward: Callable[..., Any]
    _passes: ForwardPasses
    _split: SplitMode
    prefix_cache: PrefixCache | None

    @property
    def split(self) -> SplitMode:
        """Whether training runs what comes before the first edit without gradients.

        `"auto"` where that is possible and saves time, `"always"` or an error that says why not,
        or `"never"`. `prefix_cache`, a `PrefixCache` or None, keeps its results for later epochs.
        """
        return self._split

    @split.setter
    def split(self, mode: SplitMode) -> None:
        if mode not in get_args(SplitMode):
            raise ValueError(f"split {mode!r}: expected 'auto', 'always' or 'never'")
        self._split = mode

    @property
    def base_model(self) -> Any:
        """The base without its head, called with the edits, for losses that read hidden states.

        TRL's DistillationTrainer calls it, which is a ValueError where a unit edits the head: such
        a loss leaves that out. `reft_model.model.base_model` is without edits.
        """
        base = inner_model(self.model)
        if base.base_model is base:
            return self

        def edited(*args: Any, **inputs: Any) -> Any:
            expect_plain_head(base, self.engine.sites)
            return self.forward(*args, **inputs)

        return EditedBackbone(base.base_model, edited)

    @property
    def training_progress(self) -> float:
        """Share of the training that is done, from 0 to 1, for units whose loss has a schedule.

        `ReftTrainer` sets it at each step, the callback `TrainingProgress` in other Trainers, and a
        loop of your own may. Until then it is 1: schedules are at their end.
        """
        return float(self._passes.added.progress)

    @training_progress.setter
    def training_progress(self, share: Any) -> None:
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"training_progress {share!r}: expected a share from 0 to 1")
        self._passes.added.progress = torch.tensor(float(share))

    @property
    def added_loss(self) -> Tensor | None:
        """What units added to the loss in the last pass; None for nothing, as in evaluation.

        It is a mean and has its gradient. `outputs.loss` includes it; a trainer that makes its loss
        of logits, as transformers' own does with label smoothing, adds it itself. A warning says
        where it is not added.
        """
        return self._passes.added.read()
