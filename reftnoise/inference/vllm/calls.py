"""What happens around the functions of vLLM that `plugin` wraps: each takes the original first.

An adapter is identified by the digest of its config and weights, as this process read it, and
clients cannot choose the digest. It is the adapter's number in the engine, and a part of the salt
of vLLM's prefix cache. So no adapter reads states that another one has edited, even if it is loaded
later under the same name. A longer prompt does not read states of tokens that were edited because
a shorter one ended there, either.

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
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.worker.gpu_model_runner import AsyncGPUModelRunnerOutput, GPUModelRunner

from ...config.positions import Positions
from . import SCALE
from .capture import prepare_capture
from .flat_batch import settled_tokens
from .graphs import split_at_edits, uses_graphs, without_whole_graphs
from .worker import (
    ServedAdapters,
    components_of,
    find_adapter,
    number_of,
    scale_of,
    served_adapter,
)


class _Pinned(LoRARequest):
    """A named adapter, as it was when it was loaded."""

    digest: str = ""
    positions: tuple[Positions, ...] = ()


# -- requests, in the process that receives them -------------------------------------------------


def process_inputs(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Prepare a request for its adapter, and for the capture of its states."""
    return prepare_capture(functools.partial(_process_inputs, original), *args, **kwargs)


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
            digest, positions = lora_request.digest, lora_request.positions
        else:
            digest, positions = served_adapter(path, processor.vllm_config)
        scale = scale_of(params)
    except (OSError, ValueError) as error:
        raise VLLMValidationError(str(error)) from None
    request = original(*arguments, None, **kwargs)
    request.lora_request = LoRARequest(lora_request.lora_name, number_of(digest), path)
    request.cache_salt = f"{SCALE}={scale!r};{digest};{request.cache_salt or ''}"
    tokens = request.prompt_embeds if request.prompt_token_ids is None else request.prompt_token_ids
    settled = settled_tokens(positions, len(tokens))
    if request.sampling_params is not None:  # a copy: clients cannot choose this
        extra = {**(request.sampling_params.extra_args or {}), _SETTLED: settled}
        request.sampling_params.extra_args = extra
    elif settled is not None:  # a model that pools states
        request.cache_salt = f"{len(tokens)};{request.cache_salt}"
    return request


async def load_lora_adapter(
    original: Callable[..., Any], models: OpenAIServingModels, request: Any, **kwargs: Any
) -> Any:
    """Check an adapter before the engine loads it: a client's mistake is not the server's error."""
    config, name = models.input_processor.vllm_config, request.lora_name
    if not _is_ours(request.lora_path, config):
        return await original(models, request, **kwargs)
    try:
        digest, positions = served_adapter(request.lora_path, config)
    except (OSError, ValueError) as error:
        return create_error_response(str(error))
    before = models.lora_requests.get(name)
    response = await original(models, request, **kwargs)
    if isinstance(response, ErrorResponse):
        match = _REFUSED.search(response.error.message)
        return create_error_response(match[1]) if match else response
    loaded = models.lora_requests[name]
    models.lora_requests[name] = _Pinned(
        name,
        number_of(digest),
        loaded.lora_path,
        loaded.base_model_name,
        digest=digest,
        positions=positions,
    )
    _drop(models, before)
    return response


async def unload_lora_adapter(
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

_SETTLED = "reft_settled_tokens"
"""The extra argument with the number of first tokens that longer prompts edit alike."""

_INTERVAL = 0.5
"""Seconds between looks at whether an adapter is still needed."""

_tasks: set[asyncio.Task[None]] = set()
"""Kept from being collected while they run."""


def _is_ours(path: str, config: VllmConfig) -> bool:
    """Whether an adapter is for us: with our option, vLLM serves no LoRA."""
    return bool(components_of(config)) or find_adapter(path) is not None


# -- the model's process -------------------------------------------------------------------------


def unsupported(original: Callable[..., Any], config: VllmConfig) -> Any:
    """Let vLLM choose the model runner whose batches we read."""
    return [*original(config), *(["reftnoise's adapters"] if components_of(config) else [])]


def post_init(original: Callable[..., Any], config: VllmConfig) -> None:
    """Split the model at our edits, where graphs are wanted."""
    original(config)
    if uses_graphs(config) and components_of(config):
        split_at_edits(config)


def load_model(
    original: Callable[..., Any], runner: GPUModelRunner, *args: Any, **kwargs: Any
) -> Any:
    """Put our hooks on the model, where the server names components."""
    result = original(runner, *args, **kwargs)
    if components := components_of(runner.vllm_config):
        runner.reftnoise = ServedAdapters(runner, components)
        if uses_graphs(runner.vllm_config):
            runner.cudagraph_dispatcher.reftnoise = runner.reftnoise
    return result


def dispatch(
    original: Callable[..., Any],
    dispatcher: CudagraphDispatcher,
    *args: Any,
    invalid_modes: Any = None,
    **kwargs: Any,
) -> Any:
    """Keep a step with edits from a graph of the whole model, in which they do nothing."""
    served = getattr(dispatcher, "reftnoise", None)
    if served is not None and served.acts_on_batch():
        invalid_modes = without_whole_graphs(invalid_modes)
    return original(dispatcher, *args, invalid_modes=invalid_modes, **kwargs)


def add_lora(original: Callable[..., Any], runner: GPUModelRunner, request: LoRARequest) -> Any:
    """Load an adapter of ours into this worker."""
    if not hasattr(runner, "reftnoise"):
        return original(runner, request)
    try:
        runner.reftnoise.load(request.lora_path)
    except (OSError, ValueError) as error:
        raise ValueError(f"<reft>{error}</reft>") from None
    return True


def remove_lora(original: Callable[..., Any], runner: GPUModelRunner, number: int) -> Any:
    """Drop an adapter of ours from this worker."""
    if not hasattr(runner, "reftnoise"):
        return original(runner, number)
    return runner.reftnoise.remove(number)


def list_loras(original: Callable[..., Any], runner: GPUModelRunner) -> Any:
    """The numbers of this worker's adapters."""
    return runner.reftnoise.numbers() if hasattr(runner, "reftnoise") else original(runner)


def model_forward(
    original: Callable[..., Any], runner: GPUModelRunner, *args: Any, **kwargs: Any
) -> Any:
    """Run the model with the edits of its batch, and the captures."""
    if not hasattr(runner, "reftnoise") or not runner.reftnoise.has_work():
        return original(runner, *args, **kwargs)
    with runner.reftnoise.step():
        return original(runner, *args, **kwargs)


def execute_model(
    original: Callable[..., Any], runner: GPUModelRunner, scheduled: Any, *args: Any, **kwargs: Any
) -> Any:
    """Follow the requests whose states are captured, then do as `output_of_step`."""
    captures = getattr(getattr(runner, "reftnoise", None), "captures", None)
    if captures is not None:
        captures.follow(scheduled)
    return output_of_step(original, runner, scheduled, *args, **kwargs)


def output_of_step(
    original: Callable[..., Any], runner: GPUModelRunner, *args: Any, **kwargs: Any
) -> Any:
    """Send the names of the requests whose edits failed along with a step's output."""
    output = original(runner, *args, **kwargs)
    served = None if output is None else getattr(runner, "reftnoise", None)
    if served is not None and (failed := served.take_failed()):
        is_async = isinstance(output, AsyncGPUModelRunnerOutput)
        (output._model_runner_output if is_async else output).reftnoise_failed = failed
    return output


# -- the scheduler's process ---------------------------------------------------------------------


def block_keys(
    original: Callable[..., Any],
    request: Any,
    start_token_idx: int,
    end_token_idx: int,
    start_mm_idx: int,
) -> tuple[tuple[Any, ...] | None, int]:
    """Let only prompts of the same length share states that depend on the prompt's length."""
    keys, index = original(request, start_token_idx, end_token_idx, start_mm_idx)
    if request.lora_request is not None and request.sampling_params is not None:
        settled = (request.sampling_params.extra_args or {}).get(_SETTLED)
        if settled is not None and end_token_idx > settled:
            keys = (*(keys or ()), (_SETTLED, request.num_prompt_tokens))
    return keys, index


def update_from_output(
    original: Callable[..., Any], scheduler: Scheduler, scheduled: Any, output: Any
) -> Any:
    """End requests whose edits failed with an error, and evict their states from the cache."""
    for name in getattr(output, "reftnoise_failed", ()):
        if name in scheduler.requests:
            blocks = scheduler.kv_cache_manager.get_block_ids(name)
            scheduler.kv_cache_manager.evict_blocks({block for group in blocks for block in group})
            scheduler.grammar_compile_error_reqs.add(name)  # only these end with an error
        if output.sampled_token_ids:
            output.sampled_token_ids[output.req_id_to_index[name]] = []
    return original(scheduler, scheduled, output)
