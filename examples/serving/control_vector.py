"""A control vector that was exported, applied by llama.cpp and by us to one GGUF file.

pip install llama-cpp-python gguf
reftnoise export STEERING --to gguf-control-vector steering-gguf --model MODEL.gguf
python examples/serving/control_vector.py logits STEERING MODEL.gguf ours.json
python examples/serving/control_vector.py compare steering-gguf MODEL.gguf ours.json

The first step needs reftnoise, the second llama-cpp-python: they may be in different environments.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a bear who",
    "A good reason to get up early is that",
]


def write_logits(adapter: str, model: str, output: str) -> None:
    """Token ids of prompts, and our logits after them, with the adapter and without."""
    import torch

    from reftnoise.inference.loading import load_adapted

    reft_model, tokenizer = load_adapted(adapter, model, dtype="float32")
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            steered = reft_model(input_ids=ids).logits[0, -1]
            with reft_model.disabled():
                base = reft_model(input_ids=ids).logits[0, -1]
        rows.append({"ids": ids[0].tolist(), "base": base.tolist(), "steered": steered.tolist()})
    Path(output).write_text(json.dumps(rows), encoding="utf-8")


def read_vector(directory: str, width: int) -> tuple[Any, int]:
    """The export as one row for each block from 1, as llama.cpp takes it, and the last block."""
    import gguf
    import numpy as np

    tensors = gguf.GGUFReader(Path(directory) / "control-vector.gguf").tensors
    blocks = {int(tensor.name.rpartition(".")[2]): np.array(tensor.data) for tensor in tensors}
    rows = np.zeros((max(blocks), width), dtype=np.float32)
    for block, vector in blocks.items():
        rows[block - 1] = vector
    return rows, max(blocks)


def compare(vector: str, model: str, ours: str) -> None:
    """Print how far llama.cpp's logits are from ours, and how far the vector moves them."""
    import llama_cpp
    import numpy as np

    llama = llama_cpp.Llama(model, n_ctx=128, n_threads=1, logits_all=True, verbose=False)
    width = llama.n_embd()

    def logits(ids: list[int]) -> Any:
        llama.reset()
        llama.eval(ids)
        return np.array(llama.scores[len(ids) - 1], dtype=np.float64)

    rows = json.loads(Path(ours).read_text(encoding="utf-8"))
    bases = [logits(row["ids"]) for row in rows]
    values, last = read_vector(vector, width)
    data = values.ravel().ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    apply = getattr(llama_cpp, "llama_set_adapter_cvec", None) or llama_cpp.llama_apply_adapter_cvec
    assert apply(llama.ctx, data, values.size, width, 1, last) == 0
    for row, base in zip(rows, bases, strict=True):
        steered, own = logits(row["ids"]), {k: np.array(row[k]) for k in ("base", "steered")}
        moved, error = (own["steered"] - own["base"]), steered - own["steered"]
        print(
            f"{len(row['ids'])} tokens: the vector moves logits by {np.abs(moved).max():.3f}; "
            f"llama.cpp differs from us by {np.abs(base - own['base']).max():.3f} without it, by "
            f"{np.abs(error).max():.3f} with it; cosine of the two moves "
            f"{_cosine(steered - base, moved):.5f}; same first token: "
            f"{steered.argmax() == own['steered'].argmax()}"
        )


def _cosine(a: Any, b: Any) -> float:
    return float(a @ b / (a @ a) ** 0.5 / (b @ b) ** 0.5)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    {"logits": write_logits, "compare": compare}[command](*arguments)
