"""PEFT's methods under units, in one config."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

import reftnoise as rn
from reftnoise.engine.training_pass.runner import ForwardPasses
from support.models.architectures import tiny_model
from support.models.peft_bases import QV, classifier, seq2seq
from support.tolerance import assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),  # peft's calls
    pytest.mark.filterwarnings("ignore:.*Position ids are not supported.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Failed to load the CUDA extension:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type .*RMSNorm:UserWarning"),
]

ALL = {"r": 4, "target_modules": ["q_proj", "o_proj"]}  # layers of one shape, which VeRA shares
SECTIONS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, **QV},
    "dora": {"peft_type": "lora", "use_dora": True, "r": 4, **QV},
    "adalora": {"init_r": 4, "target_r": 2, "total_step": 20, "tinit": 2, "deltaT": 2, **QV},
    "ia3": {
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "prefix_tuning": {"num_virtual_tokens": 4},
    "prompt_tuning": {"num_virtual_tokens": 4},
    "p_tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 2, "task_type": "CAUSAL_LM"},
    "vera": ALL,
    "randlora": ALL,
    "vblora": {"r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2, **QV},
    "boft": {"boft_block_size": 4, **QV},
    "oft": {"oft_block_size": 4, **QV},
    "ln_tuning": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "loha": {"r": 2, **QV},
    "lokr": {"r": 2, **QV},
    "hra": {"r": 2, **QV},
    "fourierft": {"n_frequency": 10, **QV},
}
PARALLEL = {"layer": "all", "component": "mlp_parallel"} | {
    "intervention": "adapter",
    "low_rank_dimension": 4,
    "act_fn": "relu",
}
"""With prefix tuning, this is the MAM adapter (arXiv:2110.04366)."""
LINEAR = PARALLEL | {"component": "query_parallel", "act_fn": None, "gate": "probe"}
"""LoRA behind a gate, as in UniPELT (arXiv:2110.07577)."""
VIRTUAL = ["prefix_tuning", "prompt_tuning", "p_tuning"]
LOREFT = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2, "positions": "f1+l1"}


def section(name: str) -> dict[str, Any]:
    return {"peft_type": name} | SECTIONS[name]


def composed(name: str, *entries: dict[str, Any], base: Any = None) -> rn.ReftModel:
    torch.manual_seed(1)
    config = rn.ReftConfig(list(entries) or [LOREFT], peft=section(name))
    return rn.get_reft_model(base or tiny_model(), config)


def batch() -> dict[str, Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(3, 101, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0  # at the right: PEFT puts virtual tokens before padding at the left
    labels = ids.masked_fill((torch.arange(9) < 4) | (mask == 0), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(model: rn.ReftModel, steps: int = 6) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        if hasattr(model.model.base_model, "update_and_allocate"):  # AdaLoRA's schedule of ranks
            model.model.base_model.update_and_allocate(step)
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        *((name, LOREFT) for name in SECTIONS),
        ("prefix_tuning", PARALLEL),
        ("prefix_tuning", LINEAR),
    ],
)
def test_a_method_trains_saves_and_loads_with_the_units(
    name: str, unit: dict[str, Any], tmp_path: Path
) -> None:
    model = composed(name, unit, {"intervention": "symnoise", "alpha": 1.0})
    expected = {n: p.clone() for n, p in tiny_model().named_parameters()}
    losses = train(model)
    assert losses[-1] < losses[0]
    named = dict(model.named_parameters())
    trained = [n for n, p in named.items() if p.requires_grad]
    of_peft = [n for n in trained if n.startswith("model.")]
    assert of_peft
    assert all(named[n].grad is not None for n in trained)
    assert any(named[n].grad.any() for n in of_peft)

    model.save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path)
    assert loaded.reft_config == model.reft_config
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == trained
    inputs = batch()
    with torch.no_grad():
        output = model(**inputs)
        again = loaded(**inputs)
        with model.disabled():
            bare = model(**inputs).loss
        assert torch.equal(output.loss, again.loss)
        assert torch.equal(output.logits, again.logits)
        assert torch.equal(bare, tiny_model()(**inputs).loss)
        assert output.loss != bare
    frozen = dict(loaded.model.get_base_model().named_parameters())
    for path, value in expected.items():  # a wrapped layer keeps its weight in `base_layer`
        head, _, leaf = path.rpartition(".")
        found = frozen.get(path, frozen.get(f"{head}.base_layer.{leaf}"))
        if found is not None:
            assert torch.equal(found, value)


@pytest.mark.parametrize("name", ["lora", "adalora", *VIRTUAL])
@torch.no_grad()
def test_generation_is_teacher_forcing(name: str) -> None:
    model = composed(name)
    for parameter in model.interventions.parameters():
        parameter.mul_(4)
    model.eval()
    prompt = batch()["input_ids"][:, :6]
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    found = model.generate(input_ids=prompt, attention_mask=mask, **settings)
    ids = prompt
    for _ in range(5):
        lengths = torch.full((3,), 6)
        logits = model(input_ids=ids, prompt_lengths=lengths).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found[:, -5:], ids[:, -5:])


@pytest.mark.parametrize("name", VIRTUAL)
@pytest.mark.parametrize("positions", ["f1+l1", "all", "l2", "f2", [1, -2]])
@torch.no_grad()
def test_positions_count_the_users_tokens(name: str, positions: Any) -> None:
    """Against the same edit put by hand at the right columns behind the virtual tokens."""
    entry = {"layer": 1, "intervention": "lobireft", "low_rank_dimension": 2}
    model = composed(name, entry | {"positions": positions}).eval()
    ids = batch()["input_ids"]
    (unit,) = model.interventions.values()
    delta = unit.delta(torch.zeros(1, 32))[0]
    ahead = 0 if name == "prefix_tuning" else 4
    chosen = {"f1+l1": [0, -1], "all": range(9), "l2": [-2, -1], "f2": [0, 1]}
    columns = positions if isinstance(positions, list) else chosen[positions]
    added = torch.zeros(ahead + 9, 32)
    for column in columns:
        added[ahead + column % 9] = delta

    layer = model.model.get_base_model().model.layers[1]
    hook = layer.register_forward_hook(lambda *call: call[2] + added)
    expected = model.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    hook.remove()
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_masks_of_4_dimensions_have_no_columns_for_virtual_tokens() -> None:
    model, ids = composed("prefix_tuning", LOREFT).eval(), batch()["input_ids"]
    mask = torch.ones(len(ids), 1, ids.shape[1], ids.shape[1]).tril().bool()
    with pytest.raises(ValueError, match="attention_mask of 4 dimensions: PEFT puts"):
        model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens_stay_without_noise(name: str) -> None:
    model = composed(name, {"intervention": "neftune", "alpha": 50.0}).train()
    plain = composed(name, LOREFT).model.train()
    plain.load_state_dict(model.model.state_dict())
    seen: list[Tensor] = []
    for base in (model.model.get_base_model(), plain.get_base_model()):
        base.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs = batch()
    model(**inputs)
    plain(**inputs)
    noise = seen[0] - seen[1]
    ahead = 0 if name == "prefix_tuning" else 4
    assert not noise[:, :ahead].any()
    attended = inputs["attention_mask"].bool()
    assert noise[:, ahead:][attended].all(-1).all()
    assert not noise[:, ahead:][~attended].any()


def test_a_ready_peft_model_is_the_same_as_its_section(tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **QV)
    model = rn.get_reft_model(peft.get_peft_model(tiny_model(), lora), rn.ReftConfig(LOREFT))
    assert model.reft_config.peft == {
        "peft_type": "lora",
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    train(model)
    model.save_pretrained(tmp_path)
    ready = peft.get_peft_model(tiny_model(), lora)
    for base in (tiny_model(), ready):
        loaded = rn.ReftModel.from_pretrained(base, tmp_path)
        assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)
    other = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **QV))
    message = "peft: the config has r 4, the given PeftModel 2"
    with pytest.raises(ValueError, match=re.escape(message)):
        rn.ReftModel.from_pretrained(other, tmp_path)


def test_a_frozen_peft_model_is_a_base_like_any_other(tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=4, init_lora_weights=False, **QV)
    base = peft.get_peft_model(tiny_model(), lora).requires_grad_(False)
    model = rn.get_reft_model(base, rn.ReftConfig(LOREFT))
    assert model.reft_config.peft is None
    inputs = batch()
    with torch.no_grad(), model.disabled():
        assert torch.equal(model(**inputs).loss, base(**inputs).loss)
    model.save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded(**inputs).loss, model(**inputs).loss)


def test_adaloras_term_stays_in_the_loss() -> None:
    model = composed("adalora").train()
    inputs = batch()
    with_term = model(**inputs).loss
    for config in model.model.peft_config.values():
        config.orth_reg_weight = 0.0
    assert with_term - model(**inputs).loss > 0.1


def test_clipping_reaches_lora_and_units_alike(tmp_path: Path) -> None:
    model = composed("lora")
    norms: list[float] = []
    rows = [{"input_ids": torch.arange(3, 12), "labels": torch.arange(3, 12)}] * 4
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_grad_norm=1e-3,
        learning_rate=1.0,
        optim="sgd",
        max_steps=2,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}

    class Recording(rn.ReftTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            moved = [p - before[n] for n, p in model.named_parameters() if n in before]
            norms.append(torch.cat([m.flatten() for m in moved]).norm().item())
            return super().training_step(*args, **kwargs)

    Recording(model, args, train_dataset=rows).train()
    assert norms[0] == 0
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)  # one step of the clipped gradient's length


def test_peft_alone_and_noise_alone() -> None:
    alone = rn.get_reft_model(tiny_model(), rn.ReftConfig([], peft=section("lora")))
    torch.manual_seed(1)
    assert train(alone)[-1] < 4.7
    assert train(composed("lora", {"intervention": "neftune"}))[-1] < 4.7


def test_the_cheap_loss_is_taken_over_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    model = composed("lora").train()
    calls: list[object] = []
    unsplit = ForwardPasses._unsplit
    monkeypatch.setattr(ForwardPasses, "_unsplit", lambda *a: calls.append(a) or unsplit(*a))
    loss = model(**batch()).loss
    assert calls
    assert_close(loss, model(**batch(), return_logits=True).loss)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"r": 8}, "expected a mapping with 'peft_type', such as"),
        ("lora", "peft 'lora': expected a mapping with 'peft_type'"),
        ({"peft_type": "lara"}, "peft_type 'lara'; did you mean 'lora'? possible: adalora, "),
        ({"peft_type": "lora", "rank": 8}, "peft: unknown key 'rank' for LoraConfig; possible: "),
        ({"peft_type": "adalora"}, "peft adalora: AdaLoRA does not work when `total_step` is None"),
    ],
)
def test_bad_sections(given: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        rn.ReftConfig(LOREFT, peft=given)


def test_a_section_that_finds_nothing() -> None:
    config = rn.ReftConfig(LOREFT, peft={"peft_type": "lora", "target_modules": ["nowhere"]})
    with pytest.raises(ValueError, match=r"peft lora: Target modules .*nowhere.* not found"):
        rn.get_reft_model(tiny_model(), config)


@pytest.mark.parametrize("name", SECTIONS)
def test_sections_survive_files(name: str) -> None:
    config = rn.ReftConfig(LOREFT, peft=section(name), modules_to_save=["lm_head"])
    assert rn.ReftConfig.from_json(config.to_json()) == config
    assert rn.ReftConfig.from_yaml(config.to_yaml()) == config
    assert rn.ReftConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


DECODER = {"component": "decoder.block_output", "positions": "all+decode"}
OTHER_TASKS: dict[str, tuple[Callable[[], Any], list[dict[str, Any]], Tensor]] = {
    "classifier": (classifier, [LOREFT], torch.tensor([0, 1, 1])),
    "seq2seq": (
        seq2seq,
        [LOREFT, LOREFT | DECODER, {"intervention": "neftune"}],
        torch.arange(2, 14).view(3, 4),
    ),
}


@pytest.mark.parametrize("task", OTHER_TASKS)
@pytest.mark.parametrize(
    "peft_section",
    [
        {"peft_type": "lora", "r": 2},
        {"peft_type": "prefix_tuning", "num_virtual_tokens": 3},
        {"peft_type": "prompt_tuning", "num_virtual_tokens": 3},
    ],
    ids=lambda one: one["peft_type"],
)
def test_other_tasks(task: str, peft_section: dict[str, Any], tmp_path: Path) -> None:
    build, entries, labels = OTHER_TASKS[task]
    ids = torch.arange(2, 20).view(3, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    config = rn.ReftConfig(entries, peft=peft_section)
    model = rn.get_reft_model(build(), config).train()
    model(**inputs).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert any(p.requires_grad for p in model.model.parameters())
    model.eval().save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    with model.disabled():
        bare = model(**inputs).logits
    assert_close(bare, build()(**inputs).logits)


GUIDE = Path(__file__).parents[3] / "examples" / "guides" / "methods.md"
ROW = re.compile(r"^\| (.+) \| `(\{.+\})` \| ([\d,]+) \|$", re.MULTILINE)
TABLE = ROW.findall(GUIDE.read_text(encoding="utf-8"))
LLAMA_3_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


def test_the_guide_has_every_tested_method() -> None:
    listed = [config_of(entry) for _, entry, _ in TABLE]
    named = {config.peft["peft_type"] for config in listed if config.peft}
    named |= {unit.intervention for config in listed for unit in config.representations}
    assert {section(name)["peft_type"] for name in SECTIONS} - named == {"randlora", "vblora"}
    assert {"loreft", "bias", "adapter"} <= named


def config_of(entry: str) -> rn.ReftConfig:
    """The config of a unit, of a section `peft`, or of both."""
    values = json.loads(entry)
    if "representations" in values:
        return rn.ReftConfig(**values)
    return rn.ReftConfig([], peft=values) if "peft_type" in values else rn.ReftConfig(values)


@pytest.mark.parametrize(("method", "entry", "count"), TABLE, ids=[row[0] for row in TABLE])
def test_the_guides_counts(method: str, entry: str, count: str) -> None:
    shape, device, times = LLAMA_3_8B, "meta", 1
    if method == "BOFT":  # which reads its weights when it is built
        small = {"num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 8}
        shape, device, times = LlamaConfig(**(LLAMA_3_8B.to_dict() | small)), "cpu", 32
    with torch.device(device):
        model = LlamaForCausalLM(shape)
        model = rn.get_reft_model(model, config_of(entry), set_device=False)
    assert f"{times * sum(model.parameter_counts()[:2]):,}" == count
