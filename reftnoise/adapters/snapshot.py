"""The two files of an adapter directory, read as of one instant; without torch.

A save replaces both, one rename after the other, and may be killed in between. So the file of
weights also holds the config that it was saved with, and a digest of itself: its rename is the
instant of the save. `reft_config.json` is the readable copy, which may be edited: it counts as long
as it names the weights by their digest. Otherwise the config inside the weights counts, which
files of reftnoise 0.1 do not have.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .._util.errors import brief, one_line, warn_once
from .._util.files import local_path
from .location import CONFIG_NAME, WEIGHTS_NAME, checked_description

logger = logging.getLogger(__name__)

_METADATA = "__metadata__"
_CONFIG, _DIGEST = "reft_config", "reft_sha256"
"""Keys of the metadata in a file of weights."""

_LARGEST_CONFIG = 2**23
_LARGEST_HEADER = 100_000_000
"""In bytes. The second is the limit of safetensors."""


@dataclass(frozen=True)
class Snapshot:
    """An adapter directory as it was when it was read.

    Args:
        directory: its path.
        description: mapping in its config, without the digest; its sections are not checked.
        sha256: digest of the file of weights; None if the config names none, or there is no file.
        content: content of the file of weights; None if there is no file.
    """

    directory: Path
    description: dict[str, Any]
    sha256: str | None
    content: bytes | None

    @property
    def weights(self) -> bytes:
        """The content of the file of weights; a FileNotFoundError if there is none."""
        if self.content is None:
            raise FileNotFoundError(f"{self.directory}: no {WEIGHTS_NAME} in it")
        return self.content

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, as the header of the weights has it."""
        path = self.directory / WEIGHTS_NAME
        header = _header(self.weights, path)
        shapes = {name: tuple(header[name]["shape"]) for name in header if name != _METADATA}
        for name, shape in shapes.items():
            if not all(type(size) is int and 0 <= size < 2**63 for size in shape):
                raise _damaged(path, f"{one_line(name)} has shape {brief(shape)}")
        return shapes

    def identity(self) -> str:
        """A digest of config and weights: adapters with the same digest edit alike."""
        return hashlib.sha256(_canonical(self.description) + self.weights).hexdigest()


def sealed(weights: bytes, description: Mapping[str, Any]) -> bytes:
    """A file of safetensors, with a config and a digest of all of it in its metadata."""
    header = _header(weights, Path(WEIGHTS_NAME))
    metadata = {_CONFIG: json.dumps(description, ensure_ascii=False)}
    payload = weights[_start(weights) :]
    header = {_METADATA: metadata, **header}
    metadata[_DIGEST] = _digest(header, payload)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    return len(text).to_bytes(8, "little") + text + payload


def read_snapshot(directory: str | Path) -> Snapshot:
    """Read an adapter directory, while others may save into it.

    Raises:
        FileNotFoundError: the directory has no config.
        ValueError: a file is damaged or of another schema, or the two are not of one save.
    """
    directory = local_path(directory, "directory")
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory}: no {CONFIG_NAME} in it, so it is not an adapter directory"
        )
    description = checked_description(_read_config(path), path)
    named = description.pop("weights_sha256", None)
    content = _read_weights(directory / WEIGHTS_NAME)
    if content is None:
        return Snapshot(directory, description, None, None)
    digest = hashlib.sha256(content).hexdigest()
    own = _own_description(content, directory / WEIGHTS_NAME)
    if named is None:
        return Snapshot(directory, description, None, content)
    if named == digest:
        if own is not None and _canonical(own) != _canonical(description):
            warn_once(logger, f"{path}: edited, or damaged, since it was saved")
        return Snapshot(directory, description, digest, content)
    if own is None:
        raise ValueError(
            f"{directory / WEIGHTS_NAME}: damaged, or not the weights that {CONFIG_NAME} was saved "
            "with"
        )
    warn_once(logger, f"{path}: of another save than {WEIGHTS_NAME}, whose own config is read")
    return Snapshot(directory, own, digest, content)


def _own_description(content: bytes, path: Path) -> dict[str, Any] | None:
    """The config inside the weights; None if there is none, or the file is damaged."""
    header = _header(content, path)
    metadata = header.get(_METADATA) or {}
    if not {_CONFIG, _DIGEST} <= metadata.keys():
        return None
    digest = metadata.pop(_DIGEST)
    if digest != _digest(header, content[_start(content) :]):
        return None
    return checked_description(metadata[_CONFIG], path)


def _read_config(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(_LARGEST_CONFIG + 1)
    if len(content) > _LARGEST_CONFIG:
        raise ValueError(f"{path}: expected a config of at most {_LARGEST_CONFIG:,} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: damaged or not an adapter's config ({brief(error)})") from None


def _read_weights(path: Path) -> bytes | None:
    """The content of a file of safetensors, whose size its header must have announced."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 0 < length <= min(size - 8, _LARGEST_HEADER):
            raise _damaged(path, f"a header of {length:,} bytes in a file of {size:,}")
        header = _header(start + file.read(length), path)
        try:
            ends = [entry["data_offsets"][1] for n, entry in header.items() if n != _METADATA]
            expected = 8 + length + max(ends, default=0)
        except (KeyError, TypeError, IndexError) as error:
            raise _damaged(path, brief(error)) from None
        if expected != size:
            raise _damaged(path, f"tensors up to byte {expected:,} in a file of {size:,}")
        file.seek(0)
        return file.read(size)


def _start(content: bytes) -> int:
    """Where the tensors begin in a file of safetensors."""
    return 8 + int.from_bytes(content[:8], "little")


def _header(content: bytes, path: Path) -> dict[str, Any]:
    """The header of a file of safetensors, by name of the tensor, and its metadata."""
    try:
        header = json.loads(content[8 : _start(content)])
        if not isinstance(header, dict) or not isinstance(header.get(_METADATA, {}), dict):
            raise TypeError("its header is no mapping")
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(path, brief(error)) from None
    return header


def _damaged(path: Path, problem: str) -> ValueError:
    return ValueError(f"{path}: truncated or damaged ({problem})")


def _digest(header: Mapping[str, Any], payload: bytes) -> str:
    """The digest of a file of safetensors, whose header does not hold it yet."""
    digest = hashlib.sha256(_canonical(header))
    digest.update(payload)
    return digest.hexdigest()


def _canonical(value: Any) -> bytes:
    """A JSON value as bytes, whatever the order of its keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
