"""Adapter directories, read without a base."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ..config.representations import ReftConfig
from .location import CONFIG_NAME, SECTIONS, WEIGHTS_NAME, read_description


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter directory whose config has been read.

    Args:
        directory: its path.
        config: the units.
        base: `name_or_path`, the fingerprint of the base's shape, and a `sample` of its weights.
        base_parameters: names of the base's parameters that are among the weights.
        sha256: digest of the weights; None for an adapter that was saved without one.
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
            FileNotFoundError: the directory has none.
            ValueError: the config is damaged, wrong, or of another schema.
        """
        description = read_description(directory)
        sections = {name: description[name] for name in SECTIONS if name in description}
        try:
            config = ReftConfig.from_dict(sections)
        except ValueError as error:
            raise ValueError(f"{Path(directory) / CONFIG_NAME}: {error}") from None
        return cls(
            directory=Path(directory),
            config=config,
            base=description["base_model"],
            base_parameters=description["base_parameters"],
            sha256=description.get("weights_sha256"),
        )

    @property
    def config_path(self) -> Path:
        """The file of the config."""
        return self.directory / CONFIG_NAME

    @property
    def weights_path(self) -> Path:
        """The file of the weights."""
        return self.directory / WEIGHTS_NAME

    def weights(self) -> dict[str, Tensor]:
        """All tensors by name, in the order of names.

        Raises:
            FileNotFoundError: the directory has no file of weights.
            ValueError: the file is damaged, or not the one that the config was saved with.
        """
        return self._read_weights()[1]

    def _read_weights(self) -> tuple[bytes, dict[str, Tensor]]:
        if not self.weights_path.is_file():
            raise FileNotFoundError(f"{self.directory}: no {WEIGHTS_NAME} in it")
        content = self.weights_path.read_bytes()
        try:
            tensors = dict(sorted(safetensors.torch.load(content).items()))
        except SafetensorError as error:
            raise ValueError(f"{self.weights_path}: truncated or damaged ({error})") from None
        if self.sha256 not in (None, hashlib.sha256(content).hexdigest()):
            raise ValueError(
                f"{self.weights_path}: not the weights that {CONFIG_NAME} was saved with, as after "
                "an interrupted save"
            )
        return content, tensors

    def identity(self) -> str:
        """A digest of config and weights: adapters with the same digest edit alike.

        Raises:
            FileNotFoundError, ValueError: as in `weights`.
        """
        digest = hashlib.sha256(self.config_path.read_bytes())
        digest.update(self._read_weights()[0])  # what is checked is what is digested
        return digest.hexdigest()

    def expect_base(
        self, shape: Mapping[str, Any], name: object, whose: str = "the given model"
    ) -> None:
        """Raise a ValueError for a base of another shape, which the message names."""
        for key, mine in shape.items():
            if self.base.get(key) != mine:
                raise ValueError(
                    f"{self.config_path}: the adapter's base ({self.base_name}) has {key} "
                    f"{self.base.get(key)!r}, {whose} ({called(name)}) {mine!r}"
                )

    @property
    def base_name(self) -> object:
        """The base's name, for messages."""
        return called(self.base.get("name_or_path"))


def by_unit(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each unit, by its key and their names in the unit."""
    units: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        owner, _, rest = name.partition(".")
        if owner == "interventions":
            key, _, parameter = rest.partition(".")
            units.setdefault(key, {})[parameter] = tensor
    return units


def called(name: object) -> object:
    """A base's name for a message; a base that was made from a config has none."""
    return name or "which has no name"
