"""Completions of a running server of the OpenAI API, by what it offers; without torch.

Servers differ in what they take and tell. Prompts are token ids where a server takes these, or else
texts; what was written is ids where it gives these, or else its text. vLLM, llama.cpp's server and
SGLang give log-probabilities of what they write, and some of them those of prompts, by `echo`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..._util.errors import nearest
from ..api import Api, ServerRefusalError

_TOKEN = "token_id:"
_MORE = {"return_token_ids": True, "return_tokens_as_token_ids": True, "repetition_penalty": 1.0}
"""Fields by which vLLM gives ids, and does not take penalties from the model's own files."""


@dataclass(frozen=True)
class Completion:
    """What a server wrote after a prompt, greedily.

    Args:
        tokens: ids of what it wrote.
        log_probs: log-probabilities of these tokens; None where the server gives none.
        prompt_log_probs: those of the prompt's tokens but the first; None where it gives none.
        prompt_length: number of tokens that the server read, if it says so.
        has_stopped: whether the answer ended before its length, after these tokens.
    """

    tokens: list[int]
    log_probs: list[float] | None
    prompt_log_probs: list[float] | None
    prompt_length: int | None
    has_stopped: bool


@dataclass(frozen=True)
class _Form:
    """A form of requests: which of its parts a server takes."""

    takes_ids: bool
    more: Mapping[str, Any]
    has_log_probs: bool = True


_FORMS = [
    _Form(True, _MORE),
    _Form(True, {}),
    _Form(False, _MORE),
    _Form(False, {}),
    _Form(False, {}, has_log_probs=False),
]
"""From the one that says most."""


class CompletionServer:
    """A server of the OpenAI API, asked for greedy completions of tokens.

    Args:
        address: address of the API, with or without `/v1`.
        tokenizer: tokenizer of the models there.
        api_key: key that the server asks for.
        timeout: seconds that an answer may take.

    Raises:
        ConnectionError: there is no such server.
        ValueError: the address is none of a server, or the server does not list its models.
    """

    def __init__(
        self, address: str, tokenizer: Any, *, api_key: str | None = None, timeout: float = 600.0
    ) -> None:
        self._api = Api(address, api_key=api_key, timeout=timeout)
        self._tokenizer = tokenizer
        self._form: _Form | None = None
        self._echoes = False
        try:
            self.models: list[dict[str, Any]] = list(self._api.ask("models")["data"])
            self.names = [str(model["id"]) for model in self.models]
        except (KeyError, TypeError) as error:
            raise ValueError(f"server {self.address}/models: no list of models ({error})") from None
        if not self.names:
            raise ValueError(f"server {self.address}/models: it serves no model")

    @property
    def address(self) -> str:
        """The address of its API."""
        return self._api.address

    def expect_name(self, name: str) -> None:
        """Raise a ValueError for a model that is not listed."""
        if name not in self.names:
            raise ValueError(
                f"served_name {name!r}: not a model of the server; {nearest(name, self.names)}"
            )

    def longest(self) -> int | None:
        """The tokens that a prompt and its answer may have, where the server says so, as vLLM."""
        lengths = [model.get("max_model_len") for model in self.models]
        return min((n for n in lengths if isinstance(n, int)), default=None)

    def offers(self) -> dict[str, bool]:
        """What is compared, by what the server takes and gives."""
        form = self._form or _FORMS[0]
        return {
            "token_ids": form.takes_ids,
            "log_probs": form.has_log_probs,
            "prompt_log_probs": self._echoes,
        }

    def look(self, name: str, prompt: Sequence[int]) -> None:
        """Find out what the server takes and gives, by requests that cost little.

        Raises:
            ValueError: the server takes no completions, or gives no log-probabilities and no text.
        """
        for form in _FORMS:
            self._form = form
            try:
                completion = self.complete(name, prompt, 2)
                if form.has_log_probs and completion.log_probs is None:
                    continue
                break
            except ServerRefusalError:
                if form is _FORMS[-1]:
                    raise
        try:
            self._echoes = self.complete(name, prompt, 1, echo=True).prompt_log_probs is not None
        except ServerRefusalError:
            self._echoes = False

    def can_send(self, prompt: Sequence[int]) -> bool:
        """Whether the server reads these tokens: a text may be other tokens."""
        return self.offers()["token_ids"] or self._text(prompt) is not None

    def complete(
        self, name: str, prompt: Sequence[int], count: int, *, echo: bool = False
    ) -> Completion:
        """What a model writes greedily after a prompt, at most so many tokens.

        Args:
            name: name of a model on the server.
            prompt: tokens of the prompt.
            count: number of new tokens.
            echo: whether log-probabilities of the prompt are asked for, too.

        Raises:
            ValueError: the server refuses the request, or its answer cannot be read.
            ConnectionError: it does not answer.
        """
        form = self._form or _FORMS[0]
        asked = list(prompt) if form.takes_ids else self._text(prompt)
        body = {"model": name, "prompt": asked, "max_tokens": count, "temperature": 0, **form.more}
        if form.has_log_probs:
            body["logprobs"] = 1
        if echo:
            body["echo"] = True
        answer = self._api.ask("completions", body)
        try:
            return self._read(answer, prompt, count, echo=echo)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"server {self.address}/completions: an answer that cannot be read: "
                f"{type(error).__name__} {error}"
            ) from None

    def _read(self, answer: Any, prompt: Sequence[int], count: int, *, echo: bool) -> Completion:
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        given = choice.get("logprobs") or {}
        if isinstance(given.get("content"), list):  # as of chats, which llama.cpp gives here, too
            names: list[Any] = [one.get("id", one.get("token")) for one in given["content"]]
            log_probs: Any = [one["logprob"] for one in given["content"]]
        else:
            names, log_probs = given.get("tokens") or [], given.get("token_logprobs")
        is_echoed = echo and log_probs is not None and len(log_probs) > len(prompt)
        before = len(prompt) if is_echoed else 0
        names = names[before:]
        tokens, is_whole = choice.get("token_ids"), True
        if tokens is None or (is_echoed and len(tokens) != len(names)):
            tokens = _ids(names) if names else None
        if tokens is None:
            text = choice["text"].removeprefix(self._text(prompt) or "") if echo else choice["text"]
            tokens = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            if log_probs is not None:
                same = self._same(tokens, names)
                # The token that ends a text is named, and not shown.
                is_whole = same == len(tokens) and same >= len(names) - 1
                tokens = tokens[:same]
        written = len(log_probs) - before if log_probs is not None else len(tokens)
        is_stopped = choice.get("finish_reason") == "stop" or written < count
        read = usage.get("prompt_tokens")
        return Completion(
            tokens=tokens,
            log_probs=None if log_probs is None else _numbers(log_probs[before:]),
            prompt_log_probs=_numbers(log_probs[1:before]) if is_echoed else None,
            prompt_length=read if isinstance(read, int) else None,
            has_stopped=is_stopped and is_whole,
        )

    def _same(self, tokens: Sequence[int], names: Sequence[Any]) -> int:
        """How many first tokens have the server's names: it may have split the rest otherwise."""
        pairs = enumerate(zip(tokens, names, strict=False))
        shared = min(len(tokens), len(names))
        return next((i for i, (token, name) in pairs if not self._is_named(token, name)), shared)

    def _is_named(self, token: int, name: Any) -> bool:
        """Whether a token has this name: its text, perhaps without a blank, or its own form."""
        own = self._tokenizer.convert_ids_to_tokens(token)
        return name == own or self._tokenizer.decode([token]).strip() == str(name).strip()

    def _text(self, prompt: Sequence[int]) -> str | None:
        """The text that servers read as these tokens; None if there is none."""
        for tokens in (prompt, prompt[1:]):  # servers put the beginning-of-text token first
            text = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
            if text and self._tokenizer(text)["input_ids"] == list(prompt):
                return str(text)
        return None


def _ids(names: Sequence[Any]) -> list[int] | None:
    """The ids of tokens that are named by them; None for other names."""
    if all(type(name) is int for name in names):
        return list(names)
    if all(isinstance(name, str) and name.startswith(_TOKEN) for name in names):
        return [int(name[len(_TOKEN) :]) for name in names]
    return None


def _numbers(log_probs: Sequence[Any]) -> list[float]:
    """Log-probabilities, with NaN for what is none."""
    return [float(value) if isinstance(value, int | float) else math.nan for value in log_probs]
