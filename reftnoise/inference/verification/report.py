"""What a comparison with a server shows on a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_SHOWN = 10
"""The number of differences that are shown."""


def print_verification(record: Mapping[str, Any], console: Console | None = None) -> None:
    """Print whether a server writes what the model here does, and where it first does not."""
    console = console or Console(highlight=False)
    count, differing = record["requests"], record["differing"]
    verdict = f"{differing} of {count} requests differ" if differing else f"{count} requests: equal"
    log_probs = (
        f"{record['compared_log_probs']:,} log-probabilities differ by at most "
        f"{record['largest_difference']:.2g} nats, where rounding explains {record['limit']:.2g} "
        f"and the adapter moves them by {record['largest_effect']:.2g}; "
    )
    console.print(
        f"{record['served_name']} at {record['server']}: {verdict}. "
        f"{log_probs if record['compared_log_probs'] else ''}"
        f"{record['compared_tokens']:,} tokens were compared, of which {record['near_ties']} are "
        "near-ties.",
        markup=False,
    )
    if differing:
        console.print(_table(record["differences"][:_SHOWN], record["limit"]))
    if differing > _SHOWN:
        console.print(f"{differing - _SHOWN} more are in --json.")
    for note in record["notes"]:
        console.print(f"Note: {note}.", markup=False)


def _table(differences: list[dict[str, Any]], limit: float) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("request", "prompt", "shared", "first at"):
        table.add_column(title, justify="right")
    table.add_column("token")
    for title in ("log p", "here", "by"):
        table.add_column(title, justify="right")
    table.add_column("likeliest here")
    for one in differences:
        place = "prompt" if one["is_prompt"] else "answer"
        at = one["position"] - (0 if one["is_prompt"] else one["prompt_length"])
        said, own = one["log_prob"], one["own_log_prob"]
        is_known = said is not None and not abs(said - own) <= limit  # NaN is not within
        table.add_row(
            f"{one['request']}{' (base)' if one['of_base'] else ''}",
            str(one["prompt_length"]),
            str(one["shared"]),
            f"{place} {at}",
            Text(repr(one["token_text"])),
            "" if said is None else f"{said:.3f}",
            f"{own:.3f}",
            f"{abs(said - own) if is_known else one['margin']:.2g}",
            Text(repr(one["own_token_text"])),
        )
    return table
