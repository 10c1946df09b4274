"""A base of which accelerate keeps parts elsewhere, in memory or on a disk, computes as ever."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

import reftnoise as rn
from reftnoise.engine.base.sharding import device_of
from reftnoise.engine.base.tiny import DIRECTORY
from support.models.architectures import tiny_model

PARTS = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    special = {n: getattr(tokenizer, n) for n in ("pad_token_id", "bos_token_id", "eos_token_id")}
    tiny_model(vocab_size=len(tokenizer), **special).save_pretrained(folder)
    return folder


def mapped(saved: Path, folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(saved, device_map=PARTS, offload_folder=folder)
    assert {p.device.type for p in model.parameters()} == {"cpu", "meta"}
    return model


def mapped_automatically(saved: Path, folder: Path) -> Any:
    memory = {"cpu": 450_000}  # of 570,000 bytes
    model = AutoModelForCausalLM.from_pretrained(
        saved, device_map="auto", max_memory=memory, offload_folder=folder
    )
    assert "disk" in model.hf_device_map.values()
    return model


def in_cpu_memory(saved: Path, _: Path) -> Any:
    return cpu_offload(AutoModelForCausalLM.from_pretrained(saved), CPU)


def on_disk(saved: Path, folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(saved)
    disk_offload(model, str(folder), CPU)
    return model


WAYS = [mapped, mapped_automatically, in_cpu_memory, on_disk]
Way = Callable[[Path, Path], Any]


def wrapped(base: Any, **entry: Any) -> rn.ReftModel:
    set_seed(1)
    loreft = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4} | entry
    return rn.get_reft_model(base, rn.ReftConfig([loreft, {"intervention": "neftune"}]))


def batch() -> dict[str, Tensor]:
    tokens = torch.arange(3, 75).view(3, 24)
    mask = torch.ones_like(tokens)
    mask[1, 20:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, :16] = -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def step(model: rn.ReftModel) -> list[Any]:
    """Loss and gradients of one training pass."""
    model.train()
    set_seed(2)
    loss = model(**batch()).loss
    loss.backward()
    return [loss.detach(), *[p.grad for p in model.interventions.parameters()]]


@pytest.mark.parametrize("positions", ["l1", "f1+l1"])
@pytest.mark.parametrize("way", WAYS)
def test_training_evaluation_and_generation(
    way: Way, positions: str, saved: Path, tmp_path: Path
) -> None:
    model = wrapped(way(saved, tmp_path), positions=positions)
    plain = wrapped(AutoModelForCausalLM.from_pretrained(saved), positions=positions)
    torch.testing.assert_close(step(model), step(plain), rtol=0, atol=1e-6)
    model.eval(), plain.eval()
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(model(**batch()).loss, plain(**batch()).loss)
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    prompt = inputs["input_ids"][:1]
    tokens = [m.generate(prompt, max_new_tokens=6, do_sample=False) for m in (model, plain)]
    assert torch.equal(*tokens)
    model.save_pretrained(tmp_path / "adapter")
    loaded = rn.ReftModel.from_pretrained(way(saved, tmp_path / "again"), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_what_a_call_chooses(way: Way, saved: Path, tmp_path: Path) -> None:
    plain = wrapped(AutoModelForCausalLM.from_pretrained(saved)).eval()
    set_seed(3)
    for parameter in plain.interventions.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    plain.save_pretrained(tmp_path / "adapter")
    model = rn.ReftModel.from_pretrained(way(saved, tmp_path / "parts"), tmp_path / "adapter")
    assert model.device == model.get_device() == CPU
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    for adapted in (model, plain):
        adapted.load_adapter(tmp_path / "adapter", "other")
    for choice in (
        {"unit_locations": {"sources->base": (None, [[[3], [5], [7]]] * 3)}},
        {"subspaces": [[0, 1], [2], [3]]},
        {"adapter_names": ["other", None, ["default", "other"]]},
    ):
        assert torch.equal(model(**inputs, **choice).logits, plain(**inputs, **choice).logits)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
@pytest.mark.parametrize("is_reentrant", [False, True])
def test_weights_that_come_again_for_the_backward_pass(
    is_reentrant: bool, saved: Path, tmp_path: Path
) -> None:
    plain = wrapped(AutoModelForCausalLM.from_pretrained(saved))
    model = wrapped(mapped(saved, tmp_path))
    model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
    torch.testing.assert_close(step(model), step(plain), rtol=0, atol=1e-6)


def test_an_offloaded_base_runs_plain_passes(saved: Path, tmp_path: Path) -> None:
    model = wrapped(mapped(saved, tmp_path), positions="l1")
    model.split = "always"
    with pytest.raises(ValueError, match="the base's forward was replaced on the instance"):
        step(model)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_a_trainer(saved: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    weights = []
    for base in (mapped(saved, tmp_path), AutoModelForCausalLM.from_pretrained(saved)):
        model = wrapped(base)
        data = rn.make_last_position_supervised_data_module(
            tokenizer, model, ["Where does a fish live?", "What is it?"], ["🐟", "🌊🌊"]
        )
        args = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            max_steps=3,
            optim="sgd",
            learning_rate=0.1,
            save_steps=3,
            report_to="none",
            disable_tqdm=True,
        )
        rn.ReftTrainer(model=model, args=args, **data).train()
        weights.append(list(model.interventions.parameters()))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("component", ["block_output", "attention_output", "mlp_output"])
def test_units_are_where_their_sites_compute(
    component: str, way: Way, saved: Path, tmp_path: Path
) -> None:
    base = way(saved, tmp_path)
    model = wrapped(base, layer=0, component=component)
    assert {p.device for p in model.interventions.parameters()} == {CPU}
    for module in base.modules():  # there is no other device here that a site could compute on
        hook = getattr(module, "_hf_hook", None)
        if isinstance(hook, AlignDevicesHook) and hook.execution_device is not None:
            hook.execution_device = torch.device("meta")
    model.set_device(None)
    is_offloaded = next(base.model.layers[0].parameters()).is_meta
    expected = torch.device("meta") if is_offloaded else CPU
    assert {p.device for p in model.interventions.parameters()} == {expected}


def test_the_device_of_modules_that_do_not_tell_all() -> None:
    assert device_of(torch.nn.Dropout()) is None
    offloaded = torch.nn.Linear(2, 2, device="meta")
    assert device_of(offloaded) is None
    offloaded._hf_hook = SequentialHook(ModelHook(), AlignDevicesHook(execution_device="cpu"))
    assert device_of(offloaded) == CPU
