"""examples/distributed as it stands: one process, or two that a launcher starts, train alike."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import reftnoise as rn
from support.programs import cpus_as_accelerators
from support.waiting import PATIENCE

EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed"
SCRIPT = str(EXAMPLE / "train.py")
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ARGUMENTS = {"noise": "none", "steps": 4}  # noise would differ by process

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: pip install deepspeed"
)


def config(name: str) -> list[str]:
    return [*ACCELERATE, "--config_file", str(EXAMPLE / name)]


LAUNCHERS = {
    "ddp": [*config("ddp.yaml"), SCRIPT],
    "fsdp2": [*config("fsdp2.yaml"), cpus_as_accelerators.__file__, SCRIPT],
    "zero2": [*config("deepspeed_zero2.yaml"), SCRIPT],
    "zero3": [*config("deepspeed_zero3.yaml"), SCRIPT],
    "zero2.json": [*TORCHRUN, SCRIPT, "--deepspeed", str(EXAMPLE / "deepspeed_zero2.json")],
    "zero3.json": [*TORCHRUN, SCRIPT, "--deepspeed", "deepspeed_zero3.json"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    examples = rn.load_tiny_examples("train")
    lines = [json.dumps({"prompt": e.prompt, "output": e.completion}) for e in examples]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def alone(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script makes of the data in this process, with the embedded model."""
    spec = importlib.util.spec_from_file_location("train", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    output = tmp_path_factory.mktemp("alone")
    module.main(data=data, output=str(output), batch_size=4, **ARGUMENTS)
    return output


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("ddp", marks=pytest.mark.slow),  # as test_sharding's DDP
        pytest.param("fsdp2", marks=pytest.mark.slow),  # as test_sharding's FSDP
        *(pytest.param(name, marks=needs_deepspeed) for name in LAUNCHERS if "zero" in name),
    ],
)
def test_two_processes_end_with_the_adapter_of_one(
    launcher: str, data: str, alone: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"data": data, "output": tmp_path / "out", "batch_size": 2, **ARGUMENTS}
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    path = os.pathsep.join([entry for entry in sys.path if entry])
    settings = json.loads((EXAMPLE / "deepspeed_zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # the units, too
    (tmp_path / "deepspeed_zero3.json").write_text(json.dumps(settings))
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*LAUNCHERS[launcher], *options],
        env=os.environ | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Once, and of the whole base, also where every process has a part of it
    assert done.stdout.count("model params: 985,216 || trainable%: 0.4174") == 1
    weights, expected = (
        load_file(directory / "reft_model.safetensors") for directory in (tmp_path / "out", alone)
    )
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
    saved = {file.name for file in (tmp_path / "out").iterdir()}
    assert saved == {file.name for file in alone.iterdir()}
    written = (tmp_path / "out").rglob("*.pt")
    assert sum(file.stat().st_size for file in written) < 2**20  # optimizer states, and no base


def test_the_adapter_loads(alone: Path) -> None:
    base, tokenizer = rn.load_tiny_model()
    model = rn.ReftModel.from_pretrained(base, alone)
    tokens = model.generate(**tokenizer("Who?", return_tensors="pt"), max_new_tokens=2)
    assert tokens.shape[1] <= tokenizer("Who?", return_tensors="pt")["input_ids"].shape[1] + 2
