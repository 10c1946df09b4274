"""A vector at one layer, trained by RePS, BiPO, DPO or SFT, or fitted by DiffMean, at equal KL.

    python examples/papers/preference_vectors.py --model smollm2 --layer 15 --pairs "[TRAIT.jsonl]"

Half of the pairs of a file train or fit each vector, a quarter chooses its strength, and a quarter
tests it, as in `reftnoise steer`: the strength is the one with the largest shift of P(matching)
whose KL to the base, on the base's own answers to neutral prompts, is within the budget. The
table has the shift and the KL on what nothing was chosen by, with intervals of the bootstrap over
seeds and questions.

Papers: RePS (arXiv:2505.20809), BiPO (arXiv:2406.00045), persona (arXiv:2212.09251).
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import TrainingArguments, set_seed

import reftnoise as rn
from reftnoise.analysis.steering.fit import set_vector
from reftnoise.analysis.steering.options import SteerOptions
from reftnoise.analysis.steering.pairs import Contrast, read_pairs, split_pairs
from reftnoise.analysis.steering.search import neutral_pairs, tokenized_pairs
from reftnoise.analysis.steering.states import ReadTokens, read_states
from reftnoise.analysis.steering.sweep import Candidate, NeutralPrompts, Questions, sweep
from reftnoise.data.encoding import Example
from reftnoise.training.preference.data import PairCollator
from reftnoise.training.study.statistics import mean_interval

SIZES = [0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.75, 1.0]
"""‖edit‖ / ‖h‖ that are tried."""


def main(
    model: str,
    pairs: list[str],
    layer: int,
    methods: list[str] | None = None,
    rates: dict[str, float] | None = None,
    epochs: float = 5.0,
    batch_size: int = 8,
    limit: int | None = None,
    budgets: list[float] | None = None,
    positions: str = "all+decode",
    seeds: int = 3,
    dtype: str = "auto",
    output: str | None = None,
) -> None:
    """Train, choose strengths, test, and print a table.

    Args:
        model: name or directory of the base.
        pairs: files of questions with a matching and another answer.
        layer: layer of the vector.
        methods: mean, sft, reps, bipo, dpo.
        rates: learning rate of each trained method; by default 0.01, and 0.08 for RePS.
        epochs: passes over the pairs.
        batch_size: pairs per step.
        limit: number of pairs of each file.
        budgets: greatest KL, in nats per token; a row of the table for each.
        positions: tokens that are edited.
        seeds: number of seeds of the training and of the split.
        dtype: dtype of the base.
        output: JSON file for all numbers.
    """
    base, tokenizer = rn.load_base(model, dtype=dtype)
    rates = {"reps": 0.08} | (rates or {})
    results: list[dict[str, Any]] = []
    for path in pairs:
        contrasts = tokenized_pairs(tokenizer, read_pairs(path))
        options = SteerOptions(layers=layer, positions=positions, limit=limit)
        for seed in range(seeds):
            split = split_pairs(contrasts, limit=limit, seed=seed)
            trial = Trial(base, tokenizer, split, options, layer)
            for method in methods or ["mean", "sft", "reps", "bipo", "dpo"]:
                set_seed(seed)
                rate = rates.get(method, 0.01)
                vector = trial.vector(method, rate=rate, epochs=epochs, batch_size=batch_size)
                for budget in budgets or [0.1, 0.3]:
                    row = {"trait": Path(path).stem, "method": method, "budget": budget}
                    results.append(row | {"seed": seed} | trial.tested(method, vector, budget))
                    print(json.dumps({n: v for n, v in results[-1].items() if n != "shifts"}))
    if output is not None:
        Path(output).write_text(json.dumps(results, indent=1), encoding="utf-8")
    print_table(results)


class Trial:
    """One split of the pairs, on which vectors of all methods are made and measured."""

    def __init__(
        self,
        base: Any,
        tokenizer: Any,
        split: dict[str, list[Contrast]],
        options: SteerOptions,
        layer: int,
    ) -> None:
        self.base, self.tokenizer, self.layer, self.fit = base, tokenizer, layer, split["fit"]
        self.place = {"layer": layer, "positions": options.positions}
        config = rn.ReftConfig([self.place | {"intervention": "addition"}])
        self.steered = rn.get_reft_model(base, config).eval()
        [self.unit] = self.steered.engine.units
        rows = [
            ReadTokens(pair.prompt + part, [False] * len(pair.prompt) + [True] * len(part))
            for parts in ([(p, p.matching) for p in self.fit], [(p, p.other) for p in self.fit])
            for pair, part in parts
        ]
        self.states = read_states(self.steered, rows, [self.unit], batch_size=32)[self.unit.key]
        neutral = neutral_pairs(self.steered, tokenizer, options)
        asked: Any = {"positions": None, "rows": options.batch_size}
        self.questions = [Questions(self.steered, split[n], **asked) for n in ("choose", "test")]
        self.neutral = [NeutralPrompts(self.steered, neutral[i::2], **asked) for i in (0, 1)]

    def vector(self, method: str, *, rate: float, epochs: float, batch_size: int) -> Tensor:
        """The vector of a method."""
        if method == "mean":
            count = len(self.fit)
            return (self.states.means[:count] - self.states.means[count:]).mean(0).float()
        config = rn.ReftConfig([self.place | {"intervention": "bias"}])
        reft_model = rn.get_reft_model(self.base, config)
        pairs = [
            {
                "chosen": Example(pair.prompt, pair.matching, False, False).features(),
                "rejected": Example(pair.prompt, pair.other, False, False).features(),
            }
            for pair in self.fit
        ]
        collator = rn.ReftDataCollator(self.tokenizer, position_ids=True)
        with tempfile.TemporaryDirectory() as scratch:
            args = TrainingArguments(
                scratch,
                learning_rate=rate,
                num_train_epochs=epochs,
                per_device_train_batch_size=batch_size,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                logging_strategy="no",
            )
            trainer: rn.ReftTrainer
            if method == "sft":
                chosen: Any = [pair["chosen"] for pair in pairs]
                trainer = rn.ReftTrainer(
                    reft_model, args, train_dataset=chosen, data_collator=collator
                )
            else:
                objective: Any = method
                trainer = rn.ReftPreferenceTrainer(
                    reft_model,
                    args,
                    objective=objective,
                    train_dataset=pairs,
                    data_collator=PairCollator(collator),
                )
            trainer.train()
        return next(reft_model.interventions.parameters()).detach().float()

    def tested(self, method: str, vector: Tensor, budget: float) -> dict[str, Any]:
        """Shift and KL of the strength that the questions to choose by prefer."""
        set_vector(self.unit, vector)
        ratio = float(vector.norm() / self.states.norms.mean())
        kind: Any = method
        candidate = Candidate(kind, self.layer, ratio, tuple(size / ratio for size in SIZES))
        self.steered.adapters.derive(candidate.name, "default", layers=[self.layer])
        chosen = sweep([candidate], self.questions[0], self.neutral[0], budget=budget).chosen
        choice = {candidate.name: chosen[1]}
        before, after = self.questions[1].matching([None, choice])
        [kl] = self.neutral[1].divergence([choice])
        return {
            "size": chosen[1] * ratio,
            "base": float(before.mean()),
            "shift": float((after - before).mean()),
            "kl": float(kl.mean()),
            "shifts": (after - before).tolist(),
        }


def print_table(results: Sequence[dict[str, Any]]) -> None:
    """Shift and KL of each trait, budget and method, over seeds."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("trait", "KL ≤", "method", "‖edit‖ / ‖h‖", "KL", "shift (95 %)"):
        table.add_column(name)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results:
        groups.setdefault((row["trait"], row["budget"], row["method"]), []).append(row)
    for (trait, budget, method), rows in sorted(groups.items()):
        least = min(len(row["shifts"]) for row in rows)
        shifts = torch.tensor([row["shifts"][:least] for row in rows]).numpy()
        mean, low, high = mean_interval(shifts)
        size, kl = (sum(row[n] for row in rows) / len(rows) for n in ("size", "kl"))
        shift = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
        table.add_row(trait, str(budget), method, f"{size:.2f}", f"{kl:.3f}", shift)
    Console(highlight=False).print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
