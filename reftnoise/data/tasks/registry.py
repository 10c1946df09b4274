"""Name → task: the names that recipes use. A task's module is imported when it is needed.

A new task is one class, in a module of its own or with its like, and one line here. A class that
serves several names takes the name as its argument.
"""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from ..._util.errors import brief, nearest
from .base import Task

TASKS = {
    "text": "text.TextTask",
    "raw_text": "text.RawTextTask",
    "classification": "classification.ClassificationTask",
    "instruct": "instruct.InstructTask",
    "boolq": "commonsense.CommonsenseTask",
    "piqa": "commonsense.CommonsenseTask",
    "social_i_qa": "commonsense.CommonsenseTask",
    "hellaswag": "commonsense.CommonsenseTask",
    "winogrande": "commonsense.CommonsenseTask",
    "arc_easy": "commonsense.CommonsenseTask",
    "arc_challenge": "commonsense.CommonsenseTask",
    "openbookqa": "commonsense.CommonsenseTask",
    "aqua": "arithmetic.AquaTask",
    "gsm8k": "arithmetic.Gsm8kTask",
    "mawps": "arithmetic.ArithmeticTask",
    "svamp": "arithmetic.ArithmeticTask",
    "addsub": "arithmetic.ArithmeticTask",
    "glue": "glue.GlueTask",
    "preference": "preference.PreferenceTask",
}


def get_task(spec: str | Mapping[str, Any]) -> Task:
    """The task of a name, or of a mapping `{"name": …}` that also has the task's arguments.

    Raises:
        ValueError: the name or an argument is unknown, or one is missing.
    """
    arguments = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "name" not in arguments:
        raise ValueError(f"task {arguments}: expected a 'name', one of {', '.join(TASKS)}")
    name = arguments.pop("name")
    if not isinstance(name, str) or name not in TASKS:
        raise ValueError(f"task {name!r} is not known; {nearest(name, TASKS)}")
    module, _, attribute = TASKS[name].partition(".")
    cls = getattr(importlib.import_module(f".{module}", __package__), attribute)
    taken = dict(inspect.signature(cls).parameters)
    own = {"name": name} if taken.pop("name", None) else {}
    for argument in arguments:
        if argument not in taken:
            raise ValueError(
                f"task {name!r} has no argument {argument!r}; {nearest(argument, taken)}"
            )
    missing = [
        n for n, p in taken.items() if p.default is inspect.Parameter.empty and n not in arguments
    ]
    if missing:
        raise ValueError(
            f"task {name!r} lacks its argument {missing[0]!r}: expected "
            f"{{name: {name}, {missing[0]}: …}}"
        )
    try:
        task: Task = cls(**own, **arguments)
    except TypeError as error:
        raise ValueError(f"task {name!r}, {brief(arguments)}: {error}") from None
    return task
