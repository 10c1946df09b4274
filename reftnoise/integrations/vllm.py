"""Adapters in vLLM, served as vLLM serves LoRA: per request, on one base, with its own flags.

vLLM finds `register` by the entry point `vllm.general_plugins`, in each of its processes, and takes
a directory with a `reft_config.json` wherever it takes one of a LoRA:

- `vllm serve BASE --lora-modules emoji=runs/emoji/adapter`, where each adapter is a model's name;
- `POST /v1/load_lora_adapter`, with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`;
- `llm.generate(prompts, lora_request=LoRARequest("emoji", 1, "runs/emoji/adapter"))`.

`--enable-lora` is not needed, and cannot be combined. A request may scale its edits:
`{"vllm_xargs": {"reft_scale": 0.5}}`.

An adapter is known by the digest of its weights. The digest is part of the path that a request
carries, which vLLM's prefix cache takes into its keys, and of the adapter's number; so states that
one adapter edited are never read by another, nor by what is loaded under its name later.
"""

import contextlib
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from ..adapter_files import CONFIG_NAME, AdapterFiles
from ..components import Site
from ..library import freeze
from ..stacking import FrozenAdapter
from .flat_batch import FlatBatch, FlatEdit, Requests, apply

SCALE = "reft_scale"
"""The extra argument of a request by which its edits are multiplied."""

_PINNED = "#sha256:"
_KEPT = 4
"""Sets of adapters that ran last, whose stacks are kept."""


def register() -> None:
    """Teach this process of vLLM to serve our adapters; a second call does nothing."""
    if getattr(InputProcessor.process_inputs, "_of_reftnoise", False):
        return
    _wrap(InputProcessor, "process_inputs", _process_inputs)
    _wrap(OpenAIServingModels, "load_lora_adapter", _load_lora_adapter)
    _wrap(LoRAModelRunnerMixin, "add_lora", _add_lora)
    _wrap(GPUModelRunner, "_model_forward", _model_forward)


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    wrapped._of_reftnoise = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


# -- requests, in the process that receives them -------------------------------------------------


def _process_inputs(
    original: Callable[..., Any],
    processor: InputProcessor,
    request_id: str,
    prompt: Any,
    params: Any,
    supported_tasks: Any,
    arrival_time: float | None = None,
    lora_request: LoRARequest | None = None,
    **kwargs: Any,
) -> Any:
    """Give a request the digest of its adapter, and the prefix cache the scale of its edits."""
    arguments = (processor, request_id, prompt, params, supported_tasks, arrival_time)
    if lora_request is None or not _is_ours(lora_request.lora_path):
        return original(*arguments, lora_request, **kwargs)
    if processor.vllm_config.lora_config is not None:
        raise VLLMValidationError(
            f"{lora_request.lora_path}: a reftnoise adapter, which is served without --enable-lora"
        )
    scale = _scale(params)
    try:
        path = _pinned(lora_request.lora_path, processor.model_config.hf_config)
    except (OSError, ValueError) as error:
        raise VLLMValidationError(str(error)) from None
    request = original(*arguments, None, **kwargs)
    request.lora_request = LoRARequest(lora_request.lora_name, _number(path), path)
    if scale != 1.0:
        request.cache_salt = f"{request.cache_salt or ''}{SCALE}={scale!r}"
    return request


def _scale(params: Any) -> float:
    scale = (getattr(params, "extra_args", None) or {}).get(SCALE, 1.0)
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not is_number or not math.isfinite(scale):
        raise VLLMValidationError(f"{SCALE} {scale!r}: expected a finite number", parameter=SCALE)
    return float(scale)


async def _load_lora_adapter(
    original: Callable[..., Any], models: OpenAIServingModels, request: Any, *args: Any
) -> Any:
    """Check an adapter before the engine sees it: a client's mistake is no error of the server."""
    if not _is_ours(request.lora_path):
        return await original(models, request, *args)
    try:
        path = _pinned(request.lora_path, models.model_config.hf_config)
    except (OSError, ValueError) as error:
        return create_error_response(str(error))
    return await original(models, request.model_copy(update={"lora_path": path}), *args)


def _is_ours(path: str) -> bool:
    return (Path(path.partition(_PINNED)[0]) / CONFIG_NAME).is_file() or _PINNED in path


def _pinned(path: str, config: Any) -> str:
    """The path of a whole adapter for a base of this config, with the digest of its weights."""
    if _PINNED in path:
        return path
    adapter = AdapterFiles.read(path)
    text = config.get_text_config()
    shape = {
        "model_type": config.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
    }
    adapter.expect_base(shape, config.name_or_path)
    adapter.expect_own_weights()
    return f"{path}{_PINNED}{adapter.sha256}"


def _number(path: str) -> int:
    """The adapter's number, one for equal weights."""
    return int(path.partition(_PINNED)[2][:15], 16) + 1


# -- edits, in the process that runs the model ---------------------------------------------------


def _add_lora(original: Callable[..., Any], runner: GPUModelRunner, request: LoRARequest) -> Any:
    if not _is_ours(request.lora_path):
        return original(runner, request)
    _served(runner).load(request)
    return True


def _model_forward(
    original: Callable[..., Any], runner: GPUModelRunner, *args: Any, **kwargs: Any
) -> Any:
    if not runner.input_batch.lora_id_to_lora_request or runner.lora_config is not None:
        return original(runner, *args, **kwargs)
    with _served(runner).step():
        return original(runner, *args, **kwargs)


def _served(runner: GPUModelRunner) -> "ServedAdapters":
    found: ServedAdapters | None = getattr(runner, "_reftnoise", None)
    if found is None:
        found = runner._reftnoise = ServedAdapters(runner)
    return found


class ServedAdapters:
    """The adapters of one worker, and the edits of the step that it runs.

    Args:
        runner: the worker's.
    """

    def __init__(self, runner: GPUModelRunner) -> None:
        self._runner = runner
        self._base = _Served(runner.model, runner.model_config.hf_config)
        self._adapters: dict[int, FrozenAdapter] = {}
        self._batches: OrderedDict[tuple[int, ...], FlatBatch] = OrderedDict()
        self._edits: dict[nn.Module, list[FlatEdit]] = {}
        self._hooked: set[nn.Module] = set()

    def load(self, request: LoRARequest) -> None:
        """Load what a request names, if it is not there yet."""
        path, _, _ = request.lora_path.partition(_PINNED)
        pinned = request.lora_path
        if pinned == path:
            pinned = _pinned(path, self._base.config)
        number = _number(pinned)
        if number in self._adapters:
            return
        adapter = AdapterFiles.read(path)
        if not pinned.endswith(str(adapter.sha256)):
            raise ValueError(f"{path}: another adapter has been saved there meanwhile")
        frozen = freeze(adapter, self._base)
        frozen.weights = frozen.weights.to(self._runner.device)
        for slot in frozen.slots:
            self._hook(slot.place.site)
        self._adapters[number] = frozen

    def _hook(self, site: Site) -> None:
        if site.is_input:
            raise ValueError(f"{site}: vLLM serves edits of outputs")
        if site.module not in self._hooked:
            site.module.register_forward_hook(self._edit)
            self._hooked.add(site.module)

    def _edit(self, module: nn.Module, _: Any, output: Any) -> Any:
        edits = self._edits.get(module)
        if not edits:
            return None
        if isinstance(output, tuple):
            hidden, *rest = output
            residual = rest[0] if rest and isinstance(rest[0], Tensor) else None
            return apply(edits, hidden, residual), *rest
        return apply(edits, output, None)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Within the block, the model runs with the edits of the runner's batch."""
        batch = self._runner.input_batch
        for request in batch.lora_id_to_lora_request.values():
            self.load(request)
        count = batch.num_reqs
        numbers = batch.request_lora_mapping[:count]
        chosen = tuple(sorted(batch.lora_id_to_lora_request))
        adapters = np.searchsorted(chosen, numbers)
        scales = [
            _scale(self._runner.requests[batch.req_ids[i]].sampling_params) if number else 1.0
            for i, number in enumerate(numbers)
        ]
        requests = Requests(
            torch.from_numpy(np.where(numbers == 0, -1, adapters)),
            torch.tensor(scales),
            torch.from_numpy(np.diff(self._runner.query_start_loc.np[: count + 1])).long(),
            torch.from_numpy(batch.num_computed_tokens_cpu[:count]).long(),
            torch.from_numpy(batch.num_prompt_tokens[:count]).long(),
        )
        self._edits = self._batch(chosen).edits(requests)
        try:
            yield
        finally:
            self._edits = {}

    def _batch(self, chosen: tuple[int, ...]) -> FlatBatch:
        if chosen not in self._batches:
            adapters = [self._adapters[number] for number in chosen]
            self._batches[chosen] = FlatBatch(adapters, self._runner.device)
            while len(self._batches) > _KEPT:
                self._batches.popitem(last=False)
        self._batches.move_to_end(chosen)
        return self._batches[chosen]


class _Served(nn.Module):
    """vLLM's model as those of transformers are asked for their parts."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__()
        self.model, self.config = model, config

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_submodule("model.embed_tokens")

    def can_generate(self) -> bool:
        return True
