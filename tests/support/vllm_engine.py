"""vLLM's engine in this process, for tests of what runs within it; without vLLM, they are skipped.

vLLM reads its variables when it is imported, so tests take it, and our modules on it, from here.
"""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import pytest

from .vllm_server import NEEDS_VLLM

pytest.importorskip("vllm", reason=NEEDS_VLLM)

import vllm

from reftnoise.inference.vllm import capture, graphs, plugin, worker

__all__ = [
    "QUIET",
    "capture",
    "graphs",
    "lora_request",
    "plugin",
    "started_engine",
    "vllm",
    "worker",
]

QUIET = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of vLLM and what it imports
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
"""Marks of a file of tests."""


def started_engine(base: Path, **settings: Any) -> Any:
    """An engine in float32, uncompiled and with blocks of 32 tokens unless the settings differ."""
    defaults: dict[str, Any] = {"dtype": "float32", "block_size": 32, "enforce_eager": True}
    return vllm.LLM(str(base), **defaults | settings)


def lora_request(name: str, number: int, path: str | Path) -> Any:
    """What names an adapter to the engine."""
    return vllm.lora.request.LoRARequest(name, number, str(path))
