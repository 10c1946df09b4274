"""Adapters far from the identity, and directories that no server should take."""

import json
import shutil
from pathlib import Path

import safetensors.torch
import torch
from adapters import moved

import reftnoise as rn


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
