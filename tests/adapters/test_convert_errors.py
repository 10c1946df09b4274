"""What `convert` refuses: one line, exit code 2, and nothing is written."""

import contextlib
import json
import logging
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import reftnoise as rn
from reftnoise.adapters.pyreft.convert import convert
from reftnoise.adapters.pyreft.state import CLASSES
from reftnoise.cli.main import main
from reftnoise.interventions import INTERVENTIONS
from support.models.architectures import tiny_model
from support.models.pyreft_formed import adapter, entry, intervention, pyvene_model, saved

FILE = "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("base")
    tiny_model().config.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original") / "theirs"
    saved(pyvene_model([intervention("loreft") for _ in range(2)], tiny_model()), directory)
    return directory


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    """A directory of pyvene to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "theirs"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line of a refusal; nothing is written."""
    output = Path(arguments[1])
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert main(["convert", *map(str, arguments)]) == 2
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line.removeprefix("reftnoise: ")


class Harmful:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harmed"),))


def test_a_pickle_of_more_than_tensors(
    source: Path,
    base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    file = source / FILE
    problem = "damaged, or holds more than tensors (UnpicklingError)"
    for write in (
        lambda: torch.save({"weight": Harmful()}, file),
        lambda: file.write_bytes(pickle.dumps(Harmful())),
    ):
        write()
        line = refused(capsys, source, tmp_path / "ours", "--base", base)
        assert line == f"{file}: {problem}"
        assert not Path("harmed").exists()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**6, 10**6),
        torch.empty(10**6, 10**6, device="meta"),
        torch.sparse_coo_tensor(size=(10**6, 10**6), check_invariants=True),
    ],
    ids=["expanded", "meta", "sparse"],
)
def test_a_few_bytes_with_the_shape_of_many(
    tensor: torch.Tensor,
    source: Path,
    base: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = source / FILE
    torch.save(torch.load(file, weights_only=True) | {"rotate_layer": tensor}, file)
    line = refused(capsys, source, tmp_path / "ours", "--base", base)
    assert line == f"{file}: rotate_layer has a shape with more elements than the file holds"


def test_a_class_is_looked_up_and_not_imported(
    source: Path, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((source / "config.json").read_text())
    config["intervention_types"] = ["<class 'antigravity.LoreftIntervention'>"] * 2
    (source / "config.json").write_text(json.dumps(config))
    assert main(["convert", str(source), str(tmp_path / "ours"), "--base", base]) == 0
    assert "antigravity" not in sys.modules
    capsys.readouterr()

    config["intervention_types"][1] = "<class 'pyreft.interventions.SubloreftIntervention'>"
    (source / "config.json").write_text(json.dumps(config))
    line = refused(capsys, source, tmp_path / "second", "--base", base)
    key = FILE.replace("_0_", "_2_").removeprefix("intkey_").removesuffix(".bin")
    assert line == (
        f"{source / 'config.json'}: {key} is a SubloreftIntervention, expected one of "
        f"{', '.join(CLASSES)}"
    )


@pytest.mark.parametrize("size", [0, 1, 100, 1000, -1])
def test_a_truncated_pickle(
    size: int, source: Path, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = source / FILE
    file.write_bytes(file.read_bytes()[:size])
    line = refused(capsys, source, tmp_path / "ours", "--base", base)
    assert re.fullmatch(
        rf"{re.escape(str(file))}: damaged, or holds more than tensors \(\w+\)", line
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ([1, 2], "expected a dictionary of tensors"),
        ({"weight": 3}, "expected a dictionary of tensors"),
        ({}, "no matrix of LoreftIntervention among no tensors"),
        ({"bias": None}, "learned_source.bias has shape None, LoreftIntervention of rank 4 and "
         "width 32 needs (4,)"),
        ({"more": torch.ones(2)}, "more has shape (2,), LoreftIntervention of rank 4 and width 32 "
         "needs None"),
        ({"weight": torch.ones(5, 32)}, "learned_source.weight has shape (5, 32), "
         "LoreftIntervention of rank 4 and width 32 needs (4, 32)"),
        ({"rotate_layer": torch.ones(32)}, "rotate_layer has shape (32,), expected [width, rank]"),
        (
            {
                "rotate_layer": None,
                "rotate_layer.parametrizations.weight.original": torch.ones(32, 4),
                "rotate_layer.parametrizations.weight.0.base": torch.ones(4, 4),
            },
            "rotate_layer has shapes (32, 4) and (4, 4), expected [width, rank] and [width, width]",
        ),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit(
    change: Any,
    problem: str,
    source: Path,
    base: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = source / FILE
    if isinstance(change, dict) and change:
        state = torch.load(file, weights_only=True) | change
        change = {name: value for name, value in state.items() if value is not None}
    torch.save(change, file)
    assert refused(capsys, source, tmp_path / "ours", "--base", base) == f"{file}: {problem}"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"representations": [], "intervention_types": [1]}',
     '{"representations": [[0]], "intervention_types": ["a.LoreftIntervention"]}',
     '{"representations": [["0", "block_output", "pos", 1, 4]], "intervention_types": ["a.B"]}',
     '{"representations": [[0, null, "pos", 1, 4]], "intervention_types": ["a.B"]}'],
)  # fmt: skip
def test_a_damaged_config(
    text: str, source: Path, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "config.json").write_text(text)
    line = refused(capsys, source, tmp_path / "ours", "--base", base)
    assert line.startswith(f"{source / 'config.json'}: damaged or not an adapter's config (")


def test_linked_units(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """pyvene gives the second the output of the first."""
    units = [intervention("loreft") for _ in range(2)]
    model = pyvene_model(units, tiny_model(), intervention_link_key="one")
    line = refused(capsys, saved(model, tmp_path / "theirs"), tmp_path / "ours", "--base", base)
    key = FILE.removeprefix("intkey_").removesuffix(".bin")
    assert f"{key} is linked to other units" in line


def test_missing_files(
    source: Path, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line() -> str:
        return refused(capsys, source, tmp_path / "ours", "--base", base)

    (source / FILE).unlink()
    assert line() == f"{source}: no {FILE} in it, which config.json names"
    (source / "config.json").unlink()
    assert line().startswith(f"{source}: no config.json in it, as in checkpoints of pyreft's")
    for file in source.iterdir():
        file.unlink()
    problem = "neither reft_config.json nor intkey_*.bin in it, so it is not an adapter directory"
    assert line() == f"{source}: {problem}"
    source.rmdir()
    assert line() == f"{source}: no such directory"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hidden_size": 64}, "{file}: edits hidden states of width 32, those at model.layers.0."
         "output of {base} have 64"),
        ({"num_hidden_layers": 2}, "{last}: layer 2: LlamaForCausalLM has layers 0 to 1"),
    ],
)  # fmt: skip
def test_another_base(
    changes: dict[str, int],
    problem: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other"
    tiny_model(**changes).config.save_pretrained(other)
    line = refused(capsys, source, tmp_path / "ours", "--base", other)
    file, last = source / FILE, source / FILE.replace("_0_", "_2_")
    assert line == problem.format(file=file, last=last, base=other)


def test_no_base(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, source, tmp_path / "ours")
    assert line == "convert: expected --base, the name or path of the base model"


def test_another_class_of_base(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which pyvene wrote down under transformers 4."""
    config = json.loads((source / "config.json").read_text())
    config["model_type"] = "<class 'transformers.models.llama.modeling_llama.LlamaForCausalLM'>"
    (source / "config.json").write_text(json.dumps(config))
    other = tmp_path / "other"
    tiny_model("qwen2").config.save_pretrained(other)
    line = refused(capsys, source, tmp_path / "ours", "--base", other)
    classes = "Qwen2ForCausalLM, Qwen2ForSequenceClassification, Qwen2Model"
    assert line == f"base '{other}' is one of {classes}, the adapter is for LlamaForCausalLM"


def test_another_base_for_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(tmp_path / "ours", entry("loreft"))
    other = tmp_path / "other"
    tiny_model("qwen2").config.save_pretrained(other)
    line = refused(capsys, tmp_path / "ours", tmp_path / "theirs", "--base", other)
    assert "has model_type 'llama', the given model" in line


@pytest.mark.parametrize("name", ["nowhere", "someone/nothing", "./nowhere"])
def test_a_base_that_is_not_there(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, source, tmp_path / "ours", "--base", name)
    # A path is looked for before transformers is imported, a hub name by transformers.
    is_path = name.startswith(".")
    assert line.startswith(f"{name}: no such directory" if is_path else f"base '{name}': ")


def test_positions_for_two_units_at_a_place(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = pyvene_model([intervention("loreft") for _ in range(4)], tiny_model())
    source = saved(model, tmp_path / "theirs")
    line = refused(capsys, source, tmp_path / "ours", "--base", base, "--positions", "l1")
    assert line == (
        "positions 'l1': 2 units edit model.layers.0.output; two need a prefix and a suffix, such "
        "as 'f5+l5', and more cannot be told apart"
    )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--positions", "x"], "positions 'x': expected terms like 'f7'"),
        (["--dropout", "2"], "representations[0]: dropout 2.0: expected a probability in [0, 1)"),
        (["--act_fn", "gelo"], "representations[0]: act_fn 'gelo' is not an activation"),
    ],
)
def test_options_out_of_range(
    options: list[str],
    problem: str,
    source: Path,
    base: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refused(capsys, source, tmp_path / "ours", "--base", base, *options)
    assert line.startswith(problem)


def test_options_are_for_reading_pyreft(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter(tmp_path / "ours", entry("loreft"))
    line = refused(
        capsys, tmp_path / "ours", tmp_path / "theirs", "--base", base, "--positions", "f1"
    )
    assert "are in a reftnoise adapter's own config: leave the options out" in line


def test_what_pyreft_does_not_have(
    base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Rescale(rn.LoreftIntervention):
        pass

    monkeypatch.setitem(INTERVENTIONS, "rescale", Rescale)
    adapter(tmp_path / "ours", entry("rescale"))
    line = refused(capsys, tmp_path / "ours", tmp_path / "theirs", "--base", base)
    assert line.endswith(f"representations[0]: pyreft has no Rescale, but {', '.join(CLASSES)}")

    adapter(tmp_path / "gated", entry("loreft") | {"gate": {"type": "probe"}})
    line = refused(capsys, tmp_path / "gated", tmp_path / "theirs", "--base", base)
    assert line.endswith("gate {'type': 'probe'}, which pyreft's format does not hold")

    adapter(tmp_path / "noise", {"intervention": "symnoise"})
    with caplog_at_error():
        line = refused(capsys, tmp_path / "noise", tmp_path / "theirs", "--base", base)
    assert line == f"{tmp_path / 'noise'}: nothing but noise in it, which pyreft does not have"


@contextlib.contextmanager
def caplog_at_error() -> Iterator[None]:
    """Without warnings on stderr, which are not what is tested."""
    logger = logging.getLogger("reftnoise")
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(logging.NOTSET)


def test_an_adapter_without_an_r(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reft_model = adapter(tmp_path / "ours", entry("loreft"))
    for unit in reft_model.interventions.values():
        unit.rotate_layer.weight.data[1] = unit.rotate_layer.weight.data[0]
    with pytest.warns(UserWarning, match="dependent rows of R"):
        reft_model.save_pretrained(tmp_path / "ours")
    with caplog_at_error():
        line = refused(capsys, tmp_path / "ours", tmp_path / "theirs", "--base", base)
    assert "rotate_layer.weight holds" in line
    assert "dependent rows of R" in line


@pytest.mark.parametrize("content", ["file", "strange", "source", "itself"])
def test_an_output_that_holds_something_else(
    content: str, source: Path, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = source if content == "itself" else tmp_path / "output"
    if content == "file":
        output.write_text("mine")
    elif content == "strange":
        output.mkdir()
        (output / "config.json").write_text("{}")
    elif content == "source":
        shutil.copytree(source, output)
    problem = (
        "expected a directory, found a file"
        if content == "file"
        else "neither empty nor a reftnoise adapter, so it is left alone"
    )
    assert refused(capsys, source, output, "--base", base) == f"{output}: {problem}"


def test_both_kinds_in_one_directory(
    source: Path, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter(source, entry("loreft"))
    line = refused(capsys, source, tmp_path / "output", "--base", base)
    assert line == f"{source}: both a reftnoise and a pyreft adapter; give each a directory"


@pytest.mark.parametrize("is_first", [True, False])
def test_a_write_that_fails_leaves_what_was_there(
    is_first: bool, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(tmp_path / "ours", entry("loreft"))
    output = tmp_path / "theirs"
    if not is_first:
        saved(pyvene_model([intervention("direft")], tiny_model()), output)
    before = {path.name: path.read_bytes() for path in output.glob("*")}
    write = Path.write_bytes

    def half(path: Path, content: bytes) -> int:
        if path.name == "config.json":
            raise OSError("No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left"):
        convert(tmp_path / "ours", output, base=base)
    assert {path.name: path.read_bytes() for path in output.glob("*")} == before
