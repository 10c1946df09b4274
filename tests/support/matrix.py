"""What works on which architecture: every cell is run, and says "ok" or why not.

`PYTHONPATH=tests python -m support.matrix` prints the table of examples/guides/architectures.md, or
the rows of the architectures that it gets as arguments.
"""

import argparse
import contextlib
import copy
import logging
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from torch import Tensor

import reftnoise as rn
from reftnoise.config.components import split_component
from reftnoise.engine.base.sites import find_site, num_layers, takes_position_ids
from support.models.tiny_models import LAYERS, MODELS, Example, examples_of, model_of, padded
from support.tolerance import assert_close_gradients

NEW_TOKENS = 6
TOLERANCE = 1e-4

# What a cell says instead of "ok", and what it read in a message of ours or of transformers.
REASONS = {
    "state": r"keeps states \(\w+\) next to keys and values",
    "structure": r"does not call its '\w+' once|has no decoder apart from its head",
    "loss": r"labels are not one per token|has a loss_function of its own",
    "length": r"tells the length of its sequences only when it runs",
    "images": r"pixel_values may change the loss",
    "no generation": r"writes no tokens",
    "no heads": r"component 'head_output': ",
}


def reason(error: Exception) -> str:
    """A known reason in a word or two; any other error is raised."""
    for short, message in REASONS.items():
        if re.search(message, str(error)):
            return short
    raise error


def wrapped(architecture: str, positions: str = "f1+l1", *, noise: bool = False) -> rn.ReftModel:
    """A copy of the base with LoReFT at all layers, of both stacks where there are two."""
    kind = MODELS[architecture][0]
    units: list[Any] = [
        LAYERS | {"component": component, "positions": positions} for component in kind.edited
    ]
    if noise:
        units.append({"intervention": "symnoise", "component": kind.noised, "alpha": 1.0})
    return _with(architecture, units)


def _with(architecture: str, units: list[Any]) -> rn.ReftModel:
    torch.manual_seed(1)
    return rn.get_reft_model(copy.deepcopy(model_of(architecture)), rn.ReftConfig(units))


# -- the cells -------------------------------------------------------------------------------------


def train(architecture: str) -> str:
    """The loss falls, every unit acts and gets a gradient, and the frozen base stays as it is."""
    model, batch = wrapped(architecture, noise=True), padded(examples_of(architecture))
    frozen = {n: p.clone() for n, p in model.model.named_parameters() if not p.requires_grad}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = loss_of(model, batch)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    for step in range(4):
        loss = model(**batch).loss
        assert step > 0 or loss.item() != before, "no noise"
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
        optimizer.step()
    assert loss_of(model.eval(), batch) < before
    base = dict(model.model.named_parameters())
    assert frozen
    assert all(torch.equal(base[name], values) for name, values in frozen.items())
    return "ok"


@torch.no_grad()
def padding(architecture: str) -> str:
    """A padded batch gives what each row gives alone, on the sides where the base does so."""
    model, rows = wrapped(architecture), examples_of(architecture)
    if all(len({row[name].shape for row in rows}) == 1 for name in rows[0]):
        return "one size"
    with model.disabled():
        base = {side: distance(model, rows, side) for side in ("left", "right")}
    sides = [side for side, found in base.items() if found <= TOLERANCE]
    assert all(distance(model, rows, side) <= TOLERANCE for side in sides)
    return "ok" if len(sides) == 2 else f"{sides[0]} side"


@torch.no_grad()
def cache(architecture: str) -> str:
    """Greedy generation, with and without a cache, takes the tokens of whole forward passes."""
    model, (row, *_) = wrapped(architecture), examples_of(architecture)
    given = {n: v for n, v in row.items() if n not in ("labels", "position_ids")}
    try:
        cached = greedy(model, given, use_cache=True)
    except ValueError as error:
        return reason(error)
    expected = forced(model, given)
    for tokens, logits in (cached, greedy(model, given, use_cache=False)):
        assert torch.equal(tokens, expected[0])
        assert relative(logits, expected[1]) <= TOLERANCE
    with model.disabled():
        assert relative(greedy(model, given, use_cache=True)[1], expected[1]) > TOLERANCE
    return "ok"


@torch.no_grad()
def saving(architecture: str) -> str:
    """A saved adapter, loaded around another copy of the base, gives bit-equal outputs."""
    model, batch = wrapped(architecture, noise=True).eval(), padded(examples_of(architecture))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        base = copy.deepcopy(model_of(architecture))
        loaded = rn.ReftModel.from_pretrained(base, directory)
    assert loaded.reft_config.to_dict() == model.reft_config.to_dict()
    expected = model(**batch).logits
    assert torch.equal(loaded(**batch).logits, expected)
    with model.disabled():
        assert not torch.equal(model(**batch).logits, expected)
    return "ok"


def split(architecture: str) -> str:
    """A split pass gives the loss and gradients of the plain pass; so does falling back to it."""
    model, rows = wrapped(architecture, "l1").train(), examples_of(architecture)
    batch, result = padded(rows), "ok"
    if not takes_position_ids(model.model) and "input_ids" in batch:  # so no row can be shifted
        batch, result = padded([rows[0], rows[0]]), "equal prompts"
    model.split = "always"
    try:
        found = gradients(model, batch)
    except ValueError as error:
        result = reason(error)
        model.split = "auto"
        found = gradients(model, batch)
    model.split = "never"
    assert_close_gradients(found, gradients(model, batch, return_logits=True))
    return result


def checkpointing(architecture: str) -> str:
    """Gradient checkpointing of both kinds gives the gradients of the pass without it."""
    model, batch = wrapped(architecture, noise=True).train(), padded(examples_of(architecture))
    expected = gradients(model, batch)
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        with calls_in_backward() as calls:
            found = gradients(model, batch)
        assert_close_gradients(found, expected)
        assert calls
    return "ok"


def other_units(architecture: str) -> str:
    """RED behind a probe, and LoReFT that keeps norms, get their gradients, and act in a cache."""
    units: list[Any] = []
    for component in MODELS[architecture][0].edited:
        place = {"component": component, "positions": "f1+l1"}
        units += [
            place | {"layer": 0, "intervention": "red", "gate": {"type": "probe"}},
            LAYERS | place | {"layer": 1, "gate": {"type": "norm"}},
        ]
    model, rows = _with(architecture, units).train(), examples_of(architecture)
    gradients(model, padded(rows))
    edited = dict(model.interventions.named_parameters())
    for name, parameter in edited.items():
        assert parameter.grad is not None
        # The gradient of a fresh probe is 0: s ⊙ h + b is h.
        assert ".gate." in name or parameter.grad.abs().max() > 0
    with torch.no_grad():
        for name, parameter in edited.items():
            if "rotate_layer" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    _expect_conditions(architecture)
    given = {n: v for n, v in rows[0].items() if n not in ("labels", "position_ids")}
    try:
        tokens, logits = greedy(model.eval(), given, use_cache=True)
    except ValueError as error:
        return reason(error)
    with torch.no_grad():
        expected = forced(model, given)
    assert torch.equal(tokens, expected[0])
    assert relative(logits, expected[1]) <= TOLERANCE
    return "ok"


@torch.no_grad()
def _expect_conditions(architecture: str) -> None:
    """Rows whose prompt always meets a condition are edited as without one, the others never."""
    batch = padded(examples_of(architecture))

    def logits(**gate: Any) -> Tensor:
        place = {"layer": "all", "intervention": "bias", "positions": "all"} | gate
        components = MODELS[architecture][0].edited
        model = _with(architecture, [place | {"component": c} for c in components]).eval()
        for unit in model.interventions.values():
            unit.bias[::2] = 1.0  # a norm would take a constant out
            if gate:
                unit.gate.vector.fill_(1.0)
        found: Tensor = model(**batch).logits
        return found

    always, never = ({"type": "condition", "threshold": t} for t in (-1, 1))
    plain = logits()
    assert relative(logits(gate=always), plain) <= TOLERANCE
    bare: Tensor = _with(architecture, []).eval()(**batch).logits
    assert torch.equal(logits(gate=never), bare)
    assert relative(bare, plain) > TOLERANCE


def heads(architecture: str) -> str:
    """LoFiT at one head and JoLA at another get gradients, leave the others, and act in a cache."""
    base, units, why = model_of(architecture), [], ""
    for component in MODELS[architecture][0].edited:
        place = {"component": component.replace("block", "head"), "positions": "all+decode"}
        stack: Any = split_component(component)[0]
        for layer in range(num_layers(base, stack)):
            try:
                find_site(base, place["component"], layer, [0, 1])
            except ValueError as error:
                why = reason(error)
                continue
            units += [
                place | {"layer": layer, "heads": [0], "intervention": "lofit", "trained": "both"},
                place | {"layer": layer, "heads": [1], "intervention": "jola"},
            ]
    if not units:
        return why
    model, rows = _with(architecture, units).train(), examples_of(architecture)
    gradients(model, padded(rows))
    for unit in model.interventions.values():
        slopes = [parameter.grad for parameter in unit.parameters()]
        assert all(slope is not None for slope in slopes)
        # A gate of JoLA may be drawn as 0.
        assert isinstance(unit, rn.JolaIntervention) or all(slope.any() for slope in slopes)
    with torch.no_grad():
        for parameter in model.interventions.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        _expect_other_heads_left(model.eval(), padded(rows))
    row = {n: v for n, v in rows[0].items() if n not in ("labels", "position_ids")}
    try:
        tokens, logits = greedy(model, row, use_cache=True)
    except ValueError as error:
        return reason(error)
    with torch.no_grad():
        expected = forced(model, row)
    assert torch.equal(tokens, expected[0])
    assert relative(logits, expected[1]) <= TOLERANCE
    return "ok"


def _expect_other_heads_left(model: rn.ReftModel, batch: Example) -> None:
    """Of what the first edited layer's projection reads, the slices of two heads change alone."""
    sites = [placed.site for placed in model.engine.units]
    pair = [site for site in sites if site.module is sites[0].module]
    states: list[Tensor] = []
    with sites[0].module.register_forward_pre_hook(lambda _, args: states.append(args[0])):
        model(**batch)
        with model.disabled():
            model(**batch)
    changed = (states[0] != states[1]).flatten(0, -2).any(0)
    expected = torch.zeros_like(changed)
    for site in pair:
        for start, end in site.columns:
            expected[start:end] = True
    assert torch.equal(changed, expected)


CELLS: dict[str, Callable[[str], str]] = {
    "train": train,
    "padded batch = single row": padding,
    "cached = uncached": cache,
    "save, load": saving,
    "split pass": split,
    "gradient checkpointing": checkpointing,
    "RED, gates": other_units,
    "heads": heads,
}


# -- what they measure -----------------------------------------------------------------------------


@torch.no_grad()
def loss_of(model: rn.ReftModel, batch: Example) -> float:
    return float(model(**batch).loss)


def gradients(model: rn.ReftModel, batch: Example, **options: Any) -> list[Tensor]:
    """The loss, and its gradients for everything that is trained."""
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**batch, **options).loss
    loss.backward()
    return [loss.detach(), *[p.grad for p in model.parameters() if p.requires_grad]]


@contextlib.contextmanager
def calls_in_backward() -> Iterator[list[torch.nn.Module]]:
    """The modules that run within a backward pass, as gradient checkpointing has them do."""
    seen: list[torch.nn.Module] = []

    def note(module: torch.nn.Module, _: object) -> None:
        if torch._C._current_graph_task_id() != -1:
            seen.append(module)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def distance(model: rn.ReftModel, rows: list[Example], side: str) -> float:
    """How far a padded batch's logits are from those of its rows."""
    together = own_logits(model, padded(rows, side))
    alone = [own_logits(model, row)[0] for row in rows]
    return max(relative(one, other) for one, other in zip(together, alone, strict=True))


def own_logits(model: rn.ReftModel, batch: Example) -> list[Tensor]:
    """Each row's logits, without those at padding."""
    logits = model(**batch).logits
    if logits.dim() == 2:
        return list(logits)
    labels = batch["labels"]
    attended = labels != -100 if model.config.is_encoder_decoder else batch["attention_mask"].bool()
    return [row[mask] for row, mask in zip(logits, attended, strict=True)]


def greedy(model: rn.ReftModel, given: Example, *, use_cache: bool) -> tuple[Tensor, Tensor]:
    """The tokens of `generate`, and the logits that they were chosen by."""
    output = model.generate(
        **given,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[:, -NEW_TOKENS:], torch.stack(output.logits, 1)


def forced(model: rn.ReftModel, given: Example) -> tuple[Tensor, Tensor]:
    """The same by whole forward passes."""
    given = dict(given)
    if model.config.is_encoder_decoder:
        name = "decoder_input_ids"
        given[name] = torch.tensor([[model.generation_config.decoder_start_token_id]])
    else:
        name = "input_ids"
        given["prompt_lengths"] = given["attention_mask"].sum(1)
    seen = []
    for _ in range(NEW_TOKENS):
        if name == "decoder_input_ids":
            given["labels"] = given[name]  # the decoder's prompt is then its start, as in training
        else:
            given["attention_mask"] = torch.ones_like(given[name])
        seen.append(model(**given).logits[:, -1])
        given[name] = torch.cat([given[name], seen[-1].argmax(-1, keepdim=True)], 1)
    return given[name][:, -NEW_TOKENS:], torch.stack(seen, 1)


# -- the table -------------------------------------------------------------------------------------


def table(rows: dict[str, dict[str, str]]) -> str:
    """Markdown."""
    lines = [["", *CELLS], ["---"] * (len(CELLS) + 1)]
    lines += [[name, *cells.values()] for name, cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(architectures: list[str]) -> int:
    """Run all cells of some architectures and print their rows; 1 if a cell fails."""
    logging.getLogger("reftnoise").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows: dict[str, dict[str, str]] = {name: {} for name in architectures}
    failed = 0
    for name in track(architectures, "architectures", console=Console(stderr=True)):
        for column, cell in CELLS.items():
            try:
                rows[name][column] = cell(name)
            except Exception:
                traceback.print_exc()
                rows[name][column], failed = "FAILED", 1
    print(table(rows))
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", metavar="NAME", help=", ".join(MODELS))
    chosen = parser.parse_args().architectures or list(MODELS)
    if unknown := [name for name in chosen if name not in MODELS]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(MODELS)}")
    sys.exit(main(chosen))
