"""LoReFT on GLUE as the ReFT paper ran it (arXiv:2404.03592): rank 1, first tokens, all layers.

The classifier is trained with the edits. Half of the validation rows, or 1,000 of more than 5,000,
choose the best epoch of a run; the others are the test. The default run needs no download: a tiny
random RoBERTa, and made-up reviews.

    python examples/glue.py
    python examples/glue.py --task rte --model FacebookAI/roberta-base
    python examples/glue.py --task sst2 --model MODEL --train train.jsonl --validation dev.jsonl
"""

import json
import random
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import RobertaProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    PrinterCallback,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

import reftnoise as rn
from reftnoise.progress import RichProgressCallback
from reftnoise.tasks.glue import SUBSETS, Metric, score

CONSOLE = Console()


@dataclass(frozen=True)
class Settings:
    """The paper's settings for RoBERTa-base."""

    prefix: int
    learning_rate: float
    dropout: float
    warmup: float
    epochs: int


SETTINGS = {
    "mnli": Settings(1, 6e-4, 0.05, 0.06, 40),
    "sst2": Settings(3, 6e-4, 0.1, 0.1, 40),
    "mrpc": Settings(3, 3e-4, 0.05, 0.0, 40),
    "cola": Settings(3, 4e-4, 0.2, 0.005, 60),
    "qnli": Settings(11, 9e-4, 0.05, 0.1, 20),
    "qqp": Settings(11, 6e-4, 0.05, 0.0, 40),
    "rte": Settings(3, 9e-4, 0.05, 0.0, 60),
    "stsb": Settings(3, 6e-4, 0.05, 0.03, 60),
}


# -- data ------------------------------------------------------------------------------------------


def load_rows(
    task: str, train: str | None, validation: str | None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and validation rows, of JSONL files or, without them, of GLUE on the hub."""
    if (train is None) != (validation is None):
        raise SystemExit("--train and --validation go together")
    if train is not None:
        files = {"train": train, "validation": validation}
        loaded = datasets.load_dataset("json", data_files=files)
        return loaded["train"], loaded["validation"]
    loaded = datasets.load_dataset("nyu-mll/glue", task)
    return loaded["train"], loaded["validation_matched" if task == "mnli" else "validation"]


def made_up_reviews(folder: Path, rows: int = 256) -> tuple[str, str]:
    """JSONL files of training and validation rows in the form of SST-2."""
    draw = random.Random(0)
    adjectives = {
        1: ["witty", "moving", "fresh", "clever", "warm", "superb", "funny", "bold", "tender"],
        0: ["dull", "clumsy", "stale", "tedious", "cold", "awful", "bland", "lazy", "flat"],
    }
    paths = []
    for name in ("train", "validation"):
        lines = []
        for _ in range(rows):
            label = draw.randrange(2)
            noun = draw.choice(["film", "plot", "cast", "script", "ending", "music", "dialogue"])
            opening = draw.choice(["i thought that the", "in short , the", "they say its", "the"])
            first, second = draw.sample(adjectives[label], 2)
            sentence = f"{opening} {noun} is {first} and {second} ."
            lines.append(json.dumps({"sentence": sentence, "label": label}))
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(paths[0]), str(paths[1])


def tiny_roberta(texts: list[str]) -> tuple[Any, RobertaConfig]:
    """A tokenizer trained on the texts, and the config of a tiny model for it."""
    special: list[Any] = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(iter(texts), 2000, special_tokens=special, show_progress=False)
    learned.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = ["bos_token", "pad_token", "eos_token", "unk_token", "mask_token"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learned._tokenizer, **dict(zip(names, special, strict=True))
    )
    return tokenizer, RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=260,
        initializer_range=0.2,  # so that a random model tells tokens apart
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )


def encoded(
    rows: datasets.Dataset,
    tokenizer: Any,
    texts: tuple[str, ...],
    label: str,
    classes: list[Any] | None,
) -> datasets.Dataset:
    """Token ids and labels; without classes, labels are numbers to be predicted."""

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        tokens = tokenizer(*[row[text] for text in texts], truncation=True, max_length=256)
        value = float(row[label]) if classes is None else classes.index(row[label])
        return {**tokens, "labels": value}

    return rows.map(encode, remove_columns=rows.column_names)


# -- one run ---------------------------------------------------------------------------------------


def run(
    base: Any,
    tokenizer: Any,
    splits: dict[str, datasets.Dataset],
    settings: Settings,
    metric: Metric,
    *,
    rank: int,
    batch_size: int,
    seed: int,
) -> tuple[float, float]:
    """Train on one seed; the best epoch's score, and its score on the test rows."""
    loreft = {
        "layer": "all",
        "intervention": "loreft",
        "low_rank_dimension": rank,
        "positions": f"f{settings.prefix}",
        "dropout": settings.dropout,
    }
    model = rn.get_reft_model(base, rn.ReftConfig(representations=loreft))
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=settings.epochs,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=4 * batch_size,
            learning_rate=settings.learning_rate,
            warmup_steps=settings.warmup,
            weight_decay=0.0,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=True,
            logging_steps=20,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
        )
        trainer: Trainer = rn.ReftTrainerForSequenceClassification(
            model,
            args,
            train_dataset=splits["train"],
            eval_dataset=splits["selection"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda p: {"score": score(metric, p.predictions, p.label_ids)},
            callbacks=[RichProgressCallback(CONSOLE, f"seed {seed}")],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        test = trainer.evaluate(splits["test"], metric_key_prefix="test")
    return float(trainer.state.best_metric or 0.0), float(test["test_score"])


def main(
    task: Literal["mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"] = "sst2",
    model: str | None = None,
    train: str | None = None,
    validation: str | None = None,
    texts: tuple[str, ...] | None = None,
    label: str = "label",
    seeds: tuple[int, ...] = (42, 43, 44, 45, 46),
    rank: int = 1,
    batch_size: int = 32,
    epochs: int | None = None,
    learning_rate: float | None = None,
) -> list[float]:
    """Train with each seed and print the scores; returns those on the test rows.

    Args:
        task: one of GLUE's; it sets positions, metric and what else the paper chose for it.
        model: directory or hub name of an encoder; by default a tiny random one.
        train: JSONL file of training rows; by default GLUE's on the hub, or made-up ones for the
            tiny model.
        validation: JSONL file of validation rows.
        texts: columns of a row's one or two texts, if others than the task's.
        label: column of the label: a number or a name.
        seeds: one run each.
        rank: of the edits.
        batch_size: rows per step.
        epochs: instead of the paper's.
        learning_rate: instead of the paper's, of which the tiny model takes ten times.
    """
    subset, settings = SUBSETS[task], SETTINGS[task]
    texts = texts or subset.texts
    rate = settings.learning_rate * (10 if model is None else 1)  # what is random has further to go
    settings = replace(
        settings, epochs=epochs or settings.epochs, learning_rate=learning_rate or rate
    )
    with tempfile.TemporaryDirectory() as folder:
        if model is None and train is None:
            train, validation = made_up_reviews(Path(folder))
        training, held_out = load_rows(task, train, validation)
    classes = None
    if subset.metric != "pearson":
        classes = sorted(set(training[label]) | set(held_out[label]))
    config: Any = None
    if model is None:
        tokenizer, config = tiny_roberta([row[t] for row in training for t in texts])
    else:
        tokenizer = AutoTokenizer.from_pretrained(model)
    training, held_out = (
        encoded(rows, tokenizer, texts, label, classes) for rows in (training, held_out)
    )
    selected = 1000 if len(held_out) > 5000 else len(held_out) // 2
    table = Table("seed", "selection", "test", title=f"{task}: {subset.metric}")
    scores = []
    for seed in seeds:
        set_seed(seed)
        count = 1 if classes is None else len(classes)
        if model is None:
            config.num_labels = count
            base = RobertaForSequenceClassification(config)
        else:
            base = AutoModelForSequenceClassification.from_pretrained(
                model, num_labels=count, dtype=torch.float32
            )
        shuffled = held_out.shuffle(seed=seed)
        splits = {
            "train": training,
            "selection": shuffled.select(range(selected)),
            "test": shuffled.select(range(selected, len(shuffled))),
        }
        best, test = run(
            base,
            tokenizer,
            splits,
            settings,
            subset.metric,
            rank=rank,
            batch_size=batch_size,
            seed=seed,
        )
        table.add_row(str(seed), f"{best:.4f}", f"{test:.4f}")
        scores.append(test)
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    table.add_section()
    table.add_row("mean ± sd", "", f"{statistics.mean(scores):.4f} ± {spread:.4f}")
    CONSOLE.print(table)
    return scores


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
