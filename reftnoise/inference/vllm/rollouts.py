"""Answers of a running vLLM for TRL's GRPOTrainer, which trains the edits here.

vLLM keeps the base. After each step of the optimizer, the units are written as an adapter of some
kilobytes, which the server loads under a name of this step. So an answer is sampled with the very
edits that it trains, and no states of older ones are in the prefix cache.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any

from typing_extensions import Self

from ...data.conversations import Messages
from ...model import ReftModel
from .client import VllmClient


@dataclass(frozen=True)
class _Version:
    """An adapter in the server: its name, and what tells its weights from others."""

    name: str
    state: tuple[tuple[int, int], ...]


def _state_of(model: ReftModel) -> tuple[tuple[int, int], ...]:
    """Which tensors a model's units have, and how often each was written to."""
    return tuple((id(tensor), tensor._version) for tensor in model.interventions.parameters())


class VllmRollouts:
    """A `rollout_func` of `GRPOTrainer`: completions, and their log-probabilities, from vLLM.

    ```python
    with VllmRollouts("http://localhost:8000", "versions", name="run-1") as rollouts:
        GRPOTrainer(reft_model, ..., rollout_func=rollouts).train()
    ```

    The server has been started with the base that is trained here and our plugin (the guide on
    serving has the command), and can read `directory`. Several runs can share it under different
    names. Temperature, `top_p`, `top_k`, `min_p`, `repetition_penalty` and `generation_kwargs` are
    those of the trainer's arguments. Seeds are drawn from the trainer's seed, the step and the
    process. At a temperature other than 1, log-probabilities are the trainer's only if the server
    has `--logprobs-mode processed_logprobs`.

    With several processes, each asks for its own prompts, and the first one writes the adapter.

    Args:
        server: address of the server, with or without `/v1`.
        directory: folder for the adapter of the current step.
        name: prefix of the adapter's name in the server.
        api_key: key that the server asks for.
        timeout: greatest number of seconds that an answer may take.

    Raises:
        ValueError: the address is none of http.
    """

    def __init__(
        self,
        server: str,
        directory: str | Path,
        *,
        name: str = "policy",
        api_key: str | None = None,
        timeout: float = 600.0,
    ) -> None:
        self.directory = Path(directory).resolve()
        self.name = name
        self.sync_seconds = 0.0
        """Time spent in writing adapters, loading and unloading them."""
        self.sampling_seconds = 0.0
        """Time spent in waiting for answers."""
        self._client = VllmClient(server, api_key=api_key, timeout=timeout)
        self._loaded: _Version | None = None
        self._calls = 0
        self._is_main = False

    def __call__(self, prompts: Sequence[str | Messages], trainer: Any) -> dict[str, list[Any]]:
        """One completion for each prompt, equal ones included, as TRL asks for them.

        Raises:
            ConnectionError: there is no such server, or it was too slow.
            ValueError: the server refuses the adapter or a request, the trained model is no
                `ReftModel`, or the trainer gives its prompts tools.
        """
        started = time.monotonic()
        self._load(trainer)
        loaded = time.monotonic()
        tokens = [_tokens(trainer, prompt) for prompt in prompts]
        runs = [(ids, len(list(equal))) for ids, equal in groupby(tokens)]
        process = trainer.accelerator.process_index
        step = trainer.state.global_step
        draws = Random(f"{trainer.args.seed} {step} {self._calls} {process}")
        self._calls += 1
        bodies = [
            self._body(trainer.args, ids, count, draws.getrandbits(31)) for ids, count in runs
        ]
        answers = self._client.complete(bodies)
        choices = [choice for answer in answers for choice in answer["choices"]]
        self.sync_seconds += loaded - started
        self.sampling_seconds += time.monotonic() - loaded
        return {
            "prompt_ids": tokens,
            "completion_ids": [choice["token_ids"] for choice in choices],
            "logprobs": [choice["logprobs"]["token_logprobs"] for choice in choices],
        }

    def close(self) -> None:
        """Take the last step's adapter out of the server, and remove its files."""
        if self._loaded is not None and self._is_main:
            loaded, self._loaded = self._loaded, None
            self._unload(loaded.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except (ConnectionError, ValueError):
            if error is None:  # else the error that ended the training says more
                raise

    def _load(self, trainer: Any) -> None:
        """Let the server have the units as they are now, and forget earlier ones."""
        accelerator = trainer.accelerator
        model = accelerator.unwrap_model(trainer.model)
        if not isinstance(model, ReftModel):
            raise ValueError(f"model {type(model).__name__}: expected a ReftModel")
        # Steps of another training have the same numbers.
        version = _Version(f"{self.name}-{trainer.state.global_step}", _state_of(model))
        if version == self._loaded:
            return
        self._is_main = accelerator.is_main_process
        if self._is_main:
            place = self.directory / version.name
            model.save_pretrained(place)
            # A run that was killed may have left its adapter of this step in the server.
            self._client.load(place.name, place)
            if self._loaded is not None and self._loaded.name != version.name:
                self._unload(self._loaded.name)
        accelerator.wait_for_everyone()
        self._loaded, self._calls = version, 0

    def _unload(self, name: str) -> None:
        self._client.unload(name)
        shutil.rmtree(self.directory / name)

    def _body(self, args: Any, ids: list[int], count: int, seed: int) -> dict[str, Any]:
        """A request for `count` answers to a prompt, drawn as the trainer's arguments say."""
        assert self._loaded is not None
        limits = {"top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p}
        return {
            "model": self._loaded.name,
            "prompt": ids,
            "n": count,
            "seed": seed,
            "max_tokens": args.max_completion_length,
            "temperature": args.temperature,
            "repetition_penalty": args.repetition_penalty,
            **{name: limit for name, limit in limits.items() if limit is not None},
            **(args.generation_kwargs or {}),
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
        }


def _tokens(trainer: Any, prompt: str | Messages) -> list[int]:
    """A prompt's tokens, as TRL makes them where it generates itself."""
    tokenizer = trainer.processing_class
    if getattr(trainer, "tools", None):
        raise ValueError("tools: prompts with tools are not sampled here")
    if isinstance(prompt, str):
        encoded = tokenizer(text=prompt)
    else:
        variables = trainer.chat_template_kwargs
        encoded = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **variables
        )
    ids: list[int] = encoded["input_ids"]
    return ids
