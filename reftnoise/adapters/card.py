"""The model card of an adapter directory."""

import json
import re
from typing import Any

import transformers

from ..config.representations import ReftConfig
from ..engine.base.tiny import NAME

_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)

_CARD = """\
---
{metadata}library_name: reftnoise
tags:
- reft
---
# A reftnoise adapter

Hidden-state edits (ReFT) for `{base}`; `reft_config.json` says everything about them.

| unit | layer | component | positions | rank |
|---|---|---|---|---|
{units}

{parameters:,} parameters are trained, {share:.4%} of the base's.{peft_note}

```python
import reftnoise as rn
{load}
reft_model = rn.ReftModel.from_pretrained(model, "path/to/this/directory")
```
"""


def card(config: ReftConfig, *, base: Any, name: str, trained: int, total: int) -> str:
    """The model card in Markdown, with numbers of parameters; the base's name may be empty."""
    rows = [
        ({} if entry.is_noise else {"positions": entry.positions}) | entry.to_dict()
        for entry in config.representations
    ]
    columns = ("intervention", "layer", "component", "positions", "low_rank_dimension")
    peft_note = ""
    if config.peft is not None:
        peft_note = (
            f" With the units, it holds a method of PEFT ({config.peft['peft_type']}): "
            "`pip install 'reftnoise[peft]'`."
        )
    return _CARD.format(
        metadata=f"base_model: {name}\n" if _ON_HUB.fullmatch(name) else "",
        base=_in_line(name) or "a base model without a name",
        units="\n".join(
            f"| {' | '.join(_in_line(row.get(c, '')) for c in columns)} |" for row in rows
        ),
        parameters=trained,
        share=trained / total,
        peft_note=peft_note,
        load=_loading(base, name),
    )


def _in_line(value: Any) -> str:
    """A value as text that ends neither a line, nor code, nor the cell of a table."""
    return " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")


def _loading(base: Any, name: str) -> str:
    """Code that makes `model`, the base."""
    if name == NAME:
        return "\nmodel, tokenizer = rn.load_tiny_model()"
    own = type(base).__name__
    auto = f"AutoModelFor{own.partition('For')[2]}"
    loader = next(
        (n for n in (auto, own) if n != "AutoModelFor" and hasattr(transformers, n)), "AutoModel"
    )
    labels = f", num_labels={base.config.num_labels}" if "Classification" in loader else ""
    return (
        f"from transformers import {loader}\n\n"
        f"model = {loader}.from_pretrained({json.dumps(name or 'NAME')}{labels})"
    )
