"""lm-evaluation-harness: a `ReftModel` as the model of its tasks.

`HFLM(pretrained=reft_model)` scores a context and its continuation as one input, whose end is then
taken for the prompt's end, so edits such as those of `l1` land on the continuation. `ReftLM` tells
the model where each context ends.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .._util.errors import nearest
from ..model import ReftModel
from .likelihood import next_token_log_probs, rows_alike, what_is_read

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
"""The strings, if the harness caches by them; the tokens of the context; of the continuation."""


class ReftLM(HFLM):
    """The harness' transformers model, for a `ReftModel`: a request's context is its prompt.

    Args:
        reft_model: put into evaluation mode.
        tokenizer: the base's.
        batch_size: rows per pass; "auto" tries what fits, once, and "auto:N" N times on the way
            from long to short requests.
        max_batch_size: where "auto" begins.
        max_length: tokens; longer requests lose the beginning of their context. By default the
            base's.
        truncation: whether the tokenizer truncates what `generate_until` gets.
        softmax_dtype: of the log-probabilities; by default that of the logits.
        mixed_precision_dtype: autocast to it.
        add_bos_token: by default as the tokenizer does.
        prefix_token_id: the context of requests without one; by default the tokenizer's
            beginning, or else end, of text.
        enable_thinking: for the chat template.
        think_end_token: only what comes after it counts as generated.
        chat_template_args: further arguments of the chat template.

    Raises:
        ValueError: the model is not a `ReftModel`.
    """

    def __init__(
        self,
        reft_model: ReftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        max_length: int | None = None,
        truncation: bool = False,
        softmax_dtype: str | torch.dtype | None = None,
        mixed_precision_dtype: str | torch.dtype | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | int | None = None,
        chat_template_args: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(reft_model, ReftModel):
            raise ValueError(f"reft_model: expected a ReftModel, got {type(reft_model).__name__}")
        super().__init__(
            pretrained=reft_model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
            truncation=truncation,
            softmax_dtype=softmax_dtype,
            mixed_precision_dtype=mixed_precision_dtype,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
            enable_thinking=enable_thinking,
            think_end_token=think_end_token,
            chat_template_args=chat_template_args,
        )

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
        sharing = rows_alike([request[1:] for request in requests])
        rows = [requests[indices[0]] for indices in sharing.values()]
        rows.sort(key=lambda row: (-len(row[1] + row[2]), row[1:]))
        find_size = None
        if self.batch_size == "auto" and not override_bs:
            self.batch_sizes.clear()  # found for other requests
            find_size = self._batch_scheduler
        size = override_bs or 0 if self.batch_size == "auto" else self.batch_size
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        is_silent = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=is_silent, desc="loglikelihood") as progress:
            for chunk in Collator.get_chunks(rows, n=size, fn=find_size):
                for row, log_probs in zip(chunk, self._log_probs(chunk), strict=True):
                    greedy = log_probs.argmax(-1)
                    for index in sharing[what_is_read(row[1:])]:
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
        """Of the vocabulary, [continuation, vocabulary] for each row, before each token."""
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

    Args:
        model: a `ReftModel`, or a causal language model of transformers.
        tokenizer: of the base.
        tasks: names of tasks or groups, such as `ifeval`.
        limit: rows of each task; all by default.
        batch_size: rows per forward pass, or "auto".
        include_path: folder of tasks of one's own, which are used instead of the harness'.

    Raises:
        ValueError: a task that the harness does not have.
    """
    manager = _all_tasks(include_path)
    for name in tasks:
        if name not in manager.all_tasks:
            hint = nearest(name, manager.all_tasks, "`lm-eval ls tasks` lists them")
            raise ValueError(f"lm_eval task {name!r} is not the harness'; {hint}")
    is_wrapped = isinstance(model, ReftModel)
    lm = (ReftLM if is_wrapped else HFLM)(model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(
        model=lm,
        tasks=list(tasks),
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
    )
    return {name: _numbers(result) for name, result in found["results"].items()}


@functools.cache
def _all_tasks(include_path: str | None) -> TaskManager:
    """Those of the harness, which take seconds to read, or of a folder."""
    return TaskManager(include_path=include_path, include_defaults=include_path is None)


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Its metrics, named `acc` or, where a filter reads answers, `exact_match,strict-match`."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in result.items()
        if isinstance(value, int | float) and "_stderr" not in name and "," in name
    }
