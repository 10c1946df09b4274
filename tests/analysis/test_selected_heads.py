"""The command that writes the recipe of LoFiT's second step, and its picture."""

from pathlib import Path

import pytest
import torch

import reftnoise as rn
from reftnoise._util import yaml
from reftnoise.cli.main import main
from reftnoise.training.recipe import Recipe

SCALING = {"trained": "scaling"}


def test_the_recipe_of_the_second_step_is_the_runs_with_the_chosen_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    first = {"layer": "all", "component": "head_output", "intervention": "lofit"}
    noise = {"intervention": "symnoise", "alpha": 2.0}
    entries = [first | {"trained": "scaling", "l1": 5e-4}, noise]
    model = rn.get_reft_model(rn.load_tiny_model()[0], rn.ReftConfig(entries))
    units = model.interventions.values()
    scaled = [unit for unit in units if isinstance(unit, rn.LofitIntervention)]
    with torch.no_grad():
        scaled[1].scaling[0] = 3.0
        scaled[2].scaling[-1] = 2.0
    model.save_pretrained("run/adapter")
    recipe = {"model": "tiny-chat", "data": {"train": "tiny-chat"}, "output_dir": "run"}
    Path("run/recipe.yaml").write_text(yaml.dump(recipe | {"representations": entries}))
    assert main(["heads", "run", "--k", "2", "--picture", "map.png"]) == 0
    last = int(scaled[2].hidden_size // model.engine.units[2].site.head_width) - 1
    assert f"layer 1: heads 0\nlayer 2: heads {last}\n" in capsys.readouterr().out
    written = yaml.load(Path("heads.yaml").read_text())
    assert Recipe(**{n: v for n, v in written.items() if n != "data"}).output_dir == "heads"
    assert written["data"] == recipe["data"]
    place = {"component": "head_output", "intervention": "lofit"}
    assert written["representations"][:2] == [
        {"layer": [1], "heads": [0]} | place,
        {"layer": [2], "heads": [last]} | place,
    ]
    assert written["representations"][2]["alpha"] == 2.0
    rn.get_reft_model(rn.load_tiny_model()[0], rn.ReftConfig(written["representations"]))
    assert Path("map.png").read_bytes().startswith(b"\x89PNG")


def scaled(model: rn.ReftModel) -> rn.ReftModel:
    """The model, as if its first step had trained."""
    with torch.no_grad():
        for unit in model.interventions.values():
            if isinstance(unit, rn.LofitIntervention):
                unit.scaling.normal_()
    return model


def test_an_untrained_first_step_chooses_no_heads() -> None:
    entry = {"layer": [0, 1], "component": "head_output", "intervention": "lofit"}
    model = rn.get_reft_model(rn.load_tiny_model()[0], rn.ReftConfig(entry | SCALING))
    with pytest.raises(ValueError, match=r"k 2: none of \d+ heads is scaled at all"):
        rn.select_heads(model, 2)
    with torch.no_grad():
        model.engine.units[1].unit.scaling[-1] = 1.0
    with pytest.raises(ValueError, match=r"k 2: only 1 of \d+ heads is scaled"):
        rn.select_heads(model, 2)
    assert [entry["layer"] for entry in rn.select_heads(model, 1)] == [[1]]


def test_a_picture_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    entry = {"layer": 0, "component": "head_output", "intervention": "lofit"}
    model = rn.get_reft_model(rn.load_tiny_model()[0], rn.ReftConfig(entry | SCALING))
    scaled(model).save_pretrained("adapter")
    photo = Path("photo.png")
    photo.write_bytes(b"mine")
    assert main(["heads", "adapter", "--picture", "photo.png"]) == 2
    assert "picture photo.png: exists already" in capsys.readouterr().err
    assert photo.read_bytes() == b"mine"
    assert not Path("heads.yaml").exists()
    pytest.importorskip("matplotlib")
    assert main(["heads", "adapter", "--picture", "photo.png", "--overwrite"]) == 0
    assert photo.read_bytes().startswith(b"\x89PNG")


def test_the_recipe_replaces_nothing_but_its_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    entries = [{"layer": [0, 1], "component": "head_output", "intervention": "lofit"}]
    entries[0]["trained"] = "scaling"
    other = {"layer": 2, "intervention": "bias"}
    model = rn.get_reft_model(rn.load_tiny_model()[0], rn.ReftConfig([*entries, other]))
    scaled(model).save_pretrained("run/adapter")
    recipe, own = Path("run/recipe.yaml"), "model: tiny-chat\nrevision: old\noutput_dir: run\n"
    recipe.write_text(own)
    assert main(["heads", "run", "--output", "run/recipe.yaml"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert recipe.read_text() == own
    for output in ("run.yaml", "second"):
        assert main(["heads", "run", "--output", output]) == 2
        assert "the second run's directory" in capsys.readouterr().err
        assert not Path(output).exists()
    for k in ("1", "2"):  # the second time, the file is that of the first
        assert main(["heads", "run", "--k", k]) == 0
    kept = yaml.load(Path("heads.yaml").read_text())["representations"][-1]
    assert (kept["layer"], kept["intervention"]) == (2, "bias")
    assert main(["heads", "run", "--output", "run/recipe.yaml", "--overwrite"]) == 0
    assert recipe.read_text() != own


@pytest.mark.parametrize("is_named", [False, True])
def test_the_recipe_names_the_base_that_the_heads_are_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_named: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    base, tokenizer = rn.load_tiny_model()
    base.save_pretrained("base")
    tokenizer.save_pretrained("base")
    entry = {"layer": 0, "component": "head_output", "intervention": "lofit", "trained": "scaling"}
    model = rn.get_reft_model(rn.load_base("base")[0], rn.ReftConfig(entry))
    scaled(model).save_pretrained("run/adapter")
    if is_named:
        Path("run/recipe.yaml").write_text("model: gone/away\nrevision: old\n")
    assert main(["heads", "run", *(["--model", "base"] if is_named else [])]) == 0
    written = yaml.load(Path("heads.yaml").read_text())
    assert Path(written["model"]).resolve() == (tmp_path / "base").resolve()
    assert "revision" not in written
