"""The demo: teach the embedded tiny model, which answers in words, to answer in emoji."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from ..config.representations import ReftConfig
from ..data.collation import make_last_position_supervised_data_module
from ..engine.base.tiny import TinyExample, load_tiny_examples, load_tiny_model
from ..model import ReftModel, get_reft_model
from ..training.progress import RichProgressCallback
from ..training.trainer import ReftTrainerForCausalLM

LOREFT = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4, "positions": "l1"}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "LoReFT": [LOREFT],
    "LoReFT + NEFTune": [LOREFT, {"intervention": "neftune", "alpha": 5.0}],
    "LoReFT + SymNoise": [LOREFT, {"intervention": "symnoise", "alpha": 5.0}],
}
SHOWN = "LoReFT + SymNoise"
SIDE_BY_SIDE = 8


@dataclass
class Score:
    """A model's answers to the held-out prompts, and the share that is right."""

    answers: list[str]
    accuracy: float
    seconds: float = 0.0


def run_demo(output_dir: str | Path, seed: int = 0, console: Console | None = None) -> None:
    """Train the variants, show base and adapted answers side by side, save the adapter.

    Args:
        output_dir: directory for the adapter of `SHOWN`.
        seed: seed of all random draws.
        console: console that is printed to.
    """
    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise ValueError(f"{output_dir}: expected a directory, found a file")
    Path(output_dir).mkdir(parents=True, exist_ok=True)  # or fail now, where it cannot be written
    console = console or Console(highlight=False)
    torch.set_num_threads(1)  # for so small a model, more threads cost more than they bring
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    train, test = load_tiny_examples("train"), load_tiny_examples("test")
    model, tokenizer = load_tiny_model()
    console.print(
        f"\nThe embedded base, {model.num_parameters() / 1e6:.1f}M parameters, answers questions "
        f"in words. {len(train)} examples teach it to answer in emoji, by edits of rank "
        f"{LOREFT['low_rank_dimension']} at the last token of the prompt:\n"
    )
    results = {"base": score(model, tokenizer, test)}
    for name, representations in VARIANTS.items():
        set_seed(seed)
        model, tokenizer = load_tiny_model()
        reft_model = get_reft_model(model, ReftConfig(representations=representations))
        started = time.perf_counter()
        fit(reft_model, tokenizer, train, seed=seed, description=name, console=console)
        seconds = time.perf_counter() - started
        results[name] = score(reft_model.eval(), tokenizer, test)
        results[name].seconds = seconds
        if name == SHOWN:
            reft_model.save_pretrained(output_dir)
    trained, _, total = reft_model.count_parameters()
    console.print()
    console.print(side_by_side(test, results["base"], results[SHOWN]))
    console.print()
    console.print(accuracies(results, len(test)))
    console.print(
        f"{trained:,} parameters were trained, {trained / total:.2%} of the base's.\n"
        f"The adapter of {SHOWN} is in [bold]{output_dir}[/bold]. To load it:\n"
    )
    lines = (
        "import reftnoise as rn\n"
        "model, tokenizer = rn.load_tiny_model()\n"
        f"reft_model = rn.ReftModel.from_pretrained(model, {str(output_dir)!r})\n"
    )
    console.print(lines, markup=False, soft_wrap=True)


def fit(
    reft_model: ReftModel,
    tokenizer: Any,
    examples: list[TinyExample],
    *,
    seed: int,
    description: str,
    console: Console,
) -> None:
    """Train on the emoji of the examples, as on other supervised data."""
    data_module = make_last_position_supervised_data_module(
        tokenizer,
        reft_model,
        [example.prompt for example in examples],
        [example.completion for example in examples],
        chat_template=True,
    )
    widest = max(map(len, VARIANTS))
    progress = RichProgressCallback(console, f"{description:<{widest}}")
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=60,
            per_device_train_batch_size=20,
            learning_rate=4e-3,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            train_sampling_strategy="group_by_length",
            include_num_input_tokens_seen="non_padding",
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
        )
        trainer = ReftTrainerForCausalLM(
            model=reft_model,
            args=args,
            processing_class=tokenizer,
            callbacks=[progress],
            **data_module,
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        finally:
            progress.stop()


def score(model: Any, tokenizer: Any, examples: list[TinyExample]) -> Score:
    """Greedy answers to all prompts in one batch; an answer is right if it equals the emoji."""
    chats = [[{"role": "user", "content": example.prompt}] for example in examples]
    prompts = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompts, max_new_tokens=32, do_sample=False)
    width = prompts["input_ids"].shape[1]
    answers = [
        a.strip() for a in tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
    ]
    right = sum(a == e.completion for a, e in zip(answers, examples, strict=True))
    return Score(answers, right / len(examples))


def side_by_side(examples: list[TinyExample], base: Score, adapted: Score) -> Table:
    """Held-out prompts with the answers of base and adapted model."""
    table = Table(title=f"Prompts that the adapter never saw ({SHOWN})", title_justify="left")
    for heading in ("prompt", "base", "adapted"):
        table.add_column(heading)
    step = max(1, len(examples) // SIDE_BY_SIDE)
    rows = list(zip(examples, base.answers, adapted.answers, strict=True))[::step]
    for example, before, after in rows[:SIDE_BY_SIDE]:
        table.add_row(example.prompt, before, after)
    return table


def accuracies(results: dict[str, Score], prompts: int) -> Table:
    """One row per model: right emoji answers on all held-out prompts, and training time."""
    table = Table(title=f"Emoji answers to {prompts} held-out prompts", title_justify="left")
    table.add_column("model")
    table.add_column("accuracy", justify="right")
    table.add_column("training", justify="right")
    for name, result in results.items():
        training = f"{result.seconds:.0f} s" if result.seconds else ""
        table.add_row(name, f"{result.accuracy:.3f}", training)
    return table
