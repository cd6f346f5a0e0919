"""One model being served: who is let in, and the events of each request until it ends, hangs up or takes too long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from starlette.types import Receive

from dsv3_jax.data.chat_template import ChatTemplate
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.infer import Engine
from dsv3_jax.serve.errors import ApiError, refuse
from dsv3_jax.serve.metrics import Metrics
from dsv3_jax.serve.options import ServeOptions
from dsv3_jax.serve.requests import Served, Wanted
from dsv3_jax.serve.token_bytes import TokenBytes
from dsv3_jax.serve.worker import Accepted, CutOff, Event, Failed, HungUp, Job, Progress, Refused, TimedOut, Worker

LATER = {"retry-after": "1"}
NOT_AGAIN = {"x-should-retry": "false"}
"""Keeps OpenAI's client from sending what would take as long the next time."""
HUNG_UP = 499
"""nginx's status for a client that has closed its connection; nobody receives it, /metrics counts it."""


class Service:
    """A model, its engine's thread, and its limits; used on the event loop alone."""

    def __init__(
        self, engine: Engine, name: str, template: ChatTemplate | None, options: ServeOptions, api_key: str | None = None
    ) -> None:
        """Serves `engine` as the model `name`.

        Raises:
          ValueError: if the engine has no tokenizer of this project, or the name or the key is empty.
        """
        if not isinstance(engine.tokenizer, Tokenizer):
            raise ValueError(f"the engine's tokenizer is {engine.tokenizer!r:.60}; a server needs a Tokenizer")
        require_name_and_key(name, api_key)
        self.options, self.api_key = options, api_key
        self.created = int(time.time())
        self.served = Served(name, engine.config, engine.tokenizer, template, engine.sizes.max_length, options.max_choices)
        self.token_bytes = TokenBytes(engine.tokenizer)
        self.worker = Worker(engine)
        self.metrics = Metrics(engine.sizes.pages, lambda: self.worker.counts)
        self.draining = False
        """Takes nothing new."""
        self._most_open = engine.sizes.slots + options.max_queue
        self._running: set[Running] = set()
        self.open_choices = 0
        """Completions that somebody waits for."""
        self.open_requests = 0
        """Requests of any kind whose answers have not been sent."""

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        return self.open_requests == 0

    def check_ready(self) -> None:
        """Raises ApiError (503) unless new requests are taken."""
        if self.worker.failure is not None:
            raise ApiError(503, "The engine has failed; the server is going down", code="engine_failed")
        if self.draining:
            raise ApiError(503, "The server is going down", code="draining", headers=LATER)

    def cut_off(self) -> None:
        """Ends all requests under way with an error."""
        self.draining = True
        for running in self._running:
            running.cut_off()

    def forget(self, running: Running) -> None:
        """Told by a request that has been closed."""
        self._running.discard(running)

    async def admit(self, wanted: Wanted, receive: Receive) -> Running:
        """Takes a request on; the caller closes what it gets.

        Raises:
          ApiError: if the queue is full, the engine refuses it, or the server is going down.
        """
        self.check_ready()
        count = len(wanted.params)
        if count > self._most_open:
            raise refuse(f"{count} completions are more than the {self._most_open} that this server can ever hold", "n")
        if self.open_choices + count > self._most_open:
            raise ApiError(429, "The queue is full; come back later", code="queue_full", headers=LATER)
        running = Running(self, wanted, receive)
        self._running.add(running)
        try:
            await running.accepted()
        except BaseException:
            running.close()
            raise
        return running


def require_name_and_key(name: str, api_key: str | None) -> None:
    """Raises ValueError if one of them is empty."""
    if not name:
        raise ValueError("the model's name is empty; clients must be able to ask for it")
    if api_key == "":
        raise ValueError("the API key is empty; give it characters, or unset DSV3_JAX_API_KEY to serve everyone")


class Running:
    """A request under way. Its slots are its own until `close`."""

    def __init__(self, service: Service, wanted: Wanted, receive: Receive) -> None:
        self._service, self._wanted = service, wanted
        self._started = time.monotonic()
        self._job = Job(wanted.choices)
        # Everything that can happen to a request arrives in one queue, so that there is one place to wait at.
        timeout, queue = service.options.timeout, self._job.events
        self._timer = asyncio.get_running_loop().call_later(timeout, queue.put_nowait, TimedOut())
        self._watch = asyncio.create_task(_watch(receive, queue))
        self._closed = False
        self.usage = Usage(sum(map(len, wanted.prompts)))
        service.open_choices += len(wanted.params)
        service.worker.submit(self._job)

    async def accepted(self) -> None:
        """Waits until the engine has taken it on. Raises ApiError if it does not."""
        event = await self._next()
        assert isinstance(event, Accepted)

    async def progress(self) -> AsyncIterator[Progress]:
        """What comes, until every choice has ended. Raises ApiError if that does not happen."""
        left, metrics = len(self._wanted.params), self._service.metrics
        while left:
            event = await self._next()
            assert isinstance(event, Progress)
            if not self.usage.completion and event.num_tokens:
                metrics.first_token.observe(time.monotonic() - self._started)
            self.usage.add(event, len(self._wanted.params) // len(self._wanted.prompts))
            metrics.generated_tokens.inc(event.num_tokens)
            left -= event.finish_reason is not None
            yield event
        metrics.latency.observe(time.monotonic() - self._started)
        metrics.prompt_tokens.inc(self.usage.prompt)
        metrics.cached_tokens.inc(self.usage.cached)

    def close(self) -> None:
        """Gives back what it holds, whether it has ended or not."""
        if not self._closed:
            self._closed = True
            self._timer.cancel()
            self._watch.cancel()
            self._service.worker.cancel(self._job)
            self._service.open_choices -= len(self._wanted.params)
            self._service.forget(self)

    def cut_off(self) -> None:
        """Ends it with an error, which is the next thing that its client is told."""
        self._job.events.put_nowait(CutOff())

    async def _next(self) -> Event:
        event = await self._job.events.get()
        match event:
            case Refused(reason):
                raise refuse(reason)
            case Failed():
                raise ApiError(500, "The engine has failed; the server is going down", code="engine_failed")
            case TimedOut():
                seconds = self._service.options.timeout
                message = f"The request took more than {seconds:g} seconds, and was ended"
                raise ApiError(504, message, code="timeout", headers=NOT_AGAIN)
            case CutOff():
                raise ApiError(503, "The server is going down, and the request was cut off", code="draining", headers=LATER)
            case HungUp():
                raise ApiError(HUNG_UP, "The client has closed the connection")
        return event


class Usage:
    """The tokens of a request: those of its prompts once, whatever n is."""

    def __init__(self, prompt: int) -> None:
        self.prompt, self.completion = prompt, 0
        self._cached: dict[int, int] = {}

    def add(self, progress: Progress, n: int) -> None:
        """Counts in what came for a choice; the first of a prompt's n choices tells what of the prompt was cached."""
        self.completion += progress.num_tokens
        if progress.choice % n == 0:
            self._cached[progress.choice] = progress.cached

    @property
    def cached(self) -> int:
        """Tokens of the prompts that the prefix cache had."""
        return sum(self._cached.values())


async def _watch(receive: Receive, events: asyncio.Queue[Event]) -> None:
    """Waits for the client to hang up; its body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
    events.put_nowait(HungUp())
