"""Answers of a running server of the OpenAI API, such as vLLM with our plugin."""

from collections.abc import Iterator, Mapping
from queue import Empty, Queue
from threading import Event, Thread
from typing import Any

import openai

from ...data.templates import fill
from ...data.tokenization import Messages
from ..vllm import SCALE
from .asking import Answer, Answerer, Question

_SECONDS = 5.0
_SILENCE = 0.5
"""Seconds after which what has been written so far is given again."""


class Server(Answerer):
    """Models of a server. Of what they edit, and how far, it tells nothing.

    Args:
        address: such as http://localhost:8000/v1.

    Raises:
        ConnectionError: there is no such server.
    """

    def __init__(self, address: str) -> None:
        self.title = address
        self._client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        try:
            models = list(self._client.models.list(timeout=_SECONDS))
        except openai.APIError as error:
            raise ConnectionError(
                f"{address}: no server of the OpenAI API there ({error})"
            ) from None
        self.names = [model.id for model in models]
        # vLLM's cards tell of an adapter which base it is for.
        self.scaled = [model.id for model in models if getattr(model, "parent", None)]

    def answers(self, question: Question) -> Iterator[Mapping[str, Answer]]:
        """All answers as they grow; see `Answerer`."""
        prompt = fill(question.decoding.template_or("chat"), question.prompt, {})
        coming: Queue[tuple[str, str | Exception | None]] = Queue()
        stop = Event()

        def read(name: str) -> None:
            try:
                for part in self._parts(name, prompt, question):
                    if stop.is_set():
                        return
                    coming.put((name, part))
                coming.put((name, None))
            except Exception as error:  # whatever it is: who waits for the answer is told
                coming.put((name, ValueError(f"{name}: {error}")))

        for name in question.names:
            Thread(target=read, args=(name,), daemon=True).start()
        texts, running = dict.fromkeys(question.names, ""), set(question.names)
        try:
            while running:
                try:
                    name, part = coming.get(timeout=_SILENCE)
                except Empty:  # who no longer wants the answer can stop only between parts of it
                    name, part = next(iter(running)), ""
                if isinstance(part, Exception):
                    raise part
                if part is None:
                    running.remove(name)
                else:
                    texts[name] += part
                    yield {name: Answer(text) for name, text in texts.items()}
        finally:
            stop.set()

    def _parts(self, name: str, prompt: str | Messages, question: Question) -> Iterator[str]:
        decoding = question.decoding
        arguments: dict[str, Any] = {
            "model": name,
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "seed": decoding.seed,
            "stream": True,
        }
        scale = question.scales.get(name, 1.0)
        if scale != 1.0:
            arguments["extra_body"] = {"vllm_xargs": {SCALE: scale}}
        if isinstance(prompt, str):
            for chunk in self._client.completions.create(prompt=prompt, **arguments):
                yield from (choice.text for choice in chunk.choices if choice.text)
        else:
            for chunk in self._client.chat.completions.create(messages=prompt, **arguments):
                yield from (c.delta.content for c in chunk.choices if c.delta.content)
