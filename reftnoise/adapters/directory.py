"""Adapter directories, read without a base."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .._util.errors import brief, one_line, value_errors
from ..config.representations import ReftConfig
from ..interventions import orthonormal_rows
from .location import CONFIG_NAME, SECTIONS, WEIGHTS_NAME
from .snapshot import Snapshot, read_snapshot


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter directory that has been read, and whose config has been checked.

    Args:
        directory: its path.
        config: the units.
        base: `name_or_path`, its `path` on the machine that trained the adapter, the fingerprint of
            the base's shape, a `sample` of its weights, and its `vocabulary` and
            `rope_parameters`; older adapters have fewer of them.
        base_parameters: names of the base's parameters that are among the weights.
        snapshot: its files, of one instant; None for a directory of another library.
    """

    directory: Path
    config: ReftConfig
    base: dict[str, Any]
    base_parameters: list[str]
    snapshot: Snapshot | None

    @classmethod
    def read(cls, directory: str | Path) -> "AdapterFiles":
        """Read a directory.

        Raises:
            FileNotFoundError: the directory has no config.
            ValueError: a file is damaged, wrong, or of another schema.
        """
        snapshot = read_snapshot(directory)
        directory, description = snapshot.directory, snapshot.description
        sections = {name: description[name] for name in SECTIONS if name in description}
        with value_errors(directory / CONFIG_NAME):
            config = ReftConfig.from_dict(sections)
        return cls(
            directory=directory,
            config=config,
            base=description["base_model"],
            base_parameters=description["base_parameters"],
            snapshot=snapshot,
        )

    @property
    def config_path(self) -> Path:
        """The file of the config."""
        return self.directory / CONFIG_NAME

    @property
    def weights_path(self) -> Path:
        """The file of the weights."""
        return self.directory / WEIGHTS_NAME

    @property
    def _files(self) -> Snapshot:
        assert self.snapshot is not None, "another library's directory has methods of its own"
        return self.snapshot

    @property
    def sha256(self) -> str | None:
        """The digest of the weights; None for an adapter that was saved without one."""
        return None if self.snapshot is None else self.snapshot.sha256

    def weights(self) -> dict[str, Tensor]:
        """All tensors by name, in the order of names.

        Raises:
            FileNotFoundError: the directory has no file of weights.
            ValueError: the file is damaged.
        """
        try:
            return dict(sorted(safetensors.torch.load(self._files.weights).items()))
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.weights_path}: truncated or damaged ({one_line(error)})"
            ) from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors by name; errors as in `weights`."""
        with value_errors(self.weights_path):
            return self._files.shapes

    def identity(self) -> str:
        """A digest of config and weights: adapters with the same digest edit alike.

        Raises:
            FileNotFoundError: the directory has no file of weights.
        """
        return self._files.identity()

    def expect_base(
        self, shape: Mapping[str, Any], name: object, whose: str = "the given model"
    ) -> None:
        """Raise a ValueError for a base of another shape, which the message names."""
        for key, mine in shape.items():
            if self.base.get(key) != mine:
                raise ValueError(
                    f"{self.config_path}: the adapter's base ({self.base_name}) has {key} "
                    f"{brief(self.base.get(key))}, {whose} ({called(name)}) {mine!r}"
                )

    @property
    def shape(self) -> dict[str, Any]:
        """The fingerprint of the base's shape."""
        others = ("name_or_path", "path", "sample", "vocabulary", "rope_parameters")
        return {key: value for key, value in self.base.items() if key not in others}

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
    return " ".join(str(name).split())[:200] if name else "which has no name"


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors with numbers that are infinite or NaN, or that make an R of NaN."""
    floating = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    return [
        name
        for name, tensor in floating.items()
        if not tensor.isfinite().all()
        or (name.endswith(".rotate_layer.weight") and not orthonormal_rows(tensor).isfinite().all())
    ]


def expect_finite(adapter: AdapterFiles, state: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for tensors of an adapter with numbers that are infinite or NaN."""
    if spoilt := not_finite(state):
        raise ValueError(
            f"{adapter.weights_path}: {spoilt[0]} holds numbers that are not finite, or dependent "
            "rows of R, as after training that diverged; from_pretrained(…, allow_nan=True) loads "
            "them"
        )


def warn_of_not_finite(directory: Path, state: Mapping[str, Tensor]) -> None:
    """Warn of tensors that are about to be saved with numbers that are not finite."""
    if spoilt := not_finite(state):
        warnings.warn(
            f"{directory}: {len(spoilt)} of {len(state)} tensors that are saved hold numbers that "
            "are not finite, or dependent rows of R, as after training that diverged: "
            f"{', '.join(spoilt[:3])}{', …' if spoilt[3:] else ''}; loading refuses them unless "
            "allow_nan is True",
            stacklevel=4,
        )
