"""Two processes on a CPU train as one does: DDP, FSDP2, their Trainers, saving and resuming.

The processes run distributed_worker.py, all cases of a kind in one launch. Expected values come
from the same loop in this process, on the whole batch.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer

import reftnoise as rn
from support.adapters import moved
from support.models.architectures import tiny_model
from support.programs import distributed_worker as worker
from support.tolerance import assert_close
from support.waiting import PATIENCE

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SAVED = ["README.md", "reft_config.json", "reft_model.safetensors"]


class Launch:
    """What the cases of one launch gave, or why they failed."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder
        path = os.pathsep.join(filter(None, sys.path))
        self.process = subprocess.run(
            [*TORCHRUN, worker.__file__, name, str(folder)],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        results = folder / f"{name}.pt"
        self.results = torch.load(results, weights_only=False) if results.exists() else None

    def __getitem__(self, case: str) -> Any:
        if self.results is None:
            pytest.fail(f"the launch ended without results:\n{self.process.stderr[-4000:]}")
        if isinstance(self.results[case], dict) and "failed" in self.results[case]:
            pytest.fail(self.results[case]["failed"])
        return self.results[case]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def killed(folder: Path) -> Launch:
    return Launch("killed", folder)


@pytest.fixture(scope="module")
def trained(killed: Launch) -> Launch:
    return Launch("trained", killed.folder)


# -- loops by hand ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    found = {n: worker.train_by_hand(worker.wrapped(*e)) for n, e in worker.ENTRIES.items()}
    uneven = worker.wrapped(worker.loreft(positions="l1"))
    return found | {"uneven": worker.train_by_hand(uneven, kind="uneven")}


@pytest.mark.parametrize("case", [case for case in worker.BY_HAND if ": " in case])
def test_gradients_and_weights_are_those_of_one_process(
    case: str, trained: Launch, alone: dict[str, Any]
) -> None:
    expected = alone[case.split(": ")[1]]
    for part in ("gradients", "weights"):
        assert set(trained[case][part]) == set(expected[part])
        torch.testing.assert_close(trained[case][part], expected[part], rtol=0, atol=1e-6)
    assert max(gradient.abs().max() for gradient in expected["gradients"].values()) > 1e-3


def test_a_sharded_model_saves_what_it_computes(trained: Launch) -> None:
    directory = trained.folder / "by hand"
    assert sorted(path.name for path in directory.iterdir()) == SAVED
    model = rn.ReftModel.from_pretrained(tiny_model(), directory)
    batch = {name: value for name, value in worker.batches()[0].items() if name != "labels"}
    with torch.no_grad():
        logits = model(**batch).logits
    assert_close(trained["saved"]["logits"], logits)
    tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(trained["saved"]["tokens"], tokens)
    assert trained["saved"]["is same"]  # after loading into the shards


def test_shards_are_not_saved_as_if_they_were_whole(trained: Launch) -> None:
    assert "is spread over processes: gather the weights in all" in trained["saved"]["error"]
    assert not (trained.folder / "in parts").exists()


def test_what_is_gathered_of_the_frozen_base_is_not_saved(tmp_path: Path) -> None:
    model = worker.wrapped()  # DeepSpeed gathers all parameters, for any model
    everything = {name: p.detach() for name, p in model.named_parameters()}
    model.save_pretrained(tmp_path, state_dict=everything)
    assert load_file(tmp_path / "reft_model.safetensors").keys() == model.state_dict().keys()


def test_what_sharding_excludes(trained: Launch) -> None:
    assert trained["refused"]["split"] == "split 'always': the base is spread over processes"
    assert "FSDP2 shards its 'learned_source' by itself" in trained["refused"]["part of a unit"]


def test_tensor_parallel_gradients(trained: Launch) -> None:
    model = worker.wrapped()
    model(**worker.batches()[0]).loss.backward()
    expected = {n: p.grad for n, p in model.interventions.named_parameters()}
    found = trained["tensor parallel"]["gradients"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# -- Trainers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found: dict[str, Any] = {}
    of_processes = {"fsdp", "trainer", "options", "gradient_checkpointing"}

    def train(name: str) -> Any:
        settings = worker.TRAINERS.get(name, {})
        settings = {name: value for name, value in settings.items() if name not in of_processes}
        key = repr(settings)
        if key not in found:
            found[key] = worker.train(tmp_path_factory.mktemp("alone"), **settings)
        return found[key]

    return train


@pytest.mark.parametrize("case", worker.BY_TRAINER)
def test_a_run_ends_with_the_weights_of_one_process(
    case: str, trained: Launch, trained_alone: Any
) -> None:
    found, expected = trained[case], trained_alone(case)
    torch.testing.assert_close(found["weights"], expected["weights"], rtol=0, atol=1e-6)
    assert_close(found["losses"], expected["losses"])


@pytest.mark.parametrize("case", ["ddp", "fsdp", "fsdp, sharded"])
def test_a_resumed_run_ends_with_the_same_weights(case: str, trained: Launch) -> None:
    for name, weight in trained[case]["weights"].items():
        assert torch.equal(trained[f"{case}, resumed"]["weights"][name], weight)


@pytest.mark.filterwarnings("ignore:.*have different weights:UserWarning")  # a random base
@pytest.mark.parametrize("case", [c for c in worker.BY_TRAINER if "plain Trainer" not in c])
def test_what_is_saved_is_whole(case: str, trained: Launch) -> None:
    weights = trained[case]["weights"]
    final = trained.folder / case.replace("killed, resumed", "killed") / "final"
    assert set(SAVED) <= {path.name for path in final.iterdir()}
    size = len(AutoTokenizer.from_pretrained(final))
    loaded = rn.ReftModel.from_pretrained(tiny_model(vocab_size=size), final)
    found = dict(loaded.interventions.named_parameters())
    assert set(found) == set(weights)
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_one_process_writes(trained: Launch) -> None:
    # FSDP's own parts of optimizer and model, beside the adapter
    written = trained["written by the second process"]
    assert all(Path(path).match("*/checkpoint-*/*_0/__1_0.distcp") for path in written)


def test_a_kill_within_a_save_leaves_no_half_adapter(killed: Launch, trained: Launch) -> None:
    assert killed.process.returncode != 0
    assert killed.results is None
    why = "checkpoint-4 incomplete, resuming from checkpoint-2"
    assert trained.process.stderr.count(why) == 2
    weights = trained["ddp"]["weights"]
    for name, weight in trained["killed, resumed"]["weights"].items():
        assert torch.equal(weight, weights[name])


def test_units_that_are_sharded_by_themselves_stay_so_after_an_evaluation(tmp_path: Path) -> None:
    entry = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2, "positions": "all"}
    model = moved(rn.get_reft_model(tiny_model(num_hidden_layers=2), rn.ReftConfig([entry])))
    ids = torch.tensor([[5, 6, 9, 4, 3], [8, 2, 7, 1, 6]])
    labels = ids.masked_fill(torch.arange(5) < 2, -100)
    model.train()(input_ids=ids, labels=labels).loss.backward()
    expected = [p.grad for p in model.interventions.parameters()]
    model.zero_grad()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for placed in model.engine.units:
            fully_shard(placed.unit, mesh=mesh)
            placed.unit.set_reshard_after_backward(False)
        with torch.no_grad():  # which leaves them gathered
            model.eval()(input_ids=ids)
        model.train()(input_ids=ids, labels=labels).loss.backward()
        for placed in model.engine.units:
            placed.unit.reshard()
        whole = [p.grad.full_tensor() for p in model.interventions.parameters()]
        assert_close(whole, expected)
    finally:
        dist.destroy_process_group()
