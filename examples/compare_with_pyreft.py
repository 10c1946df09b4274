"""Time of a training step against pyreft and against the floor, interleaved in one run.

The floor is what no method that edits every layer can avoid: the frozen base's forward pass, and
the backward pass down to the first edited hidden state. pyreft's model is driven directly, since
its trainer does not run on transformers 5.

    pip install --no-deps pyreft==0.1.0
    python examples/compare_with_pyreft.py
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pyreft
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import reftnoise as rn


def base_model(hidden_size: int, layers: int) -> Any:
    """A random frozen Llama, the same at every call."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden_size,
        intermediate_size=int(2.75 * hidden_size),
        num_hidden_layers=layers,
        num_attention_heads=8,
    )
    return LlamaForCausalLM(config).requires_grad_(False)


def floor_step(model: Any, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Forward, and backward down to the output of the first layer."""
    hook = model.model.layers[0].register_forward_hook(lambda _, __, out: out.requires_grad_())
    assert hook is not None

    def step() -> Tensor:
        loss: Tensor = model(**batch).loss
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return step


def ours_step(model: Any, batch: dict[str, Tensor], rank: int, n: int) -> Callable[[], Tensor]:
    positions = f"f{n}+l{n}"
    entry = {"layer": "all", "intervention": "loreft", "low_rank_dimension": rank, "tied": False}
    config = rn.ReftConfig(representations=entry | {"positions": positions})
    reft_model = rn.get_reft_model(model, config).train()

    def step() -> Tensor:
        reft_model.zero_grad()
        loss: Tensor = reft_model(**batch).loss
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return step


def pyreft_step(model: Any, batch: dict[str, Tensor], rank: int, n: int) -> Callable[[], Tensor]:
    layers, width = range(model.config.num_hidden_layers), model.config.hidden_size
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": rank,
            "intervention": pyreft.LoreftIntervention(
                embed_dim=width, low_rank_dimension=rank, dtype=torch.float32
            ),
        }
        for layer in [*layers, *layers]
    ]
    config = pyreft.ReftConfig(representations=representations)
    reft_model = pyreft.get_reft_model(model, config)
    prompt = int((batch["labels"][0] == -100).sum())
    rows = len(batch["labels"])
    first, last = [list(range(n))] * rows, [list(range(prompt - n, prompt))] * rows
    locations = {"sources->base": (None, [first] * len(layers) + [last] * len(layers))}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    parameters = [p for unit in reft_model.interventions.values() for p in unit.parameters()]

    def step() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        _, output = reft_model(inputs, unit_locations=locations, labels=batch["labels"])
        loss: Tensor = output.loss
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return step


def main(
    hidden_size: int = 512,
    layers: int = 8,
    ranks: tuple[int, ...] = (4, 32),
    positions: int = 7,
    batch_size: int = 8,
    prompt: int = 96,
    completion: int = 32,
    rounds: int = 7,
) -> None:
    """Print the median time of a step, relative to the floor's.

    Args:
        hidden_size: of the Llama.
        layers: of the Llama, all of which are edited.
        ranks: of the edits, a row each.
        positions: n in f{n}+l{n}, untied.
        batch_size: rows.
        prompt: tokens of each row's prompt.
        completion: tokens of each row's completion.
        rounds: interleaved measurements of each side.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(0, 4096, (batch_size, prompt + completion))
    labels = ids.masked_fill(torch.arange(prompt + completion) < prompt, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    table = Table("rank", "floor", "reftnoise", "pyreft 0.1.0")
    table.title = (
        f"time of a training step, Llama {hidden_size} × {layers}, f{positions}+l{positions}"
    )
    for rank in ranks:
        steps = {
            "floor": floor_step(base_model(hidden_size, layers), batch),
            "reftnoise": ours_step(base_model(hidden_size, layers), batch, rank, positions),
            "pyreft": pyreft_step(base_model(hidden_size, layers), batch, rank, positions),
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        for round_ in range(rounds + 1):
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                if round_ > 0:  # the first one warms up
                    times[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(values) for name, values in times.items()}
        cells = [f"{1000 * medians['floor']:.0f} ms"]
        cells += [f"{medians[n] / medians['floor']:.2f} ×" for n in ("reftnoise", "pyreft")]
        table.add_row(str(rank), *cells)
    Console().print(table)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
