"""Classes that override `forward`: it runs as it is written, with pyreft's results."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reftnoise as rn
from reftnoise.analysis.inspection import subspaces as subspaces_of
from reftnoise.interventions import register_intervention
from support.models.pyreft_units import (
    IDS,
    INPUTS,
    SIZES,
    at,
    base,
    projected,
    rotated,
    signature,
    wrapped,
)
from support.tolerance import assert_close

LAST = at([[5], [5]])
BOTH = at([[1], [0]], [[3], [2]])
LENGTHS = torch.tensor([6, 6])
GREEDY: dict[str, Any] = {"do_sample": False, "intervene_on_prompt": True}


class Zero(rn.NoreftIntervention):
    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:  # type: ignore[override]  # as in pyreft
        return base * 0


class Half(rn.NoreftIntervention):
    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:  # type: ignore[override]  # as in pyreft
        return base * 0.5 + self.learned_source.bias.sum()


class Twice(rn.NoreftIntervention):
    """Twice the edit of its parent."""

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:  # type: ignore[override]  # as in pyreft
        return 2 * super().forward(base, source, subspaces) - base


class Scaled(rn.LoreftIntervention):
    def __init__(self, scale: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:  # type: ignore[override]  # as in pyreft
        return base + self.scale * (super().forward(base) - base)


class Composed(rn.LoreftIntervention):
    """As of ReFT's composition: each row has the dimensions that it chooses."""

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:  # type: ignore[override]  # as in pyreft
        difference = self.act_fn(self.learned_source(base)) - self.rotate_layer(base)
        parts = [difference[row, :, chosen] for row, chosen in enumerate(subspaces)]
        weights = [self.rotate_layer.weight[..., chosen].T for chosen in subspaces]
        edited = base + torch.bmm(torch.stack(parts), torch.stack(weights))
        return self.dropout(edited.to(base.dtype))


class Chosen(rn.NoreftIntervention):
    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:  # type: ignore[override]  # as in pyreft
        difference = self.act_fn(self.learned_source(base)) - self.proj_layer(base)
        weight = self.proj_layer.weight
        return torch.stack(
            [base[i] + difference[i][:, row] @ weight[row] for i, row in enumerate(subspaces)]
        )


@torch.no_grad()
def called(reft_model: rn.ReftModel, locations: Any, **options: Any) -> list[float]:
    return signature(reft_model(**INPUTS, unit_locations=locations, **options))


# -- against pyreft ------------------------------------------------------------------------------


def test_a_forward_that_is_overridden_runs() -> None:
    reft_model = wrapped((1,), lambda _: Zero(**SIZES))
    expected = [0.041, 0.0044, 0.106, 0.055, -0.0282, -0.0628]
    expected += [0.041, 0.0088, -0.152, 0.0882, 0.097, 0.0436]
    assert called(reft_model, LAST) == expected


def test_it_runs_in_generation() -> None:
    reft_model = wrapped((1,), lambda _: Zero(**SIZES))
    tokens = reft_model.generate(**INPUTS, unit_locations=LAST, max_new_tokens=6, **GREEDY)
    assert tokens.tolist() == [
        [1, 5, 6, 7, 8, 9, 43, 55, 83, 29, 55, 83],
        [1, 15, 16, 17, 18, 19, 43, 79, 69, 55, 14, 87],
    ]


def test_it_may_call_its_parents() -> None:
    reft_model = wrapped((1, 2), lambda seed: projected(Twice(**SIZES), seed))
    expected = [0.041, -0.0942, 0.1418, -0.0233, -0.0079, -0.0342]
    expected += [-0.0788, 0.0204, -0.0796, 0.0746, 0.0889, -0.0255]
    assert called(reft_model, BOTH) == expected


def test_it_has_parameters_of_its_own() -> None:
    reft_model = wrapped((1,), lambda _: rotated(Scaled(scale=0.5, **SIZES)))
    expected = [0.041, 0.0044, 0.106, 0.055, -0.0282, -0.1933]
    expected += [0.041, 0.0088, -0.152, 0.0882, 0.097, -0.1804]
    assert called(reft_model, LAST) == expected
    assert sum(p.numel() for p in reft_model.parameters() if p.requires_grad) == 261


def test_it_reads_the_rotation_and_subspaces_as_in_pyreft() -> None:
    reft_model = wrapped((1,), lambda _: rotated(Composed(**SIZES)))
    expected = [0.041, 0.0044, 0.106, 0.055, -0.0282, -0.1799]
    expected += [0.041, 0.0088, -0.152, 0.0882, 0.097, -0.1526]
    for rows in ([[[0, 1], [0, 1]]], [[0, 1], [0, 1]], torch.tensor([[0, 1, -1], [1, 0, -1]])):
        assert called(reft_model, LAST, subspaces=rows) == expected


def test_each_unit_and_row_has_its_subspaces() -> None:
    reft_model = wrapped((1, 2), lambda seed: projected(Chosen(**SIZES), seed))
    expected = [0.041, -0.0721, 0.1421, 0.041, 0.0022, -0.0208]
    expected += [-0.0498, 0.0409, -0.048, 0.1133, 0.1125, -0.0008]
    subspaces = [[[0, 1], [1, 2]], [[2, 3], [0, 3]]]
    assert called(reft_model, BOTH, subspaces=subspaces) == expected
    options = GREEDY | {"subspaces": subspaces, "max_new_tokens": 4}
    tokens = reft_model.generate(**INPUTS, unit_locations=at([[5], [5]], [[5], [5]]), **options)
    assert tokens.tolist() == [
        [1, 5, 6, 7, 8, 9, 11, 5, 53, 0],
        [1, 15, 16, 17, 18, 19, 75, 34, 34, 34],
    ]


@pytest.mark.parametrize(
    ("unit_class", "subspaces", "expected"),
    [
        (Half, None, [4.5706, 4.5705, 4.5704]),
        (Chosen, [[[0, 1], [1, 2]], [[2, 3], [0, 3]]], [4.5842, 4.5698, 4.5559]),
    ],
)
def test_it_is_trained(unit_class: Any, subspaces: Any, expected: list[float]) -> None:
    reft_model = wrapped((1, 2), lambda seed: projected(unit_class(**SIZES), seed)).train()
    optimizer = torch.optim.AdamW(reft_model.interventions.parameters(), lr=1e-2, weight_decay=0)
    inputs = {
        "input_ids": torch.tensor([[1, 5, 6, 7, 8, 9], [1, 15, 16, 17, 18, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]),
        "labels": torch.tensor([[-100, -100, 6, 7, 8, 9], [-100, -100, 16, 17, 18, -100]]),
    }
    losses = []
    for _ in range(3):
        outputs = reft_model(**inputs, unit_locations=BOTH, subspaces=subspaces)
        losses.append(round(outputs.loss.item(), 4))
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
    assert losses == expected


def test_a_forward_that_is_replaced_on_our_class_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = [], rn.LoreftIntervention.forward

    def counting(self: Any, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        calls.append(base.shape)
        return forward(self, base, source, subspaces)

    reft_model = wrapped((1,), lambda _: rotated(rn.LoreftIntervention(**SIZES)))
    expected = called(reft_model, LAST)
    monkeypatch.setattr(rn.LoreftIntervention, "forward", counting)
    assert called(reft_model, LAST) == expected
    assert calls == [(2, 1, 32)]


# -- beside other features -----------------------------------------------------------------------


def logits(reft_model: rn.ReftModel, **options: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = reft_model(**INPUTS, **options).logits
    return result


def scaling(layer: int, factor: float, columns: slice = slice(5, None)) -> Tensor:
    """Logits of the base where a layer's output is multiplied."""
    model = base()

    def multiply(_: Any, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, columns] *= factor
        return output

    model.model.layers[layer].register_forward_hook(multiply)
    with torch.no_grad():
        result: Tensor = model(**INPUTS).logits
    return result


def test_scale_is_a_factor_of_its_edit() -> None:
    reft_model = wrapped((1,), lambda _: Zero(**SIZES))
    reft_model.scale = 0.25
    assert_close(logits(reft_model), scaling(1, 0.75))


@pytest.mark.parametrize("positions", ["all", "l2", [0, -1]])
def test_it_edits_the_positions_of_the_config(positions: Any) -> None:
    entry = {"layer": 1, "intervention": Zero(**SIZES), "positions": positions}
    reft_model = rn.get_reft_model(base(), rn.ReftConfig(entry)).eval()
    columns: Any = {"all": slice(None), "l2": slice(4, None)}.get(str(positions), [0, 5])
    assert_close(logits(reft_model), scaling(1, 0.0, columns))


def test_beams_repeat_the_subspaces_of_their_row() -> None:
    reft_model = wrapped((1,), lambda _: rotated(Composed(**SIZES)))
    plain = wrapped((1,), lambda _: rotated(rn.LoreftIntervention(**SIZES)))
    options = {"subspaces": [[0, 2], [1, 3]], "num_beams": 3, "max_new_tokens": 5}
    tokens = [model.generate(**INPUTS, do_sample=False, **options) for model in (reft_model, plain)]
    assert torch.equal(*tokens)


def test_pairs_of_noise_repeat_subspaces() -> None:
    entries = [
        {"layer": 1, "intervention": rotated(Composed(**SIZES))},
        {"intervention": "symnoise", "alpha": 0.0},
    ]
    reft_model = rn.get_reft_model(base(), rn.ReftConfig(entries)).train()
    subspaces = [[0, 2], [1, 3]]
    loss = reft_model(**INPUTS, labels=IDS, prompt_lengths=LENGTHS, subspaces=subspaces).loss
    reft_model.eval()
    expected = reft_model(**INPUTS, labels=IDS, prompt_lengths=LENGTHS, subspaces=subspaces).loss
    assert_close(loss, expected)


@pytest.mark.usefixtures("restored_registry")
def test_rows_have_named_adapters_of_such_units(tmp_path: Path) -> None:
    register_intervention("zero")(Zero)
    register_intervention("half")(Half)
    wrapped((1,), lambda _: Zero(**SIZES)).save_pretrained(tmp_path / "zero")
    halved = wrapped((1, 2), lambda seed: projected(Half(**SIZES), seed))
    halved.save_pretrained(tmp_path / "half")
    plain = wrapped((1,), lambda seed: projected(rn.NoreftIntervention(**SIZES), seed))

    for name in ("zero", "half"):
        plain.load_adapter(tmp_path / name, name)
    bare = base()
    with torch.no_grad():
        expected = {None: bare(**INPUTS).logits, "default": logits(plain)}
    expected |= {"half": logits(halved), "zero": scaling(1, 0.0)}
    for names in (["zero", None], ["half", "half"], ["default", "half"], ["half", "zero"]):
        rows = logits(plain, adapter_names=names)
        assert_close(rows, torch.stack([expected[name][i] for i, name in enumerate(names)]))
    assert_close(logits(plain, adapter_names=[{"zero": 0.25}] * 2), scaling(1, 0.75))

    plain.adapters.derive("late", "half", layers=[2])
    alone = wrapped((2,), lambda _: projected(Half(**SIZES), 6))
    assert_close(logits(plain, adapter_names=["late", "late"]), logits(alone))


@pytest.mark.usefixtures("restored_registry")
def test_it_is_saved_under_the_name_of_its_class(tmp_path: Path) -> None:
    reft_model = wrapped((1,), lambda _: rotated(Scaled(scale=0.5, **SIZES)))
    with pytest.warns(UserWarning, match="scale of Scaled: no file can say it"):
        reft_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Scaled needs 'scale'"):
        rn.ReftModel.from_pretrained(base(), tmp_path)

    wrapped((1,), lambda _: rotated(Composed(**SIZES))).save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(base(), tmp_path).eval()
    assert type(next(iter(loaded.interventions.values()))) is Composed
    assert_close(
        logits(loaded, subspaces=[[0], [1]]),
        logits(wrapped((1,), lambda _: rotated(Composed(**SIZES))), subspaces=[[0], [1]]),
    )


def test_a_state_of_its_own_without_its_weights_is_not_saved(tmp_path: Path) -> None:
    class Partial(Half):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {}

    with pytest.raises(ValueError, match=r"weight is not in the state_dict\(\) of its unit"):
        wrapped((1,), lambda _: Partial(**SIZES)).save_pretrained(tmp_path)


def test_rows_have_the_models_own_such_units_as_they_are_now() -> None:
    reft_model = wrapped((1,), lambda _: projected(Half(**SIZES)))
    both = ["default", None]
    before = logits(reft_model, adapter_names=both)
    assert_close(before[0], logits(reft_model)[0])
    with torch.no_grad():
        next(iter(reft_model.interventions.values())).learned_source.bias.add_(1.0)
    after = logits(reft_model, adapter_names=both)
    assert_close(after[0], logits(reft_model)[0])
    assert not torch.allclose(before[0], after[0])


def test_half_precision_runs_in_the_units_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        sizes = SIZES | {"dtype": dtype}
        entry = {"layer": 1, "intervention": Composed(**sizes)}
        reft_model = rn.get_reft_model(base().bfloat16(), rn.ReftConfig(entry)).eval()
        result = logits(reft_model, subspaces=[[0, 1], [2, 3]])
        assert result.dtype == torch.bfloat16
        assert result.isfinite().all()


def test_a_result_of_another_shape_is_refused() -> None:
    class Narrow(rn.NoreftIntervention):
        def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:  # type: ignore[override]  # as in pyreft
            return base[..., :1]

    reft_model = wrapped((1,), lambda _: Narrow(**SIZES))
    message = r"Narrow\.forward: expected hidden states \(2, 1, 32\), got \(2, 1, 1\)"
    with pytest.raises(ValueError, match=message):
        reft_model(**INPUTS)


def test_its_subspaces_are_left_out_of_comparisons() -> None:
    reft_model = wrapped((1,), lambda _: Zero(**SIZES))
    assert subspaces_of(reft_model) == {}


class Directed(rn.NoreftIntervention):
    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:  # type: ignore[override]  # as in pyreft
        return super().forward(base / base.norm(dim=-1, keepdim=True))


def test_padding_gives_it_no_states_that_no_token_has() -> None:
    entry = {"layer": 1, "positions": "all", "intervention": projected(Directed(**SIZES))}
    reft_model = rn.get_reft_model(base(), rn.ReftConfig(entry)).train()
    mask = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])
    reft_model(input_ids=IDS, attention_mask=mask, labels=IDS).loss.backward()
    gradients = [p.grad for p in reft_model.interventions.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
