"""What is watched of a training: how far it is, and whether it has diverged.

Neither waits for the device more often than the training does. At the end, whether its loss has
fallen at all.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...engine.base.sharding import own_part
from ...model import ReftModel

PATIENCE = 10
"""Micro-batches in a row without a finite loss, after which finite weights are no excuse.

A single one may have no label, or overflow in half precision, from which training recovers.
"""


class Divergence:
    """The losses of a run, and whether it is time to look at the weights.

    Args:
        reads_losses: whether each loss is read at once, as the Trainer does to filter its log.
    """

    def __init__(self, *, reads_losses: bool) -> None:
        self.reads_losses = reads_losses
        self._is_suspect = False
        self._in_a_row = torch.zeros((), dtype=torch.int64)

    def see(self, loss: Tensor) -> None:
        """Take note of the loss of a micro-batch."""
        is_bad = ~loss.detach().isfinite().all()
        self._in_a_row = (self._in_a_row.to(is_bad.device) + 1) * is_bad
        if self.reads_losses and is_bad:
            self._is_suspect = True

    def problem(self, module: nn.Module, *, is_due: bool) -> str | None:
        """What is not finite any more; None if all is, or if it is not the time to look.

        Args:
            module: the model, whose trained parameters are read.
            is_due: whether to look although no loss was suspect.
        """
        if not (is_due or self._is_suspect):
            return None
        self._is_suspect = False
        trained = {n: own_part(p) for n, p in module.named_parameters() if p.requires_grad}
        finite = {name: part.detach().isfinite().all() for name, part in trained.items()}
        if not all_of(finite.values()):
            name = next(name for name, is_finite in finite.items() if not is_finite)
            return f"{name} is not finite"
        if (count := int(self._in_a_row)) >= PATIENCE:
            return f"the loss was not finite in {count} batches in a row"
        return None


def all_of(flags: Iterable[Tensor]) -> bool:
    """Whether all flags are set, with one synchronisation for each device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for flag in flags:
        by_device.setdefault(flag.device, []).append(flag)
    return all(bool(torch.stack(same).all()) for same in by_device.values())


def unfallen(losses: Sequence[float]) -> str | None:
    r"""What is wrong with the logged losses of a run that has ended; None if they have fallen.

    The mean of the last tenth of them, k losses, is compared with that of the first. A loss has the
    variance $\hat\sigma^2 = \frac{1}{2(n-1)} \sum_i (l_{i+1} - l_i)^2$, to which a trend adds
    little (von Neumann 1941), so that the difference of the means has the standard error
    $\hat\sigma\sqrt{2/k}$. A fall by no more than that is none. Of fewer than ten losses nothing is
    said.
    """
    count = len(losses) // 10
    if count < 1 or not all(map(math.isfinite, losses)):
        return None
    first, last = fmean(losses[:count]), fmean(losses[-count:])
    steps = [b - a for a, b in pairwise(losses)]
    error = math.sqrt(fmean(step**2 for step in steps) / count)
    if first - last > error:
        return None
    return (
        f"the loss did not fall: it was {first:.3g} in the first tenth of the steps and {last:.3g} "
        f"in the last, ± {error:.2g}"
    )


class TrainingProgress(TrainerCallback):
    """Sets `ReftModel.training_progress` at each step of a Trainer of transformers or TRL.

    `ReftTrainer` has it already. The progress is steps done / steps of the training, also where one
    goes on from a checkpoint, and 1 after the training.
    """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the progress before the first micro-batch of a step."""
        _set_progress(kwargs.get("model"), min(state.global_step / max(state.max_steps, 1), 1.0))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave schedules at their end."""
        _set_progress(kwargs.get("model"), 1.0)


def _set_progress(model: Any, share: float) -> None:
    for module in model.modules():  # the first is the model, unless something wraps it
        if isinstance(module, ReftModel):
            module.training_progress = share
            return
