"""A client of a running vLLM with our plugin."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..api import Api, ServerRefusalError

_CONCURRENT = 64
"""Requests that are sent at a time; vLLM forms its own batches of them."""
_NOT_FOUND = 404


class VllmClient:
    """Completions, and adapters by name, of a server of vLLM.

    Args:
        server: address of the server, with or without `/v1`.
        api_key: key that the server asks for.
        timeout: greatest number of seconds that an answer may take.

    Raises:
        ValueError: the address is none of http.
    """

    def __init__(self, server: str, *, api_key: str | None = None, timeout: float = 600.0) -> None:
        self._api = Api(server, api_key=api_key, timeout=timeout)

    @property
    def address(self) -> str:
        """The address of its API."""
        return self._api.address

    def base_name(self) -> str:
        """The name of the bare base."""
        name: str = self._api.ask("models")["data"][0]["id"]
        return name

    def complete(self, bodies: Sequence[dict[str, Any]]) -> list[Any]:
        """The answers to requests for completions, which are sent at once.

        Raises:
            ConnectionError: there is no such server, or it was too slow.
            ServerRefusalError: the server refuses a request.
        """
        with ThreadPoolExecutor(max(1, min(_CONCURRENT, len(bodies)))) as pool:
            return list(pool.map(lambda body: self._api.ask("completions", body), bodies))

    def load(self, name: str, directory: Path) -> None:
        """Let the server have an adapter, in place of one of the same name; errors as above.

        Args:
            name: name of the model that clients choose.
            directory: the adapter, which the server can read.
        """
        body = {"lora_name": name, "lora_path": str(directory), "load_inplace": True}
        try:
            self._api.send("load_lora_adapter", body)
        except ServerRefusalError as error:
            if error.status != _NOT_FOUND:
                raise
            hint = "was it started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1?"
            raise ServerRefusalError(f"{error}; {hint}", error.status) from None

    def unload(self, name: str) -> None:
        """Take an adapter out of the server, if it is there; errors as above."""
        try:
            self._api.send("unload_lora_adapter", {"lora_name": name})
        except ServerRefusalError as error:
            if error.status != _NOT_FOUND:  # a server that was started again has lost it already
                raise
