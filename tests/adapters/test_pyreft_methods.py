"""Methods and arguments of pyreft's models; numbers are what pyreft returns."""

import logging
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

import reftnoise as rn
from reftnoise._util.errors import warn_once
from support.models.architectures import CONFIGS, tiny_model
from support.models.pyreft_formed import entry


def wrapped(**arguments: Any) -> rn.ReftModel:
    return rn.get_reft_model(tiny_model(), rn.ReftConfig([entry("loreft", layer=1)], **arguments))


def classifier() -> Any:
    config = LlamaConfig(**CONFIGS["llama"], num_labels=3)
    return AutoModelForSequenceClassification.from_config(config)


def test_counts_of_parameters() -> None:
    model = wrapped()
    assert model.count_parameters() == model.count_parameters(include_model=True) == 260
    model = rn.get_reft_model(classifier(), rn.ReftConfig([entry("loreft")]))
    assert [model.count_parameters(include_model=included) for included in (False, True)] == [
        520,
        616,
    ]
    assert model.parameter_counts()[:2] == (520, 96)


def test_device_and_trained_parameters() -> None:
    model = wrapped()
    assert model.get_device() == torch.device("cpu")
    own = list(model.interventions.parameters())
    assert all(a is b for a, b in zip(model.get_trainable_parameters(), own, strict=True))
    model.model.lm_head.weight.requires_grad_(True)
    assert model.get_trainable_parameters()[-1] is model.model.lm_head.weight


def test_gradients_of_the_base() -> None:
    model = wrapped()
    model.enable_model_gradients()
    assert all(p.requires_grad for p in model.model.parameters())
    assert model.model.training
    model.disable_model_gradients()
    assert not any(p.requires_grad for p in model.model.parameters())


def test_gradients_of_the_units(caplog: pytest.LogCaptureFixture) -> None:
    model = wrapped()
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None for p in model.interventions.parameters())
    model.set_zero_grad()
    assert all(p.grad is None for p in model.interventions.parameters())
    model.disable_intervention_gradients()
    assert "does nothing, as in pyreft" in caplog.text
    assert model.count_parameters() == 260
    assert model.get_cached_activations() == {}


def test_arguments_of_the_constructor() -> None:
    config = rn.ReftConfig([entry("loreft")])
    native = {"backend": "native", "as_adaptor": False, "use_fast": True}
    assert rn.ReftModel(config, tiny_model(), **native, intervenables_sort_fn=None)
    with pytest.raises(ValueError, match=r"^backend 'ndif': expected None or 'native'$"):
        rn.ReftModel(config, tiny_model(), backend="ndif")
    with pytest.raises(ValueError, match=r"^as_adaptor True: expected None or False; a unit"):
        rn.ReftModel(config, tiny_model(), as_adaptor=True)
    with pytest.raises(TypeError, match=r"no argument 'backends'; did you mean 'backend'"):
        rn.ReftModel(config, tiny_model(), backends="native")


def test_a_trained_head_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model = rn.get_reft_model(classifier(), rn.ReftConfig([entry("loreft")]))
    assert model.model.score.weight.requires_grad
    message = (
        "score of LlamaForSequenceClassification (96 parameters) is trained with the units: "
        "modules_to_save=[] in the ReftConfig freezes it"
    )
    assert [record.message for record in caplog.records] == [message]
    caplog.clear()
    frozen = rn.ReftConfig([entry("loreft")], modules_to_save=[])
    assert not rn.get_reft_model(classifier(), frozen).model.score.weight.requires_grad
    rn.get_reft_model(classifier(), rn.ReftConfig([], modules_to_save=["score"]))
    wrapped()
    assert not caplog.records


def test_the_config_is_kept_as_reft_config() -> None:
    model = wrapped()
    config = model.reft_config
    model.reft_config = model.config  # what scripts of pyreft do before they set config
    model.config = model.model.config
    assert model.reft_config is config
    with pytest.raises(TypeError, match=r"^reft_config \{\}: expected a ReftConfig$"):
        model.reft_config = {}


def test_a_class_without_a_name_is_said_at_wrapping(caplog: pytest.LogCaptureFixture) -> None:
    class Doubled(rn.ReftIntervention):
        def edit(self, hidden: Any) -> Any:
            return hidden

    warn_once.cache_clear()
    caplog.set_level(logging.WARNING)
    unit = Doubled(embed_dim=32, low_rank_dimension=1)  # a forward of its own would have a name
    rn.get_reft_model(tiny_model(), rn.ReftConfig([{"layer": 1, "intervention": unit}]))
    (record,) = caplog.records
    assert record.message.startswith(
        "this model can be trained, but not saved: Doubled is not registered"
    )
