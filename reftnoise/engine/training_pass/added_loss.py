r"""The losses that units add to that of a training pass.

$$\mathcal{L} = \mathcal{L}_\mathrm{base} + \frac{n}{N} \sum_u \mathcal{L}_u$$

N is `num_items_in_batch`, the labels of all micro-batches of a step, and n those of this pass, so
that the sum over micro-batches has the mean of each unit's loss. Without N, the factor is 1.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..._util.errors import warn_once
from ..base.peft import inner_model
from ..base.running import is_transformed
from ..calls import Notes
from ..units import PlacedUnit

logger = logging.getLogger(__name__)


class AddedLoss:
    """What units have added to the loss of the last training pass of a model."""

    def __init__(self) -> None:
        self.progress = torch.ones(())
        """Share of the training that is done. A tensor, since torch.compile bakes numbers in."""
        self.last: Tensor | None = None
        """The sum of the units' losses, without the factor n / N."""
        self._is_left = False
        """Whether a pass had no loss to add it to, and it has not been read since."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"last": None}  # torch copies no tensor with a history

    def read(self) -> Tensor | None:
        """What the last pass has added, for a caller that makes its own loss."""
        self._is_left = False
        return self.last

    def leave(self) -> None:
        """After a pass without labels, leave it to the caller, who may not know of it."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if self._is_left:
            warn_once(
                logger,
                "what units add to the loss is not trained: the model is called without labels, as "
                "with label smoothing, so it has no loss to add it to. Train with ReftTrainer, or "
                "add reft_model.added_loss to your own loss",
            )
        self._is_left = True

    def of_pass(self, units: Iterable[PlacedUnit], notes: Notes) -> Float[Tensor, ""] | None:
        """The sum of what those of the units add that are in training mode, at a pass's end."""
        noted, total = notes.close(), None
        for placed in units:
            unit: Any = placed.unit
            if not unit.training:
                continue
            values = noted.get(placed.key, ())
            _expect_differentiable(placed, values)
            term = unit.added_loss(self.progress, values)
            if term is not None:
                total = term if total is None else total + term.to(total.device)
        is_kept = torch.compiler.is_compiling() or not is_transformed()
        self.last = total if is_kept else None
        return total


def _expect_differentiable(placed: PlacedUnit, noted: Sequence[Tensor]) -> None:
    """A ValueError where reentrant checkpoints have hidden what a pass computed from autograd."""
    unit: Any = placed.unit
    is_trained = torch.is_grad_enabled() and any(p.requires_grad for p in unit.parameters())
    if is_trained and not all(value.requires_grad for value in noted):
        raise ValueError(
            f"gradient checkpointing hides what {type(unit).__name__} computes at {placed.site}: "
            "set gradient_checkpointing_kwargs={'use_reentrant': False}"
        )


def with_added_loss(
    outputs: Any, added: Float[Tensor, ""] | None, share: Float[Tensor, ""] | float
) -> Any:
    """The outputs, whose loss has grown by a share of `added`; as they are if they have none."""
    if added is None:
        return outputs
    if isinstance(outputs, tuple):  # which holds a loss first, if there are labels
        return (_sum(outputs[0], added * share), *outputs[1:])
    if outputs.get("loss") is not None:
        outputs["loss"] = _sum(outputs["loss"], added * share)
    return outputs


def _sum(loss: Tensor, added: Tensor) -> Tensor:
    return loss + added.to(loss.device, loss.dtype)


def share_of_step(base: PreTrainedModel, inputs: Mapping[str, Any]) -> Float[Tensor, ""] | float:
    """n / N: the share of a step's labels that a pass has, as transformers' Trainer counts them."""
    total = inputs.get("num_items_in_batch")
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs.get("labels")
        if isinstance(labels, Tensor) and shifts_labels(inner_model(base)):
            labels = labels[..., 1:]
    if total is None or not isinstance(labels, Tensor):
        return 1.0
    count = (labels != -100).sum()
    return count / (total.to(count.device) if isinstance(total, Tensor) else total)


def shifts_labels(base: Any) -> bool:
    """Whether a column of a base's logits predicts the label of the next one."""
    is_causal = LOSS_MAPPING.get(getattr(base, "loss_type", None)) is ForCausalLMLoss
    return is_causal and not getattr(base.config, "is_encoder_decoder", False)
