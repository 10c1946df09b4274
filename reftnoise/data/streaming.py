"""Examples that are tokenised as a trainer takes them, for data larger than memory."""

import logging
from collections.abc import Iterator
from itertools import count
from typing import Any

import datasets
import torch

from .encoding import Counts, Encoder

logger = logging.getLogger(__name__)

_BATCH = 64  # examples tokenised at once: enough for speed, and little work ahead of the trainer


class ExampleStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Tokenised examples of rows that are read as they are needed.

    The workers of a DataLoader divide the files (or shards) of the rows; workers beyond the number
    of files have nothing to do.

    The first example that is too long is warned of at once. How many there are is logged after the
    first pass, or where training stops before its end.

    A stream that repeats begins again after the last row, in another order if the rows are
    shuffled. A Trainer that resumes skips steps within one pass, so all passes are one.
    """

    def __init__(self, rows: datasets.IterableDataset, encoder: Encoder, repeats: bool) -> None:
        self.rows = rows
        self.encoder = encoder
        self.repeats = repeats

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for epoch in count() if self.repeats else range(1):
            counts = Counts()
            self.rows.set_epoch(epoch)
            try:
                yield from self._examples(counts, warns=epoch == 0)
            finally:
                if epoch == 0 and counts.examples:
                    counts.log(self.encoder.name, self.encoder.max_length)
            if not counts.examples:
                worker = torch.utils.data.get_worker_info()
                if worker is not None and worker.id > 0:  # datasets gives each file to one worker
                    return
                raise ValueError(f"no {self.encoder.name} examples in the stream")

    def _examples(self, counts: Counts, warns: bool) -> Iterator[dict[str, Any]]:
        for batch in self.encoder.encode(self.rows, _BATCH):
            for example in batch:
                if warns and example.is_cut and not counts.cut:
                    logger.warning(
                        "%s example %d is longer than %d tokens and loses the beginning of its "
                        "prompt; how many do is logged when the stream ends",
                        self.encoder.name,
                        counts.examples,
                        self.encoder.max_length,
                    )
                counts.add(example)
                yield example.features(self.encoder.num_interventions)
