"""Bases inside PEFT's wrapper, made from a `peft` section or given as a `PeftModel`.

What PEFT trains is trained, saved and loaded with the units. Virtual tokens that a method puts
before the user's do not count as positions.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...config.peft import as_section, import_peft, peft_config

# Arguments that PEFT takes from the model where a section leaves them out.
_FROM_MODEL = {"task_type", "target_modules", "feedforward_modules", "num_transformer_submodules"}
_FROM_MODEL |= {"num_attention_heads", "num_layers", "token_dim", "modules_to_save"}
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def inner_model(base: PreTrainedModel) -> PreTrainedModel:
    """The model whose forward runs: the one inside PEFT's wrapper."""
    return base.get_base_model() if hasattr(base, "get_base_model") else base


def virtual_tokens(base: nn.Module, stack: str | None = None) -> int:
    """Tokens that PEFT puts before the user's, as embeddings or in the cache.

    Args:
        base: a model, in PEFT's wrapper or not.
        stack: the stack of an encoder-decoder model: PEFT puts embeddings before the encoder's
            tokens, or a cache before the decoder's.
    """
    config: Any = getattr(base, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False):
        return 0
    if stack is not None and (stack == "decoder") != (config.peft_type.value == "PREFIX_TUNING"):
        return 0
    return int(config.num_virtual_tokens)


def is_peft_model(base: nn.Module) -> bool:
    """Whether a model is PEFT's wrapper around another."""
    return hasattr(base, "get_base_model") and hasattr(base, "peft_config")


def has_switched_adapters(base: nn.Module) -> bool:
    """Whether a base has adapters of PEFT, in its wrapper or in itself, that may be switched."""
    return is_peft_model(base) or bool(getattr(base, "_hf_peft_config_loaded", False))


def with_peft(model: PreTrainedModel, section: Mapping[str, Any]) -> Any:
    """`model` inside PEFT's wrapper; what PEFT trains requires gradients.

    Raises:
        ValueError: PEFT finds nothing in the model to adapt, or needs further arguments.
    """
    peft = import_peft()
    config = peft_config(peft, section)
    if config.task_type is None:
        config.task_type = _task(model)
    try:
        return peft.get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"peft {section['peft_type']}: {error}") from None


def section_of(base: nn.Module, section: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The section for a config: `section`, or that of a `PeftModel` which is to be trained.

    Raises:
        ValueError: the section differs from the model's.
    """
    section = None if section is None else dict(section)
    if not is_peft_model(base):
        if hasattr(base, "peft_config"):
            raise ValueError(
                "the model has an adapter of PEFT inside already, from another ReftModel or from "
                "add_adapter: give a fresh one, or the PeftModel"
            )
        return section
    active: Any = base.active_peft_config
    if section is None and not any(parameter.requires_grad for parameter in base.parameters()):
        return None
    own = as_section(active)
    names = list(base.peft_config)  # type: ignore[arg-type]  # PEFT's dictionary of adapters
    if names != ["default"]:
        raise ValueError(
            f"the PeftModel has the adapters {', '.join(names)}: to be trained and saved with "
            "units, it must have one, named 'default'"
        )
    section = own if section is None else section
    for key in (*section, *own):
        if key == "task_type" or (key in _FROM_MODEL and key not in section):
            continue
        if own.get(key) != section.get(key):
            raise ValueError(
                f"peft: the config has {key} {section.get(key)!r}, the given PeftModel "
                f"{own.get(key)!r}"
            )
    return own


def own_state(base: nn.Module) -> set[str]:
    """The names of the tensors that PEFT adds to a base, trained or not; shared ones once."""
    if not is_peft_model(base):
        return set()
    layer_class = import_peft().tuners.tuners_utils.BaseTunerLayer
    layers = [(path, m) for path, m in base.named_modules() if isinstance(m, layer_class)]
    added = {
        f"{path}.{name}"
        for path, layer in layers
        for name in layer.state_dict()
        if not name.startswith("base_layer.")
    }
    once = dict(base.named_parameters()) | dict(base.named_buffers())  # layers may share some
    others = ("prompt_encoder.", ".adaption_", ".modules_to_save.")
    return added & set(once) | {name for name in once if any(part in name for part in others)}


@contextlib.contextmanager
def without_peft(base: Any) -> Iterator[None]:
    """Within the block, the model inside PEFT's wrapper runs without PEFT's changes."""
    wrapper_class = import_peft().utils.other.AuxiliaryTrainingWrapper
    flags = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    with contextlib.ExitStack() as stack:
        if virtual_tokens(base):  # PEFT can switch them off for generating models alone
            for module in base.modules():
                if isinstance(module, wrapper_class) and not module.disable_adapters:
                    module.enable_adapters(False)
                    stack.callback(module.enable_adapters, True)
        else:
            stack.enter_context(base.disable_adapter())
        try:
            yield
        finally:
            stack.close()
            for parameter, is_trained in flags:  # which PEFT has set
                parameter.requires_grad_(is_trained)


def may_add_to_loss(base: nn.Module) -> bool:
    """Whether PEFT's method does more than call the inner model."""
    if not is_peft_model(base) or virtual_tokens(base):
        return False
    tuner: Any = type(base.base_model)
    usual = import_peft().tuners.tuners_utils.BaseTuner.forward
    return tuner.forward is not usual and base.base_model is not inner_model(base)


def _task(model: PreTrainedModel) -> str | None:
    name = type(model).__name__
    for ending, task in _TASKS.items():
        if name.endswith(ending):
            return task
    if not model.can_generate() or model.main_input_name != "input_ids":
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
