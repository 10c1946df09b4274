"""Directories that pyreft and pyvene saved are loaded at once, with the outputs of pyvene."""

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor

import reftnoise as rn
from support.models.architectures import tiny_model
from support.models.pyreft_formed import entry, intervention, pyvene_model, saved
from support.tolerance import assert_close

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [15, 16, 17, 18, 19, 20, 21, 22]])
LAST = {"sources->base": (None, [[[7], [7]]] * 2)}
NAMES = ["loreft", "noreft", "direft", "nodireft", "consreft", "lobireft"]


@torch.no_grad()
def theirs(model: Any) -> Tensor:
    return model({"input_ids": IDS}, unit_locations=LAST)[1].logits


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> Tensor:
    return model(input_ids=IDS, **inputs).logits


def formed_model(name: str, base: Any = None, **arguments: Any) -> Any:
    units = [intervention(name, **arguments) for _ in range(2)]
    return pyvene_model(units, tiny_model() if base is None else base)


def own_model(*entries: dict[str, Any], base: Any = None) -> rn.ReftModel:
    config = rn.ReftConfig(list(entries))
    return rn.get_reft_model(tiny_model() if base is None else base, config).eval()


@pytest.mark.parametrize("name", NAMES)
def test_load_gives_the_outputs_of_pyvene(name: str, tmp_path: Path) -> None:
    model = formed_model(name)
    directory = saved(model, tmp_path)
    loaded = rn.ReftModel.load(directory, tiny_model())
    assert_close(logits(loaded, unit_locations=LAST), theirs(model))
    assert_close(logits(loaded), theirs(model))  # at the last token of prompts
    from_pretrained = rn.ReftModel.from_pretrained(tiny_model(), directory)
    assert_close(logits(from_pretrained), theirs(model))


def test_an_adapter_by_name(tmp_path: Path) -> None:
    model = formed_model("loreft")
    reft_model = own_model(entry("loreft"))
    before = logits(reft_model)
    reft_model.load_adapter(saved(model, tmp_path), "theirs")
    assert_close(logits(reft_model, adapter_names=["theirs", "default"])[0], theirs(model)[0])
    assert_close(logits(reft_model, adapter_names=["theirs", "default"])[1], before[1])


def test_dtypes_are_those_of_the_files(tmp_path: Path) -> None:
    directory = saved(formed_model("loreft", dtype=torch.bfloat16), tmp_path)
    loaded = rn.ReftModel.load(directory, tiny_model())
    for unit in loaded.interventions.values():
        dtypes = {n: p.dtype for n, p in unit.named_parameters()}
        assert dtypes["learned_source.weight"] == torch.bfloat16
        assert dtypes["rotate_layer.weight"] == torch.float32


def test_a_dotted_path(tmp_path: Path) -> None:
    unit = intervention("loreft")
    place = {"component": "model.layers[1].output", "layer": None}
    model = pyvene_model([unit], tiny_model(), **place)
    loaded = rn.ReftModel.load(saved(model, tmp_path), tiny_model())
    where = {"sources->base": (None, [[[7], [7]]])}
    with torch.no_grad():
        expected = model({"input_ids": IDS}, unit_locations=where)[1].logits
    assert_close(logits(loaded), expected)
    own = own_model(
        {
            "component": "model.layers[1].output",
            "intervention": "loreft",
            "low_rank_dimension": 4,
        }
    )
    own.load_intervention(tmp_path)  # whose files have no layer in their names
    assert_close(logits(own), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_their_trainer(name: str, tmp_path: Path) -> None:
    model = formed_model(name)
    model.save_intervention(tmp_path)
    assert not (tmp_path / "config.json").exists()
    own = own_model(entry(name))
    own.load_intervention(tmp_path)
    assert_close(logits(own), theirs(model))
    with pytest.raises(FileNotFoundError, match=r"no config.json in it, as in checkpoints of"):
        rn.ReftModel.load(tmp_path, tiny_model())


def test_units_keep_their_dtypes(tmp_path: Path) -> None:
    formed_model("loreft", dtype=torch.bfloat16).save_intervention(tmp_path)
    own = own_model(entry("loreft", dtype="float32"))
    own.load_intervention(tmp_path)
    assert {p.dtype for p in own.interventions.parameters()} == {torch.float32}


def test_what_was_trained_of_the_base(tmp_path: Path) -> None:
    base = tiny_model()
    model = formed_model("loreft", base)
    base.model.norm.weight.requires_grad_(True)
    with torch.no_grad():
        base.model.norm.weight.mul_(1.5)
    expected = theirs(model)
    directory = saved(model, tmp_path, include_model=True)

    loaded = rn.ReftModel.load(directory, tiny_model())
    assert_close(logits(loaded), expected)
    assert loaded.model.model.norm.weight.requires_grad
    without = rn.ReftModel.load(directory, tiny_model(), include_model=False)
    assert torch.equal(without.model.model.norm.weight, tiny_model().model.norm.weight)
    own = own_model(entry("loreft"))
    own.load_intervention(directory, include_model=False)
    assert_close(logits(own), logits(without))
    own.load_intervention(directory)
    assert_close(logits(own), expected)


def test_our_directories_into_a_model(tmp_path: Path) -> None:
    source = own_model(entry("loreft"))
    with torch.no_grad():
        for parameter in source.interventions.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    source.save_intervention(tmp_path / "checkpoint-2")
    for path in ("checkpoint-2", "checkpoint-2/intervenable_model"):  # the latter is pyreft's
        own = own_model(entry("loreft"))
        own.load_intervention(tmp_path / path)
        assert torch.equal(logits(own), logits(source))
        loaded = rn.ReftModel.load(str(tmp_path / path), tiny_model())
        assert torch.equal(logits(loaded), logits(source))


def test_the_head_is_left_out_if_asked(tmp_path: Path) -> None:
    config = rn.ReftConfig([entry("loreft")], modules_to_save=["norm"])
    model = rn.get_reft_model(tiny_model(), config)
    with torch.no_grad():
        model.model.model.norm.weight.mul_(1.5)
    model.save(tmp_path / "whole", include_model=True)
    model.save(tmp_path / "units", include_model=False)
    for directory, include_model, factor in [
        ("whole", True, 1.5),
        ("whole", False, 1.0),
        ("units", True, 1.0),
    ]:
        loaded = rn.ReftModel.load(
            load_directory=tmp_path / directory, model=tiny_model(), include_model=include_model
        )
        expected = factor * tiny_model().model.norm.weight
        assert torch.equal(loaded.model.model.norm.weight, expected)


@pytest.mark.parametrize("name", ["loreft", "nodireft"])
def test_errors_of_a_checkpoint(name: str, tmp_path: Path) -> None:
    formed_model(name).save_intervention(tmp_path / "good")
    own = own_model(entry(name))
    before = logits(own)

    def damaged(number: int = 2) -> Path:
        directory = tmp_path / "damaged"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(tmp_path / "good", directory)
        return directory / f"intkey_layer_{number}_comp_block_output_unit_pos_nunit_1#0.bin"

    file = damaged()
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"no {file.name} in it"):
        own.load_intervention(file.parent)
    file = damaged()
    torch.save({"weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=f"{file.name}: no matrix of"):
        own.load_intervention(file.parent)
    file = damaged()
    torch.save([Path("x")], file)
    with pytest.raises(ValueError, match="damaged, or holds more than tensors"):
        own.load_intervention(file.parent)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        own.load_intervention(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has shape .*, the config says"):
        own_model(entry(name, low_rank_dimension=2)).load_intervention(tmp_path / "good")
    assert torch.equal(logits(own), before)  # nothing changed


def test_an_r_that_is_not_orthonormal_stops(tmp_path: Path) -> None:
    formed_model("loreft").save_intervention(tmp_path)
    for file in tmp_path.glob("intkey_*.bin"):
        state = torch.load(file, weights_only=True)
        torch.save(state | {"rotate_layer": 1.1 * state["rotate_layer"]}, file)
    with pytest.raises(ValueError, match=r"R is not orthonormal.*make the unit a noreft"):
        own_model(entry("loreft")).load_intervention(tmp_path)


def test_a_repository_of_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = formed_model("loreft")
    saved(model, tmp_path)
    asked = []

    def download(name: str, *, allow_patterns: list[str], local_dir: Any, **_: Any) -> str:
        asked.append((name, local_dir, "config.json" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    arguments = {"local_directory": "here", "from_huggingface_hub": True}
    loaded = rn.ReftModel.load("someone/theirs", tiny_model(), **arguments)
    assert_close(logits(loaded), theirs(model))
    here = Path("here")
    assert asked == [("someone/theirs", here, False), ("someone/theirs", here, True)]


def test_units_that_share_a_site_need_positions_by_name(tmp_path: Path) -> None:
    model = pyvene_model([intervention("loreft") for _ in range(4)], tiny_model())
    directory = saved(model, tmp_path)
    loaded = rn.ReftModel.load(directory, tiny_model())
    where = {"sources->base": (None, [[[0], [1]], [[0], [1]], [[7], [7]], [[6], [7]]])}
    with torch.no_grad():
        expected = model({"input_ids": IDS}, unit_locations=where)[1].logits
    assert_close(logits(loaded, unit_locations=where), expected)
    with pytest.raises(ValueError, match=r"config.json: positions 'l1' of .* can overlap"):
        own_model(entry("loreft")).load_adapter(directory, "theirs")
