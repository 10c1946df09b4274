"""What is measured: a shape of model, batch and edits, and the table of the guide to speed."""

from dataclasses import dataclass
from typing import Any, Literal

SHAPES: dict[str, dict[str, Any]] = {
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
}  # fmt: skip
"""Shapes of real models, which get random weights."""


@dataclass(frozen=True)
class Workload:
    """A model, a batch and the edits of it.

    Args:
        hidden_size: width of a Llama with random weights.
        layers: number of that Llama's layers.
        vocabulary: size of that Llama's vocabulary.
        shape: shape of a real model instead, llama-3-8b or qwen3-4b.
        edited: layers that are edited, as in a config.
        rank: rank of the edits.
        positions: positions of the edits; prefix and suffix have weights of their own.
        batch_size: number of rows.
        prompt: tokens of each row's prompt.
        completion: tokens of each row's completion.
        dtype: data type of the base.
        device: cpu or cuda.
    """

    hidden_size: int = 512
    layers: int = 8
    vocabulary: int = 4096
    shape: Literal["llama-3-8b", "qwen3-4b"] | None = None
    edited: str = "all"
    rank: int = 4
    positions: str = "l1"
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

    @property
    def heads(self) -> int:
        """Attention heads."""
        return max(1, self.hidden_size // 64)

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch_size * (self.prompt + self.completion)

    def __str__(self) -> str:
        """What differs from the usual workload, in short."""
        shape = self.shape or f"Llama {self.hidden_size} × {self.layers}"
        edited = "" if self.edited == "all" else f", layers {self.edited}"
        return (
            f"{self.positions}, r {self.rank}{edited}, batch {self.batch_size}, "
            f"{self.prompt} + {self.completion}, {shape}, vocabulary {self.vocabulary:,d}"
        )


@dataclass(frozen=True)
class Case:
    """A workload and the methods to be run on it."""

    work: Workload
    methods: tuple[str, ...]
    memory: bool = False
    """Whether to measure their peak memory, too."""
    rounds: int | None = None
    """Of interleaved measurements; as many as asked for, if None."""


_FEW_LABELS = Workload(vocabulary=32000, batch_size=4, prompt=92, completion=36)
_BOTH_ENDS = Workload(positions="f7+l7", prompt=96, completion=32)
_SMALL = Workload(positions="f7+l7", rank=64, batch_size=2, prompt=48, completion=16)
_LONG = Workload(vocabulary=128 * 1024, prompt=384, completion=128)

SUITE = (
    Case(
        Workload(),
        ("floor", "plain", "split", "reuse", "symnoise", "lora", "neftune", "pyreft"),
    ),
    Case(_FEW_LABELS, ("floor", "split", "reuse", "lora", "pyreft")),
    Case(_BOTH_ENDS, ("floor", "plain", "split", "lora", "pyreft")),
    Case(Workload(positions="f1+l1", prompt=96, completion=32), ("floor", "split", "compiled")),
    Case(_SMALL, ("floor", "split", "lora", "pyreft")),
    Case(_LONG, ("plain", "split"), memory=True, rounds=2),
)
"""The guide's table."""

GPU_SUITE = tuple(
    Case(
        Workload(
            shape=shape,
            rank=8,
            positions=positions,
            prompt=512,
            completion=128,
            dtype="bfloat16",
            device="cuda",
        ),
        methods,
        memory=True,
    )
    for shape in ("llama-3-8b", "qwen3-4b")
    for positions, methods in (
        ("l1", ("floor", "plain", "split", "reuse", "symnoise", "lora", "neftune", "pyreft")),
        ("f7+l7", ("floor", "plain", "split", "lora", "pyreft")),
    )
)
"""The same on shapes of real models."""
