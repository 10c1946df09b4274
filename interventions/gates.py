r"""Gates: how much of a unit's edit Δ a hidden state gets, by the state or its prompt's states.

| class | name | gated edit | parameters |
|---|---|---|---|
| `ProbeGate` | `probe` | $\sigma(w \cdot h + c)\,\Delta$ | $d + 1$ |
| `NormGate` | `norm` | $(h + \Delta)\,\|h\| / \|h + \Delta\| - h$ | none |
| `ConditionGate` | `condition` | Δ, or 0: the row's prompt decides | none, a vector is set |

A gate knows nothing of the unit whose edit it gets, and a unit nothing of its gate. It is a module
of the unit, so that it trains, moves and is saved with it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .arguments import did_you_mean
from .factors import Factors
from .kept import is_set
from .losses import EditsRows


class Gate(nn.Module):
    """What becomes of an edit.

    Args:
        embed_dim: width of the hidden states.
        dtype: dtype of the parameters.
    """

    keeps_norm: ClassVar[bool] = False
    """Whether the whole of what a state is added is scaled, and not an edit by itself."""
    reads_prompts: ClassVar[bool] = False
    """Whether rows get the edit or not, as `decide` says of their prompts."""

    def __init__(self, *, embed_dim: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()

    def forward(
        self, hidden: Float[Tensor, "*rows hidden"], delta: Float[Tensor, "*rows hidden"]
    ) -> Float[Tensor, "*rows hidden"]:
        """The gated edit.

        Args:
            hidden: hidden states that the edit was computed of.
            delta: the edit.
        """
        raise NotImplementedError

    def factors(self, factors: Factors) -> Factors:
        """An edit's factors with those of the gate."""
        return factors

    def decide(self, means: Float[Tensor, "rows hidden"]) -> Float[Tensor, " rows"]:
        """Of a gate that reads prompts, 1 for rows that are edited, 0 for the others.

        Args:
            means: mean of the states of each row's prompt.
        """
        raise NotImplementedError


class ProbeGate(Gate):
    r"""A share of the edit for each token: $\sigma(w \cdot h + c)\,\Delta$.

    w and c start at 0, where the share is ½, and are trained with the unit.
    """

    def __init__(self, *, embed_dim: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(embed_dim=embed_dim)
        self.weight = nn.Parameter(torch.zeros(embed_dim, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros((), dtype=dtype))

    def forward(
        self, hidden: Float[Tensor, "*rows hidden"], delta: Float[Tensor, "*rows hidden"]
    ) -> Float[Tensor, "*rows hidden"]:
        logit = hidden @ self.weight.to(hidden) + self.bias.to(hidden)
        return logit.sigmoid()[..., None] * delta

    def factors(self, factors: Factors) -> Factors:
        return Factors(*factors[:6], probe=torch.cat([self.weight, self.bias[None]])[None])


class NormGate(Gate):
    r"""The edited state keeps the norm of the state: $(h + \Delta)\,\|h\| / \|h + \Delta\|$."""

    keeps_norm: ClassVar[bool] = True

    def forward(
        self, hidden: Float[Tensor, "*rows hidden"], delta: Float[Tensor, "*rows hidden"]
    ) -> Float[Tensor, "*rows hidden"]:
        return with_norm_of(hidden, hidden + delta) - hidden


class ConditionGate(Gate):
    r"""An edit of rows whose prompt meets a condition, throughout their prompt and answer.

    $\cos(\bar h, \tanh(P\bar h)) > \theta$ with $\bar h$ the mean of the prompt's states at the
    unit's site, before its edit, and $P = vv^\top / \|v\|^2$. v starts at zero, and must be set. It
    is decided once for each prompt, by the pass that reads it.

    Args:
        embed_dim: width of the hidden states.
        dtype: dtype of v.
        threshold: θ.
        above: whether rows above the threshold are edited, and not the others.

    Paper: CAST (arXiv:2409.05907), section 3.
    """

    reads_prompts: ClassVar[bool] = True
    vector: Tensor

    def __init__(
        self,
        *,
        embed_dim: int,
        dtype: torch.dtype = torch.float32,
        threshold: float = 0.0,
        above: bool = True,
    ) -> None:
        super().__init__(embed_dim=embed_dim)
        is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not is_number or not -1 <= threshold <= 1:
            raise ValueError(f"threshold {threshold!r}: expected a number from -1 to 1")
        if not isinstance(above, bool):
            raise ValueError(f"above {above!r}: expected true or false")
        self.threshold, self.above = threshold, above
        self.register_buffer("vector", torch.zeros(embed_dim, dtype=dtype))

    def similarity(self, means: Float[Tensor, "rows hidden"]) -> Float[Tensor, " rows"]:
        r"""$\cos(\bar h, \tanh(P\bar h))$; 0 where one of the two is zero.

        Raises:
            ValueError: v is zero.
        """
        if not is_set(self, "vector"):
            raise ValueError(
                "vector of the gate 'condition' is zero, which is no condition: set it, by "
                "unit.gate.vector.copy_(direction)"
            )
        wide = means.to(torch.promote_types(means.dtype, torch.float32))
        direction = F.normalize(self.vector.to(wide), dim=0)
        projected = ((wide @ direction)[:, None] * direction).tanh()
        return F.cosine_similarity(wide, projected, dim=-1)

    def decide(self, means: Float[Tensor, "rows hidden"]) -> Float[Tensor, " rows"]:
        similarity = self.similarity(means)
        met = similarity > self.threshold if self.above else similarity < self.threshold
        return met.to(means)

    def forward(
        self, hidden: Float[Tensor, "*rows hidden"], delta: Float[Tensor, "*rows hidden"]
    ) -> Float[Tensor, "*rows hidden"]:
        """The edit, as of rows whose condition is met: the pass knows which these are."""
        return delta


GATES: dict[str, type[Gate]] = {"probe": ProbeGate, "norm": NormGate, "condition": ConditionGate}


def gate_class(name: object) -> type[Gate]:
    """The class of a name; a ValueError lists all names."""
    if not isinstance(name, str) or name not in GATES:
        near = did_you_mean(name, GATES) if isinstance(name, str) else ""
        raise ValueError(f"gate type {name!r}: {near}expected one of {', '.join(GATES)}")
    return GATES[name]


def gate_of(unit: nn.Module) -> Gate | None:
    """The gate of a unit; None for one that has none."""
    gate = getattr(unit, "gate", None)
    return gate if isinstance(gate, Gate) else None


def put_gate(unit: Any, values: Mapping[str, Any] | None) -> None:
    """Give a unit a gate.

    Args:
        unit: unit that has none, or an equal one.
        values: the gate's `type`, and its arguments; None for no gate.

    Raises:
        ValueError: the unit's class has a `forward` or a gate of its own, or edits whole rows; or
            the unit has another gate, which could not be loaded again.
    """
    own = gate_of(unit)
    if values is None:
        if own is not None:
            raise ValueError(
                f"gate: the module has a {type(own).__name__}: give the entry one, too"
            )
        return
    arguments = {name: value for name, value in values.items() if name != "type"}
    cls, name = gate_class(values.get("type")), type(unit).__name__
    if getattr(unit, "has_own_forward", True):
        raise ValueError(f"gate {values.get('type')!r}: {name} says in a forward what it returns")
    if isinstance(unit, EditsRows):
        raise ValueError(
            f"gate {values.get('type')!r}: {name} edits whole rows in training, "
            "expected a unit that edits each token, such as bias"
        )
    if type(own) is cls:
        for argument, value in arguments.items():
            if getattr(own, argument) != value:
                has = f"the module's gate has {getattr(own, argument)!r}"
                raise ValueError(f"{argument} {value!r}: {has}")
        return
    if hasattr(unit, "gate"):
        raise ValueError(f"gate {values.get('type')!r}: {name} has a gate of its own")
    unit.gate = cls(embed_dim=unit.hidden_size, dtype=unit.dtype, **arguments)


def with_norm_of(
    states: Float[Tensor, "*rows hidden"], edited: Float[Tensor, "*rows hidden"]
) -> Float[Tensor, "*rows hidden"]:
    """Edited states, as long as the states were; zero where the edited ones are zero."""
    before, after = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (states, edited))
    return edited * (before / after.masked_fill(after == 0, 1))
