"""Clients that connect, and send no request."""

from __future__ import annotations

import contextlib
import socket
import time

import pytest

from dsv3_jax.infer import Engine
from dsv3_jax.serve import ServeOptions
from dsv3_jax.serve.app import most_connections
from tests.serve.running import RunningServer, served

HEAD = b"GET /health HTTP/1.1\r\nhost: x\r\n"


def connected(server: RunningServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10)


def assert_served(connection: socket.socket) -> None:
    """Its next request is answered."""
    connection.sendall(HEAD + b"\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        part = connection.recv(1000)
        assert part, answer
        answer += part
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("sent", [b"", HEAD])
def test_a_head_that_does_not_come_closes_the_connection(engine: Engine, sent: bytes) -> None:
    """However it trickles in."""
    with served(engine, options=ServeOptions(read_timeout=0.6)) as server, connected(server) as connection:
        started = time.monotonic()
        connection.sendall(sent)
        time.sleep(0.3)
        connection.sendall(sent and b"x: y\r\n")
        assert connection.recv(1) == b""
        assert 0.5 < time.monotonic() - started < 5


def test_a_client_may_take_as_long_for_the_next_request(engine: Engine) -> None:
    with served(engine, options=ServeOptions(read_timeout=0.6)) as server, connected(server) as connection:
        for _ in range(3):
            time.sleep(0.4)
            assert_served(connection)


def test_connections_beyond_the_most_are_closed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3_jax.serve.app.most_connections", lambda: 3)
    with served(engine) as server, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(server)) for _ in range(3)]
        for connection in connections:
            assert_served(connection)
        with connected(server) as refused, contextlib.suppress(ConnectionError):
            assert refused.recv(1) == b""
        connections[0].close()
        time.sleep(0.2)
        with connected(server) as welcome:
            assert_served(welcome)


def test_the_most_is_what_descriptors_are_left() -> None:
    before = most_connections()
    assert before > 1
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(socket.socket())
        assert most_connections() == before - 5
