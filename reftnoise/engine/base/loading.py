"""Base models by name, as recipes and saved adapters give it."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..._util.files import local_path
from ...config.base_model import expect_base
from .tiny import DIRECTORY, NAME


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
        name: directory or hub name, or tiny-chat.
        revision: branch, tag or commit on the hub.
        dtype: one of `config.base_model.DTYPES`; auto is the dtype in which the weights are stored.
        device: device that the model is put on; auto is a GPU where there is one.
        quantization: transformers' quantization_config as a mapping.
        auto_class: the class of transformers that loads the model.
        padding_side: padding side of the tokenizer.
        arguments: further arguments of its `from_pretrained`, such as num_labels.

    Raises:
        ValueError: an unknown dtype or device, or a model that needs code of its own.
        OSError: no such model.
    """
    expect_base(name, dtype)
    path = DIRECTORY if name == NAME else local_path(name, "model")
    directory = str(path) if path.is_dir() else name
    target = device
    if device == "auto":
        target = "cuda" if torch.cuda.is_available() else "cpu"
    if quantization is not None:
        arguments |= {"quantization_config": quantization, "device_map": target}
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, revision=revision, padding_side=padding_side, trust_remote_code=False
        )
        model = auto_class.from_pretrained(
            directory, revision=revision, dtype=dtype, trust_remote_code=False, **arguments
        )
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name}: comes with code of its own, which is not run: load the model with "
            "transformers and give it to get_reft_model"
        ) from None
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"{name}: no directory of a model here, and of the hub: {reason}") from None
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    try:
        return (model if quantization else model.to(target)).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:  # of torch, for a device that is not there
        raise ValueError(f"device {device!r}: {error}") from None
