"""Requests to servers that refuse them, say something else, or fall silent."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from reftnoise.inference.api import Api, ServerRefusalError, api_address
from reftnoise.inference.vllm.client import VllmClient


class Handler(BaseHTTPRequestHandler):
    """Answers by the path alone."""

    def do_GET(self) -> None:  # the library's name
        match self.path.rpartition("/")[2]:
            case "key":
                self.send(200, json.dumps(self.headers["Authorization"]))
            case "text":
                self.send(200, "Hello")
            case "cut":
                self.send(200, "[1", length=9)
            case _:
                self.send(404, "not\nhere")

    def do_POST(self) -> None:  # the library's name
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path == "/v1/echo":
            self.send(200, body)
        else:
            self.send(404, "not here")

    def send(self, status: int, text: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_requests_and_their_errors(address: str) -> None:
    api = Api(address, api_key="secret")
    assert api.ask("key") == "Bearer secret"
    assert api.ask("echo", {"n": 1}) == {"n": 1}
    with pytest.raises(ServerRefusalError, match=r"/v1/lost: 404 Not Found: not here$") as raised:
        api.ask("lost")
    assert raised.value.status == 404
    with pytest.raises(ConnectionError, match="/v1/text: no JSON"):
        api.ask("text")
    with pytest.raises(ConnectionError, match="/v1/cut: no answer"):
        api.ask("cut")
    with pytest.raises(ServerRefusalError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        VllmClient(address).load("name", Path("adapter"))
    VllmClient(address).unload("name")  # of a server that was started again


@pytest.mark.parametrize("given", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_an_address_has_a_version(given: str) -> None:
    assert api_address(given) == "http://h:1/v1"
    assert VllmClient(given).address == "http://h:1/v1"


@pytest.mark.parametrize("given", ["h:1", "localhost", "ftp://h", "http://", ""])
def test_other_addresses_are_mistakes(given: str) -> None:
    with pytest.raises(ValueError, match=r"expected an address such as http://localhost:8000/v1"):
        VllmClient(given)
