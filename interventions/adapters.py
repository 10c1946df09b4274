r"""Adapters of the literature that are edits of hidden states.

| class | formula | paper |
|---|---|---|
| `BiasIntervention` | $h + b$ | BitFit (arXiv:2106.10199) |
| `RedIntervention` | $s \odot h + b$ | RED (arXiv:2402.15179) |
| `AdditionIntervention` | $h + v$, v not trained | CAA (arXiv:2312.06681) |
| `AblationIntervention` | $h - (h \cdot w)w$, $\|w\| = 1$, w not trained | arXiv:2406.11717 |
| `AdapterIntervention` | $h + W_2\sigma(W_1h + b_1) + b_2$ | Houlsby et al. (arXiv:1902.00751) |

$s, b, b_2 \in \mathbb{R}^d$, $W_1 \in \mathbb{R}^{r \times d}$, $W_2 \in \mathbb{R}^{d \times r}$.
All but ablation start as the identity, and all edit every token by default, generated ones too.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from .arguments import PyveneFields, reject_unknown
from .factors import Activation, Factors
from .formed import FormedIntervention
from .kept import is_set


class EveryTokenIntervention(FormedIntervention):
    """An edit of every token by default, without a subspace to edit a part of."""

    default_positions: ClassVar[str] = "all+decode"
    has_subspaces: ClassVar[bool] = False


class BiasArguments(PyveneFields, total=False):
    """The arguments of `BiasIntervention` but the width."""

    dropout: float
    dtype: torch.dtype | str


class BiasIntervention(EveryTokenIntervention):
    r"""BitFit's trained bias, where a module's output is edited: $h + b$.

    Arguments as in `ReftIntervention`, without rank and `act_fn`. Parameters: $d$. To train the own
    bias of a linear layer, give the layer as component, such as
    `"model.layers[3].mlp.down_proj.output"`.
    """

    proportional_to: ClassVar[str | None] = "bias"

    def __init__(
        self,
        *,
        embed_dim: int,
        dropout: float = 0.0,
        dtype: torch.dtype | str = torch.float32,
        **pyvene: Unpack[PyveneFields],
    ) -> None:
        reject_unknown(type(self), pyvene)
        super().__init__(embed_dim=embed_dim, dropout=dropout, dtype=dtype, **pyvene)
        self.bias = nn.Parameter(torch.zeros(embed_dim, dtype=self.dtype))

    def parts(self) -> tuple[Tensor, ...]:
        return (self.bias,)

    def form(self, *parts: Tensor) -> Factors:
        return constant_factors(*parts)


class RedIntervention(BiasIntervention):
    r"""RED: $s \odot h + b$, where s starts at 1 and b at 0.

    Arguments as in `ReftIntervention`, without rank and `act_fn`. Parameters: $2d$. The paper's
    place is `mlp_output`. Weight decay pulls s to 0, which erases hidden states: leave it at 0.

    Paper: RED (arXiv:2402.15179), section 3.
    """

    proportional_to: ClassVar[str | None] = None

    def __init__(self, *, embed_dim: int, **arguments: Unpack[BiasArguments]) -> None:
        super().__init__(embed_dim=embed_dim, **arguments)
        self.scaling = nn.Parameter(torch.ones(embed_dim, dtype=self.dtype))

    def parts(self) -> tuple[Tensor, ...]:
        return self.scaling, self.bias

    def form(self, *parts: Tensor) -> Factors:
        scaling, bias = parts
        wide = torch.promote_types(scaling.dtype, torch.float32)  # a difference loses digits
        down, ones, up, acts, *_ = constant_factors(bias)
        return Factors(down, ones, up, acts, diagonal=scaling.to(wide)[..., None, :] - 1)


class VectorIntervention(EveryTokenIntervention):
    """An edit by a vector that is set, as by `fit_steering_vectors`, and not trained.

    Arguments as in `ReftIntervention`, without rank and `act_fn`. The vector starts at zero.
    """

    vector: Tensor

    def __init__(
        self,
        *,
        embed_dim: int,
        dtype: torch.dtype | str = torch.float32,
        **pyvene: Unpack[PyveneFields],
    ) -> None:
        reject_unknown(type(self), pyvene)
        super().__init__(embed_dim=embed_dim, dtype=dtype, **pyvene)
        self.register_buffer("vector", torch.zeros(embed_dim, dtype=self.dtype))

    def parts(self) -> tuple[Tensor, ...]:
        return (self.vector,)


class AdditionIntervention(VectorIntervention):
    r"""A steering vector: $h + v$.

    Arguments as in `VectorIntervention`.
    """

    proportional_to: ClassVar[str | None] = "vector"

    def form(self, *parts: Tensor) -> Factors:
        return constant_factors(*parts)


class AblationIntervention(VectorIntervention):
    r"""Directional ablation: $h - (h \cdot w)w$ with $w = v/\|v\|$ of the vector v.

    No edited state has then a part along v. By default, these are the outputs of all layers. The
    paper takes v out of what is added to the residual stream, so that no state in between has a
    part along v, either: `embeddings`, `attention_output` and `mlp_output` of all layers. Arguments
    as in `VectorIntervention`. v must be set before a pass.

    Raises:
        ValueError: v is zero where the edit is computed.

    Paper: Refusal in language models is mediated by a single direction (arXiv:2406.11717), 2.4.
    """

    default_layer: ClassVar[str | None] = "all"

    def parts(self) -> tuple[Tensor, ...]:
        if not is_set(self, "vector"):
            raise ValueError(
                "vector of AblationIntervention is zero, which is no direction: set it, as "
                "fit_steering_vectors does, or by unit.vector.copy_(direction)"
            )
        return super().parts()

    def form(self, *parts: Tensor) -> Factors:
        (vector,) = parts
        wide = vector.to(torch.promote_types(vector.dtype, torch.float32))
        rows = F.normalize(wide, dim=-1)[..., None, :]
        return Factors(-rows, torch.zeros_like(rows[..., 0]), rows, ((None, 1),))


class AdapterIntervention(EveryTokenIntervention):
    r"""The bottleneck adapter: $h + W_2\sigma(W_1h + b_1) + b_2$, where $W_2$ starts at zero.

    Arguments as in `ReftIntervention`; `low_rank_dimension` is the bottleneck's width and `act_fn`
    its nonlinearity. Parameters: $2rd + r + d$. Houlsby's places are `attention_output` and
    `mlp_output`, Pfeiffer's is `mlp_output` alone.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        low_rank_dimension: int,
        dropout: float = 0.0,
        act_fn: str | Activation | None = "gelu",
        dtype: torch.dtype | str = torch.float32,
        **pyvene: Unpack[PyveneFields],
    ) -> None:
        super().__init__(
            embed_dim=embed_dim,
            low_rank_dimension=low_rank_dimension,
            dropout=dropout,
            act_fn=act_fn,
            dtype=dtype,
            **pyvene,
        )
        self.down = nn.Linear(embed_dim, low_rank_dimension, dtype=self.dtype)
        self.up = nn.Linear(low_rank_dimension, embed_dim, dtype=self.dtype)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def parts(self) -> tuple[Tensor, ...]:
        return self.down.weight, self.down.bias, self.up.weight, self.up.bias

    def form(self, *parts: Tensor) -> Factors:
        down, down_bias, up, up_bias = parts
        rank = down.shape[-2]
        return Factors(
            torch.cat([down, torch.zeros_like(down[..., :1, :])], dim=-2),
            torch.cat([down_bias, torch.ones_like(down_bias[..., :1])], dim=-1),
            torch.cat([up.mT, up_bias[..., None, :]], dim=-2),
            ((self.activation, rank), (None, 1)),
        )


def constant_factors(vector: Tensor) -> Factors:
    """A vector that is added to every state."""
    up = vector[..., None, :]
    ones = torch.ones_like(up[..., 0])
    return Factors(torch.zeros_like(up), ones, up, ((None, 1),), is_constant=True)
