"""How a server begins and ends."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from dsv3_jax.infer import Engine
from dsv3_jax.serve import ServeOptions, serve
from dsv3_jax.serve.service import Service
from tests.cli.conftest import ROOT
from tests.data.test_chat_template import TEMPLATE, TOKENIZER
from tests.serve.running import NAME, Served, make_engine, served

LONG: dict[str, Any] = {"model": NAME, "prompt": "Hello", "max_tokens": 200, "ignore_eos": True, "temperature": 0}


@contextlib.contextmanager
def program(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server as a program, once it listens, and its address."""
    command = [sys.executable, "-m", "tests.serve.running", *options]
    child = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    try:
        line = child.stderr.readline()
        assert line.startswith(f"serving {NAME} on http://127.0.0.1:"), line + child.stderr.read()
        yield child, line.split()[-1]
    finally:
        child.kill()
        child.communicate()


@contextlib.contextmanager
def asking(server: Served, **body: Any) -> Iterator[list[httpx2.Response]]:
    """A request under way; its answer lies in the list at the end."""
    answers: list[httpx2.Response] = []
    thread = threading.Thread(target=lambda: answers.append(server.post(**LONG | body)))
    thread.start()
    while not server.metric("dsv3_running"):
        time.sleep(0.01)
    yield answers
    thread.join(60)


def test_a_signal_drains(slow: Engine, offline: Engine) -> None:
    with served(slow) as server:
        with asking(server) as answers:
            server.server.handle_exit(signal.SIGTERM, None)
            assert server.http.get("/health").status_code == 503
            refused = server.post(**LONG)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert "retry-after" in refused.headers
        (answer,) = answers
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 200
        with pytest.raises(httpx2.ConnectError):
            for _ in range(100):
                server.http.get("/health")
                time.sleep(0.1)
    assert server.server.code == 0


def test_a_second_signal_ends_at_once(slow: Engine) -> None:
    started = time.monotonic()
    with served(slow) as server:
        answers: list[Any] = []

        def ask() -> None:
            try:
                answers.append(server.post(**LONG))
            except httpx2.TransportError as error:
                answers.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        while not server.metric("dsv3_running"):
            time.sleep(0.01)
        server.server.handle_exit(signal.SIGTERM, None)
        server.server.handle_exit(signal.SIGTERM, None)
        thread.join(30)
    assert time.monotonic() - started < 3.5
    assert server.server.code == 1
    assert isinstance(answers[0], httpx2.TransportError) or answers[0].status_code >= 500
    server.service.worker.stop()


def test_draining_takes_only_so_long(slow: Engine) -> None:
    started = time.monotonic()
    with served(slow, options=ServeOptions(drain_timeout=0.3)) as server:
        thread = threading.Thread(target=lambda: contextlib.suppress(Exception).__enter__() or server.post(**LONG))
        thread.start()
        while not server.metric("dsv3_running"):
            time.sleep(0.01)
        server.server.handle_exit(signal.SIGTERM, None)
        thread.join(30)
    assert time.monotonic() - started < 3.5
    assert server.server.code == 1
    server.service.worker.stop()
