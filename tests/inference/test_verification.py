"""`verify` against a real server around a real model, in this process, with faults planted."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

import reftnoise as rn
from reftnoise.cli.main import main
from reftnoise.inference.verification.report import print_verification
from support.adapters import moved
from support.completion_server import Engine, serving

LAST = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2, "positions": "l1"}
ENDS = LAST | {"positions": "f2+l2"}
EVERYWHERE = LAST | {"positions": "all+decode", "layer": 1}
FAULTS = ["position", "pieces", "scale", "stale cache", "shared cache", "base", "leak", "short"]
REQUESTS = 16


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("verified")
    for name, entry in {"last": LAST, "ends": ENDS, "everywhere": EVERYWHERE}.items():
        torch.manual_seed(5)
        model, _ = rn.load_tiny_model()
        reft_model = rn.get_reft_model(model, rn.ReftConfig([entry])).eval()
        moved(reft_model, std=0.3).save_pretrained(folder / name)
    return {path.name: path for path in folder.iterdir()}


def engine_of(adapter: Path, fault: str | None = None, **settings: Any) -> Engine:
    model, tokenizer = rn.load_tiny_model()
    reft_model = rn.ReftModel.from_pretrained(model, adapter).eval()
    return Engine(reft_model, tokenizer, fault, **settings)


def verified(adapter: Path, engine: Engine, **arguments: Any) -> dict[str, Any]:
    with serving(engine) as url:
        settings: dict[str, Any] = {"served_name": "edited", "dtype": "float32"}
        settings |= {"requests": REQUESTS, "longest": 70} | arguments
        return rn.verify_server(adapter, url, **settings)


@pytest.mark.parametrize("name", ["last", "ends", "everywhere"])
def test_a_right_server_is_equal(adapters: dict[str, Path], name: str) -> None:
    engine = engine_of(adapters[name])
    record = verified(adapters[name], engine)
    assert record["differing"] == 0
    assert record["differences"] == record["notes"] == []
    assert record["requests"] == REQUESTS
    assert record["served_base"] == "base"
    assert record["offers"] == {"token_ids": True, "log_probs": True, "prompt_log_probs": True}
    assert record["compared_log_probs"] > record["compared_tokens"] > 3 * REQUESTS
    assert record["largest_difference"] < record["limit"] < record["largest_effect"]
    assert engine.hits > 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(adapters: dict[str, Path], fault: str) -> None:
    # The base's states of a prompt are those of an adapter that edits its last token alone.
    adapter = adapters["everywhere" if fault == "shared cache" else "last"]
    record = verified(adapter, engine_of(adapter, fault))
    assert record["differing"] == len(record["differences"]) > 0
    for difference in record["differences"]:
        gap = abs((difference["log_prob"] or 0.0) - difference["own_log_prob"])
        assert max(gap, difference["margin"]) > record["limit"]
    notes = " ".join(record["notes"])
    assert ("as the base does" in notes) == (fault == "base")
    assert ("begin as earlier ones" in notes) == ("cache" in fault)
    if fault == "leak":
        assert all(difference["of_base"] for difference in record["differences"])


@pytest.mark.parametrize(
    "offers",
    [
        {"ids", "token_ids", "log_probs"},
        {"ids", "token_ids", "log_probs", "no echo"},
        {"ids", "log_probs"},
        {"ids", "log_probs", "echo"},
        {"log_probs", "echo"},
        set(),
    ],
    ids=["refuses echo", "ignores echo", "names", "names and echo", "texts", "texts alone"],
)
def test_servers_that_offer_less_are_compared_by_what_they_offer(
    adapters: dict[str, Path], offers: set[str]
) -> None:
    prompts = ["Where does a bear live?", "Who are you?"]
    arguments = {"prompts": prompts, "requests": 12, "longest": 30}
    engine = engine_of(adapters["last"], offers=frozenset(offers))
    record = verified(adapters["last"], engine, **arguments)
    assert record["differing"] == 0
    assert record["requests"] > 3
    assert record["compared_tokens"] > 20
    assert record["offers"]["token_ids"] == ("ids" in offers)
    assert record["offers"]["log_probs"] == ("log_probs" in offers)
    assert record["offers"]["prompt_log_probs"] == ("echo" in offers)
    assert (record["compared_log_probs"] == 0) == ("log_probs" not in offers)
    note = "the server gives no log-probabilities of prompts: only answers are compared"
    assert (note in record["notes"]) == ("log_probs" in offers and "echo" not in offers)
    engine = engine_of(adapters["last"], "base", offers=frozenset(offers))
    assert verified(adapters["last"], engine, **arguments)["differing"] > 0


def test_without_log_probabilities_tokens_alone_are_reported(
    adapters: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    prompts = ["Where does a bear live?", "Who are you?"]
    arguments = {"prompts": prompts, "requests": 4, "longest": 30}
    engine = engine_of(adapters["last"], offers=frozenset())
    record = verified(adapters["last"], engine, **arguments)
    print_verification(record)
    shown = capsys.readouterr().out
    assert f"equal. {record['compared_tokens']} tokens were compared, of which" in shown
    assert "log-probabilities differ" not in shown
    assert "the server gives no log-probabilities: only its tokens are compared" in shown

    engine = engine_of(adapters["last"], "base", offers=frozenset())
    record = verified(adapters["last"], engine, **arguments)
    print_verification(record)
    shown = capsys.readouterr().out
    assert "log-probabilities differ" not in shown
    for difference in record["differences"]:
        assert f"{difference['margin']:.2g}" in shown


def test_a_token_with_the_right_log_probability_is_behind_the_likeliest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    difference = {"request": 3, "of_base": False, "prompt_length": 5, "shared": 0, "position": 6}
    difference |= {"is_prompt": False, "token_text": "a", "own_token_text": "b", "margin": 1.25}
    difference |= {"log_prob": -2.0, "own_log_prob": -2.0}
    other = difference | {"request": 4, "log_prob": -1.0, "own_log_prob": -1.75, "margin": 0.0}
    print_verification(
        {"served_name": "edited", "server": "url", "requests": 4, "differing": 2}
        | {"compared_log_probs": 9, "largest_difference": 0.75, "limit": 1e-3, "near_ties": 0}
        | {"largest_effect": 3.0, "compared_tokens": 9, "notes": []}
        | {"differences": [difference, other]}
    )
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {row[0]: row[-2] for row in rows if row[0] in "34"} == {"3": "1.2", "4": "0.75"}


def test_a_tolerance_is_the_users(adapters: dict[str, Path]) -> None:
    engine = engine_of(adapters["last"], "scale")
    record = verified(adapters["last"], engine, tolerance=50.0, requests=4)
    assert record["differing"] == 0
    assert 1e-3 < record["largest_difference"] < record["limit"] == 50.0
    (note,) = record["notes"]
    assert "a server without it might pass, too" in note


def test_the_exit_code_is_for_scripts(
    adapters: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    command = ["verify", str(adapters["last"]), "--requests", "6", "--longest", "20"]
    command += ["--dtype", "float32", "--server"]
    with serving(engine_of(adapters["last"])) as url:
        name = ["--served_name", "edited"]
        assert main([*command, url, *name]) == 0
        assert "6 requests: equal" in capsys.readouterr().out
        assert main([*command, url]) == 2
        message = capsys.readouterr().err
        assert "served_name is missing: the server has no 'last'; expected one of" in message
        assert main([*command, url, "--served_name", "edit"]) == 2
        assert "did you mean 'edited'?" in capsys.readouterr().err
    with serving(engine_of(adapters["last"], "base")) as url:
        assert main([*command, f"{url}/v1/", *name]) == 1
        shown = capsys.readouterr().out
        assert "of 6 requests differ" in shown
        assert "answer 0" in shown
        assert main([*command, url, *name, "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["differing"] > 0


def test_a_server_that_is_not_there_is_a_mistake(
    adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        assert main(["verify", str(adapters["last"]), "--server", url]) == 2
    assert f"server {url}/v1/models: " in capsys.readouterr().err


@pytest.mark.slow
def test_none_of_500_requests_to_a_right_server_differs(adapters: dict[str, Path]) -> None:
    for name in ("last", "everywhere"):
        record = verified(adapters[name], engine_of(adapters[name]), requests=500, longest=100)
        assert (record["requests"], record["differing"]) == (500, 0)
