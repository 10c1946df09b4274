"""Adapter directories that were damaged by accident or on purpose, at random."""

import copy
import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

CONFIG, WEIGHTS = "reft_config.json", "reft_model.safetensors"

_DEEP = {f"<deep {depth}>": "[" * depth + "]" * depth for depth in (50, 900, 5_000, 200_000)}
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 31, 2**31, 2**63, 10**12, 10**400, -(10**400)),
    *(0.5, 1.5, 1e308, math.nan, math.inf, "", "x", "all", "loreft", "a\nb", "x" * 100_000),
    *("0-1", "0-300000000", "0-" + "9" * 5_000, "f1+l1", "f99999999999999999999", "(a|a?)+(.*)*$x"),
    *([], {}, [1], [-1], ["x"], [None], [[1]], {"a": 1}, {"x": [1.0]}, [10**30], *_DEEP),
]


def _text(description: Any) -> str:
    text = json.dumps(description)
    for name, deep in _DEEP.items():
        text = text.replace(json.dumps(name), deep)
    return text


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each container in a JSON value with each of its keys."""
    keys = value if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _changed(chance: random.Random, value: Any) -> None:
    """Change a JSON value somewhere inside."""
    owner, key = chance.choice(list(_places(value)))
    new = copy.deepcopy(chance.choice(VALUES))  # which a later change may change in turn
    match chance.randrange(6):
        case 0:
            del owner[key]
        case 1 if isinstance(owner, dict):
            owner[chance.choice(("rank", "peft_type", "x", "layer", "embed_dim", "act_fn"))] = new
        case 2 if isinstance(owner, list):
            owner.append(chance.choice((copy.deepcopy(owner[key]), new)))
        case _:
            owner[key] = new


def flipped(chance: random.Random, directory: Path) -> None:
    path = directory / chance.choice((CONFIG, WEIGHTS))
    content = bytearray(path.read_bytes())
    # Most bytes are weights, and most mistakes are in the header.
    end = chance.choice((16, 600, len(content)))
    for _ in range(chance.choice((1, 1, 3))):
        content[chance.randrange(min(end, len(content)))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut(chance: random.Random, directory: Path) -> None:
    path = directory / chance.choice((CONFIG, WEIGHTS))
    content = path.read_bytes()
    place = chance.randrange(len(content))
    path.write_bytes(chance.choice((content[:place], content[place:], content + content[:place])))


def config_changed(chance: random.Random, directory: Path) -> None:
    path = directory / CONFIG
    description = json.loads(path.read_text())
    for _ in range(chance.choice((1, 1, 2, 4))):
        _changed(chance, description)
    path.write_text(_text(description))


def _named(directory: Path) -> None:
    """Let the config name the weights that are there, or none."""
    path = directory / CONFIG
    description = json.loads(path.read_text())
    content = (directory / WEIGHTS).read_bytes()
    description["weights_sha256"] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(description))


def header_changed(chance: random.Random, directory: Path) -> None:
    path = directory / WEIGHTS
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    _changed(chance, header)
    text = _text(header).encode()
    size = chance.choice((len(text), len(text), len(text) + 1, 0, 2**40, 2**63 + 5))
    path.write_bytes(size.to_bytes(8, "little") + text + content[start:])
    if chance.random() < 0.8:
        _named(directory)


def tensors_changed(chance: random.Random, directory: Path) -> None:
    tensors = safetensors.torch.load_file(directory / WEIGHTS)
    name = chance.choice(list(tensors))
    tensor = tensors[name]
    match chance.randrange(7):
        case 0:
            del tensors[name]
        case 1:
            tensors[chance.choice((f"{name}2", "x", "model.x", "interventions.x\ny"))] = (
                tensor.clone()
            )
        case 2:
            dtypes = (torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.uint8)
            tensors[name] = tensor.to(chance.choice((*dtypes, torch.float16, torch.float64)))
        case 3:
            tensors[name] = tensor.flatten()[: tensor.numel() // 2].clone()
        case 4:
            tensors[name] = torch.full_like(tensor, chance.choice((math.nan, -math.inf)))
        case 5:
            tensors[name] = chance.choice((tensor[None], tensor[..., None], tensor[:0])).clone()
        case _:
            tensors = {n: torch.zeros_like(t) for n, t in tensors.items()}
    safetensors.torch.save_file(tensors, directory / WEIGHTS)
    _named(directory)


def swapped(chance: random.Random, directory: Path) -> None:
    other = chance.choice(sorted((directory.parent.parent / "sound").iterdir()))
    name = chance.choice((CONFIG, WEIGHTS))
    shutil.copy(other / name, directory / name)
    if chance.random() < 0.5:
        _named(directory)


def of_other_kinds(chance: random.Random, directory: Path) -> None:
    path = directory / chance.choice((CONFIG, WEIGHTS))
    path.unlink()
    match chance.randrange(7):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(path)
        case 3:
            path.symlink_to(directory / "nowhere")
        case 4:
            path.symlink_to("/dev/zero")
        case 5:
            path.write_bytes(chance.choice((b"", b"\0" * 8, b"{}", b"\xff" * 64)))


DAMAGES: list[Callable[[random.Random, Path], None]] = [
    *(flipped, flipped, cut, config_changed, config_changed, config_changed, header_changed),
    *(tensors_changed, swapped, of_other_kinds),
]
