"""Adapters far from the identity, without any training, and directories that are to be refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import reftnoise as rn

UNITS = [
    {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4, "positions": "l1"},
    {"layer": 1, "component": "mlp_output", "intervention": "bias", "positions": "f1"},
    {"intervention": "symnoise", "alpha": 5.0},
]
QUESTIONS = ["Where does a bear live?", "What does a cow eat?", "Who are you?"]


def moved(reft_model: rn.ReftModel, std: float = 0.5) -> rn.ReftModel:
    """The model, its units drawn far from the identity at which they may start."""
    with torch.no_grad():
        for name, parameter in reft_model.interventions.named_parameters():
            if "rotate_layer" not in name:
                parameter.normal_(std=std)
    return reft_model


def save_adapter(directory: Path) -> Path:
    """An adapter directory for the embedded model, of random edits."""
    torch.manual_seed(3)
    model, _ = rn.load_tiny_model()
    reft_model = rn.get_reft_model(model, rn.ReftConfig(UNITS)).eval()
    moved(reft_model).save_pretrained(directory)
    return directory


def answer(model: torch.nn.Module, tokenizer, messages, max_new_tokens: int = 16) -> str:  # type: ignore[no-untyped-def]
    """What the model writes greedily, by `generate` alone."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[operator]
    written = tokens[0, prompt["input_ids"].shape[1] :]
    return str(tokenizer.decode(written, skip_special_tokens=True))


# -- of many kinds --------------------------------------------------------------------------------

ENTRIES: dict[str, Any] = {
    "last": [{"layer": "all", "intervention": "loreft", "low_rank_dimension": 2}],
    "ends": [
        {
            "layer": [0, 2],
            "intervention": "loreft",
            "low_rank_dimension": 4,
            "positions": "f2+l3",
            "tied": False,
            "act_fn": "gelu",
        }
    ],
    "everywhere": [
        {"layer": 1, "intervention": "noreft", "low_rank_dimension": 3, "positions": "all+decode"},
        {"component": "embeddings", "intervention": "lobireft", "low_rank_dimension": 1},
        {"component": "embeddings", "intervention": "neftune", "alpha": 5.0},
    ],
    "houlsby": [
        {
            "layer": "all",
            "component": "mlp_output",
            "intervention": "adapter",
            "low_rank_dimension": 5,
        },
        {"layer": 2, "component": "attention_output", "intervention": "bias"},
    ],
    "direft": [
        {"layer": 0, "intervention": "direft", "low_rank_dimension": 2, "act_fn": "relu"},
        {"layer": 1, "intervention": "nodireft", "low_rank_dimension": 2, "positions": [0, 2]},
        {"layer": 2, "intervention": "consreft", "low_rank_dimension": 2, "positions": "f1"},
    ],
    "red": [
        {"layer": [0, 1], "component": "mlp_output", "intervention": "red"},
        {"layer": 1, "intervention": "red", "positions": "all+decode"},
        {"layer": 2, "intervention": "red", "positions": "f1+l1"},
    ],
}


def wrapped(entries: Any, base: Any, seed: int) -> rn.ReftModel:
    """A model whose units are far from the identity."""
    torch.manual_seed(seed)
    reft_model = rn.get_reft_model(base, rn.ReftConfig(entries)).eval()
    return moved(reft_model)


def with_rows(model: Any, rows: Tensor, name: str = "loreft", **entry: Any) -> rn.ReftModel:
    """A model whose units project on these rows."""
    unit = {"layer": [0], "intervention": name, "low_rank_dimension": len(rows)} | entry
    reft_model = rn.get_reft_model(model, rn.ReftConfig(unit))
    for module in reft_model.interventions.values():
        part = module.proj_layer if hasattr(module, "proj_layer") else module.rotate_layer
        part.weight.data = rows.clone()
    return reft_model.eval()


# -- directories -----------------------------------------------------------------------------------


def save(reft_model: rn.ReftModel, path: Path) -> None:
    """Save a model whose units are far from the identity."""
    moved(reft_model, std=0.3).save_pretrained(path)


def damaged(adapter: Path, path: Path) -> None:
    shutil.copytree(adapter, path, dirs_exist_ok=True)
    weights = path / "reft_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def of_another_base(adapter: Path, path: Path) -> None:
    shutil.copytree(adapter, path, dirs_exist_ok=True)
    config = json.loads((path / "reft_config.json").read_text())
    config["base_model"]["hidden_size"] = 7
    (path / "reft_config.json").write_text(json.dumps(config))


def not_finite(adapter: Path, path: Path) -> None:
    shutil.copytree(adapter, path, dirs_exist_ok=True)
    tensors = safetensors.torch.load_file(path / "reft_model.safetensors")
    next(iter(tensors.values()))[0] = torch.nan
    safetensors.torch.save_file(tensors, path / "reft_model.safetensors")
    config = json.loads((path / "reft_config.json").read_text())
    del config["weights_sha256"]
    (path / "reft_config.json").write_text(json.dumps(config))


MISTAKES = {
    "damaged": (damaged, "not the weights that reft_config.json was saved with"),
    "another base": (of_another_base, "has hidden_size 7, the given model"),
}
"""How to make one of a sound directory, and what is said of it before an engine is asked."""

SEEN_BY_THE_ENGINE = {"not finite": (not_finite, "holds numbers that are not finite")}
