"""Load an adapter together with the base that it names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._util.files import local_path
from ..adapters.location import ADAPTER, CONFIG_NAME
from ..data.tasks.classifier import ClassifierTask
from ..data.tasks.registry import get_task
from ..engine.base.loading import load_base
from ..model import ReftModel, get_reft_model
from ..training.run_adapter import adapter_directory, base_of, recipe_of

BASE = "base"
"""The name of the model without an adapter, next to those of its adapters."""


def load_adapted(
    adapter: str | Path,
    model: str | None = None,
    *,
    dtype: str | None = None,
    device: str = "auto",
) -> tuple[ReftModel, Any]:
    """A base that writes text, with its adapter, in evaluation mode, and the base's tokenizer.

    None stands for what the run's recipe has, or what was saved with the adapter.

    Args:
        adapter: directory of a run or of an adapter, or hub name of an adapter.
        model: name or directory of the base, or tiny-chat.
        dtype: dtype of the base, as in `load_base`.
        device: device for both, as in `load_base`.

    Raises:
        OSError: there is no such adapter or base.
        ValueError: the adapter is damaged, does not name its base, is for another base, or is that
            of a classifier.
    """
    directory = _of_text_model(adapter)
    base, tokenizer = base_for(directory, model, dtype, device)
    return ReftModel.from_pretrained(base, directory), tokenizer


def load_library(
    adapters: Mapping[str, str | Path],
    model: str | None = None,
    *,
    dtype: str | None = None,
    device: str = "auto",
) -> tuple[ReftModel, Any]:
    """A base with several adapters by name, in evaluation mode, and its tokenizer.

    Arguments and errors are as in `load_adapted`; the base is by default the first adapter's.
    """
    directories = {name: _of_text_model(path) for name, path in adapters.items()}
    first = next(iter(directories.values()))
    base, tokenizer = base_for(first, model, dtype, device)
    reft_model = get_reft_model(base)
    for name, directory in directories.items():
        reft_model.load_adapter(directory, name)
    return reft_model.eval(), tokenizer


def by_name(adapter: str | Path, others: Mapping[str, str | Path]) -> dict[str, str | Path]:
    """Adapters by name; the first has the name of its run, directory or repository.

    Raises:
        ValueError: one of the others has that name.
    """
    path = local_path(adapter, "adapter").absolute()
    name = path.parent.name if path.name == ADAPTER else path.name
    if name in others:
        raise ValueError(f"others.{name}: {adapter} has that name already, choose another")
    return {name: adapter, **others}


def base_for(directory: Path, model: str | None, dtype: str | None, device: str) -> tuple[Any, Any]:
    """The base of an adapter directory, and its tokenizer; arguments as in `load_adapted`."""
    known = base_of(directory) if model is None else {"model": model}
    if dtype is not None:
        known["dtype"] = dtype
    name = known.pop("model")
    if not name:
        raise ValueError(
            f"{directory / CONFIG_NAME}: the adapter's base has no name: expected `model`"
        )
    try:
        return load_base(name, device=device, **known)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0].removeprefix(f"{name}: ")
        if isinstance(error, OSError):
            raise OSError(
                f"{name}, the adapter's base: {reason}; name its directory with --model"
            ) from None
        raise ValueError(f"{name}, the adapter's base: {reason}") from None


def _of_text_model(adapter: str | Path) -> Path:
    """The adapter's own directory; a ValueError for the run of a classifier."""
    directory = adapter_directory(adapter)
    task = recipe_of(directory).get("task")
    if task is not None and isinstance(get_task(task), ClassifierTask):
        raise ValueError(
            f"{directory.parent}: the run is a classifier, which writes no text; to score it, run "
            f"'reftnoise eval {directory.parent}'"
        )
    return directory
