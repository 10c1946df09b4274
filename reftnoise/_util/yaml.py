"""YAML 1.1 as people mean it: `1e-3` is a number, `n` a text, and a key may occur once."""

import io
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
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from .errors import one_line

_DIRECTIVE = "%YAML 1.1\n---\n"


class _Constructor(SafeConstructor):
    def construct_bool(self, node: ScalarNode) -> bool | str:
        """As ruamel.yaml does, but `y` and `n` are texts, as PyYAML has them."""
        if node.value in ("y", "Y", "n", "N"):
            return node.value
        return bool(self.construct_yaml_bool(node))


class _Representer(SafeRepresenter):
    def represent_text(self, text: str) -> ScalarNode:
        """As ruamel.yaml does, but U+0085, which it would write as a line break, is escaped."""
        style = '"' if "\x85" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Constructor.add_constructor("tag:yaml.org,2002:bool", _Constructor.construct_bool)
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
        ValueError: the text is not YAML, or has a key twice; the message is one line.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MantissaNoDotYAML1_1Warning)
            warnings.simplefilter("ignore", ReusedAnchorWarning)  # an alias means the latest
            return _yaml().load(text)
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
