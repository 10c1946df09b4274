"""A recipe: everything that one training run and its evaluation need, as dataclasses ↔ YAML.

The command line is made from these classes, so nothing heavy is imported here.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .._util import yaml

UNITS = (
    *("loreft", "noreft", "direft", "nodireft", "consreft", "lobireft", "bias", "addition"),
    *("adapter", "neftune", "gaussian", "bernoulli", "symnoise"),
)
"""The names of interventions, which are known here without torch."""


@dataclass(kw_only=True)
class DataConfig:
    """Examples to train on. A recipe's task makes a prompt and a completion of each row.

    Args:
        train: a JSONL, JSON, CSV or Parquet file, the name of a hub dataset, or tiny-chat, the
            embedded one.
        train_split: of it; also a slice of one, such as train[:-1000].
        eval: like train; rows whose loss is measured while training.
        eval_split: of eval.
        subset: of a hub dataset that has several.
        columns: what the task reads → the column where it stands, such as {prompt: question}.
        template: what is put around each prompt: plain (nothing), chat (the tokenizer's chat
            template), alpaca, or a text with {prompt} and the columns of a row in it.
        max_length: tokens of an example, by default what tokenizer and model allow; longer ones
            lose the beginning of their prompts.
        streaming: read rows as they are needed, for data larger than memory; needs max_steps.
    """

    train: str | None = None
    train_split: str = "train"
    eval: str | None = None
    eval_split: str = "train"
    subset: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    template: str = "plain"
    max_length: int | None = None
    streaming: bool = False


@dataclass(kw_only=True)
class TrainingConfig:
    """Settings of transformers' Trainer under its own names; AdamW unless `arguments` says else.

    Args:
        learning_rate: at its highest.
        num_train_epochs: passes over the data.
        max_steps: of the optimizer, instead of epochs, if positive.
        per_device_train_batch_size: examples per device and forward pass.
        gradient_accumulation_steps: forward passes per step.
        lr_scheduler_type: of the learning rate after its warm-up.
        warmup_steps: over which the learning rate rises; below 1, a share of all steps.
        weight_decay: of AdamW.
        adam_beta2: of AdamW.
        max_grad_norm: longer gradients are clipped.
        bf16: autocast to bfloat16.
        group_by_length: batches of examples of about equal length, which hold little padding.
        logging_steps: between two lines of the log.
        eval_steps: between two evaluations of the loss on data.eval; once an epoch by default.
        save_steps: between two checkpoints, from which `resume` continues; none by default.
        prefix_cache: keep prompts' keys and values from epoch to epoch: none, memory or disk.
        arguments: further arguments of transformers.TrainingArguments, which come last.
    """

    learning_rate: float = 1e-3
    num_train_epochs: float = 3.0
    max_steps: int = -1
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0.0
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    bf16: bool = False
    group_by_length: bool = False
    logging_steps: int = 10
    eval_steps: int | None = None
    save_steps: int | None = None
    prefix_cache: Literal["none", "memory", "disk"] = "none"
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class EvaluationConfig:
    """What a trained adapter is scored on, by the recipe's task.

    Args:
        data: like data.train; without it nothing is scored.
        split: of it; also a slice of one, such as test[:200].
        subset: of a hub dataset that has several.
        by: generation (the answer is read from greedily written text, or as the task says) or
            likelihood (the most probable of the task's choices).
        batch_size: prompts per forward pass.
        max_new_tokens: of an answer; by default as many as the task needs.
        lm_eval: tasks of lm-evaluation-harness to be run, too, or alone.
        limit: rows to be scored, from the first on; of tasks of the harness, rows of each.
    """

    data: str | None = None
    split: str = "test"
    subset: str | None = None
    by: Literal["generation", "likelihood"] = "generation"
    batch_size: int = 16
    max_new_tokens: int | None = None
    lm_eval: list[str] = field(default_factory=list)
    limit: int | None = None


@dataclass(kw_only=True)
class Recipe:
    """A base model, what is edited and trained of it, the data, and the task.

    Args:
        model: name or directory of the base model, or tiny-chat, the embedded one.
        revision: branch, tag or commit of a model on the hub.
        dtype: of the base: auto, float32, bfloat16 or float16.
        device: cpu, cuda, …; auto takes a GPU where there is one.
        quantization: of the base, as transformers' quantization_config: {quant_method:
            bitsandbytes, load_in_4bit: true}.
        representations: units, as in ReftConfig.
        peft: a method of PEFT under the units, as in ReftConfig.
        modules_to_save: modules of the base to be trained, as in ReftConfig.
        task: what rows mean: the name of a task, or {name: …} with its arguments beside it.
        data: examples to train on.
        training: settings of the Trainer.
        evaluation: what is scored afterwards.
        seed: of all random draws.
        output_dir: directory of the run.
    """

    model: str = "tiny-chat"
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    quantization: dict[str, Any] | None = None
    representations: list[dict[str, Any]] = field(default_factory=list)
    peft: dict[str, Any] | None = None
    modules_to_save: list[str] | None = None
    task: str | dict[str, Any] = "text"
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0
    output_dir: str = "reftnoise-run"

    def to_yaml(self) -> str:
        """What a file holds that gives this recipe again."""
        return yaml.dump(asdict(self))
