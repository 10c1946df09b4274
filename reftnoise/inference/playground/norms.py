"""Edit norms as a table of colours: a row for each site, a column for each token."""

from html import escape
from math import isfinite

from .asking import Answer

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
    "The colours show how far edits move hidden states, ‖Δh‖ / ‖h‖, with a row for each site and a "
    "column for each token. The columns under the blue line are those of the answer."
)


def draw(answer: Answer) -> str:
    """HTML; each cell also has its site, token and number as a title."""
    if answer.norms is None:
        return '<div class="norms"><p>No edits.</p></div>'
    sites, tokens, norms = answer.norms.sites, answer.norms.tokens, answer.norms.norms
    top = float(norms.nan_to_num(0, 0).max()) or 1.0
    kinds = [' class="new"' if n >= answer.prompt_length else "" for n in range(len(tokens))]

    def cell(site: str, token: str, kind: str, value: float) -> str:
        share = round(100 * value / top) if isfinite(value) else 100
        color = f"color-mix(in srgb, #d55e00 {share}%, rgb(128 128 128 / .15))"
        about = escape(f"{site}, {token!r}: {value:.3g}")
        return f'<td{kind} style="background: {color}" title="{about}"></td>'

    head = "".join(f"<td><span>{escape(token)}</span></td>" for token in tokens)
    rows = ""
    for site, values in zip(sites, norms.tolist(), strict=True):
        name = site.removesuffix(".output").removeprefix("model.")
        cells = (cell(site, *column) for column in zip(tokens, kinds, values, strict=True))
        rows += f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>"
    return (
        f'<div class="norms"><p>‖Δh‖ / ‖h‖ up to {top:.3g}</p>'
        f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
