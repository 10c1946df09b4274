"""Many adapters on one base: memory, what choosing costs, and a batch with units of all kinds.

python examples/serving/many_adapters.py [--model MODEL]
"""

import argparse
import functools
import gc
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import reftnoise as rn


def random_base() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    return LlamaForCausalLM(config)


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def interleaved(ways: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """The median seconds of each way, measured by turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 2):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


KINDS: list[dict[str, Any]] = [
    {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4, "positions": "f1+l1"},
    {"layer": "all", "component": "mlp_output", "intervention": "red"},
    {"layer": "all", "component": "mlp_output", "intervention": "bias"},
    {"layer": 1, "intervention": "addition"},
    {"intervention": "ablate"},
]
"""The units of mixed adapters, in turn."""


def with_mixed(base: Any, count: int) -> rn.ReftModel:
    """A model with so many adapters, each of one kind of units, far from the identity."""
    model = rn.get_reft_model(base)
    for number in range(count):
        torch.manual_seed(number)
        own = rn.get_reft_model(base, rn.ReftConfig([KINDS[number % len(KINDS)]]))
        with torch.no_grad():
            for unit in own.interventions.values():
                for name, tensor in unit.state_dict().items():
                    if "rotate_layer" not in name:
                        tensor.normal_(1.0 if name == "scaling" else 0.0, 0.02)
        with tempfile.TemporaryDirectory() as folder:
            own.eval().save_pretrained(folder)
            model.load_adapter(folder, str(number))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="name or directory of a base; a random one by default")
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--mixed", type=int, default=64, help="adapters, and rows, of all kinds")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(options.model) if options.model else random_base()
    entry = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}
    few, many = rn.get_reft_model(base.eval()), rn.get_reft_model(base)
    with tempfile.TemporaryDirectory() as folder:
        own = rn.get_reft_model(base, rn.ReftConfig([entry]))
        own.save_pretrained(folder)
        parameters = own.parameter_counts()[0]
        for name in map(str, range(8)):
            few.load_adapter(folder, name)
        for name in ("warm", "up"):
            many.load_adapter(folder, name)
        before, start = resident(), time.perf_counter()
        for name in map(str, range(options.adapters)):
            many.load_adapter(folder, name)
        loading = (time.perf_counter() - start) / options.adapters
        used = (resident() - before) / options.adapters
    print(f"{options.adapters} adapters: {used / (4 * parameters):.3f} of their weights' memory, ")
    print(f"each of {parameters:,} parameters, loaded in {1000 * loading:.1f} ms")

    draw = random.Random(0)
    ids = torch.randint(0, base.config.vocab_size, (32, 64))
    two, all_of_them = ("0", "1"), list(many.adapters)

    def prefill(model: rn.ReftModel, names: Any) -> None:
        with torch.no_grad():
            model(input_ids=ids, adapter_names=names, logits_to_keep=1)

    alone = interleaved(
        {
            "one of 2": lambda: prefill(few, [draw.choice(two)] * 32),
            "one of all": lambda: prefill(many, [draw.choice(all_of_them)] * 32),
        },
        options.turns,
    )
    ratio = alone["one of all"] / alone["one of 2"]
    print(f"a prefill with one of {len(all_of_them)} against one of 2, newly chosen: {ratio:.3f}")
    eight = [str(row % 8) for row in range(32)]
    routed = interleaved(
        {
            "one": lambda: prefill(few, ["0"] * 32),
            "eight": lambda: prefill(few, eight),
        },
        options.turns,
    )
    print(f"a prefill of 32 rows with 8 adapters against 1: {routed['eight'] / routed['one']:.3f}")

    mixed, ids = with_mixed(base, options.mixed), ids.repeat(options.mixed, 1)[: options.mixed]
    kinds = [kind["intervention"] for kind in KINDS][: options.mixed]
    rows: dict[str, list[str]] = {"each": list(mixed.adapters)}
    rows |= {kind: [str(number)] * len(ids) for number, kind in enumerate(kinds)}
    ways: dict[str, Callable[[], Any]] = {
        name: functools.partial(prefill, mixed, names) for name, names in rows.items()
    }
    seconds = interleaved(ways, options.turns)
    ratios = {kind: round(seconds["each"] / seconds[kind], 3) for kind in kinds}
    print(f"a prefill of {len(ids)} rows, each with an adapter of its own, against one for all:")
    print(", ".join(f"{kind} {ratio}" for kind, ratio in ratios.items()))


if __name__ == "__main__":
    main()
