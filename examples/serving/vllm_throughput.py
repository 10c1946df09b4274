"""Tokens per second of vLLM with adapters or capture, and without the plugin, on the same requests.

    python examples/serving/vllm_throughput.py
    python examples/serving/vllm_throughput.py --sides "no adapter" captured --tokens 1 --eager

Two engines of one model, each in a process of its own, take turns: one in whose process the plugin
is not even loaded, and one that serves requests without adapters, with eight among them, and with
the hidden states of each prompt's last token after all blocks captured into files. A ratio is the
median over the turns, in each of which the sides follow one another, in random order.
"""

import argparse
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import reftnoise as rn

PLAIN, BARE, ADAPTERS, CAPTURED = SIDES = (
    "without the plugin",
    "no adapter",
    "adapters",
    "captured",
)


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


def adapters_of(base: Path, folder: Path, count: int, positions: list[str]) -> list[Path]:
    """LoReFT of rank 4 at all layers, at one of the positions after the other."""
    paths = []
    for number in range(count):
        torch.manual_seed(number)
        entry = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}
        entry["positions"] = positions[number % len(positions)]
        model = AutoModelForCausalLM.from_pretrained(base)
        paths.append(folder / str(number))
        rn.get_reft_model(model, rn.ReftConfig([entry])).save_pretrained(paths[-1])
    return paths


def engine(pipe: Connection, load: dict[str, Any], *, has_plugin: bool, eager: bool) -> None:
    """Serve the load each time the pipe names a side, and answer with seconds."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    if not has_plugin:
        os.environ["VLLM_PLUGINS"] = ""
    import vllm
    from vllm.lora.request import LoRARequest

    llm = vllm.LLM(
        load["base"],
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=512,
        enforce_eager=eager,
        enable_prefix_caching=False,
        additional_config={"reft": ["block_output"], "reft_capture": load["captures"]}
        if has_plugin
        else {},
    )
    prompts = [{"prompt_token_ids": tokens} for tokens in load["prompts"]]
    settings = vllm.SamplingParams(
        temperature=0, max_tokens=load["tokens"], ignore_eos=True, detokenize=False
    )
    capturing = [settings.clone() for _ in prompts]
    for index, copied in enumerate(capturing):
        copied.extra_args = {"reft_capture": str(index)}
    loaded = [LoRARequest(path.name, 1 + int(path.name), str(path)) for path in load["adapters"]]
    mixed = [loaded[index % len(loaded)] for index in range(len(prompts)) if loaded]
    pipe.send("ready")
    while (side := pipe.recv()) is not None:
        start = time.perf_counter()
        llm.generate(
            prompts,
            capturing if side == CAPTURED else settings,
            lora_request=mixed if side == ADAPTERS else None,
            use_tqdm=False,
        )
        pipe.send(time.perf_counter() - start)


def started(load: dict[str, Any], **settings: bool) -> Connection:
    """The pipe of an engine that is ready."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=engine, args=(theirs, load), kwargs=settings, daemon=True).start()
    theirs.close()
    ours.recv()
    return ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="generated per request")
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=SIDES, help="ratios are to the first"
    )
    parser.add_argument(
        "--positions", nargs="+", default=["l1", "f4+l4", "all", "f1"], help="of the adapters"
    )
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    options = parser.parse_args()
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        random_base(base, options.width, options.layers)
        count = options.adapters if ADAPTERS in options.sides else 0
        load = {
            "base": str(base),
            "captures": str(Path(scratch) / "captures"),
            "adapters": adapters_of(base, Path(scratch), count, options.positions),
            "tokens": options.tokens,
            "prompts": [
                [draw.randrange(3, 8192) for _ in range(draw.randint(16, 128))]
                for _ in range(options.requests)
            ],
        }
        pipes: dict[bool, Connection] = {}
        for has_plugin in {side != PLAIN for side in options.sides}:
            pipes[has_plugin] = started(load, has_plugin=has_plugin, eager=options.eager)
        seconds: dict[str, list[float]] = {side: [] for side in options.sides}
        for turn in range(options.turns + 1):  # the first warms up
            for side in draw.sample(list(seconds), len(seconds)):
                pipe = pipes[side != PLAIN]
                pipe.send(side)
                took = pipe.recv()
                if turn:
                    seconds[side].append(took)
        for pipe in pipes.values():
            pipe.send(None)
    total = options.requests * options.tokens
    first = seconds[options.sides[0]]
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(first, times, strict=True))
        print(f"{name:20} {total / statistics.median(times):8.0f} tokens/s  {ratio:.3f}")


if __name__ == "__main__":
    main()
