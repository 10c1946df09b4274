"""Calls in pyreft's forms give what pyreft gives.

Expected numbers are of pyreft (dafd099, pyvene 0.1.8, transformers 4.45.1) with the same weights.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from transformers import (
    BatchEncoding,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import reftnoise as rn
from reftnoise._util.errors import warn_once
from support.models.pyreft_units import (
    IDS,
    INPUTS,
    SIZES,
    at,
    base,
    projected,
    rotated,
    wrapped,
)
from support.tolerance import assert_close

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def loreft(seed: int = 5) -> rn.LoreftIntervention:
    unit: rn.LoreftIntervention = rotated(rn.LoreftIntervention(**SIZES), seed)
    return unit


def noreft(seed: int = 5) -> rn.NoreftIntervention:
    unit: rn.NoreftIntervention = projected(rn.NoreftIntervention(**SIZES), seed)
    return unit


def one(**fields: Any) -> rn.ReftModel:
    return wrapped([1], loreft, **fields)


def two(*layers: int) -> rn.ReftModel:
    return wrapped(layers or (1, 2), noreft)


def last(units: int = 1) -> dict[str, Any]:
    return at(*[[[5], [5]]] * units)


def same(output: Any, expected: list[float]) -> None:
    """The logit of token 7 at each token."""
    torch.testing.assert_close(
        output.logits[:, :, 7].flatten(), torch.tensor(expected), atol=1e-4, rtol=0
    )


LAST = [0.0410, 0.0044, 0.1060, 0.0550, -0.0282, -0.1935]
LAST += [0.0410, 0.0088, -0.1520, 0.0882, 0.0970, -0.1891]
BARE = [*LAST[:5], -0.0520, *LAST[6:11], -0.0116]
ALL = [-0.1892, -0.1764, -0.1746, -0.2012, -0.1986, -0.1906]
ALL += [-0.1892, -0.2064, -0.1746, -0.1530, -0.1666, -0.1909]
THIRD = [0.0410, 0.0044, 0.1060, -0.2035, 0.0007, -0.0199]
THIRD += [0.0410, 0.0088, -0.1520, -0.1489, 0.0956, -0.0142]
SECOND = [0.0410, 0.0044, -0.1749, 0.0742, -0.0120, -0.0345]
SECOND += [0.0410, 0.0088, -0.1688, 0.0776, 0.0982, -0.0210]
BOTH_SECOND = [0.0410, 0.0044, -0.0554, 0.0754, -0.0102, -0.0325]
BOTH_SECOND += [0.0410, 0.0088, -0.1420, 0.0784, 0.0926, -0.0210]


# -- a mapping of all inputs -----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((INPUTS,), {"unit_locations": last()}),
        ((BatchEncoding(INPUTS),), {"unit_locations": last()}),
        ((INPUTS, None, last()), {}),
        ((INPUTS, [None], last(), None, None, None, False, None, False), {}),
        ((), {"base": INPUTS, "unit_locations": last()}),
        ((), {"input_ids": INPUTS, "unit_locations": last()}),
        ((INPUTS,), {"unit_locations": {"base": [[[5], [5]]]}}),
        ((INPUTS,), {"unit_locations": {"sources->base": (None, torch.tensor([[[5], [5]]]))}}),
        ((INPUTS,), {"unit_locations": last(), "use_cache": False, "labels": IDS}),
    ],
)
def test_a_mapping_of_all_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    original, edited = one()(*args, **kwargs)
    assert original is None
    same(edited, LAST)


@torch.no_grad()
def test_the_bares_output_and_an_object() -> None:
    original, edited = one()(INPUTS, unit_locations=last(), output_original_output=True)
    same(original, BARE)
    same(edited, LAST)
    outputs = one()(INPUTS, unit_locations=last(), return_dict=True)
    assert outputs.original_outputs is outputs.collected_activations is None
    same(outputs.intervened_outputs, LAST)


@torch.no_grad()
@pytest.mark.parametrize(
    ("locations", "expected"),
    [
        ({"base": 3}, THIRD),
        ({"sources->base": 3}, THIRD),
        ({"sources->base": (None, 3)}, THIRD),
        ({"sources->base": (1, 3)}, THIRD),
        ({"base": [0, 2]}, SECOND),  # a source's column, and the base's
        ({"base": [2]}, SECOND),
        (at(None), ALL),
        (None, ALL),
    ],
    ids=str,
)
def test_locations_of_one_unit(locations: Any, expected: list[float]) -> None:
    same(one()(INPUTS, unit_locations=locations)[1], expected)


@torch.no_grad()
@pytest.mark.parametrize("locations", [{"sources->base": (None, 2)}, {"base": [2]}], ids=str)
def test_one_location_for_two_units(locations: Any) -> None:
    same(two()(INPUTS, unit_locations=locations)[1], BOTH_SECOND)


@torch.no_grad()
def test_all_tokens_are_those_of_prompts_and_completions() -> None:
    masked = IDS.masked_fill(torch.arange(6) < 3, -100)
    for labels, expected in ((IDS, 4.62451), (masked, 4.6059)):
        loss = one()(INPUTS, labels=labels)[1].loss
        assert loss.item() == pytest.approx(expected, abs=1e-4)
    _, output = two()(INPUTS)
    logits = [-0.0930, -0.0904, -0.0579, -0.0558, -0.0783, -0.0966]
    same(output, [*logits, -0.0930, -0.1057, -0.1580, -0.0885, -0.0908, -0.0836])
    _, output = two()(INPUTS, unit_locations=at([[5], [5]], None))
    logits = [-0.0801, -0.0812, -0.0238, -0.0279, -0.0700, -0.1132]
    same(output, [*logits, -0.0801, -0.0970, -0.1341, -0.0562, -0.0520, -0.0983])


@torch.no_grad()
def test_all_tokens_are_those_of_padding_too() -> None:
    ids = torch.tensor([[1, 5, 6, 7, 8, 9], [1, 15, 16, 0, 0, 0]])
    _, output = two()({"input_ids": ids, "attention_mask": (ids != 0).long()}, labels=ids)
    logits = [-0.0930, -0.0904, -0.0579, -0.0558, -0.0783, -0.0966]
    same(output, [*logits, -0.0930, -0.1057, -0.1580, -0.1137, -0.1137, -0.1137])
    assert output.loss.item() == pytest.approx(4.60793, abs=1e-4)


@torch.no_grad()
def test_named_positions_hold() -> None:
    model = one(positions="l1")
    same(model(INPUTS)[1], LAST)
    expected = model.generate(**INPUTS, **GREEDY)
    assert torch.equal(model.generate(INPUTS, **GREEDY)[1], expected)
    assert torch.equal(model.generate(INPUTS, intervene_on_prompt=True, **GREEDY)[1], expected)
    mixed = rn.ReftConfig(
        [
            {"layer": 1, "intervention": loreft(), "positions": "l1"},
            {"layer": 2, "intervention": loreft(6)},
        ]
    )
    model = rn.get_reft_model(base(), mixed).eval()
    every = [list(range(6))] * 2
    expected = model(INPUTS, unit_locations=at([[5], [5]], every))[1].logits
    assert torch.equal(model(INPUTS)[1].logits, expected)


@torch.no_grad()
def test_a_base_that_tells_its_tokens_when_it_runs() -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    encoder_decoder = T5ForConditionalGeneration(T5Config(vocab_size=50, **sizes, **tokens)).eval()
    entry: dict[str, Any] = {"layer": 1, "intervention": "loreft", "low_rank_dimension": 2}
    models = []
    for where in ({}, {"positions": "all+decode"}):
        units = [entry | where, entry | {"component": "decoder.block_output"} | where]
        models.append(rn.get_reft_model(encoder_decoder, rn.ReftConfig(units)).eval())
    open_, named = models
    named.load_state_dict(open_.state_dict())
    expected = named(**INPUTS, labels=IDS).logits
    assert torch.equal(open_(INPUTS, labels=IDS)[1].logits, expected)
    assert not torch.equal(open_(**INPUTS, labels=IDS).logits, expected)
    few = {"max_new_tokens": 3, "do_sample": False}
    _, edited = open_.generate(INPUTS, intervene_on_prompt=True, **few)
    assert torch.equal(edited, named.generate(**INPUTS, **few))
    with pytest.raises(ValueError, match="tells the length of its sequences only when it runs"):
        open_(INPUTS, labels=IDS, unit_locations={"base": 2})


@torch.no_grad()
def test_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    model = one()
    for _ in range(2):
        model(INPUTS)
        model.generate(INPUTS, **GREEDY)
    model(**INPUTS)
    model(INPUTS, unit_locations=last())
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    assert "edits all tokens, as in pyreft: name positions such as 'l1'" in said[0]
    assert "edits new tokens alone (intervene_on_prompt=True: all tokens)" in said[1]


@torch.no_grad()
def test_transformers_form_keeps_the_last_prompt_token() -> None:
    same(one()(**INPUTS), LAST)
    same(one()(IDS, INPUTS["attention_mask"]), LAST)


@torch.no_grad()
def test_a_saved_adapter_names_no_more_than_its_config(tmp_path: Path) -> None:
    model = wrapped([1, 1], loreft)
    model.save_pretrained(tmp_path)
    loaded = rn.ReftModel.from_pretrained(base(), tmp_path)
    for locations in (None, at([[0], [1]], [[5], [5]])):
        expected = model(INPUTS, unit_locations=locations)[1].logits
        assert torch.equal(loaded(INPUTS, unit_locations=locations)[1].logits, expected)


# -- generation ------------------------------------------------------------------------------------

PROMPT = [[13, 64, 90, 28, 61, 45], [22, 43, 79, 38, 9, 34]]
NEW = [[83, 13, 13, 13, 13, 13], [8, 13, 13, 13, 13, 13]]
ALWAYS = [[13, 13, 13, 13, 13, 13], [22, 22, 22, 22, 22, 22]]


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"unit_locations": last(), "intervene_on_prompt": True}, PROMPT),
        ({}, NEW),
        ({"intervene_on_prompt": False}, NEW),
        ({"unit_locations": {"base": 0}}, NEW),
        ({"unit_locations": at([[0], [0]])}, NEW),
        ({"intervene_on_prompt": True}, ALWAYS),
        ({"unit_locations": at(None), "intervene_on_prompt": False}, ALWAYS),
        (
            {"unit_locations": at([[5]] * 4), "intervene_on_prompt": True, "num_beams": 2},
            [[13, 64, 90, 65, 90, 28], [13, 64, 90, 28, 34, 34]],
        ),
    ],
    ids=str,
)
def test_generate(kwargs: dict[str, Any], expected: list[list[int]]) -> None:
    for inputs in ({"base": INPUTS}, {"inputs": INPUTS}):
        original, edited = one().generate(**inputs, **kwargs, **GREEDY)
        assert original is None
        assert edited[:, 6:].tolist() == expected


def test_generate_with_two_units() -> None:
    few = GREEDY | {"max_new_tokens": 4}
    _, edited = two().generate(INPUTS, unit_locations={"base": 0}, **few)
    assert edited[:, 6:].tolist() == [[83, 29, 75, 75], [8, 75, 75, 75]]
    outputs = two().generate(
        INPUTS,
        unit_locations=last(2),
        intervene_on_prompt=True,
        output_original_output=True,
        **few,
    )
    assert outputs[0][:, 6:].tolist() == [[83, 29, 55, 14], [8, 34, 34, 34]]
    assert outputs[1][:, 6:].tolist() == [[72, 69, 67, 75], [45, 34, 34, 34]]
    ends = [[[0, 1]] * 2, [[4, 5]] * 2] * 2
    _, edited = two(1, 1, 2, 2).generate(
        INPUTS, unit_locations=at(*ends), intervene_on_prompt=True, **GREEDY
    )
    assert edited[:, 6:].tolist() == [[61, 55, 14, 87, 34, 34], [45, 34, 34, 34, 34, 34]]


def test_generate_from_padded_prompts() -> None:
    ids = torch.tensor([[1, 5, 6, 7, 8, 9], [0, 0, 0, 1, 15, 16]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    few = GREEDY | {"max_new_tokens": 4}
    _, edited = two().generate(inputs, intervene_on_prompt=True, **few)
    assert edited[:, 6:].tolist() == [[75, 75, 75, 75], [34, 34, 34, 34]]
    _, edited = two().generate(inputs, **few)
    assert edited[:, 6:].tolist() == [[83, 29, 75, 75], [34, 34, 34, 34]]


def test_guidance_edits_the_same_tokens_of_its_other_prompt() -> None:
    model, named = one(), one(positions="all+decode")
    settings = GREEDY | {"guidance_scale": 1.5}
    _, edited = model.generate(INPUTS, intervene_on_prompt=True, **settings)
    assert torch.equal(edited, named.generate(**INPUTS, **settings))


# -- columns of a batch ----------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {
        "input_ids": [1, 5, 6, 7, 8, 9],
        "labels": [-100, -100, 6, 7, 8, 9],
        "intervention_locations": [[1], [3]],
    },
    {
        "input_ids": [1, 15, 16, 17, 18],
        "labels": [-100, -100, 16, 17, 18],
        "intervention_locations": [[0], [2]],
    },
]


def collated(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch, padded to six tokens, with columns as their lists are."""
    batch = {}
    for name, fill in {"input_ids": 0, "labels": -100}.items():
        batch[name] = torch.tensor([row[name] + [fill] * (6 - len(row[name])) for row in rows])
    for name in rows[0].keys() - batch.keys():
        batch[name] = torch.tensor([row[name] for row in rows])
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    return batch


def losses(model: rn.ReftModel, rows: Any, trainer: type[Trainer], tmp_path: Path) -> list[float]:
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    run = trainer(model=model, args=args, train_dataset=rows, data_collator=collated)
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("trainer", [Trainer, rn.ReftTrainerForCausalLM])
@pytest.mark.parametrize(
    ("layers", "expected"), [((1, 2), [4.5734, 4.552, 4.531]), ((1, 1), [4.57, 4.5483, 4.5273])]
)
def test_a_column_of_locations_is_trained_on(
    layers: tuple[int, ...], expected: list[float], trainer: type[Trainer], tmp_path: Path
) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    found = losses(two(*layers), rows, trainer, tmp_path)
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_dataset_without_the_column_has_the_positions_of_the_config(tmp_path: Path) -> None:
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in ROWS]
    model = wrapped([1, 2], noreft, positions="all+decode")  # pyreft edits all tokens
    found = losses(model, datasets.Dataset.from_list(rows), rn.ReftTrainerForCausalLM, tmp_path)
    assert found == pytest.approx([4.6106, 4.5724, 4.5325], abs=1e-4)


def test_a_batch_with_locations_in_each_form() -> None:
    model, batch = two(), collated(ROWS)
    output = model(**batch)
    assert output.loss.item() == pytest.approx(4.5734, abs=1e-4)
    assert model(batch)[1].loss.item() == output.loss.item()
    by_unit = batch.pop("intervention_locations").permute(1, 0, 2).tolist()
    assert model(batch, unit_locations=at(*by_unit))[1].loss.item() == output.loss.item()
    nested = [row["intervention_locations"] for row in ROWS]
    assert model(**batch, intervention_locations=nested).loss.item() == output.loss.item()
    assert model(**batch, intervention_locations=None).loss.item() != output.loss.item()


def test_generate_with_a_column_of_locations() -> None:
    expected = one().generate(INPUTS, unit_locations=last(), intervene_on_prompt=True, **GREEDY)[1]
    column = torch.full((2, 1, 1), 5)
    assert torch.equal(one().generate(**INPUTS, intervention_locations=column, **GREEDY), expected)
    assert torch.equal(one().generate(IDS, intervention_locations=column, **GREEDY), expected)
    _, edited = one().generate({**INPUTS, "intervention_locations": column}, **GREEDY)
    assert torch.equal(edited, expected)


@torch.no_grad()
def test_subspaces_beside_locations_are_by_row() -> None:
    model = two()
    locations = torch.tensor([[[1], [3]], [[0], [2]]])
    by_row = [[[0, 1], [2, 3]], [[1, 2], [0, 3]]]
    by_unit = [[[0, 1], [1, 2]], [[2, 3], [0, 3]]]
    expected = [0.0410, -0.0721, 0.1421, 0.0410, 0.0022, -0.0208]
    expected += [-0.0498, 0.0409, -0.0480, 0.1133, 0.1125, -0.0008]
    unit_locations = at([[1], [0]], [[3], [2]])
    for output in (
        model(INPUTS, unit_locations=unit_locations, subspaces=by_unit)[1],
        model(INPUTS, unit_locations=unit_locations, subspaces=torch.tensor(by_unit))[1],
        model(**INPUTS, unit_locations=unit_locations, subspaces=by_unit),
        model(**INPUTS, unit_locations=unit_locations, subspaces=torch.tensor(by_row)),
        model(**INPUTS, intervention_locations=locations, subspaces=torch.tensor(by_row)),
        model(**INPUTS, intervention_locations=locations, subspaces=by_row),
        model({**INPUTS, "intervention_locations": locations, "subspaces": by_row})[1],
    ):
        same(output, expected)


@torch.no_grad()
def test_one_subspace_for_all_rows_and_units() -> None:
    model, where = two(), at([[1], [0]], [[3], [2]])
    every = [[[0, 1]] * 2] * 2
    expected = model(INPUTS, unit_locations=where, subspaces=every)[1].logits
    assert torch.equal(model(INPUTS, unit_locations=where, subspaces=[0, 1])[1].logits, expected)
    expected = model(INPUTS, unit_locations=where, subspaces=[[[2]] * 2] * 2)[1].logits
    assert torch.equal(model(INPUTS, unit_locations=where, subspaces=2)[1].logits, expected)


def test_signatures_have_the_columns() -> None:
    for method in (rn.ReftModel.forward, rn.ReftModel.generate):
        assert {"intervention_locations", "subspaces"} <= inspect.signature(
            method
        ).parameters.keys()


class Doubled(rn.ReftModel):
    """A model of one's own in pyreft's form, whose loss is twice that of the units."""

    def forward(
        self,
        base: Any,
        sources: Any = None,
        unit_locations: Any = None,
        source_representations: Any = None,
        subspaces: Any = None,
        labels: Any = None,
    ) -> Any:
        _, output = super().forward(
            base, sources, unit_locations, source_representations, subspaces, labels
        )
        output["loss"] = 2 * output.loss
        return None, output


@pytest.mark.parametrize("trainer", [Trainer, rn.ReftTrainerForCausalLM])
def test_trainers_call_a_forward_of_ones_own(trainer: type[Trainer], tmp_path: Path) -> None:
    units = [{"layer": 1 + i, "intervention": noreft(5 + i)} for i in range(2)]
    model = Doubled(rn.ReftConfig(units), base())
    model.disable_model_gradients()
    batch = collated(ROWS)
    locations = batch["intervention_locations"].permute(1, 0, 2).tolist()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    pair = model(inputs, unit_locations=at(*locations), labels=batch["labels"])
    assert pair[1].loss.item() == pytest.approx(2 * 4.5734, abs=2e-4)
    assert model(**batch).loss.item() == pair[1].loss.item()
    first, *_ = losses(model, datasets.Dataset.from_list(ROWS), trainer, tmp_path)
    assert first == pytest.approx(2 * 4.5734, abs=2e-4)


# -- two units at one site -------------------------------------------------------------------------


@torch.no_grad()
def test_units_at_one_site_act_one_after_the_other() -> None:
    model = two(1, 1)
    prefix, suffix = [[0, 3], [0, 3]], [[3, 4], [3, 5]]
    expected = [-0.0547, 0.0166, 0.1146, -0.0564, -0.0446, -0.0173]
    expected += [-0.0547, 0.0187, -0.1482, -0.0686, 0.1003, -0.0336]
    same(model(INPUTS, unit_locations=at(prefix, suffix))[1], expected)
    same(model(**INPUTS, unit_locations=at(prefix, suffix)), expected)
    expected = [-0.0381, -0.0093, 0.1038, -0.0578, -0.0751, -0.0150]
    expected += [-0.0381, 0.0050, -0.1515, -0.0698, 0.0993, -0.0808]
    same(model(INPUTS, unit_locations=at(suffix, prefix))[1], expected)
    expected = [-0.0767, -0.0764, -0.0462, -0.0465, -0.0701, -0.0874]
    expected += [-0.0767, -0.0934, -0.1468, -0.0738, -0.0768, -0.0711]
    same(model(INPUTS)[1], expected)


@torch.no_grad()
def test_prefixes_and_suffixes_of_two_layers() -> None:
    model = wrapped([1, 2, 1, 2], loreft)
    expected = [-0.1050, 0.0515, 0.1383, 0.0731, -0.0152, -0.0272]
    expected += [-0.1050, 0.0601, -0.1237, 0.1093, 0.1159, -0.0394]
    first, final = [[0], [0]], [[5], [5]]
    same(model(INPUTS, unit_locations=at(first, first, final, final))[1], expected)


def test_units_at_one_site_without_locations() -> None:
    model = two(1, 1)
    message = (
        r"positions 'l1' of layer_1_.*#0 and 'l1' of layer_1_.*#1 can overlap .* units at one site "
        "need disjoint positions, in the config or as unit_locations or intervention_locations"
    )
    for call in (
        lambda: model(**INPUTS),
        lambda: model.generate(**INPUTS, **GREEDY),
        lambda: model(**INPUTS, adapter_names=["default"] * 2),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sources": [INPUTS]}, "sources .*: no unit reads sources, expected None"),
        ({"source_representations": {"a": IDS}}, "source_representations .*: no unit reads"),
        ({"unit_locations": at([[6], [2]])}, "expected columns from 0 to 5"),
        ({"unit_locations": at([[1], [2, 3]])}, r"nested as 1 interventions × 2 rows × positions"),
        ({"unit_locations": at([[5]] * 4)}, r"nested as 1 interventions × 2 rows × positions"),
        ({"unit_locations": at(torch.ones(2, 1).bool())}, r"nested as 1 interventions × 2 rows"),
        ({"unit_locations": {"others": 3}}, r"unit_locations \{'others': 3\}: expected"),
        ({"unit_locations": 3}, "unit_locations 3: expected"),
        (
            {"intervention_locations": torch.zeros(1, 2, 1)},
            r"intervention_locations \(1, 2, 1\): expected 2 rows × 1 interventions × positions",
        ),
        (
            {"intervention_locations": torch.ones(2, 1, 1, dtype=torch.bool)},
            r"intervention_locations \(2, 1, 1\): expected 2 rows × 1 interventions × positions",
        ),
        (
            {"intervention_locations": [[[0]], [[0, 1]]]},
            r"intervention_locations \[\[\[0\]\], \[\[0, 1\]\]\]: expected 2 rows",
        ),
        (
            {"intervention_locations": [[[0]], [[0]]], "unit_locations": last()},
            "intervention_locations and unit_locations say the same: give one",
        ),
        (
            {"intervention_locations": [[[0]], [[0]]], "subspaces": 2},
            "subspaces 2: expected the dimensions of each of 2 rows",
        ),
        ({"base": IDS}, "base .*: expected a mapping of inputs"),
    ],
)
def test_errors_of_forward(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one()(**{"base": INPUTS} | kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"unit_locations": last()},
            r"unit_locations of intervention 0, \[\[5\], \[5\]\]: with intervene_on_prompt=False "
            "they are columns of each new token by itself, so only 0 is possible",
        ),
        (
            {"unit_locations": at([[5], [4], [5], [5]]), "intervene_on_prompt": True},
            "has 4 rows for 2 prompts, expected one for each, or the same for all beams",
        ),
        (
            {"unit_locations": at([[5]] * 3), "intervene_on_prompt": True},
            "nested as 1 interventions × 2 rows × positions",
        ),
    ],
)
def test_errors_of_generate(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one().generate(INPUTS, **kwargs, **GREEDY)


def test_a_flag_against_the_configs_positions() -> None:
    for inputs in ({"base": INPUTS}, INPUTS):
        with pytest.raises(
            ValueError, match="give the config positions 'decode' or 'all\\+decode'"
        ):
            one(positions="l1").generate(**inputs, intervene_on_prompt=False)
    _, edited = one(positions="decode").generate(INPUTS, intervene_on_prompt=False, **GREEDY)
    assert edited[:, 6:].tolist() == NEW


def test_an_argument_that_comes_twice() -> None:
    with pytest.raises(TypeError, match="sources comes twice"):
        one()(INPUTS, None, sources=None)


@torch.no_grad()
def test_a_column_of_ones_own_that_is_called_base() -> None:
    reft_model = one()
    expected = reft_model(**INPUTS).logits
    column = torch.tensor([4.0, 2.0])
    assert torch.equal(reft_model(**INPUTS, base=column).logits, expected)
    assert torch.equal(reft_model(IDS, INPUTS["attention_mask"], base=column).logits, expected)
    located = reft_model(**INPUTS, base=column, intervention_locations=[[[5]], [[5]]])
    assert_close(located.logits, expected)
