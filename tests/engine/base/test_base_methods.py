"""What a `ReftModel` does with its base's public attributes, and with other libraries' wrappers."""

from collections.abc import Callable
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

import reftnoise as rn
from reftnoise.engine.base.methods import REFUSED
from support.models.architectures import tiny_model
from support.models.peft_bases import QV

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

LOREFT: dict[str, Any] = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2}
LORA = {"peft_type": "lora", "r": 2, **QV}
PROMPT_TUNING = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
IDS = torch.arange(3, 12)[None]

BASES: list[Any] = [
    PreTrainedModel,
    transformers.LlamaForCausalLM,
    transformers.LlamaForSequenceClassification,
    transformers.T5ForConditionalGeneration,
    transformers.WhisperForConditionalGeneration,
    peft.PeftModel,
    peft.PeftModelForCausalLM,
    peft.PeftModelForSeq2SeqLM,
    peft.PeftModelForSequenceClassification,
    peft.PeftMixedModel,
    peft.LoraModel,
]

# Each was looked at: it tells of the base, or changes it where the next pass sees the change.
FORWARDED = {
    # what the base is
    *("base_model_prefix", "base_model_torch_dtype", "can_generate", "config_class"),
    *("can_record_outputs", "dtype", "dummy_inputs", "generation_config_class", "input_modalities"),
    *("is_backend_compatible", "is_custom_code", "is_gradient_checkpointing", "is_remote_code"),
    *("is_activation_checkpointing", "loss_function", "main_input_name", "model_tags"),
    *("output_modalities", "supports_context_parallel", "supports_gradient_checkpointing"),
    *("supports_pp_plan", "supports_tp_plan", "use_kernels", "get_init_context"),
    *("get_correct_attn_implementation", "get_correct_experts_implementation"),
    "get_experts_implementation",
    # its parts
    *("get_decoder", "get_encoder", "get_input_embeddings", "get_output_embeddings"),
    *("get_parameter_or_buffer", "get_position_embeddings", "named_non_persistent_buffers"),
    *("retrieve_modules_from_names", "get_expanded_tied_weights_keys"),
    # changes of it, which `Engine.follow_base` follows
    *("resize_token_embeddings", "resize_position_embeddings", "set_decoder", "set_encoder"),
    *("set_input_embeddings", "set_output_embeddings", "tie_weights", "init_weights"),
    *("initialize_weights", "mark_tied_weights_as_initialized", "post_init", "add_model_tags"),
    *("set_attn_implementation", "set_experts_implementation", "set_use_kernels"),
    *("freeze_encoder", "freeze_feature_encoder"),
    # how it is trained
    *("activation_checkpointing_disable", "activation_checkpointing_enable"),
    *("gradient_checkpointing_disable", "gradient_checkpointing_enable"),
    *("disable_input_require_grads", "enable_input_require_grads"),
    "warn_if_padding_and_no_attention_mask",
    # where it is
    *("ep_plan", "fsdp_plan", "fsdp_size", "pp_plan", "tp_plan", "tp_size", "init_parallel_plans"),
    *("barrier_after_gathered_checkpoint_save", "is_distributed_loading_by_transformers"),
    *("maybe_distribute_model", "prepare_distribute_model", "should_save_on_this_rank"),
    # helpers of generation, which run nothing but what reads no edits
    *("adjust_generation_fn", "compute_transition_scores", "heal_tokens", "load_custom_generate"),
    *("destroy_cached_continuous_batching_manager", "prepare_inputs_for_generation"),
    *("prepare_decoder_input_ids_from_labels", "detect_language"),
    # PEFT's, of its layers alone
    *("active_peft_config", "get_base_model", "get_layer_status", "get_model_config"),
    *("get_model_status", "get_prompt", "get_prompt_embedding_to_save", "modules_to_save"),
    *("has_active_enabled_adapter", "peft_config", "prefix", "set_modules_to_save"),
    *("prepare_model_for_gradient_checkpointing", "set_requires_grad", "subtract_mutated_init"),
    *("supports_lora_conversion", "target_module_mapping", "tuner_layer_cls"),
    "uses_shared_state",
}


def public(cls: type) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")}


def own() -> set[str]:
    """What a `ReftModel` defines itself."""
    return {
        name for cls in rn.ReftModel.__mro__ if cls not in nn.Module.__mro__ for name in vars(cls)
    }


def wrapped(base: Any = None, **sections: Any) -> rn.ReftModel:
    return rn.get_reft_model(base or tiny_model(), rn.ReftConfig(LOREFT, **sections))


@pytest.mark.parametrize("base", BASES, ids=lambda cls: cls.__name__)
def test_each_attribute_of_a_base_is_forwarded_handled_or_refused(base: type) -> None:
    of_module = public(nn.Module)  # acts on the base and the units alike
    assert public(base) - own() - of_module - set(REFUSED) - FORWARDED == set()
    changed = {
        name for name in of_module if getattr(base, name, None) is not getattr(nn.Module, name)
    }
    if issubclass(base, PreTrainedModel):
        assert changed - own() <= {"train", "eval"}  # which the base's children get by train()


def test_no_attribute_has_two_fates() -> None:
    assert not own() & set(REFUSED)
    assert not FORWARDED & set(REFUSED)
    assert not own() & FORWARDED


@pytest.mark.parametrize("sections", [{}, {"peft": LORA}], ids=["units", "units over LoRA"])
def test_a_refusal_says_what_is_right(sections: dict[str, Any]) -> None:
    model = wrapped(**sections)
    for name in REFUSED:
        with pytest.raises(AttributeError, match=rf"^{name} (would|is) .*(: |use ).*") as raised:
            getattr(model, name)
        assert "\n" not in str(raised.value)
        assert not hasattr(model, name)


def test_merging_keeps_the_units_or_says_how_to_lose_them() -> None:
    model = wrapped(peft=LORA)
    with pytest.raises(AttributeError, match=r"reft_model.model.merge_and_unload\(\)"):
        model.merge_and_unload()
    assert isinstance(model.model.merge_and_unload(), PreTrainedModel)


@pytest.mark.parametrize("sections", [{}, {"peft": LORA}], ids=["units", "units over LoRA"])
def test_settings_of_a_base_reach_it(sections: dict[str, Any]) -> None:
    model = wrapped(**sections)
    model.loss_function = lambda *_, **__: torch.tensor(7.0)
    assert model(input_ids=IDS, labels=IDS).loss == 7


def test_casts_and_sizes_are_of_base_and_units() -> None:
    model = wrapped()
    units = [*model.interventions.parameters(), *model.interventions.buffers()]
    own = sum(tensor.nbytes for tensor in units)
    assert model.get_memory_footprint() == model.model.get_memory_footprint() + own
    for cast, dtype in (("half", torch.float16), ("float", torch.float32)):
        assert getattr(model, cast)() is model
        assert {p.dtype for p in model.parameters()} == {dtype}
    assert {p.dtype for p in model.to(torch.bfloat16).parameters()} == {torch.bfloat16}


def test_what_a_base_refuses_stays_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped()
    model.model.is_quantized = True
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="is not supported for quantized model"):
            cast()
    monkeypatch.setattr(type(model.model), "dequantize", lambda base: base)
    assert model.dequantize() is model


def test_a_models_own_method_does_not_run_edited_layers_without_their_edits() -> None:
    class Chatting(transformers.LlamaForCausalLM):
        def chat(self, ids: torch.Tensor, *, layers: int = 1) -> torch.Tensor:
            """Run the base past its forward."""
            return self.model(input_ids=ids).last_hidden_state if layers else ids

    base = Chatting(tiny_model().config).eval()
    model = wrapped(base)
    message = (
        r"^chat runs layers that units edit, .* call the model itself, or reft_model.model.chat"
    )
    with pytest.raises(ValueError, match=message):
        model.chat(IDS)
    assert torch.equal(model.chat(IDS, layers=0), IDS)
    assert model.chat.__doc__ == base.chat.__doc__
    assert model.model.chat(IDS).shape == (1, 9, 32)
    assert not any(module._forward_pre_hooks for module in base.modules())
    noise = rn.get_reft_model(base, rn.ReftConfig({"intervention": "neftune"}))
    assert noise.chat(IDS).shape == (1, 9, 32)


# -- wrappers of other libraries ---------------------------------------------------------------


def lora() -> Any:
    return peft.LoraConfig(**QV)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "get_peft_model": lambda model: peft.get_peft_model(model, lora()),
    "mixed": lambda model: peft.get_peft_model(model, lora(), mixed=True),
    "inject_adapter_in_model": lambda model: peft.inject_adapter_in_model(lora(), model),
    "LoraModel": lambda model: peft.LoraModel(model, lora(), "default"),
    "IA3": lambda model: peft.get_peft_model(
        model, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    ),
}


@pytest.mark.parametrize("sections", [{}, {"peft": LORA}], ids=["units", "units over LoRA"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.filterwarnings("ignore:.*second time:UserWarning", "ignore:Already found:UserWarning")
def test_a_wrapper_of_peft_is_refused(wrapper: str, sections: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"freeze the units .* peft=\{'peft_type': 'lora'"):
        WRAPPERS[wrapper](wrapped(**sections))


def test_offloaded_units_are_an_error_that_says_what_to_offload() -> None:
    model = accelerate.cpu_offload(wrapped(), execution_device=torch.device("cpu"))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"^the units are offloaded, .*cpu_offload\(base\)"):
            call(input_ids=IDS)


@pytest.mark.parametrize(
    "freeze",
    [
        peft.prepare_model_for_kbit_training,
        lambda model: model.requires_grad_(False),
        lambda model: peft.get_peft_model(model, PROMPT_TUNING),
    ],
    ids=["kbit", "requires_grad_", "prompt tuning"],
)
def test_training_frozen_units_is_mentioned(
    freeze: Callable[[Any], Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "reftnoise.engine.planning.warn_once", lambda logger, text: logger.warning(text)
    )
    model = wrapped().train()
    model(input_ids=IDS, labels=IDS)
    assert "frozen" not in caplog.text
    freeze(model)
    with torch.no_grad():
        model(input_ids=IDS, labels=IDS)
    model.eval()(input_ids=IDS)
    assert "frozen" not in caplog.text
    model.train()(input_ids=IDS, labels=IDS)
    assert "all units are frozen, as by prepare_model_for_kbit_training" in caplog.text


def test_a_trainer_of_frozen_units(tmp_path: Any) -> None:
    model = wrapped()
    peft.prepare_model_for_kbit_training(model)
    trainer = rn.ReftTrainer(model, transformers.TrainingArguments(str(tmp_path), report_to="none"))
    with pytest.raises(
        ValueError, match=r"^nothing is trained: all units are frozen, as by prepare"
    ):
        trainer.train()
