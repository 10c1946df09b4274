"""A run's page: what its files tell, and what is measured on its adapter."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from ...training.run import load_trained
from ..inspection import Prompt, subspaces
from .adapter import Row, edits, generate, generations, lens, noise, overlap
from .figures import draw_lines, picture
from .files import Line, Run
from .formats import duration, memory, score
from .page import Block, Cell, Facts, Folded, Section, Table, Text, number

SHOWN = 8
"""Prompts with the texts of base and adapted model."""

EVALUATED = "The first rows of the last evaluation."


def run_sections(
    run: Run,
    *,
    against: Path | None,
    prompts: Sequence[str] | None,
    rows: int,
    draws: int,
    max_new_tokens: int,
) -> list[Section]:
    """Read and measure all that the page of a run shows; arguments as of `write_report`."""
    sections = [overview(run), scores(run), training(run)]
    if run.has_adapter:
        measured, own = _measured(
            run, prompts=prompts, rows=rows, draws=draws, max_new_tokens=max_new_tokens
        )
        sections += measured
        if against is not None:  # when the run's own model is gone
            sections.append(overlap(run.recipe, own, against))
    elif against is not None or prompts is not None:
        raise FileNotFoundError(f"{run.directory}: the run has no adapter")
    else:
        sections.append(generations(_both(run)[:SHOWN], EVALUATED))
        sections.append(Section("Adapter", [Text("The run has no adapter to be measured.")]))
    recipe = Section("Recipe", [Folded("recipe.yaml", run.recipe_text)])
    return [part for part in [*sections, recipe] if part.blocks]


def _measured(
    run: Run, *, prompts: Sequence[str] | None, rows: int, draws: int, max_new_tokens: int
) -> tuple[list[Section], Mapping[str, Tensor]]:
    """What needs the model, and the subspaces that it edits."""
    reft_model, tokenizer = load_trained(run.recipe)
    loaded = (run.recipe, reft_model, tokenizer)
    asked = list(prompts or _prompts(run))
    sections = [_or_reason("Noise", lambda: noise(*loaded, rows=rows, draws=draws))]
    if asked:
        sections += [
            _or_reason("Edits", lambda: edits(*loaded, asked[0])),
            _or_reason("Logit lens", lambda: lens(*loaded, asked[0])),
        ]
    pairs = [] if prompts else _both(run)[:SHOWN]
    if pairs or not asked:
        sections.append(generations(pairs, EVALUATED))
    else:
        sections.append(
            _or_reason(
                "Generations",
                lambda: generations(
                    generate(*loaded, asked, max_new_tokens=max_new_tokens), "Greedy decoding."
                ),
            )
        )
    return sections, subspaces(reft_model)


def _or_reason(title: str, measure: Callable[[], Section]) -> Section:
    """A section, or why this model has none."""
    try:
        return measure()
    except ValueError as error:
        return Section(title, [Text(f"Not shown: {error}.")])


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
    return Section("Overview", [Facts(facts)] * bool(facts) + [Text(line)] * bool(line))


def scores(run: Run) -> Section:
    """Every evaluation, a line each."""
    if not run.scores:
        return Section("Scores")
    names = list(dict.fromkeys(name for entry in run.scores for name in entry["scores"]))
    table = [
        [
            Cell(str(entry["task"])),
            Cell(" ".join(str(entry[n]) for n in ("data", "split") if entry.get(n))),
            Cell(str(entry.get("by") or "")),
            Cell("adapted" if entry["adapter"] else "base"),
            number(str(entry.get("rows") or "")),
            *[number(score(entry["scores"].get(name))) for name in names],
        ]
        for entry in run.scores
    ]
    return Section("Scores", [Table(["task", "data", "by", "model", "rows", *names], table)])


def training(run: Run) -> Section:
    """Loss, learning rate and speed over steps."""
    losses = {"training": _column(run.log, "loss"), "evaluation": _column(run.log, "eval_loss")}
    losses = {name: line for name, line in losses.items() if line}
    blocks: list[Block] = []
    if losses:
        blocks.append(
            picture(
                "loss",
                "Loss over steps, " + " and ".join(losses),
                lambda: draw_lines(losses, "loss", may_be_log=True),
            )
        )
    for key, name, label in (
        ("learning_rate", "learning_rate", "learning rate"),
        ("tokens_per_second", "speed", "tokens per second"),
    ):
        line = _column(run.log, key)
        if line:
            drawn = {label: line}
            blocks.append(
                picture(
                    name,
                    f"{label} over steps",
                    partial(draw_lines, drawn, label),
                )
            )
    return Section("Training", blocks)


def _column(log: Sequence[Line], key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in log if line.get(key) is not None]


def _both(run: Run) -> list[Row]:
    """Rows of which the last evaluation has both texts: prompt, base's, adapted, answer."""
    texts: dict[bool, list[Line]] = {False: [], True: []}
    for line in run.predictions:
        texts[bool(line["adapter"])].append(line)
    return [
        (base["prompt"], base["text"], adapted["text"], adapted["answer"])
        for base, adapted in zip(texts[False], texts[True], strict=False)
        if base["prompt"] == adapted["prompt"]
    ]


def _prompts(run: Run) -> list[Prompt]:
    with_adapter = [line["prompt"] for line in run.predictions if line["adapter"]]
    return (with_adapter or [line["prompt"] for line in run.predictions])[:SHOWN]
