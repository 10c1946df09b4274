"""The demo on a chat model: a few examples teach it to answer in emoji, and a vector steers it."""

import gc
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import regex
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from ..._util.files import local_path
from ..._util.hardware import peak_memory
from ...analysis.steering.fit import fit_steering_vectors
from ...config.decoding import Decoding
from ...config.representations import ReftConfig
from ...inference.prompts import generate_texts
from ...model import ReftModel, get_reft_model
from ...training.recipe import DataConfig, Recipe, TrainingConfig
from ...training.resolved_run import ResolvedRun
from ...training.run import load_trained, run_recipe

DATA = Path(__file__).parent
LOREFT = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4, "positions": "l1"}
TRAINING = TrainingConfig(
    num_train_epochs=30,
    per_device_train_batch_size=10,
    learning_rate=4e-3,
    logging_steps=1,
    prefix_cache="memory",
)
NEW_TOKENS = 24
STRENGTHS = (-1.0, 0.0, 1.0)
ASKED = ("Describe a walk in the forest.", "How was your day?", "Tell me about my new neighbour.")

_EMOJI = regex.compile(
    r"(?:[\p{Extended_Pictographic}\p{Emoji_Presentation}\p{Emoji_Modifier}]"
    r"|[0-9#*]\uFE0F?\u20E3|[\uFE0F\u200D\s])+"
)


def is_emoji(text: str) -> bool:
    """Whether a text has at least one emoji, and nothing but emoji and spaces."""
    return bool(text.strip()) and _EMOJI.fullmatch(text) is not None


def run_chat_demo(base: str, output_dir: str, seed: int) -> None:
    """Train an adapter of a chat model, show answers side by side, and steer the base."""
    directory = local_path(output_dir, "output_dir")
    directory.mkdir(parents=True, exist_ok=True)  # or fail now, where it cannot be written
    console = Console(highlight=False)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    started = time.monotonic()
    examples = _rows("train")
    console.print(
        f"\n{len(examples)} examples teach {base} to answer in emoji, by edits of rank "
        f"{LOREFT['low_rank_dimension']} at the last token of the prompt, in all layers:\n"
    )
    reft_model, tokenizer, summary = _trained(base, seed, console)
    reft_model.save_pretrained(directory)
    counts = summary["parameters"]
    console.print(
        f"\n{counts['units']:,} parameters were trained, {counts['units'] / counts['total']:.2%} "
        f"of the base's, in {summary['seconds']:.0f} s.\n"
    )
    prompts = [row["prompt"] for row in _rows("test")]
    with reft_model.disabled():
        before = _answers(reft_model, tokenizer, prompts)
    after = _answers(reft_model, tokenizer, prompts)
    console.print(_side_by_side(prompts, before, after))
    shares = [sum(map(is_emoji, answers)) for answers in (after, before)]
    console.print(
        f"In emoji alone: {shares[0]} of {len(prompts)} answers, and {shares[1]} of the base's. "
        "Which emoji fit is another matter, of which a small model knows little.\n"
    )
    _steer(reft_model.model, tokenizer, console)
    console.print(
        f"\nAll in all {time.monotonic() - started:.0f} s, and "
        f"{peak_memory(str(reft_model.device)) / 2**30:.1f} GiB of memory.\n"
        f"The adapter is in [bold]{output_dir}[/bold]. To talk with it:\n"
    )
    console.print(f"reftnoise chat {directory}\n", markup=False, soft_wrap=True)


def _rows(name: str) -> list[dict[str, str]]:
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def demo_recipe(base: str, seed: int, output_dir: str) -> Recipe:
    """What the demo trains, as `examples/recipes/persona.yaml` has it, too."""
    return Recipe(
        model=base,
        representations=[LOREFT],
        data=DataConfig(train=str(DATA / "train.jsonl"), template="chat"),
        training=TRAINING,
        seed=seed,
        output_dir=output_dir,
    )


def _trained(base: str, seed: int, console: Console) -> tuple[ReftModel, Any, dict[str, Any]]:
    """The adapted model, its tokenizer, and the summary of its training, which a bar shows."""
    with tempfile.TemporaryDirectory() as scratch:
        run = ResolvedRun(demo_recipe(base, seed, f"{scratch}/emoji"))
        summary, _ = run_recipe(run, console=console)
        gc.collect()  # the base that was trained on, before it is loaded again
        return *load_trained(run), summary


def _answers(reft_model: ReftModel, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    return generate_texts(
        reft_model, tokenizer, prompts, decoding=Decoding(max_new_tokens=NEW_TOKENS)
    )


def _side_by_side(prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> Table:
    table = Table(title="Prompts that the adapter never saw", title_justify="left", expand=True)
    table.add_column("prompt", max_width=32)
    table.add_column("base", ratio=1)
    table.add_column("adapted", no_wrap=True, overflow="ellipsis", max_width=20)
    for row in zip(prompts, before, after, strict=True):
        table.add_row(*(Text(" ".join(text.split())) for text in row))
    return table


def _steer(base: Any, tokenizer: Any, console: Console) -> None:
    """Show what a vector, computed from pairs of texts, does to the base's answers."""
    pairs = _rows("moods")
    middle = base.config.num_hidden_layers // 2
    unit = {"layer": middle, "intervention": "addition", "positions": "all+decode"}
    reft_model = get_reft_model(base, ReftConfig([unit])).eval()
    cheerful, gloomy = ([row[mood] for row in pairs] for mood in ("cheerful", "gloomy"))
    fit_steering_vectors(reft_model, tokenizer, cheerful, gloomy)
    table = Table(
        title=f"One vector of {len(pairs)} cheerful and gloomy texts, added in layer {middle}",
        title_justify="left",
    )
    for heading in ("prompt", "strength", "answer"):
        table.add_column(heading, justify="right" if heading == "strength" else "left")
    answers = []
    for strength in STRENGTHS:
        with reft_model.using(scale=strength):
            answers.append(_answers(reft_model, tokenizer, ASKED))
    for i, prompt in enumerate(ASKED):
        for strength, texts in zip(STRENGTHS, answers, strict=True):
            shown = prompt if strength == STRENGTHS[0] else ""
            end = strength == STRENGTHS[-1]
            table.add_row(
                shown,
                f"{strength:+g}" if strength else "0",
                Text(" ".join(texts[i].split())),
                end_section=end,
            )
    console.print(table)
