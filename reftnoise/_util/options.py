"""Mappings, YAML files and command lines → the library's dataclasses, by jsonargparse.

A name or a value that does not fit raises a ValueError of one line, with the nearest valid name.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar, get_args

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from . import yaml
from .errors import nearest, one_line
from .files import local_path
from .types import as_yaml, expect_types

Config = TypeVar("Config")

_UNKNOWN = (
    re.compile(r"unrecognized arguments: (?P<name>--[^\s=]+)"),
    re.compile(r"Option '(?P<name>[^']+)' is not accepted"),
    re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<name>[^']+)'"),
)
_WRONG = {
    re.compile(r"Expected an? <class '(\w+)'>\. Got value: (.*)"): r"expected \1, got '\2'",
    re.compile(r"Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)"): (
        r"expected one of \1, got '\2'"
    ),
    re.compile(r"Expected a typing\.(.+?)\. Got value: (.*)"): r"expected \1, got '\2'",
    re.compile(r"Unable to load config '(.*?)' - .*"): (
        r"expected a mapping, or a YAML file of one, got '\1'"
    ),
    re.compile(
        r"Does not validate .* Subtypes: \[typing\.Literal\[(.*?)\], <class 'NoneType'>\] "
        r"Errors: .* Given value: (.*)"
    ): r"expected one of \1, got '\2'",
    re.compile(r"Does not validate .* Subtypes: \[(.*?)\] Errors: .* Given value: (.*)"): (
        r"expected one of \1, got \2"
    ),
}


def parser_of(
    *configs: type, prog: str = "reftnoise", description: str = "", has_file: bool = True
) -> ArgumentParser:
    """A parser whose options are dataclasses' fields, and with `--config` a file of them."""
    parser = ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False
    )
    if has_file:
        parser.add_argument("--config", action="config", help="YAML file of these options")
    for config in configs:
        parser.add_class_arguments(config)
    return parser


def read(config: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """A dataclass from a mapping; fields that it leaves out have their defaults.

    Raises:
        ValueError: an unknown key or a value of another type; the message begins with `where`.
    """
    parser = parser_of(config)
    try:
        return built(config, parser, parser.parse_object(dict(values)))
    except ArgumentError as error:
        raise ValueError(where + explained(error, parser)) from None


def read_file(config: type[Config], path: str | Path) -> Config:
    """A dataclass from a YAML file; errors as in `read`, and an OSError where there is no file."""
    return read(config, read_yaml(path), f"{path}: ")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        values = yaml.load(local_path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping, got {as_yaml(values)}")
    return values


def built(config: type[Config], parser: ArgumentParser, parsed: Namespace) -> Config:
    """A dataclass from what such a parser has parsed."""
    options = fields(config)  # type: ignore[arg-type]  # all of them are dataclasses
    _expect_sections(config, parsed)
    values = parser.instantiate(parsed)
    result = config(**{field.name: values[field.name] for field in options})
    try:
        expect_types(result)  # jsonargparse lets null pass for anything
    except ValueError as error:
        raise ArgumentError(None, str(error)) from None
    return result


def _expect_sections(config: Any, parsed: Namespace, where: str = "") -> None:
    """Raise an ArgumentError where a dataclass, or a list of them, is to be something else."""
    for field in fields(config):
        name, value = f"{where}{field.name}", parsed[field.name]
        parts = [(name, value, field.type)]
        if isinstance(value, list) and (items := get_args(field.type)):
            parts = [(f"{name}[{i}]", item, items[0]) for i, item in enumerate(value)]
        for place, part, expected in parts:
            if not is_dataclass(expected):
                continue
            if not isinstance(part, Namespace):
                raise ArgumentError(None, f"{place}: expected a mapping, got {as_yaml(part)}")
            _expect_sections(expected, part, f"{place}.")


def option_values(parser: ArgumentParser) -> dict[str, Any]:
    """The defaults of a parser's options by their names, such as `training.learning_rate`."""
    return dict(parser.get_defaults(skip_validation=True).items())


_OTHER_NAMES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "data": "train",
}
"""What people call options whose names end otherwise."""


def short_names(parser: ArgumentParser, sections: Sequence[str] = ()) -> dict[str, list[str]]:
    """The options that may be meant by the last part of their names, or by what people say.

    `by` is `evaluation.by`, since no other option ends so. Where several do, those of `sections`
    are meant, if they have any. A name that is an option itself is not short for another, and a
    study's `recipe.seed`, which its own seeds replace, has no short name.
    """
    options = list(option_values(parser))
    meant: dict[str, list[str]] = defaultdict(list)
    for option in options:
        section, _, last = option.rpartition(".")
        if section not in ("", "recipe"):
            names = [last, *(short for short, name in _OTHER_NAMES.items() if name == last)]
            for name in names:
                meant[name].append(option)
    for name, candidates in meant.items():
        first = [option for option in candidates if option.split(".")[0] in sections]
        meant[name] = first or candidates
    return {name: candidates for name, candidates in meant.items() if name not in options}


def whole_names(
    parser: ArgumentParser, arguments: Sequence[str], sections: Sequence[str] = ()
) -> list[str]:
    """Arguments in which short names of options are whole ones; `sections` as in `short_names`.

    Raises:
        ArgumentError: a name may mean several options.
    """
    meant, whole = short_names(parser, sections), []
    for argument, after in zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, value = argument.removeprefix("--").partition("=")
        candidates = meant.get(name, []) if argument.startswith("--") else []
        if _is_section(parser, name, value if equals else after):
            candidates = []
        if len(candidates) > 1:
            names = " or ".join(f"--{option}" for option in candidates)
            raise ArgumentError(None, f"--{name} may mean several options: expected {names}")
        whole.append(f"--{candidates[0]}{equals}{value}" if candidates else argument)
    return whole


def _is_section(parser: ArgumentParser, name: str, value: str) -> bool:
    """Whether an option is a section as a whole: a mapping, or a file of one."""
    is_whole = value.startswith("{") or value.endswith((".yaml", ".yml"))
    return is_whole and any(option.startswith(f"{name}.") for option in option_values(parser))


def explained(error: Exception, parser: ArgumentParser) -> str:
    """A parser's error in one line, with the nearest of the names that it knows."""
    message = one_line(error)
    known = [name for name in option_values(parser) if name != "config"]
    for pattern in _UNKNOWN:
        if (match := pattern.search(message)) is None:
            continue
        parts = match.groupdict()
        name, group = parts["name"], parts.get("group")
        if name.startswith("--"):
            options = [f"--{option}" for option in known]
            return f"unknown option {name!r}; {nearest(name, options, '--help lists them')}"
        where, names = "", list(dict.fromkeys(key.split(".")[0] for key in known))
        if group is not None:
            where = f"{group}: "
            names = [key.removeprefix(f"{group}.") for key in known if key.startswith(f"{group}.")]
        return f"{where}unknown key {name.split('.')[0]!r}; {nearest(name.split('.')[0], names)}"
    if match := re.match(r"unrecognized arguments: (\S+\.ya?ml)", message):
        return f"{match[1]}: a file comes first, then its options"
    if match := re.match(r'Parser key "([^"]+)": (.*)', message):
        key, reason = match.groups()
        for pattern, words in _WRONG.items():
            reason = pattern.sub(words, reason)
        return reason if key == "config" else f"{key}: {reason}"
    return message
