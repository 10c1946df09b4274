"""Mistakes that are reported before torch is imported, which takes seconds."""

from collections.abc import Mapping

from .._util.files import local_path
from ..config.base_model import expect_base
from ..config.decoding import Decoding
from ..data.templates import check_template
from ..training.run_adapter import adapter_directory


def expect_adapters(
    adapter: str,
    others: Mapping[str, str] | None = None,
    model: str | None = None,
    dtype: str | None = None,
) -> None:
    """Raise an error where there is no such adapter, base or dtype."""
    for path in (adapter, *(others or {}).values()):
        adapter_directory(path)
    expect_base(model or "", dtype)


def expect_template(decoding: Decoding) -> None:
    """Raise a ValueError where there is no such template."""
    if decoding.template is not None:
        check_template(decoding.template)
        decoding.template_or("chat")


def expect_prompts(prompt: str | None, input_: str | None, output: str | None) -> None:
    """Raise an error where there is no prompt, no such file, or no place for the answers."""
    if prompt is None and input_ is None:
        raise ValueError("no prompts: expected a prompt, or an input file")
    if input_ is not None and not local_path(input_, "input").is_file():
        raise FileNotFoundError(f"{input_}: no such file")
    if output is not None and not local_path(output, "output").absolute().parent.is_dir():
        raise FileNotFoundError(f"output {output}: no such directory")


def expect_free(host: str, port: int) -> None:
    """Raise an error where asyncio's servers cannot listen; uvicorn would end the process instead.

    Raises:
        OSError: the port is taken, or the host is not this machine.
        ValueError: the port is no number of a port.
    """
    if not 1 <= port < 2**16:
        raise ValueError(f"port {port}: expected a number from 1 to {2**16 - 1}")

    import asyncio  # which other commands need not wait for

    async def listen() -> None:
        loop = asyncio.get_running_loop()
        (await loop.create_server(asyncio.Protocol, host, port)).close()

    try:
        asyncio.run(listen())
    except OSError as error:
        raise OSError(f"{host}:{port}: {error.strerror}") from None
