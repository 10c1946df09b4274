"""Answers of a running server of the OpenAI API, such as vLLM with our plugin."""

from collections.abc import Iterator, Mapping
from contextvars import copy_context
from threading import Event, Thread
from time import sleep
from typing import Any

import openai

from ...data.conversations import Messages
from ...data.templates import fill
from ..vllm import SCALE
from .asking import Answer, Answerer, AnswerRequest

_TIMEOUT = 5.0
_INTERVAL = 0.05
"""Seconds between looks at what has been written."""


class Server(Answerer):
    """Models of a server, which does not say what they edit, or how far.

    Args:
        address: address of the API, such as http://localhost:8000/v1.

    Raises:
        ConnectionError: there is no such server.
    """

    def __init__(self, address: str) -> None:
        self.title = address
        self._client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        try:
            models = list(self._client.models.list(timeout=_TIMEOUT))
        except openai.APIError as error:
            raise ConnectionError(
                f"{address}: no server of the OpenAI API there ({error})"
            ) from None
        self.names = [model.id for model in models]
        # vLLM names the base of a model that is an adapter.
        self.scaled = [model.id for model in models if getattr(model, "parent", None)]

    def answers(self, request: AnswerRequest) -> Iterator[Mapping[str, Answer]]:
        """All answers as they grow, each read in a thread of its own."""
        prompt = fill(request.decoding.template_or("chat"), request.prompt, {})
        texts, errors, stop = dict.fromkeys(request.names, ""), list[ValueError](), Event()

        def read(name: str) -> None:
            try:
                for part in self._parts(name, prompt, request):
                    if stop.is_set():
                        return
                    texts[name] += part
            except Exception as error:  # of any kind: the page shows it
                errors.append(ValueError(f"{name}: {error}"))

        threads = [
            Thread(target=copy_context().run, args=(read, name), daemon=True)
            for name in request.names
        ]
        for thread in threads:
            thread.start()
        try:
            is_running = True
            while is_running:  # the reader can stop this, even if the server is silent
                sleep(_INTERVAL)
                is_running = any(thread.is_alive() for thread in threads)
                if errors:
                    raise errors[0]
                yield {name: Answer(text) for name, text in texts.items()}
        finally:
            stop.set()

    def _parts(self, name: str, prompt: str | Messages, request: AnswerRequest) -> Iterator[str]:
        decoding = request.decoding
        arguments: dict[str, Any] = {
            "model": name,
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "seed": decoding.seed,
            "stream": True,
        }
        scale = request.scales.get(name, 1.0)
        if scale != 1.0:
            arguments["extra_body"] = {"vllm_xargs": {SCALE: scale}}
        if isinstance(prompt, str):
            for event in self._client.completions.create(prompt=prompt, **arguments):
                yield from (choice.text for choice in event.choices if choice.text)
        else:
            for event in self._client.chat.completions.create(messages=prompt, **arguments):
                yield from (c.delta.content for c in event.choices if c.delta.content)
