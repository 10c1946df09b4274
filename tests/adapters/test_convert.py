"""pyvene's own files become adapters of the same outputs, and adapters become files it loads."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
import pyvene as pv
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, RobertaConfig

import reftnoise as rn
from reftnoise.adapters.pyreft.convert import convert
from reftnoise.cli.main import main
from support.models import pyreft_formed
from support.models.architectures import ARCHITECTURES, tiny_model
from support.models.pyreft_formed import adapter, entry, intervention, pyvene_model, saved
from support.tolerance import assert_close

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [15, 16, 17, 18, 19, 20, 21, 22]])
LAST = [[7], [7]]
PREFIX, SUFFIX = [[0, 1]] * 2, [[5, 6, 7]] * 2
BOTH = [[0, 1, 5, 6, 7]] * 2
NAMES = ["loreft", "noreft", "direft", "nodireft", "consreft", "lobireft"]
ROTATED = [name for name in NAMES if name not in ("noreft", "nodireft")]

formed = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base's config without its weights, which are not needed."""
    directory = tmp_path_factory.mktemp("base")
    tiny_model().config.save_pretrained(directory)
    return str(directory)


@torch.no_grad()
def theirs(model: Any, *locations: Any) -> Tensor:
    where = {"sources->base": (None, list(locations))}
    return model({"input_ids": IDS}, unit_locations=where)[1].logits


@torch.no_grad()
def ours(directory: Path, model: Any = None) -> Tensor:
    model = tiny_model() if model is None else model
    return rn.ReftModel.from_pretrained(model, directory)(input_ids=IDS).logits


def entries(directory: Path) -> Any:
    return json.loads((directory / "reft_config.json").read_text())["representations"]


def same(left: Tensor, right: Tensor) -> None:
    assert_close(left, right)


def different(left: Tensor, right: Tensor) -> None:
    assert (left - right).abs().max() > 0.1


# -- theirs → ours -------------------------------------------------------------------------------


@formed
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_theirs(
    name: str, is_tied: bool, dtype: torch.dtype, base: str, tmp_path: Path
) -> None:
    units = [intervention(name, dtype=dtype) for _ in range(2 if is_tied else 4)]
    model = pyvene_model(units, tiny_model())
    source = saved(model, tmp_path / "theirs")
    logits = theirs(model, *([BOTH] * 2 if is_tied else [PREFIX] * 2 + [SUFFIX] * 2))

    convert(source, tmp_path / "ours", base=base, positions="f2+l3")

    same(ours(tmp_path / "ours"), logits)
    different(logits, tiny_model()(input_ids=IDS).logits)
    (entry,) = entries(tmp_path / "ours")
    constant = name in ("consreft", "lobireft")
    expected = {
        "layer": [0, 2],
        "component": "block_output",
        "intervention": name,
        "positions": "f2+l3",
        "tied": is_tied,
        "low_rank_dimension": 4,
        "dtype": "float32" if constant else str(dtype).removeprefix("torch."),
    }
    assert expected.items() <= entry.items()


@pytest.mark.parametrize("name", ROTATED)
def test_r_moves_in_training_as_a_new_one_does(name: str, base: str, tmp_path: Path) -> None:
    unit = intervention(name)
    source = saved(pyvene_model([unit], tiny_model()), tmp_path / "theirs")
    convert(source, tmp_path / "ours", base=base)
    loaded = rn.ReftModel.from_pretrained(tiny_model(), tmp_path / "ours")
    (rotation,) = (own.rotate_layer for own in loaded.interventions.values())
    torch.testing.assert_close(rotation.weight.data, unit.rotate_layer.weight.data.T / 2)


@pytest.mark.parametrize("name", NAMES)
def test_our_classes_within_pyvene(name: str, base: str, tmp_path: Path) -> None:
    units = [intervention(name, rn, dtype="bfloat16") for _ in range(2)]
    model = pyvene_model(units, tiny_model())
    logits = theirs(model, LAST, LAST)
    convert(saved(model, tmp_path / "theirs"), tmp_path / "ours", base=base)
    same(ours(tmp_path / "ours"), logits)


@pytest.mark.parametrize("name", ["loreft", "noreft", "direft", "nodireft"])
def test_an_activation_and_a_dropout_are_given(name: str, base: str, tmp_path: Path) -> None:
    model = pyvene_model([intervention(name, act_fn="gelu")], tiny_model())
    source, logits = saved(model, tmp_path / "theirs"), theirs(model, LAST)
    convert(source, tmp_path / "ours", base=base, act_fn="gelu", dropout=0.1)
    same(ours(tmp_path / "ours"), logits)
    (entry,) = entries(tmp_path / "ours")
    assert (entry["layer"], entry["act_fn"], entry["dropout"]) == ([0], "gelu", 0.1)


def test_a_projection_with_a_bias(base: str, tmp_path: Path) -> None:
    model = pyvene_model([intervention("noreft", add_bias=True)], tiny_model())
    source, logits = saved(model, tmp_path / "theirs"), theirs(model, LAST)
    convert(source, tmp_path / "ours", base=base)
    same(ours(tmp_path / "ours"), logits)


def test_a_bias_that_is_never_read(
    base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = pyvene_model([intervention("nodireft", add_bias=True)], tiny_model())
    source, logits = saved(model, tmp_path / "theirs"), theirs(model, LAST)
    convert(source, tmp_path / "ours", base=base)
    same(ours(tmp_path / "ours"), logits)
    assert "leaves out W2's bias, which NoDiReFT never reads" in caplog.text


@pytest.mark.parametrize("name", ROTATED)
def test_an_r_that_is_not_orthonormal(
    name: str, base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """pyreft leaves one when it loads an adapter and trains on."""
    unit = intervention(name)
    with torch.no_grad():
        unit.rotate_layer.parametrizations.weight[0].base.mul_(1.1)
        unit.rotate_layer.parametrizations.weight[0].base[:, 0].add_(0.1)
    model = pyvene_model([unit], tiny_model())
    source, logits = saved(model, tmp_path / "theirs"), theirs(model, LAST)
    convert(source, tmp_path / "ours", base=base)
    same(ours(tmp_path / "ours"), logits)
    kept = "noreft" if name in ("loreft", "consreft") else "nodireft"
    assert entries(tmp_path / "ours")[0]["intervention"] == kept
    assert "R is not orthonormal" in caplog.text


def test_a_square_r(base: str, tmp_path: Path) -> None:
    unit = intervention("direft", low_rank_dimension=32)  # torch's matrix exponential
    model = pyvene_model([unit], tiny_model())
    source, logits = saved(model, tmp_path / "theirs"), theirs(model, LAST)
    convert(source, tmp_path / "ours", base=base)
    same(ours(tmp_path / "ours"), logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dotted_paths(architecture: str, tmp_path: Path) -> None:
    model = tiny_model(architecture)
    model.config.save_pretrained(tmp_path / "base")
    layers = {"gpt2": "transformer.h", "gpt_neo": "transformer.h", "gpt_neox": "gpt_neox.layers"}
    path = layers.get(architecture, "model.layers")
    paths = [f"{path}[{i}].output" for i in (0, 2, 0, 2)]
    units = [intervention("loreft") for _ in paths]
    described = [{"component": p, "intervention": u} for p, u in zip(paths, units, strict=True)]
    intervenable = pv.IntervenableModel(described, model)
    source = saved(intervenable, tmp_path / "theirs")
    logits = theirs(intervenable, PREFIX, PREFIX, SUFFIX, SUFFIX)
    convert(source, tmp_path / "ours", base=str(tmp_path / "base"), positions="f2+l3")
    same(ours(tmp_path / "ours", tiny_model(architecture)), logits)
    assert [entry["component"] for entry in entries(tmp_path / "ours")] == paths


def test_keys_with_dots(base: str, tmp_path: Path) -> None:
    """As pyvene wrote them up to 0.1.6, of names and of dotted paths."""
    units = [intervention("loreft") for _ in range(3)]
    described = [{"layer": 0, "component": "block_output", "intervention": units[0]}]
    for unit, number in zip(units[1:], (1, 2), strict=True):
        path = f"model.layers[{number}].output"
        described.append({"component": path, "intervention": unit})
    model = pv.IntervenableModel(described, tiny_model())
    source = Path(saved(model, tmp_path / "theirs"))
    logits = theirs(model, LAST, LAST, LAST)
    dotted = ["layer.0.comp.block_output.unit.pos.nunit.1#0"]
    dotted += [f"comp.model.layers[{number}].output.unit.pos.nunit.1#0" for number in (1, 2)]
    files = sorted(source.glob("*.bin"), key=lambda path: ("layer_0" not in path.name, path.name))
    for file, name in zip(files, dotted, strict=True):
        file.rename(source / f"intkey_{name}.bin")
    config = json.loads((source / "config.json").read_text())
    config |= {
        "sorted_keys": dotted,
        "representations": [fields[:12] for fields in config["representations"]],
        "model_type": "<class 'transformers.models.llama.modeling_llama.LlamaForCausalLM'>",
    }
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "ours", base=base)
    same(ours(tmp_path / "ours"), logits)


def test_units_of_several_kinds_keep_their_order(base: str, tmp_path: Path) -> None:
    described = [
        {"layer": 2, "component": "block_output", "intervention": intervention("loreft")},
        {"layer": 0, "component": "mlp_output", "intervention": intervention("direft")},
        {"layer": 1, "component": "block_output", "intervention": intervention("loreft")},
        {"layer": 2, "component": "block_output", "intervention": intervention("consreft")},
    ]
    model = pv.IntervenableModel(described, tiny_model())
    source = saved(model, tmp_path / "theirs")
    logits = theirs(model, [[0], [0]], [[0, 7]] * 2, [[0, 7]] * 2, LAST)
    convert(source, tmp_path / "ours", base=base, positions="f1+l1")
    same(ours(tmp_path / "ours"), logits)
    found = [(e["layer"], e["component"], e["positions"]) for e in entries(tmp_path / "ours")]
    assert found == [
        ([2], "block_output", "f1"),
        ([0], "mlp_output", "f1+l1"),
        ([1], "block_output", "f1+l1"),
        ([2], "block_output", "l1"),
    ]


def test_what_was_trained_of_the_base(base: str, tmp_path: Path) -> None:
    model = pyvene_model([intervention("loreft")], tiny_model())
    model.model.lm_head.weight.requires_grad_(True).data.mul_(2)
    source = saved(model, tmp_path / "theirs", include_model=True)
    convert(source, tmp_path / "ours", base=base)
    same(ours(tmp_path / "ours"), theirs(model, LAST))


def test_a_base_without_a_head(base: str, tmp_path: Path) -> None:
    """Its paths begin elsewhere; transformers 4 wrote its class down."""
    model = tiny_model().model
    described = {"component": "layers[1].output", "intervention": intervention("loreft")}
    intervenable = pv.IntervenableModel(described, model)
    source = Path(saved(intervenable, tmp_path / "theirs"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": str(type(model))}))
    where = {"sources->base": (None, [LAST])}
    with torch.no_grad():
        expected = intervenable({"input_ids": IDS}, unit_locations=where)[1].last_hidden_state
        convert(source, tmp_path / "ours", base=base)
        loaded = rn.ReftModel.from_pretrained(tiny_model().model, tmp_path / "ours")
        same(loaded(input_ids=IDS).last_hidden_state, expected)


def test_a_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = RobertaConfig(**sizes, vocab_size=101, intermediate_size=64, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    config.save_pretrained(tmp_path / "base")
    described = {"component": "roberta.encoder.layer[1].output", "intervention": None}
    intervenable = pv.IntervenableModel(described | {"intervention": intervention("loreft")}, model)
    model.classifier.out_proj.weight.requires_grad_(True).data.mul_(2)
    source = saved(intervenable, tmp_path / "theirs", include_model=True)
    logits = theirs(intervenable, [[0], [0]])
    convert(source, tmp_path / "ours", base=str(tmp_path / "base"), positions="f1")
    torch.manual_seed(0)
    same(ours(tmp_path / "ours", type(model)(config).eval()), logits)


def test_an_activation_is_not_for_constant_sources(base: str, tmp_path: Path) -> None:
    skewed, other = intervention("lobireft"), intervention("loreft", act_fn="gelu")
    with torch.no_grad():
        skewed.rotate_layer.parametrizations.weight[0].base.mul_(1.1)
    model = pyvene_model([skewed, other], tiny_model())
    source, logits = saved(model, tmp_path / "theirs"), theirs(model, LAST, LAST)
    convert(source, tmp_path / "ours", base=base, act_fn="gelu")
    same(ours(tmp_path / "ours"), logits)


def test_a_repository(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub's call, answered by a stand-in."""
    model = pyvene_model([intervention("loreft")], tiny_model())
    source, logits = saved(model, tmp_path / "theirs"), theirs(model, LAST)

    def download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        assert name == "someone/adapter"
        assert {"config.json", "intkey_*.bin"} <= set(allow_patterns)
        return source

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    convert("someone/adapter", tmp_path / "ours", base=base)
    same(ours(tmp_path / "ours"), logits)


def test_the_command(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = pyvene_model([intervention("loreft") for _ in range(2)], tiny_model())
    source = saved(model, tmp_path / "theirs")
    options = ["--base", base, "--positions", "[0, -1]", "--dropout", "0.1"]
    assert main(["convert", source, str(tmp_path / "ours"), *options]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path / 'ours'}: 2 units, with positions [0, -1], act_fn None, dropout 0.1, which "
        "pyreft's files do not hold\n"
    )
    same(ours(tmp_path / "ours"), theirs(model, *[[[0, 7]] * 2] * 2))


# -- ours → theirs -------------------------------------------------------------------------------


@pytest.fixture
def pyreft(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyvene finds classes of pyreft's form where a directory says that they are."""
    monkeypatch.setitem(sys.modules, "pyreft", ModuleType("pyreft"))
    monkeypatch.setitem(sys.modules, "pyreft.interventions", pyreft_formed)


def loaded_by_pyvene(directory: Path, **options: Any) -> Any:
    return pv.IntervenableModel.load(str(directory), tiny_model(), **options)


@formed
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.usefixtures("pyreft")
def test_pyvene_loads_what_is_written(name: str, is_tied: bool, base: str, tmp_path: Path) -> None:
    adapter(tmp_path / "ours", entry(name, positions="f2+l3", tied=is_tied))
    convert(tmp_path / "ours", tmp_path / "theirs", base=base)
    model = loaded_by_pyvene(tmp_path / "theirs")
    locations = [BOTH] * 2 if is_tied else [PREFIX] * 2 + [SUFFIX] * 2
    same(theirs(model, *locations), ours(tmp_path / "ours"))


@formed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back(name: str, dtype: str, base: str, tmp_path: Path) -> None:
    representations = [
        entry(name, positions="f2+l3", tied=False, dtype=dtype),
        entry(name, layer=1, positions="f2+l3", dtype=dtype, component="mlp_output"),
    ]
    before = adapter(tmp_path / "ours", representations)
    convert(tmp_path / "ours", tmp_path / "theirs", base=base)
    convert(tmp_path / "theirs", tmp_path / "again", base=base, positions="f2+l3")
    same(ours(tmp_path / "again"), ours(tmp_path / "ours"))
    after = entries(tmp_path / "again")
    assert after == [
        kept | {"layer": kept["layer"] if index == 0 else [1]}
        for index, kept in enumerate(before.reft_config.to_dict()["representations"])
    ]


@pytest.mark.usefixtures("pyreft")
def test_what_is_lost_is_told(base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    unit = entry("noreft", positions="l1", act_fn="gelu", dropout=0.25)
    adapter(tmp_path / "ours", [unit, {"intervention": "symnoise"}])
    convert(tmp_path / "ours", tmp_path / "theirs", base=base)
    where = f"{tmp_path / 'ours' / 'reft_config.json'}: representations"
    assert [record.message for record in caplog.records] == [
        f"{where}[0]: pyreft's format does not hold positions 'l1', dropout 0.25, act_fn 'gelu'",
        f"{where}[0]: pyreft's ReftModel.load cannot build a NoreftIntervention and rounds float32 "
        "weights to bfloat16: build its interventions, with dtype, and load their files with "
        "load_state_dict",
        f"{where}[1]: pyreft has no noise, so it is left out",
    ]
    model = loaded_by_pyvene(tmp_path / "theirs")
    for unit in model.interventions.values():
        unit.act_fn = torch.nn.GELU()
    same(theirs(model, LAST, LAST), ours(tmp_path / "ours"))


def test_embeddings_have_no_name_in_pyvene(base: str, tmp_path: Path) -> None:
    adapter(
        tmp_path / "ours",
        {"component": "embeddings", "intervention": "loreft", "low_rank_dimension": 4},
    )
    convert(tmp_path / "ours", tmp_path / "theirs", base=base)
    unit = intervention("loreft")
    (file,) = (tmp_path / "theirs").glob("intkey_*.bin")
    unit.load_state_dict(torch.load(file, weights_only=True))
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    described = {"component": config["representations"][0][1], "intervention": unit}
    model = pv.IntervenableModel(described, tiny_model())
    same(theirs(model, LAST), ours(tmp_path / "ours"))


@pytest.mark.usefixtures("pyreft")
def test_what_was_trained_of_the_base_goes_along(base: str, tmp_path: Path) -> None:
    reft_model = adapter(tmp_path / "ours", entry("loreft"))
    reft_model.model.lm_head.weight.requires_grad_(True).data.mul_(2)
    reft_model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", base=base)
    model = loaded_by_pyvene(tmp_path / "theirs", include_model=True)
    same(theirs(model, LAST, LAST), ours(tmp_path / "ours"))


@pytest.mark.usefixtures("pyreft")
def test_an_adapter_that_was_there_is_replaced(base: str, tmp_path: Path) -> None:
    larger = pyvene_model([intervention("direft") for _ in range(4)], tiny_model())
    larger.model.lm_head.requires_grad_(True)
    saved(larger, tmp_path / "theirs", include_model=True)
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    adapter(tmp_path / "ours", entry("loreft"))
    convert(tmp_path / "ours", tmp_path / "theirs", base=base)
    key = "intkey_layer_{}_comp_block_output_unit_pos_nunit_1#0.bin"
    found = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert found == {"config.json", "notes.txt", key.format(0), key.format(2)}
    same(theirs(loaded_by_pyvene(tmp_path / "theirs"), LAST, LAST), ours(tmp_path / "ours"))

    adapter(tmp_path / "second", entry("loreft", layer=1))
    convert(tmp_path / "theirs", tmp_path / "second", base=base)
    same(ours(tmp_path / "second"), ours(tmp_path / "ours"))


# -- pyreft itself -------------------------------------------------------------------------------


@formed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_tied", [True, False])
def test_pyreft_itself(
    name: str, dtype: torch.dtype, is_tied: bool, base: str, tmp_path: Path
) -> None:
    """Its model, saved, converted, converted back and loaded into fresh interventions of pyreft."""
    pyreft = pytest.importorskip("pyreft", reason="needs pip install --no-deps pyreft==0.1.0")
    own = {"dtype": dtype} | ({"add_bias": False} if name in ("noreft", "nodireft") else {})
    count = 2 if is_tied else 4
    locations = [BOTH] * 2 if is_tied else [PREFIX] * 2 + [SUFFIX] * 2

    def logits(units: list[Any]) -> Tensor:
        for unit in units:  # pyreft computes in the dtype of these; at least fp32's of an fp32 base
            unit.float()
        return theirs(pyvene_model(units, tiny_model()), *locations)

    units = [intervention(name, pyreft, **own) for _ in range(count)]
    described = [
        {"layer": i, "component": "block_output", "low_rank_dimension": 4, "intervention": unit}
        for i, unit in zip([0, 2, 0, 2], units, strict=False)
    ]
    model = pyreft.get_reft_model(tiny_model(), pyreft.ReftConfig(representations=described))
    source = saved(model, tmp_path / "theirs")
    expected = logits(units)

    convert(source, tmp_path / "ours", base=base, positions="f2+l3")
    same(ours(tmp_path / "ours"), expected)

    convert(tmp_path / "ours", tmp_path / "back", base=base)
    fresh = [intervention(name, pyreft, **own) for _ in range(count)]
    for key, unit in zip(model.interventions, fresh, strict=True):
        state = torch.load(tmp_path / "back" / f"intkey_{key}.bin", weights_only=True)
        unit.load_state_dict(state)
    same(logits(fresh), expected)
    if name in ("noreft", "nodireft"):  # whose add_bias pyreft's config cannot hold
        return
    loaded = pyreft.ReftModel.load(str(tmp_path / "back"), tiny_model())
    if dtype is torch.bfloat16 or name in ("consreft", "lobireft"):
        same(logits(list(loaded.interventions.values())), expected)


def test_the_embedded_model_is_a_base_by_its_name(tmp_path: Path) -> None:
    entry = {"layer": 1, "intervention": "loreft", "low_rank_dimension": 2}
    reft_model = rn.get_reft_model(rn.load_tiny_model()[0], rn.ReftConfig([entry]))
    reft_model.save_pretrained(tmp_path / "ours")
    told = convert(tmp_path / "ours", tmp_path / "theirs", base="tiny-chat")
    assert told.endswith("theirs: 1 units")
