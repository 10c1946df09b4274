"""Requests to a server of the OpenAI API, in JSON; without torch, and with the standard library."""

import http.client
import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from .._util.errors import one_line


class ServerRefusalError(ValueError):
    """A server has refused a request.

    Args:
        message: what was asked, and what the server says.
        status: status of HTTP.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Api:
    """A server of the OpenAI API.

    Args:
        server: address of the API, with or without `/v1`.
        api_key: key that the server asks for.
        timeout: greatest number of seconds that an answer may take.

    Raises:
        ValueError: the address is none of http.
    """

    def __init__(self, server: str, *, api_key: str | None = None, timeout: float = 600.0) -> None:
        self.address = api_address(server)
        self._timeout = timeout
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def ask(self, path: str, body: Any = None) -> Any:
        """The answer to a request, which is posted if it has a body.

        Raises:
            ConnectionError: there is no such server, it was too slow, or its answer is no JSON.
            ServerRefusalError: the server refuses the request.
        """
        try:
            return json.loads(self.send(path, body))
        except json.JSONDecodeError as error:
            raise ConnectionError(f"server {self.address}/{path}: no JSON ({error})") from None

    def send(self, path: str, body: Any = None) -> bytes:
        """The same, of an answer that may be no JSON."""
        place = f"{self.address}/{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(place, data, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            said = one_line(error.read(2000).decode(errors="replace"))
            message = f"server {place}: {error.code} {error.reason}: {said}"
            raise ServerRefusalError(message, error.code) from None
        except urllib.error.URLError as error:
            raise ConnectionError(f"server {place}: no answer ({error.reason})") from None
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(f"server {place}: no answer ({one_line(error)})") from None


def api_address(server: str) -> str:
    """The address of an API, with `/v1` where it has no path, and without a slash at its end.

    Raises:
        ValueError: it is no address of http.
    """
    parts = urlsplit(server)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"server {server!r}: expected an address such as http://localhost:8000/v1")
    plain = server.rstrip("/")
    return plain if parts.path.strip("/") else f"{plain}/v1"
