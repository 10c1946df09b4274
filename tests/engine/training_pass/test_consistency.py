"""R3F against its formula from two passes of its own, and HyPe's noise at every layer."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import reftnoise as rn
from reftnoise._util.errors import warn_once
from reftnoise.analysis.inspection import noise_losses
from reftnoise.engine.training_pass.prefix_cache import PrefixCache
from support.models.architectures import tiny_model
from support.models.tiny_models import LAYERS, examples_of, model_of, padded
from support.tolerance import assert_close, assert_close_gradients
from support.training_steps import batch, step, wrapped

R3F = {"intervention": "r3f", "epsilon": 0.1, "weight": 0.5}


def by_hand(
    model: rn.ReftModel, inputs: dict[str, Any], where: str = "all"
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss, its consistency alone, and the gradients, of two passes with and without noise."""
    bare = rn.get_reft_model(model.model, rn.ReftConfig(model.reft_config.representations[:1]))
    bare.load_state_dict(model.state_dict(), strict=False)
    embeds = model.model.get_input_embeddings()(inputs["input_ids"])
    torch.manual_seed(3)
    noise = torch.zeros_like(embeds).uniform_(-0.1, 0.1)
    mask, labels = inputs["attention_mask"].bool(), inputs["labels"]
    if where == "completion":
        mask = mask & (labels != -100)
    others = {n: v for n, v in inputs.items() if n not in ("input_ids", "labels")}
    others["prompt_lengths"] = (inputs["attention_mask"].bool() & (labels == -100)).sum(1)
    counted = labels[:, 1:] != -100
    logs = []
    for shift in (0.0, noise.masked_fill(~mask[..., None], 0)):
        logits = bare(inputs_embeds=embeds + shift, **others).logits[:, :-1][counted]
        logs.append(logits.log_softmax(-1))
    p, q = logs
    one, other = (F.kl_div(a, b, reduction="sum", log_target=True) for a, b in ((p, q), (q, p)))
    apart = (one + other) / counted.sum()
    loss = F.nll_loss(p, labels[:, 1:][counted]) + 0.5 * apart
    return loss, apart, list(torch.autograd.grad(loss, list(bare.interventions.parameters())))


WAYS: list[Any] = [
    ("all", "all logits", {"return_logits": True}),
    ("all", "label loss", {"return_logits": False}),
    ("completion", "split", {"return_logits": False}),
    ("completion", "prefix cache", {"return_logits": False}),
    ("completion", "lazy logits", {}),
]


@pytest.mark.parametrize(("where", "way", "options"), WAYS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_r3f_is_its_formula(side: str, where: str, way: str, options: Any) -> None:
    model = wrapped("l1", R3F | {"where": where}, base=tiny_model().double())
    model.split = "always" if way in ("split", "prefix cache") else "never"
    model.prefix_cache = PrefixCache() if way == "prefix cache" else None
    inputs = batch(side)
    loss, apart, gradients = by_hand(model, inputs, where)
    outputs, of_ours = step(model, inputs, **options)
    assert model.added_loss is not None
    torch.testing.assert_close(model.added_loss.detach(), (0.5 * apart).detach(), rtol=1e-6, atol=0)
    assert_close(outputs.loss.float(), loss.float())  # the base's own loss is in fp32
    assert_close_gradients([g.float() for g in of_ours], [g.float() for g in gradients])
    if options.get("return_logits") is not False:
        assert outputs.logits.shape[0] == len(inputs["input_ids"])
    with torch.no_grad():
        clean = model.eval()(**inputs).loss
    assert_close(clean.float(), (loss - 0.5 * apart).float())


def test_r3f_of_micro_batches_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("l1", R3F | {"epsilon": 0.0})
    noise = torch.randn(4, 25, 32)
    unit = list(model.interventions.values())[-1]
    rows: list[slice] = []

    def delta(*_: Any, **__: Any) -> Tensor:
        part = noise[rows[-1]]
        return torch.cat([torch.zeros_like(part), part])

    monkeypatch.setattr(unit, "delta", delta)
    monkeypatch.setattr("reftnoise.engine.training_pass.consistency.MAX_LOGITS", 500)  # chunks
    inputs = batch()
    rows.append(slice(0, 4))
    expected = step(model, inputs)
    model.zero_grad()
    total, count = 0.0, (inputs["labels"][:, 1:] != -100).sum()
    for part in (slice(0, 3), slice(3, 4)):
        rows.append(part)
        some = {name: values[part] for name, values in inputs.items()}
        loss = model(**some, num_items_in_batch=count).loss
        loss.backward()
        total += float(loss.detach())
    assert_close(total, expected[0].loss)
    assert model.added_loss is not None
    assert_close_gradients([p.grad for p in model.interventions.parameters()], expected[1])


@pytest.mark.parametrize("where", ["all", "completion"])
def test_smart_takes_a_step_up_the_divergence(where: str) -> None:
    smart = {"intervention": "smart", "epsilon": 0.2, "step": 0.15, "distribution": "uniform"}
    model, inputs = wrapped("l1", smart | {"where": where}), batch()
    bare = rn.get_reft_model(model.model, rn.ReftConfig(model.reft_config.representations[:1]))
    bare.load_state_dict(model.state_dict(), strict=False)
    embeds = model.model.get_input_embeddings()(inputs["input_ids"]).detach()
    mask, labels = inputs["attention_mask"].bool(), inputs["labels"]
    others = {n: v for n, v in inputs.items() if n not in ("input_ids", "labels")}
    others["prompt_lengths"] = (mask & (labels == -100)).sum(1)
    counted = labels[:, 1:] != -100
    chosen = mask & (labels != -100) if where == "completion" else mask

    def apart(noise: Tensor) -> Tensor:
        p, q = (
            bare(inputs_embeds=embeds + z * chosen[..., None], **others)
            .logits[:, :-1][counted]
            .log_softmax(-1)
            for z in (torch.zeros_like(noise), noise)
        )
        return ((p.exp() - q.exp()) * (p - q)).sum() / counted.sum()

    torch.manual_seed(3)
    start = torch.zeros_like(embeds).uniform_(-0.2, 0.2) * chosen[..., None]
    (slope,) = torch.autograd.grad(apart(start.requires_grad_()), start)
    size = slope.flatten(1).abs().amax(1)[:, None, None]
    expected = apart((start + 0.15 * slope / size).clamp(-0.2, 0.2).detach())
    gradients = torch.autograd.grad(expected, list(bare.interventions.parameters()))
    outputs, of_ours = step(model, inputs)
    assert expected > apart(start)
    assert model.added_loss is not None
    assert_close(model.added_loss, expected)
    plain, without = step(bare, inputs)
    assert_close(outputs.loss, plain.loss + expected)
    assert_close_gradients(of_ours, [w + g for w, g in zip(without, gradients, strict=True)])


def test_r3f_of_a_classifier() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    config = BertConfig(vocab_size=64, num_hidden_layers=2, num_labels=3, **sizes)
    torch.manual_seed(0)
    base = BertForSequenceClassification(config).eval()
    model = wrapped("f1", R3F, base=base)
    ids = torch.arange(12).view(3, 4)
    logits: list[Tensor] = []
    base.register_forward_hook(lambda _, __, out: logits.append(out.logits))
    labels = torch.tensor([0, 2, 1])
    loss = model(input_ids=ids, labels=labels).loss
    p, q = logits[0].log_softmax(-1).tensor_split(2)
    apart = F.kl_div(p, q, log_target=True, reduction="batchmean")
    apart = apart + F.kl_div(q, p, log_target=True, reduction="batchmean")
    assert apart > 0
    assert_close(loss, F.nll_loss(p, labels) + 0.5 * apart)
    with pytest.raises(ValueError, match="float32: expected integers, tokens"):
        model(input_ids=ids, labels=torch.rand(3))


def test_pairs_are_of_one_kind() -> None:
    model = wrapped("l1", R3F, {"intervention": "symnoise"})
    with pytest.raises(ValueError, match="R3fIntervention and SymNoiseIntervention: each asks"):
        model(**batch())


def test_hype_perturbs_the_input_of_every_layer() -> None:
    model = wrapped("l1", {"intervention": "hype", "epsilon": 0.25, "distribution": "normal"})
    places = [(p.site.name, p.site.is_input) for p in model.engine.units[3:]]
    assert places == [(f"model.layers.{n}", True) for n in range(3)]
    inputs = batch()
    mask = inputs["attention_mask"].bool()
    seen: list[tuple[Tensor, Tensor]] = []

    def look(units: Any, before: Tensor, after: Tensor) -> None:
        if units[0].site.is_input:
            seen.append((before, after))

    with model.engine.settings.block(observer=look):
        model(**inputs, return_logits=True)
    assert len(seen) == 3
    noise = torch.cat([(after - before)[mask] for before, after in seen])
    assert 0.24 < noise.std() < 0.26
    assert all(torch.equal(after[~mask], before[~mask]) for before, after in seen)


@pytest.mark.parametrize("name", ["r3f", "smart"])
def test_outputs_that_are_tuples(name: str) -> None:
    model, inputs = wrapped("l1", R3F | {"intervention": name}), batch()
    outputs, gradients = step(model, inputs, return_logits=True)
    model.zero_grad()
    torch.manual_seed(3)
    loss, logits, *_ = model(**inputs, return_dict=False)
    loss.backward()
    assert_close(loss, outputs.loss)
    assert_close(logits, outputs.logits)
    assert_close_gradients([p.grad for p in model.interventions.parameters()], gradients)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
def test_smart_takes_no_reentrant_checkpoints() -> None:
    model = wrapped("l1", {"intervention": "smart"})
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r"SmartIntervention takes .* set gradient_checkp.*False"):
        model(**batch())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model(**batch()).loss.isfinite()


@pytest.mark.parametrize(
    ("dtype", "epsilon", "is_lost"),
    [
        (torch.bfloat16, 1e-5, True),
        (torch.bfloat16, 1e-2, False),
        (torch.float32, 1e-5, False),
    ],
)
def test_noise_that_half_precision_rounds_away_is_warned_of_once(
    caplog: pytest.LogCaptureFixture, dtype: torch.dtype, epsilon: float, is_lost: bool
) -> None:
    noise = {"intervention": "r3f", "epsilon": epsilon}
    model = wrapped("l1", noise, base=tiny_model().to(dtype))
    embeds = model.model.get_input_embeddings()(batch()["input_ids"]).detach()
    moved = embeds + torch.empty_like(embeds).uniform_(-epsilon, epsilon)
    assert ((moved != embeds).float().mean() < 0.5) == is_lost
    warn_once.cache_clear()
    with caplog.at_level("WARNING"):
        for _ in range(2):
            model(**batch())
    lost = [r.message for r in caplog.records if "rounds most of x + z back" in r.message]
    assert len(lost) == is_lost


@pytest.mark.parametrize("split", ["never", "always"])
def test_noise_that_layers_lose_is_warned_of_once_for_all(
    caplog: pytest.LogCaptureFixture, split: Any
) -> None:
    noise = {"intervention": "hype", "epsilon": 1e-5, "where": "completion"}
    model, sizes = wrapped("l1", noise, base=tiny_model().to(torch.bfloat16)), []
    model.split = split

    def look(units: Any, before: Tensor, _: Tensor) -> None:
        if units[0].site.is_input:
            sizes.append(before.float().abs().mean().item() * torch.finfo(before.dtype).eps)

    warn_once.cache_clear()
    with caplog.at_level("WARNING"), model.engine.settings.block(observer=look):
        model(**batch(), return_logits=False)
    (message,) = [r.message for r in caplog.records if "rounds most of x + z back" in r.message]
    assert "epsilon 1e-05 of HypeIntervention: torch.bfloat16" in message
    (least,) = re.findall(r"at least (\S+),", message)
    largest = max(sizes[:3])  # of the three layers, when each first runs
    assert largest <= float(least) <= 2 * largest


@pytest.mark.parametrize("name", ["r3f", "smart"])
def test_an_encoder_decoder_needs_what_its_decoder_reads(name: str) -> None:
    """It would make it of labels, and the noisy rows have none; without noise, nothing differs."""
    base, rows = model_of("t5"), padded(examples_of("t5"))
    noise = {"intervention": name, "epsilon": 1e-30}
    model = rn.get_reft_model(base, rn.ReftConfig([LAYERS, noise])).train()
    with pytest.raises(ValueError, match="expected decoder_input_ids next to the labels"):
        model(**rows)
    shifted = base.prepare_decoder_input_ids_from_labels(rows["labels"])
    model(**rows, decoder_input_ids=shifted)
    assert model.added_loss is not None
    assert model.added_loss.detach().item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", ["r3f", "smart"])
def test_what_compares_predictions_is_no_noise_of_an_evaluation(name: str) -> None:
    """Labels are predicted without it in training, too; nothing is left of the pass before."""
    noise = {"intervention": name, "epsilon": 0.5}
    model = rn.get_reft_model(tiny_model(), rn.ReftConfig([LAYERS, noise])).train()
    model(**batch()).loss.backward()
    rows = {key: value[:1] for key, value in batch().items()}
    losses = noise_losses(model, [rows], draws=2)
    assert losses.noisy == pytest.approx([losses.clean] * 2, rel=1e-6)
