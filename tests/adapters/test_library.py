"""Adapters by name on one base: routed, mixed and scaled rows against each row alone."""

import gc
import math
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reftnoise as rn
from reftnoise.adapters.frozen import FrozenAdapter
from reftnoise.analysis.inspection import library_overlaps, subspace_cosine, subspaces
from reftnoise.interventions.arguments import constructor_arguments
from support.adapters import ENTRIES, wrapped
from support.models.architectures import tiny_model
from support.tolerance import assert_close

NAMES = ["last", None, "ends", "everywhere", "houlsby", "direft", "red", "last"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, entries) in enumerate(ENTRIES.items()):
        wrapped(entries, tiny_model(), seed).save_pretrained(folder / name)
    return {name: folder / name for name in ENTRIES}


@pytest.fixture
def reft_model(directories: dict[str, Path]) -> rn.ReftModel:
    model = rn.get_reft_model(tiny_model().eval())
    for name, directory in directories.items():
        model.load_adapter(directory, name)
    return model


def prompts(rows: int, side: str = "left") -> dict[str, Tensor]:
    """Rows of different lengths."""
    torch.manual_seed(5)
    ids = torch.randint(3, 90, (rows, 9))
    mask = torch.ones_like(ids)
    for row in range(rows):
        padding = slice(0, row % 5) if side == "left" else slice(9 - row % 5, 9)
        mask[row, padding] = 0
        ids[row, padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def alone(name: str | None, directories: dict[str, Path]) -> Any:
    base = tiny_model().eval()
    return base if name is None else rn.ReftModel.from_pretrained(base, directories[name])


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_is_what_its_adapter_makes_of_it(
    reft_model: rn.ReftModel, directories: dict[str, Path], side: str
) -> None:
    batch = prompts(len(NAMES), side)
    with torch.no_grad():
        logits = reft_model(**batch, adapter_names=NAMES).logits
        for row, name in enumerate(NAMES):
            kept = batch["attention_mask"][row].bool()
            ids = batch["input_ids"][row][kept][None]
            expected = alone(name, directories)(input_ids=ids).logits[0]
            assert_close(logits[row][kept], expected)


def test_generated_tokens_are_those_of_each_row_alone(
    reft_model: rn.ReftModel, directories: dict[str, Path]
) -> None:
    batch = prompts(len(NAMES))
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = reft_model.generate(**batch, adapter_names=NAMES, **settings)
    for row, name in enumerate(NAMES):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        mask = torch.ones_like(ids)
        expected = alone(name, directories).generate(input_ids=ids, attention_mask=mask, **settings)
        assert tokens[row, 9:].tolist() == expected[0, ids.shape[1] :].tolist()


def test_candidates_of_several_tokens_are_checked_with_the_rows_adapters(
    reft_model: rn.ReftModel,
) -> None:
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch |= {"adapter_names": [{"everywhere": 0.5, "houlsby": 1.0}]}
    lengths = set()
    decoder = reft_model.model.model
    handle = decoder.register_forward_hook(lambda *call: lengths.add(call[-1][0].shape[1]))
    found = reft_model.generate(**batch, **settings, prompt_lookup_num_tokens=3)
    handle.remove()
    assert lengths - {1, ids.shape[1]}, "no candidates were checked"
    assert torch.equal(found, reft_model.generate(**batch, **settings))


def test_beams_and_return_sequences_follow_their_row(
    reft_model: rn.ReftModel, directories: dict[str, Path]
) -> None:
    names = ["everywhere", None]
    batch = prompts(2)
    settings = {
        "max_new_tokens": 6,
        "num_beams": 3,
        "num_return_sequences": 2,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    tokens = reft_model.generate(**batch, adapter_names=names, **settings)
    for row, name in enumerate(names):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        mask = torch.ones_like(ids)
        expected = alone(name, directories).generate(input_ids=ids, attention_mask=mask, **settings)
        assert torch.equal(tokens[2 * row : 2 * row + 2, 9:], expected[:, ids.shape[1] :])


def test_an_adapter_of_all_rows_is_exactly_that_adapter(
    reft_model: rn.ReftModel, directories: dict[str, Path]
) -> None:
    batch = prompts(3)
    with torch.no_grad():
        for name in ENTRIES:
            reft_model.set_adapter(name)
            expected = alone(name, directories)(**batch).logits
            assert_close(reft_model(**batch).logits, expected)
        reft_model.set_adapter(None)
        assert torch.equal(reft_model(**batch).logits, alone(None, directories)(**batch).logits)


# -- mixing --------------------------------------------------------------------------------------


def written_out(entries: list[Any], directories: dict[str, Path], batch: Any) -> Tensor:
    """Edits of adapters at all tokens of block outputs, added as hooks on the bare base."""
    base = tiny_model().eval()
    for name, scale in entries:
        adapter = rn.ReftModel.from_pretrained(tiny_model(), directories[name])
        for one in adapter.engine.units:
            layer = base.get_submodule(one.site.name)

            def edit(_: Any, __: Any, output: Any, unit: Any = one.unit, s: float = scale) -> Any:
                hidden = output[0] if isinstance(output, tuple) else output
                changes.append(s * unit.edit(hidden))
                return output

            layer.register_forward_hook(edit)
    changes: list[Tensor] = []

    def add(_: Any, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden + sum(changes)
        changes.clear()
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    for layer in base.model.layers:
        layer.register_forward_hook(add)
    with torch.no_grad():
        logits: Tensor = base(**batch).logits
    return logits


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("everywhere")
    for seed, (name, kind) in enumerate([("a", "loreft"), ("b", "noreft"), ("c", "direft")]):
        entry = {"layer": "all", "intervention": kind, "low_rank_dimension": 3, "positions": "all"}
        wrapped([entry], tiny_model(), seed).save_pretrained(folder / name)
    return {name: folder / name for name in "abc"}


@pytest.mark.parametrize("name", rn.interventions.INTERVENTIONS)
def test_frozen_weights_have_no_gradient(name: str) -> None:
    entry = {"layer": 0, "intervention": name, "positions": "l1"}
    if "low_rank_dimension" in constructor_arguments(rn.interventions.INTERVENTIONS[name]):
        entry["low_rank_dimension"] = 2
    if issubclass(rn.interventions.INTERVENTIONS[name], rn.interventions.NoiseIntervention):
        pytest.skip("noise is no part of a frozen adapter")
    reft_model = rn.get_reft_model(tiny_model(), rn.ReftConfig([entry]))
    for buffer in reft_model.interventions.buffers():
        buffer.fill_(1)
    frozen = FrozenAdapter.of(reft_model.engine.units)
    assert not frozen.weights.requires_grad
    assert len(frozen.weights)


@pytest.mark.parametrize(
    ("choice", "parts"),
    [
        ("a", [("a", 1.0)]),
        (["a", "b"], [("a", 1.0), ("b", 1.0)]),
        ({"a": 0.5}, [("a", 0.5)]),
        ({"a": -0.5, "b": 2.0, "c": 0.25}, [("a", -0.5), ("b", 2.0), ("c", 0.25)]),
        (["a", "a"], [("a", 2.0)]),
    ],
)
def test_several_adapters_of_a_row_read_the_same_states_and_their_edits_are_added(
    choice: Any, parts: Any, everywhere: dict[str, Path]
) -> None:
    reft_model = rn.get_reft_model(tiny_model().eval())
    for name, directory in everywhere.items():
        reft_model.load_adapter(directory, name)
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])}
    with torch.no_grad():
        logits = reft_model(**batch, adapter_names=[choice, None]).logits
    assert_close(logits[0], written_out(parts, everywhere, batch)[0])
    assert_close(logits[1], written_out([], everywhere, batch)[1])


def test_the_models_own_units_are_one_of_the_choices(directories: dict[str, Path]) -> None:
    reft_model = wrapped(ENTRIES["last"], tiny_model().eval(), seed=9)
    reft_model.load_adapter(directories["ends"], "ends")
    batch = prompts(3)
    with torch.no_grad():
        routed = reft_model(**batch, adapter_names=["default", "ends", {"default": 0.5}]).logits
        own = reft_model(**batch).logits
        reft_model.scale = 0.5
        half = reft_model(**batch).logits
    kept = batch["attention_mask"].bool()
    assert_close(routed[0][kept[0]], own[0][kept[0]])
    assert_close(routed[2][kept[2]], half[2][kept[2]])


def test_training_of_the_own_units_is_seen_by_name() -> None:
    reft_model = wrapped(ENTRIES["last"], tiny_model(), seed=9)
    ids = torch.tensor([[5, 6, 7, 8]])
    optimizer = torch.optim.SGD(reft_model.interventions.parameters(), lr=0.5)
    for _ in range(2):
        reft_model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        reft_model.eval()
        with torch.no_grad():
            by_name = reft_model(input_ids=ids, adapter_names=["default"]).logits
            assert_close(by_name, reft_model(input_ids=ids).logits)


def test_the_own_units_are_put_side_by_side_anew_only_when_they_change() -> None:
    reft_model = wrapped(ENTRIES["last"], tiny_model().eval(), seed=9)

    def engine() -> Any:
        return reft_model.adapters.planner(["default"], batch=1).engine

    first = engine()
    assert engine() is first
    with torch.no_grad():
        next(reft_model.interventions.parameters()).add_(0.5)
    second = engine()
    assert second is not first
    assert engine() is second
    assert second.settings is reft_model.engine.settings


def test_the_own_units_are_frozen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reft_model = wrapped(ENTRIES["last"], tiny_model().eval(), seed=9)
    with torch.no_grad():
        next(reft_model.interventions.parameters()).fill_(float("nan"))  # equals nothing
    counted, freeze = [], FrozenAdapter.of
    monkeypatch.setattr(FrozenAdapter, "of", lambda units: counted.append(1) or freeze(units))
    for _ in range(3):
        reft_model.adapters.planner(["default"], batch=1)
    assert len(counted) == 1


# -- the library ---------------------------------------------------------------------------------


def test_a_name_can_be_given_anew_and_forgotten(
    reft_model: rn.ReftModel, directories: dict[str, Path]
) -> None:
    batch = prompts(2)
    with torch.no_grad():
        before = reft_model(**batch, adapter_names=["last", "last"]).logits
        reft_model.load_adapter(directories["ends"], "last")
        after = reft_model(**batch, adapter_names=["last", "last"]).logits
        expected = reft_model(**batch, adapter_names=["ends", "ends"]).logits
    assert torch.equal(after, expected)
    assert not torch.equal(before, after)
    reft_model.delete_adapter("last")
    assert "last" not in reft_model.adapters
    with pytest.raises(ValueError, match=r"adapter 'last' is not loaded; .*possible: ends"):
        reft_model(**batch, adapter_names=["last", None])


def test_threads_may_choose_more_adapters_than_are_kept_side_by_side(
    reft_model: rn.ReftModel, directories: dict[str, Path]
) -> None:
    names = list(directories)
    adapters = reft_model.adapters
    sites = {n: {str(shape.site) for shape in adapters[n].shapes} for n in names}

    def choose(first: int) -> None:
        for turn in range(200):
            name = names[(first + turn) % len(names)]
            engine = reft_model.adapters.planner([name], batch=1).engine
            assert {str(one.site) for one in engine.units} == sites[name]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(choose, range(6)))  # raises what a thread raised
    finally:
        sys.setswitchinterval(before)


def test_loading_draws_no_random_numbers(directories: dict[str, Path]) -> None:
    reft_model = rn.get_reft_model(tiny_model())
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    reft_model.load_adapter(directories["last"], "last")
    assert torch.equal(torch.rand(3), expected)


def test_a_thousand_adapters_need_the_memory_of_their_weights(
    directories: dict[str, Path],
) -> None:
    reft_model = rn.get_reft_model(tiny_model())
    reft_model.load_adapter(directories["last"], "first")
    tracemalloc.start()
    for number in range(100):
        reft_model.load_adapter(directories["last"], str(number))
    gc.collect()
    objects, _ = tracemalloc.get_traced_memory()  # of Python; tensors have theirs elsewhere
    tracemalloc.stop()
    assert objects < 100 * 3000
    assert len({id(adapter.shapes) for adapter in reft_model.adapters.values()}) == 1


# -- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["last"], r"expected a list of 2, one choice per row of the batch"),
        ("last", r"expected a list of 2"),
        (["lost", None], r"adapter 'lost' is not loaded; did you mean 'last'\?"),
        ([{"last": math.nan}, None], r"mapping from names to finite scales"),
        ([{"last": "1"}, None], r"mapping from names to finite scales"),
        ([{"last": 1.0, 3: 1.0}, None], r"mapping from names to finite scales"),
        ([3, None], r"expected a name, a list of names"),
    ],
)
def test_mistakes_are_told(reft_model: rn.ReftModel, names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reft_model(**prompts(2), adapter_names=names)


def test_loaded_adapters_are_not_trained(
    reft_model: rn.ReftModel, directories: dict[str, Path]
) -> None:
    reft_model.set_adapter("last")
    with pytest.raises(ValueError, match="adapters that are loaded by name are frozen"):
        reft_model.train()(**prompts(2))
    with pytest.raises(ValueError, match="adapter 'last' is active"):
        reft_model.delete_adapter("last")
    with pytest.raises(ValueError, match="expected a name other than 'default'"):
        reft_model.load_adapter(directories["last"], "default")
    with pytest.raises(ValueError, match="unit_locations are of the model's own units"):
        reft_model.eval()(**prompts(2), unit_locations={"sources->base": (None, [[[0]] * 2])})


def test_an_adapter_that_would_spoil_the_rows_of_others_is_not_loaded(tmp_path: Path) -> None:
    broken = wrapped(ENTRIES["last"], tiny_model(), seed=0)
    with torch.no_grad():
        next(iter(broken.interventions.values())).learned_source.bias[0] = math.nan
    with pytest.warns(UserWarning, match="1 of 9 tensors that are saved hold numbers that are not"):
        broken.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds numbers that are not finite"):
        rn.get_reft_model(tiny_model()).load_adapter(tmp_path, "broken")


def test_an_adapter_with_weights_of_the_base_has_a_base_of_its_own(tmp_path: Path) -> None:
    config = rn.ReftConfig(ENTRIES["last"], modules_to_save=["lm_head"])
    trained = rn.get_reft_model(tiny_model(), config)
    trained.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has model\.lm_head\.weight, and rows of a batch share"):
        rn.get_reft_model(tiny_model()).load_adapter(tmp_path, "head")
    with pytest.raises(ValueError, match="this model trains weights of the base"):
        trained.load_adapter(tmp_path, "head")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
@pytest.mark.parametrize("nothing", [None, [], {}])
def test_where_peft_acts_in_all_rows_none_is_not_the_base(nothing: Any) -> None:
    pytest.importorskip("peft", reason="needs peft: pip install 'reftnoise[peft]'")
    lora = {"peft_type": "lora", "target_modules": ["q_proj"], "init_lora_weights": False}
    model = rn.get_reft_model(tiny_model(), rn.ReftConfig(ENTRIES["last"], peft=lora)).eval()
    batch = prompts(2)
    with pytest.raises(ValueError, match=r"the peft section acts on every row"):
        model(**batch, adapter_names=["default", nothing])
    own = model(**batch).logits
    assert_close(model(**batch, adapter_names=["default"] * 2).logits, own)
    model.set_adapter(nothing)
    with pytest.raises(ValueError, match="the peft section acts on every row"):
        model.generate(**batch, max_new_tokens=1)


# -- what a library holds ------------------------------------------------------------------------


def test_overlaps_are_those_of_the_adapters_two_by_two(tmp_path: Path) -> None:
    loreft = {"layer": [0, 2], "intervention": "loreft"}
    entries: dict[str, Any] = {
        "a": [loreft | {"low_rank_dimension": 3}],
        "b": [loreft | {"low_rank_dimension": 2}],
        "elsewhere": [loreft | {"layer": 1, "low_rank_dimension": 2}],
    }
    library = rn.get_reft_model(tiny_model())
    models = {}
    for seed, (name, units) in enumerate(entries.items()):
        models[name] = wrapped(units, tiny_model(), seed)
        models[name].save_pretrained(tmp_path / name)
        library.load_adapter(tmp_path / name, name)
    names, overlaps = library_overlaps(library.adapters)
    assert names == list(entries)
    expected = subspace_cosine(subspaces(models["a"]), subspaces(models["b"]))
    assert float(overlaps[0, 1]) == pytest.approx(sum(expected.values()) / 2, abs=1e-5)
    torch.testing.assert_close(overlaps, overlaps.T, equal_nan=True)
    torch.testing.assert_close(overlaps.diagonal(), torch.ones(3))
    assert math.isnan(overlaps[0, 2])
