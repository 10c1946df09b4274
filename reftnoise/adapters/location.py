"""Where an adapter lies: in a directory, or on the hub; nothing heavy is imported here."""

from pathlib import Path

CONFIG_NAME = "reft_config.json"
WEIGHTS_NAME = "reft_model.safetensors"


def expect_place(directory: str | Path) -> None:
    """Raise an error for what is neither a directory nor a hub repository's name."""
    path = Path(directory)
    if path.is_dir():
        return
    if path.exists():
        raise ValueError(f"{directory}: expected a directory, found a file")
    if isinstance(directory, Path) or directory.count("/") != 1 or directory.startswith("."):
        raise FileNotFoundError(f"{directory}: no such directory")


def local_directory(
    directory: str | Path,
    files: list[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """A directory, or those files of a hub repository, downloaded."""
    expect_place(directory)
    if Path(directory).is_dir():
        return Path(directory)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(str(directory), revision=revision, token=token, allow_patterns=files)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{directory}: no such directory, and not to be had from the hub ({error})"
        ) from None
