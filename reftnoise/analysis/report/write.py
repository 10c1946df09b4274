"""Write the report of a run or a study."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..._util.files import local_path, replace_all
from ...training.recipe import Recipe
from ...training.run_files import is_study
from .figures import draw_heads, draw_overlaps, draw_steering, draw_tokens, picture
from .files import read_run, read_study
from .page import Section, Table, Tokens, markdown, pictures, render
from .run import run_sections
from .study import study_page


def write_report(
    directory: str | Path,
    *,
    against: str | Path | None = None,
    prompts: Sequence[str] | None = None,
    output_dir: str | Path | None = None,
) -> Path:
    """Write `report.html` and its pictures as PNG files; of a study, also `results.md`.

    The page holds its style and pictures itself, has no scripts and loads nothing.

    Args:
        directory: directory of a run or a study; its files show which.
        against: another run, or an adapter, whose subspaces are compared with this run's.
        prompts: texts that base and adapted model continue side by side; edits and logit lens are
            those of the first. By default rows of the run's last evaluation.
        output_dir: directory for the files, by default `directory`.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: the directory is neither a run's nor a study's.
        ValueError: a file cannot be read, or an adapter does not fit its base.
    """
    directory = local_path(directory, "directory")
    if is_study(directory, against=against, prompts=prompts):
        return write_study_report(directory, output_dir=output_dir)[0]
    run = read_run(directory)
    other = None if against is None else local_path(against, "against")
    sections = run_sections(run, against=other, prompts=prompts)
    title = f"Run {directory.resolve().name}"
    output = directory if output_dir is None else output_dir
    return _write(output, title, _units(run.recipe), sections, {})


def write_study_report(
    directory: str | Path, *, output_dir: str | Path | None = None
) -> tuple[Path, Table]:
    """Write the report of a study; the path of its page, and the table of its results."""
    directory = local_path(directory, "directory")
    study = read_study(directory)
    sections, table, text = study_page(study)
    title = f"Study {directory.resolve().name}"
    subtitle = f"{len(study.combinations)} combinations of {', '.join(study.axes)}"
    results = {"results.md": f"{markdown(table)}\n{text}\n".encode()}
    output = directory if output_dir is None else output_dir
    return _write(output, title, subtitle, sections, results), table


def write_page(
    directory: Path,
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    table: Table,
    text: str,
) -> Path:
    """Write a page, and its table with an explanation as `results.md`; the page's path."""
    results = {"results.md": f"{markdown(table)}\n{text}\n".encode()}
    return _write(directory, title, subtitle, sections, results)


def write_overlaps(
    output: str | Path, names: Sequence[str], overlaps: Float[Tensor, "n n"]
) -> None:
    """Write a matrix of overlaps as a PNG file.

    Raises:
        ValueError: the file's name has another ending.
    """
    path = local_path(output, "output")
    if path.suffix.lower() != ".png":
        raise ValueError(f"output {str(output)!r}: expected a PNG file, such as overlaps.png")
    about = f"How alike the subspaces are that {', '.join(names)} edit"
    drawn = picture(path.stem, about, draw_overlaps, names, overlaps.numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_all(path.parent, {path.name: drawn.light})


def write_heads(
    output: str | Path, norms: Float[Tensor, "layers heads"], entries: Sequence[Mapping[str, Any]]
) -> None:
    """Write a PNG file of layers × heads: how much each head is scaled, and which are chosen.

    Args:
        output: the file.
        norms: what `analysis.heads.head_norms` returns.
        entries: what `analysis.heads.select_heads` returns, of this stack.
    """
    path = local_path(output, "output")
    chosen = [(row, column) for e in entries for row in e["layer"] for column in e["heads"]]
    about = f"How much {norms.shape[0]} layers scale their heads, of which {len(chosen)} are chosen"
    drawn = picture(path.stem, about, draw_heads, norms.numpy(), chosen)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_all(path.parent, {path.name: drawn.light})


def write_steering(directory: str | Path, results: Mapping[str, Any]) -> None:
    """Write `steering.png`: the shift of all vectors, and what the chosen one costs.

    Args:
        directory: directory that gets the file.
        results: what `analysis.steering.search.search` returns.
    """
    chosen = results["chosen"]
    about = f"Shift by layer, and against KL for {chosen['method']} at layer {chosen['layer']}"
    drawn = picture("steering", about, draw_steering, results)
    replace_all(local_path(directory, "output_dir"), {"steering.png": drawn.light})


def write_detection(
    directory: str | Path,
    title: str,
    texts: Sequence[tuple[Sequence[str], Sequence[float]]],
    *,
    skip: int = 0,
    name: str = "detection",
) -> Path:
    """Write `detection.html` and `detection.png`: texts whose tokens are coloured by activation.

    Args:
        directory: directory that gets the files.
        title: heading of the page.
        texts: tokens of each text, and their activations.
        skip: number of tokens at the beginning of each text that stay without a colour.
        name: name of the two files.

    Returns:
        The path of the page.
    """
    counted = [value for _, values in texts for value in values[skip:]]
    least, most = min(counted), max(counted)
    span = most - least or 1.0
    coloured = [
        [
            (token, (value - least) / span if index >= skip else 0.0, f"{value:.3g}")
            for index, (token, value) in enumerate(zip(tokens, values, strict=True))
        ]
        for tokens, values in texts
    ]
    sections = [
        Section(f"Text {number}, largest activation {max(values[skip:]):.3g}", [Tokens(pieces)])
        for number, ((_, values), pieces) in enumerate(zip(texts, coloured, strict=True), start=1)
    ]
    low, high = (f"{value:.3g}".replace("-", "−") for value in (least, most))
    subtitle = f"Colours from {low} (none) to {high}; a pointer shows a token's activation."
    drawn = picture(name, title, draw_tokens, coloured)
    page = render(title, subtitle, sections).encode()
    place = local_path(directory, "directory")
    place.mkdir(parents=True, exist_ok=True)
    replace_all(place, {f"{name}.html": page, f"{name}.png": drawn.light})
    return place / f"{name}.html"


def _write(
    output: str | Path,
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    files: Mapping[str, bytes],
) -> Path:
    pngs = {f"{drawn.name}.png": drawn.light for drawn in pictures(sections)}
    page = {"report.html": render(title, subtitle, sections).encode()}
    directory = local_path(output, "output_dir")
    directory.mkdir(parents=True, exist_ok=True)
    replace_all(directory, {**files, **page, **pngs})
    return directory / "report.html"


def _units(recipe: Recipe) -> str:
    """What was trained, and on which base."""
    names = [str(entry["intervention"]) for entry in recipe.representations]
    names += [str(recipe.peft["peft_type"])] if recipe.peft else []
    names += recipe.modules_to_save or []
    return f"{' + '.join(names)} on {recipe.model}"
