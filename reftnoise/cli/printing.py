"""How commands print: progress on stderr, results on stdout."""

from typing import TYPE_CHECKING, Any

from .._util.files import json_text
from .._util.numbers import significant

if TYPE_CHECKING:
    from rich.console import Console


def progress_console(is_silent: bool) -> "Console | None":
    """Progress goes to stderr, so that stdout holds results alone."""
    if is_silent:
        return None
    from rich.console import Console

    return Console(stderr=True)


def print_run(summary: dict[str, Any], entries: list[Any], directory: str) -> None:
    """Print what was trained, its scores, and what to do next."""
    from ..training.run_scores import print_scores

    parameters = summary["parameters"]
    trained = parameters["units"] + parameters["base"]
    print_wrapped(
        f"Trained {trained:,} parameters, {trained / parameters['total']:.2%} of the base's, in "
        f"{summary['steps']} steps and {summary['seconds']:.0f} s; "
        f"mean loss {significant(summary['train_loss'])}"
    )
    print_scores(entries)
    print(f"The adapter is in {directory}/adapter. Next:")
    for command in (f"eval {directory} --base", f"chat {directory}", f"report {directory}"):
        print(f"  reftnoise {command}")


def print_wrapped(text: str) -> None:
    """Print a text in lines as wide as the terminal, or of 80 columns where there is none."""
    from rich.console import Console
    from rich.text import Text

    Console(highlight=False).print(Text(text))


def print_json(value: Any) -> None:
    """Print one JSON value, indented, as the only thing on stdout."""
    print(json_text(value, indent=2))
