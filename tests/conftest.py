"""Offline, deterministic, and with the shapes of all interventions checked."""

import logging
import os
import signal
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
# One thread a process, also in those that tests start: sums over other chunks round otherwise, and
# the models are too small for more.
os.environ["OMP_NUM_THREADS"] = "1"

# A job in a shell's background ignores Ctrl-C, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jaxtyping

# Before anything imports reftnoise. PEP 484 lets an int stand for a float; beartype must be told.
# torch.compile cannot trace the checks: tests/engine/test_compile.py runs without them.
if os.environ.get("REFTNOISE_TEST_UNCHECKED") != "1":
    jaxtyping.install_import_hook(
        "reftnoise.interventions",
        "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
    )

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Libraries configure the root logger; its handlers would write to a stream that is closed."""
    loggers = (logging.getLogger(), logging.getLogger("reftnoise"))
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture
def unchecked_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the type checks off, as users have them, so that mistakes meet our own errors."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def restored_registry() -> Iterator[None]:
    """Forget the names that a test gives to interventions."""
    from reftnoise.interventions import INTERVENTIONS

    before = dict(INTERVENTIONS)
    yield
    INTERVENTIONS.clear()
    INTERVENTIONS.update(before)


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A random Llama in evaluation mode."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()
