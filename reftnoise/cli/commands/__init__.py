"""What each command of the command line does, as a function of its options."""

from collections.abc import Callable

from .adapters import convert, export, heads, inspect_adapter, report, verify
from .answers import chat, generate, playground, serve
from .runs import demo, evaluate, study, train, tune
from .steering import steer

COMMANDS: dict[str, Callable[..., int | None]] = {
    "demo": demo,
    "train": train,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "playground": playground,
    "eval": evaluate,
    "study": study,
    "tune": tune,
    "steer": steer,
    "heads": heads,
    "report": report,
    "inspect": inspect_adapter,
    "convert": convert,
    "export": export,
    "verify": verify,
}
"""By name. A `Recipe`, `Study`, `Decoding` or `SteerOptions` is options, one for each field."""
