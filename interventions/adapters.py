r"""Adapters of the field that are edits of hidden states, too.

| class | formula | paper |
|---|---|---|
| `BiasIntervention` | $h + b$ | BitFit (arXiv:2106.10199) |
| `AdapterIntervention` | $h + W_2\sigma(W_1h + b_1) + b_2$ | Houlsby et al. (arXiv:1902.00751) |

$b, b_2 \in \mathbb{R}^d$, $W_1 \in \mathbb{R}^{r \times d}$, $W_2 \in \mathbb{R}^{d \times r}$.
Both start as the identity and, unless told otherwise, edit every token, generated ones too.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Unpack

from .base import PyveneFields, ReftIntervention, reject_unknown


class BiasIntervention(ReftIntervention):
    r"""BitFit's trained bias, where a module's output is edited: $h + b$.

    Arguments as in `ReftIntervention`, without rank and `act_fn`. Parameters: $d$. A model's own
    bias of a linear layer is trained by giving the layer as component, such as
    `"model.layers[3].mlp.down_proj.output"`.
    """

    default_positions: ClassVar[str] = "all+decode"

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

    def edit(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        return self.bias.to(hidden).expand_as(hidden)


class AdapterIntervention(ReftIntervention):
    r"""The bottleneck adapter: $h + W_2\sigma(W_1h + b_1) + b_2$, where $W_2$ starts at zero.

    Arguments as in `ReftIntervention`; `low_rank_dimension` is the bottleneck's width and `act_fn`
    its nonlinearity. Parameters: $2rd + r + d$. Houlsby's places are `attention_output` and
    `mlp_output`, Pfeiffer's is `mlp_output` alone.
    """

    default_positions: ClassVar[str] = "all+decode"

    def __init__(
        self,
        *,
        embed_dim: int,
        low_rank_dimension: int,
        dropout: float = 0.0,
        act_fn: str | None = "gelu",
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

    def edit(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows hidden"]:
        inner = F.linear(hidden, self.down.weight.to(hidden), self.down.bias.to(hidden))
        if self.act_fn is not None:
            inner = self.act_fn(inner)
        return F.linear(inner, self.up.weight.to(hidden), self.up.bias.to(hidden))
