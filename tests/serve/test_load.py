"""A program that serves, under load by OpenAI's client: many at once, some who hang up, some who send rubbish.

Nothing may stick, and signals end it as they should.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import openai

from dsv3_jax.infer import Engine, SamplingParams
from tests.cli.conftest import ROOT
from tests.serve.running import CONTEXT, MODEL, NAME, metric

REQUESTS, AT_ONCE = 100, 32
KEY = "sesame"
OTHERS = ("malformed", "unknown", "huge", "type", "negative", "absurd", "long", "key", "model")
"""What is wrong with a request, each some of the requests."""
RUBBISH: dict[str, dict[str, Any]] = {
    "unknown": {"prompt": "x", "mood": "good"},
    "type": {"prompt": {"text": "x"}},
    "negative": {"prompt": "x", "max_tokens": -3},
    "absurd": {"prompt": "x", "n": 10**12},
    "long": {"prompt": [5] * CONTEXT},
    "key": {"prompt": "x"},
    "model": {"prompt": "x", "model": "other"},
}
REFUSALS = {
    "malformed": (400, "Invalid JSON: "),
    "unknown": (400, "mood is 'good'; this server does not support it"),
    "huge": (413, "The body has more than"),
    "type": (400, "prompt must be a string"),
    "negative": (400, "max_tokens is -3; input should be greater than or equal to 1"),
    "absurd": (400, "1 prompts with n 1000000000000 are 1000000000000 completions, more than 128 a request"),
    "long": (400, "maximum context length is 256 tokens"),
    "key": (401, "The API key is missing or wrong"),
    "model": (404, "The model `other` does not exist"),
}


@dataclasses.dataclass(frozen=True)
class Ask:
    """One of the requests."""

    prompt: list[int]
    max_tokens: int
    kind: str
    """"whole" or "stream", "leave" or "abort" for those who hang up, else what is wrong with it."""


def asks() -> list[Ask]:
    """A fifth of them hang up half-way, a quarter is wrong, and some prompts begin alike."""
    rng = random.Random(0)
    kinds = ["leave", "abort"] * (REQUESTS // 10)
    kinds += [OTHERS[i % len(OTHERS)] for i in range(REQUESTS // 4)]
    kinds += [("whole", "stream")[i % 2] for i in range(REQUESTS - len(kinds))]
    rng.shuffle(kinds)
    shared = [rng.randrange(5, MODEL.vocab_size) for _ in range(40)]
    return [
        Ask(
            shared[: rng.choice((0, 0, 20, 40))] + [rng.randrange(5, MODEL.vocab_size) for _ in range(rng.randint(1, 80))],
            # Long enough that those who leave do so before the end.
            100 if kind in ("leave", "abort") else rng.randint(1, 60),
            kind,
        )
        for kind in kinds
    ]


async def sent(ask: Ask, client: openai.AsyncOpenAI, http: httpx2.AsyncClient) -> str | None:
    """What came of a request: the text of a good one; a wrong one is held to its refusal here."""
    body: dict[str, Any] = {"model": NAME, "prompt": ask.prompt, "max_tokens": ask.max_tokens, "temperature": 0}
    extra = {"extra_body": {"ignore_eos": True}}
    if ask.kind == "whole":
        return (await client.completions.create(**body, **extra)).choices[0].text
    if ask.kind == "stream":
        return "".join([piece.choices[0].text async for piece in await client.completions.create(**body, **extra, stream=True)])
    if ask.kind == "leave":
        async with await client.completions.create(**body, **extra, stream=True) as stream:
            async for _ in stream:
                return None
    if ask.kind == "abort":
        task = asyncio.create_task(client.completions.create(**body, **extra))
        await asyncio.wait([task], timeout=0.05)
        task.cancel()
        return None
    await refused(ask.kind, client, http)
    return None


async def refused(kind: str, client: openai.AsyncOpenAI, http: httpx2.AsyncClient) -> None:
    """A request that is wrong is refused with its own status and message."""
    status, message = REFUSALS[kind]
    if kind in RUBBISH:
        headers = {"authorization": "Bearer wrong"} if kind == "key" else {}
        answer = await http.post("/v1/completions", json={"model": NAME} | RUBBISH[kind], headers=headers)
    else:
        content = b'{"model": "tiny", ' if kind == "malformed" else b" " * 5_000_000
        answer = await http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), (kind, answer.text)


async def under_load(url: str, requests: list[Ask]) -> list[str | None]:
    """Sends them all, so many at a time."""
    turn = asyncio.Semaphore(AT_ONCE)
    headers = {"authorization": f"Bearer {KEY}"}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=120) as http:

            async def in_turn(ask: Ask) -> str | None:
                async with turn:
                    return await sent(ask, client, http)

            return await asyncio.gather(*map(in_turn, requests))


async def drained(url: str, pid: int) -> list[str]:
    """Sixteen streams, of which each has begun when the signal comes."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        begun = asyncio.Barrier(17)

        async def stream(i: int) -> str:
            asked: dict[str, Any] = {"model": NAME, "prompt": [i + 5], "max_tokens": 100, "temperature": 0, "stream": True}
            stream = await client.completions.create(**asked, extra_body={"ignore_eos": True})
            await begun.wait()
            return "".join([piece.choices[0].text async for piece in stream])

        async def stop() -> None:
            await begun.wait()
            os.kill(pid, signal.SIGTERM)

        *texts, _ = await asyncio.gather(*map(stream, range(16)), stop())
        return texts


@contextlib.contextmanager
def program() -> Iterator[subprocess.Popen[str]]:
    """The server as a program; it serves twice."""
    command = [sys.executable, "-m", "tests.serve.running"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DSV3_JAX_API_KEY": KEY}
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def listening(child: subprocess.Popen[str]) -> str:
    """The program's address, once it listens."""
    assert child.stderr is not None
    line = child.stderr.readline()
    assert line.startswith(f"serving {NAME} on http://127.0.0.1:"), line + child.stderr.read()
    return line.split()[-1]


def ended_by_a_second_signal(url: str, child: subprocess.Popen[str]) -> int:
    """The program's code, at two signals: 64 answers in four slots take a minute, which the second does not wait for."""
    http = httpx2.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=60)
    assert http.get("/health").status_code == 200
    asked = {"model": NAME, "prompt": "Hello", "n": 64, "stream": True, "max_tokens": 200, "ignore_eos": True, "temperature": 0}
    with http.stream("POST", "/v1/completions", json=asked) as answer:
        next(answer.iter_lines())
        child.send_signal(signal.SIGTERM)
        while http.get("/health").status_code != 503:
            time.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        return child.wait(10)


def test_a_server_under_load(offline: Engine) -> None:
    """The good ones' answers are those of an engine alone; at the end every page is free or only cached."""
    requests = asks()
    good = [i for i, ask in enumerate(requests) if ask.kind in ("whole", "stream")]
    with program() as child:
        url = listening(child)
        answers = asyncio.run(under_load(url, requests))
        text = _settled(url)
        assert metric(text, "dsv3_free_pages") + metric(text, "dsv3_cached_pages") == metric(text, "dsv3_pages")
        assert metric(text, "dsv3_requests_total", status="200", endpoint="/v1/completions") >= len(good)
        assert metric(text, "dsv3_requests_total", status="499") >= REQUESTS / 20
        assert metric(text, "dsv3_requests_total", status="500") == 0
        last = asyncio.run(drained(url, child.pid))
        assert child.stderr is not None
        # asyncio warns of clients that have gone while much is sent to them.
        said = next(line for line in iter(child.stderr.readline, "") if line != "socket.send() raised exception.\n")
        assert said == "ended with 0\n"
        assert ended_by_a_second_signal(listening(child), child) == 1
    params = [SamplingParams(max_tokens=requests[i].max_tokens, ignore_eos=True) for i in good]
    expected = [completion.text for completion in offline.generate([requests[i].prompt for i in good], params)]
    assert [answers[i] for i in good] == expected
    alone = SamplingParams(max_tokens=100, ignore_eos=True)
    assert last == [completion.text for completion in offline.generate([[i + 5] for i in range(16)], alone)]


def _settled(url: str) -> str:
    """/metrics once nobody waits or runs."""
    with httpx2.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}) as http:
        for _ in range(600):
            text = http.get("/metrics").text
            if metric(text, "dsv3_waiting") + metric(text, "dsv3_running") == 0:
                return text
            time.sleep(0.05)
    raise AssertionError("a slot is stuck")
