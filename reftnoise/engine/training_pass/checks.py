"""Say where training hardly does what was meant."""

import functools
import logging
import warnings

import torch
from torch import Tensor

from ..calls import Pass
from ..layout import PromptLayout
from ..planning import Locator

logger = logging.getLogger(__name__)


class TrainingChecks:
    """Checks of training passes with the units that a locator has.

    Args:
        locator: of their prompts.
    """

    def __init__(self, locator: Locator) -> None:
        self._locator = locator
        self._has_looked_at_labels = False

    def check(self, current: Pass, labels: Tensor | None, is_located: bool) -> None:
        """Warn of noise that is there twice, and of prompts that hardly are prompts.

        Args:
            current: the pass.
            labels: of the base's inputs.
            is_located: whether the caller told where prompts end, or what to edit.
        """
        self._check_noise()
        units = self._locator.engine.units
        after_prompt = any(one.positions and one.positions.decode for one in units)
        is_told = is_located or after_prompt or not self._locator.continues
        if current.layout is None or is_told or not torch.is_grad_enabled():
            return
        # Of labels, only those of the first pass are looked at: it waits for the device.
        if labels is None or not self._has_looked_at_labels:
            self._has_looked_at_labels = labels is not None
            _check_prompts(current.layout, labels)

    def _check_noise(self) -> None:
        """transformers' NEFTune stands on the embeddings, beside a noise of the config."""
        for one in self._locator.engine.units:
            alpha = getattr(one.site.module, "neftune_noise_alpha", None)
            if alpha is None or not (one.site.is_embeddings and one.positions is None):
                continue
            warnings.warn(
                f"the embeddings are noised twice: by the config's {type(one.unit).__name__} and "
                f"by transformers' NEFTune (neftune_noise_alpha={alpha}); leave one of them out",
                stacklevel=4,
            )


def _check_prompts(layout: PromptLayout, labels: Tensor | None) -> None:
    """Edits in what counts as a prompt and is none would be trained where generation has none."""
    if labels is None:
        _warn_once(
            "training without labels or prompt_lengths: every token counts as the prompt's, so "
            "positions such as 'l1' are counted from the end of the completion"
        )
    elif not (layout.prompt[:, 1:] & layout.prompt[:, :-1]).any():
        _warn_once(
            "labels begin with each row's first token, which alone counts as its prompt, so that "
            "positions such as 'l1' mean this token: set labels of prompts to -100"
        )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
