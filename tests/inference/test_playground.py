"""The playground in a real browser, against our own `generate`."""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import reftnoise as rn
from reftnoise.analysis.inspection import edit_norms
from reftnoise.config.decoding import Decoding
from reftnoise.inference.loading import BASE
from reftnoise.inference.playground.asking import (
    NO_NOISE,
    TOGETHER,
    AnswerRequest,
)
from reftnoise.inference.playground.local import LocalModel
from support.adapters import moved
from support.tolerance import assert_close
from support.waiting import PATIENCE, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_a_browser = pytest.mark.skipif(
    CHROMIUM is None or None in map(find_spec, ("gradio", "openai", "playwright")),
    reason="needs Chromium, playwright, and reftnoise[web]",
)
PROMPT = "Where does a bear live?"
TOKENS = 12
PLACES = {"polite": ("l1", "all"), "emoji": ("all+decode", "0-2")}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, (positions, layer)) in enumerate(PLACES.items()):
        torch.manual_seed(seed)
        entry = {"layer": layer, "intervention": "loreft", "low_rank_dimension": 2}
        config = rn.ReftConfig([entry | {"positions": positions}])
        reft_model = rn.get_reft_model(rn.load_tiny_model()[0], config)
        moved(reft_model).save_pretrained(folder / name)
    return {name: folder / name for name in PLACES}


@pytest.fixture
def library(adapters: dict[str, Path]) -> tuple[rn.ReftModel, Any]:
    model, tokenizer = rn.load_tiny_model()
    reft_model = rn.get_reft_model(model)
    for name, path in adapters.items():
        reft_model.load_adapter(path, name)
    return reft_model.eval(), tokenizer


@pytest.fixture
def local(library: tuple[rn.ReftModel, Any]) -> LocalModel:
    return LocalModel(*library, title="tiny-chat")


def written(library: tuple[rn.ReftModel, Any], choice: Any, count: int = TOKENS) -> str:
    """What `generate` writes after the prompt as it is."""
    reft_model, tokenizer = library
    ids = tokenizer(PROMPT, return_tensors="pt")
    tokens = reft_model.generate(
        **ids, adapter_names=[choice], max_new_tokens=count, do_sample=False
    )
    return tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def request(**settings: Any) -> AnswerRequest:
    decoding = Decoding(template="plain", max_new_tokens=TOKENS)
    return AnswerRequest(
        **{"prompt": PROMPT, "names": [BASE, *PLACES], "decoding": decoding} | settings
    )


def last(local: LocalModel, **settings: Any) -> dict[str, str]:
    *_, answers = local.answers(request(**settings))
    return {name: answer.text for name, answer in answers.items()}


# -- a model here --------------------------------------------------------------------------------


def test_rows_are_what_generate_writes(local: LocalModel, library: Any) -> None:
    assert local.names == [BASE, "polite", "emoji", TOGETHER]
    assert (local.layers, local.positions) == ([0, 1, 2, 3], ["last", "all", "decode"])
    texts = last(local, names=local.names, scales={"emoji": 0.5})
    choices = [None, "polite", {"emoji": 0.5}, {"polite": 1.0, "emoji": 0.5}]
    assert list(texts.values()) == [written(library, choice) for choice in choices]
    assert len(set(texts.values())) == 4


@pytest.mark.parametrize("noise", [NO_NOISE, "neftune"])
def test_each_adapter_answers_in_its_own_template(library: Any, noise: str) -> None:
    """As if it were asked alone, also with noise; the longest prompt is another's."""
    templates = {"polite": "Please: {prompt} Thank you very much.", "emoji": "plain"}
    local = LocalModel(*library, "tiny-chat", templates)
    own = {BASE: "chat", **templates, TOGETHER: "chat"}
    assert local.templates == own
    settings = {"noise": noise, "alpha": 0.0, "decoding": Decoding(max_new_tokens=TOKENS)}
    *_, together = local.answers(request(names=local.names, **settings))
    for name, template in own.items():
        decoding = Decoding(template=template, max_new_tokens=TOKENS)
        *_, alone = local.answers(request(names=[name], **settings | {"decoding": decoding}))
        assert together[name].text == alone[name].text
        assert together[name].prompt_length == alone[name].prompt_length
        if name != BASE:
            assert together[name].norms.tokens == alone[name].norms.tokens
            assert_close(together[name].norms.norms, alone[name].norms.norms)
    same = LocalModel(*library, "tiny-chat", dict.fromkeys(PLACES, "plain"))
    assert set(same.templates.values()) == {"plain"}


def test_noise_does_not_reach_the_padding(library: Any) -> None:
    """The draw of a prompt does not depend on the other rows."""
    local = LocalModel(*library, "tiny-chat", {"polite": "plain", "emoji": "a {prompt} b"})
    noisy = {"noise": "neftune", "alpha": 400.0, "decoding": Decoding(max_new_tokens=TOKENS)}
    zero = {"scales": dict.fromkeys(PLACES, 0.0)}
    *_, answers = local.answers(request(names=["polite", "emoji"], **noisy, **zero))
    *_, alone = local.answers(request(names=["polite"], **noisy, **zero))
    assert answers["polite"].text == alone["polite"].text


def test_answers_grow(local: LocalModel) -> None:
    texts = [answers["emoji"].text for answers in local.answers(request())]
    assert len(texts) > 1
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))


@pytest.mark.parametrize(
    ("part", "kept"),
    [
        ({"layers": []}, {}),
        ({"layers": [0, 3]}, {"polite": ("l1", [0, 3]), "emoji": ("all+decode", [0])}),
        ({"positions": ["all"]}, {"emoji": ("all", [0, 1, 2])}),
        ({"positions": ["last"], "layers": [1]}, {"polite": ("l1", [1])}),
    ],
)
def test_layers_and_positions_are_turned_off(
    local: LocalModel, library: Any, adapters: dict[str, Path], part: Any, kept: Any
) -> None:
    """Against adapters that have only these units."""
    expected = {name: written(library, None) for name in [BASE, *PLACES]}
    for name, (positions, layers) in kept.items():
        whole = rn.ReftModel.from_pretrained(rn.load_tiny_model()[0], adapters[name])
        entry = {"intervention": "loreft", "low_rank_dimension": 2, "positions": positions}
        config = rn.ReftConfig([entry | {"layer": layer} for layer in layers])
        less = rn.get_reft_model(rn.load_tiny_model()[0], config).eval()
        units = {str(one.site): one.unit for one in whole.engine.units}
        for one in less.engine.units:
            one.unit.load_state_dict(units[str(one.site)].state_dict())
        expected[name] = written((less, library[1]), "default")
    assert last(local, **part) == expected


def test_noise_is_one_draw_for_all_answers(local: LocalModel, library: Any) -> None:
    assert last(local, noise="symnoise", alpha=0.0) == last(local, noise=NO_NOISE)
    assert {"neftune", "symnoise", "gaussian", "bernoulli"} <= set(local.noises)
    for noise in local.noises:
        noisy = last(local, noise=noise, alpha=400.0)
        assert noisy == last(local, noise=noise, alpha=400.0)
        assert noisy[BASE] != written(library, None)
        assert last(local, noise=noise, alpha=400.0, scales={"emoji": 0.0})["emoji"] == noisy[BASE]


def test_norms_are_those_of_the_prompt_and_of_the_answer(
    local: LocalModel, library: Any, adapters: dict[str, Path]
) -> None:
    *_, answers = local.answers(request())
    assert answers[BASE].norms is None
    for name in PLACES:
        norms, prompt_length = answers[name].norms, answers[name].prompt_length
        whole = rn.ReftModel.from_pretrained(rn.load_tiny_model()[0], adapters[name])
        text = PROMPT + answers[name].text if name == "emoji" else PROMPT
        expected = edit_norms(whole, library[1], text)
        width = min(len(expected.tokens), len(norms.tokens))
        assert prompt_length <= width
        assert norms.sites == expected.sites
        assert_close(norms.norms[:, :width], expected.norms[:, :width])
        is_after = torch.arange(len(norms.tokens)) >= prompt_length
        assert norms.norms[:, is_after].any() == (name == "emoji")


def test_closing_the_answers_stops_the_model(local: LocalModel) -> None:
    before = threading.active_count()
    answers = local.answers(request(decoding=Decoding(template="plain", max_new_tokens=200)))
    next(answers)
    answers.close()
    assert threading.active_count() == before
    assert last(local)[BASE]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"names": []}, "no model is chosen"),
        ({"decoding": Decoding(template="plain", max_new_tokens=10_000)}, "has room for 0"),
        ({"decoding": Decoding(template="{nothing}")}, "expected plain, chat, alpaca"),
        ({"noise": "neftun"}, "neftune"),
        ({"positions": ["prompt"]}, "positions 'prompt'"),
        ({"layers": [1, 99]}, r"layers \[99\]: the model has layers 0 to 3"),
    ],
)
def test_mistakes_are_errors(local: LocalModel, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        last(local, **settings)


# -- the page ------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def chosen(adapters: dict[str, Path]) -> list[str]:
    """Arguments that name the adapters."""
    polite, emoji = adapters["polite"], adapters["emoji"]
    return [str(polite), "--others.emoji", str(emoji), "--model", "tiny-chat"]


@contextmanager
def command(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command that runs until it is interrupted."""
    environment = {**os.environ, "PYTHONPATH": str(Path(rn.__file__).parents[1])}
    line = [sys.executable, "-m", "reftnoise", *arguments]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
    assert process.returncode == 130


@contextmanager
def browsed(address: str, asked: list[str] | None = None) -> Iterator[Any]:
    """A page in Chromium; the addresses that it requests are added to a list."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(1000 * PATIENCE)
        urls = [] if asked is None else asked
        page.on("request", lambda request: urls.append(request.url))
        page.goto(address)
        page.wait_for_selector("#prompt textarea")
        page.wait_for_selector("#names label")  # drawn last: no model can be asked before
        yield page
        browser.close()


@contextmanager
def opened(*arguments: str) -> Iterator[Any]:
    """A page in Chromium, which requests nothing from other servers than the page's."""
    port = ("--host", "127.0.0.1", "--port", str(free_port()))
    asked: list[str] = []
    with command("playground", *arguments, *port) as process:
        line = process.stdout.readline()
        assert line.startswith("The page is at http://127.0.0.1"), line
        address = line.split()[4].rstrip(";")
        with browsed(address, asked) as page:
            yield page
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status == 200
    except OSError:
        return False


def ask(page: Any) -> None:
    page.fill("#prompt textarea", PROMPT)
    page.press("#prompt textarea", "Enter")


def texts(page: Any, count: int = 4) -> list[str]:
    """The answers that are on the page."""
    boxes = [page.locator(f"#answer-{n} textarea") for n in range(count)]
    return [box.input_value() for box in boxes if box.count()]


def fill(page: Any, box: str, value: str) -> None:
    page.fill(f"{box} input[type=number]", value)
    page.press(f"{box} input[type=number]", "Tab")


@needs_a_browser
def test_a_page_shows_answers_norms_and_mistakes(adapters: dict[str, Path], library: Any) -> None:
    choices = [None, "polite", "emoji", ["polite", "emoji"]]
    answers = [written(library, choice) for choice in choices]
    half = written(library, {"emoji": 0.5})
    with opened(*chosen(adapters)) as page:
        page.click("text=Template and sampling")
        fill(page, "#new-tokens", str(TOKENS))
        page.fill("#template input", "plain")
        page.press("#template input", "Enter")
        ask(page)
        wait_until(lambda: texts(page) == answers)
        wait_until(lambda: page.locator("#norms-2 tbody tr").count() == 3)
        wait_until(lambda: page.locator("#norms-2 td.new[title]").count() > 0)
        wait_until(lambda: page.locator("#norms-0").inner_text().strip() == "No edits.")
        fill(page, "#scale-2", "0.5")
        ask(page)
        wait_until(lambda: texts(page)[2] == half)
        for box in page.locator("#layers input").all():
            box.uncheck()
        page.locator("#names input").last.uncheck()
        page.click("#ask")
        wait_until(lambda: texts(page) == answers[:1] * 3)
        page.fill("#prompt textarea", " ")
        page.click("#ask")
        page.wait_for_selector("text=the prompt is empty")


@needs_a_browser
def test_stop_ends_an_answer_that_has_no_end() -> None:
    """The server writes until the test is over."""
    with (
        answering([WRITTEN], threading.Event(), is_endless=True) as server,
        opened(server.title) as page,
    ):
        page.click("text=Template and sampling")
        page.fill("#template input", "plain")
        page.press("#template input", "Enter")
        ask(page)
        wait_until(lambda: len(texts(page, 1)[0]) > len("Hello"))
        page.click("#stop")
        wait_until(lambda: has_stopped(page, 0))


def has_stopped(page: Any, number: int) -> str | None:
    """An answer, if it is the same a second later."""
    before = texts(page)[number]
    time.sleep(1)
    return before if texts(page)[number] == before else None


@needs_a_browser
def test_a_page_asks_a_server(adapters: dict[str, Path], library: Any) -> None:
    """Of transformers, with our adapters as models."""
    pytest.importorskip("fastapi", reason="needs fastapi: pip install 'reftnoise[serve]'")
    address = f"http://127.0.0.1:{(port := free_port())}/v1"
    with command("serve", *chosen(adapters), "--host", "127.0.0.1", "--port", str(port)):
        wait_until(lambda: is_up(f"{address}/models"))
        with opened(address) as page:
            labels = page.locator("#names label")
            wait_until(lambda: sorted(labels.all_inner_texts()) == [BASE, "emoji", "polite"])
            names = labels.all_inner_texts()
            page.click("text=Template and sampling")
            fill(page, "#new-tokens", str(TOKENS))
            page.fill("#template input", "plain")
            page.press("#template input", "Enter")
            ask(page)
            expected = [written(library, None if name == BASE else name) for name in names]
            wait_until(lambda: texts(page, 3) == expected)
            assert page.locator("#layers").count() == page.locator("#noise").count() == 0
            page.fill("#template input", "<i>nothing</i>")
            page.press("#template input", "Enter")
            page.click("#ask")
            page.wait_for_selector("text=template '<i>nothing</i>': expected plain, chat, alpaca")


@contextmanager
def answering(
    parts: list[bytes], is_over: threading.Event, is_endless: bool = False
) -> Iterator[Any]:
    """A `Server` whose model `m` writes parts once, or again and again until it is over."""
    pytest.importorskip("openai", reason="needs openai: pip install 'reftnoise[web]'")
    from reftnoise.inference.playground.server import Server

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def reply(self, kind: str, lines: list[bytes]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(b"".join(lines))

        def do_GET(self) -> None:
            self.reply("application/json", [b'{"object": "list", "data": [{"id": "m"}]}'])

        def do_POST(self) -> None:
            lines = [b"data: " + part + b"\n\n" for part in parts]
            self.reply("text/event-stream", lines)
            with suppress(OSError):  # the reader has left
                while not is_over.wait(0.05 if is_endless else PATIENCE):
                    self.wfile.write(b"".join(lines * is_endless))

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield Server(f"http://127.0.0.1:{server.server_port}/v1")
        finally:
            is_over.set()
            server.shutdown()


WRITTEN = b'{"choices": [{"index": 0, "text": "Hello"}]}'


@pytest.mark.parametrize(
    ("parts", "template", "message"),
    [([WRITTEN, b"{no json"], "plain", "^m: "), ([], "{prompt} {lost}", "template: no column")],
)
def test_an_answer_that_breaks_off_is_an_error(parts: Any, template: str, message: str) -> None:
    with answering(parts, threading.Event()) as server:
        decoding = Decoding(template=template, max_new_tokens=TOKENS)
        with pytest.raises(ValueError, match=message):
            list(server.answers(request(names=["m"], decoding=decoding)))


def test_a_reader_of_a_silent_server_can_stop() -> None:
    with answering([WRITTEN], threading.Event()) as server:
        answers = server.answers(request(names=["m"]))
        while next(answers)["m"].text != "Hello":
            pass
        assert [next(answers)["m"].text for _ in range(3)] == ["Hello"] * 3
        answers.close()


def test_a_server_that_is_not_there() -> None:
    pytest.importorskip("openai", reason="needs openai: pip install 'reftnoise[web]'")
    from reftnoise.inference.playground.server import Server

    with pytest.raises(ConnectionError, match="no server of the OpenAI API there"):
        Server(f"http://127.0.0.1:{free_port()}/v1")
