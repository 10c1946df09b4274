"""Mistakes of earlier implementations of ReFT and embedding noise, one test each.

Those that are about one module are tested beside it: positions under cache, padding and beams in
`test_engine`; "l1" off by one in `test_data`; dropout, R after weight decay and after a load, and
mistyped keywords in `interventions/`; what a saved adapter keeps, pickles, class names from files
and directories that exist in `test_saving`; loss weights, resuming (on the device at hand), reports
of the config and the Trainer's arguments in `test_trainer`.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reftnoise as rn
from support.models.architectures import EOS, PAD, tiny_model

LOREFT = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}
IDS = torch.arange(3, 13)[None]


def wrapped(*entries: dict[str, Any], model: Any = None) -> rn.ReftModel:
    config = rn.ReftConfig(representations=list(entries) or [LOREFT])
    return rn.get_reft_model(model or tiny_model(), config)


def hooks_of(model: nn.Module) -> list[int]:
    return [
        key
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for key in hooks
    ]


def test_hooks_of_others_survive_and_fire() -> None:
    base = tiny_model()
    fired: list[str] = []
    for name, module in base.named_modules():
        module.register_forward_hook(lambda *_, name=name: fired.append(name))
    before = hooks_of(base)
    base(input_ids=IDS)
    alone, fired[:] = list(fired), []
    model = wrapped(LOREFT, {"intervention": "neftune"}, model=base).train()
    model(input_ids=IDS)
    assert fired == alone
    model.eval().generate(input_ids=IDS, max_new_tokens=2)
    assert hooks_of(base) == before


@pytest.mark.parametrize(
    ("call", "settings"), [("forward", {}), ("generate", {"max_new_tokens": 2})]
)
def test_nothing_of_ours_stays_after_an_exception(call: str, settings: dict[str, Any]) -> None:
    base = tiny_model()
    model = wrapped(LOREFT, {"intervention": "neftune"}, model=base).train()

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = base.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        getattr(model, call)(input_ids=IDS, **settings)
    handle.remove()
    assert hooks_of(base) == []
    base.train()
    assert torch.equal(base(input_ids=IDS).logits, base(input_ids=IDS).logits)


def test_only_the_input_embedding_is_noised() -> None:
    base = tiny_model("gpt2").train()
    model = wrapped({"intervention": "neftune"}, model=base).train()
    seen: list[Tensor] = []
    base.transformer.h[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=IDS)
    clean = base.transformer.wte.weight[IDS] + base.transformer.wpe.weight[: IDS.shape[1]]
    noise = (seen[0] - clean).abs().max()
    bound = 5 / (IDS.shape[1] * 32) ** 0.5
    assert 0.95 * bound < noise <= 1.001 * bound  # the sum of two noises would exceed it


def test_train_and_eval_reach_every_unit_and_return_self() -> None:
    model = wrapped(LOREFT | {"dropout": 0.5}, {"intervention": "neftune"})
    assert model.train() is model
    assert all(module.training for module in model.modules())
    assert model.eval() is model
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_units_are_true_submodules() -> None:
    model = wrapped()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 3 * 3
    assert all(name.startswith("interventions.layer_") for name in trainable)
    assert set(model.state_dict()) == trainable


def test_repeated_beginning_of_text_and_padding_ids_inside_a_prompt_are_tokens() -> None:
    model = wrapped(LOREFT | {"positions": "f2"}, model=tiny_model(pad_token_id=EOS))
    ids = torch.tensor([[1, 1, EOS, 5, PAD, 6]])
    seen: list[Tensor] = []
    layer = model.model.model.layers[1]
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    with model.disabled():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    changed = (seen[0] != seen[1]).any(-1)[0]
    assert changed.tolist()[:2] == [True, True]
    assert changed.tolist()[2:] == [False] * 4  # the first layer's own edit, nothing mixed in yet


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call
def test_gradients_of_a_peft_method_under_the_wrapper_are_zeroed_and_saved() -> None:
    peft = pytest.importorskip("peft", reason="needs the extra [test]: peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base = peft.get_peft_model(tiny_model(), lora)
    config = rn.ReftConfig(representations=LOREFT)
    model = rn.get_reft_model(base, config, disable_model_grads=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    gradients = []
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS, prompt_lengths=torch.tensor([5])).loss.backward()
        optimizer.step()
        gradients.append([p.grad.clone() for n, p in model.named_parameters() if "lora_" in n])
    assert len(gradients[0]) == 3 * 2 * 2
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*gradients, strict=True))
    assert sum("lora_" in name for name in model.state_dict()) == 12


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call
@torch.no_grad()
def test_generation_over_a_peft_model_is_edited() -> None:
    peft = pytest.importorskip("peft", reason="needs the extra [test]: peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = wrapped(LOREFT | {"positions": "all"}, model=peft.get_peft_model(tiny_model(), lora))
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    ids = IDS
    for _ in range(6):
        logits = model(input_ids=ids, prompt_lengths=torch.tensor([10])).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(input_ids=IDS, **settings), ids)
    with model.disabled():
        assert not torch.equal(model.generate(input_ids=IDS, **settings), ids)
