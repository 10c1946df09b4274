"""Choices of calls in threads, asyncio tasks and forks: no call sees another one's."""

import asyncio
import contextlib
import copy
import itertools
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reftnoise as rn
from reftnoise.analysis.inspection import edit_norms, logit_lens, noise_losses, observed
from reftnoise.engine.base.threads import ForkSafeLock, in_evaluation_mode, seeded
from reftnoise.engine.training_pass.prefix_cache import PrefixCache
from support.adapters import moved
from support.models.architectures import tiny_model

IDS = torch.tensor([[5, 6, 7, 8]])
BIAS = {"layer": "all", "intervention": "bias"}
LOREFT = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2, "positions": "f1+l1"}
SYMNOISE = {"intervention": "symnoise", "alpha": 5.0}
SECONDS = 120
"""After which something hangs."""


@pytest.fixture
def reft_model(tmp_path: Path) -> rn.ReftModel:
    """A model with units of its own and a loaded adapter `a`."""
    other = moved(rn.get_reft_model(tiny_model(num_hidden_layers=2), rn.ReftConfig([LOREFT])))
    other.save_pretrained(tmp_path / "a")
    base = tiny_model(num_hidden_layers=2)
    model = moved(rn.get_reft_model(base, rn.ReftConfig([BIAS]))).eval()
    model.load_adapter(tmp_path / "a", "a")
    return model


def logits(model: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, **kwargs).logits


def calls_of(model: rn.ReftModel) -> list[Callable[[], Tensor]]:
    """Calls that choose in all ways, each with a result of its own."""

    def in_block(**choices: Any) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with model.using(**choices):
                return logits(model)

        return call

    def bare() -> Tensor:
        with model.disabled():
            return logits(model)

    def nested() -> Tensor:
        with model.disabled(), model.using(scale=3.0):
            first = logits(model)
        return torch.cat([first, logits(model)])

    def written() -> Tensor:
        return model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)

    def with_original() -> Tensor:
        first, second = model({"input_ids": IDS}, output_original_output=True)
        return torch.cat([first.logits, second.logits]).detach()

    def watched() -> Tensor:
        seen: list[Tensor] = []
        with observed(model, lambda _, norms: seen.append(norms)):
            logits(model)
        return torch.stack(seen)

    return [
        *(bare, nested, written, with_original, watched, lambda: logits(model)),
        *(in_block(scale=2.0), in_block(adapter="a"), in_block(adapter={"a": 0.5, "default": 2.0})),
        *(in_block(adapter=None), in_block(adapter="a", scale=-1.0)),
        lambda: logits(model, adapter_names=["a"]),
        lambda: logits(model, adapter_names=[None]),
        lambda: logits(model, adapter_names=["default"]),
    ]


def are_equal(calls: list[Callable[[], Tensor]], expected: list[Tensor]) -> list[bool]:
    return [torch.allclose(c(), e, atol=1e-5) for c, e in zip(calls, expected, strict=True)]


def in_threads(functions: list[Callable[[], None]]) -> None:
    errors: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS * 10)
        assert not thread.is_alive(), "hung"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("count", [8, pytest.param(500, marks=pytest.mark.slow)])
def test_six_threads_of_mixed_calls(reft_model: rn.ReftModel, count: int) -> None:
    calls = calls_of(reft_model)
    expected = [call() for call in calls]
    mixed: list[int] = []

    def ask(seed: int) -> None:
        for number in random.Random(seed).choices(range(len(calls)), k=count):
            if not torch.allclose(calls[number](), expected[number], atol=1e-5):
                mixed.append(number)

    in_threads([lambda seed=seed: ask(seed) for seed in range(6)])
    assert mixed == []
    assert all(are_equal(calls, expected))
    assert reft_model.scale == 1.0


def test_asyncio_tasks_do_not_see_the_blocks_of_others(reft_model: rn.ReftModel) -> None:
    expected = {scale: logits_at(reft_model, scale) for scale in (0.0, 1.0, 2.0)}

    async def ask(scale: float) -> None:
        for _ in range(3):
            with reft_model.using(scale=scale):
                await asyncio.sleep(0)
                assert torch.equal(logits(reft_model), expected[scale])
            await asyncio.sleep(0)
            assert torch.equal(logits(reft_model), expected[1.0])

    async def all_of_them() -> None:
        await asyncio.gather(*(ask(scale) for scale in (0.0, 2.0, 0.0, 2.0)))

    asyncio.run(all_of_them())


def logits_at(model: rn.ReftModel, scale: float) -> Tensor:
    with model.using(scale=scale):
        return logits(model)


def test_blocks_that_overlap_end_one_by_one(reft_model: rn.ReftModel) -> None:
    edited = logits(reft_model)
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(reft_model.using(scale=2.0, adapter="a"))
    second.enter_context(reft_model.using(scale=3.0))
    first.close()
    assert (reft_model.scale, reft_model.adapters.active) == (3.0, "default")
    second.close()
    assert reft_model.scale == 1.0
    assert torch.equal(logits(reft_model), edited)


def test_setters_are_for_all_threads_and_in_a_block_for_the_block(reft_model: rn.ReftModel) -> None:
    reft_model.scale = 2.0
    reft_model.set_adapter("a")
    seen: list[Any] = []
    in_threads([lambda: seen.append((reft_model.scale, reft_model.adapters.active))])
    assert seen == [(2.0, "a")]
    with reft_model.using(scale=3.0):
        reft_model.scale = 4.0
        reft_model.set_adapter("default")
        assert (reft_model.scale, reft_model.adapters.active) == (4.0, "default")
    assert (reft_model.scale, reft_model.adapters.active) == (2.0, "default")


def test_a_generator_may_end_a_block_in_another_thread(reft_model: rn.ReftModel) -> None:
    def halves() -> Iterator[None]:
        with reft_model.disabled():
            yield

    edited, generator = logits(reft_model), halves()
    next(generator)
    in_threads([lambda: next(generator, None)])
    assert torch.equal(logits(reft_model), edited)


def test_a_thread_with_the_context_is_in_the_block(reft_model: rn.ReftModel) -> None:
    seen: list[Tensor] = []
    with reft_model.disabled():
        context = copy_context()
        bare = logits(reft_model)
        in_threads([lambda: context.run(lambda: seen.append(logits(reft_model)))])
    assert torch.equal(seen[0], bare)
    assert not torch.equal(logits(reft_model), bare)


def test_a_copy_is_in_no_block(reft_model: rn.ReftModel) -> None:
    edited = logits(reft_model)
    with reft_model.disabled():
        assert torch.equal(logits(copy.deepcopy(reft_model)), edited)


def test_a_copy_waits_for_calls_of_other_threads(reft_model: rn.ReftModel) -> None:
    edited, copies = logits(reft_model), list[rn.ReftModel]()
    copying = threading.Thread(target=lambda: copies.append(copy.deepcopy(reft_model)))

    def start(*_: Any) -> None:
        handle.remove()
        copying.start()
        copying.join(0.5)  # for one that does not wait

    handle = reft_model.model.model.norm.register_forward_hook(start)
    logits_at(reft_model, 2.0)
    copying.join(SECONDS)
    assert torch.equal(logits(copies[0]), edited)
    assert not any(module._forward_hooks for module in copies[0].model.modules())


@pytest.mark.parametrize(
    "choice", [{"adapter": "nosuch"}, {"scale": float("nan")}, {"adapter": 3}, {"scale": "1"}]
)
def test_what_no_block_can_choose(reft_model: rn.ReftModel, choice: Any) -> None:
    with pytest.raises(ValueError, match=r"^(adapter|scale)"), reft_model.using(**choice):
        pass
    assert (reft_model.scale, reft_model.adapters.active) == (1.0, "default")


# -- modes and the random state --------------------------------------------------------------------


def test_the_last_block_restores_modes() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
    model[1].eval()
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(in_evaluation_mode(model))
    second.enter_context(in_evaluation_mode(model))
    first.close()
    assert not any(module.training for module in model.modules())
    second.close()
    assert [module.training for module in model.modules()] == [True, True, False]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_last_block_restores_the_random_state(order: tuple[int, ...]) -> None:
    before = torch.get_rng_state()
    stacks = [contextlib.ExitStack() for _ in order]
    for seed, stack in enumerate(stacks):
        stack.enter_context(seeded(seed, torch.device("cpu")))
        torch.rand(seed + 1)
    for index in order:
        stacks[index].close()
    assert torch.equal(torch.get_rng_state(), before)


def helpers_of(model: rn.ReftModel, tokenizer: Any) -> list[Callable[[], Any]]:
    labels = torch.tensor([[-100, -100, 7, 8]])
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": labels}
    return [
        lambda: str(edit_norms(model, tokenizer, "a b c").norms),
        lambda: [row.adapted for row in logit_lens(model, tokenizer, "a b c")],
        lambda: noise_losses(model, [batch], draws=1).clean,
        lambda: logits(model, adapter_names=["default"]).tolist(),
    ]


@pytest.mark.parametrize("count", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_helpers_in_threads(count: int) -> None:
    base, tokenizer = rn.load_tiny_model()
    model = moved(rn.get_reft_model(base, rn.ReftConfig([BIAS, SYMNOISE]))).eval()
    helpers = helpers_of(model, tokenizer)
    expected = [helper() for helper in helpers]
    model.train()
    mixed: list[int] = []

    def ask(number: int) -> None:
        with in_evaluation_mode(model):
            for _ in range(count):
                if repr(helpers[number]()) != repr(expected[number]):
                    mixed.append(number)

    before = torch.get_rng_state()
    in_threads([lambda number=number: ask(number) for number in (0, 1, 2, 3, 0, 2)])
    assert mixed == []
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)


# -- forks -----------------------------------------------------------------------------------------

forking = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def in_child(check: Callable[[], bool]) -> None:
    """Assert a check in a fork of this process."""
    child = os.fork()
    if not child:
        signal.alarm(SECONDS)
        os._exit(0 if check() else 1)
    assert os.waitpid(child, 0)[1] == 0


@forking
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("count", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_a_child_answers_like_its_parent(reft_model: rn.ReftModel, count: int) -> None:
    calls = calls_of(reft_model)
    expected, stop = [call() for call in calls], threading.Event()
    reft_model.train()

    def ask(seed: int) -> None:
        draw = random.Random(seed)
        while not stop.is_set():
            with in_evaluation_mode(reft_model):
                draw.choice(calls)()

    def is_right() -> bool:
        modes = {module.training for module in reft_model.modules()}
        with in_evaluation_mode(reft_model):
            return modes == {True} and all(are_equal(calls, expected))

    threads = [threading.Thread(target=ask, args=(seed,), daemon=True) for seed in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(count):
            in_child(is_right)
    finally:
        stop.set()
        for thread in threads:
            thread.join(SECONDS)
    assert all(module.training for module in reft_model.modules())


@forking
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_locks_and_stored_prompts_in_a_child() -> None:
    lock, own, cache = ForkSafeLock(), ForkSafeLock(), PrefixCache("memory")
    held, stop = threading.Event(), threading.Event()

    def hold() -> None:
        with lock, cache.lock:
            held.set()
            stop.wait()

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    held.wait()
    cache.belongs_to(("weights",))
    cache.write(b"ab", torch.ones(2, 3))

    def can_enter() -> bool:
        with lock, cache.lock:
            cache.belongs_to(("weights",))
            return len(cache) == 0  # of which a thread of the parent may have half written one

    with own:
        in_child(can_enter)
    stop.set()
    thread.join()
    assert len(cache) == 1
