"""Ways in which edits or weights were lost, or put elsewhere, without a word."""

import copy
import re
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import reftnoise as rn
from reftnoise.engine.layout import Batch
from reftnoise.engine.training_pass.pairs import in_pairs
from support.models import tiny_models
from support.models.architectures import tiny_model
from support.models.peft_bases import QV, classifier, seq2seq
from support.tolerance import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

LOREFT = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2, "positions": "f1+l1"}
LOBIREFT = {"layer": 0, "intervention": "lobireft", "low_rank_dimension": 2}
LORA = {"peft_type": "lora", "r": 4, **QV}
IDS = torch.arange(3, 12)[None]


def perturbed(model: rn.ReftModel, seed: int = 0) -> rn.ReftModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def edited_columns(model: rn.ReftModel, inputs: dict[str, Tensor], stack: str) -> list[int]:
    seen: list[Tensor] = []
    layer = getattr(model.model.get_base_model(), stack).block[0]
    hook = layer.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    with torch.no_grad():
        model(**inputs)
        model.model(**inputs)
    hook.remove()
    return ((seen[0] - seen[1]).abs().amax((0, 2)) > 1e-6).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("kind", ["prefix_tuning", "prompt_tuning", "p_tuning"])
@pytest.mark.parametrize(
    ("positions", "of_encoder"), [("f1", [0]), ("l1", [5]), ("all", list(range(6)))]
)
def test_virtual_tokens_of_an_encoder_decoder_model_are_no_positions(
    kind: str, positions: str, of_encoder: list[int]
) -> None:
    ids = torch.arange(2, 14).view(2, 6)
    labels = torch.arange(2, 10).view(2, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    section = {"peft_type": kind, "num_virtual_tokens": 3}
    section |= {"encoder_hidden_size": 8} if kind == "p_tuning" else {}
    ahead = 0 if kind == "prefix_tuning" else 3
    for stack, expected in (("encoder", [ahead + c for c in of_encoder]), ("decoder", [0])):
        entry = LOBIREFT | {"positions": positions, "component": f"{stack}.block_output"}
        model = rn.get_reft_model(seq2seq(), rn.ReftConfig(entry, peft=section)).eval()
        assert edited_columns(model, inputs, stack) == expected


def test_every_part_of_long_speech_is_edited() -> None:
    base = copy.deepcopy(tiny_models.model_of("whisper"))
    settings = {
        "no_timestamps_token_id": 60,
        "is_multilingual": True,
        "lang_to_id": {"<|en|>": 50},
        "task_to_id": {"transcribe": 55},
        "max_initial_timestamp_index": 5,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "decoder_start_token_id": 1,
    }
    for name, value in settings.items():
        setattr(base.generation_config, name, value)
    entry = LOBIREFT | {"layer": "all", "positions": "all"}
    model = rn.get_reft_model(base, rn.ReftConfig(entry)).eval()
    sums: list[float] = []
    base.model.encoder.layers[0].register_forward_hook(
        lambda _, __, output: sums.append(
            float((output[0] if isinstance(output, tuple) else output).abs().sum())
        )
    )
    torch.manual_seed(0)
    speech = {"input_features": torch.randn(1, 8, 40), "attention_mask": torch.ones(1, 40)}
    options = {"max_new_tokens": 3, "language": "en", "task": "transcribe"}
    model.generate(**speech, **options, return_timestamps=True)
    parts = len(sums)
    with model.disabled():
        model.generate(**speech, **options, return_timestamps=True)
    assert parts > 1
    assert all(abs(a - b) > 1e-3 for a, b in zip(sums[:parts], sums[parts:], strict=False))


@pytest.mark.parametrize("section", [None, LORA])
def test_a_thread_with_the_bare_base_changes_no_others(section: dict[str, Any] | None) -> None:
    base = tiny_model()
    model = perturbed(rn.get_reft_model(base, rn.ReftConfig(LOREFT, peft=section)))
    other = model if section else rn.get_reft_model(base, rn.ReftConfig(LOREFT)).eval()
    expected, stop = logits(model), threading.Event()

    def run_bare() -> None:
        while not stop.is_set():
            with torch.no_grad(), other._bare() as bare:
                bare(IDS)

    thread = threading.Thread(target=run_bare)
    thread.start()
    try:
        assert all(torch.allclose(logits(model), expected, atol=1e-4) for _ in range(100))
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    "section", [None, LORA, {"peft_type": "prompt_tuning", "num_virtual_tokens": 2}]
)
def test_what_was_trained_is_saved_again_and_when_frozen(
    section: dict[str, Any] | None, tmp_path: Path
) -> None:
    config = rn.ReftConfig(LOREFT, peft=section, modules_to_save=["lm_head"])
    model = perturbed(rn.get_reft_model(tiny_model(), config))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    expected = logits(model)
    model.save_pretrained(tmp_path / "first")
    again = rn.ReftModel.from_pretrained(tiny_model(), tmp_path / "first")
    assert [name for name, p in again.named_parameters() if p.requires_grad] == trained
    again.requires_grad_(False)
    again.save_pretrained(tmp_path / "second")
    assert torch.equal(
        logits(rn.ReftModel.from_pretrained(tiny_model(), tmp_path / "second")), expected
    )


def test_a_base_takes_one_section() -> None:
    base = tiny_model()
    rn.get_reft_model(base, rn.ReftConfig(LOREFT, peft=LORA))
    for section in (LORA, None):
        with pytest.raises(ValueError, match="the model has an adapter of PEFT inside already"):
            rn.get_reft_model(base, rn.ReftConfig(LOREFT, peft=section))


def test_adapters_of_other_names_are_refused() -> None:
    base = peft.get_peft_model(tiny_model(), peft.LoraConfig(**QV), adapter_name="mine")
    with pytest.raises(ValueError, match="has the adapters mine: to be trained and saved"):
        rn.get_reft_model(base, rn.ReftConfig(LOREFT))


def test_a_merged_model_does_not_save_an_empty_section(tmp_path: Path) -> None:
    model = rn.get_reft_model(tiny_model(), rn.ReftConfig(LOREFT, peft=LORA))
    model.model.merge_and_unload()
    with pytest.raises(ValueError, match="was it merged or unloaded"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_positions_that_all_packed_rows_share() -> None:
    model = perturbed(rn.get_reft_model(tiny_model(), rn.ReftConfig(LOREFT)))
    ids = torch.randint(3, 101, (2, 10))
    one = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    found = [
        model(input_ids=ids, position_ids=positions, use_cache=False).logits
        for positions in (one, one.expand(2, -1))
    ]
    assert torch.equal(*found)


def test_lora_moves_no_noise_to_images() -> None:
    inputs = tiny_models.examples_of("llava")[0]
    found = []
    for section in (None, {"peft_type": "lora", "r": 2, "target_modules": ["q_proj"]}):
        config = rn.ReftConfig([{"intervention": "neftune", "alpha": 50.0}], peft=section)
        model = rn.get_reft_model(copy.deepcopy(tiny_models.model_of("llava")), config).train()
        inner = model.model if section is None else model.model.get_base_model()
        seen: list[Tensor] = []
        inner.model.language_model.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(
                args[0] if args else kwargs["hidden_states"]
            ),
            with_kwargs=True,
        )
        model(**inputs)
        model.eval()(**inputs)
        found.append(((seen[0] - seen[1]).abs().amax((0, 2)) > 1e-6).tolist())
    assert found[0] == found[1]
    assert set(found[0]) == {True, False}


def test_disabled_leaves_what_is_trained_as_it_was() -> None:
    model = rn.get_reft_model(tiny_model(), rn.ReftConfig(LOREFT, peft=LORA))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with model.disabled():
        model(IDS)
    assert [p.requires_grad for p in model.parameters()] == before


def test_dotted_paths_are_the_bases_own_under_peft(tmp_path: Path) -> None:
    entry = {"component": "model.layers[1].mlp.output", "intervention": "lobireft"}
    config = rn.ReftConfig(entry | {"low_rank_dimension": 2, "positions": "all"}, peft=LORA)
    model = perturbed(rn.get_reft_model(tiny_model(), config))
    assert not torch.equal(logits(model), logits(model.model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(rn.ReftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))


def test_missing_arguments_of_peft_are_one_line() -> None:
    config = rn.ReftConfig(LOREFT, peft={"peft_type": "prompt_tuning"})
    with pytest.raises(ValueError, match=r"^peft prompt_tuning: "):
        rn.get_reft_model(tiny_model(), config)


def test_a_section_that_leaves_out_what_the_model_has() -> None:
    base = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, lora_alpha=64, **QV))
    with pytest.raises(ValueError, match=r"peft: the config has lora_alpha None, the given .* 64"):
        rn.get_reft_model(base, rn.ReftConfig(LOREFT, peft=LORA))


@pytest.mark.parametrize(
    ("layer", "trained", "message"),
    [
        (99, None, "layer 99: the model has layers 0 to 2"),
        (0, ["nrm"], "modules_to_save 'nrm': the model has no such module; did you mean 'norm'?"),
    ],
)
def test_a_config_that_does_not_fit_leaves_the_base_as_it_was(
    layer: int, trained: list[str] | None, message: str
) -> None:
    base = tiny_model()
    config = rn.ReftConfig(LOREFT | {"layer": layer}, peft=LORA, modules_to_save=trained)
    with pytest.raises(ValueError, match=re.escape(message)):
        rn.get_reft_model(base, config)
    assert not hasattr(base, "peft_config")
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_states_do_not_tell_how_many_tokens_they_are_of() -> None:
    base = copy.deepcopy(tiny_models.model_of("mamba"))
    model = rn.get_reft_model(base, rn.ReftConfig(LOREFT)).eval()
    cache = base(input_ids=IDS, use_cache=True).cache_params
    with pytest.raises(ValueError, match="cache_params hold states, which do not tell"):
        model(input_ids=IDS[:, :1], cache_params=cache)


def test_symnoise_with_places_on_several_axes() -> None:
    ids = torch.arange(8).view(2, 4)
    places = torch.arange(24).view(3, 2, 4)
    inputs = {"position_ids": places, "input_ids": ids, "labels": ids}
    doubled = in_pairs(Batch.of(inputs)).inputs
    assert torch.equal(doubled["position_ids"], torch.cat([places, places], 1))
    assert torch.equal(doubled["input_ids"], torch.cat([ids, ids]))


def test_a_frozen_peft_model_stays_out_of_the_adapter(tmp_path: Path) -> None:
    base = peft.get_peft_model(tiny_model(), peft.LoraConfig(**QV)).requires_grad_(False)
    model = rn.get_reft_model(base, rn.ReftConfig(LOREFT))
    assert not any("lora" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    merged = base.merge_and_unload()
    loaded = rn.ReftModel.from_pretrained(merged, tmp_path)
    assert_close(logits(loaded), logits(model))


def test_one_copy_of_a_head_is_trained_and_it_is_saved(tmp_path: Path) -> None:
    section = {"peft_type": "lora", "r": 2, "modules_to_save": ["classifier"]}
    config = rn.ReftConfig(
        LOREFT | {"positions": "f1"}, peft=section, modules_to_save=["classifier"]
    )
    model = perturbed(rn.get_reft_model(classifier(), config))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not [name for name in trained if "original_module" in name]
    assert any(".classifier.modules_to_save." in name for name in trained)
    model.requires_grad_(False)
    model.save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(classifier(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == trained
