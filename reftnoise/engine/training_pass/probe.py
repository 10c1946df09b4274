"""Find out on a base itself what a training pass may do: which shortcuts leave its results as they
are, and whether gradients pass its layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import ModelOutput

from ..base.running import alone
from ..base.threads import in_evaluation_mode
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
        with torch.no_grad(), alone(base), in_evaluation_mode(base):
            with base.base_model.register_forward_hook(lambda _, __, out: seen.append(out)):
                plain = base(input_ids=tokens, labels=tokens)
            if len(seen) == 1:
                states = PromptStates()
                no_head = _no_head(base, seen[0], plain, tokens)
                no_prefill = _no_prefill(base, states, plain, tokens)
                cached = [i for i, layer in enumerate(states.layers) if layer.is_initialized]
                return Abilities(type(seen[0]), no_head, no_prefill, max(cached, default=0))
        reason = f"{type(base).__name__} does not call its {base.base_model_prefix!r} once"
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


def check_gradients(base: PreTrainedModel) -> None:
    r"""Compare the backward pass of quantised linear layers, one of each kind, with their forward.

    Some quantised kernels have no backward pass and raise no error: the gradient then takes the
    residual stream alone. A linear layer f has one derivative J everywhere, with
    $J x = (f(x) - f(-x)) / 2$, so that
    $\langle x, J^\top J x \rangle = \lVert J x \rVert^2$.

    Raises:
        ValueError: the two differ by more than quantised activations explain.
    """
    if any(type(module).__module__.startswith("torch.distributed.") for module in base.modules()):
        return  # layers of shards have their weights during a pass alone
    for name, module in one_of_each_kind(base):
        width: Any = module.in_features
        tensors = (*module.parameters(), *module.buffers())
        device = next((t.device for t in tensors if t.device.type != "meta"), base.device)
        inputs = torch.arange(2 * width, device=device).sin()
        inputs = inputs.to(base.dtype).view(1, 2, width).requires_grad_()
        try:
            with torch.enable_grad(), torch.autocast(inputs.device.type, enabled=False):
                outputs = module.forward(inputs)
                change = (outputs - module.forward(-inputs.detach())).detach() / 2
            gradient = torch.zeros_like(inputs)
            if outputs.requires_grad:
                (flowing,) = torch.autograd.grad(outputs, inputs, change, allow_unused=True)
                gradient = gradient if flowing is None else flowing
        except Exception:
            continue  # a pass of the base raises it, too
        backward = (inputs.detach().float() * gradient.float()).sum()
        forward = change.float().square().sum()
        if (backward - forward).abs() > 0.2 * forward:
            weight = getattr(module, "weight", None)
            kind = "" if weight is None else f" of {type(weight).__name__}"
            raise ValueError(
                f"{name}: the backward pass of this {type(module).__name__}{kind} is not that of "
                "its forward pass, so gradients of units before it would be wrong: load the base "
                "with another backend, or other quantisation"
            )


def one_of_each_kind(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The first quantised linear layer of every class of layer and of weight."""
    seen: set[tuple[type, type]] = set()
    for name, module in base.named_modules():
        kind = (type(module), type(getattr(module, "weight", None)))
        if kind not in seen and _is_quantised(module):
            seen.add(kind)
            yield name, module


def _is_quantised(module: nn.Module) -> bool:
    """Whether a module is linear, with weights that are not simply numbers."""
    if not isinstance(getattr(module, "in_features", None), int) or any(module.children()):
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return True
    if type(weight).__module__.startswith("torch.distributed.") or weight.numel() == 0:  # a shard
        return False
    usual = weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return type(weight) not in (Tensor, nn.Parameter) or not usual
