"""A chat with an adapted model in the terminal, with its edits on, off or scaled."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from rich.console import Console
from torch import Tensor
from transformers import TextStreamer, set_seed
from transformers.utils import logging as transformers_logging

from .._util.errors import nearest
from ..data.templates import check_template, fill
from ..data.tokenization import smallest_limit
from ..evaluation.decoding import GREEDY, Decoding
from ..evaluation.generation import ends_of, prompt_tokens
from ..model import ReftModel
from ..training.run_adapter import template_of
from .loading import load_adapted
from .prompts import default_new_tokens

SIGN = "› "


def chat(
    adapter: str | Path,
    *,
    model: str | None = None,
    device: str = "auto",
    decoding: Decoding = GREEDY,
    console: Console | None = None,
) -> None:
    """Read messages from stdin until its end, and stream an answer to each.

    Args:
        adapter: as in `load_adapted`.
        model: the base, as in `load_adapted`.
        device: of both, as in `load_adapted`.
        decoding: how answers are drawn. In another template than chat, by default that of the run,
            each line is a prompt of its own.
        console: where to print.

    Raises:
        OSError: no such adapter or base.
        ValueError: a template that does not fit, or a damaged adapter.
    """
    console = console or Console(highlight=False)
    template = decoding.template_or(template_of(adapter) or "chat")
    check_template(template)
    transformers_logging.set_verbosity_error()
    reft_model, tokenizer = load_adapted(adapter, model, device=device)
    set_seed(decoding.seed)
    talk = Conversation(
        reft_model,
        tokenizer,
        console,
        system=decoding.system,
        template=template,
        max_new_tokens=decoding.max_new_tokens or default_new_tokens(tokenizer, reft_model),
        settings=decoding.arguments(),
    )
    if sys.stdin.isatty():
        console.print("[dim]/help lists commands, Ctrl-D leaves.[/dim]")
    for line in _lines(console):
        if not talk.read(line):
            return


def _lines(console: Console) -> Iterator[str]:
    """What the user types, line by line; Ctrl-C at the prompt gives up the line."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # by which input() edits lines and remembers them
    while True:
        try:
            yield input(SIGN)
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\n[dim]Ctrl-D or /quit leaves.[/dim]")


class Conversation:
    """Messages so far, and what the next answer is made with.

    Args:
        reft_model: in evaluation mode.
        tokenizer: of the base. Without a chat template, the conversation is one text that each
            line and each answer continue.
        console: where to print.
        system: a message before all others.
        template: of the prompts that the adapter was trained on. With another than `chat`, each
            line is a prompt of its own.
        max_new_tokens: of each answer.
        settings: further arguments of `generate`.
    """

    def __init__(
        self,
        reft_model: ReftModel,
        tokenizer: Any,
        console: Console,
        *,
        system: str | None = None,
        template: str | None = None,
        max_new_tokens: int = 256,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self._model, self._tokenizer, self._console = reft_model, tokenizer, console
        self._system, self._max_new_tokens, self._settings = system, max_new_tokens, settings or {}
        self.messages: list[dict[str, str]] = []
        self.is_on = True
        self._has_template = tokenizer.chat_template is not None
        self._template = None if template == "chat" else template
        if self._template is not None:
            self._say("Each line is a prompt of its own, in the template of the run.")
        elif not self._has_template:
            self._say("The tokenizer has no chat template: each line is continued as it stands.")

    def read(self, line: str) -> bool:
        """Obey a command or answer a message; False for the wish to leave."""
        line = line.strip()
        if line.startswith("/"):
            name, _, rest = line.partition(" ")
            if name == "/quit":
                return False
            if name in COMMANDS:
                _, obey = COMMANDS[name]
                obey(self, rest.strip())
            else:
                self._say(f"unknown command {name}; {nearest(name, [*COMMANDS, '/quit'])}")
        elif line:
            self._answer(line)
        return True

    # -- answers ---------------------------------------------------------------------------------

    def _answer(self, text: str) -> None:
        try:
            tokens, room = self._prompt([*self.messages, {"role": "user", "content": text}])
        except (TemplateError, ValueError) as error:
            self._say(f"not answered: {error}")
            return
        shown = _Shown(self._tokenizer, self._console)
        ends = ends_of(self._model, self._tokenizer)
        device = self._model.device
        with contextlib.ExitStack() as stack:
            stack.callback(shown.end)
            stack.enter_context(contextlib.suppress(KeyboardInterrupt))
            if not self.is_on:
                stack.enter_context(self._model.disabled())
            self._model.generate(
                input_ids=tokens.to(device),
                attention_mask=tokens.new_ones(tokens.shape).to(device),
                max_new_tokens=room,
                eos_token_id=ends or None,
                pad_token_id=next(iter(ends), 0),
                streamer=shown,
                **self._settings,
            )
        self.messages.append({"role": "assistant", "content": shown.text})

    def _prompt(self, messages: list[dict[str, str]]) -> tuple[Tensor, int]:
        """Token ids [1, length] of the conversation, and how many tokens the answer may have.

        The oldest messages are left out where they leave no room for it.
        """
        limit = smallest_limit(self._tokenizer, self._model, None)
        room = self._max_new_tokens if limit is None else min(self._max_new_tokens, limit // 2)
        for start in range(0, len(messages), 2):
            tokens = self._tokens(messages[start:])
            if limit is None or len(tokens) + room <= limit:
                break
        else:
            raise ValueError(
                f"the message has {len(tokens)} tokens, the model's context {limit}, of which "
                f"{room} are kept for the answer"
            )
        if start:
            self._say(f"The {start} oldest messages no longer fit into {limit} tokens.")
        self.messages = messages[start:]
        return torch.tensor([tokens]), room

    def _tokens(self, messages: list[dict[str, str]]) -> list[int]:
        if self._template is not None:
            return prompt_tokens(self._tokenizer, fill(self._template, messages[-1]["content"], {}))
        if self._system:
            messages = [{"role": "system", "content": self._system}, *messages]
        if self._has_template:
            return prompt_tokens(self._tokenizer, messages)
        return prompt_tokens(self._tokenizer, "\n".join(one["content"] for one in messages))

    # -- commands --------------------------------------------------------------------------------

    def _off(self, _: str) -> None:
        self.is_on = False
        self._say("The base answers, without the adapter.")

    def _on(self, _: str) -> None:
        self.is_on = True
        self._say("The adapted model answers.")

    def _scale(self, value: str) -> None:
        try:
            self._model.scale = float(value)
        except ValueError:
            self._say(f"/scale {value}: expected a number such as 0.5; 1 is as trained")
            return
        self._say(f"Edits are multiplied by {self._model.scale:g}.")

    def _reset(self, _: str) -> None:
        self.messages = []
        self._say("The conversation begins anew.")

    def _set_system(self, text: str) -> None:
        self._system = text or None
        self._say("The system message is set." if text else "There is no system message now.")

    def _help(self, __: str) -> None:
        for name, (what, _) in COMMANDS.items():
            self._say(f"{name:<9}{what}")
        self._say(f"{'/quit':<9}leave, like Ctrl-D; Ctrl-C stops an answer")

    def _say(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False, soft_wrap=True)


COMMANDS: dict[str, tuple[str, Callable[[Conversation, str], None]]] = {
    "/off": ("answer by the base, without the adapter", Conversation._off),
    "/on": ("answer by the adapted model again", Conversation._on),
    "/scale": ("multiply edits: /scale 0.5; a peft section stays as it is", Conversation._scale),
    "/reset": ("forget the conversation", Conversation._reset),
    "/system": (
        "set the message before the conversation; alone, drop it",
        Conversation._set_system,
    ),
    "/help": ("list commands", Conversation._help),
}
"""By name: what it does, and the method that does it with the rest of the line."""


class _Shown(TextStreamer):
    """Prints an answer as it is written, and keeps it."""

    def __init__(self, tokenizer: Any, console: Console) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._console = console
        self._has_ended = False
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._has_ended:  # generate says so, and an interrupted one does not
            return
        self._has_ended = stream_end
        self.text += text
        self._console.print(text, end="\n" if stream_end else "", markup=False, soft_wrap=True)
