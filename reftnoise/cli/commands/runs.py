"""Commands that train and score: demo, train, eval, study, tune.

Heavy imports are inside the functions: `--help` and mistakes do not wait for torch.
"""

import shlex
from dataclasses import asdict
from logging import getLogger

from ..._util.files import local_path
from ...config.base_model import EMBEDDED, expect_base
from ...training.recipe import Recipe
from ...training.resolved_run import ResolvedRun
from ...training.run_files import BEST, RECIPE, TUNING
from ...training.study.grid import Study, checked_cells
from ...training.study.space import Tuning, check_tuning
from ..checks import expect_adapters
from ..printing import print_json, print_run, progress_console


def demo(base: str = EMBEDDED, output_dir: str = "reftnoise-demo", seed: int = 0) -> None:
    """Train a small model and show its answers before and after.

    Args:
        base: tiny-chat, the embedded model; or a chat model, such as smollm2, which is also
            steered.
        output_dir: directory for the adapter.
        seed: seed of all random draws.
    """
    expect_base(base)
    path = local_path(output_dir, "output_dir")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{output_dir}: expected a directory, found a file")
    if base == EMBEDDED:
        from ..demo.tiny import run_demo

        run_demo(output_dir, seed)
    else:
        from ..demo.chat import run_chat_demo

        run_chat_demo(base, output_dir, seed)


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
        resume: whether an unfinished run continues from its last checkpoint; its recipe need not
            be named again.
        overwrite: whether a run in output_dir is replaced.
        quiet: whether nothing but errors is printed.
        json: whether summary and scores are printed as JSON, without progress.
    """
    run = ResolvedRun(recipe)
    run.expect_trainable()
    from ...training.run_directory import RunDirectory, is_main_process

    directory = RunDirectory(run.recipe, resume=resume, overwrite=overwrite)
    from ...training.run import run_recipe

    console = progress_console(quiet or json)
    try:
        summary, entries = run_recipe(run, resume=resume, overwrite=overwrite, console=console)
    except KeyboardInterrupt:
        if not (run.directory / RECIPE).is_file():
            raise
        place = shlex.quote(str(run.directory))
        message = f"to go on: reftnoise train --resume --output_dir {place}"
        if directory.is_finished:
            message = f"{run.directory} holds a finished run"
        raise KeyboardInterrupt(message) from None
    if not is_main_process():
        return
    if json:
        print_json(summary | {"scores": entries, "output_dir": recipe.output_dir})
    elif not quiet:
        print_run(summary, entries, recipe.output_dir)


def evaluate(recipe: Recipe, base: bool = False, quiet: bool = False, json: bool = False) -> None:
    """Score the adapter of a run on its recipe's task, and write the scores to the run.

    Args:
        recipe: directory of a run or of an adapter, which comes first; options such as
            --data, --by or --limit replace what the run's recipe says.
        base: whether the base without its adapter is scored, too.
        quiet: whether nothing but errors is printed.
        json: whether the scores are printed as JSON, without progress.
    """
    run = ResolvedRun(recipe)
    run.expect_scored()
    expect_adapters(recipe.output_dir)
    from ...training.run import load_trained
    from ...training.run_scores import one_answer, print_scores, save_scores, score

    model, tokenizer = load_trained(run)
    console = progress_console(quiet or json)
    entries, predictions = score(run, model, tokenizer, base=base, console=console)
    save_scores(run.directory, entries, predictions)
    if problem := one_answer(predictions):
        getLogger(__name__).warning("%s: %s", recipe.output_dir, problem)
    if json:
        print_json(entries)
    elif not quiet:
        print_scores(entries)


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
    from ...analysis.report import show_table, write_study_report
    from ...training.study.runner import run_study

    results = run_study(study, console=progress_console(quiet or json))
    page, table = write_study_report(study.output_dir)
    if json:
        print_json(results)
    elif not quiet:
        show_table(table, Console(highlight=False))
        print(f"The report is in {page}.")


def tune(tuning: Tuning, quiet: bool = False, json: bool = False) -> None:
    """Search settings of a recipe on held-out training rows; the result is a recipe to train.

    Args:
        tuning: YAML file, which comes first: a recipe, or a search with its recipe; options replace
            what it says.
        quiet: whether nothing but errors is printed.
        json: whether the trials are printed as JSON, without progress.
    """
    check_tuning(tuning)
    from rich.console import Console

    # First: they say if their extra is missing.
    from ...analysis.report import show_table
    from ...analysis.report.tuning import write_tuning_report
    from ...training.study.tuning_run import run_tuning

    directory = local_path(tuning.output_dir)
    try:
        trials = run_tuning(tuning, console=progress_console(quiet or json))
    except KeyboardInterrupt:
        if not (directory / TUNING).is_file():
            raise
        place = shlex.quote(str(directory / TUNING))
        raise KeyboardInterrupt(f"to go on: reftnoise tune {place}") from None
    page, table = write_tuning_report(directory, trials)
    if json:
        print_json([asdict(trial) for trial in trials])
    elif not quiet:
        show_table(table, Console(highlight=False))
        print(f"The report is in {page}. Next:")
        print(f"  reftnoise train {directory / BEST}")
