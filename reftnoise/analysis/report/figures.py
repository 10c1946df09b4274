"""Pictures: drawn once for light and once for dark pages, without pyplot's global state."""

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from typing_extensions import ParamSpec

from .page import Picture

try:
    from cycler import cycler
    from matplotlib import font_manager, style
    from matplotlib.axes import Axes
    from matplotlib.colors import to_rgba
    from matplotlib.figure import Figure
    from matplotlib.ft2font import FT2Font
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
except ModuleNotFoundError:
    raise ValueError("a report needs matplotlib: pip install 'reftnoise[plots]'") from None

P = ParamSpec("P")

DPI = 240
WIDTH = 5.0
"""Inches; in CSS pixels, 96 times as many."""


def _theme(text: str, ground: str, line: str, series: Sequence[str]) -> dict[str, Any]:
    colored = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), text
    )
    return {
        **colored,
        "font.size": 10,
        "text.parse_math": False,
        "axes.unicode_minus": True,
        "figure.facecolor": ground,
        "axes.facecolor": ground,
        "savefig.facecolor": ground,
        "axes.edgecolor": line,
        "grid.color": line,
        "grid.alpha": 0.6,
        "legend.edgecolor": line,
        "legend.facecolor": ground,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.prop_cycle": cycler(color=series),
    }


# Okabe and Ito's colours, which colour-blind readers can tell apart; lighter ones on black.
_LIGHT = _theme("#1f2328", "#ffffff", "#d1d9e0", ["#0072b2", "#d55e00", "#009e73", "#aa4499"])
_DARK = _theme("#e6edf3", "#0d1117", "#3d444d", ["#56b4e9", "#e69f00", "#33c9a0", "#ee99cc"])


def picture(
    name: str, about: str, draw: Callable[P, Figure], *args: P.args, **kwargs: P.kwargs
) -> Picture:
    """Draw a figure in both themes: what `draw` makes of the further arguments."""
    pngs, width = [], 0.0
    for theme in (_LIGHT, _DARK):
        with style.context(["default", theme]):
            figure = draw(*args, **kwargs)
            stream = io.BytesIO()
            figure.savefig(stream, format="png", dpi=DPI)
        pngs.append(stream.getvalue())
        width = figure.get_figwidth()
    return Picture(name, about, pngs[0], pngs[1], round(96 * width))


def new_axes(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure with one set of axes; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def draw_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]], label: str, *, may_be_log: bool = False
) -> Figure:
    """Lines of (step, value), on a logarithmic scale if it may be and values differ 20-fold."""
    figure, axes = new_axes(2.9)
    for (name, line), style in zip(lines.items(), ("o-", "s--"), strict=False):
        size = 4 if len(line) <= 40 else 0
        axes.plot(*zip(*line, strict=True), style, markersize=size, label=name)
    finite = [value for line in lines.values() for _, value in line if math.isfinite(value)]
    if may_be_log and finite and min(finite) > 0 and max(finite) > 20 * min(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # several, also in a decade
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif finite and min(finite) >= 0:
        axes.set_ylim(0, max(finite) * 1.05 or None)  # room for the marker at the top
    axes.set(xlabel="step", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.grid(axis="y")
    if len(lines) > 1:
        axes.legend()
    return figure


def draw_noise(losses: Mapping[str, tuple[float, Sequence[float]]]) -> Figure:
    """For each model, its loss without noise as a diamond and each draw's loss as a dot."""
    figure = Figure(figsize=(WIDTH, 0.7 + 1.0 * len(losses)), layout="constrained")
    grid: Any = figure.subplots(len(losses), 1, squeeze=False)  # losses may be far apart
    for axes, (name, (clean, noisy)) in zip(grid[:, 0], losses.items(), strict=True):
        dots = axes.scatter(noisy, _spread(0, len(noisy)), s=24, facecolors="none", edgecolors="C1")
        diamond = axes.scatter([clean], [0], s=55, marker="D", color="C0", zorder=3)
        axes.set_yticks([0], [name])
        axes.set_ylim(0.5, -0.5)
        axes.margins(x=0.1)
        axes.grid(axis="x")
    grid[-1, 0].set_xlabel("loss")
    figure.legend([diamond, dots], ["without noise", "with noise, a dot a draw"], frameon=False,
                  loc="outside upper left", ncols=2)  # fmt: skip
    return figure


def _spread(row: int, count: int) -> list[float]:
    """Heights around a row, so that equal values do not cover each other."""
    return [row + 0.3 * ((2 * n + 1) / count - 1) for n in range(count)]


def draw_heat(norms: Any, sites: Sequence[str], tokens: Sequence[str]) -> Figure:
    """‖edit‖ / ‖h‖: a row for each token, the first at the top, and a column for each site.

    It is as wide as other figures, however many tokens there are, so that a phone shows all of it.
    """
    is_short = len(tokens) <= 48
    label, names = common_label(sites)
    is_long = max(map(len, names)) > 3
    height = (2.4 if is_long else 1.5) + (0.2 * len(tokens) if is_short else 7.5)
    figure, axes = new_axes(height)
    image = axes.imshow(norms.T, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
    step = max(1, math.ceil(len(names) / 16))
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=90 if is_long else 0)
    axes.set_xlabel(label)
    if is_short:
        axes.set_yticks(range(len(tokens)), [printable(token) for token in tokens])
    else:
        axes.set_ylabel("token of the prompt")
    _add_scale(figure, axes, image, "‖edit‖ / ‖h‖", location="top")
    return figure


def _add_scale(figure: Figure, axes: Axes, image: Any, label: str, location: str = "right") -> None:
    """Put the scale of an image's colours next to it, and remove the lines around it."""
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, label=label, pad=0.02, aspect=30, location=location)
    bar.outline.set_visible(False)


def draw_cosines(cosines: Mapping[str, float], chance: float) -> Figure:
    """The mean squared cosine of each site, and a line for random subspaces."""
    label, names = common_label(list(cosines))
    is_long = max(map(len, names)) > 3
    figure, axes = new_axes(3.6 if is_long else 2.7, max(WIDTH, 1.2 + 0.16 * len(names)))
    places = range(len(names))
    axes.bar(places, list(cosines.values()), color="C0", width=0.7)
    axes.axhline(chance, color="C1", linestyle="--", label=f"random subspaces: {chance:.3f}")
    step = max(1, math.ceil(len(names) / 32))
    axes.set_xticks(places[::step], names[::step])
    if is_long:
        axes.tick_params(axis="x", rotation=90)
    axes.set(xlabel=label, ylabel="mean cos² θ", ylim=(0, 1.02))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper left", frameon=False)
    return figure


def draw_overlaps(names: Sequence[str], overlaps: Any) -> Figure:
    """A matrix whose cells say how alike two adapters are; – where that is NaN."""
    count, texts = len(names), [printable(name, 24) for name in names]
    has_numbers = count <= 12
    side = max(1.5, (0.5 if has_numbers else 0.25) * count)
    room = 0.25 + 0.08 * max(map(len, texts))  # for names below and on the left
    figure, axes = new_axes(side + room, side + room + 0.9)
    image = axes.imshow(overlaps, cmap="cividis", vmin=0, vmax=1)
    axes.set_xticks(range(count), texts, rotation=90)
    axes.set_yticks(range(count), texts)
    for row, column in product(range(count), repeat=2) if has_numbers else ():
        value = float(overlaps[row, column])
        is_known = math.isfinite(value)
        colour = ("black" if value > 0.5 else "white") if is_known else None
        shown = f"{value:.2f}" if is_known else "–"
        axes.text(column, row, shown, ha="center", va="center", color=colour)
    _add_scale(figure, axes, image, "mean cos² θ")
    return figure


def draw_heads(norms: Any, chosen: Sequence[tuple[int, int]]) -> Figure:
    """How much heads are scaled: a row for each layer, the first at the top; a dot if chosen."""
    layers, heads = norms.shape
    figure, axes = new_axes(1.4 + max(1.0, min(7.0, 0.2 * layers)))
    image = axes.imshow(norms, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
    if chosen:
        rows, columns = zip(*chosen, strict=True)
        axes.scatter(columns, rows, s=22, color="white", edgecolors="black", linewidth=0.8)
    axes.set(xlabel="head (a dot: chosen)" if chosen else "head", ylabel="layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.set(xlim=(-0.5, heads - 0.5), ylim=(layers - 0.5, -0.5))
    _add_scale(figure, axes, image, "‖A‖ of a head", location="top")
    return figure


def draw_panels(
    panels: Mapping[str, Sequence[tuple[str, float, Sequence[float]]]],
    label: str,
    *,
    is_difference: bool,
) -> Figure:
    """A panel for each dataset, with a row for each combination.

    A row is (name, mean, values). The values of a difference are the ends of its interval; 0 is
    marked, and the dot is open where the interval holds it. Other values are those of seeds, and
    the mean is a bar through them.
    """
    rows = {name: max(1, len(panel)) for name, panel in panels.items()}
    height = sum(0.36 * count + 0.75 for count in rows.values())
    figure = Figure(figsize=(WIDTH + 0.4, height + 0.3), layout="constrained")
    grid: Any = figure.subplots(
        len(panels), 1, squeeze=False, sharex=is_difference,
        gridspec_kw={"height_ratios": [count + 1.2 for count in rows.values()]},
    )  # fmt: skip
    for axes, (title, panel) in zip(grid[:, 0], panels.items(), strict=True):
        for row, (_, mean, values) in enumerate(panel):
            if is_difference:
                axes.plot(list(values), [row, row], color="C0", linewidth=2)
                is_open = values[0] <= 0 <= values[1]
                axes.plot(mean, row, "o", color="C0", markersize=7, markeredgewidth=2,
                          markerfacecolor=axes.get_facecolor() if is_open else None)  # fmt: skip
            else:
                axes.scatter(list(values), _spread(row, len(values)), s=26,
                             facecolors="none", edgecolors="C0")  # fmt: skip
                axes.plot([mean] * 2, [row - 0.33, row + 0.33], color="C1", linewidth=2.5)
        if is_difference:
            axes.axvline(0, color="C1", linestyle="--", linewidth=1.2, zorder=0)
        names = [textwrap.fill(name, 28) for name, _, _ in panel]
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(panel) - 0.5, -0.5)
        axes.set_title(title)
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
    grid[-1, 0].set_xlabel(label)
    return figure


def draw_steering(results: Mapping[str, Any]) -> Figure:
    """The largest shift of each method by layer, and the curve of the chosen vector."""
    figure = Figure(figsize=(2 * WIDTH, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_shifts(left, results["tried"])
    _draw_curve(right, results)
    return figure


def _draw_shifts(axes: Axes, tried: Sequence[Mapping[str, Any]]) -> None:
    methods = dict.fromkeys(row["method"] for row in tried)
    for color, method in enumerate(methods):
        best: dict[int, float] = {}
        for row in tried:
            if row["method"] == method:
                best[row["layer"]] = max(row["shift"], best.get(row["layer"], -1.0))
        axes.plot([*best], [*best.values()], marker="osD"[color % 3], markersize=4,
                  color=f"C{color}", label=method)  # fmt: skip
    axes.axhline(0, color=axes.spines["left"].get_edgecolor(), linewidth=1, zorder=0)
    axes.set(xlabel="layer", ylabel="shift at the best size")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("By layer, whatever the KL")
    axes.legend(frameon=False)
    axes.grid(axis="y")


def _draw_curve(axes: Axes, results: Mapping[str, Any]) -> None:
    chosen, budget = results["chosen"], results["budget"]
    curve = results["curve"]
    _draw_points(axes, curve, "C0", "o", "pairs to choose by")
    axes.plot([p["kl"]["mean"] for p in curve], [p["shift"]["mean"] for p in curve], color="C0")
    _draw_points(axes, [results["test"]], "C1", "D", "held-out test")
    for point in curve:
        place = (point["kl"]["mean"], point["shift"]["mean"])
        axes.annotate(f"{point['size']:.2g}", place, xytext=(5, -11), textcoords="offset points")
    axes.axvline(budget, color="C3", linestyle="--", linewidth=1.2, label=f"budget {budget:g}")
    axes.axhline(0, color=axes.spines["left"].get_edgecolor(), linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel="KL from the base on neutral prompts, nats per token", ylabel="shift")
    axes.set_title(
        f"{chosen['method']} at layer {chosen['layer']}, chosen: {chosen['size']:.2g} ‖h‖"
    )
    axes.legend(frameon=False, loc="upper left")
    axes.grid(axis="y")


def _draw_points(
    axes: Axes, points: Sequence[Mapping[str, Any]], color: str, marker: str, label: str
) -> None:
    """Means with their intervals in both directions."""
    means = {name: np.array([p[name]["mean"] for p in points]) for name in ("kl", "shift")}
    errors = {
        name: np.abs([[p[name][end] for p in points] for end in ("low", "high")] - means[name])
        for name in means
    }
    axes.errorbar(means["kl"], means["shift"], xerr=errors["kl"], yerr=errors["shift"], fmt=marker,
                  color=color, markersize=5, elinewidth=1, label=label)  # fmt: skip


def common_label(sites: Sequence[str]) -> tuple[str, list[str]]:
    """What to call sites, and the parts of their dotted names that tell them apart.

    `model.layers.0.output`, `model.layers.1.output` → `layer`, [`0`, `1`].
    """
    parts = [site.split(".") for site in sites]
    if len(parts) < 2 or len({len(part) for part in parts}) > 1:
        return "site", list(sites)
    differing = [n for n, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
    first, last = differing[0], differing[-1] + 1
    names = [".".join(part[first:last]) for part in parts]
    return ("layer" if all(name.isdecimal() for name in names) else "site"), names


def draw_tokens(texts: Sequence[Sequence[tuple[str, float, str]]], columns: int = 88) -> Figure:
    """Texts, a line of letters below the other, on a ground that is darker at larger values."""
    placed, row = list[tuple[str, float, int, int]](), 0
    for pieces in texts:
        column = 0
        for piece, share, _ in pieces:
            for number, part in enumerate(piece.split("\n")):
                if number or column + len(part) > columns:
                    row, column = row + 1, 0
                placed.append((part, share, row, column))
                column += len(part)
        row += 2
    columns = max(column + len(text) for text, _, _, column in placed)
    width, height = 0.0825 * columns, 0.24 * max(row - 1, 1)
    figure = Figure(figsize=(width + 0.2, height + 0.2))
    axes = figure.add_axes((0.1 / (width + 0.2), 0.1 / (height + 0.2), width / (width + 0.2),
                            height / (height + 0.2)))  # fmt: skip
    axes.set(xlim=(0, columns), ylim=(max(row - 1, 1), 0))
    axes.axis("off")
    texts_of, shares, lines, starts = zip(*placed, strict=True)
    grounds = [to_rgba("C1", 0.75 * share) for share in shares]
    axes.barh([line + 0.5 for line in lines], list(map(len, texts_of)), 0.9, left=starts,
              color=grounds)  # fmt: skip
    by_line = dict[int, str]()  # a text for each letter would take seconds
    for text, line in zip(texts_of, lines, strict=True):
        by_line[line] = by_line.get(line, "") + _drawable(text, _MONO)
    for line, text in by_line.items():
        axes.text(0, line + 0.55, text, family=_MONO, fontsize=_MONO_SIZE, va="center",
                  parse_math=False)  # fmt: skip
    return figure


_MONO = "DejaVu Sans Mono"
_MONO_SIZE = 0.0825 * 72 / 0.602
"""At which a letter, 0.602 of its height, is as wide as a column."""


@cache
def _glyphs(family: str = "DejaVu Sans") -> set[int]:
    return set(FT2Font(font_manager.findfont(family)).get_charmap())


def _drawable(text: str, family: str = "DejaVu Sans") -> str:
    """A text in which letters that a font lacks are □."""
    return "".join(letter if ord(letter) in _glyphs(family) else "□" for letter in text)


def printable(token: str, longest: int = 14) -> str:
    """A token as a label: blanks are visible, letters that the font lacks are □, the end is cut."""
    text = token.replace("\n", "↵").replace("\t", "→").replace(" ", "·")
    text = _drawable(text)
    return text if len(text) <= longest else text[: longest - 1] + "…"
