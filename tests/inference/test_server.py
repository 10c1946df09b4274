"""transformers' own server with adapters, against our `generate`; through its real application."""

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import reftnoise as rn
from support.adapters import moved
from support.command_line import command
from support.waiting import PATIENCE, wait_until

pytest.importorskip("fastapi", reason="needs fastapi: pip install 'reftnoise[serve]'")

PROMPT = "Where does a bear live?"


@pytest.fixture(scope="module")
def reft_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[rn.ReftModel, Any]:
    base, tokenizer = rn.load_tiny_model()
    library = rn.get_reft_model(base)
    for seed, positions in enumerate(("l1", "all+decode")):
        torch.manual_seed(seed)
        entry = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2}
        config = rn.ReftConfig([entry | {"positions": positions}])
        adapted = rn.get_reft_model(rn.load_tiny_model()[0], config)
        path = tmp_path_factory.mktemp(positions)
        moved(adapted, std=0.3).save_pretrained(path)
        library.load_adapter(path, positions)
    return library, tokenizer


@pytest.fixture(scope="module")
def url(reft_model: tuple[rn.ReftModel, Any]) -> Iterator[str]:
    """Of a running server."""
    from reftnoise.inference.server import start_server

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = start_server(*reft_model, host="127.0.0.1", port=port, waits=False)
    try:
        wait_until(lambda: server.server.started)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill_server()


def test_the_command_says_where_it_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = rn.ReftConfig({"layer": 1, "intervention": "bias"})
    rn.get_reft_model(rn.load_tiny_model()[0], config).save_pretrained(tmp_path / "polite")
    started: list[Any] = []
    monkeypatch.setattr(
        "reftnoise.inference.server.start_server", lambda *_, **at: started.append(at)
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert command("serve", tmp_path / "polite", "--model", "tiny-chat", "--port", port) == 0
    said = f"base, polite are served at http://localhost:{port}/v1; Ctrl-C ends it."
    assert said in capsys.readouterr().out
    assert started == [{"host": "localhost", "port": port}]


def ask(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return json.load(answer)


def expected(reft_model: tuple[rn.ReftModel, Any], name: str) -> str:
    library, tokenizer = reft_model
    ids = tokenizer(PROMPT, return_tensors="pt")
    choice = None if name == "base" else name
    tokens = library.generate(
        **ids, adapter_names=[choice], max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    return tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_an_adapter_is_a_models_name(url: str, reft_model: tuple[rn.ReftModel, Any]) -> None:
    listed = ask(f"{url}/models")["data"]
    assert {model["id"] for model in listed} == {"base", "l1", "all+decode"}
    written = {}
    for name in ("base", "l1", "all+decode"):
        body = {"model": name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        written[name] = ask(f"{url}/completions", body)["choices"][0]["text"]
        assert written[name] == expected(reft_model, name)
    assert len(set(written.values())) == 3


def test_an_unknown_name_is_the_clients_mistake(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        ask(f"{url}/completions", {"model": "l2", "prompt": PROMPT})
    assert raised.value.code == 404
    assert "possible: base, l1, all+decode" in raised.value.read().decode()
