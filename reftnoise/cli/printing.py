"""What `train` prints when it is done."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from ..training.recipe import Recipe
from ..training.run_scores import Entry, print_scores


def print_run(recipe: Recipe, summary: dict[str, Any], entries: Sequence[Entry]) -> None:
    """Print what was trained, its scores, and what to do next."""
    console, parameters = Console(highlight=False), summary["parameters"]
    trained = parameters["units"] + parameters["base"]
    console.print(
        f"Trained {trained:,} parameters, {trained / parameters['total']:.2%} of the base's, in "
        f"{summary['steps']} steps and {summary['seconds']:.0f} s; "
        f"mean loss {summary['train_loss']:.3f}"
    )
    print_scores(entries, console)
    place = recipe.output_dir
    console.print(f"The adapter is in {place}/adapter. Next:", markup=False, soft_wrap=True)
    for command in (f"eval {place} --base", f"chat {place}", f"report {place}"):
        console.print(f"  reftnoise {command}", markup=False, soft_wrap=True)
