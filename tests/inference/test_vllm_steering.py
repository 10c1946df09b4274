"""`steer` with a running vLLM: its states, the vector of them, and that the server then has it."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import reftnoise as rn
from reftnoise.analysis.steering.directions import steering_vector
from reftnoise.analysis.steering.options import SteerOptions
from reftnoise.analysis.steering.pairs import read_pairs
from reftnoise.analysis.steering.search import tokenized_pairs
from reftnoise.cli.main import main
from reftnoise.inference.vllm.steering import steer_server
from support.vllm_server import NEEDS_VLLM, saved_base, served_base

pytest.importorskip("vllm", reason=NEEDS_VLLM)

LAYER = 2
ANIMALS = ["bear", "cow", "dog", "cat", "fish", "bird", "horse", "frog", "fox", "duck"]
CHOICE = {"layers": LAYER, "methods": ["probe"], "positions": "all+decode"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {
            "positive": f"The {animal} is very good and happy today.",
            "negative": f"The {animal} is bad today.",
        }
        for animal in ANIMALS
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Path]]:
    """A server that captures: its address, its folder, and its base."""
    place = tmp_path_factory.mktemp("server")
    base = saved_base(place / "base")
    additional = {"reft": ["block_output"], "reft_capture": str(place / "captures")}
    options = ["--max-model-len", "128", "--block-size", "32"]
    options += ["--additional-config", json.dumps(additional)]
    with served_base(base, place / "log.txt", *options) as (url, _):
        yield url, place / "captures", base


def ask(server: str, **body: Any) -> tuple[int, Any]:
    """The status and the answer of a request for a completion."""
    body = {"model": "base", "max_tokens": 6, "temperature": 0, "return_token_ids": True} | body
    request = urllib.request.Request(
        f"{server}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def expected_vector(pairs: Path, base: Any, tokenizer: Any, prompted: str) -> tuple[Any, float]:
    """The vector of transformers' states at the differing tokens, and its size next to them."""
    means, norms = [], []
    contrasts = tokenized_pairs(tokenizer, read_pairs(pairs), prompted)
    for part in ("matching", "other"):
        for pair in contrasts:
            tokens = getattr(pair, part)
            with torch.no_grad():
                states = base(
                    input_ids=torch.tensor([pair.prompt + tokens]), output_hidden_states=True
                ).hidden_states[LAYER + 1][0, -len(tokens) :]
            means.append(states.double().mean(0))
            norms.append(states.double().norm(dim=-1).mean())
    count = len(contrasts)
    vector = steering_vector("probe", torch.stack(means[:count]), torch.stack(means[count:]))
    return vector, float(vector.norm() / torch.stack(norms).mean())


def test_a_vector_is_fitted_to_the_servers_states_and_served(
    server: tuple[str, Path, Path],
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, captures, base = server
    command = ["steer", str(pairs), "--model", str(base), "--output_dir", str(tmp_path / "happy")]
    command += ["--layers", str(LAYER), "--methods", "[probe]", "--sizes", "[0.5]"]
    command += ["--positions", "all+decode", "--template", "plain"]
    command += ["--server", url, "--captures", str(captures)]
    assert main([*command, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    model, tokenizer = rn.load_tiny_model()
    vector, ratio = expected_vector(pairs, model, tokenizer, "plain")
    assert results["chosen"]["size"] == pytest.approx(0.5)
    assert results["chosen"]["scale"] == pytest.approx(0.5 / ratio, rel=1e-3)
    assert results == json.loads((tmp_path / "happy" / "steering.json").read_text())
    steered = rn.ReftModel.from_pretrained(model, tmp_path / "happy" / "adapter").eval()
    [unit] = steered.interventions.values()
    torch.testing.assert_close(
        unit.vector,
        (0.5 / ratio * vector).float(),
        rtol=1e-3,
        atol=1e-3 * float(vector.abs().max()),
    )
    assert not list(captures.iterdir())

    prompt = tokenizer("The bear is")["input_ids"]
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    written = steered.generate(input_ids=ids, **settings)[0, len(prompt) :].tolist()
    with steered.disabled():
        bare = steered.generate(input_ids=ids, **settings)[0, len(prompt) :].tolist()
    assert bare != written
    for name, tokens in (("happy", written), ("base", bare)):
        status, answer = ask(url, model=name, prompt=prompt)
        assert (status, answer["choices"][0]["token_ids"]) == (200, tokens)

    assert main(command) == 2
    assert "holds adapter already" in capsys.readouterr().err.replace("steering.json", "adapter")
    assert main([*command, "--overwrite"]) == 0
    assert f"{url}/v1 serves it as 'happy'" in capsys.readouterr().out


def test_clients_choose_no_path(server: tuple[str, Path, Path]) -> None:
    url, captures, _ = server
    before = {path for path in captures.parent.rglob("*") if path.is_file()}
    extra: Any
    for extra, prompt in (
        ({"reft_capture": "../outside"}, [5, 6]),
        ({"reft_capture": "/outside"}, [5, 6]),
        ({"reft_capture": ["name"]}, [5, 6]),
        ({"reft_capture": "name", "reft_capture_positions": "l1+decode"}, [5, 6]),
        ({"reft_capture": "name", "reft_capture_positions": [7]}, [5, 6]),
        ({"reft_capture": "name", "reft_capture_positions": 1.5}, [5, 6]),
    ):
        status, answer = ask(url, prompt=prompt, vllm_xargs=extra)
        assert status == 400, answer
        assert "reft_capture" in answer["error"]["message"] or "positions" in str(answer)
    assert {path for path in captures.parent.rglob("*") if path.is_file()} == before
    status, answer = ask(url, prompt=[[5, 6], [7, 8]], vllm_xargs={"reft_capture": "two"})
    assert (status, "one prompt" in str(answer)) == (400, True)
    assert ask(url, prompt=[5, 6], vllm_xargs={"reft_capture": "good"})[0] == 200
    (captures / "good.safetensors").unlink()
    (captures / "two.safetensors").unlink(missing_ok=True)


def test_another_folder_is_named(
    server: tuple[str, Path, Path], pairs: Path, tmp_path: Path
) -> None:
    url, captures, base = server
    options = SteerOptions(**CHOICE, scales=[1.0])
    with pytest.raises(ValueError, match="the server has written no states there"):
        steer_server(pairs, str(base), tmp_path / "x", options, server=url, captures=tmp_path)
    for path in captures.iterdir():
        path.unlink()
    assert not (tmp_path / "x").exists()
