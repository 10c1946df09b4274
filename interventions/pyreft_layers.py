"""Layers and states as pyreft has them, and ours in their place.

pyreft keeps $R^T$, [hidden, rank]: LoReFT's as it is, the others in torch's orthogonal
parametrisation, which comes with a square matrix of the width.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from .rotation import LowRankRotation

RAW = "rotate_layer.weight"
PLAIN = "rotate_layer"
_REFLECTORS = "rotate_layer.parametrizations.weight.original"
_BASE = "rotate_layer.parametrizations.weight.0.base"
SOURCE = {"weight": "learned_source.weight", "bias": "learned_source.bias"}
BUFFERS = ("embed_dim", "interchange_dim")


class LowRankRotateLayer(nn.Module):
    r"""pyreft's layer, for classes that are written with it: $h \mapsto hR^\top$ with weight $R^T$.

    Its columns stay orthonormal with `torch.nn.utils.parametrizations.orthogonal` alone.

    Args:
        n: width of the hidden states, also as pyvene keeps it, a tensor.
        m: rank.
        init_orth: whether it starts orthonormal, and not uninitialised.
    """

    def __init__(self, n: int | Tensor, m: int | Tensor, init_orth: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(int(n), int(m)))
        if init_orth:
            nn.init.orthogonal_(self.weight)

    def forward(self, x: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows rank"]:
        return x.to(self.weight.dtype) @ self.weight


class PyreftRotation:
    """A rotation as pyreft's classes have it: `weight` is $R^T$, which can be set.

    Args:
        rotation: our rotation, which has all other attributes.
    """

    def __init__(self, rotation: LowRankRotation) -> None:
        object.__setattr__(self, "_rotation", rotation)

    def __call__(self, hidden: Tensor | None = None) -> Tensor:
        basis: Tensor = self._rotation(hidden)
        return basis

    def __getattr__(self, name: str) -> Any:
        if name != "weight":
            return getattr(self._rotation, name)
        basis = self().mT
        if not torch.compiler.is_compiling():  # a new tensor: what is written into it would be lost
            basis.copy_ = self._set  # type: ignore[assignment, method-assign]  # of this one
        return basis

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self._set(value)
        else:
            setattr(self._rotation, name, value)

    def _set(self, matrix: Tensor, *_: Any) -> None:
        is_ours = matrix.shape == self._rotation.weight.shape and len(matrix) < matrix.shape[1]
        self._rotation.set_basis(matrix if is_ours else matrix.mT)


def state_of_ours(pickled: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state of one of pyreft's classes under our names, with an X whose R is theirs.

    Raises:
        ValueError: a rotation of another shape.
    """
    state, rotation = without_rotation(pickled)
    return state if rotation is None else state | {RAW: rotation / 2}


def without_rotation(
    pickled: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Float[Tensor, "rank hidden"] | None]:
    """Such a state under our names, and its R, or None where it has none as pyreft keeps it.

    Raises:
        ValueError: a rotation of another shape.
    """
    state = {SOURCE.get(n, n): t for n, t in pickled.items() if n not in BUFFERS}
    return state, _take_rotation(state)


def _take_rotation(state: dict[str, Tensor]) -> Tensor | None:
    """Take pyreft's R out of a state, in rows; None if there is none."""
    matrix = state.pop(PLAIN, None)
    if matrix is None and _REFLECTORS in state and _BASE in state:
        reflectors, base = _wide(state.pop(_REFLECTORS)), _wide(state.pop(_BASE))
        if reflectors.dim() == 2 and base.shape == 2 * reflectors.shape[:1] >= reflectors.shape:
            # torch's formula depends on nothing of the layer but whether its weight is square.
            layer: Any = orthogonal(nn.Linear(1, 1 if base.shape == reflectors.shape else 2))
            parametrization = layer.parametrizations.weight[0]
            parametrization.base = base
            matrix = parametrization(reflectors)
        else:
            raise ValueError(
                f"rotate_layer has shapes {tuple(reflectors.shape)} and {tuple(base.shape)}, "
                "expected [width, rank] and [width, width]"
            )
    if matrix is not None and matrix.dim() != 2:
        raise ValueError(f"rotate_layer has shape {tuple(matrix.shape)}, expected [width, rank]")
    return None if matrix is None else matrix.mT


def _wide(tensor: Tensor) -> Tensor:
    """In fp32 at least, as Householder products must be."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
