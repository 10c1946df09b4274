"""Sections that are measured on the adapter: noise, edits, logit lens, texts, subspaces."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from torch import Tensor

from ...config.representations import ReftConfig
from ...data.sources import load_rows, rename_columns
from ...data.templates import fill
from ...evaluation.generation import generated
from ...model import ReftModel, get_reft_model
from ...training.recipe import Recipe
from ...training.run import data_module_of, load_trained
from ..inspection import (
    Guess,
    LensRow,
    NoiseLosses,
    Prompt,
    compare_subspaces,
    edit_norms,
    logit_lens,
    noise_losses,
    subspaces,
)
from .figures import draw_cosines, draw_heat, draw_noise, picture
from .formats import signed
from .page import Cell, Section, Table, Text, number

Row: TypeAlias = tuple[Prompt, str, str, str]
"""A prompt, what the base and what the adapted model write, and the answer."""


def noise(
    recipe: Recipe, reft_model: ReftModel, tokenizer: Any, *, rows: int, draws: int
) -> Section:
    """The loss on training rows with and without noise, of the adapted model and of the base."""
    noises = [entry for entry in reft_model.reft_config.representations if entry.is_noise]
    if not noises:
        return Section("Noise")
    batches = _training_batches(recipe, reft_model, tokenizer, rows)
    found = {"adapted": noise_losses(reft_model, batches, draws=draws)}
    if reft_model.reft_config.peft is None:
        bare = get_reft_model(reft_model.model, ReftConfig(noises), set_device=False)
        found = {"base": noise_losses(bare, batches, draws=draws)} | found
    shown = {name: (losses.clean, losses.noisy) for name, losses in found.items()}
    count = sum(len(batch["labels"]) for batch in batches)
    about = (
        f"Loss on {count} training rows, without noise and with {draws} draws of the "
        "noise that the adapter was trained with; dropout is off. The base has the noise, too, but "
        "no edits."
    )
    columns = ["model", "without noise", "with noise", "lowest", "highest", "difference"]
    table = Table(columns, [_noise_row(name, losses) for name, losses in found.items()])
    drawn = picture("noise", about, lambda: draw_noise(shown))
    return Section("Noise", [Text(about), drawn, table])


def _noise_row(name: str, losses: NoiseLosses) -> list[Cell]:
    mean = sum(losses.noisy) / len(losses.noisy)
    values = (losses.clean, mean, min(losses.noisy), max(losses.noisy))
    return [
        Cell(name),
        *[number(f"{value:.4f}") for value in values],
        number(signed(mean - losses.clean, 4)),
    ]


def edits(recipe: Recipe, reft_model: ReftModel, tokenizer: Any, prompt: Prompt) -> Section:
    """How far each site's hidden states are moved, token by token."""
    found = edit_norms(reft_model, tokenizer, _rendered(recipe, [prompt])[0])
    if not found.sites:
        return Section("Edits")
    about = f"‖edit‖ / ‖h‖ at each edited site and token of the prompt “{_as_text(prompt)}”"
    norms = found.norms.numpy()
    drawn = picture("edits", about, lambda: draw_heat(norms, found.sites, found.tokens))
    return Section("Edits", [Text(f"{about}."), drawn])


def lens(recipe: Recipe, reft_model: ReftModel, tokenizer: Any, prompt: Prompt) -> Section:
    """What each layer's hidden state at the last token would have the model write."""
    found = logit_lens(reft_model, tokenizer, _rendered(recipe, [prompt])[0], top=3)
    about = (
        "The likeliest next tokens that each layer's hidden state at the last token of "
        f"“{_as_text(prompt)}” gives through the final norm and the head. Layers whose first token "
        "the edits change are marked."
    )
    columns = ["layer", "base", "", "", "adapted", "", ""]
    return Section("Logit lens", [Text(about), Table(columns, [_lens_row(row) for row in found])])


def _lens_row(row: LensRow) -> list[Cell]:
    is_changed = row.base[0].token != row.adapted[0].token
    cells = [number(str(row.layer))]
    for guesses, mark in ((row.base, False), (row.adapted, is_changed)):
        cells += [
            Cell(_guess(one), "changed" if mark and place == 0 else "")
            for place, one in enumerate(guesses)
        ]
    return cells


def _guess(guess: Guess) -> str:
    token = guess.token.replace("\n", "↵").replace(" ", "␣")
    return f"{token} {guess.probability:.0%}"


def generate(
    recipe: Recipe,
    reft_model: ReftModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
) -> list[Row]:
    """What base and adapted model write."""
    shown = _rendered(recipe, prompts)
    with reft_model.disabled():
        base = generated(reft_model, tokenizer, shown, max_new_tokens=max_new_tokens)
    adapted = generated(reft_model, tokenizer, shown, max_new_tokens=max_new_tokens)
    return [(*texts, "") for texts in zip(prompts, base, adapted, strict=True)]


def generations(pairs: Sequence[Row], about: str) -> Section:
    """Prompts with what base and adapted model write, and the answer where there is one."""
    if not pairs:
        return Section("Generations")
    columns = ["prompt", "base", "adapted", "answer"]
    if not any(answer for *_, answer in pairs):
        columns.pop()
    cells = [
        [Cell(_as_text(part).strip(), "text") for part in pair[: len(columns)]] for pair in pairs
    ]
    return Section("Generations", [Text(about), Table(columns, cells)])


def overlap(recipe: Recipe, own: Mapping[str, Tensor], against: Path) -> Section:
    """How alike the subspaces are that this adapter and another edit."""
    theirs = subspaces(load_trained(replace(recipe, output_dir=str(against)))[0])
    cosines = compare_subspaces(own, theirs)
    chances = [max(len(own[s]), len(theirs[s])) / own[s].shape[1] for s in cosines]
    about = (
        "Mean squared cosine of the principal angles θ between the subspaces that this adapter "
        f"and {against} edit: 1 where one holds the other, 0 where they are orthogonal."
    )
    chance = sum(chances) / len(chances)
    drawn = picture("subspaces", about, lambda: draw_cosines(cosines, chance))
    return Section("Subspaces", [Text(about), drawn])


# -- the recipe's rows and prompts -----------------------------------------------------------------


def _training_batches(
    recipe: Recipe, reft_model: ReftModel, tokenizer: Any, rows: int
) -> list[dict[str, Any]]:
    """The first rows that the adapter was trained on, collated as in training.

    Raises:
        ValueError: the recipe names no data, or data that cannot be read any more.
    """
    data = recipe.data
    if data.train is None:
        raise ValueError("the recipe names no training data")
    source = load_rows(
        data.train, split=data.train_split, subset=data.subset, streaming=data.streaming
    )
    first = source.take(rows if data.streaming else min(rows, len(source)))
    if isinstance(first, datasets.IterableDataset):  # training repeats a stream without end
        first = datasets.Dataset.from_list(list(first))
    first = rename_columns(first, data.columns)
    module = data_module_of(recipe, tokenizer, reft_model, first)
    examples, collate = list(module["train_dataset"]), module["data_collator"]
    size = recipe.training.per_device_train_batch_size
    taken = (*tokenizer.model_input_names, "labels", "prompt_lengths")
    return [
        collate([{n: row[n] for n in row if n in taken} for row in examples[start : start + size]])
        for start in range(0, len(examples), size)
    ]


def _rendered(recipe: Recipe, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts in the recipe's template; conversations as they are.

    Raises:
        ValueError: the template has columns of a row in it.
    """
    template = recipe.data.template
    return [fill(template, one, {}) if isinstance(one, str) else one for one in prompts]


def _as_text(prompt: Prompt) -> str:
    """A prompt for readers."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
