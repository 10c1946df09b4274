"""Ports, against the sockets of this machine."""

import socket

import pytest

from reftnoise.cli.checks import expect_free


@pytest.mark.parametrize("port", [-1, 0, 2**16])
def test_what_is_no_port(port: int) -> None:
    with pytest.raises(ValueError, match=f"port {port}: expected a number from 1 to 65535"):
        expect_free("127.0.0.1", port)


def test_where_nothing_can_listen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"127\.0\.0\.1:{port}: .*address already in use"):
            expect_free("127.0.0.1", port)
    expect_free("127.0.0.1", port)
    with pytest.raises(OSError, match=r"192\.0\.2\.1:"):
        expect_free("192.0.2.1", port)
