"""What each command of the command line does, as a function of its options.

Heavy imports are inside the functions: `--help` and mistakes do not wait for torch.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .._util.files import json_text, local_path
from ..adapters.location import expect_place
from ..config.base_model import expect_base
from ..config.decoding import Decoding
from ..config.positions import Positions
from ..training.recipe import Recipe
from ..training.resolved_run import ResolvedRun
from ..training.run_adapter import adapter_directory
from ..training.run_files import is_study
from ..training.study.grid import Study, checked_cells
from .checks import expect_adapters, expect_free, expect_prompts, expect_template

if TYPE_CHECKING:
    from rich.console import Console


def demo(output_dir: str = "reftnoise-demo", seed: int = 0) -> None:
    """Train the embedded tiny model and show its answers before and after.

    Args:
        output_dir: directory for the adapter.
        seed: seed of all random draws.
    """
    path = local_path(output_dir, "output_dir")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{output_dir}: expected a directory, found a file")
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
        recipe: YAML file, which comes first; options replace what it says.
        resume: whether an unfinished run continues from its last checkpoint.
        overwrite: whether a run in output_dir is replaced.
        quiet: whether nothing but errors is printed.
        json: whether summary and scores are printed as JSON, without progress.
    """
    run = ResolvedRun(recipe)
    run.expect_trainable()
    from ..training.run_directory import RunDirectory, is_main_process

    RunDirectory(recipe, resume=resume, overwrite=overwrite)
    from ..training.run import run_recipe

    console = _progress_console(quiet or json)
    summary, entries = run_recipe(run, resume=resume, overwrite=overwrite, console=console)
    if not is_main_process():
        return
    if json:
        _print_json(summary | {"scores": entries, "output_dir": recipe.output_dir})
    elif not quiet:
        _print_run(summary, entries, recipe.output_dir)


def evaluate(recipe: Recipe, base: bool = False, quiet: bool = False, json: bool = False) -> None:
    """Score the adapter of a run on its recipe's task, and write the scores to the run.

    Args:
        recipe: directory of a run or of an adapter, which comes first; options such as
            --evaluation.data or --evaluation.by replace what the run's recipe says.
        base: whether the base without its adapter is scored, too.
        quiet: whether nothing but errors is printed.
        json: whether the scores are printed as JSON, without progress.
    """
    run = ResolvedRun(recipe)
    run.expect_scored()
    expect_adapters(recipe.output_dir)
    from ..training.run import load_trained
    from ..training.run_scores import print_scores, save_scores, score

    model, tokenizer = load_trained(run)
    console = _progress_console(quiet or json)
    entries, predictions = score(run, model, tokenizer, base=base, console=console)
    save_scores(run.directory, entries, predictions)
    if json:
        _print_json(entries)
    elif not quiet:
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
    """Answer prompts with an adapted model and, if asked, with its base.

    Args:
        adapter: directory of a run or of an adapter, or hub name of an adapter.
        decoding: template and sampling.
        prompt: text to answer.
        input: file of JSON lines with further prompts.
        output: file for the answers as JSON lines; by default they are printed.
        column: key of the prompts in input.
        compare: whether the base without its adapter answers, too.
        model: directory or hub name of the base, if not that which the adapter was saved with.
        device: cpu, cuda or another device of torch; auto is a GPU where there is one.
        batch_size: number of prompts per forward pass.
        json: whether the answers are printed as JSON.
    """
    expect_adapters(adapter, model=model)
    expect_template(decoding)
    expect_prompts(prompt, input, output)
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
        adapter: directory of a run or of an adapter, or hub name of an adapter.
        decoding: template and sampling.
        model: directory or hub name of the base, if not that which the adapter was saved with.
        device: cpu, cuda or another device of torch; auto is a GPU where there is one.
    """
    expect_adapters(adapter, model=model)
    expect_template(decoding)
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
        adapter: directory of a run or of an adapter, or hub name of an adapter; its last part is
            the name that requests use.
        others: further adapters of the same base by name, such as --others.polite runs/polite.
        model: directory or hub name of the base, if not that which the adapter was saved with.
        host: address that the server listens on.
        port: port that the server listens on.
        dtype: dtype of the base, such as bfloat16.
        device: cpu, cuda or another device of torch; auto is a GPU where there is one.
    """
    expect_adapters(adapter, others, model, dtype)
    expect_free(host, port)
    from ..inference.loading import BASE, by_name, load_library
    from ..inference.server import start_server

    adapters = by_name(adapter, others or {})
    if BASE in adapters:
        raise ValueError(f"adapter name {BASE!r}: this is the name of the model without adapters")
    loaded = load_library(adapters, model, dtype=dtype, device=device)
    start_server(*loaded, host=host, port=port)


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
        source: directory of a run or of an adapter, or hub name of an adapter; or address of a
            running server of the OpenAI API, such as http://localhost:8000/v1.
        others: further adapters of the same base by name, such as --others.polite runs/polite.
        model: directory or hub name of the base, if not that which the adapter was saved with.
        host: address that the page is served on.
        port: port that the page is served on.
        device: cpu, cuda or another device of torch; auto is a GPU where there is one.
    """
    expect_free(host, port)
    if "://" not in source:
        expect_adapters(source, others, model)
    from ..inference.playground.page import run_playground

    run_playground(source, others or {}, model, host=host, port=port, device=device)


def inspect_adapter(
    directory: str,
    others: dict[str, str] | None = None,
    output: str | None = None,
    json: bool = False,
) -> None:
    """Show what an adapter or a run is: base, units, norms, parameters, scores.

    With others, also how similar the subspaces are that the adapters edit. No base is loaded.

    Args:
        directory: directory of a run or of an adapter, or hub name of an adapter; its last part is
            its name among others.
        others: further adapters of the same base by name, such as --others.polite runs/polite.
        output: PNG file for a picture of the overlaps.
        json: whether the result is printed as JSON.
    """
    if others is None and output is not None:
        raise ValueError(
            f"output {output!r}: the picture is of overlaps with others, and there are none; name "
            "some, such as --others.polite runs/polite"
        )
    expect_adapters(directory, others)
    from rich.console import Console

    from ..analysis.description import describe, show

    description, console = describe(directory), Console(highlight=False)
    if others is None:
        _print_json(asdict(description)) if json else show(description, console)
        return
    from ..analysis.overlaps import overlaps_by_name, saved_overlaps, show_overlaps
    from ..inference.loading import by_name

    names, overlaps = saved_overlaps(by_name(directory, others))
    if output is not None:
        from ..analysis.report import write_overlaps

        write_overlaps(output, names, overlaps)
    if json:
        _print_json(asdict(description) | {"overlaps": overlaps_by_name(names, overlaps)})
    else:
        show(description, console)
        show_overlaps(names, overlaps, console)


def study(study: Study, quiet: bool = False, json: bool = False) -> None:
    """Run a grid of recipes and seeds, and write its report; finished cells are not run again.

    Args:
        study: YAML file, which comes first; options replace what it says.
        quiet: whether nothing but errors is printed.
        json: whether the results are printed as JSON, without progress.
    """
    checked_cells(study)
    from rich.console import Console

    # First: it says if its extra is missing.
    from ..analysis.report import show_table, write_study_report
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
    """Draw the results of a run or a study: a self-contained HTML page and PNG files.

    Args:
        directory: directory of a run or of a study.
        against: directory of another run or adapter, with whose subspaces the run's are compared.
        prompts: one or several prompts that base and adapted model answer side by side.
        output_dir: directory for the report; by default that of the run or study.
    """
    path = local_path(directory, "directory")
    if not is_study(path, against=against, prompts=prompts) and against is not None:
        adapter_directory(against)
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

    A warning names what the other format cannot hold.

    Args:
        source: directory of an adapter of either kind, or hub name of one.
        output: directory for the other kind: new, empty, or with an adapter of that kind, which is
            replaced.
        base: name or path of the base model, which is required; only its config is read.
        positions: positions that a pyreft adapter edits, such as f7+l7.
        dropout: dropout of a pyreft adapter, for further training.
        act_fn: activation function of a pyreft adapter, by transformers' name.
    """
    if base is None:  # no default; jsonargparse makes a required option positional
        raise ValueError("convert: expected --base, the name or path of the base model")
    expect_base(base)
    expect_place(source)
    Positions.parse(positions)
    from ..adapters.pyreft.convert import convert as convert_adapter

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


def _print_run(summary: dict[str, Any], entries: list[Any], directory: str) -> None:
    """Print what was trained, its scores, and what to do next."""
    from ..training.run_scores import print_scores

    parameters = summary["parameters"]
    trained = parameters["units"] + parameters["base"]
    print(
        f"Trained {trained:,} parameters, {trained / parameters['total']:.2%} of the base's, in "
        f"{summary['steps']} steps and {summary['seconds']:.0f} s; "
        f"mean loss {summary['train_loss']:.3f}"
    )
    print_scores(entries)
    print(f"The adapter is in {directory}/adapter. Next:")
    for command in (f"eval {directory} --base", f"chat {directory}", f"report {directory}"):
        print(f"  reftnoise {command}")


def _print_json(value: Any) -> None:
    print(json_text(value, indent=2))
