"""Losses that TRL computes of hidden states and the head's weight.

Its fused head replaces a model's `forward` by a function that runs the decoder and the head by
itself. A `ReftModel` keeps that function and lends it to its base for the length of a pass, so that
it runs where the base's own forward would: inside PEFT's wrapper, and among our hooks. Distillation
calls `base_model`, which is an `EditedBackbone`.
"""

from collections.abc import Callable, Iterable, Mapping
from threading import get_ident
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..base.peft import inner_model
from ..base.running import replaced
from ..base.sites import Site


class EditedBackbone:
    """A base without its head, whose calls have the edits; other attributes are the backbone's own.

    With `logits_to_keep=k`, a call's prompts end with the token whose state is the first of the
    last k, since its logits predict the first token that counts. Without, they are the whole input.

    Args:
        backbone: the module of the base.
        edited: forward of the whole `ReftModel`.
    """

    def __init__(self, backbone: nn.Module, edited: Callable[..., Any]) -> None:
        self._backbone, self._edited = backbone, edited

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_backbone" not in vars(self):  # while it is copied
            raise AttributeError(name)
        return getattr(self._backbone, name)

    def __call__(self, *args: Any, logits_to_keep: int = 0, **inputs: Any) -> Any:
        """What the backbone puts out, with the edits of one pass of the `ReftModel`."""
        tokens = args[0] if args else inputs.get("input_ids", inputs.get("inputs_embeds"))
        if logits_to_keep and tokens is not None and "prompt_lengths" not in inputs:
            mask = args[1] if len(args) > 1 else inputs.get("attention_mask")
            mask = torch.ones(tokens.shape[:2], device=tokens.device) if mask is None else mask
            columns = mask.shape[1] - logits_to_keep + 1
            inputs["prompt_lengths"] = mask[:, :columns].sum(1).long()
        outputs: list[Any] = []
        caller = get_ident()

        def collect(_: nn.Module, __: Any, output: Any) -> Any:
            """Keep the output, and let the head read one token of it."""
            if get_ident() != caller:
                return output
            outputs.append(output)
            return type(output)(**(output | {"last_hidden_state": output[0][:1, :1]}))

        with self._backbone.register_forward_hook(collect):
            self._edited(*args, **inputs)
        return outputs[-1]


def has_fused_head(forward: Any) -> bool:
    """Whether a function, or one that it wraps, has TRL's argument `fused_lm_head`.

    Its code is asked: the signature that it shows is the one of the `forward` that it replaces.
    """
    while callable(forward):
        code = getattr(forward, "__code__", None)  # also of a bound method
        count = code.co_argcount + code.co_kwonlyargcount if code else 0
        if code and "fused_lm_head" in code.co_varnames[:count]:
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def expect_plain_head(base: PreTrainedModel, sites: Iterable[Site]) -> None:
    """Refuse edits that a fused head would leave out: it reads the head's weight and no more.

    Raises:
        ValueError: a unit's site is the head, or PEFT adapts it.
    """
    head: nn.Module | None = base.get_output_embeddings()
    edits = [f"the unit at {site}" for site in sites if site.module is head]
    if hasattr(head, "base_layer"):
        edits.append("PEFT's adapter on the head")
    if edits:
        raise ValueError(
            f"TRL takes log-probabilities from the weight of the head alone, so {edits[0]} would "
            "have no effect: leave it out"
        )


def call_fused(
    base: PreTrainedModel, function: Callable[..., Any], inputs: Mapping[str, Any]
) -> Any:
    """Call `base` with `function` as the forward of the model in it.

    Raises:
        ValueError: TRL has put its head on PEFT's wrapper as well.
    """
    inner = inner_model(base)
    if base is not inner and has_fused_head(vars(base).get("forward")):
        raise ValueError(
            "TRL was given the PEFT model under the units, perhaps as ref_model: its adapter is in "
            "training. Leave ref_model out, and TRL loads the base"
        )
    own = inner.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("fused_lm_head"):
            return function(inner, *args, **kwargs)
        return own(*args, **kwargs)  # for a pass within this one

    with replaced(inner, "forward", forward):
        return base(**inputs)
