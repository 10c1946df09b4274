"""Classifier-free guidance: both of its passes are the edited model's.

Guidance moves the scores away from those without the context: away from the last prompt token
alone, or a negative prompt. That is a prompt of its own, with positions of its own. transformers
would run it through the base in the midst of a generation: with the edits of the other prompt's
positions, or, once they have left the base, with none.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor

from .inputs import setting


def guidance(
    kwargs: Mapping[str, Any], own_config: Any, run: Callable[[dict[str, Any], Tensor], Any]
) -> UnbatchedClassifierFreeGuidanceLogitsProcessor | None:
    """The processor that takes the place of transformers' own; None where nothing is guided.

    Args:
        kwargs: of `generate`.
        own_config: the base's `generation_config`.
        run: a pass of the edited model, given its inputs and its rows' prompt lengths.
    """
    scale = setting("guidance_scale", kwargs, own_config)
    if scale is None or scale == 1:
        return None
    negative = kwargs.get("negative_prompt_ids")
    width = 1 if negative is None else negative.shape[1]

    def unconditional(input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> Any:
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        return run(inputs, attention_mask[:, :width].sum(1))

    return UnbatchedClassifierFreeGuidanceLogitsProcessor(
        scale,
        unconditional,
        unconditional_ids=negative,
        unconditional_attention_mask=kwargs.get("negative_prompt_attention_mask"),
        use_cache=setting("use_cache", kwargs, own_config) is not False,
    )
