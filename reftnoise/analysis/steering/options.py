"""What a search for a steering vector tries, as options; nothing heavy is imported here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..._util.errors import nearest
from ...adapters.location import ADAPTER
from ...config.positions import Positions
from ...data.templates import check_template
from ...training.run_files import RECIPE

Method = Literal["mean", "pca", "probe"]
METHODS: tuple[Method, ...] = get_args(Method)
FEWEST_PAIRS = 8
_OF_SEARCH = ("budget", "neutral", "neutral_limit", "neutral_tokens", "batch_size")
"""Options of a search alone."""
RESULTS = "steering.json"
"""The file of results next to the adapter of a search."""


@dataclass(frozen=True, kw_only=True)
class SteerOptions:
    """What is tried, and how much a vector may cost.

    Args:
        layers: layers whose vectors are tried: one, a list, all, or a range such as 8-15.
        sizes: sizes of each vector's edit next to the states that were read, ‖edit‖ / ‖h‖.
        scales: factors of each vector, instead of sizes.
        methods: ways to fit a vector: mean, pca, probe.
        positions: tokens that are edited.
        component: place of the layer that is edited, such as block_output.
        template: text around each question: plain, chat, alpaca, or a text with {prompt} in it; by
            default chat where the tokenizer has such a template.
        limit: number of pairs that are used; by default all.
        budget: greatest mean KL divergence from the base on neutral prompts, in nats per token.
        neutral: file of JSON lines with neutral prompts; by default those of the library.
        neutral_limit: number of neutral prompts, one half to choose and one to test.
        neutral_tokens: greatest number of tokens of the base's answer to a neutral prompt.
        seed: seed of the order of pairs, which says what each is used for.
        batch_size: number of prompts per forward pass.

    Raises:
        ValueError: a number is out of range, or positions, methods or template are unknown.
    """

    layers: int | list[int] | str = "all"
    sizes: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2, 0.3, 0.45])
    scales: list[float] | None = None
    methods: list[Method] = field(default_factory=lambda: [*METHODS])
    positions: str | list[int] = "l1+decode"
    component: str = "block_output"
    template: str | None = None
    limit: int | None = None
    budget: float = 0.5
    neutral: str | None = None
    neutral_limit: int = 32
    neutral_tokens: int = 16
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        Positions.parse(self.positions)
        if self.template is not None:
            check_template(self.template)
        for method in self.methods:
            expect_method(method)
        lists: dict[str, Sequence[Any] | None]
        lists = {"methods": self.methods, "sizes": self.sizes, "scales": self.scales}
        for name, values in lists.items():
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ValueError(f"{name} {values}: expected at least one, and each once")
        for name, numbers in (("sizes", self.sizes), ("scales", self.scales or ())):
            for number in numbers:
                if not 0 < number < math.inf:
                    raise ValueError(f"{name} {number}: expected numbers above 0")
        if not 0 < self.budget < math.inf:
            raise ValueError(f"budget {self.budget}: expected nats above 0")
        least = {"neutral_limit": 2, "neutral_tokens": 1, "batch_size": 1}
        least |= {} if self.limit is None else {"limit": FEWEST_PAIRS}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least {smallest}")


@dataclass(frozen=True)
class VectorChoice:
    """One vector that is not searched for.

    Args:
        layer: layer that it edits.
        method: method that fits it.
        size: size of its edit, ‖edit‖ / ‖h‖; None where `scale` says it.
        scale: its factor; None where `size` says it.
    """

    layer: int
    method: Method
    size: float | None
    scale: float | None

    @classmethod
    def of(cls, options: SteerOptions) -> "VectorChoice":
        """The only vector that options name; a ValueError if they name several."""
        sized_by = "sizes" if options.scales is None else "scales"
        layers = options.layers if isinstance(options.layers, list) else [options.layers]
        numbers = getattr(options, sized_by)
        lists = {"layers": layers, "methods": options.methods, sized_by: numbers}
        for name, values in lists.items():
            if len(values) != 1 or (name == "layers" and not str(values[0]).isdecimal()):
                raise ValueError(
                    f"{name} {getattr(options, name)}: with a server, nothing is searched for: "
                    "expected only one"
                )
        for option in fields(SteerOptions):
            value = getattr(options, option.name)
            if option.name in _OF_SEARCH and value != option.default:
                raise ValueError(
                    f"{option.name} {value}: with a server, nothing is searched for: expected none"
                )
        size, scale = (numbers[0], None) if sized_by == "sizes" else (None, numbers[0])
        return cls(int(layers[0]), options.methods[0], size, scale)


def expect_method(method: str) -> None:
    """Raise a ValueError for a method that there is not."""
    if method not in METHODS:
        raise ValueError(f"method {method!r}: {nearest(method, METHODS)}")


def expect_room(directory: Path, *, overwrite: bool) -> None:
    """Raise a ValueError unless a search may write its adapter and its results in a directory.

    Args:
        directory: directory that is to be written.
        overwrite: whether an earlier search's results there are replaced; nothing else ever is.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output_dir {directory}: expected a directory, found a file")
    held = next((name for name in (RECIPE, RESULTS, ADAPTER) if (directory / name).exists()), None)
    if held is None or (held == RESULTS and overwrite):
        return
    way = "choose another --output_dir"
    if held == RESULTS:
        way += ", or --overwrite it"
    raise ValueError(f"output_dir {directory} holds {held} already: {way}")
