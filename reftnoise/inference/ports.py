"""Check whether a server can listen, before a model is loaded for it."""

import asyncio


def expect_free(host: str, port: int) -> None:
    """Raise an error where asyncio's servers cannot listen; uvicorn would end the process instead.

    Raises:
        OSError: the port is taken, or the host is not this machine.
        ValueError: the port is no number of a port.
    """
    if not 1 <= port < 2**16:
        raise ValueError(f"port {port}: expected a number from 1 to {2**16 - 1}")

    async def listen() -> None:
        loop = asyncio.get_running_loop()
        (await loop.create_server(asyncio.Protocol, host, port)).close()

    try:
        asyncio.run(listen())
    except OSError as error:
        raise OSError(f"{host}:{port}: {error.strerror}") from None
