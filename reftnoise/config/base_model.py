"""What a base model's name and dtype may be."""

from .._util.files import local_path

DTYPES = ("auto", "float32", "bfloat16", "float16")


def expect_base(name: str, dtype: str | None = None) -> None:
    """Raise an error for what no base has.

    Args:
        name: directory or hub name of the base, or tiny-chat.
        dtype: one of `DTYPES`; None for any.

    Raises:
        ValueError: the dtype is unknown.
        FileNotFoundError: the name is a path, and there is no such directory.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not local_path(name, "model").is_dir():
        raise FileNotFoundError(f"{name}: no such directory of a model")
