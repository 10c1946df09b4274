"""AxBench's detection of concepts: ReFT-r1, the difference of means, a probe, and PCA.

    python examples/papers/concept_detection.py --model smollm2 --data axbench --layers "[6, 12]"

The folder has `train.parquet` and `eval.parquet` of AxBench's concept10: texts that show a concept
(`output` after its instruction `input`), and others. Each method has a direction for each concept
and layer. A text's score is the largest activation of its tokens. On half of the texts of the
evaluation set, the layer with the largest mean area under the curve is chosen; the table has the
area on the other half, with intervals of the bootstrap over concepts and, within them, texts.

Paper: AxBench (arXiv:2501.17148), whose settings ReFT-r1 has here.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from transformers import TrainingArguments, set_seed

import reftnoise as rn
from reftnoise.analysis.detection.scores import auroc
from reftnoise.analysis.detection.token_states import beginning_of

METHODS = ("reftr1", "mean", "probe", "pca")
Scores = dict[tuple[str, int, int], torch.Tensor]
"""By method, layer and concept, the scores of the concept's texts."""


def main(
    model: str,
    data: str,
    layers: list[int],
    methods: list[str] | None = None,
    concepts: int = 10,
    texts: int | None = None,
    learning_rate: float = 1e-2,
    epochs: float = 3.0,
    batch_size: int = 6,
    dtype: str = "auto",
    seed: int = 0,
    output: str | None = None,
) -> None:
    """Train and fit the directions, score the evaluation texts, and print a table.

    Args:
        model: name or directory of the base.
        data: folder of the two files.
        layers: layers that are tried.
        methods: reftr1, mean, probe, pca.
        concepts: number of concepts, from the first on.
        texts: greatest number of training texts of each kind for a concept.
        learning_rate: of ReFT-r1.
        epochs: of ReFT-r1.
        batch_size: of ReFT-r1.
        dtype: dtype of the base.
        seed: of the training and of the halves.
        output: JSON file for all numbers.
    """
    base, tokenizer = rn.load_base(model, dtype=dtype)
    train, held_out = (
        datasets.load_dataset("parquet", data_files=str(Path(data) / f"{name}.parquet"))["train"]
        for name in ("train", "eval")
    )
    numbers = sorted({row["concept_id"] for row in train} - {-1})[:concepts]
    plain = [row for row in train if row["concept_id"] == -1]
    scores: Scores = {}
    labels: dict[int, list[bool]] = {}
    for number in numbers:
        shown = [row for row in train if row["concept_id"] == number][:texts]
        asked = [row for row in held_out if row["concept_id"] == number]
        labels[number] = [row["category"] == "positive" for row in asked]
        for method in methods or METHODS:
            set_seed(seed)
            if method == "reftr1":
                reft_model = trained(
                    base, tokenizer, layers, shown, learning_rate, epochs, batch_size
                )
            else:
                entry = {"layer": layers, "intervention": "addition"}
                reft_model = rn.get_reft_model(base, rn.ReftConfig([entry]))
                kind: Any = method
                rn.fit_concept_vectors(
                    reft_model,
                    tokenizer,
                    [whole(tokenizer, row) for row in shown],
                    [whole(tokenizer, row) for row in plain[:texts]],
                    method=kind,
                )
            asked_texts = [whole(tokenizer, row) for row in asked]
            detected = rn.detect(reft_model.eval(), tokenizer, asked_texts)
            for layer, detection in zip(layers, detected.values(), strict=True):
                scores[method, layer, number] = detection.scores[:, 0]
        areas = {
            f"{method} {layer}": round(auroc(values, labels[of]), 3)
            for (method, layer, of), values in scores.items()
            if of == number
        }
        print(json.dumps({"concept": number, "texts": len(asked), "auroc": areas}))
    rows = [chosen(name, layers, numbers, scores, labels, seed) for name in methods or METHODS]
    if output is not None:
        Path(output).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print_table(rows)


def whole(tokenizer: Any, row: dict[str, Any]) -> Any:
    """The instruction and the answer, as the model reads them."""
    if tokenizer.chat_template is None:
        return row["input"] + row["output"]
    return [
        {"role": "user", "content": row["input"]},
        {"role": "assistant", "content": row["output"]},
    ]


def trained(
    base: Any,
    tokenizer: Any,
    layers: Sequence[int],
    shown: Sequence[dict[str, Any]],
    learning_rate: float,
    epochs: float,
    batch_size: int,
) -> rn.ReftModel:
    """ReFT-r1 at each layer, trained by itself to write the texts that show a concept."""
    units, skip = [], beginning_of(tokenizer, [whole(tokenizer, row) for row in shown[:1]])
    for layer in layers:
        entry = {"layer": layer, "intervention": "reftr1", "skip": skip}
        reft_model = rn.get_reft_model(base, rn.ReftConfig([entry]))
        data = rn.make_last_position_supervised_data_module(
            tokenizer,
            reft_model,
            [row["input"] for row in shown],
            [row["output"] for row in shown],
            chat_template=tokenizer.chat_template is not None,
        )
        with tempfile.TemporaryDirectory() as scratch:
            args = TrainingArguments(
                scratch,
                learning_rate=learning_rate,
                num_train_epochs=epochs,
                per_device_train_batch_size=batch_size,
                max_grad_norm=1.0,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            )
            rn.ReftTrainer(reft_model, args, **data).train()
        units.append(reft_model.engine.units[0].unit)
    entry = {"layer": list(layers), "intervention": "reftr1", "skip": skip}
    joint = rn.get_reft_model(base, rn.ReftConfig([entry]))
    for placed, unit in zip(joint.engine.units, units, strict=True):
        placed.unit.load_state_dict(unit.state_dict())
    return joint


def chosen(
    method: str,
    layers: Sequence[int],
    numbers: Sequence[int],
    scores: Scores,
    labels: dict[int, list[bool]],
    seed: int,
) -> dict[str, Any]:
    """The layer that one half of the texts prefers, and the area on the other half."""
    halves = {number: halved(labels[number], seed) for number in numbers}

    def areas(layer: int, half: int) -> list[float]:
        return [
            auroc(
                scores[method, layer, number][halves[number][half]],
                np.array(labels[number])[halves[number][half]].tolist(),
            )
            for number in numbers
        ]

    layer = max(layers, key=lambda layer: float(np.mean(areas(layer, 0))))
    generator, draws = np.random.default_rng(seed), []
    for _ in range(1000):
        drawn = generator.choice(numbers, len(numbers))
        values = [resampled(scores[method, layer, n], labels[n], halves[n][1], generator)
                  for n in drawn]  # fmt: skip
        draws.append(np.mean(values))
    low, high = np.quantile(draws, [0.025, 0.975])
    each = areas(layer, 1)
    return {
        "method": method,
        "layer": layer,
        "auroc": float(np.mean(each)),
        "low": float(low),
        "high": float(high),
        "by_concept": dict(zip(map(str, numbers), each, strict=True)),
        "dev_by_layer": {str(layer): float(np.mean(areas(layer, 0))) for layer in layers},
    }


def halved(labels: Sequence[bool], seed: int) -> list[np.ndarray[Any, Any]]:
    """Indices of two halves of texts, with like shares of those that show the concept."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(~np.array(labels)[order], kind="stable")]
    return [order[::2], order[1::2]]


def resampled(
    scores: torch.Tensor,
    labels: Sequence[bool],
    half: np.ndarray[Any, Any],
    generator: np.random.Generator,
) -> float:
    """The area on texts of a half that are drawn with replacement, of each kind as many."""
    shows = np.array(labels)[half]
    drawn = np.concatenate([generator.choice(half[shows == kind], int((shows == kind).sum()))
                            for kind in (True, False)])  # fmt: skip
    return auroc(scores[drawn], np.array(labels)[drawn].tolist())


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """The area of each method at its layer."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("method", "layer", "AUROC (95 %)"):
        table.add_column(name)
    for row in rows:
        area = f"{row['auroc']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        table.add_row(row["method"], str(row["layer"]), area)
    Console(highlight=False).print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
