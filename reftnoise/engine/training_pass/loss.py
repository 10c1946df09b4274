"""The loss at label positions alone, and logits only for those who read them.

Most of a language model's output is never looked at in training: logits at prompt and padding
positions have no label. Here the head and the cross-entropy run on the hidden states that predict
a label, in chunks, so that batch × length × vocabulary logits are never held.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from ..base.running import with_children

MAX_LOGITS = 2**24
"""Logits that the loss holds at a time: 64 MiB in fp32."""


class Head:
    """What a base computes after its decoder: logits, with its own head, scaling and capping.

    It is the base's own `forward` without the decoder, on a shallow copy, so the base itself is not
    touched and no architecture is known here.

    Args:
        base: model with the decoder under `base_model_prefix`, as in transformers.
        decoder_output: class of the decoder's output.
    """

    def __init__(self, base: PreTrainedModel, decoder_output: type[ModelOutput]) -> None:
        decoder = {base.base_model_prefix: _Identity(decoder_output)}
        self._model: Any = with_children(base, decoder)
        self._recorded = _RecordedLoss()
        self._model.loss_function = self._recorded
        self.vocabulary = int(base.config.get_text_config().vocab_size)

    def logits(self, hidden: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch vocabulary"]:
        """What the base makes of its decoder's output."""
        logits: Tensor = self._model.forward(inputs_embeds=hidden).logits
        return logits

    def summed_loss(
        self, hidden: Float[Tensor, "tokens hidden"], targets: Int[Tensor, " tokens"]
    ) -> Float[Tensor, ""]:
        """Cross-entropy, summed over tokens.

        Raises:
            ValueError: the base's loss is not what its `loss_function` returns.
        """
        output = self._model.forward(inputs_embeds=hidden[None], labels=targets[None])
        if not self._recorded.sums or output.loss is not self._recorded.sums.pop():
            raise ValueError("its loss is more than its loss_function")
        return output.loss

    def train(self) -> None:
        """Put the copy itself in training mode, and none of the base's modules."""
        self._model.training = True

    @property
    def is_trained(self) -> bool:
        """Whether the head itself has parameters to train."""
        return any(parameter.requires_grad for parameter in self._model.parameters())


class _RecordedLoss:
    """A model's `loss_function` that sums, and remembers what it returned."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []

    def __call__(self, logits: Tensor, labels: Tensor, *_: Any, **__: Any) -> Tensor:
        flat, targets = logits.flatten(0, -2).float(), labels.flatten().to(logits.device)
        self.sums.append(F.cross_entropy(flat, targets, reduction="sum"))
        return self.sums[-1]


class _Identity(nn.Module):
    """A decoder whose output is its input."""

    def __init__(self, output: type[ModelOutput]) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> ModelOutput:
        return self.output(last_hidden_state=inputs_embeds)


class _ChunkedLoss(torch.autograd.Function):
    """The summed loss of a frozen head. Each chunk's gradient is taken while its logits are held.

    So the backward pass needs one gradient of the hidden states and recomputes nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "tokens hidden"],
        targets: Int[Tensor, " tokens"],
        head: Head,
    ) -> Float[Tensor, ""]:
        size = max(1, MAX_LOGITS // head.vocabulary)
        total = hidden.new_zeros((), dtype=torch.float32)
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(hidden) if needs_gradient else None
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            with torch.set_grad_enabled(needs_gradient):
                leaf = hidden[chunk].detach().requires_grad_(needs_gradient)
                loss = head.summed_loss(leaf, targets[chunk])
            if gradient is not None:
                gradient[chunk] = torch.autograd.grad(loss, leaf)[0]
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gradients of gradients need the base's own loss: call the model with "
                "return_logits=True"
            )
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None


def label_loss(
    head: Head,
    hidden: Float[Tensor, "batch length hidden"],
    targets: Int[Tensor, "batch length"],
    num_items: Tensor | int | None = None,
) -> Float[Tensor, ""]:
    r"""$-\frac1N\sum_t \log p(y_t \mid h_t)$ over targets $y_t \ne -100$.

    Args:
        head: from hidden states to logits.
        hidden: output of the decoder.
        targets: token that each column predicts, or -100.
        num_items: N, by default the number of targets.
    """
    flat = targets.flatten().to(hidden.device)
    rows = (flat != -100).nonzero()[:, 0]
    targets = flat.index_select(0, rows)
    hidden = hidden.flatten(0, 1).index_select(0, rows)
    if head.is_trained:  # autograd needs the logits
        total = head.summed_loss(hidden, targets)
    else:
        total = _ChunkedLoss.apply(hidden, targets, head)  # type: ignore[no-untyped-call]  # torch's
    return mean_of(total, len(targets), num_items)


def mean_of(total: Tensor, count: int, num_items: Tensor | int | None) -> Float[Tensor, ""]:
    """A sum over so many targets as their mean, or divided by `num_items`."""
    if isinstance(num_items, Tensor):
        num_items = num_items.to(total.device)
    return total / (count if num_items is None else num_items)


def loss_and_logits(
    head: Head,
    hidden: Float[Tensor, "batch length hidden"],
    targets: Int[Tensor, "batch length"],
    num_items: Tensor | int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "labels vocabulary"]]:
    """`label_loss`, and the logits that it is computed of; arguments as there."""
    is_target = (targets != -100).to(hidden.device)
    logits = head.logits(hidden[is_target][None])[0]
    wanted = targets.to(logits.device)[is_target.to(logits.device)]
    total = F.cross_entropy(logits.float(), wanted, reduction="sum")
    return mean_of(total, len(wanted), num_items), logits


def targets_of(labels: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """The token that each column predicts: the label of the next column."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def logits_of(outputs: Any) -> Tensor:
    """The logits of outputs with a loss, which may be a tuple."""
    if not isinstance(outputs, tuple):
        logits: Tensor = outputs["logits"]
        return logits
    # After the loss, and what a base adds to it.
    return next(value for value in outputs if isinstance(value, Tensor) and value.dim() > 1)


def at_labels(outputs: Any, inputs: Mapping[str, Any]) -> Any:
    """Outputs whose logits are those that predict a label, [labels, vocabulary], row after row.

    Raises:
        ValueError: the inputs have no labels.
    """
    if (labels := inputs.get("labels")) is None:
        raise ValueError("return_logits 'labels': expected labels, too")
    logits = outputs.logits[:, -labels.shape[1] :]  # without those of PEFT's virtual tokens
    outputs["logits"] = logits[(targets_of(labels) != -100).to(logits.device)]
    return outputs


@contextlib.contextmanager
def without_logits(decoder: nn.Module, is_ours: Callable[[], bool]) -> Iterator[list[Tensor]]:
    """Within the block, the base's head sees one token; the decoder's last states are collected."""
    seen: list[Tensor] = []

    def narrow(_: nn.Module, __: Any, output: ModelOutput) -> ModelOutput:
        if not is_ours():
            return output
        seen.append(output.last_hidden_state)
        return type(output)(**(output | {"last_hidden_state": output[0][:1, :1]}))

    with decoder.register_forward_hook(narrow):
        yield seen


def with_lazy_logits(output: ModelOutput, logits: Callable[[], Tensor]) -> ModelOutput:
    """The same output, with logits that are computed on first access."""
    output.__class__ = _lazy(type(output))  # type: ignore[arg-type]  # transformers is untyped
    output.__dict__["_compute_logits"] = logits
    return output


class _LazyLogits:
    """Before an output class: a field `logits` that is computed when it is read in any way.

    The object then becomes one of the output class itself, and so does what is made by calling
    its class.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.__mro__[2](*args, **kwargs)

    def _become_plain(self: Any) -> Any:
        compute = self.__dict__.pop("_compute_logits")
        self.__class__ = type(self).__mro__[2]
        self["logits"] = compute()
        for field in fields(self):  # in the class's order
            if field.name in self.keys():
                self.move_to_end(field.name)
        return self

    @property
    def logits(self) -> Tensor:
        logits: Tensor = self._become_plain().logits
        return logits

    @logits.setter
    def logits(self: Any, value: Tensor | None) -> None:
        del self.__dict__["_compute_logits"]
        self.__class__ = type(self).__mro__[2]
        self.logits = value

    def __getitem__(self: Any, key: Any) -> Any:
        return self.loss if key in (0, "loss") else self._become_plain()[key]

    def __contains__(self, key: Any) -> bool:
        return key == "loss" or key in self._become_plain()


def _as_plain(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        return getattr(self._become_plain(), name)(*args)

    return method


for _name in (
    *("__iter__", "__len__", "__eq__", "__or__", "__repr__", "__reduce__", "__reduce_ex__"),
    *("keys", "values", "items", "get", "copy", "to_tuple"),
):
    setattr(_LazyLogits, _name, _as_plain(_name))


@functools.cache
def _lazy(output: type) -> type[ModelOutput]:
    return type(output.__name__, (_LazyLogits, output), {"__module__": output.__module__})
