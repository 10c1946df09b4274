"""Adapters in vLLM's server, which clients of OpenAI's API reach, against our own `generate`."""

import asyncio
import json
import os
import random
import shutil
import statistics
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import reftnoise as rn
from reftnoise.adapters.directory import AdapterFiles
from reftnoise.config.decoding import Decoding
from reftnoise.inference.playground.asking import AnswerRequest
from support.adapters import MISTAKES, SEEN_BY_THE_ENGINE, save
from support.vllm_server import NEEDS_VLLM, saved_base, served_base
from support.waiting import PATIENCE, wait_until

pytest.importorskip("vllm", reason=NEEDS_VLLM)
openai = pytest.importorskip("openai")
psutil = pytest.importorskip("psutil")

from reftnoise.inference.playground.server import Server  # noqa: E402  # which needs openai

ALL_MISTAKES = MISTAKES | SEEN_BY_THE_ENGINE


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded model, and adapters of it."""
    folder = tmp_path_factory.mktemp("served")
    saved_base(folder / "base")
    loreft = {"layer": "all", "intervention": "loreft", "low_rank_dimension": 2}
    entries = {
        "l1": loreft,
        "all": loreft | {"positions": "all+decode"},
        "mlp": loreft | {"component": "mlp_output"},
    }
    for seed, (name, entry) in enumerate(entries.items()):
        torch.manual_seed(seed)
        config = rn.ReftConfig([entry])
        save(rn.get_reft_model(rn.load_tiny_model()[0], config), folder / name)
    for name, (make, _) in ALL_MISTAKES.items():
        make(folder / "l1", folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def server(served: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server that began with one adapter: its process, and its address."""
    options = ["--max-model-len", "128", "--block-size", "32"]
    options += ["--num-gpu-blocks-override", "256"]  # soon all are in memory
    options += ["--lora-modules", f"l1={served['l1']}"]
    environment = {"VLLM_SERVER_DEV_MODE": "1"}  # so that its worker can be asked what is loaded
    log = tmp_path_factory.mktemp("log") / "server.txt"
    with served_base(served["base"], log, *options, environment=environment) as (url, process):
        yield process, f"{url}/v1"


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    return openai.OpenAI(base_url=server[1], api_key="none", max_retries=0)


PROMPT = "Where does a bear live?"
ENDLESS = {"ignore_eos": True}


def written_by_us(served: dict[str, Path], name: str, scale: float = 1.0) -> str:
    base, tokenizer = rn.load_tiny_model()
    reft_model = rn.get_reft_model(base)
    if name != "base":
        reft_model.load_adapter(served[name], name)
        reft_model.set_adapter({name: scale})
    ids = tokenizer(PROMPT, return_tensors="pt")
    tokens = reft_model.generate(**ids, max_new_tokens=12, do_sample=False)
    return tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def complete(client: Any, name: str, **extra: Any) -> str:
    answer = client.completions.create(
        model=name, prompt=PROMPT, max_tokens=12, temperature=0, **extra
    )
    return answer.choices[0].text


def load(client: Any, name: str, path: Path | str) -> Any:
    body = {"lora_name": name, "lora_path": str(path), "load_inplace": True}
    return client.post("/load_lora_adapter", body=body, cast_to=str)


def test_an_adapter_is_a_models_name(client: Any, served: dict[str, Path]) -> None:
    assert {model.id for model in client.models.list()} >= {"base", "l1"}
    for name in ("base", "l1"):
        assert complete(client, name) == written_by_us(served, name)
    streamed = client.completions.create(
        model="l1", prompt=PROMPT, max_tokens=12, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == written_by_us(served, "l1")
    half = complete(client, "l1", extra_body={"vllm_xargs": {"reft_scale": 0.5}})
    assert half == written_by_us(served, "l1", 0.5)


def test_a_playground_asks_it(server: Any, served: dict[str, Path]) -> None:
    answerer = Server(server[1])
    assert {"base", "l1"} <= set(answerer.names)
    assert "l1" in answerer.scaled
    assert "base" not in answerer.scaled
    decoding = Decoding(template="plain", max_new_tokens=12)
    question = AnswerRequest(PROMPT, ["base", "l1"], {"l1": 0.5}, decoding)
    *_, answers = answerer.answers(question)
    assert answers["base"].text == written_by_us(served, "base")
    assert answers["l1"].text == written_by_us(served, "l1", 0.5)
    with pytest.raises(ValueError, match="nobody: "):
        list(answerer.answers(replace(question, names=["nobody"])))


def test_adapters_come_under_traffic_and_mistakes_are_the_clients(
    client: Any, served: dict[str, Path]
) -> None:
    with ThreadPoolExecutor(8) as pool:
        names = ["base", "l1"] * 16
        running = [pool.submit(complete, client, name) for name in names]
        load(client, "all", served["all"])
        for mistake, (_, message) in ALL_MISTAKES.items():
            with pytest.raises(openai.BadRequestError, match=message):
                load(client, "wrong", served[mistake])
        with pytest.raises(openai.BadRequestError, match=r"no reft_config\.json in it"):
            load(client, "wrong", served["base"])
        digest = AdapterFiles.read(served["mlp"]).identity()
        forged = served["mlp"].with_name(f"mlp#sha256:{digest}")
        with pytest.raises(openai.BadRequestError, match=r"no reft_config\.json in it"):
            load(client, "wrong", forged)
        with pytest.raises(openai.BadRequestError, match="edits 'mlp_output', but vLLM serves"):
            load(client, "wrong", served["mlp"])
        with pytest.raises(openai.NotFoundError, match="wrong"):
            complete(client, "wrong")
        with pytest.raises(openai.BadRequestError, match="expected a finite number"):
            complete(client, "l1", extra_body={"vllm_xargs": {"reft_scale": "much"}})
        answers = [one.result() for one in running]
    ours = {name: written_by_us(served, name) for name in ("base", "l1", "all")}
    assert answers == [ours[name] for name in names]
    assert complete(client, "all") == ours["all"]
    assert len(set(ours.values())) == 3


def test_clients_that_leave_do_no_harm(client: Any, served: dict[str, Path]) -> None:
    load(client, "all", served["all"])
    ours = {name: written_by_us(served, name) for name in ("base", "l1", "all")}

    def leave_or_read(number: int) -> bool:
        name = ("base", "l1", "all")[number % 3]
        if number % 4:
            return complete(client, name) == ours[name]
        stream = client.completions.create(
            model=name, prompt=PROMPT, max_tokens=60, temperature=0, stream=True
        )
        next(iter(stream))
        stream.close()
        return True

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(leave_or_read, range(96)))


HOSTILE = {
    "a folder above": ("../../../../etc", r"no reft_config\.json in it"),
    "a system's folder": ("/etc", r"no reft_config\.json in it"),
    "a file": ("/etc/passwd", r"no reft_config\.json in it"),
    "an address": ("file:///etc", r"no reft_config\.json in it"),
    "a hub's name": ("someone/adapter", r"no reft_config\.json in it"),
    "a null character": ("adapter\0", "expected a path"),
    "a long path": ("a" * 5000, "name too long|no reft_config"),
}


def test_hostile_paths_and_names_are_refused(client: Any, served: dict[str, Path]) -> None:
    for path, message in HOSTILE.values():
        with pytest.raises(openai.BadRequestError, match=message):
            load(client, "hostile", Path(path) if "\0" not in path else path)
    for name in [*(f"name{number}" for number in range(200)), "n" * 10_000, "../l1"]:
        with pytest.raises(openai.NotFoundError):
            complete(client, name)
    for forged in ("x", -1, [1], 2**70):
        body = {"vllm_xargs": {"reft_settled_tokens": forged}}
        try:
            assert complete(client, "l1", extra_body=body) == written_by_us(served, "l1")
        except openai.BadRequestError:  # vLLM has bounds for numbers
            assert forged == 2**70
    assert complete(client, "base") == written_by_us(served, "base")


@pytest.mark.slow
def test_10_000_names_do_no_harm(client: Any, served: dict[str, Path]) -> None:
    def refused(number: int) -> bool:
        with pytest.raises(openai.NotFoundError):
            complete(client, f"name{number}")
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(refused, range(10_000)))
    assert complete(client, "l1") == written_by_us(served, "l1")


def test_verify_finds_it_equal_to_transformers(
    server: Any, client: Any, served: dict[str, Path]
) -> None:
    load(client, "all", served["all"])
    for name in ("l1", "all"):
        record = rn.verify_server(
            served[name],
            server[1],
            served_name=name,
            model=str(served["base"]),
            requests=40,
            longest=100,
        )
        assert record["served_base"] == "base"
        assert record["offers"] == {
            "token_ids": True,
            "log_probs": True,
            "prompt_log_probs": True,
        }
        assert (record["requests"], record["differences"]) == (40, [])
        assert record["compared_log_probs"] > 300
        assert record["limit"] < record["largest_effect"]
    record = rn.verify_server(
        served["all"], server[1], served_name="l1", model=str(served["base"]), requests=10
    )
    assert record["differing"] > 0


# -- two minutes of it ----------------------------------------------------------------------------


class Traffic:
    """Clients of all kinds, up to a time."""

    def __init__(self, url: str, ours: dict[str, str], seconds: float) -> None:
        self.client = openai.AsyncOpenAI(
            base_url=url, api_key="none", max_retries=0, timeout=PATIENCE
        )
        self.ours, self.end = ours, time.monotonic() + seconds
        self.read = self.left = self.loaded = 0

    def goes_on(self) -> bool:
        return time.monotonic() < self.end

    async def reader_or_leaver(self, number: int) -> None:
        draw = random.Random(number)
        create = self.client.completions.create
        while self.goes_on():
            name = draw.choice(list(self.ours))
            request = {"model": name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
            match draw.choice(["whole", "stream", "leave", "cancel"]):
                case "whole":
                    assert (await create(**request)).choices[0].text == self.ours[name]
                    self.read += 1
                case "stream":
                    chunks = await create(**request, stream=True)
                    assert "".join([one.choices[0].text async for one in chunks]) == self.ours[name]
                    self.read += 1
                case "leave":
                    chunks = await create(**request, stream=True)
                    for _ in range(draw.randint(1, 6)):
                        await anext(aiter(chunks), None)
                    await chunks.close()
                    self.left += 1
                case "cancel":
                    coming = asyncio.ensure_future(create(**request))
                    await asyncio.wait([coming], timeout=draw.random() / 2)
                    coming.cancel()
                    await asyncio.wait([coming])
                    done = coming.cancelled() or coming.result().choices[0].text
                    assert done in (True, self.ours[name])
                    self.left += 1

    async def adapters_that_come_and_go(self, path: Path) -> None:
        """Each of half a megabyte, used once, unloaded, and gone from disk."""
        base = rn.load_tiny_model()[0]
        entry = {"layer": "all", "intervention": "adapter", "low_rank_dimension": 128}
        while self.goes_on():
            torch.manual_seed(self.loaded)
            save(rn.get_reft_model(base, rn.ReftConfig([entry])), path)
            loading = {"lora_name": "passing", "lora_path": str(path)}
            await self.client.post("/load_lora_adapter", body=loading, cast_to=str)
            await self.client.completions.create(model="passing", prompt=PROMPT, max_tokens=4)
            unloading = {"lora_name": "passing"}
            await self.client.post("/unload_lora_adapter", body=unloading, cast_to=str)
            shutil.rmtree(path)
            self.loaded += 1


async def watched(traffic: Traffic, group: int) -> list[int]:
    """Each second, the bytes of memory of the processes of a group."""
    found = []
    while traffic.goes_on():
        processes = [one for one in psutil.process_iter() if os.getpgid(one.pid) == group]
        found.append(sum(one.memory_info().rss for one in processes))
        await asyncio.sleep(1)
    return found


def loaded_in_the_worker(url: str) -> list[int]:
    request = urllib.request.Request(
        url.replace("/v1", "/collective_rpc"),
        json.dumps({"method": "list_loras"}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        (numbers,) = json.load(answer)["results"]
    return numbers


def test_an_adapter_that_is_unloaded_is_forgotten_once_no_request_runs(
    server: Any, client: Any, served: dict[str, Path]
) -> None:
    load(client, "all", served["all"])
    before = loaded_in_the_worker(server[1])
    load(client, "again", served["all"])
    stream = client.completions.create(
        model="all", prompt=PROMPT, max_tokens=100, temperature=0, stream=True, extra_body=ENDLESS
    )
    next(iter(stream))
    for name in ("again", "all"):
        client.post("/unload_lora_adapter", body={"lora_name": name}, cast_to=str)
    # The worker keeps its weights while they are read, which may be over by now.
    *_, last = stream
    assert last.choices[0].finish_reason == "length"
    wait_until(lambda: not set(before) <= set(loaded_in_the_worker(server[1])))
    with pytest.raises(openai.NotFoundError, match="all"):
        complete(client, "all")
    load(client, "all", served["all"])
    assert complete(client, "all") == written_by_us(served, "all")


@pytest.mark.slow
def test_64_clients_for_two_minutes_of_whom_many_leave(
    server: Any, client: Any, served: dict[str, Path], tmp_path: Path
) -> None:
    """While adapters come and go: no client gets another's text, and memory does not grow."""
    process, url = server
    load(client, "all", served["all"])
    ours = {name: written_by_us(served, name) for name in ("base", "l1", "all")}
    traffic = Traffic(url, ours, seconds=120)

    async def all_of_it() -> list[int]:
        memory, *_ = await asyncio.gather(
            watched(traffic, process.pid),
            traffic.adapters_that_come_and_go(tmp_path / "passing"),
            *[traffic.reader_or_leaver(number) for number in range(64)],
        )
        await traffic.client.close()
        return memory

    memory = asyncio.run(all_of_it())
    megabytes = [one / 2**20 for one in memory]
    print(traffic.read, traffic.left, traffic.loaded, [round(one) for one in megabytes[::10]])
    assert process.poll() is None
    assert min(traffic.read, traffic.left) > 200
    assert traffic.loaded > 20
    assert len(loaded_in_the_worker(url)) == 2
    # Without any adapter, the worker's memory grows as much at first: its allocator's.
    third = len(megabytes) // 3
    early, late = (
        statistics.median(megabytes[third : 2 * third]),
        statistics.median(megabytes[-third:]),
    )
    assert late < 1.03 * early
