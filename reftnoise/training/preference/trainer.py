"""Training on pairs of answers, with strengths of edits that are drawn for each of them."""

from typing import Any

import torch
from torch import Tensor

from ...config.preference import ObjectiveName, PreferenceObjective
from ...engine.base.threads import in_evaluation_mode
from ...engine.training_pass.loss import targets_of
from ...interventions import RowStrengths, has_direction
from ...model import ReftModel
from ..trainer import ReftTrainer
from .data import CHOSEN, REJECTED
from .objectives import AnswerLogProbs, draw, preference_logits, preference_loss


class ReftPreferenceTrainer(ReftTrainer):
    r"""A `ReftTrainer` on pairs of answers, by RePS, BiPO or DPO.

    Datasets and collator are those of `make_preference_data_module`. The reference is the bare
    base, of which there is no second copy. The log has `accuracy`, the share of terms that the
    policy orders as they should be, and `margin`, the mean of what σ is taken of.

    RePS with `suppression="project"` needs units whose edit has one direction: a vector, such as
    `bias`, or rank 1 without an activation. Everything else takes any units.

    Args:
        model: a `ReftModel`.
        args: `transformers.TrainingArguments`.
        objective: name of an objective, or one with its arguments.
        trainer_arguments: further arguments of `ReftTrainer`.

    Raises:
        ValueError: units that the objective cannot train, or another loss than the objective's.
    """

    def __init__(
        self,
        model: ReftModel | None = None,
        args: Any = None,
        *,
        objective: ObjectiveName | PreferenceObjective = "reps",
        **trainer_arguments: Any,
    ) -> None:
        if isinstance(objective, str):
            objective = PreferenceObjective(name=objective)
        self.objective = objective
        if model is not None:
            _expect_units(model, objective)
        super().__init__(model, args, **trainer_arguments)
        if self.label_smoother is not None or self.compute_loss_func is not None:
            name = "compute_loss_func" if self.label_smoother is None else "label_smoothing_factor"
            raise ValueError(f"{name}: the loss is the objective's, which has no place for it")
        # The loss is a mean over pairs, whatever their tokens.
        self.model_accepts_loss_kwargs = False
        self._trained: list[Tensor] = []
        self._evaluated: list[Tensor] = []

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [CHOSEN, REJECTED]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The objective's loss of a batch of pairs, in the collator's order."""
        adapter = self.accelerator.unwrap_model(model)
        is_training = model.training
        pairs = len(inputs["input_ids"]) // 2
        drawn = draw(self.objective, pairs, is_training=is_training)
        repeated = {name: torch.cat([value] * drawn.copies) for name, value in inputs.items()}
        policy = _answer_log_probs(model, adapter, repeated, drawn.strengths)
        added = adapter.added_loss if is_training else None
        with torch.no_grad(), in_evaluation_mode(model), adapter.disabled():
            reference = _answer_log_probs(model, adapter, inputs, None)
        logits = preference_logits(self.objective, drawn, policy, reference.sums)
        (self._trained if is_training else self._evaluated).append(logits.detach().double())
        loss = preference_loss(logits)
        if added is not None:
            loss = loss + added.to(loss)
        return (loss, {"logits": logits}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kw: Any
    ) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate a dataset: its metrics have accuracy and margin, too."""
        self._evaluated.clear()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        for name, value in _metrics(self._evaluated).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log values, those of training with accuracy and margin since they were logged last."""
        if "loss" in logs:
            logs |= _metrics(self._trained)
            self._trained.clear()
        super().log(logs, *args, **kwargs)


def _metrics(logits: list[Tensor]) -> dict[str, float]:
    """Accuracy and margin of the terms of batches; none of no batch."""
    if not logits:
        return {}
    values = torch.cat([batch.flatten() for batch in logits])
    return {"accuracy": float((values > 0).double().mean()), "margin": float(values.mean())}


def _expect_units(model: ReftModel, objective: PreferenceObjective) -> None:
    for placed in model.engine.units:
        if getattr(placed.unit, "paired", False):
            raise ValueError(
                f"{type(placed.unit).__name__} draws noise in pairs, so that an answer has two log-"
                "probabilities: expected another noise, such as bernoulli"
            )
        is_edit = placed.positions is not None
        if objective.suppression == "project" and is_edit and not has_direction(placed.unit):
            raise ValueError(
                f"suppression 'project': {type(placed.unit).__name__} at {placed.site} has no one "
                "direction to take out of hidden states: expected a unit whose edit is a vector, "
                "such as bias, or of rank 1 without act_fn; or suppression 'negate' or 'none'"
            )


def _answer_log_probs(
    model: Any, adapter: ReftModel, inputs: dict[str, Any], strengths: RowStrengths | None
) -> AnswerLogProbs:
    """Of each row's answer, the sum of its tokens' log-probabilities, and their number."""
    targets = targets_of(inputs["labels"])
    is_answer = targets != -100
    with adapter.using(strengths=strengths):
        logits = model(**inputs, return_logits="labels").logits
    tokens = targets[is_answer].to(logits.device)
    each = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    each = each.gather(1, tokens[:, None])[:, 0]
    rows = is_answer.nonzero()[:, 0].to(each.device)
    sums = each.new_zeros(len(targets)).index_add(0, rows, each)
    return AnswerLogProbs(sums, is_answer.sum(1).to(each.device))
