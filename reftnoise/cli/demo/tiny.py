"""The demo: teach the embedded tiny model, which answers in words, to answer in emoji."""

import tempfile
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from ..._util.files import local_path
from ...engine.base.tiny import NAME, load_tiny_examples, load_tiny_model
from ...evaluation.scoring import Evaluation, evaluate
from ...inference.prompts import show
from ...training.recipe import DataConfig, Recipe, TrainingConfig
from ...training.resolved_run import ResolvedRun
from ...training.run import load_trained, run_recipe

LOREFT = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4, "positions": "l1"}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "LoReFT": [LOREFT],
    "LoReFT + NEFTune": [LOREFT, {"intervention": "neftune", "alpha": 5.0}],
    "LoReFT + SymNoise": [LOREFT, {"intervention": "symnoise", "alpha": 5.0}],
}
SHOWN = "LoReFT + SymNoise"
SIDE_BY_SIDE = 8
TRAINING = TrainingConfig(
    num_train_epochs=60,
    per_device_train_batch_size=20,
    learning_rate=4e-3,
    group_by_length=True,
)


def run_demo(output_dir: str, seed: int) -> None:
    """Train the variants, show base and adapted answers side by side, save `SHOWN`'s adapter."""
    directory = local_path(output_dir, "output_dir")
    directory.mkdir(parents=True, exist_ok=True)  # or fail now, where it cannot be written
    console = Console(highlight=False)
    torch.set_num_threads(1)  # for so small a model, more threads cost more than they bring
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    test = [vars(example) for example in load_tiny_examples("test")]
    console.print(
        f"\nThe embedded base, {load_tiny_model()[0].num_parameters() / 1e6:.1f}M parameters, "
        f"answers questions in words. {len(load_tiny_examples('train'))} examples teach it to "
        f"answer in emoji, by edits of rank {LOREFT['low_rank_dimension']} at the last token of "
        "the prompt:\n"
    )
    results: dict[str, Evaluation] = {}
    seconds = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, representations in VARIANTS.items():
            recipe = Recipe(
                representations=representations,
                data=DataConfig(train=NAME, template="chat"),
                training=TRAINING,
                seed=seed,
                output_dir=f"{scratch}/{name}",
            )
            run = ResolvedRun(recipe)
            summary, _ = run_recipe(run, console=console)
            seconds[name] = f"{summary['seconds']:.0f} s"
            reft_model, tokenizer = load_trained(run)
            answer = partial(evaluate, reft_model, tokenizer, run.task, test, template="chat")
            if not results:
                with reft_model.disabled():
                    results["base"] = answer()
            results[name] = answer()
            if name == SHOWN:
                reft_model.save_pretrained(directory)
    trained, _, total = reft_model.parameter_counts()
    console.print()
    _show_some(results["base"], results[SHOWN], console)
    console.print()
    console.print(accuracies(results, seconds))
    console.print(
        f"{trained:,} parameters were trained, {trained / total:.2%} of the base's.\n"
        f"The adapter of {SHOWN} is in [bold]{output_dir}[/bold]. To load it:\n"
    )
    lines = (
        "import reftnoise as rn\n"
        "model, tokenizer = rn.load_tiny_model()\n"
        f"reft_model = rn.ReftModel.from_pretrained(model, {str(directory)!r})\n"
    )
    console.print(lines, markup=False, soft_wrap=True)


def _show_some(base: Evaluation, adapted: Evaluation, console: Console) -> None:
    step = max(1, len(base.prompts) // SIDE_BY_SIDE)
    some = slice(0, step * SIDE_BY_SIDE, step)
    answers = zip(base.predictions[some], adapted.predictions[some], strict=True)
    console.print(f"Prompts that the adapter never saw ({SHOWN}):")
    prompts = [str(prompt) for prompt in base.prompts[some]]
    show([{"base": b, "text": a} for b, a in answers], prompts, console)


def accuracies(results: dict[str, Evaluation], seconds: dict[str, str]) -> Table:
    """One row per model: right emoji answers on all held-out prompts, and training time."""
    prompts = len(results["base"].prompts)
    table = Table(title=f"Emoji answers to {prompts} held-out prompts", title_justify="left")
    table.add_column("model")
    table.add_column("accuracy", justify="right")
    table.add_column("training", justify="right")
    for name, result in results.items():
        table.add_row(name, f"{result.scores['exact_match']:.3f}", seconds.get(name, ""))
    return table
