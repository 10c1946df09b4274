"""A chat with an adapted model in the terminal, with its edits on, off or scaled."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import TextStreamer, set_seed
from transformers.utils import logging as transformers_logging

from .._util.errors import nearest
from ..config.decoding import GREEDY, Decoding
from ..data.templates import check_template, fill
from ..data.tokenization import prompt_tokens, smallest_limit
from ..model import ReftModel
from ..training.run_adapter import template_of
from .loading import load_adapted
from .prompts import generate_arguments, new_tokens

SIGN = "› "
COMMANDS = {
    "/off": "let the base answer, without the adapter, in a conversation of its own",
    "/on": "let the adapted model answer again, where it stopped",
    "/scale": "multiply edits: /scale 0.5; a peft section stays as it is",
    "/reset": "forget the conversation",
    "/system": "set the system message: /system TEXT; alone, drop it",
    "/help": "list commands",
    "/quit": "leave, like Ctrl-D; Ctrl-C stops an answer",
}


def chat(
    adapter: str | Path,
    *,
    model: str | None = None,
    device: str = "auto",
    decoding: Decoding = GREEDY,
    console: Console | None = None,
) -> None:
    """Read messages from stdin until its end, and stream an answer to each.

    Adapter, model and device are as in `load_adapted`; the template is by default that of the run.
    In any template but chat, each line is a prompt of its own.

    Raises:
        OSError: there is no such adapter or base.
        ValueError: the template does not fit, or the adapter is damaged.
    """
    console = console or Console(highlight=False)
    template = decoding.template_or(template_of(adapter) or "chat")
    check_template(template)
    transformers_logging.set_verbosity_error()
    reft_model, tokenizer = load_adapted(adapter, model, device=device)
    set_seed(decoding.seed)
    conversation = Conversation(
        reft_model, tokenizer, console, decoding=replace(decoding, template=template)
    )
    if sys.stdin.isatty():
        console.print("[dim]/help lists commands, Ctrl-D leaves.[/dim]")
    for line in _lines(console):
        if not conversation.read(line):
            return


def _lines(console: Console) -> Iterator[str]:
    """What the user types, line by line; Ctrl-C at the prompt drops the line."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # with it, input() edits lines and remembers them
    while True:
        try:
            yield input(SIGN)
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print("\n[dim]Ctrl-D or /quit leaves.[/dim]")


class Conversation:
    """The messages so far, and what answers the next one.

    The base has messages of its own: in those of the adapted model, it would imitate the adapter.
    Without a chat template, the conversation is one text that each line and each answer continue.
    """

    def __init__(
        self,
        reft_model: ReftModel,
        tokenizer: Any,
        console: Console,
        *,
        decoding: Decoding = GREEDY,
    ) -> None:
        self._model, self._tokenizer, self._console = reft_model, tokenizer, console
        self._decoding = decoding
        self.is_on = True
        self._messages: dict[bool, list[dict[str, str]]] = {True: [], False: []}  # by `is_on`
        self._scale: float | None = None  # the model's
        self._template = decoding.template_or("chat")
        if self._template != "chat":
            self._say("Each line is a prompt of its own, in the template of the run.")
        elif tokenizer.chat_template is None:
            self._say("The tokenizer has no chat template: the model continues each line.")

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages of who answers next, the adapted model or the base."""
        return self._messages[self.is_on]

    def read(self, line: str) -> bool:
        """Obey a command or answer a message; False where the user leaves."""
        line = line.strip()
        if line.startswith("/"):
            name, _, rest = line.partition(" ")
            self._obey(name, rest.strip())
            return name != "/quit"
        if line:
            self._answer(line)
        return True

    # -- answers ---------------------------------------------------------------------------------

    def _answer(self, text: str) -> None:
        try:
            tokens, room = self._prompt([*self.messages, {"role": "user", "content": text}])
        except ValueError as error:
            self._say(f"not answered: {error}")
            return
        printer = _Printer(self._tokenizer, self._console)
        tokens = tokens.to(self._model.device)
        arguments = generate_arguments(self._decoding, self._tokenizer, self._model)
        arguments["max_new_tokens"] = room
        with contextlib.ExitStack() as stack:
            stack.callback(printer.end)
            stack.enter_context(contextlib.suppress(KeyboardInterrupt))
            stack.enter_context(self._model.using(scale=self._scale))
            if not self.is_on:
                stack.enter_context(self._model.disabled())
            self._model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                streamer=printer,
                **arguments,
            )
        self.messages.append({"role": "assistant", "content": printer.text})

    def _prompt(self, messages: list[dict[str, str]]) -> tuple[Tensor, int]:
        """Token ids [1, length] of the conversation, and how many tokens the answer may have.

        The oldest messages are dropped where they leave no room for the answer.
        """
        limit = smallest_limit(self._tokenizer, self._model, None)
        room = new_tokens(self._decoding, self._tokenizer, self._model)
        if limit is not None:
            room = min(room, limit // 2)
        for start in range(0, len(messages), 2):
            tokens = self._tokens(messages[start:])
            if limit is None or len(tokens) + room <= limit:
                break
        else:
            raise ValueError(
                f"the message has {len(tokens)} tokens, but the model's context has {limit}, of "
                f"which {room} are kept for the answer"
            )
        if start:
            self._say(f"The {start} oldest messages no longer fit into {limit} tokens.")
        self._messages[self.is_on] = messages[start:]
        return torch.tensor([tokens]), room

    def _tokens(self, messages: list[dict[str, str]]) -> list[int]:
        if self._template != "chat":
            return prompt_tokens(self._tokenizer, fill(self._template, messages[-1]["content"], {}))
        if self._decoding.system:
            messages = [{"role": "system", "content": self._decoding.system}, *messages]
        if self._tokenizer.chat_template is not None:
            return prompt_tokens(self._tokenizer, messages)
        return prompt_tokens(self._tokenizer, "\n".join(m["content"] for m in messages))

    # -- commands --------------------------------------------------------------------------------

    def _obey(self, name: str, rest: str) -> None:
        match name:
            case "/off":
                self.is_on = False
                self._say(f"The base answers, without the adapter{self._separately()}.")
            case "/on":
                self.is_on = True
                self._say(f"The adapted model answers{self._separately()}.")
            case "/scale":
                try:
                    with self._model.using(scale=float(rest)):
                        self._scale = self._model.scale
                    self._say(f"Edits are multiplied by {self._scale:g}.")
                except ValueError:
                    self._say(f"/scale {rest}: expected a number such as 0.5; 1 is as trained")
            case "/reset":
                self._messages = {True: [], False: []}
                self._say("The conversation starts again.")
            case "/system":
                self._decoding = replace(self._decoding, system=rest or None)
                text = "The system message is set." if rest else "There is no system message now."
                self._say(text)
            case "/help":
                for command, what in COMMANDS.items():
                    self._say(f"{command:<9}{what}")
            case _ if name not in COMMANDS:
                self._say(f"unknown command {name}; {nearest(name, COMMANDS)}")

    def _separately(self) -> str:
        """What a change of who answers does to the conversation, if there is one."""
        if self._template != "chat" or not any(self._messages.values()):
            return ""
        return ", from where it stopped" if self.messages else ", and has not read the conversation"

    def _say(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False, soft_wrap=True)


class _Printer(TextStreamer):
    """Prints an answer as it is written, and keeps it."""

    def __init__(self, tokenizer: Any, console: Console) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._console = console
        self._has_ended = False
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._has_ended:  # `generate` ends it, unless it was interrupted
            return
        self._has_ended = stream_end
        self.text += text
        self._console.print(text, end="\n" if stream_end else "", markup=False, soft_wrap=True)
