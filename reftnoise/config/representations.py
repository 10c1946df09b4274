"""One config: a list of units, each an intervention or a noise at chosen layers and positions.

The same list is the YAML of a recipe and the JSON of a saved adapter.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from .._util import yaml
from .._util.errors import brief, nearest
from .._util.files import local_path
from ..interventions import NoiseIntervention, Unit, put_gate, registered_name
from ..interventions.arguments import constructor_arguments
from .components import COMPONENTS, is_dotted, read_heads, split_component
from .interventions import (
    argument_defaults,
    entry_arguments,
    expect_one_site,
    pop_intervention,
    read_gate,
    unit_class_of,
    unsayable,
)
from .peft import read_peft
from .positions import Positions
from .pyvene_fields import PyveneConfig, entries_of_pyvene
from .values import plain, plain_if_possible

_OTHER_NAMES = {"rank": "low_rank_dimension", "r": "low_rank_dimension"}
_RANGE = re.compile(r"([0-9]+)-([0-9]+)")


@dataclass
class RepresentationConfig:
    """One entry of `ReftConfig.representations`.

    What needs no model is checked here; `ReftModel` checks the rest.
    """

    intervention: str | Unit
    """A registered name, whose arguments are further keys, or a ready module for one layer."""
    layer: int | list[int] | str | None = None
    """Layers from 0: one, a list, `"all"` or a range such as `"8-15"`. None for `embeddings`."""
    component: str = "block_output"
    """One of `COMPONENTS`, of an encoder-decoder's decoder with `decoder.` before it, or a dotted
    path such as `"model.layers[3].output"`."""
    heads: list[int] | str | None = None
    """Heads from 0 that a unit at `head_output` edits together, or `"all"`. None elsewhere."""
    positions: str | list[int] = "l1"
    """Edited positions (`Positions`), by default the unit's. Noise has `where` instead."""
    names_positions: bool = True
    """Whether the entry says them. If not, files leave them out too."""
    tied: bool = True
    """Whether a prefix and a suffix (`"f5+l5"`) share one set of weights."""
    embed_dim: int | None = None
    """Width of the hidden states, where a dotted path leads to another than the model's."""
    gate: dict[str, Any] | None = None
    """How much of the edit a state gets, by states: `{"type": "probe"}` (σ(w·h + c) of the edit),
    `{"type": "norm"}` (the edited state keeps the norm) or `{"type": "condition"}` (rows whose
    prompt meets one). None for all of it."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the intervention class, defaults filled in."""

    @property
    def unit_class(self) -> type[Unit]:
        """The class of the entry's units."""
        return unit_class_of(self.intervention)

    @property
    def is_noise(self) -> bool:
        """Whether the units perturb hidden states, and do not edit them."""
        return issubclass(self.unit_class, NoiseIntervention)

    def parts(self) -> list[Positions | None]:
        """The positions of each set of weights; [None] for noise."""
        if self.is_noise:
            return [None]
        positions = Positions.parse(self.positions)
        return [positions] if self.tied else list(positions.split())

    @property
    def is_per_layer(self) -> bool:
        """Whether the entry needs `layer`; a dotted path and embeddings need none."""
        return _has_layers(self.component)

    def layers(self, count: int) -> list[int]:
        """The layers that `layer` means in a model that has `count` of them."""
        match self.layer:
            case "all":
                layers = list(range(count))
            case str(text):
                first, last = map(int, text.split("-"))
                layers = list(range(first, min(last, max(first, count)) + 1))  # one too many
            case int(layer):
                layers = [layer]
            case _:
                layers = list(self.layer or ())
        if beyond := [layer for layer in layers if layer >= count]:
            raise ValueError(
                f"layer {self.layer!r}: the model has layers 0 to {count - 1}, not {beyond[0]}"
            )
        return layers

    def build(self, width: int | None, default: int, head_width: int | None = None) -> Unit:
        """The unit for hidden states of `width`: a new one, or the ready module.

        Args:
            width: width at the site; None where only a pass of the model shows it.
            default: width that is assumed then, if neither the entry nor the module has one.
            head_width: width of one head, where the site is of heads.
        """
        own = getattr(self.intervention, "hidden_size", self.embed_dim)
        if width is not None and own not in (None, width):
            raise ValueError(
                f"embed_dim {own!r}: the hidden states at {self.component!r} have width {width}"
            )
        unit = self.intervention
        if isinstance(unit, str):
            of_place: dict[str, Any] = {"embed_dim": own or width or default}
            if "head_width" in constructor_arguments(self.unit_class):
                of_place["head_width"] = head_width
            unit = self.unit_class(**of_place, **self.arguments)
        elif getattr(unit, "head_width", head_width) != head_width:
            raise ValueError(f"head_width {unit.head_width}: the heads there have {head_width}")
        put_gate(unit, self.gate)
        return unit

    def to_dict(self) -> dict[str, Any]:
        """The entry as plain JSON values; a ready module becomes its name and arguments.

        Raises:
            ValueError: a module of a class that has no name, or with an argument that no file says.
        """
        if isinstance(self.intervention, str):
            return self._entry()
        unsaid = unsayable(self.intervention)
        entry = {key: value for key, value in self._entry().items() if key not in unsaid}
        return entry | {"intervention": registered_name(self.unit_class)}

    def _entry(self) -> dict[str, Any]:
        """The mapping that `from_dict` reads."""
        entry: dict[str, Any] = {
            "layer": self.layer,
            "component": self.component,
            "heads": self.heads,
            "intervention": self.intervention,
            "positions": self.positions,
            "tied": self.tied,
            "embed_dim": self.embed_dim,
            "gate": self.gate,
        }
        absent = {"positions", "tied"} if self.is_noise else set()
        absent |= set() if self.names_positions else {"positions"}
        absent |= {key for key in ("layer", "heads", "embed_dim", "gate") if entry[key] is None}
        return {k: value for k, value in entry.items() if k not in absent} | self.arguments

    @classmethod
    def from_dict(
        cls, entry: "Mapping[str, Any] | RepresentationConfig", where: str = "representation"
    ) -> "RepresentationConfig":
        """Read an entry; any mistake is a ValueError that begins with `where`."""
        try:
            if isinstance(entry, RepresentationConfig):
                entry = entry._entry()
            return cls._from_dict(dict(entry))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None

    @classmethod
    def _from_dict(cls, entry: dict[str, Any]) -> "RepresentationConfig":
        ready = {key: entry[key] for key in ("intervention", "intervention_type") if key in entry}
        if isinstance(positions := entry.get("positions"), Positions):
            entry["positions"] = positions.spec()
        entry = {key: plain_if_possible(value) for key, value in entry.items()} | ready
        intervention = pop_intervention(entry)
        unit_class = unit_class_of(intervention)
        is_noise = issubclass(unit_class, NoiseIntervention)
        known = argument_defaults(unit_class)
        _expect_known(entry, unit_class, known)
        values = {key: entry.pop(key) for key in known if key in entry}
        entry = {key: plain(value, key) for key, value in entry.items()}
        arguments = entry_arguments(intervention, values)
        component = entry.pop("component", getattr(unit_class, "default_component", "block_output"))
        if is_noise and str(component).endswith("_parallel"):
            raise ValueError(f"component {component!r}: noise reads nothing; expected an output")
        embed_dim = entry.pop("embed_dim", None)
        if embed_dim is not None and (type(embed_dim) is not int or embed_dim < 1):
            raise ValueError(f"embed_dim {embed_dim!r}: expected a positive integer")
        default = getattr(unit_class, "default_positions", "l1")
        if isinstance(intervention, str) and _has_layers(component):
            entry.setdefault("layer", getattr(unit_class, "default_layer", None))
        tied = entry.pop("tied", True)
        if not isinstance(tied, bool):
            raise ValueError(f"tied {tied!r}: expected true or false")
        config = cls(
            intervention=intervention,
            layer=_layer(entry.pop("layer", None), component),
            component=component,
            heads=read_heads(entry.pop("heads", None), component),
            names_positions=is_noise or "positions" in entry or default != "l1",
            positions=Positions.parse(entry.pop("positions", default)).spec(),
            tied=tied,
            embed_dim=embed_dim,
            gate=read_gate(entry.pop("gate", None), component),
            arguments=arguments,
        )
        if isinstance(intervention, Unit):
            parts = len(config.parts())
            expect_one_site(intervention, layer=config.layer, parts=parts, width=embed_dim)
            if is_dotted(component):  # a saved entry has to say the width there
                config.embed_dim = getattr(intervention, "hidden_size", embed_dim)
        return config


@dataclass
class ReftConfig:
    """What is edited, perturbed and trained: the table of units is in examples/guides/config.md.

    Args:
        representations: one entry or a list; mappings with the fields of `RepresentationConfig`
            and the arguments of the intervention.
        peft: a method of PEFT under the units: `peft_type` and the arguments of its config, or a
            `peft.PeftConfig`.
        modules_to_save: names, or ends of names, of modules of the base that are trained and saved
            with the units. None for a task head, and nothing else.
        token_rows: ids of tokens, such as added ones, whose rows of the embeddings and of an untied
            head are saved with the units, and put back on loading.
        pyvene: arguments of pyvene's config (`PyveneConfig`).

    Raises:
        ValueError: an entry has an unknown key, name or value; the message says which and what
            is possible.
    """

    representations: list[RepresentationConfig]
    peft: dict[str, Any] | None = None
    modules_to_save: list[str] | None = None
    token_rows: list[int] | None = None

    def __init__(
        self,
        representations: "Mapping[str, Any] | RepresentationConfig | Sequence[Mapping[str, Any] | RepresentationConfig]",  # noqa: E501  # one type
        peft: Any = None,
        modules_to_save: Sequence[str] | None = None,
        token_rows: Sequence[int] | None = None,
        **pyvene: Unpack[PyveneConfig],
    ) -> None:
        representations = entries_of_pyvene(representations, pyvene)
        if isinstance(representations, Mapping | RepresentationConfig):
            representations = [representations]
        if isinstance(representations, str) or not isinstance(representations, Sequence):
            raise ValueError(
                f"representations {brief(representations)}: expected an entry or a list of entries"
            )
        self.representations = []
        for index, entry in enumerate(representations):
            where = f"representations[{index}]"
            if not isinstance(entry, Mapping | RepresentationConfig):
                raise ValueError(f"{where}: expected a mapping, got {brief(entry)}")
            self.representations.append(RepresentationConfig.from_dict(entry, where))
        self.peft = None if peft is None else read_peft(peft)
        trained = plain(modules_to_save, "modules_to_save")
        is_list = trained is None or isinstance(trained, list)
        if not is_list or not all(isinstance(name, str) and name for name in trained or ()):
            raise ValueError(f"modules_to_save {brief(modules_to_save)}: expected a list of names")
        self.modules_to_save = trained
        self.token_rows = None if token_rows is None else _tokens(plain(token_rows, "token_rows"))

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON values, without sections that are None."""
        values = {
            "representations": [entry.to_dict() for entry in self.representations],
            "peft": self.peft,
            "modules_to_save": self.modules_to_save,
            "token_rows": self.token_rows,
        }
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ReftConfig":
        """A config from such a mapping; a ValueError names an unknown key."""
        possible = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping) or "representations" not in values:
            raise ValueError(f"expected a mapping with 'representations', got {brief(values)}")
        if unknown := [key for key in values if key not in possible]:
            raise ValueError(f"unknown key {unknown[0]!r}; {nearest(unknown[0], possible)}")
        return cls(**values)

    def to_json(self) -> str:
        """The config as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "ReftConfig":
        """A config from the text that `to_json` writes."""
        return cls.from_dict(json.loads(_expect_text(text, "from_json")))

    def to_yaml(self) -> str:
        """The config as YAML."""
        return yaml.dump(self.to_dict())

    @classmethod
    def from_yaml(cls, text: str) -> "ReftConfig":
        """A config from the text that `to_yaml` writes."""
        return cls.from_dict(yaml.load(_expect_text(text, "from_yaml")))

    @classmethod
    def from_file(cls, path: str | Path) -> "ReftConfig":
        """Read a `.json`, `.yaml` or `.yml` file."""
        path = local_path(path)
        readers = {".json": cls.from_json, ".yaml": cls.from_yaml, ".yml": cls.from_yaml}
        if path.suffix not in readers:
            raise ValueError(f"{path}: expected one of {', '.join(readers)}")
        try:
            return readers[path.suffix](path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _has_layers(component: Any) -> bool:
    """Whether a component is a place of each layer."""
    if not isinstance(component, str) or is_dotted(component):
        return False
    return split_component(component)[1] != "embeddings"


def _tokens(token_rows: Any) -> list[int]:
    tokens = token_rows if isinstance(token_rows, list) else []
    if not tokens or not all(type(token) is int and token >= 0 for token in tokens):
        raise ValueError(f"token_rows {brief(token_rows)}: expected a list of ids of tokens")
    if len(set(tokens)) < len(tokens):
        raise ValueError(f"token_rows {brief(token_rows)}: every token may occur once")
    return tokens


def _expect_text(text: Any, name: str) -> str:
    if isinstance(text, Path) or str(text).endswith((".json", ".yaml", ".yml")):
        raise ValueError(f"{name} takes the text of a config: read {str(text)!r} with from_file")
    return str(text)


def _expect_known(
    entry: Mapping[str, Any], unit_class: type[Unit], arguments: Mapping[str, Any]
) -> None:
    """Raise a ValueError for a key that an entry of a class cannot have."""
    allowed = ["layer", "component", "heads", "embed_dim"]
    if not issubclass(unit_class, NoiseIntervention):
        allowed += ["positions", "tied", "gate"]
    if unknown := [key for key in entry if key not in (*arguments, *allowed)]:
        possible = [*allowed, "intervention", *arguments]
        meant = _OTHER_NAMES.get(unknown[0], unknown[0])
        raise ValueError(
            f"unknown key {unknown[0]!r} for {unit_class.__name__}; {nearest(meant, possible)}"
        )


def _layer(layer: Any, component: Any) -> int | list[int] | str | None:
    if not isinstance(component, str):
        raise ValueError(f"component {component!r}: expected a string")
    name = split_component(component)[1]
    if name not in COMPONENTS and not is_dotted(component):
        is_path = component.count(".") > 1 or "[" in component
        decoders = [f"decoder.{known}" for known in COMPONENTS]
        possible = decoders if "." in component and not is_path else COMPONENTS
        raise ValueError(
            f"component {component!r}; {nearest(component, possible)}, or a dotted path "
            "that ends in .output or .input, such as 'model.layers[3].output'"
        )
    if name == "embeddings":
        if layer is not None:
            raise ValueError(f"layer {layer!r}: {component!r} has no layers, leave it out")
        return None
    if is_dotted(component) and layer is not None and type(layer) is not int:
        raise ValueError(f"layer {layer!r}: {component!r} is one site, leave the layer out")
    if isinstance(layer, Sequence) and not isinstance(layer, str):
        layers = list(layer)
        if layers and all(type(i) is int and i >= 0 for i in layers):
            if len(set(layers)) == len(layers):
                return layers
            raise ValueError(f"layer {layers}: every layer may occur once")
    elif layer == "all" or (type(layer) is int and layer >= 0):
        return layer
    elif isinstance(layer, str) and (match := _RANGE.fullmatch(layer)):
        if int(match[1]) <= int(match[2]):
            return layer
    elif layer is None and is_dotted(component):
        return None
    start = "layer is missing" if layer is None else f"layer {layer!r}"
    raise ValueError(
        f"{start}: expected an integer from 0, a list of them, 'all' or a range such as '8-15'"
    )
