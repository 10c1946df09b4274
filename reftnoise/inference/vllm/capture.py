"""Hidden states of prompts, which vLLM's workers write while they serve.

The server is started with a folder for them, which clients cannot choose:
`--additional-config '{"reft": ["block_output"], "reft_capture": "FOLDER"}'`. A request with
`{"vllm_xargs": {"reft_capture": "NAME"}}` then writes `FOLDER/NAME.safetensors`, which is
complete before the answer comes:

- `states`: hidden states after each block, with the edits of the request's adapter, in the model's
  dtype: [layers, positions, hidden];
- `positions`: which tokens of the prompt these are, from 0: [positions];
- `prompt_length`: number of the prompt's tokens.

`reft_capture_positions` are positions as in a config, by default `l1`. Tokens that are read are
computed, even where the prefix cache has them. A worker keeps the states of the step that runs,
and of prompts that are computed in several steps, until these are whole or aborted.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger

from ..._util.errors import brief
from ..._util.files import local_path, writing
from ...config.positions import Positions
from ...engine.layout import named_tokens
from . import CAPTURE, CAPTURE_POSITIONS, captured_file

_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_LATER_PROMPT = re.compile(r"cmpl-.*-[1-9][0-9]*")
"""Ids that the completions API gives to all prompts of a request but the first."""

_logger = init_logger(__name__)

Reader = Callable[[Tensor, Tensor | None], None]
"""Reads a block's output: the states, or two tensors whose sum they are."""


def folder_of(config: VllmConfig) -> Path | None:
    """The folder for captured states, by `--additional-config`; None if nothing is captured.

    Raises:
        ValueError: the folder is not a path, or other settings cannot be combined with it.
    """
    additional = config.additional_config
    named = additional.get(CAPTURE) if isinstance(additional, dict) else None
    if named is None:
        return None
    if "block_output" not in additional.get("reft", ()):
        raise ValueError(f"additional_config {CAPTURE}: expected 'block_output' in 'reft', too")
    if config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(f"additional_config {CAPTURE}: needs --pipeline-parallel-size 1")
    return local_path(named, f"additional_config {CAPTURE}").absolute()


def requested(params: Any) -> tuple[str, Positions] | None:
    """The name and the positions of what a request captures; None if it captures nothing.

    Raises:
        ValueError: the name has other characters, or the positions are not those of a prompt.
    """
    extra = getattr(params, "extra_args", None) or {}
    if CAPTURE not in extra:
        if CAPTURE_POSITIONS in extra:
            raise ValueError(f"{CAPTURE_POSITIONS}: expected {CAPTURE}, a name, with it")
        return None
    name = extra[CAPTURE]
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{CAPTURE} {brief(name)}: expected a name of at most 128 letters, digits, - and _"
        )
    positions = Positions.parse(extra.get(CAPTURE_POSITIONS, "l1"))
    if positions.decode:
        raise ValueError(
            f"{CAPTURE_POSITIONS} {positions.spec()!r}: expected positions of the prompt alone"
        )
    return name, positions


def _selected(positions: Positions, length: int) -> Int[Tensor, " positions"]:
    """Which of a prompt's tokens the positions name, from 0."""
    named = named_tokens(positions, torch.arange(length), torch.tensor(length))
    return named.nonzero().squeeze(1)


def _length(request: Any) -> int:
    """Tokens of a request's prompt, which may have embeddings instead."""
    ids = request.prompt_token_ids
    return len(request.prompt_embeds if ids is None else ids)


def prepare_capture(
    original: Callable[..., Any],
    processor: Any,
    request_id: str,
    prompt: Any,
    params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Refuse what cannot be captured, and let vLLM compute the captured tokens."""
    try:
        capture = requested(params)
        if capture is not None and folder_of(processor.vllm_config) is None:
            raise ValueError(f"{CAPTURE}: the server has no folder for it in --additional-config")
        if capture is not None and _LATER_PROMPT.fullmatch(request_id):
            raise ValueError(f"{CAPTURE}: expected one prompt in the request")
    except ValueError as error:
        raise VLLMValidationError(str(error)) from None
    request = original(processor, request_id, prompt, params, *args, **kwargs)
    if capture is not None:
        _, positions = capture
        length = _length(request)
        selected = _selected(positions, length).tolist()
        if not selected:
            raise VLLMValidationError(
                f"{CAPTURE_POSITIONS} {positions.spec()!r}: a prompt of {length} tokens has none "
                "of them"
            )
        if selected != [length - 1]:  # the last one is always computed, to predict what follows
            request.sampling_params.skip_reading_prefix_cache = True  # of a copy of the client's
    return request


# -- a worker ------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Capture:
    """What a request captures, until its prompt is whole."""

    name: str
    positions: Int[Tensor, " positions"]
    length: int
    read: int = 0
    """Positions that have been read, in order."""
    states: Float[Tensor, "layers positions hidden"] | None = None


@dataclass(frozen=True, eq=False)
class _Part:
    """The positions of a capture that a step computes: those from `start` to `end`."""

    request: str
    capture: _Capture
    start: int
    end: int
    is_last: bool
    """Whether the step computes the prompt's last token."""


class Captures:
    """The states of running requests that are captured, in one worker.

    Args:
        runner: vLLM's model runner.
        folder: folder that gets a file for each request.
        layers: number of the model's blocks.
    """

    def __init__(self, runner: Any, folder: Path, layers: int) -> None:
        self._runner, self._folder, self._layers = runner, folder, layers
        self._pending: dict[str, _Capture] = {}
        self._parts: list[_Part] = []
        self._rows = torch.empty(0, dtype=torch.long)
        self._states: dict[int, Tensor] = {}
        self._error: Exception | None = None
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def of(cls, runner: Any, layers: int) -> "Captures | None":
        """The captures of a worker; None without a folder, or if another worker writes."""
        folder = folder_of(runner.vllm_config)
        if folder is None or get_tensor_model_parallel_rank() > 0:
            return None
        return cls(runner, folder, layers)

    def __bool__(self) -> bool:
        return bool(self._pending)

    def held(self) -> int:
        """Bytes of the states of prompts that are not whole."""
        return sum(c.states.nbytes for c in self._pending.values() if c.states is not None)

    def follow(self, scheduled: Any) -> None:
        """Drop the captures of requests that have ended, and begin those of new ones."""
        for request in scheduled.finished_req_ids:
            self._pending.pop(request, None)
        for new in scheduled.scheduled_new_reqs:
            if (capture := requested(new.sampling_params)) is not None:
                name, positions = capture
                length = _length(new)
                selected = _selected(positions, length)
                self._pending[new.req_id] = _Capture(name, selected, length)

    def readers(self) -> list[Reader]:
        """A reader of each block's output in the next step; none if nothing in it is captured."""
        batch, starts = self._runner.input_batch, self._runner.query_start_loc.np
        self._parts, self._states, self._error = [], {}, None
        rows = []
        for request, capture in self._pending.items():
            index = batch.req_id_to_index.get(request)
            if index is None:  # it waits
                continue
            computed, first = int(batch.num_computed_tokens_cpu[index]), int(starts[index])
            end = computed + int(starts[index + 1]) - first
            bounds = torch.searchsorted(capture.positions, torch.tensor([computed, end]))
            part = _Part(request, capture, int(bounds[0]), int(bounds[1]), end >= capture.length)
            self._parts.append(part)
            rows.append(capture.positions[part.start : part.end] - computed + first)
        self._rows = torch.cat(rows).to(self._runner.device) if rows else self._rows[:0]
        if not len(self._rows):
            return []
        return [partial(self._read, layer) for layer in range(self._layers)]

    def _read(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        try:
            states = hidden[self._rows]
            self._states[layer] = states if residual is None else states + residual[self._rows]
        except Exception as error:  # which would end the engine for all requests
            self._error = error

    def finish(self, failed: list[str]) -> list[str]:
        """Write what is complete after a step, and return the requests whose captures failed.

        Args:
            failed: requests whose edits failed, for which nothing is written.
        """
        newly: list[str] = []
        try:
            if self._error is not None:
                raise self._error
            states = None
            if len(self._states) == self._layers:
                states = torch.stack([self._states[n] for n in range(self._layers)]).cpu()
        except Exception as error:
            self._log([part.request for part in self._parts], error)
            newly, self._parts = [part.request for part in self._parts], []
        first = 0
        for part in self._parts:
            count = part.end - part.start
            try:
                if states is not None and count:
                    self._keep(part, states[:, first : first + count])
                if part.is_last and part.request not in failed:
                    self._write(part.capture)
            except Exception as error:
                self._log([part.request], error)
                newly.append(part.request)
            first += count
            if part.is_last:
                del self._pending[part.request]
        for request in (*newly, *failed):
            self._pending.pop(request, None)
        self._parts, self._states = [], {}
        return newly

    def _keep(self, part: _Part, states: Float[Tensor, "layers positions hidden"]) -> None:
        capture = part.capture
        if part.start == 0 and part.end == len(capture.positions):
            capture.states = states.contiguous()
        else:
            if capture.states is None:
                shape = (len(states), len(capture.positions), states.shape[-1])
                capture.states = states.new_empty(shape)
            capture.states[:, part.start : part.end] = states
        # After a preemption, tokens are computed again, from any token on.
        if part.start <= capture.read:
            capture.read = max(capture.read, part.end)

    def _write(self, capture: _Capture) -> None:
        if capture.states is None or capture.read < len(capture.positions):
            raise RuntimeError(f"{CAPTURE} {capture.name!r}: vLLM has not computed all its tokens")
        tensors = {
            "states": capture.states,
            "positions": capture.positions,
            "prompt_length": torch.tensor(capture.length),
        }
        place = captured_file(self._folder, capture.name)
        scratch = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            with writing(place):
                save_file(tensors, scratch)
                os.replace(scratch, place)
        finally:
            scratch.unlink(missing_ok=True)

    def _log(self, requests: list[str], error: Exception) -> None:
        _logger.error("reftnoise: requests %s end with an error: %r", requests, error)
