"""A recipe: all settings of one training run and its evaluation, as dataclasses ↔ YAML.

The command line is made from these classes, so nothing heavy is imported here.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .._util import yaml
from ..config.decoding import Way


@dataclass(kw_only=True)
class DataConfig:
    """Examples to train on. A recipe's task makes a prompt and a completion of each row.

    Args:
        train: JSONL, JSON, CSV, TSV or Parquet file, name of a hub dataset, or tiny-chat, the
            embedded dataset.
        train_split: split of train, or a slice of one, such as train[:-1000].
        eval: file or dataset, as for train, whose loss is measured during training.
        eval_split: split of eval, or a slice of one.
        subset: name of a subset, for hub datasets that have several.
        columns: columns of the data by the names that the task reads, such as {prompt: question}.
        template: text around each prompt: plain (none), chat (the tokenizer's chat template),
            alpaca, or a text with {prompt} and columns in braces.
        max_length: greatest number of tokens of an example, by default what tokenizer and model
            allow; longer examples lose the beginning of their prompts.
        streaming: whether rows are read as they are needed, for data larger than memory; training
            then needs max_steps.
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
    """Settings of transformers' Trainer by its own names; the optimizer is AdamW by default.

    Args:
        learning_rate: greatest learning rate.
        num_train_epochs: number of passes over the data.
        max_steps: number of optimizer steps; if positive, it replaces the number of epochs.
        per_device_train_batch_size: number of examples per device and forward pass.
        gradient_accumulation_steps: number of forward passes per step.
        lr_scheduler_type: schedule of the learning rate after its warm-up.
        warmup_steps: number of steps in which the learning rate rises; below 1, a share of all
            steps.
        weight_decay: weight decay of AdamW.
        adam_beta2: beta 2 of AdamW.
        max_grad_norm: norm to which larger gradients are clipped.
        bf16: whether forward passes autocast to bfloat16.
        group_by_length: whether examples of similar length share batches, to save padding.
        logging_steps: number of steps between two lines of the log.
        eval_steps: number of steps between two measurements of the loss on data.eval; by default
            one epoch.
        save_steps: number of steps between two checkpoints, from which `resume` continues; by
            default there are none.
        prefix_cache: place for prompts' keys and values from epoch to epoch: none, memory or disk.
        arguments: further arguments of transformers.TrainingArguments, which override the others.
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
    """The rows that a trained adapter is scored on, by the recipe's task.

    Args:
        data: file or dataset, as for data.train; without it, no rows are scored.
        split: split of data, or a slice of one, such as test[:200].
        subset: name of a subset, for hub datasets that have several.
        by: way to answer: generation (text, greedy unless the task says otherwise), likelihood
            (the most probable of the task's choices), or loss (none: how probable the right
            answers are, in nats per token); by default the task's own, which is generation but for
            raw_text (loss) and preference (likelihood).
        batch_size: number of prompts per forward pass.
        max_new_tokens: greatest number of tokens of an answer; by default what the task needs.
        lm_eval: names of tasks of lm-evaluation-harness, which are run, too, or alone.
        forgetting: whether loss and KL to the base are measured on neutral prompts and texts of the
            library; or a file of JSON lines with others, each a text, or a prompt, perhaps with a
            completion.
        limit: greatest number of rows, from the first on; also of each task of the harness.
    """

    data: str | None = None
    split: str = "test"
    subset: str | None = None
    by: Way | None = None
    batch_size: int = 16
    max_new_tokens: int | None = None
    lm_eval: list[str] = field(default_factory=list)
    forgetting: bool | str = False
    limit: int | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether there is anything to score."""
        return self.data is not None or bool(self.lm_eval) or self.forgetting is not False


@dataclass(kw_only=True)
class Recipe:
    """A base model, the units and modules that are trained, the data, and the task.

    Args:
        model: directory, GGUF file or hub name of the base model; tiny-chat, the embedded model; or
            smollm2 or minilm, which packages carry.
        revision: branch, tag or commit of a model on the hub.
        dtype: dtype of the base: float32, bfloat16, float16, or auto, in which the weights are
            stored, but float32 on a processor that has no arithmetic of that.
        device: cpu, cuda or another device of torch; auto is a GPU where there is one.
        quantization: quantization_config of transformers for the base, such as {quant_method:
            bitsandbytes, load_in_4bit: true}.
        representations: list of units, as in ReftConfig. If peft and modules_to_save are empty too,
            LoReFT of rank 4 at all layers: at the prompt's last token, or at all tokens for a
            classifier and raw_text. For preference, a bias at all layers and tokens.
        peft: method of PEFT under the units, as in ReftConfig.
        modules_to_save: modules of the base that are trained, as in ReftConfig.
        task: name of the task that reads the rows, or {name: …} with its arguments.
        data: examples to train on.
        training: settings of the Trainer.
        evaluation: rows to score after training.
        seed: seed of all random draws.
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
        """The text of a file that gives this recipe again."""
        return yaml.dump(asdict(self))
