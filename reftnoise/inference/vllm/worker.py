"""Edits of vLLM's model, in each of its workers.

A hook at each component that may be edited calls an operator of ours, which changes the component's
output, or the input of an output projection, in place. vLLM compiles the operator as one opaque
node of the model.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import CompilationMode, VllmConfig
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.utils.torch_utils import direct_register_custom_op

from ..._util.errors import is_finite_number, nearest
from ..._util.files import local_path
from ..._util.recent import RecentlyUsed
from ...adapters.directory import AdapterFiles
from ...adapters.frozen import FrozenAdapter, freeze
from ...adapters.location import ADAPTER, CONFIG_NAME, WEIGHTS_NAME
from ...config.positions import Positions
from ...engine.base.sites import find_layers, find_site
from ...interventions import gate_of
from . import SCALE
from .capture import Captures, Reader
from .flat_batch import FlatBatch, FlatEdit, StepRequests, apply_
from .graphs import uses_graphs

_SERVED = ["block_output", "attention_output", "mlp_output", "embeddings", "head_output"]

_KEPT = 4
"""The number of sets of adapters whose stacks are kept, those that ran last."""

_current: dict[int, list[FlatEdit]] = {}
"""The edits of the step that runs, by the number of the hook."""

_readers: dict[int, Reader] = {}
"""What reads the edited states of the step that runs, by the number of the hook."""

_errors: list[Exception] = []
"""What the edits of the step that runs raised."""

_logger = init_logger(__name__)


def components_of(config: VllmConfig) -> list[str]:
    """The components that adapters may edit, by `--additional-config`; by default none.

    Raises:
        ValueError: a component that is not served, or a setting of vLLM that cannot be combined.
    """
    additional = config.additional_config
    named = additional.get("reft", []) if isinstance(additional, dict) else []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"additional_config reft {named!r}: expected a list of components")
    for name in named:
        if name not in _SERVED:
            raise ValueError(f"additional_config reft: {name!r}; {nearest(name, _SERVED)}")
    if named and config.lora_config is not None:
        raise ValueError("reftnoise's adapters and --enable-lora: expected only one of them")
    is_eager = config.compilation_config.mode in (None, CompilationMode.NONE)
    if named and not (is_eager or uses_graphs(config)) and torch.cuda.is_available():
        raise ValueError(
            "reftnoise's adapters are served on GPUs with --enforce-eager, or with "
            'graphs, {"reft_graphs": true}, which have run on no GPU yet'
        )
    if "head_output" in named and config.parallel_config.tensor_parallel_size > 1:
        raise ValueError("additional_config reft: 'head_output' needs --tensor-parallel-size 1")
    return named


def find_adapter(path: str) -> Path | None:
    """The adapter's directory, the path itself or a run's `adapter`; None if there is none."""
    directory = local_path(path)
    candidates = (directory, directory / ADAPTER)
    return next((place for place in candidates if (place / CONFIG_NAME).is_file()), None)


def served_adapter(path: str, config: VllmConfig) -> tuple[str, tuple[Positions, ...]]:
    """The digest and the positions of an adapter that is whole and fits base and server.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it is damaged, for another base, or edits a component that is not served.
    """
    path = str(find_adapter(path) or path)
    adapter, digest = _read(path, _stamps_of(path))
    _expect_served(adapter, config)
    entries = adapter.config.representations
    return digest, tuple(Positions.parse(e.positions) for e in entries if not e.is_noise)


def _expect_served(adapter: AdapterFiles, config: VllmConfig) -> None:
    components = components_of(config)
    for index, entry in enumerate(adapter.config.representations):
        if not entry.is_noise and entry.component not in components:
            raise ValueError(
                f"{adapter.config_path}: representations[{index}] edits {entry.component!r}, but "
                f"vLLM serves {components}: add it to 'reft' in --additional-config"
            )
    base = _Base(nn.Module(), config.model_config.hf_config)
    adapter.expect_base(base.fingerprint(), config.model_config.model)


@functools.lru_cache(maxsize=4096)
def _read(path: str, _stamps: tuple[tuple[int, ...], ...]) -> tuple[AdapterFiles, str]:
    """An adapter without its weights, and its digest, read when its files have other stamps."""
    adapter = AdapterFiles.read(path)
    return replace(adapter, snapshot=None), adapter.identity()


def _stamps_of(path: str) -> tuple[tuple[int, ...], ...]:
    files = [file for name in (CONFIG_NAME, WEIGHTS_NAME) if (file := Path(path) / name).is_file()]
    stats = [file.stat() for file in files]
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)


def number_of(digest: str) -> int:
    """The number of an adapter in the engine, which equal adapters share."""
    return int(digest[:15], 16) + 1


def scale_of(params: Any) -> float:
    """The factor of a request's edits; a ValueError if it is no finite number."""
    scale = (getattr(params, "extra_args", None) or {}).get(SCALE, 1.0)
    if not is_finite_number(scale):
        raise ValueError(f"{SCALE} {scale!r}: expected a finite number")
    return float(scale)


class ServedAdapters:
    """The adapters of one worker, which may edit some components of its runner's model."""

    def __init__(self, runner: Any, components: Sequence[str]) -> None:
        self._runner = runner
        self._base = _Base(runner.model, runner.model_config.hf_config)
        self._adapters: dict[int, FrozenAdapter] = {}
        self._failed: list[str] = []
        self._batches = RecentlyUsed[tuple[int, ...], FlatBatch](_KEPT)
        self._hooks: dict[nn.Module, int] = {}
        blocks = find_layers(self._base)
        self.captures = Captures.of(runner, len(blocks))
        for component in components:
            layers = range(len(blocks))
            for layer in [None] if component == "embeddings" else layers:
                site = find_site(self._base, component, layer)
                number = self._hooks[site.module] = len(self._hooks)
                if site.is_input:
                    site.module.register_forward_pre_hook(_InputHook(number))
                else:
                    site.module.register_forward_hook(_Hook(number))
        self._blocks = [self._hooks[block] for block in blocks if block in self._hooks]

    def load(self, path: str) -> int:
        """Load the adapter that a directory holds; its number.

        Raises:
            FileNotFoundError: there is no adapter.
            ValueError: it is damaged, for another base, or edits what is not served.
        """
        directory = str(find_adapter(path) or path)
        adapter = AdapterFiles.read(directory)
        _expect_served(adapter, self._runner.vllm_config)
        number = number_of(adapter.identity())
        if number not in self._adapters:
            frozen = freeze(adapter, self._base)
            if frozen.others:
                unit = frozen.others[0].unit
                if gate_of(unit) is not None:
                    raise ValueError(
                        f"{directory}: the gate 'condition' reads whole prompts, and vLLM parts"
                    )
                name = type(unit).__name__
                raise ValueError(f"{directory}: vLLM edits by factors, which {name} does not have")
            if any(unit.keeps_norm and unit.site.columns is not None for unit in frozen.shapes):
                raise ValueError(f"{directory}: gate 'norm' of heads, which vLLM does not serve")
            frozen.weights = frozen.weights.to(self._runner.device)
            self._adapters[number] = frozen
        return number

    def _is_ready(self, request: LoRARequest) -> bool:
        """Whether a request's adapter is loaded, at the latest now."""
        number = request.lora_int_id
        if number in self._adapters:
            return True
        try:
            if self.load(request.lora_path) != number:
                raise ValueError(f"{request.lora_path}: another adapter has been saved there since")
        except Exception as error:
            self._fail({number}, error)
        return number in self._adapters

    def remove(self, number: int) -> bool:
        """Drop an adapter; False if it is not loaded, or a request of the batch needs it."""
        if number in self._runner.input_batch.lora_id_to_lora_request:
            return False
        self._batches.forget(lambda chosen: number in chosen)
        return self._adapters.pop(number, None) is not None

    def numbers(self) -> set[int]:
        """The numbers of the loaded adapters."""
        return set(self._adapters)

    def has_work(self) -> bool:
        """Whether a request of the batch has an adapter, or states are captured."""
        return bool(self._runner.input_batch.lora_id_to_lora_request or self.captures)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Within the block, the model runs with the edits of the runner's batch.

        Where an adapter cannot be loaded or applied, the requests that chose it fail, and no other.
        States that are to be captured are, with the edits.
        """
        requests = self._runner.input_batch.lora_id_to_lora_request.values()
        chosen = tuple(sorted(r.lora_int_id for r in requests if self._is_ready(r)))
        try:
            if chosen:
                edits = self._edits(chosen)
                _current.update({self._hooks[module]: edits[module] for module in edits})
            if self.captures:
                _readers.update(zip(self._blocks, self.captures.readers(), strict=False))
            yield
            if _errors:
                self._fail(set(chosen), _errors[0])
            if self.captures:
                self._failed += self.captures.finish(self._failed)
        finally:
            _current.clear()
            _readers.clear()
            _errors.clear()

    def acts_on_batch(self) -> bool:
        """Whether an edit acts on a token of the runner's batch, which is about to run.

        States are captured at prompts' tokens alone.
        """
        batch, count = self._runner.input_batch, self._runner.input_batch.num_reqs
        numbers = [request.lora_int_id for request in batch.lora_id_to_lora_request.values()]
        decodes = batch.num_computed_tokens_cpu[:count] >= batch.num_prompt_tokens[:count]
        if not decodes.all():
            return self.has_work()
        adapters = [self._adapters.get(number) for number in numbers]
        # One that is not loaded yet may edit what is generated.
        return any(a is None or any(u.positions.decode for u in a.shapes) for a in adapters)

    def take_failed(self) -> list[str]:
        """The names of the requests whose edits failed since the last call."""
        failed, self._failed = self._failed, []
        return failed

    def _fail(self, numbers: set[int], error: Exception) -> None:
        batch = self._runner.input_batch
        mapping = batch.request_lora_mapping[: batch.num_reqs]
        names = [
            name
            for name, number in zip(batch.req_ids[: batch.num_reqs], mapping, strict=True)
            if number in numbers
        ]
        _logger.error("reftnoise: requests %s end with an error: %r", names, error)
        self._failed += names

    def _edits(self, chosen: tuple[int, ...]) -> dict[nn.Module, list[FlatEdit]]:
        batch, count = self._runner.input_batch, self._runner.input_batch.num_reqs
        decodes = batch.num_computed_tokens_cpu[:count] >= batch.num_prompt_tokens[:count]
        try:
            flat = self._batches.get(
                chosen, lambda: FlatBatch([self._adapters[n] for n in chosen], self._runner.device)
            )
            if decodes.all() and not flat.edits_decode:
                return {}
            return flat.edits(self._requests(chosen))
        except Exception as error:
            self._fail(set(chosen), error)
            return {}

    def _requests(self, chosen: tuple[int, ...]) -> StepRequests:
        batch, count = self._runner.input_batch, self._runner.input_batch.num_reqs
        numbers = batch.request_lora_mapping[:count]
        is_edited = np.isin(numbers, chosen)
        scales = [
            scale_of(self._runner.requests[name].sampling_params) if edited else 0.0
            for name, edited in zip(batch.req_ids[:count], is_edited, strict=True)
        ]
        return StepRequests(
            torch.from_numpy(np.where(is_edited, np.searchsorted(chosen, numbers), -1)),
            torch.tensor(scales),
            torch.from_numpy(np.diff(self._runner.query_start_loc.np[: count + 1])).long(),
            torch.from_numpy(batch.num_computed_tokens_cpu[:count]).long(),
            torch.from_numpy(batch.num_prompt_tokens[:count]).long(),
        )


class _Hook:
    """Edits a module's output in place: a tensor, or a pair with the residual to be added."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and not _is_needed(self._number):
            return
        is_pair = isinstance(output, tuple) and len(output) > 1
        hidden = output[0] if isinstance(output, tuple) else output
        residual = output[1] if is_pair and isinstance(output[1], Tensor) else None
        torch.ops.vllm.reftnoise_edit(hidden, residual, self._number)


def _is_needed(number: int) -> bool:
    return number in _current or number in _readers


class _InputHook:
    """Edits in place what a module reads, which nothing else reads."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or self._number in _current:
            torch.ops.vllm.reftnoise_edit(args[0], None, self._number)


def _edit(hidden: Tensor, residual: Tensor | None, number: int) -> None:
    try:
        apply_(_current.get(number, ()), hidden, residual)
    except Exception as error:  # which would end the engine for everybody
        _errors.append(error)
    if number in _readers:
        _readers[number](hidden, residual)


def _edit_fake(hidden: Tensor, residual: Tensor | None, number: int) -> None:
    """Shapes do not change."""


if not hasattr(torch.ops.vllm, "reftnoise_edit"):
    direct_register_custom_op("reftnoise_edit", _edit, ["hidden"], _edit_fake)


class _Base(nn.Module):
    """vLLM's model with the interface of one of transformers."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        super().__init__()
        self.model, self.config = model, config

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_submodule("model.embed_tokens")

    def can_generate(self) -> bool:
        return True

    def fingerprint(self) -> dict[str, Any]:
        text = self.config.get_text_config()
        return {
            "model_type": self.config.model_type,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_hidden_layers,
        }
