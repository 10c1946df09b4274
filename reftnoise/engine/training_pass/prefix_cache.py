"""Keys and values of prompts, kept from one epoch to the next.

What a frozen base computes for a prompt before its first edited token is the same at every step.
Tokens are stored in blocks, and a block that several prompts begin with, such as one of a system
prompt, is stored once.
"""

import hashlib
import logging
import math
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from ..._util.files import local_path
from ..base.threads import ForkSafeLock

logger = logging.getLogger(__name__)

Place = Literal["memory", "disk", "none"]

BLOCK = 16
"""Tokens per block."""

Shapes = list[tuple[int, int, int] | None]
"""Heads, and head sizes of keys and values, of each layer; None for a layer without its own."""

Recompute = Callable[[Sequence[bytes], Sequence[int], int], DynamicCache]
"""From identities of prompts, their lengths and the width to keys and values, as in `fetch`."""


@dataclass(frozen=True, eq=False)
class Computed:
    """The prompts of one call of the base, which rounds by the shape of all of them.

    Args:
        names: identities of the prompts, as in `PrefixCache.write`.
        lengths: tokens of each prompt.
        width: columns of the call.
    """

    names: list[bytes]
    lengths: list[int]
    width: int


class PrefixCache:
    """A pool of blocks [tokens, width], where width counts all layers' keys and values.

    A token takes the bytes of all layers' keys and values: 131 kB for Llama-3-8B in bf16. Weights
    changed through `.data` alone, which torch does not record, need `clear()`.

    When it is full, random prompts make room: an epoch reads every prompt once, so the least
    recently used would be evicted just before its next use.

    Args:
        place: `"memory"` of the host, or `"disk"`, a temporary file that is mapped into memory and
            gone with the process.
        max_bytes: size of the pool, at most; reserved at once on disk.
        directory: for the file; by default the system's for temporary files.

    Raises:
        ValueError: an unknown place, or a size that is not positive.
        OSError: no such directory, or not enough room in it.
    """

    def __init__(
        self,
        place: Literal["memory", "disk"] = "memory",
        max_bytes: int = 2**32,
        directory: str | Path | None = None,
    ) -> None:
        if place not in ("memory", "disk"):
            raise ValueError(f"prefix cache {place!r}: expected 'memory' or 'disk'")
        if type(max_bytes) is not int or max_bytes <= 0:
            raise ValueError(f"max_bytes {max_bytes!r}: expected a positive number of bytes")
        self.place, self.max_bytes = place, max_bytes
        self.directory = None if directory is None else local_path(directory, "directory")
        self.hits = self.misses = 0
        self._random = random.Random(0)  # of its own: the global state stays as it is
        self.lock = ForkSafeLock()
        self.stamp: tuple[object, ...] = ()
        self._awaited: Mapping[str, Any] | None = None
        self._process = os.getpid()
        self.clear()

    def __reduce__(self) -> Any:  # a copy of a model starts with an empty one
        return PrefixCache, (self.place, self.max_bytes, self.directory)

    def clear(self) -> None:
        """Forget every prompt, and give the memory back."""
        self._pool = torch.empty(0, BLOCK, 0)  # until the first prompt shows the width
        self.shapes: Shapes = []
        """Shapes of the layers, which `unpack` needs to read what `pack` made."""
        self._prompts: dict[bytes, list[bytes]] = {}
        """The names of each prompt's blocks: a digest of all tokens up to the block's end."""
        self._order: list[bytes] = []  # of the keys of _prompts, to draw from
        self._slots: dict[bytes, int] = {}
        self._uses = Counter[bytes]()
        self._free: list[int] = []  # slots of blocks that were evicted
        self._sources: dict[bytes, tuple[Computed, int]] = {}
        """The call that computed each block, and the row in it."""
        self._unfilled: set[bytes] = set()
        """Blocks of an earlier process whose values have not been computed again yet."""

    @property
    def nbytes(self) -> int:
        """Bytes that hold tokens now."""
        return len(self._slots) * BLOCK * self._pool.shape[2] * self._pool.element_size()

    def __len__(self) -> int:
        return len(self._prompts)

    def __repr__(self) -> str:
        return (
            f"PrefixCache({self.place!r}, max_bytes={self.max_bytes}): {len(self)} prompts in "
            f"{self.nbytes} bytes, {self.hits} hits, {self.misses} misses"
        )

    def __contains__(self, tokens: bytes) -> bool:
        return _digest(tokens) in self._prompts

    def belongs_to(self, stamp: tuple[object, ...]) -> None:
        """Forget everything that was stored under another stamp, such as of other weights.

        A child starts with an empty cache: on disk, it would write into its parent's.
        """
        if stamp != self.stamp or self._process != os.getpid():
            self.clear()
            self.stamp, self._process = stamp, os.getpid()
        if self._awaited is not None:
            state, self._awaited = self._awaited, None
            self._take(state)

    def state_dict(self) -> dict[str, Any]:
        """Which prompts are kept, and how they were computed; their values are not part of it.

        Values take as much room as the pool. A base computes the same ones from the same calls.
        """
        calls = list(dict.fromkeys(call for call, _ in self._sources.values()))
        numbers = {call: number for number, call in enumerate(calls)}
        return {
            "max_bytes": self.max_bytes,
            "width": self._pool.shape[2],
            "dtype": self._pool.dtype,
            "shapes": self.shapes,
            "calls": [(call.names, call.lengths, call.width) for call in calls],
            "sources": {name: (numbers[call], row) for name, (call, row) in self._sources.items()},
            "prompts": [(prompt, self._prompts[prompt]) for prompt in self._order],
            "random": self._random.getstate(),
            "counts": (self.hits, self.misses),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the cache that `state_dict` described: its prompts, and its next evictions.

        Each call that computed a kept prompt is repeated when the prompt is read.

        Raises:
            ValueError: that cache had another size.
        """
        if state["max_bytes"] != self.max_bytes:
            raise ValueError(
                f"max_bytes {self.max_bytes}: the saved cache has {state['max_bytes']}"
            )
        self._awaited = state

    def _take(self, state: Mapping[str, Any]) -> None:
        self.clear()
        if not state["width"]:
            return
        self._allocate(state["width"], state["dtype"])
        self.shapes = state["shapes"]
        calls = [Computed(*call) for call in state["calls"]]
        self._sources = {name: (calls[n], row) for name, (n, row) in state["sources"].items()}
        self._slots = {name: slot for slot, name in enumerate(self._sources)}
        self._unfilled = set(self._slots)
        self._prompts = dict(state["prompts"])
        self._order = list(self._prompts)
        self._uses = Counter(name for names in self._prompts.values() for name in names)
        self._random.setstate(state["random"])
        self.hits, self.misses = state["counts"]

    def fetch(
        self,
        names: Sequence[bytes],
        lengths: Sequence[int],
        width: int,
        compute: Callable[[list[int]], DynamicCache],
        recompute: Recompute,
        empty: DynamicCache,
        device: torch.device,
    ) -> DynamicCache:
        """Keys and values of prompts, padded on the left; those that are not stored are computed.

        Args:
            names: identities of the prompts, as in `write`.
            lengths: tokens of each prompt.
            width: columns of the result.
            compute: from the rows that are missing to their keys and values.
            recompute: repeats a call of an earlier process.
            empty: cache that takes what was stored.
            device: device of the result.
        """
        missing = [row for row, name in enumerate(names) if name not in self]
        self.hits += len(names) - len(missing)
        self.misses += len(missing)
        if len(missing) == len(names):
            states = compute(missing)
            values, self.shapes = pack(states)
        else:
            self._refill(names, recompute)
            values = self.stacked(names, lengths, width).to(device)
            if missing:
                values[missing], self.shapes = pack(compute(missing))
            states = unpack(values, self.shapes, empty)
        call = Computed([names[row] for row in missing], [lengths[row] for row in missing], width)
        for index, (row, kept) in enumerate(zip(missing, values[missing].cpu(), strict=True)):
            self.write(names[row], kept[width - lengths[row] :], (call, index))
        return states

    def _refill(self, names: Sequence[bytes], recompute: Recompute) -> None:
        """Compute again what is kept of prompts, by the calls that computed it first."""
        if not self._unfilled:
            return
        blocks = [block for name in names for block in self._prompts.get(_digest(name), [])]
        for block in blocks:
            if block not in self._unfilled:
                continue
            call, _ = self._sources[block]
            values = pack(recompute(call.names, call.lengths, call.width))[0].cpu()
            for row, (name, length) in enumerate(zip(call.names, call.lengths, strict=True)):
                kept = values[row, call.width - length :]
                for start, of_row in _blocks(name, length):
                    if of_row in self._unfilled and self._sources[of_row] == (call, row):
                        self._fill(of_row, kept[start : start + BLOCK])
                        self._unfilled.discard(of_row)

    def _fill(self, block: bytes, values: Float[Tensor, "tokens width"]) -> None:
        self._pool[self._slots[block], : len(values)].copy_(values)

    def stacked(
        self, names: Sequence[bytes], lengths: Sequence[int], width: int
    ) -> Float[Tensor, "batch tokens width"]:
        """Keys and values of stored prompts, padded on the left; zeros for others."""
        stacked = self._pool.new_zeros(len(names), width, self._pool.shape[2])
        for row, (name, length) in enumerate(zip(names, lengths, strict=True)):
            for index, block in enumerate(self._prompts.get(_digest(name), [])):
                start = width - length + index * BLOCK
                part = stacked[row, start : min(start + BLOCK, width)]
                part.copy_(self._pool[self._slots[block], : len(part)])
        return stacked

    def write(
        self,
        tokens: bytes,
        values: Float[Tensor, "tokens width"],
        source: tuple[Computed, int] | None = None,
    ) -> None:
        """Store a prompt, evicting others if needed; a prompt larger than the pool is left out.

        Args:
            tokens: what identifies the prompt, of equally many bytes for every token.
            values: keys and values of each token.
            source: call that computed them, and the row in it; by default the prompt alone.
        """
        length, prompt = len(values), _digest(tokens)
        if prompt in self._prompts:
            return
        if not self._pool.shape[2]:
            self._allocate(values.shape[1], values.dtype)
        if -(-length // BLOCK) > len(self._pool):
            return
        source = source or (Computed([tokens], [length], length), 0)
        names = list[bytes]()
        for start, name in _blocks(tokens, length):
            if name not in self._slots:
                while len(self._slots) == len(self._pool):
                    self._evict()
                self._slots[name] = self._free.pop() if self._free else len(self._slots)
                self._sources[name] = source
                self._fill(name, values[start : start + BLOCK])
            self._uses[name] += 1
            names.append(name)
        self._prompts[prompt] = names
        self._order.append(prompt)

    def _evict(self) -> None:
        index = self._random.randrange(len(self._order))
        self._order[index], self._order[-1] = self._order[-1], self._order[index]
        for name in self._prompts.pop(self._order.pop()):
            self._uses[name] -= 1
            if self._uses[name] == 0:
                del self._uses[name], self._sources[name]
                self._unfilled.discard(name)
                self._free.append(self._slots.pop(name))

    def _allocate(self, width: int, dtype: torch.dtype) -> None:
        needed = BLOCK * width * dtype.itemsize
        shape = (self.max_bytes // needed, BLOCK, width)
        if shape[0] == 0:
            message = "a prefix cache of %d bytes holds nothing: %d tokens take %d bytes"
            logger.warning(message, self.max_bytes, BLOCK, needed)
        if self.place == "disk" and shape[0]:
            self._pool = self._mapped(shape, dtype)
        else:
            self._pool = torch.empty(shape, dtype=dtype)  # pages come when written

    def _mapped(self, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        elements = math.prod(shape)
        size = elements * dtype.itemsize
        handle, path = tempfile.mkstemp(prefix="reftnoise-prefixes-", dir=self.directory)
        try:
            free = shutil.disk_usage(path).free
            if free < size:
                raise OSError(
                    f"{Path(path).parent}: {free:,d} bytes free, but the prefix cache reserves "
                    f"{size:,d}"
                )
            if hasattr(os, "posix_fallocate"):  # a full disk would kill the process later
                os.posix_fallocate(handle, 0, size)
            pool = torch.from_file(path, shared=True, size=elements, dtype=dtype).view(shape)
        finally:  # the mapping keeps the file alive, also for a process that is killed
            os.close(handle)
            os.unlink(path)
        return pool


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _blocks(tokens: bytes, length: int) -> Iterator[tuple[int, bytes]]:
    """The first token of each block of a prompt, and the block's name."""
    each, name = len(tokens) // max(length, 1), b""
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        name = _digest(name + tokens[start * each : end * each])
        yield start, name


def pack(states: DynamicCache) -> tuple[Float[Tensor, "batch tokens width"], Shapes]:
    """All layers' keys and values as one vector per token."""
    parts, shapes = [], Shapes()
    for layer in states.layers:
        if not layer.is_initialized:
            shapes.append(None)
            continue
        shapes.append((layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]))
        parts += [layer.keys.transpose(1, 2).flatten(2), layer.values.transpose(1, 2).flatten(2)]
    return torch.cat(parts, 2), shapes


def unpack(
    values: Float[Tensor, "batch tokens width"], shapes: Shapes, states: DynamicCache
) -> DynamicCache:
    """The inverse of `pack`, into an empty cache."""
    start = 0
    for index, shape in enumerate(shapes):
        if shape is None:
            states.layers.append(states.layer_class_to_replicate())
            continue
        heads, *sizes = shape
        pair = []
        for size in sizes:
            part = values[..., start : start + heads * size]
            pair.append(part.view(*part.shape[:2], heads, size).transpose(1, 2))
            start += heads * size
        states.update(pair[0], pair[1], index)
    return states
