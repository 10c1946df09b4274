"""How alike adapters are by their files alone: subspaces that are known, and loaded adapters."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import reftnoise as rn
from reftnoise.analysis.inspection import library_overlaps
from reftnoise.analysis.overlaps import overlap_matrix, saved_overlaps, show_overlaps
from support.adapters import ENTRIES, with_rows, wrapped
from support.command_line import command
from support.models.architectures import tiny_model

AXES = torch.eye(32)
ANGLE = 0.3
ROWS = {
    "first": AXES[:4],
    "same": torch.tensor([[2.0, 1, 0, 0], [0, 1, 3, 0], [0, 0, 1, 1], [1, 0, 0, 5]]) @ AXES[:4],
    "part": AXES[:2],
    "half": AXES[2:6],
    "tilted": math.cos(ANGLE) * AXES[:4] + math.sin(ANGLE) * AXES[8:12],
    "orthogonal": AXES[4:8],
}
OF_FIRST = {
    "same": 1.0,
    "part": 1.0,
    "half": 0.5,
    "tilted": math.cos(ANGLE) ** 2,
    "orthogonal": 0.0,
}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of one layer, with the rows that their R spans."""
    folder = tmp_path_factory.mktemp("known")
    base = tiny_model()
    for name, rows in ROWS.items():
        with_rows(base, rows).save_pretrained(folder / name)
    return {name: folder / name for name in ROWS}


def saved(directory: Path, entries: Any, base: Any = None, seed: int = 0) -> Path:
    wrapped(entries, base or tiny_model(), seed).save_pretrained(directory)
    return directory


# -- numbers ---------------------------------------------------------------------------------------


def test_subspaces_that_are_known(known: dict[str, Path]) -> None:
    before = torch.get_rng_state()
    names, overlaps = saved_overlaps(known)
    assert torch.equal(torch.get_rng_state(), before)
    assert names == list(ROWS)
    torch.testing.assert_close(overlaps, overlaps.T)
    torch.testing.assert_close(overlaps.diagonal(), torch.ones(len(ROWS)))
    found = dict(zip(names, overlaps[0].tolist(), strict=True))
    assert found == {
        "first": pytest.approx(1),
        **{n: pytest.approx(v, abs=1e-6) for n, v in OF_FIRST.items()},
    }
    assert float(overlaps[names.index("part"), names.index("half")]) == pytest.approx(0, abs=1e-6)


def test_sites_weigh_alike() -> None:
    a: dict[str, Tensor] = {"x": AXES[:2].double(), "y": AXES[:3].double(), "z": AXES[:1].double()}
    b: dict[str, Tensor] = {"x": AXES[:2].double(), "y": AXES[1:5].double()}
    c: dict[str, Tensor] = {"other": AXES[:1].double()}
    expected = torch.tensor([[1, (1 + 2 / 3) / 2, math.nan], [(1 + 2 / 3) / 2, 1, math.nan],
                             [math.nan, math.nan, 1]])  # fmt: skip
    torch.testing.assert_close(overlap_matrix([a, b, c]), expected, equal_nan=True)


def test_they_are_those_of_loaded_adapters(tmp_path: Path) -> None:
    entries = ENTRIES | {
        "narrow": {
            "component": "model.layers[1].mlp.down_proj.input",
            "intervention": "loreft",
            "low_rank_dimension": 3,
            "positions": "all",
        },
        "later": [{"layer": [1, 2], "intervention": "noreft", "low_rank_dimension": 5}],
    }
    library = rn.get_reft_model(tiny_model())
    adapters = {}
    for seed, (name, units) in enumerate(entries.items()):
        adapters[name] = saved(tmp_path / name, units, seed=seed)
        library.load_adapter(adapters[name], name)
    names, expected = library_overlaps(library.adapters)
    found, overlaps = saved_overlaps(adapters)
    assert found == names
    torch.testing.assert_close(overlaps, expected, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
def test_a_method_of_peft_and_a_trained_head_do_not_count(
    known: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="needs peft: pip install 'reftnoise[peft]'")
    lora = {"peft_type": "lora", "r": 2, "target_modules": ["q_proj"]}
    unit = {"layer": [0], "intervention": "loreft", "low_rank_dimension": 4}
    config = rn.ReftConfig([unit], peft=lora, modules_to_save=["lm_head"])
    reft_model = rn.get_reft_model(tiny_model(), config)
    next(iter(reft_model.interventions.values())).rotate_layer.weight.data = AXES[2:6].clone()
    reft_model.save_pretrained(tmp_path)
    _, overlaps = saved_overlaps({"first": known["first"], "composed": tmp_path})
    assert float(overlaps[0, 1]) == pytest.approx(0.5)


# -- mistakes --------------------------------------------------------------------------------------


def test_adapters_of_other_bases(known: dict[str, Path], tmp_path: Path) -> None:
    unit = [{"layer": 0, "intervention": "loreft", "low_rank_dimension": 2}]
    wider = saved(tmp_path / "wider", unit, tiny_model(hidden_size=64))
    message = r"wider.reft_config\.json: the adapter's base .* has hidden_size 64, that of a .* 32$"
    with pytest.raises(ValueError, match=message):
        saved_overlaps({"a": known["first"], "b": wider})
    other = tiny_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
    theirs = saved(tmp_path / "theirs", unit, other)
    with pytest.raises(ValueError, match=r"that of a .* have different weights, as in model\."):
        saved_overlaps({"a": known["first"], "b": theirs})


def test_weights_that_the_config_does_not_say(known: dict[str, Path], tmp_path: Path) -> None:
    directory = saved(
        tmp_path / "a", [{"layer": 0, "intervention": "loreft", "low_rank_dimension": 2}]
    )
    path = directory / "reft_config.json"
    path.write_text(path.read_text().replace('"low_rank_dimension": 2', '"low_rank_dimension": 3'))
    with pytest.raises(
        ValueError, match=r"reft_model\.safetensors: layer_0.*size mismatch"
    ) as told:
        saved_overlaps({"first": known["first"], "a": directory})
    assert "\n" not in str(told.value)


def test_weights_that_are_not_finite(known: dict[str, Path], tmp_path: Path) -> None:
    broken = with_rows(tiny_model(), AXES[:4])
    next(iter(broken.interventions.values())).rotate_layer.weight.data[0] = math.nan
    with pytest.warns(UserWarning, match="not finite"):
        broken.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layer_0.*: holds numbers that are not finite"):
        saved_overlaps({"first": known["first"], "broken": tmp_path})


# -- the command line ------------------------------------------------------------------------------


def test_inspect_with_others(
    known: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = saved(
        tmp_path / "run" / "adapter",
        [{"layer": 1, "intervention": "loreft", "low_rank_dimension": 2}],
    )
    others = ("--others.half", known["half"], "--others.first", known["first"])
    assert command("inspect", elsewhere, *others, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["units"]) == 1
    assert found["overlaps"] == {
        "run": {"run": 1.0, "half": None, "first": None},
        "half": {"run": None, "half": 1.0, "first": 0.5},
        "first": {"run": None, "half": 0.5, "first": 1.0},
    }
    assert command("inspect", elsewhere, *others) == 0
    printed = capsys.readouterr().out
    assert "│ half  │    – │ 1.00 │  0.50 │" in printed
    assert command("inspect", elsewhere, "--others.run", known["half"]) == 2
    assert "has that name already" in capsys.readouterr().err
    assert command("inspect", elsewhere, "--output", tmp_path / "x.png") == 2
    assert "name some, such as --others.polite" in capsys.readouterr().err


def test_a_picture(
    known: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'reftnoise[plots]'")
    adapters = (known["first"], "--others.half", known["half"])
    path = tmp_path / "new" / "overlaps.png"
    assert command("inspect", *adapters, "--output", path) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert command("inspect", *adapters, "--output", tmp_path / "overlaps.pdf") == 2
    said = capsys.readouterr()
    assert "expected a PNG file" in said.err
    assert not said.out


def test_no_adapter_of_a_wide_table_is_cut() -> None:
    names = [f"adapter{n}" for n in range(40)]
    file = io.StringIO()
    show_overlaps(names, torch.eye(40), Console(file=file, width=80))
    rows = [line for line in file.getvalue().splitlines() if line.startswith("│ adapter")]
    assert len(rows) == 40
    assert all(row.count("0.00") == 39 and row.count("1.00") == 1 for row in rows)
