"""The engine against the model itself: a row alone, without padding, without cache."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, MambaConfig, MambaForCausalLM, set_seed

import reftnoise as rn
from support.models.architectures import ARCHITECTURES, EOS, PAD, tiny_model
from support.padded_rows import generated, padded, reference, rows, wrapped
from support.tolerance import assert_close, assert_close_gradients

POSITIONS: list[Any] = ["l1", "f2", "f2+l3", "f7+l7", "all", "decode", "all+decode", [0, -1]]


def own_columns(side: str, length: int) -> slice:
    return slice(-length, None) if side == "left" else slice(0, length)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_equals_each_row_alone(architecture: str, side: str) -> None:
    batch = padded(side)
    position_ids = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    base = tiny_model(architecture)
    for positions in POSITIONS:
        model = wrapped(base, positions)
        logits = model(**batch, position_ids=position_ids).logits
        for index, row in enumerate(rows()):
            alone = model(input_ids=row[None]).logits[0]
            mine = logits[index, own_columns(side, len(row))]
            assert_close(mine, alone)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_that_equals_end_of_text(side: str) -> None:
    model, batch = wrapped(tiny_model(pad_token_id=EOS), "f2+l3"), padded(side, pad=EOS)
    position_ids = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(**batch, position_ids=position_ids).logits
    for index, row in enumerate(rows(EOS)):
        alone = model(input_ids=row[None]).logits[0]
        mine = logits[index, own_columns(side, len(row))]
        assert_close(mine, alone)


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@torch.no_grad()
def test_only_the_selected_hidden_states_are_edited(positions: Any) -> None:
    base = tiny_model()
    model = wrapped(base, positions, layer=0)
    unit = next(iter(model.interventions.values()))
    row = rows()[0][None]
    n, prompt = row.shape[1], 9
    edited = {
        "l1": [8], "f2": [0, 1], "f2+l3": [0, 1, 6, 7, 8], "all": range(9), "decode": range(9, 12),
        # 9 < 14: the first min(7, 4) and the last min(7, 5)
        "f7+l7": range(9), "all+decode": range(12), "[0, -1]": [0, 8],
    }[str(positions)]  # fmt: skip
    plain = base(input_ids=row, output_hidden_states=True).hidden_states[1][0]
    expected = plain.clone()
    for column in edited:
        expected[column] = unit(plain[None, None, column])[0, 0]
    seen: list[Tensor] = []
    handle = base.model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=row, prompt_lengths=torch.tensor([prompt]))
    handle.remove()
    assert seen[0].shape[1] == n
    assert_close(seen[0][0], expected)


@torch.no_grad()
def test_hidden_states_that_the_base_returns_are_the_edited_ones() -> None:
    base, row = tiny_model(), rows()[0][None]
    plain = base(input_ids=row, output_hidden_states=True).hidden_states  # leaves its own hooks
    model = wrapped(base, "l1", layer=0)
    edited = model(input_ids=row, output_hidden_states=True).hidden_states
    changed = [
        (a != b).any(-1)[0].nonzero().flatten().tolist() for a, b in zip(plain, edited, strict=True)
    ]
    assert changed[:2] == [[], [11]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_every_way_to_generate_gives_the_same_tokens(architecture: str) -> None:
    base, batch = tiny_model(architecture), padded("left")
    for positions in ("f2+l3", "all+decode"):
        model = wrapped(base, positions)
        expected = torch.stack([reference(model, row) for row in rows()])
        assert not torch.equal(generated(base, batch), expected), "the edit changes nothing"
        assert torch.equal(generated(model, batch), expected)
        assert torch.equal(generated(model, batch, use_cache=False), expected)
        assert torch.equal(generated(model, batch, cache_implementation="static"), expected)
        assert torch.equal(generated(model, batch, prefill_chunk_size=5), expected)
        beams = generated(model, batch, num_beams=3)
        for index, row in enumerate(rows()):
            alone = {"input_ids": row[None], "attention_mask": torch.ones(1, len(row))}
            assert torch.equal(generated(model, alone, num_beams=3)[0], beams[index])


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("pad", [PAD, EOS])
@torch.no_grad()
def test_generation_of_a_padded_batch_for_every_kind_of_position(positions: Any, pad: int) -> None:
    model = wrapped(tiny_model(pad_token_id=pad), positions)
    batch = padded("left", pad)
    greedy, beams = generated(model, batch), generated(model, batch, num_beams=2)
    for index, row in enumerate(rows(pad)):
        assert torch.equal(greedy[index], reference(model, row))
        alone = {"input_ids": row[None], "attention_mask": torch.ones(1, len(row))}
        assert torch.equal(generated(model, alone, num_beams=2)[0], beams[index])


@torch.no_grad()
def test_several_return_sequences_are_edited_like_their_prompt() -> None:
    model, batch = wrapped(tiny_model()), padded("left")
    repeated = {name: value.repeat_interleave(3, 0) for name, value in batch.items()}
    settings = {"max_new_tokens": 6, "do_sample": True, "eos_token_id": None}
    torch.manual_seed(5)
    many = model.generate(**batch, num_return_sequences=3, **settings)
    torch.manual_seed(5)
    assert torch.equal(many, model.generate(**repeated, **settings))


@torch.no_grad()
def test_the_mask_that_generate_infers_is_ours() -> None:
    model, batch = wrapped(tiny_model()), padded("left")
    ids = batch["input_ids"].masked_fill(
        (batch["input_ids"] == PAD) & batch["attention_mask"].bool(), 5
    )
    explicit = generated(model, {"input_ids": ids, "attention_mask": batch["attention_mask"]})
    assert torch.equal(generated(model, {"input_ids": ids}), explicit)
    settings = GenerationConfig(max_new_tokens=8, do_sample=False)  # leaves the padding id open
    with_settings = model.generate(input_ids=ids, generation_config=settings, eos_token_id=None)
    assert torch.equal(with_settings[:, ids.shape[1] :], explicit)


@torch.no_grad()
def test_generation_from_embeddings_and_from_a_filled_cache() -> None:
    base = tiny_model()
    model, row = wrapped(base, "l1"), rows()[0][None]
    expected = generated(model, {"input_ids": row})
    embeds = base.get_input_embeddings()(row)
    tokens = model.generate(
        inputs_embeds=embeds, max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert torch.equal(tokens, expected)
    with model.disabled():
        cache = model(input_ids=row[:, :5], use_cache=True).past_key_values
    continued = generated(model, {"input_ids": row, "past_key_values": cache})
    assert torch.equal(continued, expected)


@torch.no_grad()
def test_a_decoding_loop_by_hand_edits_the_prompt_only() -> None:
    model, row = wrapped(tiny_model(), "f1+l1"), rows()[0]
    ids, cache, tokens = row[None], None, []
    for _ in range(8):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
        tokens.append(ids[0, 0])
    assert torch.equal(torch.stack(tokens), reference(model, row))


def test_nothing_of_ours_is_called_after_the_prefill() -> None:
    base = tiny_model()
    model = wrapped(base, "f2+l3")
    hooks: list[int] = []

    def count(*_: Any) -> None:
        ours = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules())
        hooks.append(ours - 1)  # this one

    handle = base.lm_head.register_forward_hook(count)
    generated(model, padded("left"))
    handle.remove()
    assert hooks[0] > 0
    assert hooks[1:] == [0] * 7


@torch.no_grad()
def test_a_base_that_drafts_for_itself() -> None:
    base = tiny_model()
    model, row = wrapped(base, "all"), {"input_ids": rows()[0][None]}
    expected = generated(model, row)
    assert not torch.equal(generated(base, row), expected)
    assert torch.equal(generated(model, row, assistant_early_exit=2), expected)
    assert torch.equal(generated(model, row, assistant_model=base), expected)


@torch.no_grad()
def test_a_state_space_model_with_and_without_its_cache() -> None:
    config = MambaConfig(
        vocab_size=101, hidden_size=32, state_size=4, num_hidden_layers=3, pad_token_id=PAD
    )
    set_seed(0)
    base = MambaForCausalLM(config).eval()
    for positions in ("f2", "all", "decode"):
        model = wrapped(base, positions)
        batch = {"input_ids": rows()[0][None]}
        assert torch.equal(generated(model, batch), generated(model, batch, use_cache=False))


@torch.no_grad()
def test_calls_within_a_generation() -> None:
    """What contrastive decoding does: the bare base, and another adapter, per generated token."""
    base = tiny_model()
    model, other = wrapped(base, "all+decode"), wrapped(base, "l1", layer=1)
    ids = rows()[2][None]
    plain, edited = base(input_ids=ids).logits, other(input_ids=ids).logits
    expected = generated(model, {"input_ids": ids})
    right: list[bool] = []

    def processor(_: Tensor, scores: Tensor) -> Tensor:
        with model.disabled():
            right.append(torch.equal(model(input_ids=ids).logits, plain))
        right.append(torch.equal(other(input_ids=ids).logits, edited))
        return scores

    batch = {"input_ids": ids}
    assert torch.equal(generated(model, batch, logits_processor=[processor]), expected)
    assert len(right) == 16
    assert all(right)


def gradients(model: rn.ReftModel, **settings: Any) -> Tensor:
    model.zero_grad()
    ids = torch.stack([rows()[0], rows()[0].flip(0)])
    labels = ids.masked_fill(torch.arange(12) < 8, -100)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.pop("autocast", False)):
        loss = model(input_ids=ids, labels=labels, use_cache=False, **settings).loss
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.interventions.parameters()])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
@pytest.mark.parametrize("component", ["block_output", "block_input", "mlp_output", "embeddings"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neo", "gpt2"])
def test_gradient_checkpointing_of_both_kinds_gives_the_same_gradients(
    architecture: str, component: str
) -> None:
    base = tiny_model(architecture)
    where = {"layer": None} if component == "embeddings" else {}
    entry = {
        "intervention": "loreft",
        "low_rank_dimension": 4,
        "dropout": 0.3,
        "positions": "f2+l3",
    }
    entries = [
        entry | {"layer": "all", "component": component} | where,
        {"intervention": "symnoise"},
    ]
    torch.manual_seed(1)
    model = rn.get_reft_model(base, rn.ReftConfig(representations=entries)).train()
    expected = gradients(model)
    assert expected.abs().max() > 1e-4
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert_close_gradients([gradients(model)], [expected])
    model.gradient_checkpointing_disable()
    assert_close_gradients([gradients(model)], [expected])


def test_checkpointing_recomputes_each_pass_with_its_own_positions() -> None:
    base = tiny_model()
    model = wrapped(base, "l1", component="mlp_output").train()
    ids = rows()[0][None]

    def both() -> Tensor:
        model.zero_grad()
        losses = [
            model(input_ids=ids, labels=ids, prompt_lengths=torch.tensor([n]), use_cache=False).loss
            for n in (4, 9)
        ]
        (losses[0] + 2 * losses[1]).backward()
        return torch.cat([p.grad.flatten() for p in model.interventions.parameters()])

    expected = both()
    base._set_gradient_checkpointing(
        True, lambda f, *a: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=False)
    )
    torch.testing.assert_close(both(), expected, atol=1e-6, rtol=1e-5)


def test_autocast_and_half_precision_bases_keep_the_edit_in_fp32() -> None:
    base = tiny_model()
    model = wrapped(base).train()
    full = gradients(model)
    mixed = gradients(model, autocast=True)
    assert torch.nn.functional.cosine_similarity(full, mixed, dim=0) > 0.99
    half = wrapped(tiny_model().to(torch.bfloat16))
    assert {p.dtype for p in half.interventions.parameters()} == {torch.float32}
    assert torch.nn.functional.cosine_similarity(full, gradients(half), dim=0) > 0.98
    assert half(input_ids=rows()[0][None]).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("positions", ["f7+l7", "all"])
def test_a_nan_in_padding_reaches_neither_outputs_nor_gradients(positions: str) -> None:
    base, batch = tiny_model(), padded("right")
    model = wrapped(base, positions, layer=0).train()
    hole = batch["attention_mask"] == 0
    chosen: list[Tensor] = []
    base.model.layers[0].register_forward_hook(
        lambda _, __, out: out.masked_fill(hole[..., None], float("nan"))
    )
    base.model.layers[1].register_forward_pre_hook(lambda _, args: chosen.append(args[0]))
    model(**batch)
    assert chosen[0].isnan().any(-1).equal(hole)
    chosen[0][~hole].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.interventions.parameters())


class CountReads(TorchDispatchMode):
    """Counts what makes the host wait for the device: reading a value, or a size from data."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        names = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
        self.count += function.overloadpacket.__name__ in names
        return function(*args, **(kwargs or {}))


def test_no_layer_makes_the_host_wait() -> None:
    counts = []
    for layers in (2, 6):
        base = tiny_model(num_hidden_layers=layers)
        model = wrapped(base, "f2+l3", dropout=0.1).train()
        for called in (model, base):
            with CountReads() as reads:
                called(**padded("right"), use_cache=False)
            counts.append(reads.count)
    assert counts[2] - counts[0] == counts[3] - counts[1]


def test_one_batched_basis_per_step_and_none_in_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    from reftnoise.interventions import rotation

    shapes: list[tuple[int, ...]] = []
    real = rotation.orthonormal_rows
    monkeypatch.setattr(
        rotation, "orthonormal_rows", lambda raw: (shapes.append(tuple(raw.shape)), real(raw))[1]
    )
    model = wrapped(tiny_model()).train()
    gradients(model)
    assert shapes == [(3, 4, 32)]
    model.eval()
    with torch.no_grad():
        generated(model, padded("left"))
        generated(model, padded("left"))
    assert shapes[1:] == [(4, 32)] * 3, "once per layer, at the first generation"


@torch.no_grad()
def test_noise_alone_leaves_no_hook_in_evaluation() -> None:
    base = tiny_model()
    model = rn.get_reft_model(base, rn.ReftConfig({"intervention": "symnoise"}))
    forward, hooks = base.model.forward, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        hooks.append(sum(len(m._forward_hooks | m._forward_pre_hooks) for m in base.modules()))
        return forward(*args, **kwargs)

    base.model.forward = counted
    tokens = torch.randint(3, 101, (2, 5))
    model(input_ids=tokens)
    model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2)
    assert hooks == [0, 0, 0]
    model.train()(input_ids=tokens, labels=tokens)
    assert hooks[-1] > 0
