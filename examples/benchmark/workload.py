"""What is measured: a shape of model, a batch and edits, and the methods that run on them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Shape = Literal["llama-3-8b", "qwen3-4b", "toy"]

SHAPES: dict[Shape, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "rope_theta": 500000.0,
    },
    "qwen3-4b": {
        "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "toy": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 256,
    },
}  # fmt: skip
"""Shapes that get random weights: of real models, and one for tests."""


@dataclass(frozen=True)
class Workload:
    """A model, a batch and the edits of it.

    Args:
        hidden_size: width of a Llama with random weights.
        layers: number of that Llama's layers.
        vocabulary: size of that Llama's vocabulary.
        shape: shape of a real model instead, with random weights.
        model: name or directory of a model instead, with its own weights.
        edited: layers that are edited, as in a config.
        rank: rank of the edits.
        positions: positions of the edits.
        tied: whether prefix and suffix share their weights.
        batch_size: number of rows.
        prompt: tokens of each row's prompt.
        completion: tokens of each row's completion, and of those that are generated.
        dtype: data type of the base.
        device: cpu or cuda.
    """

    hidden_size: int = 512
    layers: int = 8
    vocabulary: int = 4096
    shape: Shape | None = None
    model: str | None = None
    edited: str = "all"
    rank: int = 4
    positions: str = "l1"
    tied: bool = False
    batch_size: int = 8
    prompt: int = 112
    completion: int = 16
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size {self.hidden_size}: expected a multiple of 64, or 2 to 62"
            )
        if self.model is not None and self.shape is not None:
            raise ValueError(f"model {self.model!r}: expected no shape, got {self.shape!r}")

    @property
    def heads(self) -> int:
        """Attention heads."""
        return max(1, self.hidden_size // 64)

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch_size * (self.prompt + self.completion)

    @property
    def base(self) -> str:
        """The base in short."""
        if self.model is not None:
            return Path(self.model).name
        llama = f"Llama {self.hidden_size} × {self.layers}, vocabulary {self.vocabulary:,d}"
        return self.shape or llama

    @property
    def sizes(self) -> str:
        """The batch and the base in short."""
        dtype = "" if self.dtype == "float32" else f", {self.dtype}"
        return f"batch {self.batch_size}, {self.prompt} + {self.completion}, {self.base}{dtype}"

    def __str__(self) -> str:
        """What differs from the usual workload, in short."""
        edited = "" if self.edited == "all" else f", layers {self.edited}"
        tied = ", tied" if self.tied else ""
        return f"{self.positions}{tied}, r {self.rank}{edited}, {self.sizes}"


@dataclass(frozen=True)
class Case:
    """A workload and the methods to be run on it."""

    kind: Literal["training", "generation", "run"]
    work: Workload
    methods: tuple[str, ...]
    memory: bool = False
    """Whether to measure their peak memory, too."""
    operations: bool = False
    """Whether to count their operations, too."""
    rounds: int | None = None
    """Of interleaved measurements; as many as asked for, if None."""
    seconds: float = 0
    """How long it takes on an H200, by and large."""
    note: str = ""
    """What tells it from another case of the same workload."""

    def __str__(self) -> str:
        return f"{self.work}, {self.note}" if self.note else str(self.work)
