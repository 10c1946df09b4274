"""What the adapters of noise_on_smollm2.yaml write, and how sharply their loss bends.

    python examples/studies/noise_on_smollm2.py noise_on_smollm2

The argument is the study's directory. For each method and noise, the run with the α that the
study's report chooses is loaded. The table has words, repetition and distinctness of its greedy
answers to held-out instructions, and the trace of the Hessian of its loss in the embeddings,
without noise, on held-out rows.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from reftnoise._util.options import read_file
from reftnoise.analysis.curvature import embedding_hessian_trace
from reftnoise.analysis.report.files import read_study
from reftnoise.data.sources import load_rows
from reftnoise.evaluation import evaluate
from reftnoise.training.resolved_run import ResolvedRun
from reftnoise.training.run import data_module_of, load_trained
from reftnoise.training.run_files import CELLS, STUDY
from reftnoise.training.study.grid import Cell, Study, cells
from reftnoise.training.study.statistics import mean_interval

ANSWERS = 24
"""Instructions that are answered."""
TOKENS = 128
"""Greatest number of tokens of an answer."""
TRACED = 12
"""Rows whose traces are averaged."""
DRAWS = 4
"""Estimates of each row's trace."""


def chosen(directory: Path) -> Iterator[Cell]:
    """The cells that the study's report shows."""
    shown: list[dict[str, str | None]] = [
        {**combination.axes, "alpha": combination.selected}
        for combination in read_study(directory).combinations
    ]
    for cell in cells(read_file(Study, directory / STUDY)):
        if {axis: level for axis, level in cell.levels.items() if axis != "seed"} in shown:
            yield cell


def measured(run: ResolvedRun) -> dict[str, Any]:
    """The columns of a run's row."""
    model, tokenizer = load_trained(run)
    rows, template = run.scored_rows, run.recipe.data.template
    written = evaluate(
        model,
        tokenizer,
        run.task,
        rows[-ANSWERS:],
        by="generation",
        batch_size=ANSWERS,
        template=template,
        max_new_tokens=TOKENS,
    )
    held_out = load_rows(run.recipe.evaluation.data, split=run.recipe.evaluation.split)
    data = data_module_of(run, tokenizer, model, held_out.take(TRACED))
    batches = [data["data_collator"]([row]) for row in data["train_dataset"]]
    traces = embedding_hessian_trace(model.float(), batches, draws=DRAWS).mean(1)
    names = ("words", "repetition", "distinct")
    return {name: written.scores[name] for name in names} | {
        "trace": mean_interval(np.array([traces.tolist()]))
    }


def main(directory: Path) -> None:
    """Print a row for each method and noise."""
    line = "{:8} {:9} {:>3} {:>6} {:>11} {:>9}  {}".format
    print(line("method", "noise", "α", "words", "repetition", "distinct", "trace, 95 % interval"))
    for cell in chosen(directory):
        recipe = replace(cell.recipe, output_dir=str(directory / CELLS / cell.name))
        row = measured(ResolvedRun(recipe))
        levels = [cell.levels[axis] for axis in ("method", "noise", "alpha")]
        numbers = [f"{row['words']:.1f}", f"{row['repetition']:.3f}", f"{row['distinct']:.3f}"]
        trace = row["trace"]
        print(line(*levels, *numbers, f"{trace.mean:.4g} ({trace.low:.4g} to {trace.high:.4g})"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: noise_on_smollm2.py STUDY")
    main(Path(sys.argv[1]))
