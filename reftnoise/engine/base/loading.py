"""Base models by name, as recipes and saved adapters give it."""

import contextlib
import functools
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..._util.errors import one_line, warn_once
from ...config.base_model import EMBEDDED, GGUF, PACKAGED, base_path, expect_base
from ...interventions.arguments import dtype_name
from .threads import ForkSafeLock
from .tiny import DIRECTORY

logger = logging.getLogger(__name__)

_HALVES = (torch.bfloat16, torch.float16)
_GGUF = ForkSafeLock()


def load_base(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantization: dict[str, Any] | None = None,
    auto_class: Any = AutoModelForCausalLM,
    padding_side: str = "left",
    **arguments: Any,
) -> tuple[Any, Any]:
    """A model in evaluation mode, and its tokenizer. Code that comes with a model is not run.

    Args:
        name: directory, GGUF file or hub name; tiny-chat; or one of `config.base_model.PACKAGED`,
            such as smollm2.
        revision: branch, tag or commit on the hub.
        dtype: one of `config.base_model.DTYPES`; auto is the dtype in which the weights are stored,
            or float32 on a processor that has no arithmetic of that dtype.
        device: device that the model is put on; auto is a GPU where there is one.
        quantization: transformers' quantization_config as a mapping.
        auto_class: the class of transformers that loads the model.
        padding_side: padding side of the tokenizer.
        arguments: further arguments of its `from_pretrained`, such as num_labels.

    Raises:
        ValueError: an unknown dtype or device, or a model that needs code of its own.
        OSError: no such model.
        ImportError: the package that carries the model, or the one that reads it, is missing.
    """
    expect_base(name, dtype)
    target = device
    if device == "auto":
        target = "cuda" if torch.cuda.is_available() else "cpu"
    path = DIRECTORY if name == EMBEDDED else base_path(name)
    if path is not None:
        path = path.absolute()  # ./smollm2 is no name of a package
    is_gguf = path is not None and path.suffix == GGUF
    source: dict[str, Any] = {"pretrained_model_name_or_path": name if path is None else str(path)}
    if path is not None and is_gguf:
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        if quantization is not None:
            raise ValueError(f"quantization: {name} is a GGUF file, whose weights are unpacked")
        if hasattr(transformers, "GgufConfig"):  # older versions always unpack
            arguments |= {"quantization_config": transformers.GgufConfig(dequantize=True)}
    elif quantization is not None:
        arguments |= {"quantization_config": quantization, "device_map": target}
    source |= {"revision": revision, "trust_remote_code": False}
    with without_bars(), _clear_errors(name, is_gguf), reading_once(is_gguf):
        tokenizer = AutoTokenizer.from_pretrained(padding_side=padding_side, **source)
        model = auto_class.from_pretrained(dtype=dtype, **source, **arguments)
    if is_gguf:  # transformers takes what it has unpacked for a quantised model
        model.hf_quantizer, model.is_quantized = None, False
        vars(model.config).pop("quantization_config", None)
    if name in PACKAGED or is_gguf:
        model.config.name_or_path = name if name in PACKAGED else str(path)
    if quantization is None:
        if dtype == "auto" and target == "cpu":
            model = _in_fast_dtype(model, name)
        model = _moved(model, target, device)
    return model.eval(), tokenizer


def load_structure(name: str) -> tuple[Any, Any]:
    """A causal model without its weights, on torch's meta device, and its tokenizer.

    Args:
        name: model, as in `load_base`, with the same errors.
    """
    return load_base(name, device="meta", auto_class=_Unfilled)


class _Unfilled:
    """Stands for a class of transformers: its models have shapes, and no weights."""

    @staticmethod
    def from_pretrained(**source: Any) -> Any:
        is_of_weights = ("dtype", "quantization_config")
        config = AutoConfig.from_pretrained(
            **{name: value for name, value in source.items() if name not in is_of_weights}
        )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)


def _moved(model: Any, target: str, device: str) -> Any:
    try:
        return model.to(target)
    except (RuntimeError, AssertionError) as error:  # of torch, for a device that is not there
        raise ValueError(f"device {device!r}: {error}") from None


def _in_fast_dtype(model: Any, name: str) -> Any:
    """The model, in float32 if this processor has no arithmetic of the dtype of its weights."""
    stored = model.dtype
    if stored not in _HALVES or has_arithmetic(stored):
        return model
    model = model.float()
    model.config.dtype = model.dtype
    warn_once(
        logger,
        f"{name}: in float32, since this processor has no fast {dtype_name(stored)}, in which its "
        f"weights are stored; dtype {dtype_name(stored)} takes half the memory and many times the "
        "time",
    )
    return model


@functools.cache
def has_arithmetic(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of a dtype at least about as fast as of float32.

    It is measured, which takes some milliseconds: a processor's instructions do not show which of
    them torch's kernels use. Without instructions of the dtype, products take several times as long
    as in float32.
    """
    return _seconds(dtype) < 2.5 * _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The shortest of some times of one product, which other processes can only lengthen."""
    rows, matrix = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        torch.nn.functional.linear(rows, matrix)
        times.append(time.perf_counter() - started)
    return min(times)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Within the block, transformers shows no progress of its own."""
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def reading_once(is_gguf: bool) -> Iterator[None]:
    """Within the block, transformers parses a GGUF file once, and silently.

    It would parse it for the tokenizer, for the config and for the weights, and look up names again
    for each module. One thread at a time loads such a file, since modules are changed meanwhile.
    """
    if not is_gguf:
        yield
        return
    import gguf
    from transformers import modeling_gguf_pytorch_utils as unpacking

    with _GGUF, contextlib.ExitStack() as stack:
        for module, name, stand_in in (
            (gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
            (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
            (unpacking, "tqdm", functools.partial(unpacking.tqdm, disable=True)),
        ):
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, stand_in)
        yield


@contextlib.contextmanager
def _clear_errors(name: str, is_gguf: bool) -> Iterator[None]:
    """Within the block, which loads a model, errors name it, and say what would be right."""
    try:
        yield
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"{name}: no directory of a model here, and of the hub: {reason}") from None
    except ImportError:
        raise
    except Exception as error:
        if is_gguf:  # numpy's, struct's and transformers' own
            raise ValueError(
                f"{name}: expected a GGUF file that transformers can unpack, found a damaged or an "
                f"unknown one ({one_line(error)})"
            ) from None
        if not isinstance(error, ValueError) or "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name}: comes with code of its own, which is not run: load the model with "
            "transformers and give it to get_reft_model"
        ) from None
