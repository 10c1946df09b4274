"""Which sources of rows are files; nothing heavy is imported here."""

from pathlib import Path

from .._util.files import local_path

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""By suffix, the reader of datasets."""


def is_path(source: str | Path) -> bool:
    """Whether a source is a path rather than a hub dataset's `owner/name`."""
    path, text = local_path(source), str(source)
    return (
        not isinstance(source, str)
        or path.suffix in LOADERS
        or text.startswith((".", "~"))
        or path.is_absolute()
        or text.count("/") > 1
        or path.is_file()
        or (path.parent != Path() and path.parent.is_dir())
    )


def expect_file(source: str | Path) -> None:
    """Raise an error for a path that is no file of rows.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: nothing reads such files.
    """
    if not is_path(source):
        return
    path = local_path(source)
    is_known = path.suffix in LOADERS
    if not path.exists() or (is_known and not path.is_file()):
        raise FileNotFoundError(f"{path}: no such file")
    if not is_known:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(LOADERS)}")
