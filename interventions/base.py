"""What an intervention is: a pyvene module that maps hidden states to edited hidden states.

Two kinds live here. A `ReftIntervention` is trained and edits chosen positions; a
`NoiseIntervention` has no parameters and perturbs every position while training. Both are true
pyvene interventions, so each also works inside a `pyvene.IntervenableModel`.
"""

import contextlib
import functools
import io
from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeGuard

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import Unpack

from .arguments import (
    NoiseFields,
    PyreftFields,
    activation_module,
    as_dtype,
    constructor_arguments,
    dtype_name,
    reject_unknown,
)
from .factors import Activation, Factors
from .gates import gate_of
from .kept import KeepsForEvaluation
from .own_forward import RowSubspaces, own_edit
from .row_edits import RowEdit, outside_autocast

# pyvene announces on stdout that an optional backend is missing; importing us prints nothing.
with contextlib.redirect_stdout(io.StringIO()):
    from pyvene import (
        CollectIntervention,
        DistributedRepresentationIntervention,
        Intervention,
        LocalistRepresentationIntervention,
        SourcelessIntervention,
        TrainableIntervention,
    )


def is_intervention(cls: type) -> bool:
    """Whether a class is an intervention of pyvene, as all of ours are."""
    return issubclass(cls, Intervention)


def is_edit(cls: type) -> bool:
    """Whether a class is such an intervention, and does not only collect hidden states."""
    return issubclass(cls, Intervention) and not issubclass(cls, CollectIntervention)


def _drop_pyvene_buffers_from_state(module: nn.Module) -> None:
    # pyvene keeps the width as two buffers; they are configuration, not state to be saved.
    for name in ("embed_dim", "interchange_dim"):
        if isinstance(buffer := getattr(module, name), Tensor):
            module.register_buffer(name, buffer, persistent=False)


class ReftIntervention(
    SourcelessIntervention, TrainableIntervention, DistributedRepresentationIntervention, ABC
):
    r"""An edit of hidden states: $h \mapsto h + \mathrm{dropout}(\mathrm{edit}(h))$.

    Subclasses give the formula in `edit`. The arithmetic runs in the wider of the parameters' and
    the hidden states' dtypes, outside autocast (that of a `LowRankIntervention` in the hidden
    states', where `ReftModel.arithmetic` says so); the output has the hidden states' dtype. Dropout
    acts on the edit alone, so it never touches the residual stream.

    Args:
        embed_dim: width of the hidden states, $d$.
        low_rank_dimension: rank of the edit, $1 \le r \le d$; None for classes that have none and
            so do not take it.
        dropout: probability in [0, 1) that an element of the edit is zeroed while training.
        act_fn: name of a transformers activation without weights, applied to the learned source,
            or None; or a function or module without weights, of which no config can say the name.
        dtype: dtype of the parameters, as a `torch.dtype` or its name.
        pyvene: fields that pyvene passes when it builds the class itself, and pyreft's
            `unread_arguments`; not used.

    Raises:
        ValueError: a rank, dropout, activation or dtype that is out of range or unknown.
        TypeError: an argument that no intervention has.

    Paper: ReFT (arXiv:2404.03592), section 3.2.
    """

    default_positions: ClassVar[str] = "l1"
    """The positions of configurations that say none."""
    default_layer: ClassVar[str | None] = None
    """The layers of configurations that say none; None where they have to."""
    unread_arguments: ClassVar[frozenset[str]] = frozenset()
    """Arguments that have no effect, and are taken because pyreft's class takes them."""

    def __init__(
        self,
        *,
        embed_dim: int,
        low_rank_dimension: int | None = None,
        dropout: float = 0.0,
        act_fn: str | Activation | None = None,
        dtype: torch.dtype | str = torch.float32,
        **pyvene: Unpack[PyreftFields],
    ) -> None:
        reject_unknown(type(self), pyvene)
        is_rank = type(low_rank_dimension) is int and 1 <= low_rank_dimension <= embed_dim
        if not is_rank and "low_rank_dimension" in constructor_arguments(type(self)):
            kind = "a rank" if type(low_rank_dimension) is int else "an integer, a rank"
            raise ValueError(
                f"low_rank_dimension {low_rank_dimension!r}: expected {kind} from 1 to the width "
                f"of the hidden states, {embed_dim}"
            )
        if not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout {dropout!r}: expected a probability in [0, 1)")
        super().__init__(embed_dim=embed_dim, keep_last_dim=True)
        _drop_pyvene_buffers_from_state(self)
        self.hidden_size = int(embed_dim)
        self.low_rank_dimension = low_rank_dimension
        self.dropout = nn.Dropout(dropout)
        self.act_fn_name = act_fn if isinstance(act_fn, str) else None
        self.act_fn = activation_module(act_fn)
        is_named = act_fn is None or isinstance(act_fn, str)
        self._named_activation = type(self.act_fn) if is_named else None
        self.dtype = as_dtype(dtype)

    @abstractmethod
    def edit(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """The change that the intervention makes to hidden states, without dropout."""

    @property
    def has_own_forward(self) -> bool:
        """Whether its class overrides `forward`, which then says what the edit is."""
        return overrides_forward(type(self))

    @property
    def activation(self) -> str | Activation | None:
        """The name of `act_fn`, or the module itself where it was not given by a name."""
        is_named = type(self.act_fn) is self._named_activation
        return self.act_fn_name if is_named else self.act_fn

    def delta(
        self,
        hidden: Float[Tensor, "*rows hidden"],
        gates: Float[Tensor, "*#rows gates"] | RowSubspaces | None = None,
        scale: float | Tensor = 1.0,
    ) -> Float[Tensor, "*rows hidden"]:
        """`edit` as it acts: in the wider dtype, outside autocast, with dropout and gate.

        A `forward` of its own acts as it is written, in the narrowest dtype of its tensors, or that
        of the hidden states where it is wider.

        Args:
            hidden: hidden states; of a unit with a `forward` of its own, by row of the batch.
            gates: share of each dimension of the subspace that is edited; 1 if None. For a
                `forward` of its own, its `subspaces`.
            scale: factor of the edit, before its gate; of a unit without a `forward` of its own.
        """
        if not self.has_own_forward:
            if isinstance(gates, RowSubspaces):
                raise TypeError("subspaces of rows are for units with a forward of their own")
            return self._delta(hidden, gates, scale)
        own = [t.dtype for t in self._tensors() if t.is_floating_point()] or [hidden.dtype]
        narrow = min(own, key=lambda dtype: dtype.itemsize)
        return own_edit(self, hidden.to(torch.promote_types(hidden.dtype, narrow)), gates)

    def _tensors(self) -> list[Tensor]:
        return [*self.parameters(), *self.buffers()]

    def _delta(
        self,
        hidden: Float[Tensor, "*rows hidden"],
        gates: Float[Tensor, "*#rows gates"] | None = None,
        scale: float | Tensor = 1.0,
    ) -> Float[Tensor, "*rows hidden"]:
        wide, gate = hidden.to(self.wide_dtype(hidden.dtype)), gate_of(self)
        with torch.autocast(hidden.device.type, enabled=False):
            changed: Tensor = self.dropout(self._edit(wide, gates))
            if isinstance(scale, Tensor) or scale != 1.0:
                changed = changed * scale
            return changed if gate is None else gate(wide, changed)

    def wide_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The widest of a dtype and those of the weights."""
        dtypes = {tensor.dtype for tensor in self._tensors() if tensor.is_floating_point()}
        return functools.reduce(torch.promote_types, dtypes, dtype)

    def _edit(self, hidden: Tensor, gates: Tensor | None) -> Tensor:
        if gates is not None:
            raise no_subspace(self)
        return self.edit(hidden)

    def forward(
        self,
        base: Float[Tensor, "batch *positions hidden"],
        source: Tensor | None = None,
        subspaces: list[Any] | None = None,
        **module_inputs: object,
    ) -> Float[Tensor, "batch *positions hidden"]:
        """Edit `base`; pyvene's other arguments are accepted and have no effect here."""
        return (base + self._delta(base)).to(base.dtype)

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments, without the width, as plain JSON values.

        An activation that was not given by a name is itself.
        """
        values = {
            "low_rank_dimension": self.low_rank_dimension,
            "dropout": self.dropout.p,
            "act_fn": self.activation,
            "dtype": dtype_name(self.dtype),
        }
        names = [name for name in constructor_arguments(type(self)) if name != "embed_dim"]
        kept = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return kept | {name: value for name, value in values.items() if name in names}

    def __getitem__(self, index: int) -> "ReftIntervention":
        """The unit itself at 0: older versions of pyvene kept a pair of the unit and its hook."""
        if index != 0:
            raise IndexError(index)
        return self

    def extra_repr(self) -> str:
        values = ", ".join(f"{k}={v!r}" for k, v in self.arguments().items())
        return f"embed_dim={self.hidden_size}, {values}"


class LowRankIntervention(KeepsForEvaluation, ReftIntervention):
    """An edit that has `Factors`, so that its adapters can share a batch and be served."""

    has_subspaces: ClassVar[bool] = True
    """Whether dimensions of its subspace can be edited without the others."""
    proportional_to: ClassVar[str | None] = None
    """The name of its tensor that the edit is proportional to, which can hold a scale."""

    @abstractmethod
    def factors(self) -> Factors:
        """The edit in the form that all low-rank edits share, differentiable, without dropout.

        In evaluation, it is asked for once and kept until the weights, or an attribute of the unit,
        change.
        """

    def gated_factors(self) -> Factors:
        """The factors, with those of the unit's gate."""
        return self._with_gate(self.factors())

    def _with_gate(self, factors: Factors) -> Factors:
        gate = gate_of(self)
        return factors if gate is None else gate.factors(factors)

    @property
    def keeps_norm(self) -> bool:
        """Whether its gate makes edited states as long as they were."""
        gate = gate_of(self)
        return gate is not None and gate.keeps_norm

    def edit(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        return self.factors().to(hidden).edit(hidden)

    def row_edit(
        self,
        dtype: torch.dtype,
        device: torch.device,
        scale: float = 1.0,
        gates: Float[Tensor, "rows gates"] | None = None,
    ) -> RowEdit:
        """The edit as `edit_rows` takes it.

        Args:
            dtype: dtype of its arithmetic.
            device: device of the hidden states.
            scale: factor of the edit.
            gates: as of `delta`, for each row of hidden states.
        """
        if gates is not None and not self.has_subspaces:
            raise no_subspace(self)

        def ready() -> Factors:
            return self._with_gate(self._factors_in(dtype)).ready(dtype, device, scale)

        with outside_autocast(device.type):
            factors: Factors = self.kept((dtype, device, scale), ready)
        if gates is not None:
            gates = factors.spread(gates.to(factors.up))
        dropout = self.dropout.p if self.dropout.training else 0.0
        return RowEdit(factors, gates, dropout, self.keeps_norm)

    def _factors_in(self, _: torch.dtype) -> Factors:
        """The factors, not rounded to less than a dtype."""
        return self.factors()

    def _edit(self, hidden: Tensor, gates: Tensor | None) -> Tensor:
        if gates is None:
            return self.edit(hidden)
        if not self.has_subspaces:
            raise no_subspace(self)
        return self.factors().to(hidden).edit(hidden, gates.to(hidden))


def overrides_forward(cls: type) -> bool:
    """Whether a class of units has a `forward` of its own, and is no noise."""
    ours: tuple[Any, ...] = (ReftIntervention.forward, NoiseIntervention.forward)
    return getattr(cls, "forward", None) not in ours


def has_factors(unit: object) -> TypeGuard[LowRankIntervention]:
    """Whether `factors` are all that a unit adds: a `forward` of its own may do anything."""
    if not isinstance(unit, LowRankIntervention) or type(unit.dropout) is not nn.Dropout:
        return False
    if (gate := gate_of(unit)) is not None and gate.reads_prompts:  # of which no row of D knows
        return False
    names = ("forward", "delta", "edit", "_delta", "_edit")
    return all(getattr(type(unit), n) is getattr(LowRankIntervention, n) for n in names)


def no_subspace(unit: object) -> ValueError:
    """That a unit has no dimensions to choose among."""
    return ValueError(f"subspaces: {type(unit).__name__} has no subspace to edit a part of")


class NoiseIntervention(SourcelessIntervention, LocalistRepresentationIntervention, ABC):
    """Noise on hidden states while training, nothing in evaluation: see `noise.py`."""

    paired: ClassVar[bool] = False
    """Whether the batch must hold every example twice, first all +δ rows, then all -δ rows."""
    compares: ClassVar[bool] = False
    """Whether the second rows have no labels, and their predictions are compared with the first's:
    how far apart they are is noted for `added_loss`."""
    default_component: ClassVar[str] = "embeddings"
    """The component of configurations that say none."""
    default_layer: ClassVar[str | None] = None
    """The layer of configurations that say none; None where they have to."""

    def __init__(self, *, embed_dim: int | None = None, **pyvene: Unpack[NoiseFields]) -> None:
        reject_unknown(type(self), pyvene)
        super().__init__(embed_dim=embed_dim, keep_last_dim=True)
        _drop_pyvene_buffers_from_state(self)

    @abstractmethod
    def delta(
        self,
        hidden: Float[Tensor, "batch length hidden"],
        attended: Bool[Tensor, "batch length"] | None = None,
        prompt: Bool[Tensor, "batch length"] | None = None,
        lengths: Int[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch length hidden"]:
        """Draw the noise for `hidden`, of which only shape, dtype and device count.

        Args:
            hidden: hidden states that are perturbed.
            attended: mask of tokens that are not padding; all, if None.
            prompt: mask of the prompt.
            lengths: number of tokens in each token's document, where a row holds several.
        """

    def lost_in(self, hidden: Float[Tensor, "batch length hidden"]) -> tuple[str, float] | None:
        """A text that hidden states lose the noise in their dtype, and the least scale they feel.

        None where they feel the noise.
        """
        return None

    def forward(
        self,
        base: Float[Tensor, "batch length hidden"],
        source: Tensor | None = None,
        subspaces: list[Any] | None = None,
        *,
        attended: Bool[Tensor, "batch length"] | None = None,
        prompt: Bool[Tensor, "batch length"] | None = None,
        lengths: Int[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch length hidden"]:
        """Perturb `base` in training mode, return it untouched otherwise."""
        if not self.training:
            return base
        packed = {} if lengths is None else {"lengths": lengths}
        return base + self.delta(base, attended, prompt, **packed)

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        names = [name for name in constructor_arguments(type(self)) if name != "embed_dim"]
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.arguments().items())
