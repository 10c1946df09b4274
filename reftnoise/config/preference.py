"""Which objective pairs of answers are trained with, as plain values; nothing heavy is imported.

| name | loss of a pair: chosen answer y⁺, rejected answer y⁻ |
|---|---|
| `reps` | −log σ(β⁺ log p(y⁺)/‖y⁺‖ − log p(y⁻)/‖y⁻‖) under f times the edits; its mirror image |
| `bipo` | −log σ(d β (Δ(y⁺) − Δ(y⁻))) under d times the edits, d = ±1 |
| `dpo` | −log σ(β (Δ(y⁺) − Δ(y⁻))) |

Δ(y) = log p(y) − log p_ref(y), where the reference is the base without edits. The mirror image of
RePS has y⁺ and y⁻ exchanged, and its edits take their direction out of hidden states.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from .._util.errors import is_finite_number

ObjectiveName: TypeAlias = Literal["reps", "bipo", "dpo"]
Suppression: TypeAlias = Literal["project", "negate", "none"]

_DEFAULTS: dict[str, dict[str, Any]] = {
    "reps": {"factors": tuple(map(float, range(1, 11))), "suppression": "project"},
    "bipo": {"beta": 0.1},
    "dpo": {"beta": 0.1},
}
"""By objective, its arguments."""


@dataclass(frozen=True, kw_only=True)
class PreferenceObjective:
    """An objective and its arguments; what it does not have is None.

    Papers: RePS (arXiv:2505.20809), BiPO (arXiv:2406.00045), DPO (arXiv:2305.18290).

    Args:
        name: `reps`, `bipo` or `dpo`.
        beta: of `bipo` and `dpo`, what a nat of difference from the reference costs; .1 by default.
        factors: of `reps`, the numbers of which each pair draws f in training; 1 to 10 by default.
        suppression: of `reps`, what edits are in the mirror image: `project` takes their direction
            out of hidden states, `negate` has −f times the edits, and with `none` there is no
            mirror image.

    Raises:
        ValueError: an unknown name, an argument of another objective, or a value out of range.
    """

    name: ObjectiveName = "reps"
    beta: float | None = None
    factors: Sequence[float] | None = None
    suppression: Suppression | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(ObjectiveName):
            raise ValueError(f"objective {self.name!r}: expected 'reps', 'bipo' or 'dpo'")
        for argument in ("beta", "factors", "suppression"):
            if argument not in _DEFAULTS[self.name]:
                if getattr(self, argument) is not None:
                    have = ", ".join(_DEFAULTS[self.name])
                    raise ValueError(f"{argument}: {self.name} has none, but {have}")
            elif getattr(self, argument) is None:
                object.__setattr__(self, argument, _DEFAULTS[self.name][argument])
        if self.beta is not None and not (is_finite_number(self.beta) and self.beta > 0):
            raise ValueError(f"beta {self.beta!r}: expected a positive number")
        if self.factors is not None:
            object.__setattr__(self, "factors", _positive(self.factors))
        if self.suppression not in (None, *get_args(Suppression)):
            raise ValueError(
                f"suppression {self.suppression!r}: expected 'project', 'negate' or 'none'"
            )


def _positive(factors: Any) -> tuple[float, ...]:
    is_list = isinstance(factors, Sequence) and not isinstance(factors, str) and len(factors) > 0
    if not is_list or not all(is_finite_number(f) and f > 0 for f in factors):
        raise ValueError(f"factors {factors!r}: expected a list of positive numbers")
    return tuple(map(float, factors))
