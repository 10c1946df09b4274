"""The files of an adapter directory: where they are, and checks of them without torch."""

import json
from pathlib import Path
from typing import Any

from .._util.errors import brief, is_finite_number, nearest
from .._util.files import local_path

CONFIG_NAME = "reft_config.json"
WEIGHTS_NAME = "reft_model.safetensors"
CARD_NAME = "README.md"
ADAPTER = "adapter"
"""The directory of an adapter within that of the run that trained it."""
SCHEMA_VERSION = 1
SECTIONS = ("representations", "peft", "modules_to_save", "token_rows")
"""The keys of the file that are a `ReftConfig`'s."""
_MOST_LAYERS = 100_000
_KEYS = ("schema_version", "base_model", "base_parameters", "weights_sha256", *SECTIONS)


def checked_description(text: str, path: Path) -> dict[str, Any]:
    """The mapping in the text of a `reft_config.json`, whose sections are not checked yet.

    Args:
        text: JSON.
        path: file that has it, for messages.

    Raises:
        ValueError: the text is damaged, has an unknown key, or is of another schema.
    """
    try:
        description: dict[str, Any] = json.loads(text)
        schema = description["schema_version"]
        description["base_model"] = _base_model(description["base_model"])
        if not isinstance(description["representations"], list):
            raise TypeError("representations is no list")
        names = description.get("base_parameters", ())
        description["base_parameters"] = [str(name) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged or not an adapter's config ({brief(error)})") from None
    if schema != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: schema version {brief(schema)}, but this reftnoise reads version "
            f"{SCHEMA_VERSION}"
        )
    if unknown := [key for key in description if key not in _KEYS]:
        raise ValueError(f"{path}: unknown key {brief(unknown[0])}; {nearest(unknown[0], _KEYS)}")
    return description


def _base_model(value: Any) -> dict[str, Any]:
    """The section about the base, whose values others compare, print and look up."""
    base = dict(value)
    for name in ("name_or_path", "path"):
        if not isinstance(base.get(name, ""), str):
            raise TypeError(f"base_model.{name} is no text")
    layers = base.get("num_hidden_layers")
    if layers is not None and (type(layers) is not int or not 0 <= layers <= _MOST_LAYERS):
        raise ValueError(f"base_model.num_hidden_layers {brief(layers)}")
    for name, values in base.get("sample", {}).items():
        if not isinstance(values, list) or not all(map(is_finite_number, values)):
            raise TypeError(f"base_model.sample has no list of numbers for {brief(name)}")
    return base


def expect_place(directory: str | Path) -> None:
    """Raise an error for what is neither a directory nor a hub repository's name."""
    path = local_path(directory, "directory")
    if path.is_dir():
        return
    if path.exists():
        raise ValueError(f"{directory}: expected a directory, found a file")
    is_name = isinstance(directory, str) and directory.count("/") == 1
    if not is_name or str(directory).startswith((".", "~")):
        raise FileNotFoundError(f"{directory}: no such directory")


def checkpoint_adapter(directory: str | Path) -> str | Path:
    """The path of an adapter; `checkpoint-N` where `checkpoint-N/intervenable_model` is missing.

    The latter is where pyreft's trainer saves what ours saves in the former.
    """
    path = local_path(directory, "directory")
    is_named_as_theirs = path.name == "intervenable_model" and not path.exists()
    if is_named_as_theirs and (path.parent / CONFIG_NAME).is_file():
        return path.parent
    return directory


def local_directory(
    directory: str | Path,
    files: list[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    is_on_hub: bool = False,
    local_dir: str | Path | None = None,
) -> Path:
    """A directory on this machine, or one with files of a hub repository, which are downloaded.

    The directory of a run stands for that of its adapter.

    Revision, token and `local_dir` are those of `huggingface_hub`; `is_on_hub` skips a directory of
    the repository's name.

    Raises:
        FileNotFoundError: there is neither such a directory nor such a repository.
        ValueError: the path is that of a file.
    """
    expect_place(directory)
    path = local_path(directory, "directory")
    if path.is_dir() and not is_on_hub:
        inside = path / ADAPTER
        is_run = not (path / CONFIG_NAME).exists() and (inside / CONFIG_NAME).is_file()
        return inside if is_run else path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                str(directory),
                revision=revision,
                token=token,
                allow_patterns=files,
                local_dir=None if local_dir is None else local_path(local_dir, "local_dir"),
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{directory}: no such directory here, and none on the hub ({error})"
        ) from None
