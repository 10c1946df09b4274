"""Adapter directories as they lie on disk: read without a base."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .._util.errors import nearest
from ..config.representations import ReftConfig
from .location import CONFIG_NAME, WEIGHTS_NAME

CARD_NAME = "README.md"
SCHEMA_VERSION = 1
_KEYS = ("schema_version", "base_model", "base_parameters", "weights_sha256")
"""Of the config, beside those of `ReftConfig`."""


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter directory, of which the config has been read.

    Args:
        directory: where it is.
        config: the units.
        base: `name_or_path`, the fingerprint of the base's shape, and a `sample` of its weights.
        base_parameters: names of the base's parameters that are among the weights.
        sha256: of the weights; None for an adapter that was saved without.
    """

    directory: Path
    config: ReftConfig
    base: dict[str, Any]
    base_parameters: list[str]
    sha256: str | None

    @classmethod
    def read(cls, directory: str | Path) -> "AdapterFiles":
        """Read a directory's config.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or of another schema.
        """
        path = Path(directory) / CONFIG_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{directory}: no {CONFIG_NAME} in it, so it is not an adapter directory"
            )
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            schema, base = description["schema_version"], dict(description["base_model"])
            units = {"representations": list(description["representations"])}
            names = [field.name for field in fields(ReftConfig)]
            units |= {name: description[name] for name in names if name in description}
            of_base = [str(name) for name in description.get("base_parameters", ())]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged or not an adapter's config ({error!r})") from None
        if schema != SCHEMA_VERSION:
            raise ValueError(
                f"{path}: schema version {schema}, but this reftnoise reads version "
                f"{SCHEMA_VERSION}"
            )
        known = [*_KEYS, *names]
        if unknown := [key for key in description if key not in known]:
            raise ValueError(f"{path}: unknown key {unknown[0]!r}; {nearest(unknown[0], known)}")
        try:
            config = ReftConfig.from_dict(units)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        digest = description.get("weights_sha256")
        return cls(Path(directory), config, base, of_base, digest)

    @property
    def config_path(self) -> Path:
        return self.directory / CONFIG_NAME

    @property
    def weights_path(self) -> Path:
        return self.directory / WEIGHTS_NAME

    def weights(self) -> dict[str, Tensor]:
        """All tensors by name.

        Raises:
            FileNotFoundError: there is no file of weights.
            ValueError: it is damaged.
        """
        if not self.weights_path.is_file():
            raise FileNotFoundError(f"{self.directory}: no {WEIGHTS_NAME} in it")
        try:
            return safetensors.torch.load_file(self.weights_path)
        except SafetensorError as error:
            raise ValueError(f"{self.weights_path}: truncated or damaged ({error})") from None

    def digest(self) -> str:
        """The SHA-256 of the weights; a ValueError where the config was saved with others."""
        if not self.weights_path.is_file():
            raise FileNotFoundError(f"{self.directory}: no {WEIGHTS_NAME} in it")
        found = hashlib.sha256(self.weights_path.read_bytes()).hexdigest()
        if self.sha256 not in (None, found):
            raise ValueError(
                f"{self.weights_path}: not the weights that {CONFIG_NAME} was saved with, as after "
                "an interrupted save"
            )
        return found

    def identity(self) -> str:
        """A digest of weights and config: equal ones edit alike."""
        found = hashlib.sha256(self.config_path.read_bytes())
        found.update(self.digest().encode())
        return found.hexdigest()

    def expect_base(
        self, shape: Mapping[str, Any], name: object, whose: str = "the given model"
    ) -> None:
        """Raise a ValueError for a base of another shape.

        Args:
            shape: the base's fingerprint.
            name: the base's, for the message.
            whose: base it is, likewise.
        """
        for key, mine in shape.items():
            if self.base.get(key) != mine:
                raise ValueError(
                    f"{self.config_path}: the adapter's base ({self.base_name}) has {key} "
                    f"{self.base.get(key)!r}, {whose} ({called(name)}) {mine!r}"
                )

    @property
    def base_name(self) -> object:
        """For messages."""
        return called(self.base.get("name_or_path"))


def by_unit(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each unit, by its key and their names in the unit."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        owner, _, rest = name.partition(".")
        if owner == "interventions":
            key, _, parameter = rest.partition(".")
            found.setdefault(key, {})[parameter] = tensor
    return found


def called(name: object) -> object:
    """A base's name for a message; one that was made from a config has none."""
    return name or "which has no name"
