"""lm-evaluation-harness: a `ReftModel` as the model of its tasks.

`HFLM(pretrained=reft_model)` scores a context and its continuation as one input and takes its end
for the prompt's end, so edits such as those of `l1` land on the continuation. `ReftLM` passes the
lengths of the contexts.
"""

import functools
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .._util.errors import nearest
from .._util.files import local_path
from ..model import ReftModel
from .likelihood import grouped, next_token_log_probs

try:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import Collator
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError(
        f"lm-evaluation-harness: pip install 'reftnoise[lm-eval]' ({error})"
    ) from error

logger = logging.getLogger(__name__)

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""The strings, if the harness caches by them; tokens of the context and of the continuation."""


class ReftLM(HFLM):
    """The harness' transformers model, for a `ReftModel`: a request's context is its prompt.

    Args:
        reft_model: adapted model, which is put into evaluation mode.
        tokenizer: tokenizer of the base.
        settings: further arguments of `HFLM`, such as `batch_size` (a number, or "auto"),
            `max_length` and `think_end_token`.

    Raises:
        ValueError: the model is not a `ReftModel`, or `HFLM` has no such argument.
    """

    def __init__(
        self, reft_model: ReftModel, tokenizer: PreTrainedTokenizerBase, **settings: Any
    ) -> None:
        if not isinstance(reft_model, ReftModel):
            raise ValueError(f"reft_model: expected a ReftModel, got {type(reft_model).__name__}")
        known = inspect.signature(HFLM).parameters
        for name in settings:  # HFLM ignores names that it does not know
            if name not in known:
                raise ValueError(f"ReftLM has no argument {name!r}; {nearest(name, known)}")
        super().__init__(pretrained=reft_model, tokenizer=tokenizer, **settings)

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Each continuation's log-probability, and whether greedy decoding would give it."""
        if self.backend == "seq2seq":  # an encoder-decoder model reads the context by itself
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        self._check(requests)
        groups = grouped([request[1:] for request in requests])
        rows, remaining = [requests[group[0]] for group in groups], iter(groups)
        find_size = None
        if self.batch_size == "auto" and not override_bs:
            self.batch_sizes.clear()  # those of other requests
            find_size = self._batch_scheduler
        size = override_bs or 0 if self.batch_size == "auto" else self.batch_size
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        is_silent = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=is_silent, desc="loglikelihood") as progress:
            for batch in Collator.get_chunks(rows, n=size, fn=find_size):
                for log_probs, group in zip(self._log_probs(batch), remaining, strict=False):
                    greedy = log_probs.argmax(-1)
                    for index in group:
                        strings, _, continuation = requests[index]
                        tokens = torch.tensor(continuation, device=log_probs.device)
                        total = log_probs.gather(1, tokens[:, None]).sum()
                        answers[index] = (float(total), torch.equal(greedy, tokens))
                        if strings is not None:
                            self.cache_hook.add_partial("loglikelihood", strings, answers[index])
                        progress.update()
        return answers

    def _check(self, requests: list[Request]) -> None:
        for strings, context, continuation in requests:
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"request {strings}: {len(context)} tokens of context and {len(continuation)} "
                    f"of continuation; expected some of each, and at most {self.max_length} (the "
                    "max_length) of continuation"
                )
        long = sum(len(request[1] + request[2]) > self.max_length + 1 for request in requests)
        if long:
            logger.warning(
                "%d of %d requests exceed max_length %d: their contexts lose the beginning",
                long,
                len(requests),
                self.max_length,
            )

    def _log_probs(self, rows: list[Request]) -> list[Tensor]:
        """log p of all tokens before each of the continuation, [tokens, vocabulary] per row."""
        with torch.autocast(
            self.device.type,
            self.mixed_precision_dtype,
            enabled=self.mixed_precision_dtype is not None,
        ):
            return next_token_log_probs(
                self.model,
                [request[1:] for request in rows],
                limit=self.max_length,
                dtype=self.softmax_dtype,
            )


def evaluate_with_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int | str = 16,
    *,
    include_path: str | None = None,
) -> dict[str, dict[str, float]]:
    """Scores of lm-evaluation-harness: those of each task and group, under the harness' names.

    Each task has all its rows, or as many as the limit. Tasks in the folder `include_path` replace
    those of the harness.

    Raises:
        ValueError: the harness has no such task.
    """
    manager = _all_tasks(include_path)
    for name in tasks:
        if name not in manager.all_tasks:
            hint = nearest(name, manager.all_tasks, "`lm-eval ls tasks` lists them")
            raise ValueError(f"lm_eval task {name!r} is not the harness'; {hint}")
    is_adapted = isinstance(model, ReftModel)
    lm = (ReftLM if is_adapted else HFLM)(model, tokenizer=tokenizer, batch_size=batch_size)
    outcome = simple_evaluate(
        model=lm,
        tasks=list(tasks),
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {name: _numbers(result) for name, result in outcome["results"].items()}


@functools.cache
def _all_tasks(include_path: str | None) -> TaskManager:
    """The tasks of the harness, which take seconds to read, or those of a folder."""
    folder = None if include_path is None else str(local_path(include_path, "include_path"))
    return TaskManager(include_path=folder, include_defaults=include_path is None)


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics, named `acc` or, where a filter reads answers, `exact_match,strict-match`."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in result.items()
        if isinstance(value, int | float) and "_stderr" not in name and "," in name
    }
