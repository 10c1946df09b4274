"""The command that writes the recipe of LoFiT's second step, and its picture."""

from pathlib import Path

import pytest
import torch

import reftnoise as rn
from reftnoise._util import yaml
from reftnoise.cli.main import main
from reftnoise.training.recipe import Recipe


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
