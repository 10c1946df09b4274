"""YAML 1.1 as people mean it: `1e-3` is a number, `n` a text, and a key may occur once.

`012` and `1:30`, numbers of base 8 and 60 there, are texts.
"""

import io
import re
import warnings
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import (
    MantissaNoDotYAML1_1Warning,
    MarkedYAMLError,
    ReusedAnchorWarning,
    YAMLError,
)
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.representer import SafeRepresenter

from .errors import one_line

_DIRECTIVE = "%YAML 1.1\n---\n"
MAX_DEPTH, MAX_DIGITS = 64, 1000
MAX_COPIES = 100_000
"""Values that aliases may stand for in all; without aliases, there is no limit."""


class _Constructor(SafeConstructor):
    def construct_bool(self, node: ScalarNode) -> bool | str:
        """As ruamel.yaml does, but `y` and `n` are texts, as PyYAML has them."""
        if node.value in ("y", "Y", "n", "N"):
            return node.value
        return bool(self.construct_yaml_bool(node))

    def construct_number(self, node: ScalarNode) -> int | float | str:
        """As ruamel.yaml does, but codes and times are texts; it would take `012` for 10."""
        if len(node.value) > MAX_DIGITS:
            raise _marked(f"expected a number of at most {MAX_DIGITS} characters", node)
        is_int = node.tag == "tag:yaml.org,2002:int"
        if ":" in node.value or (is_int and re.match(r"[-+]?0[0-9_]", node.value)):
            return str(node.value)
        construct = self.construct_yaml_int if is_int else self.construct_yaml_float
        number: int | float = construct(node)
        return number

    def construct_document(self, node: Node) -> Any:
        """As ruamel.yaml does, unless aliases make the document endless or very large."""
        sizes: dict[Node, int] = {}
        _measure(node, sizes, depth=0)
        if sizes[node] > max(MAX_COPIES, len(sizes)):
            raise YAMLError(f"its aliases stand for more than {MAX_COPIES:,} values")
        return super().construct_document(node)


class _Representer(SafeRepresenter):
    def represent_text(self, text: str) -> ScalarNode:
        """As ruamel.yaml does, but U+0085, which it would write as a line break, is escaped."""
        style = '"' if "\x85" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _measure(node: Node, sizes: dict[Node, int], depth: int) -> int:
    """Note how many values a node and the nodes in it stand for, with a copy for each alias."""
    if node in sizes:
        if not sizes[node]:
            raise _marked("a value that contains itself", node)
        return sizes[node]
    if depth > MAX_DEPTH:
        raise _marked(f"expected at most {MAX_DEPTH} levels", node)
    sizes[node] = 0  # until its parts are known
    parts: list[Node] = []
    if isinstance(node, SequenceNode):
        parts = list(node.value)
    elif isinstance(node, MappingNode):
        parts = [part for pair in node.value for part in pair]
    sizes[node] = 1 + sum(_measure(part, sizes, depth + 1) for part in parts)
    return sizes[node]


def _marked(problem: str, node: Node) -> MarkedYAMLError:
    return MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


_Constructor.add_constructor("tag:yaml.org,2002:bool", _Constructor.construct_bool)
_Constructor.add_constructor("tag:yaml.org,2002:int", _Constructor.construct_number)
_Constructor.add_constructor("tag:yaml.org,2002:float", _Constructor.construct_number)
_Representer.add_representer(str, _Representer.represent_text)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.version = "1.1"  # in which `yes` is true
    yaml.Constructor, yaml.Representer = _Constructor, _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # its type is None
    return yaml


def load(text: str) -> Any:
    """The value that a YAML text describes.

    Raises:
        ValueError: the text is not YAML, has a key twice or aliases without end, or is nested too
            deeply; the message is one line.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MantissaNoDotYAML1_1Warning)
            warnings.simplefilter("ignore", ReusedAnchorWarning)  # an alias means the latest
            return _yaml().load(text)
    except RecursionError:
        raise ValueError(f"no YAML: expected at most {MAX_DEPTH} levels") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ValueError(f"no YAML: {where}{error.problem or error.context}") from None
    except YAMLError as error:
        raise ValueError(f"no YAML: {one_line(error)}") from None


def dump(value: Any) -> str:
    """A YAML text from which `load` reads the same value."""
    stream = io.StringIO()
    _yaml().dump(value, stream)
    return stream.getvalue().removeprefix(_DIRECTIVE)
