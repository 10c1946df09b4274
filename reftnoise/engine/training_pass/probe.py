"""Find out on a base itself, with a few tokens, which shortcuts leave its results as they are."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import ModelOutput

from ..base.running import alone
from .loss import Head
from .split import PromptStates

TOKENS = 8


@dataclass(frozen=True)
class Abilities:
    """What a base allows; for what it does not, the reason."""

    decoder_output: type[ModelOutput] = ModelOutput
    no_head: str | None = None
    """Why its loss cannot be computed from its decoder's output."""
    no_prefill: str | None = None
    """Why a pass cannot be continued from a cache of keys and values."""
    last_cached: int = 0
    """The last layer that has keys and values of its own."""


def probe(base: PreTrainedModel) -> Abilities:
    """Run the base plainly and in other ways, without gradients and dropout, and compare."""
    if base.base_model is base:
        reason = f"{type(base).__name__} has no decoder apart from its head"
        return Abilities(no_head=reason, no_prefill=reason)
    tokens = torch.arange(TOKENS, device=base.device)[None]
    seen: list[ModelOutput] = []
    try:
        with torch.no_grad(), alone(base):
            base.eval()
            hook = base.base_model.register_forward_hook(lambda _, __, out: seen.append(out))
            try:
                plain = base(input_ids=tokens, labels=tokens)
            finally:
                hook.remove()
            if len(seen) != 1:
                reason = f"{type(base).__name__} does not call its {base.base_model_prefix!r} once"
                return Abilities(no_head=reason, no_prefill=reason)
            states = PromptStates()
            return Abilities(
                type(seen[0]),
                _no_head(base, seen[0], plain, tokens),
                _no_prefill(base, states, plain, tokens),
                max(
                    (i for i, layer in enumerate(states.layers) if layer.is_initialized), default=0
                ),
            )
    except Exception as error:  # of whatever model this is
        reason = f"{type(base).__name__} failed on {TOKENS} tokens: {error}"
        return Abilities(no_head=reason, no_prefill=reason)


def _no_head(
    base: PreTrainedModel, decoded: ModelOutput, plain: ModelOutput, tokens: Tensor
) -> str | None:
    try:
        head = Head(base, type(decoded))
        hidden = decoded.last_hidden_state
        head.train()  # the loss may be another one then, which is noticed
        loss = head.summed_loss(hidden[0, :-1], tokens[0, 1:]) / (TOKENS - 1)
        same = _close(head.logits(hidden), plain.logits) and _close(loss, plain.loss)
    except Exception as error:
        return f"{type(base).__name__}: {error}"
    return None if same else f"{type(base).__name__} has a head or loss of its own kind"


def _no_prefill(
    base: PreTrainedModel, states: PromptStates, plain: ModelOutput, tokens: Tensor
) -> str | None:
    half = TOKENS // 2
    if scaling := _rope_that_depends_on_length(base):
        return f"{type(base).__name__} has {scaling} position embeddings, which depend on length"
    problem = f"{type(base).__name__} does not keep all it needs in a cache"
    try:
        base(input_ids=tokens[:, :half], past_key_values=states, use_cache=True)
        kept = all(isinstance(layer, DynamicLayer) for layer in states.layers)
        rest = base(input_ids=tokens[:, half:], past_key_values=states, use_cache=True).logits
        if kept and states.get_seq_length() == TOKENS and _close(rest, plain.logits[:, half:]):
            return None
    except Exception as error:
        problem = f"{type(base).__name__} cannot continue from a cache: {error}"
    cache = plain.get("past_key_values", plain.get("cache_params"))
    for layer in getattr(cache, "layers", ()):
        if not isinstance(layer, DynamicLayer):
            kind = type(layer).__name__
            return f"{type(base).__name__} keeps states ({kind}) next to keys and values"
    return problem


def _rope_that_depends_on_length(base: nn.Module) -> str | None:
    for module in base.modules():
        kinds = getattr(module, "rope_type", None)  # a name, or one per kind of layer
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind in ("dynamic", "longrope"):
                return str(kind)
    return None


def _close(actual: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    actual, expected = actual.float(), expected.float()
    return bool((actual - expected).abs().amax() <= tolerance * expected.abs().amax())


def is_random(base: PreTrainedModel) -> bool:
    """Whether the base, in its modes of now, gives two outputs for an input: dropout, jitter."""
    tokens = torch.arange(TOKENS, device=base.device).repeat(TOKENS, 1)
    device = base.device.type
    places = {p.device.index for p in base.parameters() if p.device.type == device}
    indices = [] if device == "cpu" else sorted(i for i in places if i is not None)
    kind = "cuda" if device == "cpu" else device
    with torch.no_grad(), alone(base), torch.random.fork_rng(indices, device_type=kind):
        first, second = (base(input_ids=tokens).logits for _ in range(2))
    return not torch.equal(first, second)
