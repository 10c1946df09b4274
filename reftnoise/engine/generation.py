"""One call of a base's `generate`, every pass of which edits the positions of its own prompt."""

from typing import Any

import torch
from torch import Tensor
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor

from .base.peft import virtual_tokens
from .layout import Batch, UnitLocations, cached_length
from .locations import has_columns
from .planning import Planner, expect_same_edits


@torch.no_grad()
def generate_edited(
    planner: Planner, kwargs: dict[str, Any], unit_locations: UnitLocations | None
) -> Any:
    """Generate with the base of `planner` and its units; `kwargs` are the base's own arguments.

    Raises:
        ValueError: as of `Planner.plans`; guidance with `unit_locations` or virtual tokens.
    """
    engine = planner.engine
    mask = _inferred_mask(planner, kwargs)
    if mask is not None:
        kwargs["attention_mask"] = mask
    _expect_all_tokens(kwargs)
    prompt = {n: v for n, v in kwargs.items() if n not in ("labels", "past_key_values")}
    plans = planner.plans(Batch.of(prompt, unit_locations=unit_locations))
    cache = kwargs.get("past_key_values")
    if past := cached_length(cache):
        expect_same_edits(cache, plans[0], past - virtual_tokens(engine.base))
    scale = _setting("guidance_scale", planner, kwargs)
    if scale not in (None, 1) and planner.stacks == (None,):
        if unit_locations is not None and has_columns(unit_locations):
            raise ValueError("guidance_scale: unit_locations tell no places in its other prompt")
        if virtual_tokens(engine.base):
            raise ValueError("guidance_scale: its other prompt would lack PEFT's virtual tokens")
        guidance = _guidance(scale, planner, kwargs, unit_locations)
        kwargs["logits_processor"] = [*(kwargs.get("logits_processor") or ()), guidance]
    drafts = ("assistant_model", "assistant_early_exit")
    is_assisted = any(_setting(name, planner, kwargs) is not None for name in drafts)
    with engine.running(*plans, is_generation=True, is_assisted=is_assisted):
        return engine.base.generate(**kwargs)


def _expect_all_tokens(kwargs: dict[str, Any]) -> None:
    """Raise a ValueError for new tokens alone beside a cache: they do not tell the prompt."""
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if ids is None or not isinstance(mask, Tensor) or mask.ndim != 2:
        return
    if cached_length(kwargs.get("past_key_values")) and mask.shape[1] > ids.shape[1]:
        raise ValueError(
            f"input_ids of {ids.shape[1]} tokens, attention_mask of {mask.shape[1]}: with a cache, "
            "generate takes all tokens, cached ones included"
        )


def _inferred_mask(planner: Planner, kwargs: dict[str, Any]) -> Tensor | None:
    """The mask that `generate` would infer from padding, so that both see the same one."""
    ids = kwargs.get("input_ids")
    if ids is None or kwargs.get("attention_mask") is not None or planner.stacks != (None,):
        return None
    pad, eos = (_setting(name, planner, kwargs) for name in ("pad_token_id", "eos_token_id"))
    ends = torch.as_tensor(-1 if eos is None else eos).flatten().tolist()
    if pad is None or pad in ends or ids.is_floating_point():
        return None
    mask: Tensor = ids.ne(pad).long()
    return mask


def _guidance(
    scale: float, planner: Planner, kwargs: dict[str, Any], unit_locations: UnitLocations | None
) -> UnbatchedClassifierFreeGuidanceLogitsProcessor:
    """Classifier-free guidance, in the place of transformers' own, with edits in both its passes.

    Guidance moves the scores away from those without the context: away from the last prompt token
    alone, or a negative prompt. That is a prompt of its own, with positions of its own.
    transformers would run it through the base in the midst of a generation: with the edits of the
    other prompt's positions, or, once they have left the base, with none.
    """
    negative = kwargs.get("negative_prompt_ids")
    width = 1 if negative is None else negative.shape[1]

    def unconditional(input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> Any:
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        lengths = attention_mask[:, :width].sum(1)
        plans = planner.plans(Batch.of(inputs, lengths, unit_locations))
        with planner.engine.running(*plans, is_generation=True):
            return planner.engine.base(**inputs)

    return UnbatchedClassifierFreeGuidanceLogitsProcessor(
        scale,
        unconditional,
        unconditional_ids=negative,
        unconditional_attention_mask=kwargs.get("negative_prompt_attention_mask"),
        use_cache=_setting("use_cache", planner, kwargs) is not False,
    )


def _setting(name: str, planner: Planner, kwargs: dict[str, Any]) -> Any:
    """A setting of `generate`: transformers fills what such a config leaves open."""
    config, own = kwargs.get("generation_config"), planner.engine.base.generation_config
    values = (kwargs.get(name), getattr(config, name, None), getattr(own, name, None))
    return next((value for value in values if value is not None), None)
