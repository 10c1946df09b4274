"""Gates: each by its formula, with every unit, alone and in a batch of adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reftnoise as rn
from reftnoise.adapters.frozen import FrozenAdapter, stacked_units
from reftnoise.interventions import (
    ConditionGate,
    EditedRows,
    NormGate,
    ProbeGate,
    edit_rows,
    put_gate,
)
from support.adapters import moved
from support.models.architectures import tiny_model
from support.tolerance import assert_close

WIDTH, ROWS = 6, 5
LOREFT = {"intervention": "loreft", "low_rank_dimension": 2}
KINDS: list[dict[str, Any]] = [
    LOREFT,
    LOREFT | {"act_fn": "gelu"},
    {"intervention": "red"},
    {"intervention": "bias"},
]
GATES = [{"type": "probe"}, {"type": "norm"}]
EVERY = "all+decode"


def written_out(gate: Any, hidden: Tensor, delta: Tensor) -> Tensor:
    """The edited states, from states and the edit without its gate."""
    if isinstance(gate, ProbeGate):
        return hidden + torch.sigmoid(hidden @ gate.weight + gate.bias)[..., None] * delta
    edited = hidden + delta
    return edited * (hidden.norm(dim=-1) / edited.norm(dim=-1))[..., None]


def unit_of(kind: dict[str, Any], gate: dict[str, Any], **arguments: Any) -> Any:
    torch.manual_seed(0)
    values = kind | arguments
    cls = rn.interventions.intervention_class(values.pop("intervention"))
    unit: Any = cls(embed_dim=WIDTH, dtype="float64", **values)
    put_gate(unit, gate)
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.normal_()
    return unit


@pytest.mark.parametrize("gate", GATES, ids=["probe", "norm"])
@pytest.mark.parametrize("kind", KINDS, ids=["loreft", "gelu", "red", "bias"])
@pytest.mark.parametrize("rows", ["all", "few", "padded"])
def test_a_gate_and_its_gradients_are_those_of_the_formula(
    rows: str, kind: dict[str, Any], gate: dict[str, Any]
) -> None:
    unit, scale = unit_of(kind, gate), 0.7
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([0, 3]) if rows == "few" else torch.arange(ROWS - (rows == "padded"))
    on = torch.zeros(ROWS, 1, dtype=torch.bool).index_fill(0, chosen, True)
    places = EditedRows(chosen if rows == "few" else None, ~on if rows == "padded" else None)
    edit = unit.factors().edit(hidden)
    formula = torch.where(on, written_out(unit.gate, hidden, scale * edit), hidden)
    ready = unit.row_edit(torch.float64, hidden.device, scale)
    edited = edit_rows(hidden, [ready], places)
    assert_close(edited, formula)
    assert_close(
        hidden + unit.delta(hidden, scale=scale), written_out(unit.gate, hidden, scale * edit)
    )
    inputs, weight = (hidden, *unit.parameters()), torch.randn_like(hidden)
    pairs = (torch.autograd.grad((x * weight).sum(), inputs) for x in (edited, formula))
    for gradient, expected in zip(*pairs, strict=True):
        assert_close(gradient, expected)
    with torch.no_grad():
        assert_close(edit_rows(hidden, [ready], places), formula)
        assert_close(ready.of_all(hidden), written_out(unit.gate, hidden, scale * edit))


def test_norms_of_zero_states_are_no_nan() -> None:
    unit = unit_of({"intervention": "bias"}, {"type": "norm"})
    for hidden in (torch.zeros(2, WIDTH).double(), -unit.bias.detach()[None]):
        hidden.requires_grad_()
        edited = hidden + unit.delta(hidden)
        assert torch.equal(edited, torch.zeros_like(edited))
        edited.sum().backward()
        assert hidden.grad is not None
        assert hidden.grad.isfinite().all()


def test_a_fresh_probe_gives_half_of_the_edit_and_a_norm_has_no_weights() -> None:
    probe, norm = ProbeGate(embed_dim=WIDTH), NormGate(embed_dim=WIDTH)
    hidden, delta = torch.randn(2, ROWS, WIDTH)
    assert_close(probe(hidden, delta), delta / 2)
    assert not list(norm.parameters())


def test_dropout_is_within_the_gate() -> None:
    unit = unit_of(LOREFT, {"type": "norm"}, dropout=0.5)
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    edited = edit_rows(hidden, [unit.row_edit(torch.float64, hidden.device)])
    assert_close(edited.norm(dim=-1), hidden.norm(dim=-1))
    assert not torch.allclose(edited, hidden)


def test_a_unit_of_ones_own_formula_is_gated() -> None:
    class Double(rn.ReftIntervention):
        def edit(self, hidden: Tensor) -> Tensor:
            return hidden

    unit = Double(embed_dim=WIDTH, low_rank_dimension=1)
    put_gate(unit, {"type": "probe"})
    hidden = torch.randn(1, ROWS, WIDTH)
    assert_close(unit(hidden), 1.5 * hidden)


@pytest.mark.parametrize("cls", ["forward", "gate"])
def test_units_that_can_have_none(cls: str) -> None:
    class Own(rn.ReftIntervention):
        gate = 1.0

        def edit(self, hidden: Tensor) -> Tensor:
            return hidden

    class Forward(Own):
        def forward(self, base: Tensor, *_: Any, **__: Any) -> Tensor:
            return base

    unit = {"forward": Forward, "gate": Own}[cls](embed_dim=WIDTH, low_rank_dimension=1)
    with pytest.raises(ValueError, match=rf"gate 'probe': {type(unit).__name__} .* {cls}"):
        put_gate(unit, {"type": "probe"})


# -- in a model ------------------------------------------------------------------------------------

IDS = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 13, 14, 15], [1, 2, 3, 4, 5]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
BATCH = {"input_ids": IDS, "attention_mask": MASK}
LABELS = IDS.masked_fill((MASK == 0) | (torch.arange(5) < 3), -100)
ENTRIES: list[dict[str, Any]] = [
    LOREFT | {"layer": "all", "positions": EVERY, "gate": {"type": "probe"}},
    LOREFT | {"layer": "all", "positions": EVERY, "gate": {"type": "norm"}},
    {"intervention": "red", "layer": 1, "gate": {"type": "probe"}},
    {"intervention": "red", "layer": 1, "gate": {"type": "norm"}},
    LOREFT | {"layer": 1, "positions": "f1+l1", "tied": False, "gate": {"type": "probe"}},
    LOREFT | {"layer": "all", "positions": EVERY},
    {"intervention": "bias", "layer": 1},
]


def model_of(entry: dict[str, Any], seed: int) -> rn.ReftModel:
    torch.manual_seed(seed)
    return moved(rn.get_reft_model(tiny_model().eval(), rn.ReftConfig([entry]))).eval()


@pytest.mark.parametrize("index", range(5))
def test_trained_saved_and_loaded(index: int, tmp_path: Path) -> None:
    model = model_of(ENTRIES[index], index)
    parameters = dict(model.interventions.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for _ in range(2):
        model.train()(**BATCH, labels=LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, before[name]) for name, p in parameters.items())
    is_probe = ENTRIES[index]["gate"] == {"type": "probe"}
    assert any(name.endswith("gate.weight") for name in parameters) == is_probe
    model.eval().save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert loaded.reft_config == model.reft_config
    assert loaded.reft_config.representations[0].gate == ENTRIES[index]["gate"]
    with torch.no_grad():
        assert torch.equal(loaded(**BATCH).logits, model(**BATCH).logits)


@torch.no_grad()
def test_rows_with_gated_and_plain_adapters_are_each_as_alone() -> None:
    own = {str(n): model_of(entry, n) for n, entry in enumerate(ENTRIES)}
    together = rn.get_reft_model(tiny_model().eval())
    for name, single in own.items():
        together.adapters.put(name, FrozenAdapter.of(single.engine.units))
    rows = [(name, scale) for name in own for scale in (1.0, -0.6)]
    batch = {key: value[:1].repeat(len(rows), 1) for key, value in BATCH.items()}
    logits = together(**batch, adapter_names=[{name: scale} for name, scale in rows]).logits
    for row, (name, scale) in enumerate(rows):
        with own[name].using(scale=scale):
            alone = own[name](**{key: value[:1] for key, value in batch.items()}).logits[0]
        assert_close(logits[row], alone)


@torch.no_grad()
def test_edits_of_a_row_are_added_and_its_norm_gates_act_on_their_sum() -> None:
    hidden = torch.randn(1, WIDTH)
    units = [unit_of(kind, gate).float() for kind in KINDS[:2] for gate in GATES]
    deltas = [unit.factors().edit(hidden) for unit in units]
    probed = sum(unit.gate(hidden, d) for unit, d in zip(units[::2], deltas[::2], strict=True))
    normed = units[1].gate(hidden, deltas[1] + deltas[3])
    edits = [
        rn.interventions.StackedEdit([u.gated_factors() for u in group], [0, 1], keeps)
        for group, keeps in ((units[::2], False), (units[1::2], True))
    ]
    gates = torch.ones(1, 2)
    ready = [edit.row_edit(torch.float32, hidden.device, gates=gates) for edit in edits]
    assert_close(edit_rows(hidden, ready[:1]) - hidden, probed)
    assert_close(edit_rows(hidden, ready[1:]) - hidden, normed)


def test_generation_has_the_gate_of_each_token() -> None:
    for entry in ENTRIES[:2]:
        model = model_of(entry, 0)
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        settings |= {"eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
        prompt = {"input_ids": IDS[:1], "attention_mask": MASK[:1]}
        written = model.generate(**prompt, **settings)
        with torch.no_grad():
            whole = model(input_ids=written.sequences, prompt_lengths=torch.tensor([5])).logits
        assert_close(torch.stack(written.logits, 1)[0], whole[0, 4:-1])


def test_probes_share_a_product_with_plain_edits_and_norms_have_one_of_their_own() -> None:
    base = tiny_model().eval()
    frozen = [
        FrozenAdapter.of(rn.get_reft_model(base, rn.ReftConfig([entry])).engine.units)
        for entry in (ENTRIES[0], ENTRIES[5], ENTRIES[1])
    ]
    probed, plain, _ = frozen
    layers, width = len(plain.shapes), plain.shapes[0].width
    assert probed.weights.numel() - plain.weights.numel() == layers * (width + 1)
    assert len(stacked_units([probed, plain])) == layers
    assert len(stacked_units(frozen)) == 2 * layers


# -- conditions of prompts -------------------------------------------------------------------------


def cast(mean: Tensor, vector: Tensor) -> float:
    """The similarity of one prompt as the paper has it."""
    projected = torch.tanh((torch.outer(vector, vector) / vector.dot(vector)) @ mean)
    return float(mean.dot(projected) / (mean.norm() * projected.norm()))


def test_similarities_are_the_papers() -> None:
    torch.manual_seed(0)
    gate, means = ConditionGate(embed_dim=WIDTH, threshold=0.2), torch.randn(40, WIDTH)
    gate.vector.copy_(3 * torch.randn(WIDTH))
    expected = torch.tensor([cast(mean, gate.vector) for mean in means])
    assert_close(gate.similarity(means), expected)
    assert torch.equal(gate.decide(means), (expected > 0.2).float())
    assert 0 < gate.decide(means).sum() < 40
    other = ConditionGate(embed_dim=WIDTH, threshold=0.2, above=False)
    other.vector.copy_(gate.vector)
    assert torch.equal(other.decide(means), (expected < 0.2).float())
    assert not gate.decide(torch.zeros(1, WIDTH)).any()


def means_of(layer: int = 1) -> Tensor:
    """The mean of each prompt's states, from the base's own hidden states."""
    with torch.no_grad():
        states = tiny_model().eval()(**BATCH, output_hidden_states=True).hidden_states[layer + 1]
    return (states * MASK[..., None]).sum(1) / MASK.sum(1, keepdim=True)


def conditioned(positions: str = EVERY, **entry: Any) -> tuple[rn.ReftModel, rn.ReftModel, Tensor]:
    """A model with a condition, the same without, and which rows of the batch meet it."""
    means = means_of()
    similarity = torch.tensor([cast(mean, means[0]) for mean in means])
    threshold = float(similarity.sort().values[1:].mean())
    gate = {"type": "condition", "threshold": threshold}
    place = {"layer": 1, "positions": positions} | LOREFT | entry
    gated, plain = model_of(place | {"gate": gate}, 0), model_of(place, 0)
    [unit] = gated.interventions.values()
    unit.gate.vector.copy_(means[0])
    return gated, plain, similarity > threshold


@pytest.mark.parametrize("positions", [EVERY, "l1", "f1+l1"])
@torch.no_grad()
def test_a_prompt_decides_for_its_row(positions: str) -> None:
    gated, plain, met = conditioned(positions)
    assert met.any()
    assert not met.all()
    with gated.disabled():
        bare = gated(**BATCH).logits
    expected = torch.where(met[:, None, None], plain(**BATCH).logits, bare)
    attended = MASK.bool()
    assert_close(gated(**BATCH).logits[attended], expected[attended])
    gated.scale = plain.scale = -0.5
    expected = torch.where(met[:, None, None], plain(**BATCH).logits, bare)
    assert_close(gated(**BATCH).logits[attended], expected[attended])


@pytest.mark.parametrize("positions", [EVERY, "decode"])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_decision_is_held_while_decoding(beams: int, positions: str) -> None:
    gated, plain, met = conditioned(positions)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"num_beams": beams}
    written, edited = gated.generate(**BATCH, **settings), plain.generate(**BATCH, **settings)
    with gated.disabled():
        bare = gated.generate(**BATCH, **settings)
    assert torch.equal(written, torch.where(met[:, None], edited, bare))


def test_rows_that_meet_it_train_and_it_is_saved(tmp_path: Path) -> None:
    gated, plain, met = conditioned("l1")
    rows = {key: value[met] for key, value in BATCH.items()}
    for model, batch, labels in ((gated, BATCH, LABELS), (plain, rows, LABELS[met])):
        model.train()(**batch, labels=labels, num_items_in_batch=6).loss.backward()
    pairs = zip(gated.interventions.parameters(), plain.interventions.parameters(), strict=True)
    for ours, expected in pairs:
        assert ours.grad is not None
        assert expected.grad is not None
        assert_close(ours.grad, expected.grad, scale=float(expected.grad.abs().max()))
    gated.eval().save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**BATCH).logits, gated(**BATCH).logits)


@torch.no_grad()
def test_adapters_by_name_have_conditions_of_their_own() -> None:
    gated, plain, met = conditioned()
    together = rn.get_reft_model(tiny_model().eval())
    together.adapters.put("gated", FrozenAdapter.of(gated.engine.units))
    together.adapters.put("plain", FrozenAdapter.of(plain.engine.units))
    for names in (["gated"] * 3, ["plain", "gated", "gated"], [{"gated": -0.5}, None, "plain"]):
        logits = together(**BATCH, adapter_names=names).logits
        for row, name in enumerate(names):
            same = "plain" if name == "gated" and met[row] else None if name == "gated" else name
            if isinstance(name, dict):
                same = {"plain": -0.5} if met[row] else None
            expected = together(**BATCH, adapter_names=[same] * 3).logits[row]
            attended = MASK[row].bool()
            assert_close(logits[row][attended], expected[attended])


@pytest.mark.parametrize("heads", [[1], [0, 2]])
@torch.no_grad()
def test_a_condition_at_some_heads_reads_these_alone_also_by_name(heads: list[int]) -> None:
    place = {"layer": 1, "component": "head_output", "heads": heads, "positions": EVERY}
    gate = {"type": "condition", "threshold": 0.0}
    single = model_of({"intervention": "bias"} | place | {"gate": gate}, 0)
    states: list[Tensor] = []
    projection = single.model.model.layers[1].self_attn.o_proj
    with projection.register_forward_pre_hook(lambda _, args: states.append(args[0])):
        single(**BATCH, adapter_names=[None] * 3)
    width = single.model.config.head_dim
    part = torch.cat([states[0][..., h * width : (h + 1) * width] for h in heads], -1)
    means = (part * MASK[..., None]).sum(1) / MASK.sum(1, keepdim=True)
    [unit] = single.interventions.values()
    unit.gate.vector.copy_(means[0])
    similarity = torch.tensor([cast(mean, means[0]) for mean in means])
    unit.gate.threshold = float(similarity.sort().values[1:].mean())
    met = similarity > unit.gate.threshold
    assert met.any()
    assert not met.all()
    together = rn.get_reft_model(tiny_model().eval())
    together.adapters.put("gated", FrozenAdapter.of(single.engine.units))
    names = [["gated"] * 3, [None, "gated", {"gated": 1.0}]]
    bare, own = single(**BATCH, adapter_names=[None] * 3).logits, single(**BATCH).logits
    attended = MASK.bool()
    for row in range(3):
        assert torch.equal(own[row][attended[row]], bare[row][attended[row]]) == (not met[row])
    for chosen in names:
        rows = zip(chosen, bare, own, strict=True)
        expected = torch.stack([before if name is None else after for name, before, after in rows])
        logits = together(**BATCH, adapter_names=chosen).logits
        assert_close(logits[attended], expected[attended])


def test_a_condition_waits_for_the_device_only_where_its_vector_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gated, _, _ = conditioned()
    asked: list[Tensor] = []
    any_of = Tensor.any

    def count(tensor: Tensor, *arguments: Any) -> Tensor:
        asked.append(tensor)
        return any_of(tensor, *arguments)

    monkeypatch.setattr(Tensor, "any", count)
    [unit] = gated.interventions.values()
    with torch.no_grad():
        gated(**BATCH)
        asked.clear()
        gated(**BATCH)
        assert not asked
        unit.gate.vector.mul_(2)
        gated(**BATCH)
        assert [tensor is unit.gate.vector for tensor in asked] == [True]


def test_prompts_in_parts_and_vectors_that_are_not_set() -> None:
    gated, _, _ = conditioned()
    first = gated(input_ids=IDS[:1, :2], use_cache=True)
    with pytest.raises(ValueError, match=r"gate of layer_1.*: a condition is decided by whole"):
        gated(input_ids=IDS[:1, 2:], past_key_values=first.past_key_values)
    gated.interventions[next(iter(gated.interventions))].gate.vector.zero_()
    with pytest.raises(ValueError, match="vector of the gate 'condition' is zero"):
        gated(**BATCH)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [("threshold", "high", "a number from"), ("threshold", 2, "a number"), ("above", 1, "true or")],
)
def test_settings_that_no_condition_has(key: str, value: Any, expected: str) -> None:
    gate = {"type": "condition", key: value}
    with pytest.raises(ValueError, match=rf"\[0\]: {key} {value!r}: expected {expected}"):
        model_of(LOREFT | {"layer": 1, "gate": gate}, 0)


# -- in a config -----------------------------------------------------------------------------------


def test_a_name_is_a_mapping_of_its_type() -> None:
    entry = {"layer": 0, "gate": "norm"} | LOREFT
    config = rn.ReftConfig(entry)
    assert config.representations[0].gate == {"type": "norm"}
    assert rn.ReftConfig.from_yaml(config.to_yaml()) == config
    assert "gate" not in rn.ReftConfig(LOREFT | {"layer": 0}).to_dict()["representations"][0]


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (
            "prob",
            r"gate type 'prob': did you mean 'probe'\? expected one of probe, norm, condition",
        ),
        ({"kind": "norm"}, "gate .*: expected a mapping such as {'type': 'probe'}"),
        (3, "gate 3: expected a mapping such as"),
        ({"type": 3}, "gate type 3: expected one of probe, norm, condition"),
        (
            {"type": "probe", "at": 1},
            "gate 'probe': unknown key 'at'; next to type it takes nothing",
        ),
    ],
)
def test_mistakes(gate: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rn.ReftConfig(LOREFT | {"layer": 0, "gate": gate})


def test_places_that_can_have_none() -> None:
    parallel = {"layer": 0, "component": "mlp_parallel", "gate": {"type": "norm"}}
    with pytest.raises(ValueError, match="gate 'norm': at 'mlp_parallel' an edit is computed of"):
        rn.ReftConfig(LOREFT | parallel)
    with pytest.raises(ValueError, match="unknown key 'gate' for SymNoiseIntervention"):
        rn.ReftConfig({"intervention": "symnoise", "gate": {"type": "probe"}})


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (None, "the module has a ConditionGate: give the entry one, too"),
        ({"type": "condition", "threshold": 0.5}, "threshold 0.5: the module's gate has 0.25"),
    ],
)
def test_a_ready_module_has_the_gate_of_its_entry(entry: Any, reason: str) -> None:
    """What is saved of it could not be loaded, or would act in another way."""
    unit = rn.BiasIntervention(embed_dim=32)
    gated = {"layer": 1, "intervention": unit, "gate": {"type": "condition", "threshold": 0.25}}
    rn.get_reft_model(tiny_model(), rn.ReftConfig(gated))
    rn.get_reft_model(tiny_model(), rn.ReftConfig(gated))  # an equal one stays
    other = gated | {"gate": entry} if entry else {"layer": 1, "intervention": unit}
    with pytest.raises(ValueError, match=reason):
        rn.get_reft_model(tiny_model(), rn.ReftConfig(other))
