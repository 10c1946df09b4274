"""Name → task: the names that recipes use. A task's module is imported when it is asked for."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from ..._util.errors import nearest
from .base import Task

TASKS = {
    "text": "text.TextTask",
    "classification": "classification.ClassificationTask",
    "instruct": "instruct.InstructTask",
    "boolq": "boolq.BoolqTask",
    "piqa": "piqa.PiqaTask",
    "social_i_qa": "social_i_qa.SocialIqaTask",
    "hellaswag": "hellaswag.HellaswagTask",
    "winogrande": "winogrande.WinograndeTask",
    "arc_easy": "arc_easy.ArcEasyTask",
    "arc_challenge": "arc_challenge.ArcChallengeTask",
    "openbookqa": "openbookqa.OpenbookqaTask",
    "aqua": "aqua.AquaTask",
    "gsm8k": "gsm8k.Gsm8kTask",
    "mawps": "mawps.MawpsTask",
    "svamp": "svamp.SvampTask",
    "addsub": "addsub.AddsubTask",
    "glue": "glue.GlueTask",
}


def get_task(spec: str | Mapping[str, Any]) -> Task:
    """The task of a name, or of a mapping `{"name": …}` with the task's arguments beside it.

    Raises:
        ValueError: a name or an argument that is not known, or one that is missing.
    """
    arguments = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "name" not in arguments:
        raise ValueError(f"task {arguments}: expected a 'name', one of {', '.join(TASKS)}")
    name = arguments.pop("name")
    if name not in TASKS:
        raise ValueError(f"task {name!r} is not known; {nearest(name, TASKS)}")
    module, _, attribute = TASKS[name].partition(".")
    cls = getattr(importlib.import_module(f".{module}", __package__), attribute)
    taken = inspect.signature(cls).parameters
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
    task: Task = cls(**arguments)
    return task
