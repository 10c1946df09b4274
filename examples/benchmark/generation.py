"""The methods that generate: each makes a function that continues the batch's prompts greedily."""

import functools
from collections.abc import Callable
from typing import Any

from methods import Bench, lora_model, pyreft_model

import reftnoise as rn

Generate = Callable[[int], Any]
"""Generates so many tokens."""

_ADAPTERS = 8


def _greedy(bench: Bench, model: Any, **options: Any) -> Generate:
    def generate(tokens: int) -> Any:
        return model.generate(
            **bench.prompts, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False,
            use_cache=True, pad_token_id=0, eos_token_id=None, **options,
        )  # fmt: skip

    return generate


def _everywhere(bench: Bench) -> rn.ReftModel:
    """LoReFT at every token of all layers."""
    return bench.reft(positions="all+decode").eval()


def base(bench: Bench, **options: Any) -> Generate:
    """The base without edits."""
    return _greedy(bench, bench.twin().eval(), **options)


def prompt(bench: Bench, **options: Any) -> Generate:
    """LoReFT at the workload's positions, all of which lie in the prompt."""
    return _greedy(bench, bench.reft().eval(), **options)


def addition(bench: Bench, **options: Any) -> Generate:
    """A vector added to every token at all layers."""
    entry = {"layer": bench.work.edited, "intervention": "bias", "positions": "all+decode"}
    model = rn.get_reft_model(bench.base, rn.ReftConfig([entry])).eval()
    return _greedy(bench, model, **options)


def loreft(bench: Bench, **options: Any) -> Generate:
    """LoReFT at every token of all layers."""
    return _greedy(bench, _everywhere(bench), **options)


def adapter(bench: Bench) -> Generate:
    """The same as an adapter that all rows choose by its name."""
    return _by_name(bench, 1)


def adapters(bench: Bench) -> Generate:
    """Eight such adapters, which rows choose by their names in turn."""
    return _by_name(bench, _ADAPTERS)


def _by_name(bench: Bench, number: int) -> Generate:
    model = _everywhere(bench)
    for index in range(number):
        model.adapters.derive(str(index), "default")
    rows = [str(row % number) for row in range(bench.work.batch_size)]
    return _greedy(bench, model, adapter_names=rows)


def lora(bench: Bench) -> Generate:
    """LoRA of rank 8 on queries and values, by peft."""
    return _greedy(bench, lora_model(bench).eval())


def pyreft(bench: Bench) -> Generate:
    """LoReFT at the workload's positions by pyreft 0.1.0, its model driven directly."""
    model, locations = pyreft_model(bench)

    def generate(tokens: int) -> Any:
        return model.generate(
            bench.prompts, unit_locations=locations, intervene_on_prompt=True,
            min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, use_cache=True,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip

    return generate


_EAGER = (base, prompt, addition, loreft, adapter, adapters, lora, pyreft)
_COMPILED = (base, prompt, addition, loreft)

GENERATIONS: dict[str, Callable[[Bench], Generate]] = {
    **{method.__name__: method for method in _EAGER},
    **{
        f"compiled_{method.__name__}": functools.partial(method, cache_implementation="static")
        for method in _COMPILED
    },
}
"""The compiled ones have a static cache, with which transformers compiles decoding on a GPU."""
