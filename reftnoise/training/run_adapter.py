"""The adapter of a run, and what the run's recipe says of its base; without torch, if possible."""

from pathlib import Path
from typing import Any

from .._util import yaml
from .._util.files import local_path
from ..adapters.location import CONFIG_NAME, WEIGHTS_NAME, local_directory
from ..adapters.snapshot import read_snapshot
from .run_files import ADAPTER, RECIPE

_OF_BASE = ("model", "revision", "dtype", "quantization")
"""A recipe's fields about its base."""


def adapter_directory(adapter: str | Path) -> Path:
    """The adapter's own directory: `adapter` in a run's, or what is downloaded from the hub."""
    path = local_path(adapter, "adapter")
    inside = path / ADAPTER
    if (inside / CONFIG_NAME).is_file():
        return inside
    if (path / RECIPE).is_file() and not (path / CONFIG_NAME).exists():
        raise FileNotFoundError(f"{adapter}: an unfinished run, which has no adapter yet")
    directory = local_directory(adapter, [CONFIG_NAME, WEIGHTS_NAME])
    if not (directory / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{adapter}: no {CONFIG_NAME} in it, nor in a folder 'adapter'")
    return directory


def base_of(directory: Path) -> dict[str, Any]:
    """Arguments of `load_base` for the base of an adapter directory: `model`, and others if known.

    The recipe of its run has more of them than the adapter, which keeps no paths.
    """
    values = recipe_of(directory)
    if isinstance(values.get("model"), str):
        return {name: values[name] for name in _OF_BASE if values.get(name) is not None}
    base = read_snapshot(directory).description["base_model"]
    return {"model": str(base.get("name_or_path") or "")}


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
