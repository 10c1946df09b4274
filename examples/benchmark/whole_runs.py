"""Whole training runs, from a loaded base to a saved adapter: `reftnoise train`, a bare loop."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup, set_seed
from workload import Workload

import reftnoise as rn
from reftnoise.engine.base.loading import load_base
from reftnoise.training.recipe import DataConfig, Recipe, TrainingConfig
from reftnoise.training.resolved_run import ResolvedRun
from reftnoise.training.run import run_recipe

_STEPS = 20
_RATE = 1e-3

LOAD = "load"
"""Loads the base, which every run does first: its time is subtracted from theirs."""


class Rows:
    """Texts for some steps, in a file.

    Args:
        work: a workload that names a model with a tokenizer.
        folder: directory for the file, and for what the runs write.
    """

    def __init__(self, work: Workload, folder: Path) -> None:
        if work.model is None:
            raise ValueError("runs: expected work.model, a model with a tokenizer")
        self.work, self.model = work, work.model
        self.folder, self.file = folder, folder / "train.jsonl"
        draws, words = random.Random(0), _words(load_base(self.model)[1])
        rows = [
            {
                "prompt": "".join(draws.choices(words, k=work.prompt)),
                "completion": "".join(draws.choices(words, k=work.completion)),
            }
            for _ in range(_STEPS * work.batch_size)
        ]
        self.file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.prompts = [row["prompt"] for row in rows]
        self.completions = [row["completion"] for row in rows]

    @property
    def units(self) -> list[dict[str, Any]]:
        """LoReFT at the workload's positions."""
        work = self.work
        return [
            {
                "layer": work.edited,
                "intervention": "loreft",
                "low_rank_dimension": work.rank,
                "positions": work.positions,
                "tied": work.tied,
            }
        ]


def _words(tokenizer: Any) -> list[str]:
    """Texts of one token each, also side by side, as words with a space before them are."""
    texts = (tokenizer.decode([token]) for token in range(len(tokenizer)))
    return [text for text in texts if text[0:1] == " " and text[1:].isalpha() and text.isascii()]


def load(rows: Rows) -> Callable[[], Any]:
    """The base alone."""
    return lambda: load_base(rows.model, dtype=rows.work.dtype, device=rows.work.device)


def bare(rows: Rows) -> Callable[[], Any]:
    """A loop over batches: loss, gradients, clipping, AdamW, schedule; then a save."""
    work = rows.work

    def run() -> None:
        base, tokenizer = load_base(rows.model, dtype=work.dtype, device=work.device)
        set_seed(0)
        reft_model = rn.get_reft_model(base, rn.ReftConfig(rows.units)).train()
        data = rn.make_last_position_supervised_data_module(
            tokenizer, reft_model, rows.prompts, rows.completions
        )
        trained = [p for p in reft_model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=_RATE, weight_decay=0.0)
        schedule = get_linear_schedule_with_warmup(optimizer, 0, _STEPS)
        batches = DataLoader(
            data["train_dataset"], work.batch_size, shuffle=True, collate_fn=data["data_collator"]
        )
        for batch in batches:
            inputs = {name: values.to(work.device) for name, values in batch.items()}
            reft_model(**inputs, return_logits=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        reft_model.eval().save_pretrained(rows.folder / "bare")

    return run


def train(rows: Rows) -> Callable[[], Any]:
    """What `reftnoise train` runs, without its progress bar."""
    work = rows.work
    recipe = Recipe(
        model=rows.model,
        dtype=work.dtype,
        device=work.device,
        representations=rows.units,
        data=DataConfig(train=str(rows.file)),
        training=TrainingConfig(
            learning_rate=_RATE,
            num_train_epochs=1,
            per_device_train_batch_size=work.batch_size,
        ),
        output_dir=str(rows.folder / "run"),
    )

    def run() -> None:
        shutil.rmtree(recipe.output_dir, ignore_errors=True)
        run_recipe(ResolvedRun(recipe))

    return run


RUNS: dict[str, Callable[[Rows], Callable[[], Any]]] = {
    run.__name__: run for run in (load, bare, train)
}
