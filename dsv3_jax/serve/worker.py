"""The thread that owns the engine: it takes jobs and cancellations from a queue, steps, and tells the event loop what came.

Nobody else touches the engine. What a step brings for all jobs crosses to the event loop in one call.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import queue
import re
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import Receive

from dsv3_jax.data.chat_template import ChatTemplate
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.infer import Engine, SamplingParams
from dsv3_jax.infer.request import FinishReason, Request, TokenLogprobs, Update
from dsv3_jax.serve.cli import ServeOptions
from dsv3_jax.serve.requests import ApiError, GenerationRequest, ModelInfo, refuse


class Accepted(NamedTuple):
    """The engine has taken every choice of a job on."""


class Refused(NamedTuple):
    """It has taken none."""

    reason: str


class Failed(NamedTuple):
    """The engine has stopped for good."""


class Progress(NamedTuple):
    """What a step brought for one choice."""

    choice: int
    num_tokens: int
    text: str
    logprobs: list[TokenLogprobs]
    cached: int
    """Tokens of the prompt that the prefix cache had."""
    finish_reason: FinishReason | None


class Disconnected(NamedTuple):
    """The client is gone."""


class Cancelled(NamedTuple):
    """The server ends now."""


class TimedOut(NamedTuple):
    """The time of a request is over."""


Event = Accepted | Refused | Failed | Progress | Disconnected | Cancelled | TimedOut


class Job:
    """The choices of one request, and the events that come of them; made and read on the event loop."""

    def __init__(self, choices: Sequence[tuple[list[int], SamplingParams]]) -> None:
        self.choices = choices
        self.events: asyncio.Queue[Event] = asyncio.Queue()


@dataclasses.dataclass
class _Choice:
    """A request of the engine that somebody waits for."""

    job: Job
    index: int
    told: int = 0
    cached: int = 0


class Counts(NamedTuple):
    """The engine after its last step."""

    waiting: int = 0
    running: int = 0
    free_pages: int = 0
    cached_pages: int = 0
    preemptions: int = 0
    steps: int = 0
    step_tokens: int = 0


class Worker:
    """Runs the engine for the jobs it is given, from `start` to `stop`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._requests: dict[Request, _Choice] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failure: BaseException | None = None
        """What has stopped the engine, if anything has."""
        self.counts = self._count()

    # For the event loop.

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begins; events go to queues of this loop."""
        self._loop = loop
        self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Ends after the step at hand, whatever is still to be done; False if that has not ended in time."""
        self._commands.put(("stop", None))
        if self._loop is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Takes a job on: its first event is Accepted, Refused or Failed."""
        self._commands.put(("submit", job))
        if self.failure is not None:
            job.events.put_nowait(Failed())

    def cancel(self, job: Job) -> None:
        """Ends what is left of a job, and frees what it holds."""
        self._commands.put(("cancel", job))

    # The thread.

    def _run(self) -> None:
        try:
            while self._obey():
                self._tell(self._step())
            for request in self._requests:
                self._engine.cancel(request)
        except BaseException as error:  # Whatever it is, those who wait must hear of it, and the server must end.
            traceback.print_exc(file=sys.stderr)
            jobs = {id(choice.job): choice.job for choice in self._requests.values()}
            self.failure = error
            self._requests.clear()
            self._tell([(job, Failed()) for job in (*jobs.values(), *self._unheard())])

    def _obey(self) -> bool:
        """Carries out the commands there are, and waits for one while there is nothing else to do; False at the end."""
        while True:
            try:
                command, job = self._commands.get(block=self._engine.idle)
            except queue.Empty:
                return True
            if job is None:
                return False
            self._submit(job) if command == "submit" else self._cancel(job)
            self.counts = self._count()

    def _unheard(self) -> list[Job]:
        """Jobs of commands that nobody will carry out."""
        jobs = []
        while not self._commands.empty():
            command, job = self._commands.get()
            if command == "submit" and job is not None:
                jobs.append(job)
        return jobs

    def _submit(self, job: Job) -> None:
        requests: list[Request] = []
        # So that a failure on the way is told to this job too.
        try:
            for prompt, params in job.choices:
                requests.append(self._engine.submit(prompt, params))
                self._requests[requests[-1]] = _Choice(job, len(requests) - 1)
        except ValueError as error:
            for request in requests:
                self._engine.cancel(request)
                del self._requests[request]
            self._tell([(job, Refused(str(error)))])
        except BaseException:
            self._tell([(job, Failed())])
            raise
        else:
            self._tell([(job, Accepted())])

    def _cancel(self, job: Job) -> None:
        for request in [request for request, choice in self._requests.items() if choice.job is job]:
            self._engine.cancel(request)
            del self._requests[request]

    def _step(self) -> list[tuple[Job, Event]]:
        updates = self._engine.step()
        for request, choice in self._requests.items():
            # Known from a request's admission on, and gone when it ends.
            if not request.tokens and request.sequence.state in ("prefilling", "running"):
                choice.cached = request.sequence.reused
        told: list[tuple[Job, Event]] = [(self._requests[update.request].job, self._progress(update)) for update in updates]
        for update in updates:
            if update.request.finish_reason is not None:
                self._requests.pop(update.request, None)
        self.counts = self._count()
        return told

    def _progress(self, update: Update) -> Progress:
        request, choice = update.request, self._requests[update.request]
        logprobs = [] if request.logprobs is None else request.logprobs[choice.told :]
        choice.told += len(logprobs)
        return Progress(choice.index, len(update.tokens), update.text, logprobs, choice.cached, request.finish_reason)

    def _count(self) -> Counts:
        states = collections.Counter(request.sequence.state for request in self._requests)
        counts = self._engine.counts
        return Counts(
            states["waiting"],
            states["prefilling"] + states["running"],
            counts["free_pages"],
            counts["cached_pages"],
            counts["preemptions"],
            counts["steps"],
            counts["step_tokens"],
        )

    def _tell(self, events: list[tuple[Job, Event]]) -> None:
        assert self._loop is not None
        # Once the loop is closed, which it is when requests were cut off, nobody listens any more.
        if events:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_deliver, events)


def _deliver(events: list[tuple[Job, Event]]) -> None:
    for job, event in events:
        job.events.put_nowait(event)


# ----------------------------------------------------------------------------------------------------------------------
# What Prometheus reads at /metrics: requests, tokens, times, and the engine's slots and pages.


# Seconds, from a small model on a desk to a queue in front of a large one.
_TIMES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The numbers of one server."""

    def __init__(self, num_pages: int, counts: Callable[[], Counts]) -> None:
        """Counts from 0; `counts` tells the engine's own numbers when they are asked for."""
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "dsv3_requests", "Requests by endpoint and status; 499 hung up.", ["endpoint", "status"], registry=self._registry
        )
        self.prompt_tokens = Counter("dsv3_prompt_tokens", "Tokens of prompts that were answered.", registry=self._registry)
        self.cached_tokens = Counter("dsv3_cached_prompt_tokens", "Those that the prefix cache had.", registry=self._registry)
        self.generated_tokens = Counter("dsv3_generated_tokens", "Tokens of completions.", registry=self._registry)
        self.first_token = Histogram(
            "dsv3_time_to_first_token_seconds", "From a request to its first token.", buckets=_TIMES, registry=self._registry
        )
        self.latency = Histogram(
            "dsv3_request_seconds",
            "From a request to its end, of those that ended well.",
            buckets=_TIMES,
            registry=self._registry,
        )
        self._registry.register(_EngineNumbers(num_pages, counts))

    def text(self) -> bytes:
        """All of them, as Prometheus reads it."""
        return generate_latest(self._registry)


class _EngineNumbers(Collector):
    """Read off the engine's last step, so that they belong together."""

    def __init__(self, num_pages: int, counts: Callable[[], Counts]) -> None:
        self._num_pages, self._counts = num_pages, counts

    def collect(self) -> Iterable[Metric]:
        counts = self._counts()
        yield GaugeMetricFamily("dsv3_waiting", "Completions that wait for a slot.", counts.waiting)
        yield GaugeMetricFamily("dsv3_running", "Completions that have a slot.", counts.running)
        yield GaugeMetricFamily("dsv3_pages", "Pages of the cache.", self._num_pages)
        yield GaugeMetricFamily("dsv3_free_pages", "Pages with nothing in them.", counts.free_pages)
        yield GaugeMetricFamily("dsv3_cached_pages", "Pages that only the prefix cache keeps.", counts.cached_pages)
        yield CounterMetricFamily("dsv3_preemptions", "Completions that lost their slot for a while.", counts.preemptions)
        yield CounterMetricFamily("dsv3_steps", "Decoding steps of single completions.", counts.steps)
        yield CounterMetricFamily(
            "dsv3_step_tokens", "Tokens that these steps gave; over dsv3_steps it is tokens a step.", counts.step_tokens
        )


# ----------------------------------------------------------------------------------------------------------------------
# The bytes of single tokens, which log-probabilities are reported with: a token may be part of a character.


class TokenBytes:
    """Token ids to bytes, as the tokenizer.json spells them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Reads the vocabulary; a large one takes a second."""
        self._tokenizer = tokenizer
        content = json.loads(tokenizer.to_json())
        vocabulary = content["model"]["vocab"]
        # A list of [piece, score] for Unigram, a dict for the others.
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((each[0], i) for i, each in enumerate(vocabulary))
        self._pieces = {token: piece for piece, token in pairs}
        self._is_byte_level = _mentions_byte_level(content.get("decoder"))

    def __call__(self, token: int) -> bytes:
        """The bytes of a token; an added token's are those of its name, an id without a token has none."""
        if token in self._tokenizer.added_tokens:
            return self._tokenizer.added_tokens[token].encode()
        piece = self._pieces.get(token)
        if piece is None:
            return b""
        if self._is_byte_level:
            return bytes(_BYTES[character] for character in piece)
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes([int(byte[1], 16)])
        return self._tokenizer.decode([token]).encode()

    def shown(self, token: int) -> bytes:
        """What of a token is in a completion's text: of a special token nothing."""
        return b"" if token in self._tokenizer.special_tokens else self(token)

    def text(self, token: int) -> str:
        """A token as OpenAI writes it: its text, or its bytes where they are no text."""
        raw = self(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _mentions_byte_level(decoder: dict[str, Any] | None) -> bool:
    if not decoder:
        return False
    return decoder["type"] == "ByteLevel" or any(map(_mentions_byte_level, decoder.get("decoders", ())))


def _byte_level_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: itself if it can be seen, else one from U+0100 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_level_alphabet()


# ----------------------------------------------------------------------------------------------------------------------
# One model being served: who is let in, and the events of each request until it ends, hangs up or takes too long.


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
        check_name_and_key(name, api_key)
        self.options, self.api_key = options, api_key
        self.created = int(time.time())
        self.served = ModelInfo(name, engine.config, engine.tokenizer, template, engine.sizes.max_length, options.max_choices)
        self.token_bytes = TokenBytes(engine.tokenizer)
        self.worker = Worker(engine)
        self.metrics = Metrics(engine.sizes.pages, lambda: self.worker.counts)
        self.draining = False
        """Takes nothing new."""
        self._most_open = engine.sizes.slots + options.max_queue
        self._running: set[ActiveRequest] = set()
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

    def forget(self, running: ActiveRequest) -> None:
        """Told by a request that has been closed."""
        self._running.discard(running)

    async def admit(self, wanted: GenerationRequest, receive: Receive) -> ActiveRequest:
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
        running = ActiveRequest(self, wanted, receive)
        self._running.add(running)
        try:
            await running.accepted()
        except BaseException:
            running.close()
            raise
        return running


def check_name_and_key(name: str, api_key: str | None) -> None:
    """Raises ValueError if one of them is empty."""
    if not name:
        raise ValueError("the model's name is empty; clients must be able to ask for it")
    if api_key == "":
        raise ValueError("the API key is empty; give it characters, or unset DSV3_JAX_API_KEY to serve everyone")


class ActiveRequest:
    """A request under way. Its slots are its own until `close`."""

    def __init__(self, service: Service, wanted: GenerationRequest, receive: Receive) -> None:
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
        self._job.events.put_nowait(Cancelled())

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
            case Cancelled():
                raise ApiError(503, "The server is going down, and the request was cut off", code="draining", headers=LATER)
            case Disconnected():
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
    events.put_nowait(Disconnected())
