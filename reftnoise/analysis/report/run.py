"""A run's page: what its files tell, and what is measured on its adapter."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ...adapters.location import ADAPTER
from ...training.resolved_run import ResolvedRun
from ...training.run import load_trained
from ...training.run_scores import FORGETTING, scores_table
from ..inspection import Prompt, subspaces
from .adapter import Texts, edits, generate, generations, lens, noise, overlap
from .figures import draw_lines, picture
from .files import Line, Run
from .page import Block, Folded, Section, Table, TableCell, duration, memory, number

logger = logging.getLogger(__name__)

PROMPTS = 8
"""At most so many prompts have the texts of base and adapted model."""

EVALUATED = "The first rows of the last evaluation."
CHOSEN = {
    "likelihood": "The texts are the task's choices that the models found most likely.",
    "head": "The texts are the predictions of the heads.",
}
"""What is said of texts that nobody has written."""


def run_sections(run: Run, *, against: Path | None, prompts: Sequence[str] | None) -> list[Section]:
    """Read and measure all that the page of a run shows; arguments as in `write_report`."""
    sections = [overview(run), scores(run), forgetting(run), training(run)]
    if (run.directory / ADAPTER).is_dir():  # which was kept
        measured, own = _measured(run, prompts)
        sections += measured
        if against is not None:  # when the run's own model is gone
            sections.append(_overlap(run, own, against))
    elif against is not None or prompts is not None:
        raise FileNotFoundError(f"{run.directory}: the run has no adapter")
    else:
        sections.append(_answers(run))
        sections.append(Section("Adapter", ["The run has no adapter to measure."]))
    recipe = Section("Recipe", [Folded("recipe.yaml", run.recipe_text)])
    return [part for part in [*sections, recipe] if part.blocks]


def _measured(
    run: Run, prompts: Sequence[str] | None
) -> tuple[list[Section], Mapping[str, Tensor]]:
    """The sections that need the model, and the subspaces that it edits."""
    reft_model, tokenizer = load_trained(ResolvedRun(run.recipe))
    loaded = (run.recipe, reft_model, tokenizer)
    asked = list(prompts or _prompts(run))
    sections = [_or_reason("Noise", lambda: noise(*loaded))]
    if asked:
        sections += [
            _or_reason("Edits", lambda: edits(*loaded, asked[0])),
            _or_reason("Logit lens", lambda: lens(*loaded, asked[0])),
        ]
    evaluated = None if prompts else _answers(run)
    if evaluated is not None and (evaluated.blocks or not asked):
        sections.append(evaluated)
    else:

        def written() -> Section:
            return generations(generate(*loaded, asked), "Greedy decoding.")

        sections.append(_or_reason("Generations", written))
    return sections, subspaces(reft_model)


def _overlap(run: Run, own: Mapping[str, Tensor], against: Path) -> Section:
    """The comparison with another adapter, or why there is none, which is also logged."""
    try:
        return overlap(run.recipe, own, against)
    except ValueError as error:
        logger.warning("%s is not compared with %s: %s", run.directory, against, error)
        return Section("Subspaces", [f"Not compared with {against}: {error}."])


def _or_reason(title: str, measure: Callable[[], Section]) -> Section:
    """A section, or why this model has none."""
    try:
        return measure()
    except ValueError as error:
        return Section(title, [f"Not shown: {error}."])


def overview(run: Run) -> Section:
    """The numbers of the run."""
    summary, facts = run.summary, {}
    counts = summary.get("parameters")
    if counts:
        trained = counts["units"] + counts["base"]
        facts["trained parameters"] = f"{trained:,}"
        facts["of the base's"] = f"{trained / counts['total']:.3%}"
    if "seconds" in summary:
        facts["training time"] = duration(summary["seconds"])
    if summary.get("tokens"):
        facts["tokens"] = f"{summary['tokens']:,}"
    if summary.get("peak_memory_bytes"):
        facts["peak memory"] = memory(summary["peak_memory_bytes"])
    about = summary.get("machine") or {"date": summary.get("date"), **summary.get("versions", {})}
    line = ", ".join(f"{name} {value}" for name, value in about.items() if value is not None)
    return Section("Overview", [facts] * bool(facts) + [line] * bool(line))


def scores(run: Run) -> Section:
    """A row for each evaluation."""
    entries = [entry for entry in run.scores if entry["task"] != FORGETTING]
    return Section("Scores", [_scores(entries)] * bool(entries))


def forgetting(run: Run) -> Section:
    """Loss and KL to the base on texts that have nothing to do with the training."""
    entries = [entry for entry in run.scores if entry["task"] == FORGETTING]
    about = (
        "On prompts that the base has answered, and on texts, that have nothing to do with the "
        "training: KL(base ‖ adapted), the loss, and how much it has changed, in nats per token, "
        "with 95 % intervals over texts. Where nothing is forgotten, KL and change are 0."
    )
    return Section("Forgetting", [about, _scores(entries)] if entries else [])


def _scores(entries: Sequence[Line]) -> Table:
    headings, lines = scores_table(entries)
    first_number = headings.index("rows")
    rows = [
        [number(text) if i >= first_number else TableCell(text) for i, text in enumerate(line)]
        for line in lines
    ]
    return Table(headings, rows)


def training(run: Run) -> Section:
    """Loss, learning rate and speed over steps."""
    losses = {"training": _column(run.log, "loss"), "evaluation": _column(run.log, "eval_loss")}
    losses = {name: line for name, line in losses.items() if line}
    blocks: list[Block] = []
    if losses:
        about = "Loss over steps, " + " and ".join(losses)
        blocks.append(picture("loss", about, draw_lines, losses, "loss", may_be_log=True))
    for key, name, label in (
        ("learning_rate", "learning_rate", "learning rate"),
        ("tokens_per_second", "speed", "tokens per second"),
    ):
        if line := _column(run.log, key):
            about = f"{label} over steps"
            blocks.append(picture(name, about, draw_lines, {label: line}, label))
    return Section("Training", blocks)


def _column(log: Sequence[Line], key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in log if line.get(key) is not None]


def _answers(run: Run) -> Section:
    """What base and adapted model have answered in the last evaluation."""
    way = next((line["by"] for line in run.predictions if "by" in line), "generation")
    if way in CHOSEN:
        return generations(_evaluated(run)[:PROMPTS], f"{EVALUATED} {CHOSEN[way]}", "Answers")
    return generations(_evaluated(run)[:PROMPTS], EVALUATED)


def _evaluated(run: Run) -> list[Texts]:
    """The rows of the last evaluation for which both models have written."""
    texts: dict[bool, list[Line]] = {False: [], True: []}
    for line in run.predictions:
        if "text" in line:  # by loss, there is none
            texts[bool(line["adapter"])].append(line)
    return [
        Texts(base["prompt"], base["text"], adapted["text"], adapted["answer"])
        for base, adapted in zip(texts[False], texts[True], strict=False)
        if base["prompt"] == adapted["prompt"]
    ]


def _prompts(run: Run) -> list[Prompt]:
    of_adapted = [line["prompt"] for line in run.predictions if line["adapter"]]
    return (of_adapted or [line["prompt"] for line in run.predictions])[:PROMPTS]
