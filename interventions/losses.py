"""What a unit may add to the loss of a training pass, and edits that read whole rows.

| a loss | comes from |
|---|---|
| of weights | the unit itself, as a penalty of its gates |
| of what a pass computed | what `EditsRows.row_delta` noted |
| of two halves of a batch | how far apart predictions are of rows without and with noise |

The classes are no `ABC` themselves: a unit is one through `ReftIntervention` or
`NoiseIntervention`. A second `ABC` base would give units an object layout that FSDP2 cannot change
when it shards a unit by itself.
"""

from abc import abstractmethod
from collections.abc import Sequence

from jaxtyping import Bool, Float
from torch import Tensor


class AddsLoss:
    r"""A unit that adds a loss: $\mathcal{L} = \mathcal{L}_\mathrm{base} + \sum_u \mathcal{L}_u$.

    A base class next to `ReftIntervention` or `NoiseIntervention`. In training mode, `ReftModel`
    asks every such unit once a pass, at its end, and adds what it returns to the loss of the
    labels. In evaluation it does not, so losses of evaluations stay comparable.
    """

    @abstractmethod
    def added_loss(
        self, progress: Float[Tensor, ""], noted: Sequence[Tensor]
    ) -> Float[Tensor, ""] | None:
        """The loss of this pass, a mean like the loss of the labels; None for nothing.

        Args:
            progress: share of the training that is done, from 0 to 1, for schedules; 1 where
                nobody has set it.
            noted: what the pass noted for the unit, in the order of the base's calls.
        """


class EditsRows:
    """An edit that in training reads all edited tokens of a row together.

    A base class next to `ReftIntervention`. In evaluation, and in generation, the unit edits like
    any other.
    """

    has_copies: bool = False
    """Whether all processes train copies of the unit, on other rows; the engine sets it."""

    @abstractmethod
    def row_delta(
        self,
        hidden: Float[Tensor, "batch tokens hidden"],
        edited: Bool[Tensor, "batch tokens"],
        gates: Float[Tensor, "batch gates"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens hidden"], Tensor | None]:
        """What is added to the hidden states, and what the pass notes for `added_loss`.

        Args:
            hidden: hidden states of the tokens at the unit's positions, row by row.
            edited: mask of those that are edited; the others are padding, or fill a row up.
            gates: share of each dimension of the subspace that a row gets; all of each, if None.
        """
