"""Throughput and time to first text of the server against offered load, with and without drafts of the MTP depth.

    python benchmarks/serve.py [--checkpoint runs/tiny] [--rates 1 2 4 8 16] [--requests 48] [--drafts 0 1]

Prints a table and one JSON line. The server is a process of its own, which compiles its programs before it listens.
Requests arrive at random (Poisson, from a fixed seed, so that every setting meets the same ones), stream greedily, and continue
Python's standard library. Above what the server can do a queue grows, and time to first text with it: it is measured at the
first text, since an incomplete character is held back. Without a checkpoint the model is that of configs/tiny.py with random
weights, whose drafts are almost never accepted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import socket
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import jax
import numpy as np
from machine import machine

from dsv3_jax import Engine
from dsv3_jax.config import DataConfig
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.infer.load import load_model
from dsv3_jax.model import init_variables
from dsv3_jax.parallel.devices import cache_compilations
from dsv3_jax.serve import ServeOptions, serve

NAME, MAX_LENGTH, MAX_BATCH, CHUNK = "benchmark", 512, 8, 128
SOURCES = "argparse.py", "ast.py", "inspect.py", "typing.py"


class Asked(NamedTuple):
    """One request of the load."""

    arrival: float
    """Seconds from the start, at one request a second."""
    prompt: str
    max_tokens: int


class Told(NamedTuple):
    """Result of one request."""

    first: float
    """Seconds to the first text."""
    seconds: float
    tokens: int


def load(count: int, seed: int = 0) -> list[Asked]:
    """Prompts of 100 to 600 characters, answers of 16 to 96 tokens."""
    rng = np.random.default_rng(seed)
    text = "".join((Path(sysconfig.get_paths()["stdlib"]) / name).read_text("utf-8") for name in SOURCES)
    arrivals = np.cumsum(rng.exponential(size=count))
    asked = []
    for arrival in arrivals:
        start, length = rng.integers(len(text) - 600), rng.integers(100, 600)
        asked.append(Asked(float(arrival), text[start : start + length], int(rng.integers(16, 97))))
    return asked


def run_server(checkpoint: str | None, drafts: int, port: int) -> None:
    """The process of the server."""
    cache_compilations(DataConfig.cache_dir)
    if checkpoint is None:
        sys.path.insert(0, str(Path(__file__).parent.parent / "configs"))
        from tiny import config as tiny

        config, variables = tiny.model, init_variables(tiny.model, jax.random.key(0))
        texts = (Path(sysconfig.get_paths()["stdlib"]) / name for name in SOURCES)
        tokenizer = train_tokenizer([text.read_text("utf-8") for text in texts], config.vocab_size, ["<bos>", "<eos>"])
    else:
        model = load_model(checkpoint)
        config, variables, tokenizer = model.config, model.variables, model.tokenizer
    length = min(MAX_LENGTH, config.max_position_embeddings)
    engine = Engine(config, variables, tokenizer, max_batch=MAX_BATCH, max_length=length, chunk=CHUNK, drafts=drafts)
    sys.exit(serve(engine, NAME, options=ServeOptions(port=port, max_queue=10_000)))


@contextmanager
def server(checkpoint: str | None, drafts: int) -> Iterator[str]:
    """Yield the address of a running server."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = multiprocessing.get_context("spawn").Process(target=run_server, args=(checkpoint, drafts, port))
    process.start()
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                if httpx2.get(f"{url}/health").status_code == 200:
                    break
            except httpx2.TransportError:
                if not process.is_alive():
                    raise SystemExit("the server did not start") from None
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.join()


async def ask(client: httpx2.AsyncClient, asked: Asked) -> Told:
    """Send one request and read its stream."""
    body = {"model": NAME, "prompt": asked.prompt, "max_tokens": asked.max_tokens, "temperature": 0, "ignore_eos": True}
    started, first, usage = time.perf_counter(), 0.0, {}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=body | options) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            first = first or time.perf_counter() - started
            if line.startswith("data: {"):
                usage = json.loads(line.removeprefix("data: "))["usage"] or usage
    return Told(first, time.perf_counter() - started, usage["completion_tokens"])


async def offer(url: str, requests: list[Asked], rate: float) -> dict[str, float]:
    """Sends the requests at `rate` a second on average, and measures."""
    async with httpx2.AsyncClient(base_url=url, timeout=None, limits=httpx2.Limits(max_connections=None)) as client:
        started = time.perf_counter()

        async def in_time(asked: Asked) -> Told:
            await asyncio.sleep(asked.arrival / rate - (time.perf_counter() - started))
            return await ask(client, asked)

        told = await asyncio.gather(*map(in_time, requests))
        seconds = time.perf_counter() - started
    first = [each.first for each in told]
    each_token = [(each.seconds - each.first) / max(each.tokens - 1, 1) for each in told]
    return {
        "tokens_per_second": round(sum(each.tokens for each in told) / seconds, 1),
        "requests_per_second": round(len(told) / seconds, 2),
        "first_text_p50": round(float(np.quantile(first, 0.5)), 4),
        "first_text_p95": round(float(np.quantile(first, 0.95)), 4),
        "seconds_per_token_p50": round(float(np.quantile(each_token, 0.5)), 5),
    }


def decoded(url: str) -> tuple[float, float]:
    """Return the decoded tokens and the decode steps so far."""
    lines = dict(line.rsplit(" ", 1) for line in httpx2.get(f"{url}/metrics").text.splitlines() if not line.startswith("#"))
    return float(lines["dsv3_step_tokens_total"]), float(lines["dsv3_steps_total"])


def measured(checkpoint: str | None, drafts: int, rates: list[float], requests: list[Asked]) -> list[dict[str, Any]]:
    """A row for each rate, from the lowest."""
    rows = []
    with server(checkpoint, drafts) as url:
        for i, rate in enumerate(sorted(rates)):
            # The same load for each rate, with another first word, so that the prefix cache does not match.
            own = [asked._replace(prompt=f"# {i}\n{asked.prompt}") for asked in requests]
            before = decoded(url)
            row = {"drafts": drafts, "rate": rate, **asyncio.run(offer(url, own, rate))}
            tokens, steps = (after - first for after, first in zip(decoded(url), before, strict=True))
            rows.append(row | {"tokens_per_step": round(tokens / steps, 3)})
            print("  ".join(f"{value:>{len(name)}}" for name, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    """Command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="run directory or Hugging Face folder; without one, random weights")
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 2, 4, 8, 16], help="requests a second")
    parser.add_argument("--requests", type=int, default=48, help="requests at each rate")
    parser.add_argument("--drafts", type=int, nargs="+", default=[0, 1], help="tokens the MTP depth drafts a step")
    arguments = parser.parse_args()
    os.environ.pop("DSV3_JAX_API_KEY", None)
    requests = load(arguments.requests)
    names = "drafts", "rate", "tokens_per_second", "requests_per_second", "first_text_p50", "first_text_p95"
    print("  ".join((*names, "seconds_per_token_p50", "tokens_per_step")))
    rows = [row for drafts in arguments.drafts for row in measured(arguments.checkpoint, drafts, arguments.rates, requests)]
    print(
        json.dumps(
            {
                "benchmark": "serve",
                "rows": rows,
                "requests": arguments.requests,
                "checkpoint": arguments.checkpoint,
                "max_batch": MAX_BATCH,
                "max_length": MAX_LENGTH,
                "chunk": CHUNK,
                **machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
