"""Adapters in vLLM, served as vLLM serves LoRA: per request, on one base, with its own flags.

Each process of vLLM calls `register`, through the entry point `vllm.general_plugins`. vLLM then
takes an adapter's directory wherever it takes that of a LoRA: in `--lora-modules`, in
`POST /v1/load_lora_adapter`, and in a `LoRARequest`.

The server is started with `--additional-config '{"reft": ["block_output"]}'`, which names the
components that adapters may edit; without it, the plugin does nothing. `--enable-lora` is not
needed, and cannot be combined. A request may scale its edits, as in
`{"vllm_xargs": {"reft_scale": 0.5}}`.

An adapter is identified by the digest of its config and weights, as this process read it: nothing
that a client sends can stand for it. The digest is the adapter's number in the engine, and a part
of the salt of vLLM's prefix cache. So no adapter reads states that another one has edited, even if
it is loaded later under the same name.

A worker checks each adapter again. Where it cannot load or apply one, the requests that chose it
end with an error, and all others go on.
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
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from . import SCALE
from .worker import ServedAdapters, components_of, digest_of, find_adapter, number_of, scale_of


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
    _wrap(GPUModelRunner, "execute_model", _output)
    _wrap(GPUModelRunner, "sample_tokens", _output)
    _wrap(Scheduler, "update_from_output", _update_from_output)


class _Pinned(LoRARequest):
    """A named adapter, as it was when it was loaded."""

    digest: str = ""


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
    path = lora_request.lora_path
    try:
        if isinstance(lora_request, _Pinned):
            digest = lora_request.digest
        else:
            digest = digest_of(path, processor.vllm_config)
        scale = scale_of(params)
    except (OSError, ValueError) as error:
        raise VLLMValidationError(str(error)) from None
    request = original(*arguments, None, **kwargs)
    request.lora_request = LoRARequest(lora_request.lora_name, number_of(digest), path)
    request.cache_salt = f"{SCALE}={scale!r};{digest};{request.cache_salt or ''}"
    return request


async def _load_lora_adapter(
    original: Callable[..., Any], models: OpenAIServingModels, request: Any, **kwargs: Any
) -> Any:
    """Check an adapter before the engine loads it: a client's mistake is no error of the server."""
    config, name = models.input_processor.vllm_config, request.lora_name
    if not _is_ours(request.lora_path, config):
        return await original(models, request, **kwargs)
    try:
        digest = digest_of(request.lora_path, config)
    except (OSError, ValueError) as error:
        return create_error_response(str(error))
    before = models.lora_requests.get(name)
    response = await original(models, request, **kwargs)
    if isinstance(response, ErrorResponse):
        match = _REFUSED.search(response.error.message)
        return create_error_response(match[1]) if match else response
    loaded = models.lora_requests[name]
    models.lora_requests[name] = _Pinned(
        name, number_of(digest), loaded.lora_path, loaded.base_model_name, digest=digest
    )
    _drop(models, before)
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
    if not isinstance(loaded, _Pinned):
        return
    task = asyncio.create_task(_forget(models, loaded.lora_int_id))
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


async def _forget(models: OpenAIServingModels, number: int) -> None:
    running = models.engine_client.output_processor.request_states
    while any(r.lora_request and r.lora_request.lora_int_id == number for r in running.values()):
        await asyncio.sleep(_INTERVAL)
    if all(named.lora_int_id != number for named in models.lora_requests.values()):
        await models.engine_client.remove_lora(number)


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


def _output(original: Callable[..., Any], runner: GPUModelRunner, *args: Any, **kwargs: Any) -> Any:
    """Send the names of the requests whose edits failed along with a step's output."""
    output = original(runner, *args, **kwargs)
    served = None if output is None else getattr(runner, "reftnoise", None)
    if served is not None and (failed := served.take_failed()):
        getattr(output, "_model_runner_output", output).reftnoise_failed = failed
    return output


# -- the scheduler's process ---------------------------------------------------------------------


def _update_from_output(
    original: Callable[..., Any], scheduler: Scheduler, scheduled: Any, output: Any
) -> Any:
    """End requests whose edits failed with an error, and evict their states from the cache."""
    for name in getattr(output, "reftnoise_failed", ()):
        if name in scheduler.requests:
            blocks = scheduler.kv_cache_manager.get_block_ids(name)
            scheduler.kv_cache_manager.evict_blocks({block for group in blocks for block in group})
            scheduler.grammar_compile_error_reqs.add(name)  # which end with an error, alone
        if output.sampled_token_ids:
            output.sampled_token_ids[output.req_id_to_index[name]] = []
    return original(scheduler, scheduled, output)
