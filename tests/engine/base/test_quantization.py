"""Bases with quantised weights, against the same base with its weights dequantised.

`make test-quantised` runs these: torchao prints when transformers is imported, so that the default
environment does not have it.
"""

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AwqConfig,
    BitsAndBytesConfig,
    GPTQConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

import reftnoise as rn
from reftnoise._util.options import read_file
from reftnoise.engine.training_pass.probe import one_of_each_kind
from reftnoise.training.recipe import Recipe

NEEDS = "needs {}: pip install 'reftnoise[quantised]'"
bnb = pytest.importorskip("bitsandbytes", reason=NEEDS.format("bitsandbytes"))
quantization = pytest.importorskip("torchao.quantization", reason=NEEDS.format("torchao"))

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of these libraries
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

LOREFT = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4, "positions": "l2"}
GROUP = 32


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def torchao_int4(_: torch.dtype) -> TorchAoConfig:
    granularity = quantization.PerGroup(GROUP)
    return TorchAoConfig(
        quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)
    )


KINDS: dict[str, Callable[[torch.dtype], Any]] = {
    "bitsandbytes int8": lambda _: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes nf4": four_bits,
    "torchao int8": lambda _: TorchAoConfig(quantization.Int8WeightOnlyConfig()),
    "torchao int4": torchao_int4,
    "torchao float8": lambda _: TorchAoConfig(quantization.Float8WeightOnlyConfig()),
}
# int8 of bitsandbytes quantises activations, too: gradients differ by that, at random signs.
TOLERANCE = {"bitsandbytes int8": 0.1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    path = tmp_path_factory.mktemp("base")
    model.save_pretrained(path)
    return path


def load(path: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    settings = {"quantization_config": KINDS[kind](dtype), "dtype": dtype}
    return AutoModelForCausalLM.from_pretrained(path, **settings).eval()


def dequantised(path: Path, quantised: Any, dtype: torch.dtype) -> Any:
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    modules = dict(quantised.named_modules())
    for name, layer in plain.named_modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = values(modules[name]).to(dtype)
    return plain


def values(layer: Any) -> Tensor:
    weight = layer.weight
    if isinstance(weight, bnb.nn.Params4bit):
        state = copy.deepcopy(weight.quant_state)
        return bnb.functional.dequantize_4bit(weight.data.clone(), state)
    if isinstance(weight, bnb.nn.Int8Params):
        scale = weight.SCB if weight.SCB is not None else layer.state.SCB
        return weight.data.float() * scale[:, None] / 127
    if type(weight) is nn.Parameter:
        return weight.data
    return weight.dequantize()


def weights(base: Any) -> dict[str, Tensor]:
    layers = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    return {name: values(layer).clone() for name, layer in layers.items()}


def wrapped(base: Any, **changes: Any) -> rn.ReftModel:
    torch.manual_seed(1)
    return rn.get_reft_model(base, rn.ReftConfig(LOREFT | changes))


def batch() -> dict[str, Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(3, 101, (2, 12))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(12) < 8, -100)}


def gradients(model: rn.ReftModel, split: Any) -> tuple[Tensor, Tensor]:
    model.split = split
    model.zero_grad()
    loss = model(**batch()).loss
    loss.backward()
    found = [p.grad.flatten().float() for p in model.interventions.parameters()]
    return loss.detach(), torch.cat(found)


def trained_losses(model: rn.ReftModel, parameters: Iterable[Tensor]) -> list[float]:
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_loss_and_gradients_are_those_of_the_dequantised_base(
    kind: str, training: bool, saved: Path
) -> None:
    quantised = load(saved, kind)
    plain = wrapped(dequantised(saved, quantised, torch.float32)).train(training)
    model = wrapped(quantised).train(training)
    tolerance = TOLERANCE.get(kind, 1e-4)
    expected_loss, expected = gradients(plain, "never")
    for split in ("never", "always"):
        loss, found = gradients(model, split)
        assert abs(loss - expected_loss) < tolerance * expected_loss
        assert distance(found, expected) < tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainer_class", [Trainer, rn.ReftTrainer])
def test_training_moves_the_units_and_nothing_else(
    kind: str, trainer_class: type[Trainer], saved: Path, tmp_path: Path
) -> None:
    model = wrapped(load(saved, kind))
    kinds = {p.dtype for p in model.interventions.parameters()}
    assert kinds == {torch.float32}
    before = weights(model.model)
    rows = [
        {"input_ids": ids, "labels": labels} for ids, labels in zip(*batch().values(), strict=True)
    ]
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=12,
        learning_rate=2e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = trainer_class(model=model, args=args, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    after = weights(model.model)
    assert len(before) == 3 * 7 + 1
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())

    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = rn.ReftModel.from_pretrained(load(saved, kind), tmp_path / "adapter")
    ids = batch()["input_ids"]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(ids)
    generated = model.generate(input_ids=ids, attention_mask=mask, **settings)
    assert torch.equal(loaded.generate(input_ids=ids, attention_mask=mask, **settings), generated)
    with model.disabled():
        bare = model.generate(input_ids=ids, attention_mask=mask, **settings)
    assert not torch.equal(bare, generated)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_units_keep_their_dtype_on_a_bf16_base(kind: str, dtype: str, saved: Path) -> None:
    model = wrapped(load(saved, kind, torch.bfloat16), dtype=dtype).train()
    raw = "rotate_layer.weight"  # X of R is never narrower than fp32
    found = {p.dtype for n, p in model.interventions.named_parameters() if not n.endswith(raw)}
    assert found == {getattr(torch, dtype)}
    _, gradient = gradients(model, "auto")
    assert gradient.isfinite().all()
    assert gradient.any()
    assert model(**batch()).logits.dtype == torch.bfloat16


def test_lora_and_units_on_four_bits(saved: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'reftnoise[peft]'")
    base = peft.prepare_model_for_kbit_training(
        load(saved, "bitsandbytes nf4"), use_gradient_checkpointing=False
    )
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = wrapped(peft.get_peft_model(base, lora)).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum("lora_" in name for name in trained) == 12
    losses = trained_losses(model, trained.values())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None and p.grad.any() for n, p in trained.items() if "lora_B" in n)


def test_qlora_is_its_recipe(saved: Path, tmp_path: Path) -> None:
    """Trained, saved and loaded on a fresh base in 4 bits: the same logits."""
    path = Path(__file__).parents[3] / "examples" / "recipes" / "qlora.yaml"
    recipe = read_file(Recipe, path)
    assert recipe.peft is not None

    def base() -> Any:
        settings = {"dtype": torch.bfloat16, "quantization_config": recipe.quantization}
        return AutoModelForCausalLM.from_pretrained(saved, **settings)

    model = rn.get_reft_model(base(), rn.ReftConfig([], peft=recipe.peft | {"r": 4})).train()
    losses = trained_losses(model, [p for p in model.parameters() if p.requires_grad])
    assert losses[-1] < 0.8 * losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(base(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


class Inference(nn.Linear):
    """A linear layer as kernels for inference are: gradients do not pass it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = nn.Parameter((layer.weight * 8).to(torch.int8), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden.detach() @ self.weight.T.float() / 8).to(hidden.dtype)


def test_kernels_without_a_backward_pass_are_an_error(saved: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(saved)
    layer = base.model.layers[1].mlp
    layer.up_proj = Inference(layer.up_proj)
    assert [name for name, _ in one_of_each_kind(base)] == ["model.layers.1.mlp.up_proj"]
    model = wrapped(base).train()
    message = r"^model\.layers\.1\.mlp\.up_proj: the backward pass of this Inference of Parameter"
    with pytest.raises(ValueError, match=message):
        model(**batch())


# -- checkpoints of GPTQ and AWQ, written by their formats -----------------------------------------


def grouped(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """4-bit integers [in, out], scales and zeros per group, and what they stand for."""
    columns = weight.T.float()
    groups = columns.reshape(-1, GROUP, columns.shape[1])
    scale = ((groups.amax(1) - groups.amin(1)) / 15).half()
    zero = (-groups.amin(1) / scale.float()).round().clamp(1, 15).int()
    integers = (groups / scale[:, None].float() + zero[:, None]).round().clamp(0, 15).int()
    meant = ((integers - zero[:, None]) * scale[:, None].float()).reshape(columns.shape).T
    return integers.reshape(columns.shape), scale, zero, meant


def pack(values: Tensor, dim: int, order: Any = range(8)) -> Tensor:
    values = values.movedim(dim, -1)
    values = values.reshape(*values.shape[:-1], -1, 8)
    packed = torch.zeros(values.shape[:-1], dtype=torch.int64)
    for place, index in enumerate(order):
        packed |= values[..., index].long() << (4 * place)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).int()
    return packed.movedim(-1, dim).contiguous()


def checkpoint(method: str, saved: Path, output: Path) -> Any:
    """Write a checkpoint; returns the base that it stands for."""
    plain = AutoModelForCausalLM.from_pretrained(saved)
    plain.save_pretrained(output)
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(output / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        path = name.removesuffix("weight")
        integers, scale, zero, meant = grouped(weight)
        plain.get_submodule(path[:-1]).weight.data = meant
        tensors[f"{path}scales"] = scale
        if method == "gptq":
            tensors[f"{path}qweight"] = pack(integers, 0)
            tensors[f"{path}qzeros"] = pack(zero - 1, 1)
            tensors[f"{path}g_idx"] = (torch.arange(weight.shape[1]) // GROUP).int()
        else:
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            tensors[f"{path}qweight"] = pack(integers, 1, order)
            tensors[f"{path}qzeros"] = pack(zero, 1, order)
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    config = json.loads((output / "config.json").read_text())
    common = {"quant_method": method, "bits": 4, "group_size": GROUP}
    config["quantization_config"] = common | (
        {"desc_act": False, "sym": False, "checkpoint_format": "gptq"}
        if method == "gptq"
        else {"zero_point": True, "version": "gemm"}
    )
    (output / "config.json").write_text(json.dumps(config))
    return plain


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_checkpoints_train_as_what_they_stand_for(method: str, saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel", reason="needs gptqmodel, which transformers loads both by")
    plain = checkpoint(method, saved, tmp_path)
    settings = (
        GPTQConfig(bits=4, backend="torch") if method == "gptq" else AwqConfig(backend="torch_awq")
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    expected_loss, expected = gradients(wrapped(plain).train(), "never")
    for split in ("never", "always"):
        loss, found = gradients(wrapped(base).train(), split)
        assert abs(loss - expected_loss) < 1e-2 * expected_loss
        assert distance(found, expected) < 1e-2
