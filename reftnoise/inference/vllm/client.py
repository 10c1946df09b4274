"""A client of a running vLLM with our plugin."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

_CONCURRENT = 64
"""Requests that are sent at a time; vLLM forms its own batches of them."""


class ServerRefusalError(RuntimeError, ValueError):
    """A server does not do what it was asked for."""


class VllmClient:
    """Completions, and adapters by name, of a server of vLLM.

    Args:
        server: address of the server, with or without `/v1`.
        timeout: greatest number of seconds that an answer may take.
    """

    def __init__(self, server: str, *, timeout: float = 600.0) -> None:
        self.server = server.rstrip("/").removesuffix("/v1")
        try:
            self._client = httpx.Client(base_url=f"{self.server}/v1", timeout=timeout)
        except httpx.InvalidURL as error:
            raise ValueError(f"server {server!r}: {error}") from None

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def base_name(self) -> str:
        """The name of the bare base."""
        name: str = self._send("GET", "models").json()["data"][0]["id"]
        return name

    def complete(self, bodies: Sequence[dict[str, Any]]) -> list[Any]:
        """The answers to requests for completions, which are sent at once.

        Raises:
            ConnectionError: there is no such server, or it was too slow.
            ServerRefusalError: the server refuses a request.
        """
        with ThreadPoolExecutor(max(1, min(_CONCURRENT, len(bodies)))) as pool:
            send = pool.map(lambda body: self._send("POST", "completions", body), bodies)
            return [response.json() for response in send]

    def load(self, name: str, directory: Path) -> None:
        """Let the server have an adapter, in place of one of the same name; errors as above.

        Args:
            name: name of the model that clients choose.
            directory: the adapter, which the server can read.
        """
        body = {"lora_name": name, "lora_path": str(directory), "load_inplace": True}
        self._send("POST", "load_lora_adapter", body)

    def unload(self, name: str) -> None:
        """Take an adapter out of the server; errors as above."""
        self._send("POST", "unload_lora_adapter", {"lora_name": name})

    def _send(self, method: str, path: str, body: Any = None) -> httpx.Response:
        try:
            response = self._client.request(method, path, json=body)
        except httpx.TransportError as error:
            raise ConnectionError(f"{self.server}: no answer ({error})") from None
        if response.is_error:
            hint = ""
            if response.status_code == 404 and path.endswith("adapter"):
                hint = "; was it started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1?"
            raise ServerRefusalError(f"{self.server}: {path}: {response.text}{hint}")
        return response
