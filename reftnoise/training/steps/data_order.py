"""The order of rows, and the seeds of workers, as functions of a run's seed alone.

A checkpoint holds the states of the random generators that the model draws from, within an epoch.
What a DataLoader draws from them at the epoch's beginning, or at a worker's start, is not drawn
again in the same place by a run that resumes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import RandomSampler, Sampler


class EpochOrder(Sampler[int]):
    """The order of a sampler without a generator of its own, drawn for each epoch by its number.

    Args:
        sampler: sampler with an attribute `generator`.
        seed: seed of the first epoch.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self._sampler, self._seed, self._epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is next."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self._sampler.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)


def by_epoch(sampler: Any, seed: int, *, seeds_random: bool) -> Any:
    """`sampler`, in an `EpochOrder` if it would draw from the process's generator.

    Args:
        sampler: sampler of a Trainer, or None.
        seed: seed of the data's order.
        seeds_random: whether accelerate seeds a `RandomSampler`, as it does by default.
    """
    is_seeded = seeds_random and isinstance(sampler, RandomSampler)
    is_drawn = hasattr(sampler, "generator") and sampler.generator is None and not is_seeded
    return EpochOrder(sampler, seed) if is_drawn else sampler


def seed_workers(loader: Any, seed: int) -> Any:
    """`loader`; workers that persist get their seeds from a generator of their own.

    They get them once, so that their start, which a resumed run has elsewhere, must not take a
    number from the model's generator.
    """
    if loader.persistent_workers:
        loader.base_dataloader.generator = torch.Generator().manual_seed(seed)
    return loader
