"""Adapters in vLLM, served as vLLM serves LoRA: per request, on one base, with its own flags.

Each process of vLLM calls `register`, through the entry point `vllm.general_plugins`. vLLM then
takes an adapter's directory wherever it takes that of a LoRA: in `--lora-modules`, in
`POST /v1/load_lora_adapter`, and in a `LoRARequest`.

The server is started with `--additional-config '{"reft": ["block_output"]}'`, which names the
components that adapters may edit; without it, the plugin does nothing. `--enable-lora` is not
needed, and cannot be combined. A request may scale its edits, as in
`{"vllm_xargs": {"reft_scale": 0.5}}`.

An adapter is identified by the digest of its config and weights. The digest is part of the
adapter's number and of the path in a request, which is part of the keys of vLLM's prefix cache. So
no adapter reads states that another one has edited, even if it is loaded later under the same name.
"""

import asyncio
import functools
import re
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from . import SCALE
from .worker import PINNED, ServedAdapters, components_of, find_adapter, number_of, pinned, scale_of


def register() -> None:
    """Let this process of vLLM serve our adapters; a second call does nothing."""
    if getattr(InputProcessor.process_inputs, "_of_reftnoise", False):
        return
    _wrap(InputProcessor, "process_inputs", _process_inputs)
    _wrap(OpenAIServingModels, "load_lora_adapter", _load_lora_adapter)
    _wrap(OpenAIServingModels, "unload_lora_adapter", _unload_lora_adapter)
    _wrap(VllmConfig, "_get_v2_model_runner_unsupported_features", _unsupported)
    _wrap(GPUModelRunner, "load_model", _load_model)
    _wrap(CPUModelRunner, "load_model", _load_model)
    _wrap(LoRAModelRunnerMixin, "add_lora", _add_lora)
    _wrap(LoRAModelRunnerMixin, "remove_lora", _remove_lora)
    _wrap(LoRAModelRunnerMixin, "list_loras", _list_loras)
    _wrap(GPUModelRunner, "_model_forward", _model_forward)


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    wrapped._of_reftnoise = True  # type: ignore[attr-defined]  # ours
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
    if lora_request is None or not _is_ours(lora_request.lora_path, processor.vllm_config):
        return original(*arguments, lora_request, **kwargs)
    try:
        path = pinned(lora_request.lora_path, processor.vllm_config)
        scale = scale_of(params)
    except (OSError, ValueError) as error:
        raise VLLMValidationError(str(error)) from None
    request = original(*arguments, None, **kwargs)
    request.lora_request = LoRARequest(lora_request.lora_name, number_of(path), path)
    request.cache_salt = f"{SCALE}={scale!r};{request.cache_salt or ''}"
    return request


async def _load_lora_adapter(
    original: Callable[..., Any], models: OpenAIServingModels, request: Any, **kwargs: Any
) -> Any:
    """Check an adapter before the engine loads it: a client's mistake is no error of the server."""
    config = models.input_processor.vllm_config
    if not _is_ours(request.lora_path, config):
        return await original(models, request, **kwargs)
    try:
        path = pinned(request.lora_path, config)
    except (OSError, ValueError) as error:
        return create_error_response(str(error))
    before = models.lora_requests.get(request.lora_name)
    response = await original(models, request.model_copy(update={"lora_path": path}), **kwargs)
    _drop(models, before)
    if isinstance(response, ErrorResponse) and (match := _REFUSED.search(response.error.message)):
        return create_error_response(match[1])
    return response


async def _unload_lora_adapter(
    original: Callable[..., Any], models: OpenAIServingModels, request: Any
) -> Any:
    """Drop the adapter, too; vLLM drops only its name."""
    before = models.lora_requests.get(request.lora_name)
    response = await original(models, request)
    _drop(models, before)
    return response


def _drop(models: OpenAIServingModels, loaded: LoRARequest | None) -> None:
    """Let the workers drop an adapter that has no name any more, once no request needs it."""
    if loaded is None or PINNED not in loaded.lora_path:
        return
    task = asyncio.create_task(_forget(models, loaded.lora_path))
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


async def _forget(models: OpenAIServingModels, path: str) -> None:
    running = models.engine_client.output_processor.request_states
    while any(r.lora_request and r.lora_request.lora_path == path for r in running.values()):
        await asyncio.sleep(_INTERVAL)
    if all(named.lora_path != path for named in models.lora_requests.values()):
        await models.engine_client.remove_lora(number_of(path))


_REFUSED = re.compile(r"<reft>(.*)</reft>", re.DOTALL)
"""Marks a worker's message about an adapter, since vLLM passes on only the text of an error."""

_INTERVAL = 0.5
"""Seconds between looks at whether an adapter is still needed."""

_tasks: set[asyncio.Task[None]] = set()
"""Kept from being collected while they run."""


def _is_ours(path: str, config: VllmConfig) -> bool:
    """Whether an adapter is for us: with our option, vLLM serves no LoRA."""
    return bool(components_of(config)) or find_adapter(path) is not None


# -- the model's process -------------------------------------------------------------------------


def _unsupported(original: Callable[..., Any], config: VllmConfig) -> Any:
    """Let vLLM choose the model runner whose batches we read."""
    return [*original(config), *(["reftnoise's adapters"] if components_of(config) else [])]


def _load_model(
    original: Callable[..., Any], runner: GPUModelRunner, *args: Any, **kwargs: Any
) -> Any:
    result = original(runner, *args, **kwargs)
    if components := components_of(runner.vllm_config):
        runner.reftnoise = ServedAdapters(runner, components)
    return result


def _add_lora(original: Callable[..., Any], runner: GPUModelRunner, request: LoRARequest) -> Any:
    if not hasattr(runner, "reftnoise"):
        return original(runner, request)
    try:
        runner.reftnoise.load(request.lora_path)
    except (OSError, ValueError) as error:
        raise ValueError(f"<reft>{error}</reft>") from None
    return True


def _remove_lora(original: Callable[..., Any], runner: GPUModelRunner, number: int) -> Any:
    if not hasattr(runner, "reftnoise"):
        return original(runner, number)
    return runner.reftnoise.remove(number)


def _list_loras(original: Callable[..., Any], runner: GPUModelRunner) -> Any:
    return runner.reftnoise.numbers() if hasattr(runner, "reftnoise") else original(runner)


def _model_forward(
    original: Callable[..., Any], runner: GPUModelRunner, *args: Any, **kwargs: Any
) -> Any:
    if not hasattr(runner, "reftnoise") or not runner.input_batch.lora_id_to_lora_request:
        return original(runner, *args, **kwargs)
    with runner.reftnoise.step():
        return original(runner, *args, **kwargs)
