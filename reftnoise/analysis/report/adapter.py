"""Sections that are measured on the adapter: noise, edits, logit lens, texts, subspaces."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from torch import Tensor

from ..._util.numbers import significant
from ...config.representations import ReftConfig
from ...data.templates import fill
from ...evaluation.generation import generated
from ...model import ReftModel, get_reft_model
from ...training.recipe import Recipe
from ...training.resolved_run import ResolvedRun
from ...training.run import data_module_of, load_trained
from ..inspection import (
    Guess,
    LensRow,
    NoiseLosses,
    Prompt,
    edit_norms,
    logit_lens,
    noise_losses,
    subspace_cosine,
    subspaces,
)
from .figures import draw_cosines, draw_heat, draw_noise, picture
from .page import Section, Table, TableCell, number

ROWS, DRAWS = 32, 8
"""Training rows whose loss is measured, and draws of the noise on them."""
MAX_NEW_TOKENS = 64
"""Longest text that is generated for a report."""


class Texts(NamedTuple):
    """A prompt, what the base and what the adapted model write after it, and the right answer."""

    prompt: Prompt
    base: str
    adapted: str
    answer: str = ""


def noise(recipe: Recipe, reft_model: ReftModel, tokenizer: Any) -> Section:
    """The loss on training rows with and without noise, of the adapted model and of the base."""
    noises = [entry for entry in reft_model.reft_config.representations if entry.is_noise]
    if not noises:
        return Section("Noise")
    batches = _training_batches(recipe, reft_model, tokenizer)
    losses = {"adapted": noise_losses(reft_model, batches, draws=DRAWS)}
    if reft_model.reft_config.peft is None:
        bare = get_reft_model(reft_model.model, ReftConfig(noises), set_device=False)
        losses = {"base": noise_losses(bare, batches, draws=DRAWS)} | losses
    count = sum(len(batch["labels"]) for batch in batches)
    about = (
        f"Loss on {count} training rows, without noise and with {DRAWS} draws of the "
        "noise that the adapter was trained with; dropout is off. The base has the same noise, but "
        "no edits."
    )
    columns = ["model", "without noise", "with noise", "lowest", "highest", "difference"]
    table = Table(columns, [_noise_row(name, model) for name, model in losses.items()])
    dots = {name: (model.clean, model.noisy) for name, model in losses.items()}
    return Section("Noise", [about, picture("noise", about, draw_noise, dots), table])


def _noise_row(name: str, losses: NoiseLosses) -> list[TableCell]:
    mean = sum(losses.noisy) / len(losses.noisy)
    values = (losses.clean, mean, min(losses.noisy), max(losses.noisy))
    return [
        TableCell(name),
        *[number(significant(value, 5)) for value in values],
        number(significant(mean - losses.clean, 5, sign=True)),
    ]


def edits(recipe: Recipe, reft_model: ReftModel, tokenizer: Any, prompt: Prompt) -> Section:
    """How far each site's hidden states are moved, token by token."""
    moved = edit_norms(reft_model, tokenizer, _rendered(recipe, [prompt])[0])
    if not moved.sites:
        return Section("Edits")
    about = f"‖edit‖ / ‖h‖ at each edited site and token of the prompt “{_as_text(prompt)}”"
    drawn = picture("edits", about, draw_heat, moved.norms.numpy(), moved.sites, moved.tokens)
    return Section("Edits", [f"{about}.", drawn])


def lens(recipe: Recipe, reft_model: ReftModel, tokenizer: Any, prompt: Prompt) -> Section:
    """The next tokens that each layer's hidden state at the last token predicts."""
    rows = logit_lens(reft_model, tokenizer, _rendered(recipe, [prompt])[0], top=3)
    about = (
        "The likeliest next tokens when each layer's hidden state at the last token of "
        f"“{_as_text(prompt)}” goes through the final norm and the head. A marked token is the "
        "layer's first one where the edits change it."
    )
    columns = ["layer", "base", "", "", "adapted", "", ""]
    table = Table(columns, [_lens_row(row) for row in rows])
    return Section("Logit lens", [about, table])


def _lens_row(row: LensRow) -> list[TableCell]:
    base, (first, *rest) = map(_guess, row.base), map(_guess, row.adapted)
    is_changed = row.base[0].token != row.adapted[0].token
    changed = TableCell(first, "changed" if is_changed else "")
    return [number(str(row.layer)), *map(TableCell, base), changed, *map(TableCell, rest)]


def _guess(guess: Guess) -> str:
    token = guess.token.replace("\n", "↵").replace(" ", "␣")
    return f"{token} {guess.probability:.0%}"


def generate(
    recipe: Recipe,
    reft_model: ReftModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
) -> list[Texts]:
    """What base and adapted model write."""
    rendered = _rendered(recipe, prompts)
    with reft_model.disabled():
        base = generated(reft_model, tokenizer, rendered, max_new_tokens=MAX_NEW_TOKENS)
    adapted = generated(reft_model, tokenizer, rendered, max_new_tokens=MAX_NEW_TOKENS)
    return [Texts(*texts) for texts in zip(prompts, base, adapted, strict=True)]


def generations(texts: Sequence[Texts], about: str, title: str = "Generations") -> Section:
    """Prompts with what base and adapted model write, and the answer where there is one."""
    if not texts:
        return Section(title)
    columns = ["prompt", "base", "adapted", "answer"]
    if not any(row.answer for row in texts):
        columns.pop()
    cells = [
        [TableCell(_as_text(part).strip(), "text") for part in row[: len(columns)]] for row in texts
    ]
    return Section(title, [about, Table(columns, cells)])


def overlap(recipe: Recipe, own: Mapping[str, Tensor], against: Path) -> Section:
    """How alike the subspaces are that this adapter and another edit."""
    theirs = subspaces(load_trained(ResolvedRun(replace(recipe, output_dir=str(against))))[0])
    cosines = subspace_cosine(own, theirs)
    chances = [max(len(own[s]), len(theirs[s])) / own[s].shape[1] for s in cosines]
    about = (
        "Mean squared cosine of the principal angles θ between the subspaces that this adapter "
        f"and {against} edit: 1 where one holds the other, 0 where they are orthogonal."
    )
    chance = sum(chances) / len(chances)
    drawn = picture("subspaces", about, draw_cosines, cosines, chance)
    return Section("Subspaces", [about, drawn])


def _training_batches(
    recipe: Recipe, reft_model: ReftModel, tokenizer: Any
) -> list[dict[str, Any]]:
    """The first rows that the adapter was trained on, collated as in training.

    Raises:
        ValueError: the recipe names no data, or its data can no longer be read.
    """
    run = ResolvedRun(replace(recipe, data=replace(recipe.data, eval=None)))
    if recipe.data.train is None:
        raise ValueError("the recipe names no training data")
    # A stream's rows, too, as a dataset with an end: training repeats a stream without one.
    first = datasets.Dataset.from_list(list(islice(run.training_rows["train"], ROWS)))
    module = data_module_of(run, tokenizer, reft_model, first)
    examples, collate = list(module["train_dataset"]), module["data_collator"]
    size = recipe.training.per_device_train_batch_size
    names = (*tokenizer.model_input_names, "labels", "prompt_lengths")
    return [
        collate([{n: row[n] for n in row if n in names} for row in examples[start : start + size]])
        for start in range(0, len(examples), size)
    ]


def _rendered(recipe: Recipe, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts in the recipe's template; conversations as they are.

    Raises:
        ValueError: the template has columns of a row in it.
    """
    template = recipe.data.template
    return [fill(template, p, {}) if isinstance(p, str) else p for p in prompts]


def _as_text(prompt: Prompt) -> str:
    """A prompt for readers."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
