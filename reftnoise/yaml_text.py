"""YAML as people write it: `1e-3` is a number, as in YAML 1.2 and in Python.

PyYAML, which keeps to YAML 1.1, takes it for a text, and writes the text "1e-3" without quotes.
"""

import re
from typing import Any

import yaml

_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    pass


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def load(text: str) -> Any:
    """What a YAML text says; a `yaml.YAMLError` if it is none."""
    return yaml.load(text, _Loader)


def dump(value: Any) -> str:
    """A YAML text from which `load` reads the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
