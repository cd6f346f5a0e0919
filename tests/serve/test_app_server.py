"""How a server begins and ends."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from starlette.responses import Response

from dsv3_jax.infer import Engine
from dsv3_jax.serve import ServeOptions, serve
from dsv3_jax.serve.worker import Service
from tests.data.test_chat_template import TEMPLATE
from tests.serve.running import MODEL, NAME, RunningServer, served, variables

LONG: dict[str, Any] = {"prompt": "Hello", "max_tokens": 200, "ignore_eos": True, "temperature": 0}
Answer = httpx2.Response | httpx2.TransportError


@contextlib.contextmanager
def asking(server: RunningServer) -> Iterator[list[Answer]]:
    """A long request under way; when it has ended, its answer lies in the list."""
    answers: list[Answer] = []

    def ask() -> None:
        try:
            answers.append(server.post(**LONG))
        except httpx2.TransportError as error:
            answers.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not server.metric("dsv3_running"):
        time.sleep(0.01)
    yield answers
    thread.join(60)


def assert_cut_off(answer: Answer) -> None:
    """And told so, in OpenAI's words."""
    assert isinstance(answer, httpx2.Response)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")


def test_a_signal_drains(slow: Engine) -> None:
    with served(slow) as server:
        with asking(server) as answers:
            server.server.handle_exit(signal.SIGTERM, None)
            assert server.http.get("/health").status_code == 503
            refused = server.post(**LONG)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert "retry-after" in refused.headers
        (answer,) = answers
        assert isinstance(answer, httpx2.Response)
        assert answer.json()["usage"]["completion_tokens"] == 200
        server.thread.join(5)
        assert not server.thread.is_alive()
    assert server.server.code == 0


def test_a_second_signal_ends_at_once(slow: Engine) -> None:
    with served(slow) as server:
        with asking(server) as answers:
            started = time.monotonic()
            server.server.handle_exit(signal.SIGTERM, None)
            server.server.handle_exit(signal.SIGTERM, None)
        assert time.monotonic() - started < 2
    assert server.server.code == 1
    assert_cut_off(answers[0])
    assert server.service.worker.stop(5)


def test_a_stream_that_is_cut_off_says_so(slow: Engine) -> None:
    with served(slow) as server:
        with server.http.stream("POST", "/v1/completions", json={"model": NAME, "stream": True, **LONG}) as answer:
            lines = answer.iter_lines()
            next(lines)
            for _ in range(2):
                server.server.handle_exit(signal.SIGTERM, None)
            *_, error, done = (line for line in lines if line)
        server.thread.join(5)
        assert not server.thread.is_alive()
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "draining"
    assert done == "data: [DONE]"
    assert server.server.code == 1


def test_draining_takes_only_so_long(slow: Engine) -> None:
    with served(slow, options=ServeOptions(drain_timeout=0.3)) as server:
        with asking(server) as answers:
            started = time.monotonic()
            server.server.handle_exit(signal.SIGTERM, None)
        assert 0.3 < time.monotonic() - started < 2.5
    assert server.server.code == 1
    assert_cut_off(answers[0])
    assert server.service.worker.stop(5)


def test_a_step_that_nobody_waits_for_does_not_hold_up_the_end(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when it compiles: its client has gone, so that nothing is left to drain."""
    step, held, begun = engine.step, threading.Event(), threading.Event()

    def wait() -> Any:
        begun.set()
        held.wait(30)
        return step()

    with served(engine) as server:
        monkeypatch.setattr(engine, "step", wait)
        try:
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.post(f"{server.url}/v1/completions", json={"model": NAME, **LONG}, timeout=0.5)
            assert begun.wait(5)
            while server.service.open_requests:
                time.sleep(0.01)
            server.server.handle_exit(signal.SIGTERM, None)
            server.thread.join(5)
            assert not server.thread.is_alive()
            assert not server.service.worker.stop(0)
        finally:
            held.set()
    assert server.server.code == 0


def test_an_answer_is_under_way_until_it_is_sent(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client may read slowly; a drain does not end before it has all of it. Its place in the queue is free by then."""
    send, seen = Response.__call__, []

    async def noted(response: Response, *arguments: Any) -> None:
        seen.append((server.service.open_requests, server.service.open_choices))
        await send(response, *arguments)

    with served(engine) as server:
        monkeypatch.setattr(Response, "__call__", noted)
        assert server.post(prompt="Hello", max_tokens=1).status_code == 200
    assert seen == [(1, 0)]


def test_an_engine_that_fails_ends_the_server(slow: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(slow) as server:
        with asking(server) as answers:
            with monkeypatch.context() as patch:
                patch.setattr(slow, "step", lambda: 1 / 0)
                server.thread.join(5)
                assert not server.thread.is_alive()
        for request in list(slow._requests.values()):
            slow.cancel(request)
    assert server.server.code == 1
    (answer,) = answers
    assert isinstance(answer, httpx2.Response)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_failed")


@pytest.mark.parametrize("warm_up", [False, True])
def test_programs_are_compiled_before_the_server_listens(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, warm_up: bool
) -> None:
    warmed = []
    monkeypatch.setattr(engine, "warm_up", lambda: warmed.append(True))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match="cannot listen"):
            serve(engine, NAME, TEMPLATE, ServeOptions(port=port, warm_up=warm_up))
    assert bool(warmed) == warm_up


def test_an_address_in_use_is_refused(engine: Engine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"cannot listen on port {port} of 127\.0\.0\.1 \(.*\); use another --port or --host"
        ):
            serve(engine, NAME, TEMPLATE, ServeOptions(port=port, warm_up=False))


def test_what_cannot_be_served_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="a server needs a Tokenizer"):
        Service(Engine(MODEL, variables()), NAME, None, ServeOptions())
    with pytest.raises(ValueError, match="the model's name is empty"):
        Service(engine, "", None, ServeOptions())
    monkeypatch.setenv("DSV3_JAX_API_KEY", "")
    with pytest.raises(ValueError, match="the API key is empty; give it characters, or unset DSV3_JAX_API_KEY"):
        serve(engine, NAME)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("port", 70000, r"port is 70000; it must lie in 0\.\.65535"),
        ("max_body", 0, "max_body is 0; it must be at least 1"),
        ("max_queue", -1, "max_queue is -1; it cannot be negative"),
        ("timeout", 0, "timeout is 0; it must be above 0 seconds"),
        ("drain_timeout", float("nan"), "drain_timeout is nan; use a finite number"),
    ],
)
def test_options_out_of_range_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServeOptions(**{field: value})
