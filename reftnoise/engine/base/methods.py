"""What a base can do by itself that would lose a `ReftModel`'s units, or leave its edits out.

A `ReftModel` has all attributes of its base but these: each says what is right instead.
"""

from types import MethodType
from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

_UNEDITED = "would leave edits out: use generate"
_OF_PEFT = "is PEFT's, for the base alone"
_SECTION = (
    "a peft section of the ReftConfig, such as ReftConfig(…, peft={'peft_type': 'lora', 'r': 8}), "
    "trains, saves and loads PEFT's layers with the units"
)

OTHER_WRAPPER = (
    "PEFT would freeze the units of a ReftModel, and save without them: "
    f"{_SECTION}. The base now has PEFT's layers inside: load it again"
)
"""Why PEFT's wrappers are refused, once they show."""

REFUSED: dict[str, str] = {
    # Continuous batching lays prompts out in a way of its own, in passes that are not ours.
    "generate_batch": _UNEDITED,
    "init_continuous_batching": _UNEDITED,
    "continuous_batching_context_manager": _UNEDITED,
    "generate_with_fallback": _UNEDITED,
    "get_compiled_call": "would leave edits out: use torch.compile(reft_model)",
    # Adapters of PEFT inside the base, which are neither ours nor saved with ours.
    "add_adapter": f"would put layers into the base that are not saved with the units: {_SECTION}",
    "inject_adapter": f"would put layers into the base that are not saved: {_SECTION}",
    "add_weighted_adapter": f"{_OF_PEFT}: load adapters by name and give adapter_names scales",
    "enable_peft_hotswap": f"{_OF_PEFT}: load_adapter and set_adapter switch adapters",
    "active_adapters": f"{_OF_PEFT}: use reft_model.adapters.active",
    "active_adapter": f"{_OF_PEFT}: use reft_model.adapters.active",
    "get_adapter_state_dict": f"{_OF_PEFT}: use state_dict, which holds the adapter alone",
    "get_nb_trainable_parameters": f"{_OF_PEFT}: use parameter_counts",
    "create_or_update_model_card": f"{_OF_PEFT}: save_pretrained writes the card of an adapter",
    "disable_adapter": f"{_OF_PEFT}: the bare base is `with reft_model.disabled():`",
    "disable_adapters": f"{_OF_PEFT}: the bare base is `with reft_model.disabled():`",
    "disable_adapter_layers": f"{_OF_PEFT}: the bare base is `with reft_model.disabled():`",
    "enable_adapters": f"{_OF_PEFT}: use set_adapter('default')",
    "enable_adapter_layers": f"{_OF_PEFT}: use set_adapter('default')",
    "merge_and_unload": "would return the base without the units, which no weights can express: "
    "reft_model.model.merge_and_unload() does so",
    "unload": "would return the base without the units: reft_model.model.unload() does so",
    "merge_adapter": f"{_OF_PEFT}: reft_model.model.merge_adapter() merges what it trains",
    "unmerge_adapter": f"{_OF_PEFT}: use reft_model.model.unmerge_adapter()",
    # What writes a whole model.
    "save_distributed_checkpoint": "would write the base: save_pretrained writes the adapter",
    "gather_sharded_state_dict_for_save": "would gather the base: use "
    "accelerator.get_state_dict(model) and save_pretrained(…, state_dict=…)",
    "register_for_auto_class": "is of the base's class: an adapter has no code to save",
}
"""By name of an attribute, why the base's is not a `ReftModel`'s."""


def may_run_layers(base: PreTrainedModel, name: str, attribute: Any) -> bool:
    """Whether an attribute is a method that a model's class has and models in general have not.

    Such methods, as `get_text_features` or `chat`, may run the base, past its `forward`.
    """
    if name.startswith("_") or not isinstance(attribute, MethodType):
        return False
    is_general = hasattr(PreTrainedModel, name) or hasattr(GenerationMixin, name)
    return attribute.__self__ is base and not is_general


def keep_differentiable(base: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for a kernel without a backward pass.

    It does so on CPUs with AVX512-BF16 when a layer is first evaluated, and leaves them packed for
    training. Weights that are packed already are unpacked.
    """
    for module in base.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # of no tensor
            module.state_dict()  # unpacks in place, so that the file is the same on every CPU
