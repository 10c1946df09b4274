"""What an intervention is: a pyvene module that maps hidden states to edited hidden states.

Two kinds live here. A `ReftIntervention` is trained and edits chosen positions; a
`NoiseIntervention` has no parameters and perturbs every position while training. Both are true
pyvene interventions, so each also works inside a `pyvene.IntervenableModel`.
"""

import contextlib
import difflib
import functools
import inspect
import io
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN
from typing_extensions import Unpack

from .factors import Factors

# pyvene announces on stdout that an optional backend is missing; importing us prints nothing.
with contextlib.redirect_stdout(io.StringIO()):
    from pyvene import (
        DistributedRepresentationIntervention,
        LocalistRepresentationIntervention,
        SourcelessIntervention,
        TrainableIntervention,
    )


class PyveneFields(TypedDict, total=False):
    """The fields of pyvene's `RepresentationConfig`, which it passes to every class it builds."""

    layer: Any
    component: Any
    unit: Any
    max_number_of_units: Any
    intervention_type: Any
    intervention: Any
    subspace_partition: Any
    group_key: Any
    intervention_link_key: Any
    moe_key: Any
    source_representation: Any
    hidden_source_representation: Any
    latent_dim: Any
    use_fast: Any


class NoiseFields(PyveneFields, total=False):
    """The same fields for a class that has no rank."""

    low_rank_dimension: Any


class ReftArguments(PyveneFields, total=False):
    """The arguments of `ReftIntervention` but width and rank, for classes that pass them on."""

    dropout: float
    act_fn: str | None
    dtype: torch.dtype | str


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question about the known name that is nearest, with a space after it, or nothing."""
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def reject_unknown(cls: type, fields: Mapping[str, Any]) -> None:
    """Raise a TypeError for a field that is neither an argument of `cls` nor pyvene's."""
    for name in fields:
        if name not in NoiseFields.__annotations__:
            known = constructor_arguments(cls)
            raise TypeError(
                f"{cls.__name__} got an unknown argument {name!r}; {did_you_mean(name, known)}"
                f"it takes: {', '.join(known)}"
            )


def constructor_arguments(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments of an intervention class by name, without pyvene's own fields.

    A constructor that passes `**arguments` on has those of its parents too.
    """
    arguments: dict[str, inspect.Parameter] = {}
    for owner in cls.__mro__:
        if "__init__" not in vars(owner):
            continue
        _, *parameters = inspect.signature(vars(owner)["__init__"]).parameters.values()
        variadic = [p.name for p in parameters if p.kind is p.VAR_KEYWORD]
        arguments = {p.name: p for p in parameters if p.name not in variadic} | arguments
        if not variadic or variadic == ["pyvene"]:
            break
    return arguments


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
    the hidden states' dtypes, outside autocast; the output has the hidden states' dtype. Dropout
    acts on the edit alone, so it never touches the residual stream.

    Args:
        embed_dim: width of the hidden states, $d$.
        low_rank_dimension: rank of the edit, $1 \le r \le d$; None for classes that have none and
            so do not take it.
        dropout: probability in [0, 1) that an element of the edit is zeroed while training.
        act_fn: name of a transformers activation without weights, applied to the learned source,
            or None.
        dtype: dtype of the parameters, as a `torch.dtype` or its name.
        pyvene: fields that pyvene passes when it builds the class itself; not used.

    Raises:
        ValueError: a rank, dropout, activation or dtype that is out of range or unknown.
        TypeError: an argument that no intervention has.

    Paper: ReFT (arXiv:2404.03592), section 3.2.
    """

    default_positions: ClassVar[str] = "l1"
    """The positions of configurations that say none."""

    def __init__(
        self,
        *,
        embed_dim: int,
        low_rank_dimension: int | None = None,
        dropout: float = 0.0,
        act_fn: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        **pyvene: Unpack[PyveneFields],
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
        if act_fn is not None and (not isinstance(act_fn, str) or act_fn not in ACT2FN):
            raise ValueError(
                f"act_fn {act_fn!r} is not an activation of transformers; "
                f"{did_you_mean(str(act_fn), ACT2FN)}it has: {', '.join(ACT2FN)}"
            )
        super().__init__(embed_dim=embed_dim, keep_last_dim=True)
        _drop_pyvene_buffers_from_state(self)
        self.hidden_size = int(embed_dim)
        self.low_rank_dimension = low_rank_dimension
        self.dropout = nn.Dropout(dropout)
        self.act_fn_name = act_fn
        self.act_fn: nn.Module | None = None if act_fn is None else ACT2FN[act_fn]
        if self.act_fn is not None and next(self.act_fn.parameters(), None) is not None:
            raise ValueError(f"act_fn {act_fn!r} has weights of its own: expected one without")
        self.dtype = as_dtype(dtype)

    @abstractmethod
    def edit(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        """The change that the intervention makes to hidden states, without dropout."""

    def delta(
        self,
        hidden: Float[Tensor, "*rows hidden"],
        gates: Float[Tensor, "*#rows gates"] | None = None,
    ) -> Float[Tensor, "*rows hidden"]:
        """`edit` as it acts: in the wider dtype, outside autocast, with dropout.

        Args:
            hidden: hidden states.
            gates: share of each dimension of the subspace that is edited; 1 if None.
        """
        own = itertools.chain(self.parameters(), self.buffers())
        dtypes = {tensor.dtype for tensor in own if tensor.is_floating_point()}
        wide = hidden.to(functools.reduce(torch.promote_types, dtypes, hidden.dtype))
        with torch.autocast(hidden.device.type, enabled=False):
            changed: Tensor = self.dropout(self._edit(wide, gates))
        return changed

    def _edit(self, hidden: Tensor, gates: Tensor | None) -> Tensor:
        if gates is not None:
            raise ValueError(f"subspaces: {type(self).__name__} has no subspace to edit a part of")
        return self.edit(hidden)

    def forward(
        self,
        base: Float[Tensor, "batch positions hidden"],
        source: Tensor | None = None,
        subspaces: list[Any] | None = None,
        **module_inputs: object,
    ) -> Float[Tensor, "batch positions hidden"]:
        """Edit `base`; pyvene's other arguments are accepted and have no effect here."""
        return (base + self.delta(base)).to(base.dtype)

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments, without the width, as plain JSON values."""
        values = {
            "low_rank_dimension": self.low_rank_dimension,
            "dropout": self.dropout.p,
            "act_fn": self.act_fn_name,
            "dtype": dtype_name(self.dtype),
        }
        names = [name for name in constructor_arguments(type(self)) if name != "embed_dim"]
        return {name: values[name] if name in values else getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        values = ", ".join(f"{k}={v!r}" for k, v in self.arguments().items())
        return f"embed_dim={self.hidden_size}, {values}"


class LowRankIntervention(ReftIntervention):
    """An edit that has `Factors`, so that its adapters can share a batch and be served."""

    has_subspaces: ClassVar[bool] = True
    """Whether dimensions of its subspace can be edited without the others."""

    @abstractmethod
    def factors(self) -> Factors:
        """The edit in the form that all low-rank edits share, differentiable, without dropout."""

    def edit(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        return self.factors().to(hidden).edit(hidden)

    def _edit(self, hidden: Tensor, gates: Tensor | None) -> Tensor:
        if gates is None:
            return self.edit(hidden)
        if not self.has_subspaces:
            return super()._edit(hidden, gates)
        return self.factors().to(hidden).edit(hidden, gates.to(hidden))


class NoiseIntervention(SourcelessIntervention, LocalistRepresentationIntervention, ABC):
    """Noise on hidden states while training, nothing in evaluation: see `noise.py`."""

    paired: ClassVar[bool] = False
    """Whether the batch must hold every example twice, first all +δ rows, then all -δ rows."""

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


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point `torch.dtype` from itself or its name (`"bfloat16"`)."""
    result = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if result not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"dtype {dtype!r}: expected 'float16', 'bfloat16', 'float32' or 'float64'")
    return result


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` → `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")
