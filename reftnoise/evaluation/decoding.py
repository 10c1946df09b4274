"""How prompts become answers: options of commands and arguments of functions alike.

The command line is made from this class, so nothing heavy is imported here.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """What stands around a prompt, and how its answer is drawn.

    Args:
        template: put around each prompt: plain, chat, alpaca, or a text with {prompt} in it; by
            default that of the run, or else chat where the tokenizer has such a template.
        system: a message before each prompt or conversation, in the template chat.
        max_new_tokens: of each answer; by default 256, or half of a smaller context.
        temperature: of sampling; 0 for the most likely token at every step.
        top_p: sample from the most likely tokens that have this probability together.
        top_k: sample from so many most likely tokens.
        repetition_penalty: above 1, tokens that were there before are less likely.
        seed: of sampling, which also depends on the batch size.

    Raises:
        ValueError: a number that is out of range, or sampling from a part of the tokens at
            temperature 0.
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
        """The template, or a default; a ValueError where it has no place for `system`."""
        template = self.template or default
        if self.system is not None and template != "chat":
            raise ValueError(f"system needs the template chat, not {template!r}")
        return template

    def arguments(self) -> dict[str, Any]:
        """Those of `generate`, but for the number of tokens."""
        given = {"top_p": self.top_p, "top_k": self.top_k} if self.temperature else {}
        given["repetition_penalty"] = self.repetition_penalty
        found: dict[str, Any] = {n: value for n, value in given.items() if value is not None}
        if self.temperature:
            return found | {"do_sample": True, "temperature": float(self.temperature)}
        # What the base would sample with is unused, and warned of.
        return found | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


GREEDY = Decoding()
