"""YAML as people mean it: `1e-3` is a number, and a key that stands twice is an error.

PyYAML, which keeps to YAML 1.1, takes `1e-3` for a text, writes the text "1e-3" without quotes, and
keeps the last of equal keys.
"""

import re
from typing import Any

import yaml

_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML does, but a key that stands twice is an error and not the last one."""
        scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        seen: set[str] = set()
        for key in scalars:
            if key.value in seen:
                problem = f"the key {key.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    def represent_text(self, text: str) -> yaml.Node:
        """As PyYAML does, but U+0085, which it would write as a line break, is escaped."""
        style = '"' if "\x85" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)

for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def load(text: str) -> Any:
    """What a YAML text says; a `yaml.YAMLError` if it is none."""
    return yaml.load(text, _Loader)


def dump(value: Any) -> str:
    """A YAML text from which `load` reads the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
