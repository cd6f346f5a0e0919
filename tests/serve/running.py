"""A tiny model being served: in a thread of this process, or as a program of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.chat_template import ChatTemplate
from dsv3_jax.infer import Engine
from dsv3_jax.serve import ServeOptions, serve
from dsv3_jax.serve.app import Server
from dsv3_jax.serve.worker import Service, TokenBytes
from tests.data.test_chat_template import EOS, IDS, TEMPLATE, TOKENIZER
from tests.model.tiny import CONFIG, random_variables

NAME = "tiny"
CONTEXT = 256
MODEL = dataclasses.replace(
    CONFIG,
    vocab_size=TOKENIZER.vocab_size,
    num_hidden_layers=1,
    num_nextn_predict_layers=0,
    max_position_embeddings=CONTEXT,
    bos_token_id=None,
    eos_token_id=IDS[EOS],
)


@functools.cache
def variables() -> dict[str, Any]:
    """A model that mostly writes ASCII: a decoder holds broken characters back, and there would be nothing to stream."""
    drawn = random_variables(MODEL)
    is_ascii = [all(byte < 128 for byte in TokenBytes(TOKENIZER)(token)) for token in range(MODEL.vocab_size)]
    drawn["params"]["lm_head"]["kernel"] *= np.array(is_ascii)
    return jax.tree.map(jnp.asarray, drawn)


def make_engine(config: ModelConfig = MODEL, **options: Any) -> Engine:
    """Small chunks and pages, so that there are few programs and many pages."""
    return Engine(config, variables(), TOKENIZER, **{"max_batch": 4, "chunk": 16, "page_size": 16, **options})


class RunningServer:
    """A server in a thread, and what a client needs."""

    def __init__(self, server: Server, thread: threading.Thread, service: Service, url: str) -> None:
        self.server, self.thread, self.service, self.url = server, thread, service, url
        self.http = httpx2.Client(base_url=url, timeout=120)

    def post(self, path: str = "/v1/completions", **body: Any) -> httpx2.Response:
        """A request for the tiny model."""
        return self.http.post(path, json={"model": NAME, **body})

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's values under these labels."""
        return metric(self.http.get("/metrics").text, name, **labels)

    def wait_until_free(self) -> None:
        """Waits until no slot is held; then every page has to be free or in the prefix cache."""
        deadline = time.monotonic() + 30
        while self.metric("dsv3_waiting") + self.metric("dsv3_running"):
            assert time.monotonic() < deadline, "a slot is stuck"
            time.sleep(0.02)
        assert self.metric("dsv3_free_pages") + self.metric("dsv3_cached_pages") == self.metric("dsv3_pages")


def metric(text: str, name: str, **labels: str) -> float:
    """The sum of a metric's values under these labels, in the text of /metrics."""
    found = re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", text, re.MULTILINE)
    assert found or labels, f"{name} is not in /metrics"
    return sum(float(value) for named, value in found if labels.items() <= dict(re.findall(r'(\w+)="(.*?)"', named)).items())


@contextlib.contextmanager
def served(
    engine: Engine,
    template: ChatTemplate | None = TEMPLATE,
    options: ServeOptions = ServeOptions(),  # noqa: B008  # frozen
    api_key: str | None = None,
) -> Iterator[RunningServer]:
    """A server for this engine, on a free port."""
    service = Service(engine, NAME, template, options, api_key)
    server = Server(service)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield RunningServer(server, thread, service, f"http://127.0.0.1:{listener.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server does not end"
        assert service.worker.stop(30), "the engine's thread does not end"


def main() -> None:
    """Serves the tiny model as a program: twice, since a program costs seconds, and says how the first time ended.

    The second time it takes a minute for what would take seconds, so that whoever sends a signal finds it at work.
    """
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR"))
    engine, options = make_engine(), ServeOptions(port=0)
    print("ended with", serve(engine, NAME, TEMPLATE, options), file=sys.stderr)
    step = engine.step
    engine.step = lambda: time.sleep(0.02) or step()  # type: ignore[method-assign]
    sys.exit(serve(engine, NAME, TEMPLATE, options))


if __name__ == "__main__":
    main()
