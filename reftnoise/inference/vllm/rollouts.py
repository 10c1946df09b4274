"""Answers of a running vLLM for TRL's GRPOTrainer, which trains the edits here.

vLLM keeps the base. After each step of the optimizer, the units are written as an adapter of some
kilobytes, which the server loads under a name of this step. So an answer is sampled with the very
edits that it trains, and no states of older ones are in the prefix cache.
"""

import shutil
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any

from typing_extensions import Self

from ...data.conversations import Messages
from ...model import ReftModel
from .client import VllmClient


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
        timeout: greatest number of seconds that an answer may take.
    """

    def __init__(
        self, server: str, directory: str | Path, *, name: str = "policy", timeout: float = 600.0
    ) -> None:
        self.directory = Path(directory).resolve()
        self.name = name
        self.sync_seconds = 0.0
        """Time spent in writing adapters, loading and unloading them."""
        self.sampling_seconds = 0.0
        """Time spent in waiting for answers."""
        self._client = VllmClient(server, timeout=timeout)
        self._step: int | None = None
        self._calls = 0
        self._is_main = False

    def __call__(self, prompts: Sequence[str | Messages], trainer: Any) -> dict[str, list[Any]]:
        """One completion for each prompt, equal ones included, as TRL asks for them.

        Raises:
            ConnectionError: there is no such server, or it was too slow.
            RuntimeError: the server refuses the adapter or a request.
            ValueError: the trained model is no `ReftModel`.
        """
        started = time.monotonic()
        self._load(trainer)
        loaded = time.monotonic()
        tokens = [_tokens(trainer, prompt) for prompt in prompts]
        runs = [(ids, len(list(equal))) for ids, equal in groupby(tokens)]
        process = trainer.accelerator.process_index
        draws = Random(f"{trainer.args.seed} {self._step} {self._calls} {process}")
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
        try:
            if self._step is not None and self._is_main:
                self._unload(self._step)
        finally:
            self._step = None
            self._client.close()

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
        except (ConnectionError, RuntimeError):
            if error is None:  # else the error that ended the training says more
                raise

    def _load(self, trainer: Any) -> None:
        """Let the server have the units of this step, and forget those of an earlier one."""
        step: int = trainer.state.global_step
        if step == self._step:
            return
        accelerator = trainer.accelerator
        self._is_main = accelerator.is_main_process
        if self._is_main:
            model = accelerator.unwrap_model(trainer.model)
            if not isinstance(model, ReftModel):
                raise ValueError(f"model {type(model).__name__}: expected a ReftModel")
            place = self.directory / self._version(step)
            model.save_pretrained(place)
            # A run that was killed may have left its adapter of this step in the server.
            self._client.load(place.name, place)
            if self._step is not None:
                self._unload(self._step)
        accelerator.wait_for_everyone()
        self._step, self._calls = step, 0

    def _unload(self, step: int) -> None:
        name = self._version(step)
        self._client.unload(name)
        shutil.rmtree(self.directory / name)

    def _version(self, step: int) -> str:
        return f"{self.name}-{step}"

    def _body(self, args: Any, ids: list[int], count: int, seed: int) -> dict[str, Any]:
        """A request for `count` answers to a prompt, drawn as the trainer's arguments say."""
        assert self._step is not None
        limits = {"top_p": args.top_p, "top_k": args.top_k, "min_p": args.min_p}
        return {
            "model": self._version(self._step),
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
    if isinstance(prompt, str):
        encoded = tokenizer(text=prompt)
    else:
        variables = trainer.chat_template_kwargs
        encoded = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **variables
        )
    ids: list[int] = encoded["input_ids"]
    return ids
