"""What each command of the command line does, as a function of its options.

Heavy imports stand inside the functions: `--help` and mistakes do not wait for torch.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._util.files import json_text
from ..evaluation.decoding import Decoding
from ..training.recipe import Recipe
from ..training.study.grid import Study

if TYPE_CHECKING:
    from rich.console import Console


def demo(output_dir: str = "reftnoise-demo", seed: int = 0) -> None:
    """Train the embedded tiny model and show its answers before and after.

    Args:
        output_dir: directory for the adapter.
        seed: of all random draws.
    """
    from .demo import run_demo

    run_demo(output_dir, seed)


def train(
    recipe: Recipe,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    json: bool = False,
) -> None:
    """Train what a recipe says, score it, and write a run's directory.

    Args:
        recipe: a YAML file, given first; any option replaces what stands in it.
        resume: go on with an unfinished run from its last checkpoint.
        overwrite: replace a run that is in output_dir.
        quiet: print nothing but errors.
        json: print the summary and scores as JSON, and no progress.
    """
    from ..training.run import run_recipe
    from ..training.run_directory import is_main_process

    console = _progress_console(quiet or json)
    summary, entries = run_recipe(recipe, resume=resume, overwrite=overwrite, console=console)
    if not is_main_process():
        return
    if json:
        _print_json(summary | {"scores": entries, "output_dir": recipe.output_dir})
    elif not quiet:
        from .printing import print_run

        print_run(recipe, summary, entries)


def evaluate(recipe: Recipe, base: bool = False, quiet: bool = False, json: bool = False) -> None:
    """Score the adapter of a run on its recipe's task, and write the scores beside it.

    Args:
        recipe: the directory of a run or of an adapter, given first; options such as
            --evaluation.data or --evaluation.by replace what the run's recipe says.
        base: also score the base without its adapter.
        quiet: print nothing but errors.
        json: print the scores as JSON, and no progress.
    """
    from ..training.run import load_trained
    from ..training.run_scores import save_scores, score

    model, tokenizer = load_trained(recipe)
    found = score(recipe, model, tokenizer, base=base, console=_progress_console(quiet or json))
    save_scores(Path(recipe.output_dir), found)
    entries = [entry for entry, _ in found]
    if json:
        _print_json(entries)
    elif not quiet:
        from .printing import print_scores

        print_scores(entries)


def generate(
    adapter: str,
    decoding: Decoding,
    prompt: str | None = None,
    input: str | None = None,  # noqa: A002  # the option's name
    output: str | None = None,
    column: str = "prompt",
    compare: bool = False,
    model: str | None = None,
    device: str = "auto",
    batch_size: int = 16,
    json: bool = False,
) -> None:
    """Answer prompts with an adapted model, beside its base if asked.

    Args:
        adapter: directory of a run or an adapter, or the hub name of an adapter.
        decoding: as in `Decoding`.
        prompt: a text.
        input: a file of JSON lines with more of them.
        output: file for the answers as JSON lines; they are printed by default.
        column: of the prompts in input.
        compare: let the base without its adapter answer, too.
        model: the base, where it lies elsewhere than when the adapter was saved.
        device: cpu, cuda, …; auto takes a GPU where there is one.
        batch_size: prompts per forward pass.
        json: print the answers as JSON.
    """
    from rich.console import Console

    from ..inference.prompts import answer_prompts

    rows = answer_prompts(
        adapter,
        prompts=[] if prompt is None else [prompt],
        input=input,
        output=output,
        column=column,
        compare=compare,
        model=model,
        device=device,
        decoding=decoding,
        batch_size=batch_size,
        console=None if json else Console(highlight=False),
    )
    if json:
        _print_json(rows)


def chat(adapter: str, decoding: Decoding, model: str | None = None, device: str = "auto") -> None:
    """Talk with an adapted model; /off, /on and /scale 0.5 turn its edits down and up.

    Args:
        adapter: directory of a run or an adapter, or the hub name of an adapter.
        decoding: as in `Decoding`.
        model: the base, where it lies elsewhere than when the adapter was saved.
        device: cpu, cuda, …; auto takes a GPU where there is one.
    """
    from ..inference.chat import chat as start_chat

    start_chat(adapter, model=model, device=device, decoding=decoding)


def serve(
    adapter: str,
    others: dict[str, str] | None = None,
    model: str | None = None,
    host: str = "localhost",
    port: int = 8000,
    dtype: str | None = None,
    device: str = "auto",
) -> None:
    """Serve adapters of one base by the OpenAI API, each as a model, on transformers' server.

    Args:
        adapter: directory of a run or an adapter, or a hub name; its last part is the name that
            requests use.
        others: further adapters of that base by name, as --others.polite runs/polite.
        model: the base, where it lies elsewhere than when the adapter was saved.
        host: to listen on.
        port: likewise.
        dtype: of the base, such as bfloat16.
        device: cpu, cuda, …; auto takes a GPU where there is one.
    """
    from ..inference.loading import by_name
    from ..inference.server import serve as start_server

    start_server(
        by_name(adapter, others or {}), model, host=host, port=port, dtype=dtype, device=device
    )


def playground(
    source: str,
    others: dict[str, str] | None = None,
    model: str | None = None,
    host: str = "localhost",
    port: int = 7860,
    device: str = "auto",
) -> None:
    """Open a page in the browser: base and adapters side by side, scaled, in parts, and noised.

    Args:
        source: directory of a run or an adapter, or a hub name; or the address of a running server
            of the OpenAI API, such as http://localhost:8000/v1.
        others: further adapters of that base by name, as --others.polite runs/polite.
        model: the base, where it lies elsewhere than when the adapter was saved.
        host: of the page.
        port: likewise.
        device: cpu, cuda, …; auto takes a GPU where there is one.
    """
    from ..inference.playground.app import run_playground

    run_playground(source, others or {}, model, host=host, port=port, device=device)


def inspect_adapter(
    directory: str,
    others: dict[str, str] | None = None,
    output: str | None = None,
    json: bool = False,
) -> None:
    """Tell what an adapter or a run is: base, units, norms, parameters, scores.

    With others, also how alike the subspaces are that the adapters edit. No base is loaded.

    Args:
        directory: of a run or an adapter, or the hub name of an adapter; its last part is the name
            beside others.
        others: further adapters of the same base by name, as --others.polite runs/polite.
        output: PNG file for a picture of the overlaps.
        json: print it as JSON.
    """
    from rich.console import Console

    from ..analysis.description import describe, show

    found = describe(directory)
    if others is None:
        if output is not None:
            raise ValueError(
                f"output {output!r}: the picture is of overlaps with others, and there are none; "
                "name some, as --others.polite runs/polite"
            )
        _print_json(asdict(found)) if json else show(found, Console(highlight=False))
        return
    from ..analysis.overlaps import overlaps_by_name, saved_overlaps, show_overlaps
    from ..inference.loading import by_name

    names, overlaps = saved_overlaps(by_name(directory, others))
    if output is not None:
        from ..analysis.report import write_overlaps

        write_overlaps(output, names, overlaps)
    if json:
        _print_json(asdict(found) | {"overlaps": overlaps_by_name(names, overlaps)})
    else:
        show(found, Console(highlight=False))
        show_overlaps(names, overlaps, Console(highlight=False))


def study(study: Study, quiet: bool = False, json: bool = False) -> None:
    """Run a grid of recipes and seeds, and write its report; finished cells are not run again.

    Args:
        study: a YAML file, given first; any option replaces what stands in it.
        quiet: print nothing but errors.
        json: print the results as JSON, and no progress.
    """
    from rich.console import Console

    from ..analysis.report import (  # first: they say if their extra is missing
        show_table,
        write_study_report,
    )
    from ..training.study.runner import run_study

    results = run_study(study, console=_progress_console(quiet or json))
    page, table = write_study_report(study.output_dir)
    if json:
        _print_json(results)
    elif not quiet:
        show_table(table, Console(highlight=False))
        print(f"The report is in {page}.")


def report(
    directory: str,
    against: str | None = None,
    prompts: list[str] | str | None = None,
    output_dir: str | None = None,
) -> None:
    """Draw what a run or a study has found: a self-contained HTML page and PNG files.

    Args:
        directory: of a run or of a study.
        against: another run or adapter, whose subspaces the run's are compared with.
        prompts: one or several, to be answered by base and adapted model side by side.
        output_dir: where to write; the directory itself by default.
    """
    from ..analysis.report import write_report

    texts = [prompts] if isinstance(prompts, str) else prompts
    print(write_report(directory, against=against, prompts=texts, output_dir=output_dir))


def convert(
    source: str,
    output: str,
    base: str | None = None,
    positions: list[int] | str = "l1",
    dropout: float = 0.0,
    act_fn: str | None = None,
) -> None:
    """Write an adapter of pyreft or pyvene as one of reftnoise, or one of reftnoise as pyreft's.

    What the other format does not hold is told.

    Args:
        source: adapter directory of either kind, or a hub repository that is one.
        output: directory for the other kind; new, empty, or an adapter of that kind to replace.
        base: name or path of the base model, always needed; only its config is read.
        positions: where a pyreft adapter edits, such as f7+l7.
        dropout: of a pyreft adapter, for training it further.
        act_fn: of a pyreft adapter, by transformers' name.
    """
    from ..adapters.pyreft.convert import convert as convert_adapter

    if base is None:  # no default; jsonargparse makes a required option positional
        raise ValueError("convert: expected --base, the name or path of the base model")
    print(
        convert_adapter(
            source, output, base=base, positions=positions, dropout=dropout, act_fn=act_fn
        )
    )


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "train": train,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "playground": playground,
    "eval": evaluate,
    "study": study,
    "report": report,
    "inspect": inspect_adapter,
    "convert": convert,
}
"""By name. A `Recipe`, a `Study` and a `Decoding` are taken as options, one for each field."""


def _progress_console(is_silent: bool) -> "Console | None":
    """Progress goes to stderr, so that stdout holds results alone."""
    if is_silent:
        return None
    from rich.console import Console

    return Console(stderr=True)


def _print_json(value: Any) -> None:
    print(json_text(value, indent=2))
