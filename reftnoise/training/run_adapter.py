"""The adapter of a run, and what the run's recipe says of its base; without torch, if possible."""

from pathlib import Path
from typing import Any

from .._util import yaml
from .._util.files import local_path
from ..adapters.location import ADAPTER, CONFIG_NAME, WEIGHTS_NAME, local_directory
from ..adapters.snapshot import read_snapshot
from ..config.base_model import EMBEDDED, base_path
from .run_files import RECIPE

_OF_BASE = ("model", "revision", "dtype", "quantization")
"""A recipe's fields about its base."""


def adapter_directory(adapter: str | Path) -> Path:
    """The adapter's own directory: `adapter` in a run's, or what is downloaded from the hub."""
    directory = local_directory(adapter, [CONFIG_NAME, WEIGHTS_NAME])
    if not (directory / CONFIG_NAME).is_file():
        if (directory / RECIPE).is_file():
            raise FileNotFoundError(f"{adapter}: an unfinished run, which has no adapter yet")
        raise FileNotFoundError(f"{adapter}: no {CONFIG_NAME} in it, nor in a folder 'adapter'")
    return directory


def base_of(directory: Path) -> dict[str, Any]:
    """Arguments of `load_base` for the base of an adapter directory: `model`, and others if known.

    The recipe of its run has more of them than the adapter.

    Raises:
        FileNotFoundError: the base was loaded from a path, and is not there any more.
    """
    values = recipe_of(directory)
    if isinstance(values.get("model"), str):
        known = {name: values[name] for name in _OF_BASE if values.get(name) is not None}
    else:
        base = read_snapshot(directory).description["base_model"]
        known = {"model": str(base.get("name_or_path") or "")}
    return known | {"model": _located(known["model"], directory)}


def _located(model: str, directory: Path) -> str:
    """Where the base of an adapter directory is: at its path, or else under its name."""
    path = read_snapshot(directory).description["base_model"].get("path")
    if path is not None and Path(path).exists():
        return str(path)
    if path is None or model in ("", EMBEDDED) or base_path(model) is not None:
        return model
    raise FileNotFoundError(
        f"{model}, the adapter's base: was loaded from {path}, which is not here; name its "
        "directory with --model"
    )


def template_of(adapter: str | Path) -> str | None:
    """The template of a run's recipe; None for an adapter without a recipe."""
    data = recipe_of(local_path(adapter, "adapter") / ADAPTER).get("data")
    return data.get("template") if isinstance(data, dict) else None


def recipe_of(directory: Path) -> dict[str, Any]:
    """The recipe of the run that an adapter directory belongs to; empty if there is none."""
    recipe = directory.parent / RECIPE
    if directory.name != ADAPTER or not recipe.is_file():
        return {}
    values = yaml.load(recipe.read_text(encoding="utf-8"))
    return values if isinstance(values, dict) else {}
