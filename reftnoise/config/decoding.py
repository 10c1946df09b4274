"""How prompts become answers: options of commands and arguments of functions alike.

The command line is made from this class, so nothing heavy is imported here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

Way: TypeAlias = Literal["generation", "likelihood", "loss"]
"""How a model is scored: by what it writes, by the choice it finds likeliest, or by its loss."""
WAYS: tuple[Way, ...] = get_args(Way)


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The text around a prompt, and how its answer is drawn.

    Args:
        template: text around each prompt: plain, chat, alpaca, or a text with {prompt} in it; by
            default that of the run, or else chat where the tokenizer has such a template.
        system: message before each prompt or conversation, in the template chat.
        max_new_tokens: greatest number of tokens of an answer; by default 256, or half of a smaller
            context.
        temperature: temperature of sampling; 0 for the most likely token at every step.
        top_p: probability that the tokens sampled from have together, the most likely first.
        top_k: number of tokens sampled from, the most likely first.
        repetition_penalty: penalty above 1, which makes tokens less likely that were there before.
        seed: seed of sampling, which also depends on the batch size.

    Raises:
        ValueError: a number is out of range, or `top_p` or `top_k` has temperature 0.
    """

    template: str | None = None
    system: str | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens}: expected at least 1")
        number = self.temperature
        if not isinstance(number, int | float) or not 0.0 <= number < float("inf"):
            raise ValueError(f"temperature {number!r}: expected a number of at least 0")
        for name, value in (("top_p", self.top_p), ("top_k", self.top_k)):
            if value is not None and not number:
                raise ValueError(f"{name} {value}: needs a temperature above 0")

    def template_or(self, default: str) -> str:
        """The template, or a default.

        Raises:
            ValueError: there is a system message, for which the template has no place.
        """
        template = self.template or default
        if self.system is not None and template != "chat":
            raise ValueError(f"system needs the template chat, not {template!r}")
        return template

    def arguments(self) -> dict[str, Any]:
        """Arguments of `generate`, except the number of tokens."""
        settings: dict[str, Any] = {"repetition_penalty": self.repetition_penalty}
        if self.temperature:
            settings |= {"do_sample": True, "temperature": float(self.temperature)}
            settings |= {"top_p": self.top_p, "top_k": self.top_k}
        return greedy_by_default({n: value for n, value in settings.items() if value is not None})


def greedy_by_default(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `generate`, greedy unless they say `do_sample`."""
    if settings.get("do_sample"):
        return dict(settings)
    # What the base would sample with is unused, and warned of.
    unused = {"temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": False} | unused | dict(settings)


GREEDY = Decoding()
