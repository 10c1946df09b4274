"""Sections → one HTML page that holds its style and pictures itself."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal, TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined

Style: TypeAlias = Literal["", "number", "changed", "up", "down", "text"]


@dataclass(frozen=True)
class Picture:
    """A picture for light and for dark pages: PNGs, `width` CSS pixels wide."""

    name: str  # of its file, without the ending
    about: str  # for readers who cannot see it
    light: bytes
    dark: bytes
    width: int

    @property
    def is_wide(self) -> bool:
        """Whether it is scrolled rather than shrunk on a narrow screen."""
        return self.width > 520


@dataclass(frozen=True)
class TableCell:
    """A cell of a table; its style is one of the page's classes."""

    text: str
    style: Style = ""

    @property
    def is_number(self) -> bool:
        """Whether it is aligned to the right."""
        return self.style in ("number", "up", "down")


@dataclass(frozen=True)
class Table:
    """A table; rows are as long as `columns`."""

    columns: list[str]
    rows: list[list[TableCell]]

    @property
    def is_texts(self) -> bool:
        """Whether a narrow screen shows the cells of a row one below the other."""
        return any(cell.style == "text" for row in self.rows for cell in row)


@dataclass(frozen=True)
class Folded:
    """The text of a file, shown on demand."""

    title: str
    text: str


@dataclass(frozen=True)
class Tokens:
    """A text whose tokens are coloured by values from 0 to 1, each with a note."""

    pieces: Sequence[tuple[str, float, str]]


Block: TypeAlias = str | dict[str, str] | Picture | Table | Folded | Tokens
"""A text is a paragraph of its own; names with values are shown large."""


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading."""

    title: str
    blocks: Sequence[Block] = ()


def number(text: str) -> TableCell:
    """A cell that is aligned to the right."""
    return TableCell(text, "number")


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page: no script, nothing loaded from elsewhere."""
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["kind"] = lambda block: type(block).__name__
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template("page.html").render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        style=(files(__package__) / "page.css").read_text(encoding="utf-8"),
    )


def pictures(sections: Sequence[Section]) -> list[Picture]:
    """All pictures of a page."""
    return [block for part in sections for block in part.blocks if isinstance(block, Picture)]


def markdown(table: Table) -> str:
    """The table as Markdown."""
    lines = [table.columns, *[[cell.text for cell in row] for row in table.rows]]
    escaped = [" | ".join(text.replace("|", "\\|") for text in line) for line in lines]
    rule = "|".join("---:" if cell.is_number else "---" for cell in table.rows[0])
    head, *rows = [f"| {line} |" for line in escaped]
    return "\n".join([head, f"|{rule}|", *rows]) + "\n"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def memory(count: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / 2**20:,.0f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"
