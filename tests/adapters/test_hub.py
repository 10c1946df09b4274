"""Uploading to a hub and loading from it by `huggingface_hub`, over HTTP to a local stand-in."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch

import reftnoise as rn
from support.local_hub import TOKEN, running_hub
from support.models.architectures import tiny_model
from support.tolerance import assert_close

# conftest switches the hub off in this process, for good.
CODE = f"""
import json, os, sys
import torch
from support.models.architectures import tiny_model
import reftnoise as rn

def adapter(seed):
    base = tiny_model()
    torch.manual_seed(seed)
    loreft = {{"layer": "all", "intervention": "loreft", "low_rank_dimension": 4}}
    return rn.get_reft_model(base, rn.ReftConfig(loreft | {{"positions": "f1+l1"}})).eval()

@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(3, 13)[None]).logits

def loads_as(name, model, load=lambda name: rn.ReftModel.from_pretrained(tiny_model(), name)):
    return torch.equal(logits(load(name)), logits(model))

def refusal(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]

found, token = {{}}, {TOKEN!r}
first, second, third = (adapter(seed) for seed in range(3))
assert not torch.equal(logits(first), logits(second))

found["address"] = first.push_to_hub("adapter", private=True, token=token)
found["loaded"] = loads_as("me/adapter", first)
second.push_to_hub("me/adapter", commit_message="More training", token=token)
found["loaded again"] = loads_as("me/adapter", second)
found["request"] = third.push_to_hub("me/adapter", create_pr=True, token=token)
found["main unchanged"] = loads_as("me/adapter", second)
of_request = lambda name: rn.ReftModel.from_pretrained(
    tiny_model(), name, revision="refs/pr/1", token=token
)
found["a revision"] = loads_as("me/adapter", third, of_request)

found["without a token"] = refusal(lambda: first.push_to_hub("me/adapter", token=False))
nothing = lambda: rn.ReftModel.from_pretrained(tiny_model(), "me/nothing")
found["no such repository"] = refusal(nothing)

os.environ["HF_TOKEN"] = token
third.save(sys.argv[1] + "/local", save_to_hf_hub=True, hf_repo_name="me/other")
found["pyreft's form"] = loads_as(
    "me/other", third, lambda name: rn.ReftModel.load(name, tiny_model(), from_huggingface_hub=True)
)
torch.save({{"weights": second.state_dict(), "logits": logits(second)}}, sys.argv[1] + "/second.pt")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What `CODE` found in a process that is online; the hub, and the cache, that it left."""
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with running_hub() as hub:
        settings = {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # whose protocol the stand-in does not speak
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        done = subprocess.run(
            [sys.executable, "-c", CODE, str(home)],
            env=kept | settings,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        yield SimpleNamespace(found=json.loads(done.stdout), hub=hub, home=home)


def test_uploads(session: Any) -> None:
    repository = session.hub.repositories["me/adapter"]
    assert repository.visibility == "private"
    files = {"README.md", "reft_config.json", "reft_model.safetensors"}
    for revision, message in (("main", "More training"), ("refs/pr/1", "Upload adapter")):
        assert repository.revisions[revision].message == message
        assert set(repository.revisions[revision].files) == files
    for address in (session.found["address"], session.found["request"]):
        assert address.startswith(f"{session.hub.endpoint}/me/adapter/")


@pytest.mark.parametrize(
    "name", ["loaded", "loaded again", "main unchanged", "a revision", "pyreft's form"]
)
def test_what_is_loaded_gives_bit_equal_outputs(name: str, session: Any) -> None:
    assert session.found[name] is True


@torch.no_grad()
def test_what_was_loaded_is_there_offline(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(session.home / "hub"))
    loaded = rn.ReftModel.from_pretrained(tiny_model(), "me/adapter")
    saved = torch.load(session.home / "second.pt")
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], saved["weights"][name]) for name in weights)
    # Of another process, whose sums may be in another order
    assert_close(loaded(input_ids=torch.arange(3, 13)[None]).logits, saved["logits"])


def test_refusals(session: Any) -> None:
    kind, text = session.found["without a token"]
    assert kind == "HfHubHTTPError"
    assert "401" in text
    kind, text = session.found["no such repository"]
    assert kind == "FileNotFoundError"
    assert text.startswith("me/nothing: no such directory here, and none on the hub")
