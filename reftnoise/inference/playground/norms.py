"""Edit norms as a table of colours: a row for each site, a column for each token."""

from html import escape
from math import isfinite

from .asking import Norms

STYLE = """
.norms { direction: rtl; overflow-x: auto; padding-bottom: .3rem; } /* begins at its end */
.norms > * { direction: ltr; }
.norms p { margin: .2rem 0; font-size: .8rem; }
.norms table { margin: 0 auto 0 0; border: 0; border-collapse: separate; border-spacing: 1px;
  font-size: .72rem; }
.norms tr, .norms th, .norms td { border: 0; padding: 0; background: none; font-weight: normal; }
.norms tbody td { min-width: .85rem; height: .95rem; }
.norms tbody tr:first-child td.new { box-shadow: 0 -2px #0072b2; }
.norms th { position: sticky; left: 0; z-index: 1; padding-right: .4rem; text-align: right;
  white-space: nowrap; background: var(--body-background-fill); }
.norms thead td { padding-bottom: 3px; vertical-align: bottom; }
.norms span { display: block; margin: 0 auto; max-height: 5rem; overflow: hidden;
  line-height: .85rem; white-space: pre; writing-mode: vertical-rl; transform: rotate(180deg); }
"""

ABOUT = (
    "Colours tell how far edits move hidden states, ‖Δh‖ / ‖h‖: a row for each site, a column for "
    "each token; those under a blue line are the answer's."
)


def draw(norms: Norms | None) -> str:
    """HTML; each cell also says its site, token and number."""
    if norms is None:
        return '<div class="norms"><p>No edits.</p></div>'
    top = float(norms.values.nan_to_num(0, 0).max()) or 1.0
    head = "".join(f"<td><span>{escape(token)}</span></td>" for token in norms.tokens)
    rows = "".join(
        f"<tr><th>{escape(_short(site))}</th>{_cells(norms, site, values, top)}</tr>"
        for site, values in zip(norms.sites, norms.values.tolist(), strict=True)
    )
    return (
        f'<div class="norms"><p>‖Δh‖ / ‖h‖ up to {top:.3g}</p>'
        f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cells(norms: Norms, site: str, values: list[float], top: float) -> str:
    cells = []
    for index, (token, value) in enumerate(zip(norms.tokens, values, strict=True)):
        kind = ' class="new"' if index >= norms.prompt else ""
        share = round(100 * value / top) if isfinite(value) else 100
        color = f"color-mix(in srgb, #d55e00 {share}%, rgb(128 128 128 / .15))"
        about = escape(f"{site}, {token!r}: {value:.3g}")
        cells.append(f'<td{kind} style="background: {color}" title="{about}"></td>')
    return "".join(cells)


def _short(site: str) -> str:
    """`model.layers.3.output` → `layers.3`."""
    return site.removesuffix(".output").removeprefix("model.")
