r"""Directions that detect a concept and steer towards it: ReFT-r1 (AxBench, arXiv:2501.17148).

$$a_t = \mathrm{ReLU}(h_t \cdot w + b)$$

detects. In training, $h_t + \overline{a}\,w$, where $\overline{a}$ is the mean of the k largest
activations of the row, has to predict the labels. In evaluation, $h_t + c\,a_{\max} w$ steers.
"""

import logging
from collections.abc import Sequence
from typing import ClassVar
from weakref import WeakSet

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from typing_extensions import Unpack

from .arguments import PyveneFields, reject_unknown
from .factors import Factors
from .formed import FormedIntervention
from .losses import AddsLoss, EditsRows
from .row_edits import outside_autocast

_logger = logging.getLogger(__name__)


class ReftR1Intervention(AddsLoss, EditsRows, FormedIntervention):
    r"""ReFT-r1: rank-1 directions $w$, each of which detects a concept and steers towards it.

    Training adds $\overline{a}\,w$ to the row's tokens, and the loss $\lambda_t$ times the mean
    over rows of $\frac1T \sum_t a_t$, without the k largest of the T activations. $\lambda_t$ grows
    linearly with the progress of the training. Before each step of an optimizer, w gets norm 1, and
    its gradient loses the part along w.

    Evaluation adds $c\,a_{\max} w$ to every token, where $a_{\max}$, the buffer `largest`, is the
    largest activation of all training passes, in all processes under DDP and FSDP2.

    Args:
        embed_dim: width of the hidden states, $d$.
        low_rank_dimension: number of concepts. With several, `subspaces` of a call or of the data
            say which of them a row has; without, it has all.
        topk: k, at most the row's tokens.
        sparsity: $\lambda$ at the end of the training.
        factor: c. AxBench tries 0.2 to 5.
        skip: number of tokens at the start of each row that training leaves out. Their activations
            are large whatever the text: 1 for a begin-of-text token, more for a chat template's.
        add_bias: whether b is trained; the authors' code leaves it at 0.
        dtype: dtype of the parameters, as a `torch.dtype` or its name.
        pyvene: as in `ReftIntervention`.

    Raises:
        ValueError: a number out of range.
        TypeError: an argument that no intervention has.

    Paper: AxBench (arXiv:2501.17148), section 3; w starts at 0.01 in each dimension, as there.
    """

    default_positions: ClassVar[str] = "all+decode"
    largest: Float[Tensor, " concepts"]
    missed_steps: int | None = 0
    """1 and the steps since the first pass with gradients; None once a step has trained w."""

    def __init__(
        self,
        *,
        embed_dim: int,
        low_rank_dimension: int = 1,
        topk: int = 8,
        sparsity: float = 0.005,
        factor: float = 1.0,
        skip: int = 1,
        add_bias: bool = False,
        dtype: torch.dtype | str = torch.float32,
        **pyvene: Unpack[PyveneFields],
    ) -> None:
        reject_unknown(type(self), pyvene)
        super().__init__(
            embed_dim=embed_dim, low_rank_dimension=low_rank_dimension, dtype=dtype, **pyvene
        )
        for name, value, least in (("topk", topk, 1), ("skip", skip, 0)):
            if type(value) is not int or value < least:
                raise ValueError(f"{name} {value!r}: expected an integer of at least {least}")
        if not isinstance(sparsity, int | float) or sparsity < 0:
            raise ValueError(f"sparsity {sparsity!r}: expected a number of at least 0")
        if not isinstance(factor, int | float):
            raise ValueError(f"factor {factor!r}: expected a number")
        if not isinstance(add_bias, bool):
            raise ValueError(f"add_bias {add_bias!r}: expected true or false")
        self.topk, self.sparsity, self.factor, self.skip = topk, sparsity, factor, skip
        self.add_bias = add_bias
        self.weight = nn.Parameter(
            torch.full((low_rank_dimension, embed_dim), 0.01, dtype=self.dtype)
        )
        bias = torch.zeros(low_rank_dimension, dtype=self.dtype)
        self.bias = nn.Parameter(bias) if add_bias else None
        self.register_buffer("largest", torch.zeros(low_rank_dimension, dtype=self.dtype))
        _UNITS.add(self)

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's
        _UNITS.add(self)

    def miss_step(self) -> None:
        """Count a step that does not train w, and warn if none ever does: w may then have any norm.

        Where weights are flattened, as by FSDP's first version and DeepSpeed, no optimizer has w.
        """
        if not self.missed_steps:  # no pass had gradients, or a step has trained w
            return
        self.missed_steps += 1
        if self.missed_steps == _MOST_MISSED:
            _logger.warning(
                "weight of %s: no step of an optimizer trains it by itself, so it is not kept at "
                "norm 1. FSDP's first version and DeepSpeed flatten weights: train with DDP or "
                "FSDP2",
                type(self).__name__,
            )

    def activations(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows concepts"]:
        r"""$\mathrm{ReLU}(Wh + b)$ of hidden states at the unit's site, before its edit.

        One product for all concepts. A text's score is the largest of its tokens', without the
        first `skip`.
        """
        wide = hidden.to(self.wide_dtype(hidden.dtype))
        with outside_autocast(hidden.device.type):
            bias = None if self.bias is None else self.bias.to(wide)
            return F.relu(F.linear(wide, self.weight.to(wide), bias))

    def row_delta(
        self,
        hidden: Float[Tensor, "batch tokens hidden"],
        edited: Bool[Tensor, "batch tokens"],
        gates: Float[Tensor, "batch concepts"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens hidden"], Float[Tensor, ""]]:
        counted = edited & (edited.cumsum(1) > self.skip)
        acts = self.activations(hidden).masked_fill(~counted[..., None], 0.0)
        count = counted.sum(1, keepdim=True)
        if gates is None:
            gates = acts.new_ones(len(acts), acts.shape[-1])
        gates = gates.to(acts)
        largest, places = acts.topk(min(self.topk, acts.shape[1]), dim=1)
        rest = acts.scatter(1, places, 0.0).sum(1) / count.clamp(min=1)
        strength = gates * largest.sum(1) / count.clamp(min=1, max=self.topk)
        is_eager = not torch.compiler.is_compiling()
        if is_eager and self.missed_steps == 0 and self.is_trained and torch.is_grad_enabled():
            self.missed_steps = 1
        with torch.no_grad():
            seen = (gates * largest[:, 0]).amax(0).to(self.largest)
            self.largest.copy_(torch.maximum(self.largest, seen))
        with outside_autocast(hidden.device.type):
            added = strength @ self.weight.to(strength)
        return added[:, None] * counted[..., None], (gates * rest).sum(1).mean()

    def added_loss(
        self, progress: Float[Tensor, ""], noted: Sequence[Tensor]
    ) -> Float[Tensor, ""] | None:
        if not noted:
            return None
        return self.sparsity * progress * torch.stack(list(noted)).mean()

    def parts(self) -> tuple[Tensor, ...]:
        return self.weight, self.factor * self.largest

    def form(self, *parts: Tensor) -> Factors:
        weight, strength = parts
        kinds = ((None, weight.shape[-2]),)
        return Factors(torch.zeros_like(weight), strength, weight, kinds, is_constant=True)


_UNITS: "WeakSet[ReftR1Intervention]" = WeakSet()

_MOST_MISSED = 8
"""Steps of optimizers that may belong to another model, such as a critic."""


@torch.no_grad()
def _before_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Set directions that a step trains to norm 1, and make their gradients orthogonal to them."""
    if not _UNITS:
        return
    of_weight = {id(unit.weight): unit for unit in _UNITS}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # In the order of the parameters, which is the same in all processes.
    trained = [of_weight[id(p)] for p in parameters if id(p) in of_weight and p.grad is not None]
    for unit in set(_UNITS).difference(trained):
        unit.miss_step()
    _join_largest([unit for unit in trained if unit.has_copies or _is_spread(unit.weight)])
    for unit in trained:
        weight = unit.weight
        unit.missed_steps = None
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        wide = wide / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        weight.copy_(wide)
        gradient = weight.grad
        assert gradient is not None
        along = (gradient * wide).sum(1, keepdim=True)
        gradient.copy_(gradient - along * wide)


def _is_spread(weight: Tensor) -> bool:
    """Whether all processes hold parts of a weight, as under FSDP2."""
    if not isinstance(weight, DTensor):
        return False
    return weight.device_mesh.size() == torch.distributed.get_world_size()


def _join_largest(units: Sequence[ReftR1Intervention]) -> None:
    """Set the largest activations to those of all processes, each of which has seen other rows."""
    if not units:
        return
    joined = torch.cat([unit.largest for unit in units])
    torch.distributed.all_reduce(joined, torch.distributed.ReduceOp.MAX)
    sizes = [len(unit.largest) for unit in units]
    for unit, largest in zip(units, joined.split_with_sizes(sizes), strict=True):
        unit.largest.copy_(largest)


register_optimizer_step_pre_hook(_before_step)
