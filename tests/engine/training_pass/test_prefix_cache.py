"""Keys and values of prompts: stored once, within their budget, never stale."""

import copy
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from reftnoise.engine.training_pass.prefix_cache import BLOCK, PrefixCache
from reftnoise.engine.training_pass.probe import is_random
from support.models.architectures import tiny_model
from support.training_steps import assert_same, batch, plain, split, step, wrapped

WIDTH = 6


def named(*tokens: int) -> bytes:
    return torch.tensor(tokens).numpy().tobytes()


def values(*tokens: int) -> Tensor:
    """What a base would compute: it depends on all tokens before."""
    return torch.tensor(tokens).cumsum(0)[:, None] + torch.arange(float(WIDTH))


def written(cache: PrefixCache, *tokens: int) -> None:
    cache.write(named(*tokens), values(*tokens))


def block_bytes() -> int:
    return BLOCK * WIDTH * 4


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_what_is_written_is_read(place: Any, length: int, tmp_path: Path) -> None:
    cache = PrefixCache(place, 10 * block_bytes(), tmp_path)
    tokens = list(range(length))
    written(cache, *tokens)
    assert named(*tokens) in cache
    assert named(*tokens[:-1], 99) not in cache
    found = cache.stacked([named(*tokens), b"other"], [length, 2], length + 2)
    assert torch.equal(found[0, 2:], values(*tokens))
    assert not found[0, :2].any()
    assert not found[1].any()


def test_a_common_beginning_is_stored_once() -> None:
    cache = PrefixCache(max_bytes=100 * block_bytes())
    system = list(range(2 * BLOCK))
    for last in range(5):
        written(cache, *system, last)
    assert len(cache) == 5
    assert cache.nbytes == (2 + 5) * block_bytes()


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_the_budget_holds_and_what_stays_is_right(place: Any, tmp_path: Path) -> None:
    cache = PrefixCache(place, 7 * block_bytes() + 5, tmp_path)
    prompts = [[*range(BLOCK), *range(100 * n, 100 * n + 1 + n % 20)] for n in range(40)]
    for _ in range(3):
        for tokens in prompts:
            written(cache, *tokens)
            assert cache.nbytes <= cache.max_bytes
            for kept in (p for p in prompts if named(*p) in cache):
                found = cache.stacked([named(*kept)], [len(kept)], len(kept))
                assert torch.equal(found[0], values(*kept))
    assert len(cache) >= 3


def test_a_prompt_larger_than_the_budget_is_left_out() -> None:
    cache = PrefixCache(max_bytes=2 * block_bytes())
    written(cache, 1, 2)
    written(cache, *range(3 * BLOCK))
    assert len(cache) == 1
    assert named(1, 2) in cache


def test_a_budget_below_one_block_keeps_nothing(caplog: pytest.LogCaptureFixture) -> None:
    cache = PrefixCache(max_bytes=1)
    written(cache, 1, 2)
    assert len(cache) == cache.nbytes == 0
    assert "a prefix cache of 1 bytes holds nothing: 16 tokens take 384 bytes" in caplog.text


def test_another_stamp_forgets() -> None:
    cache = PrefixCache(max_bytes=10 * block_bytes())
    cache.belongs_to((1,))
    written(cache, 1, 2)
    cache.belongs_to((1,))
    assert len(cache) == 1
    cache.belongs_to((2,))
    assert len(cache) == cache.nbytes == 0


def test_the_file_is_gone_even_if_the_process_is_killed(tmp_path: Path) -> None:
    cache = PrefixCache("disk", 10 * block_bytes(), tmp_path)
    written(cache, 1, 2)
    assert len(cache) == 1
    assert os.listdir(tmp_path) == []


def test_a_disk_without_room(tmp_path: Path) -> None:
    cache = PrefixCache("disk", 2**60, tmp_path)
    with pytest.raises(OSError, match="bytes free, but the prefix cache reserves"):
        written(cache, 1, 2)
    assert os.listdir(tmp_path) == []


def test_a_copy_starts_empty() -> None:
    cache = PrefixCache(max_bytes=10 * block_bytes())
    written(cache, 1, 2)
    other = copy.deepcopy(cache)
    assert (len(other), other.max_bytes) == (0, cache.max_bytes)
    assert len(cache) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ram",), "prefix cache 'ram': expected 'memory' or 'disk'"),
        (("memory", 0), "max_bytes 0: expected a positive number"),
        (("memory", 1.5), "max_bytes 1.5: expected a positive number"),
    ],
)
def test_what_it_refuses(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixCache(*arguments)


# -- with a model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_too_small_a_cache_costs_time_and_nothing_else(place: Any, tmp_path: Path) -> None:
    model, inputs = split(wrapped()), batch()
    expected = plain(model, inputs)
    model.prefix_cache = PrefixCache(place, 3 * BLOCK * 3 * 2 * 16 * 4, tmp_path)
    for _ in range(4):
        assert_same(step(model, inputs, return_logits=False), expected)
    assert model.prefix_cache.misses > 4
    assert model.prefix_cache.hits > 0


def test_two_models_on_one_base_may_share_it() -> None:
    base, inputs, cache = tiny_model(), batch(), PrefixCache()
    for positions in ("l1", "l1", "l3"):
        model = split(wrapped(positions, base=base))
        model.prefix_cache = cache
        assert_same(step(model, inputs, return_logits=False), plain(model, inputs))
    assert (cache.hits, cache.misses) == (6, 6)  # with l3, two rows have no prompt before the cut


def test_new_weights_are_noticed() -> None:
    model, inputs = split(wrapped()), batch()
    model.prefix_cache = PrefixCache()
    step(model, inputs)
    with torch.no_grad():
        model.model.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert_same(step(model, inputs, return_logits=False), plain(model, inputs))
    model.model.load_state_dict(tiny_model("llama", initializer_range=0.1).state_dict())
    assert_same(step(model, inputs, return_logits=False), plain(model, inputs))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
def test_prompts_of_a_peft_base_are_not_kept() -> None:
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    base = peft.get_peft_model(tiny_model(), lora).requires_grad_(False)
    model = split(wrapped(base=base))
    model.prefix_cache = PrefixCache()
    expected = plain(model, batch())
    assert_same(step(model, batch(), return_logits=False), expected)
    with base.disable_adapter():
        found = step(model, batch(), return_logits=False)
        assert found[0].loss != expected[0].loss
        assert_same(found, plain(model, batch()))


def test_a_fused_optimizer_leaves_nothing_stale() -> None:
    model, inputs = split(wrapped()), batch()
    model.prefix_cache = PrefixCache()
    step(model, inputs)
    model.split = "auto"
    model.model.requires_grad_(True)
    model(**inputs).loss.backward()
    torch.optim.AdamW(model.model.parameters(), lr=0.05, fused=True).step()
    model.model.requires_grad_(False)
    assert_same(step(model, inputs, return_logits=False), plain(model, inputs))


def test_rotary_frequencies_that_change_leave_nothing_stale() -> None:
    model, inputs = split(wrapped()), batch()
    model.prefix_cache = PrefixCache()
    step(model, inputs)
    before = model.model.model.rotary_emb.inv_freq.clone()
    try:
        model.model.model.rotary_emb.inv_freq.mul_(0.5)
        assert_same(step(model, inputs, return_logits=False), plain(model, inputs))
    finally:
        model.model.model.rotary_emb.inv_freq.copy_(before)


def test_late_logits_of_another_base_are_refused() -> None:
    model, inputs = split(wrapped()), batch()
    model.prefix_cache = PrefixCache()
    step(model, inputs)
    output = model(**inputs)
    with torch.no_grad():
        model.model.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="the base has changed since"):
        output.logits  # noqa: B018


def test_another_dtype_starts_anew() -> None:
    model, inputs = split(wrapped()), batch()
    model.prefix_cache = PrefixCache()
    step(model, inputs)
    model.model.bfloat16()
    for _ in range(2):
        found = step(model, inputs, return_logits=False)[0].loss
        torch.testing.assert_close(found, plain(model, inputs)[0].loss, rtol=1e-3, atol=0)


def test_new_edits_are_not_of_interest_to_it() -> None:
    model, inputs = split(wrapped()), batch()
    model.prefix_cache = PrefixCache()
    optimizer = torch.optim.AdamW(model.interventions.parameters(), lr=0.1)
    for _ in range(4):
        assert_same(step(model, inputs, return_logits=False), plain(model, inputs))
        optimizer.step()
    assert (model.prefix_cache.hits, model.prefix_cache.misses) == (12, 4)


@pytest.mark.parametrize(
    ("noise", "kept"),
    [({"where": "all"}, 0), ({"where": "prompt"}, 0), ({"where": "completion"}, 4)],
)
def test_prompts_are_kept_unless_they_are_noised(noise: dict[str, str], kept: int) -> None:
    model = split(wrapped("l1", {"intervention": "neftune"} | noise))
    model.prefix_cache = PrefixCache()
    for _ in range(2):
        assert_same(step(model, batch(), return_logits=False), plain(model, batch()))
    assert len(model.prefix_cache) == kept


@pytest.mark.parametrize("rate", ["attention_dropout", "embd_pdrop"])
def test_prompts_are_not_kept_under_dropout(rate: str) -> None:
    base = tiny_model("gpt2" if rate == "embd_pdrop" else "llama", **{rate: 0.5})
    model = split(wrapped(base=base))
    model.prefix_cache = PrefixCache()
    step(model, batch())
    assert len(model.prefix_cache) == 0
    model.model.eval()
    step(model, batch())
    assert len(model.prefix_cache) == 4


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_a_base_is_asked_twice_whether_it_is_random(rate: float) -> None:
    base = tiny_model(attention_dropout=rate).train()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    assert is_random(base) is (rate > 0)
    assert torch.equal(torch.rand(3), expected)
    assert all(module.training for module in base.modules())
    assert not is_random(base.eval())
