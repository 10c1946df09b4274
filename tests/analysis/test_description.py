"""What `describe` tells of an adapter or a run, from its files alone."""

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import reftnoise as rn
from reftnoise.analysis.description import UnitDescription, describe, folded, ranges, show
from reftnoise.engine.units import unit_keys
from reftnoise.training.run_scores import print_scores
from support.adapters import UNITS, save_adapter
from support.models.architectures import tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    save_adapter(directory / "adapter")
    scores = {"task": "trec", "data": "trec", "split": "test", "by": "generation"}
    rows = [
        scores | {"adapter": is_on, "scores": {"accuracy": accuracy}, "rows": 4, "right": "0110"}
        for is_on, accuracy in ((False, 0.25), (True, 0.5))
    ]
    (directory / "scores.json").write_text(json.dumps(rows), encoding="utf-8")
    return directory


def test_an_adapter_is_described_as_it_is(run: Path) -> None:
    described = describe(run / "adapter")
    reft_model = rn.ReftModel.from_pretrained(rn.load_tiny_model()[0], run / "adapter")
    assert described.base["name_or_path"] == "tiny-chat"
    assert described.base["num_hidden_layers"] == 4
    assert {unit.key for unit in described.units} == {
        key for key, unit in reft_model.interventions.items() if list(unit.parameters())
    }
    for unit in described.units:
        module: Any = reft_model.interventions[unit.key]
        assert unit.parameters == sum(p.numel() for p in module.parameters())
        if unit.intervention == "loreft":
            assert unit.norms["R"] == pytest.approx(unit.rank**0.5, abs=1e-4)
            weight = module.learned_source.weight
            expected = float(weight.detach().square().sum().sqrt())
            assert unit.norms["learned_source.weight"] == pytest.approx(expected, rel=1e-5)
            assert unit.orthonormality_error is not None
            assert unit.orthonormality_error < 1e-5
        else:
            assert unit.rank is None
            assert unit.orthonormality_error is None
    assert [noise["intervention"] for noise in described.noises] == ["symnoise"]
    trained = sum(unit.parameters for unit in described.units)
    assert trained == reft_model.parameter_counts()[0]
    files = {path.name: path.stat().st_size for path in (run / "adapter").iterdir()}
    assert described.files == files
    assert described.scores == json.loads((run / "scores.json").read_text(encoding="utf-8"))
    assert described == describe(run)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
def test_an_adapter_with_a_method_of_peft(tmp_path: Path) -> None:
    lora = {"peft_type": "lora", "r": 2, "target_modules": ["q_proj"]}
    config = rn.ReftConfig(UNITS[:1], peft=lora)
    rn.get_reft_model(rn.load_tiny_model()[0], config).save_pretrained(tmp_path)
    described = describe(tmp_path)
    assert described.peft is not None
    assert lora.items() <= described.peft.items()
    assert described.peft_parameters == 4 * 2 * (128 + 128)
    assert described.scores == []


@pytest.mark.parametrize(
    "entries",
    [
        UNITS,
        [UNITS[0] | {"positions": "f2+l2", "tied": False, "layer": "1-2"}, UNITS[1]],
        [
            UNITS[0] | {"layer": 0, "positions": "f1"},
            UNITS[0] | {"layer": 0, "positions": "l1"},
            {"component": "model.layers[3].mlp.output", "intervention": "bias"},
        ],
    ],
)
def test_keys_are_those_of_a_model(entries: Any) -> None:
    config = rn.ReftConfig(entries)
    reft_model = rn.get_reft_model(rn.load_tiny_model()[0], config)
    assert [key for key, *_ in unit_keys(config, 4)] == list(reft_model.interventions)


def test_as_json_and_as_tables(run: Path) -> None:
    described = describe(run)
    assert json.loads(json.dumps(asdict(described)))["units"][0]["rank"] == 4
    file = io.StringIO()
    show(described, Console(file=file, width=140))
    printed = file.getvalue()
    for part in (
        "tiny-chat",
        "loreft",
        "mlp_output, layer 1",
        "symnoise",
        "accuracy",
        "0.25",
        "W ",
    ):
        assert part in printed
    assert printed.count("loreft") == 1
    assert "block_output, layers 0-3" in printed


def test_a_gate_stands_next_to_its_unit(tmp_path: Path) -> None:
    red = {"layer": "all", "intervention": "red"}
    bias = {"component": "attention_output", "layer": 0, "intervention": "bias"}
    units = [red | {"component": "mlp_output", "gate": "probe"}, red | {"gate": "norm"}, bias]
    model, _ = rn.load_tiny_model()
    rn.get_reft_model(model, rn.ReftConfig(units)).save_pretrained(tmp_path)
    described = describe(tmp_path)
    assert [unit.gate for unit in described.units] == ["probe"] * 4 + ["norm"] * 4 + [None]
    assert [unit.parameters for unit in described.units[3:5]] == [3 * 128 + 1, 2 * 128]
    file = io.StringIO()
    show(described, Console(file=file, width=140))
    assert "red, gate probe" in file.getvalue()
    assert "red, gate norm" in file.getvalue()
    assert "s 11.3" in file.getvalue()  # √128, the norm of ones


def test_what_is_no_adapter(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no reft_config\.json in it"):
        describe(tmp_path)
    (tmp_path / "reft_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="damaged or not an adapter's config"):
        describe(tmp_path)
    text = (run / "adapter" / "reft_config.json").read_text(encoding="utf-8")
    (tmp_path / "reft_config.json").write_text(text, encoding="utf-8")
    (tmp_path / "reft_model.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match=r"truncated or damaged"):
        describe(tmp_path)
    (tmp_path / "reft_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no reft_model\.safetensors in it"):
        describe(tmp_path)


def test_norms_do_not_depend_on_the_dtype(tmp_path: Path) -> None:
    entry = UNITS[0] | {"dtype": "bfloat16"}
    reft_model = rn.get_reft_model(rn.load_tiny_model()[0], rn.ReftConfig([entry]))
    reft_model.save_pretrained(tmp_path)
    assert all(torch.tensor(unit.norms["R"]).isfinite() for unit in describe(tmp_path).units)


def unit(layer: int | None, **changes: Any) -> UnitDescription:
    site = "embeddings" if layer is None else f"block_output, layer {layer}"
    values = {"intervention": "loreft", "positions": "l1", "rank": 4, "parameters": 9}
    values |= {"norms": {"R": 2.0, "W": 1.0 + (layer or 0) / 10}, "orthonormality_error": 1e-7}
    return UnitDescription(key=str(layer), site=site, layer=layer, **{**values, **changes})


def test_units_that_differ_in_their_layer_alone_are_one_row() -> None:
    same = [unit(n) for n in (0, 1, 2, 4)]
    others = [unit(3, positions="f1"), unit(None), unit(None), unit(12)]
    groups = folded([*same, *others])
    assert groups == [[*same, others[3]], [others[0]], others[1:3]]
    assert ranges([12, 0, 2, 1, 4]) == "0-2, 4, 12"


def test_thirty_layers_fit_a_screen(tmp_path: Path) -> None:
    base = tiny_model("llama", num_hidden_layers=30)
    entries = [UNITS[0], UNITS[0] | {"positions": "f1", "component": "mlp_output"}]
    rn.get_reft_model(base, rn.ReftConfig(entries)).save_pretrained(tmp_path)
    file = io.StringIO()
    show(describe(tmp_path), Console(file=file, width=80))
    printed = file.getvalue()
    assert len(printed.splitlines()) <= 24
    assert printed.count("0-29") == 2
    assert printed.count("30 × ") == 2


def test_no_score_is_without_its_way() -> None:
    """Also where a terminal is narrow and names are long."""
    rows = [
        {"task": "classification", "data": "/a/long/way/to/some-test-data.jsonl", "split": "test",
         "by": by, "adapter": is_adapted, "rows": 1500,
         "scores": {"accuracy": 0.5, "accuracy_normalised": 0.25}}
        for by in ("generation", "likelihood", "head")
        for is_adapted in (True, False)
    ]  # fmt: skip
    file = io.StringIO()
    print_scores(rows, Console(file=file, width=80))
    lines = [line.split() for line in file.getvalue().splitlines() if "1500" in line]
    assert [(line[2], line[3]) for line in lines] == [
        (by, model) for by in ("generation", "likelihood", "head") for model in ("adapted", "base")
    ]
    assert max(map(len, file.getvalue().splitlines())) <= 80
