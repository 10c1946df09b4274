"""The model card of an adapter directory."""

from typing import TYPE_CHECKING, Any

import transformers

from ..engine.base.peft import inner_model
from ..engine.base.tiny import NAME

if TYPE_CHECKING:
    from .mixin import WrappedModel

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

{parameters:,} parameters are trained, {share:.4%} of the base's.{beside}

```python
import reftnoise as rn
{load}
reft_model = rn.ReftModel.from_pretrained(model, "path/to/this/directory")
```
"""


def card(reft_model: "WrappedModel", base: str) -> str:
    """Markdown for an adapter of a base that is called `base`."""
    config = reft_model.reft_config
    rows = [entry.to_dict() for entry in config.representations]
    columns = ("intervention", "layer", "component", "positions", "low_rank_dimension")
    units, own, total = reft_model.count_parameters()
    beside = ""
    if config.peft is not None:
        beside = (
            f" Beside the units, it holds a method of PEFT ({config.peft['peft_type']}): "
            "`pip install 'reftnoise[peft]'`."
        )
    return _CARD.format(
        metadata=f"base_model: {base}\n" if base.count("/") == 1 else "",
        base=base or "a base model without a name",
        units="\n".join(f"| {' | '.join(str(row.get(c, '')) for c in columns)} |" for row in rows),
        parameters=units + own,
        share=(units + own) / total,
        beside=beside,
        load=_loading(inner_model(reft_model.model), base),
    )


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
        f'model = {loader}.from_pretrained("{name or "NAME"}"{labels})'
    )
