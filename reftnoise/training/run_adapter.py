"""The adapter of a run, and what the run's recipe says of its base; without torch, if possible."""

from pathlib import Path
from typing import Any

from .._util import yaml
from ..adapters.location import CONFIG_NAME, WEIGHTS_NAME, local_directory, read_description
from .run_files import ADAPTER, RECIPE

_OF_BASE = ("model", "revision", "dtype", "quantization")
"""What a recipe says of its base."""


def adapter_directory(adapter: str | Path) -> Path:
    """The adapter's own directory: a run has it as `adapter`; of a hub name, what is downloaded."""
    inside = Path(adapter) / ADAPTER
    if (inside / CONFIG_NAME).is_file():
        return inside
    if (Path(adapter) / RECIPE).is_file() and not (Path(adapter) / CONFIG_NAME).exists():
        raise FileNotFoundError(f"{adapter}: an unfinished run, which has no adapter yet")
    directory = local_directory(adapter, [CONFIG_NAME, WEIGHTS_NAME])
    if not (directory / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{adapter}: no {CONFIG_NAME} in it, nor in a folder 'adapter'")
    return directory


def base_of(directory: Path) -> dict[str, Any]:
    """`model`, and what else of `load_base`'s arguments is known, of an adapter directory's base.

    A recipe beside the directory knows more than the adapter, which keeps no paths.
    """
    values = recipe_beside(directory)
    if isinstance(values.get("model"), str):
        return {name: values[name] for name in _OF_BASE if values.get(name) is not None}
    return {"model": str(read_description(directory)["base_model"].get("name_or_path") or "")}


def template_of(adapter: str | Path) -> str | None:
    """What a run's recipe puts around its prompts; None for an adapter without a recipe."""
    data = recipe_beside(Path(adapter) / ADAPTER).get("data")
    return data.get("template") if isinstance(data, dict) else None


def recipe_beside(directory: Path) -> dict[str, Any]:
    """The recipe of a run whose adapter a directory is; empty if it is another's."""
    recipe = directory.parent / RECIPE
    if directory.name != ADAPTER or not recipe.is_file():
        return {}
    values = yaml.load(recipe.read_text(encoding="utf-8"))
    return values if isinstance(values, dict) else {}
