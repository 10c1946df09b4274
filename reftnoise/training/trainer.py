"""transformers' Trainer, saving adapters and nothing else."""

import inspect
import json
import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.utils.generic import find_labels

from .._util.errors import first_difference, one_line, warn_once
from .._util.files import local_path, writing
from ..adapters import saving
from ..adapters.directory import AdapterFiles
from ..data.encoding import LOCATIONS
from ..engine.base.peft import inner_model
from ..engine.base.sharding import whole_state
from ..engine.layout import Batch, has_token_labels, prompt_lengths_from_labels
from ..engine.planning import FROZEN_UNITS
from ..engine.training_pass.added_loss import share_of_step
from ..engine.training_pass.prefix_cache import Place, PrefixCache
from ..engine.training_pass.runner import SplitMode
from ..model import ReftModel
from .steps.data_order import by_epoch, seed_workers
from .steps.watching import Divergence, TrainingProgress

logger = logging.getLogger(__name__)


class ReftTrainer(Trainer):
    """A `transformers.Trainer` whose checkpoints are adapter directories.

    Everything else is the Trainer's: evaluation, best model, accumulation, devices, reporting.
    Training stops with a ValueError when trained weights, or all losses, are not finite any more.
    A run that was killed resumes from its last complete checkpoint and ends with the same weights
    as one that was not.

    Args:
        model: a `ReftModel`.
        args: `transformers.TrainingArguments`.
        tokenizer: the older name of `processing_class`.
        split: whether what comes before the first edit runs without gradients, as in
            `ReftModel.split`; None keeps the model's own setting.
        prefix_cache: place where the prompts' keys and values are kept for the next epochs,
            `"memory"` or `"disk"`, or a `PrefixCache`, which keeps them after training, too. A step
            then costs the completion alone. With noise on prompts or dropout in the base, they are
            computed in each epoch.
        prefix_cache_bytes: greatest size of that cache.
        trainer_arguments: further arguments of the Trainer.
    """

    def __init__(
        self,
        model: ReftModel | None = None,
        args: TrainingArguments | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        split: SplitMode | None = None,
        prefix_cache: Place | PrefixCache = "none",
        prefix_cache_bytes: int = 2**32,
        **trainer_arguments: Any,
    ) -> None:
        if tokenizer is not None:
            if trainer_arguments.get("processing_class") is not None:
                raise ValueError(
                    "tokenizer and processing_class are the same argument: expected one of them"
                )
            trainer_arguments["processing_class"] = tokenizer
        self._divergence = Divergence(reads_losses=False)
        self._prefix_cache: PrefixCache | None = None
        self._owns_cache = not isinstance(prefix_cache, PrefixCache)
        if isinstance(prefix_cache, PrefixCache):
            self._prefix_cache = prefix_cache
        elif prefix_cache != "none":
            self._prefix_cache = PrefixCache(prefix_cache, prefix_cache_bytes)
        super().__init__(model=model, args=args, **trainer_arguments)
        self.add_callback(TrainingProgress())
        if split is not None:
            self.model.split = split
        if self.args.label_names is None and isinstance(self.model, ReftModel):
            self.label_names = find_labels(type(inner_model(self.model.model)))

    def create_accelerator_and_postprocess(self) -> None:
        # For models that are not transformers' own, the Trainer has DDP search each step for
        # parameters without a gradient. Units have gradients, whatever the batch.
        args, base = self.args, getattr(self.model, "model", None)
        is_open = args.ddp_find_unused_parameters is None
        if is_open and base and not any(p.requires_grad for p in base.parameters()):
            args.ddp_find_unused_parameters = False
        try:
            super().create_accelerator_and_postprocess()
        finally:
            if is_open:
                args.ddp_find_unused_parameters = None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint=True` continues from the last complete checkpoint."""
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            if next(self.model.interventions.parameters(), None) is not None:
                raise ValueError(f"nothing is trained: {FROZEN_UNITS}")
            raise ValueError(
                "nothing is trained: all parameters are frozen, and noise has none; "
                "get_reft_model(model, config, disable_model_grads=False) trains the base under it"
            )
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint:
            path = local_path(resume_from_checkpoint, "resume_from_checkpoint")
            resume_from_checkpoint = str(path)
        one_process = self.args.world_size == 1  # others would wait for one that looks alone
        self._divergence = Divergence(reads_losses=self.args.logging_nan_inf_filter and one_process)
        output = self._train(resume_from_checkpoint, **kwargs)
        self._expect_finite(is_due=True)
        return output

    def _train(self, resume_from_checkpoint: str | bool | None, **kwargs: Any) -> Any:
        if self._prefix_cache is None:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        adapter = self.accelerator.unwrap_model(self.model)
        before, adapter.prefix_cache = adapter.prefix_cache, self._prefix_cache
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            adapter.prefix_cache = before
            if self._owns_cache:
                self._prefix_cache.clear()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        seeds_random = self.args.accelerator_config.use_seedable_sampler
        return by_epoch(
            super()._get_train_sampler(train_dataset), self._data_seed, seeds_random=seeds_random
        )

    def get_train_dataloader(self) -> Any:
        """The Trainer's loader of the training set."""
        return seed_workers(super().get_train_dataloader(), self._data_seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The Trainer's loader of an evaluation set, or of the one of that name."""
        return seed_workers(super().get_eval_dataloader(eval_dataset), self._data_seed)

    @property
    def _data_seed(self) -> int:
        return int(self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def _set_signature_columns_if_needed(self) -> None:
        # The Trainer leaves out columns that `forward` does not name: the base's may take more.
        super()._set_signature_columns_if_needed()
        adapter = self.accelerator.unwrap_model(self.model)
        if isinstance(adapter, ReftModel):
            taken = inspect.signature(inner_model(adapter.model).forward).parameters
            self._signature_columns += [n for n in taken if n not in self._signature_columns]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # Label smoothing and compute_loss_func remove the labels, which show the prompt's end.
        adapter = self.accelerator.unwrap_model(model)
        if LOCATIONS in inputs:  # a batch of pyreft, whose trainer reads only what the model takes
            self._set_signature_columns_if_needed()
            inputs = {n: v for n, v in inputs.items() if n in self._signature_columns}
        labels, tokens = inputs.get("labels"), inputs.get("input_ids")
        mask = inputs.get("attention_mask")
        is_packed = mask is None and "position_ids" in inputs
        if not ("prompt_lengths" in inputs or tokens is None or labels is None or is_packed):
            attended = Batch.of(inputs).attended
            if has_token_labels(labels, attended) and getattr(adapter, "labels_end_prompts", True):
                lengths = prompt_lengths_from_labels(labels, attended)
                inputs = inputs | {"prompt_lengths": lengths}
        returns_outputs = kwargs.get("return_outputs", bool(args and args[0]))
        if model.training and not returns_outputs and isinstance(adapter, ReftModel):
            inputs = {"return_logits": False} | inputs
        result = super().compute_loss(model, inputs, *args, **kwargs)
        takes_labels = self.label_smoother is not None or self.compute_loss_func is not None
        if not (takes_labels and model.training and isinstance(adapter, ReftModel)):
            return result
        loss, *outputs = result if isinstance(result, tuple) else (result,)
        count = args[1] if len(args) > 1 else kwargs.get("num_items_in_batch")
        loss = self._with_added_loss(loss, adapter, labels, count)
        return (loss, *outputs) if outputs else loss

    def _with_added_loss(self, loss: Any, adapter: ReftModel, labels: Any, count: Any) -> Any:
        """The Trainer's own loss of logits, and what the units add to it."""
        if (added := adapter.added_loss) is None:
            return loss
        share = share_of_step(adapter.model, {"labels": labels, "num_items_in_batch": count})
        if self.args.average_tokens_across_devices and count is not None:
            share = share * (self.accelerator.num_processes // self.get_tp_size())
        return loss + share * added.to(loss.device)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's micro-batches of a step, and their number of labels, at least 1.

        The Trainer divides by it. A step without labels, as where a truncation has cut them off,
        then has the loss 0 and no gradient.
        """
        batches, count = super().get_batch_samples(*args, **kwargs)
        if count is None:
            return batches, None
        count = torch.as_tensor(count)
        if self._divergence.reads_losses and not count:
            warn_once(
                logger,
                "a step had no label but -100 and taught nothing: was the end of its rows cut off?",
            )
        return batches, count.clamp(min=1)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self._divergence.see(loss)
        return loss

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # Each of the three waits for the device; a save replaces the last good checkpoint.
        control = self.control
        due = control.should_log or control.should_save or control.should_evaluate
        self._expect_finite(is_due=due)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _expect_finite(self, *, is_due: bool) -> None:
        """Raise a ValueError once a trained parameter, or the loss for good, is not finite."""
        problem = self._divergence.problem(self.accelerator.unwrap_model(self.model), is_due=is_due)
        if self.args.world_size > 1 and is_due:
            flag = torch.tensor(int(problem is not None), device=self.args.device)
            if self.accelerator.reduce(flag) and problem is None:
                problem = "another process has what is not finite"
        if problem is None:
            return
        args, last = self.args, find_checkpoint(self.args.output_dir)
        kept = "" if last is None else f"; the last good checkpoint is {last}"
        raise ValueError(
            f"training diverged at step {self.state.global_step}: {problem}; lower learning_rate "
            f"({args.learning_rate:g}) or max_grad_norm ({args.max_grad_norm:g}){kept}"
        )

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kw: Any
    ) -> Any:
        if prediction_loss_only and isinstance(self.accelerator.unwrap_model(model), ReftModel):
            inputs = {"return_logits": False} | inputs
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kw)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter. All processes must call this, and the first one writes."""
        if output_dir is not None:
            output_dir = str(local_path(output_dir, "output_dir"))
        if not (self.accelerator.is_fsdp2 or self.is_deepspeed_enabled):
            super().save_model(output_dir, _internal_call)
            return
        # The Trainer would gather the frozen base, too, or nothing.
        adapter = self.accelerator.unwrap_model(self.model)
        self._save(output_dir, whole_state(adapter, is_kept=self.args.should_save))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with writing(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        directory = Path(output_dir or self.args.output_dir)
        adapter = self.accelerator.unwrap_model(self.model)
        adapter.save_pretrained(directory, state_dict=state_dict)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        torch.save(self.args, directory / TRAINING_ARGS_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save = self.model_wrapped.save_checkpoint  # saves the frozen base, too, by default
        self.model_wrapped.save_checkpoint = partial(save, exclude_frozen_parameters=True)
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            del self.model_wrapped.save_checkpoint

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._prefix_cache is not None:
            torch.save(self._prefix_cache.state_dict(), self._prefixes_of(output_dir))
        # The trainer state comes next: it says that the checkpoint is complete, for all processes.
        self.accelerator.wait_for_everyone()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if self._prefix_cache is None or checkpoint is None:
            return
        path = self._prefixes_of(checkpoint)
        try:
            self._prefix_cache.load_state_dict(torch.load(path, weights_only=True))
        except (FileNotFoundError, ValueError) as error:
            reason = f"no {path.name} in it" if isinstance(error, OSError) else one_line(error)
            logger.warning(
                "%s: %s; prompts are computed in other batches than before, so weights may differ "
                "from those of a run that was not interrupted, in their last bits",
                checkpoint,
                reason,
            )

    def _prefixes_of(self, checkpoint: str) -> Path:
        """The file with this process's state of the prefix cache."""
        return Path(checkpoint) / f"prefix_cache_{self.args.process_index}.pt"

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: ReftModel | None = None
    ) -> None:
        adapter = AdapterFiles.read(resume_from_checkpoint)
        target: Any = self.accelerator.unwrap_model(model or self.model)
        if difference := first_difference(adapter.config.to_dict(), target.reft_config.to_dict()):
            where, old, new = difference
            raise ValueError(
                f"{adapter.config_path}: {where} is {old!r}, but the model has {new!r}: expected a "
                "model with the checkpoint's config"
            )
        saving.load_weights(model or self.model, adapter)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:  # whose optimizer has weights of its own
            super()._load_best_model()
            return
        saving.load_weights(self.model, AdapterFiles.read(self.state.best_model_checkpoint))


ReftTrainerForCausalLM = ReftTrainerForSequenceClassification = ReftTrainer
ReftTrainerForCausalLMDistributed = ReftTrainer
"""pyreft's names for the trainer, which is the same for all tasks and numbers of processes."""


def last_complete_checkpoint(output_dir: str) -> str:
    """The newest checkpoint that is complete.

    Raises:
        ValueError: there is none.
    """
    checkpoint = find_checkpoint(output_dir)
    if checkpoint is None:
        raise ValueError(f"{output_dir}: no complete checkpoint to resume from")
    return checkpoint


def find_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint whose trainer state, the last file that is written, can be read."""
    skipped: list[str] = []
    folder = local_path(output_dir, "output_dir")
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    numbered = {path: int(step) for path, step in steps.items() if step.isdecimal()}
    for checkpoint in sorted(numbered, key=numbered.__getitem__, reverse=True):
        try:
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            skipped.append(checkpoint.name)
            continue
        if skipped:
            warnings.warn(
                f"{output_dir}: {', '.join(skipped)} incomplete, resuming from {checkpoint.name}",
                stacklevel=3,
            )
        return str(checkpoint)
    return None
