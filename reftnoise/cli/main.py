"""The command line: arguments → a call of the command's function, and mistakes → one line.

jsonargparse makes options of the functions' arguments and of the library's dataclasses.
"""

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from .._util.errors import nearest, one_line
from .._util.files import local_path
from ..adapters.location import ADAPTER, CONFIG_NAME
from ..analysis.steering.options import SteerOptions
from ..config.decoding import Decoding
from ..training.recipe import Recipe
from ..training.run_files import RECIPE
from ..training.study.grid import Study
from ..training.study.space import Tuning
from .commands import COMMANDS

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_FILES = (Recipe, Study, Tuning)
"""What a file can hold, which then comes first."""
_CONFIGS = (*_FILES, Decoding, SteerOptions)
"""Arguments whose fields are options of their own."""
_SECTIONS = {"train": ("training", "data"), "eval": ("evaluation",)}
"""By command, the sections of a recipe whose options a short name means first."""
_MOVED = {
    "bench": "bench is a program of the repository now: python examples/benchmark --help",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on stderr and exit code 2."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name == "--version":
        print(version("reftnoise"))
        return 0
    if name in COMMANDS:
        return run(COMMANDS[name], arguments, prog=f"reftnoise {name}")
    advice = _MOVED.get(name) or f"unknown command {name!r}; {nearest(name, COMMANDS)}"
    print(f"reftnoise: {advice}", file=sys.stderr)
    return 2


def run(function: Callable[..., int | None], arguments: Sequence[str], *, prog: str) -> int:
    """Call a function with options of a command line for its parameters; the exit code.

    Its docstring becomes the help. A file may come before the options.
    """
    logger, handler = logging.getLogger("reftnoise"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger.addHandler(handler)
    # Users can do nothing about what libraries will change.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for each of its attempts
    try:
        return function(**_parsed(function, arguments, prog)) or 0
    except BrokenPipeError:  # as of `| head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the interpreter's flush
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"reftnoise: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("; ".join(["reftnoise: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
    finally:  # later calls in this process write to their own stderr
        logger.removeHandler(handler)


def _parsed(
    function: Callable[..., int | None], arguments: Sequence[str], prog: str
) -> dict[str, Any]:
    """The function's arguments, as the command line says."""
    from jsonargparse import ArgumentError

    from .._util.options import built, explained, parser_of, whole_names

    parameters = inspect.signature(function).parameters
    configs = {n: p.annotation for n, p in parameters.items() if p.annotation in _CONFIGS}
    has_file = any(config in _FILES for config in configs.values())
    name = prog.rsplit(maxsplit=1)[-1]
    summary = (inspect.getdoc(function) or "").split("\n\nArgs:")[0]
    parser = parser_of(*configs.values(), prog=prog, description=summary, has_file=has_file)
    parser.add_function_arguments(
        function, skip=set(configs), as_positional=not has_file, as_group=not has_file
    )
    if has_file:
        parser.usage = f"{prog} [{'DIRECTORY' if name == 'eval' else 'FILE.yaml'}] [OPTIONS]"
        arguments = _with_file(name, arguments)
        parser.epilog = _short_names(parser, name)
    try:
        arguments = whole_names(parser, arguments, _SECTIONS.get(name, ()))
        parsed = parser.parse_args(list(_flags(parser, arguments)))
        values = {n: built(config, parser, parsed) for n, config in configs.items()}
        others = parser.instantiate(parsed)
    except ArgumentError as error:
        raise ValueError(f"{name}: {explained(error, parser)}") from None
    return {n: values[n] if n in values else others[n] for n in parameters}


def _with_file(name: str, arguments: Sequence[str]) -> Sequence[str]:
    """The arguments, with an option for what comes first: a recipe, a study, or a run."""
    from .._util import yaml
    from .._util.options import read_yaml

    commented = ["--print_config=comments" if a == "--print_config" else a for a in arguments]
    if not commented or commented[0].startswith("-"):
        if "--config" in commented[:-1]:  # a file replaces what comes before it
            i = commented.index("--config")
            read_yaml(commented[i + 1])
            return [*commented[i : i + 2], *commented[:i], *commented[i + 2 :]]
        return [*(_of_resumed(commented) if name == "train" else ()), *commented]
    first, *rest = commented
    path = local_path(first)
    if name != "eval":
        if not path.is_file():
            problem = "found a directory" if path.is_dir() else "no such file"
            raise FileNotFoundError(f"{name}: {first}: expected a YAML file, {problem}")
        values = read_yaml(path)  # its errors are clearer than the parser's
        if name == "tune" and "recipe" not in values:
            return ("--config", yaml.dump({"recipe": values}), *rest)
        return ("--config", first, *rest)
    return (*_of_directory(first, rest), "--output_dir", first, *rest)


def _of_resumed(options: Sequence[str]) -> Sequence[str]:
    """An option for the recipe of the run that `train --resume --output_dir DIR` continues."""
    from .._util.options import read_yaml

    values = {name: value for name, _, value in (option.partition("=") for option in options)}
    if values.get("--resume", "false") not in ("", "true"):
        return ()
    directory = values.get("--output_dir") or Recipe.output_dir
    if "--output_dir" in options[:-1]:
        directory = options[options.index("--output_dir") + 1]
    path = local_path(directory, "output_dir") / RECIPE
    if path.is_file():
        read_yaml(path)  # its errors are clearer than the parser's
        return ("--config", str(path))
    if not any(name.startswith(("--representations", "--peft", "--modules")) for name in values):
        raise FileNotFoundError(f"output_dir {directory}: no {RECIPE} in it, so no run to resume")
    return ()


def _of_directory(first: str, rest: Sequence[str]) -> Sequence[str]:
    """Options for the recipe and the base of the run or adapter that `eval` scores."""
    from .._util.options import read_yaml
    from ..training.run_adapter import base_of

    path = local_path(first)
    recipe, adapter = path / RECIPE, path / ADAPTER
    names_base = any(option.partition("=")[0] == "--model" for option in rest)
    if recipe.is_file():
        is_looked_for = "model" in read_yaml(recipe) and not names_base
        is_trained = (adapter / CONFIG_NAME).is_file()
        base = ("--model", base_of(adapter)["model"]) if is_looked_for and is_trained else ()
        return ("--config", str(recipe), *base)
    if (path / CONFIG_NAME).is_file():
        return () if names_base else ("--model", base_of(path)["model"])
    raise FileNotFoundError(f"eval: {first}: expected the directory of a run or of an adapter")


def _flags(parser: "ArgumentParser", arguments: Sequence[str]) -> Iterator[str]:
    """The arguments, in which `--quiet` alone is `--quiet=true`."""
    from .._util.options import option_values

    values = option_values(parser)
    flags = {f"--{name}" for name, default in values.items() if isinstance(default, bool)}
    for argument, after in zip_longest(arguments, arguments[1:]):
        is_alone = argument in flags and after not in ("true", "false")
        if argument.endswith(".forgetting"):  # which may also be a file
            is_alone = after is None or after.startswith("--")
        yield f"{argument}=true" if is_alone else argument


def _short_names(parser: "ArgumentParser", command: str) -> str:
    """What the help says of options by the last part of their names."""
    from .._util.options import short_names

    meant = short_names(parser, _SECTIONS.get(command, ()))
    alone = {f"--{name}": options[0] for name, options in meant.items() if len(options) == 1}
    same = [name for name, option in alone.items() if option.endswith(f".{name[2:]}")]
    other = [f"{name} for --{option}" for name, option in alone.items() if name not in same]
    return f"Options without their sections: {', '.join(same)}; {', '.join(other)}."


def _overview() -> str:
    lines = ["usage: reftnoise COMMAND [OPTIONS]", ""]
    for name, function in COMMANDS.items():
        lines.append(f"  {name:<10} {(inspect.getdoc(function) or '').splitlines()[0]}")
    return "\n".join([*lines, "", "See also reftnoise COMMAND --help, and reftnoise --version."])
