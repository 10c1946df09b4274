"""The command line: arguments → a call of the command's function, and mistakes → one line.

Options are made by jsonargparse of the functions' arguments and of the library's own dataclasses.
"""

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from .._util.errors import nearest, one_line
from ..evaluation.decoding import Decoding
from ..training.recipe import Recipe
from ..training.run_files import RECIPE
from ..training.study.grid import Study
from .commands import COMMANDS

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_FILES = (Recipe, Study)
"""What a file may hold, which then stands first."""
_CONFIGS = (*_FILES, Decoding)
"""Arguments whose fields are options of their own."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; what the user got wrong is one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(version("reftnoise"))
        return 0
    logger = logging.getLogger("reftnoise")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.handlers[0].setFormatter(logging.Formatter("%(name)s: %(message)s"))
    # Of what libraries will change, their users' users can do nothing.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # of each of its many attempts
    try:
        return _run(*arguments)
    except BrokenPipeError:  # as of `| head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the interpreter's flush
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"reftnoise: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("reftnoise: interrupted", file=sys.stderr)
        return 130


def _run(name: str, *arguments: str) -> int:
    from jsonargparse import ArgumentError

    from .._util.options import built, explained, parser_of

    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}; {nearest(name, COMMANDS)}")
    function = COMMANDS[name]
    parameters = inspect.signature(function).parameters
    configs = {n: p.annotation for n, p in parameters.items() if p.annotation in _CONFIGS}
    has_file = any(config in _FILES for config in configs.values())
    summary = (inspect.getdoc(function) or "").split("\n\nArgs:")[0]
    prog = f"reftnoise {name}"
    parser = parser_of(*configs.values(), prog=prog, description=summary, has_file=has_file)
    parser.add_function_arguments(
        function, skip=set(configs), as_positional=not has_file, as_group=not has_file
    )
    if has_file:
        parser.usage = f"{prog} [{'DIRECTORY' if name == 'eval' else 'FILE.yaml'}] [OPTIONS]"
        arguments = _with_file(name, arguments)
    try:
        parsed = parser.parse_args(list(_flags(parser, arguments)))
        values = {n: built(config, parser, parsed) for n, config in configs.items()}
        given = parser.instantiate(parsed)
    except ArgumentError as error:
        raise ValueError(f"{name}: {explained(error, parser)}") from None
    function(**{n: values[n] if n in values else given[n] for n in parameters})
    return 0


def _with_file(name: str, arguments: tuple[str, ...]) -> tuple[str, ...]:
    """Options for what may stand first without one: a recipe's or study's file, or a run."""
    from .._util.options import read_yaml

    commented = ["--print_config=comments" if a == "--print_config" else a for a in arguments]
    if not commented or commented[0].startswith("-"):
        if "--config" in commented[:-1]:  # what stands before it would be replaced by it
            i = commented.index("--config")
            commented = [*commented[i : i + 2], *commented[:i], *commented[i + 2 :]]
        return tuple(commented)
    first, *rest = commented
    path = Path(first)
    if name != "eval":
        if not path.is_file():
            found = "found a directory" if path.is_dir() else "no such file"
            raise FileNotFoundError(f"{name}: {first}: expected a YAML file, {found}")
        read_yaml(path)  # with clearer errors than the parser's
        return ("--config", first, *rest)
    place = ("--output_dir", first)
    if (path / RECIPE).is_file():
        return ("--config", str(path / RECIPE), *place, *rest)
    if (path / "reft_config.json").is_file():
        from ..training.run_adapter import base_of

        return ("--model", base_of(path)["model"], *place, *rest)
    raise FileNotFoundError(f"eval: {first}: expected the directory of a run or of an adapter")


def _flags(parser: "ArgumentParser", arguments: Sequence[str]) -> Iterator[str]:
    """`--quiet` for `--quiet true`."""
    flags = {f"--{action.dest}" for action in parser._actions if action.metavar == "{true,false}"}
    for argument, after in zip_longest(arguments, arguments[1:]):
        is_alone = argument in flags and after not in ("true", "false")
        yield f"{argument}=true" if is_alone else argument


def _overview() -> str:
    lines = ["usage: reftnoise COMMAND [OPTIONS]", ""]
    for name, function in COMMANDS.items():
        lines.append(f"  {name:<9} {(inspect.getdoc(function) or '').splitlines()[0]}")
    return "\n".join([*lines, "", "reftnoise COMMAND --help tells more; reftnoise --version."])
