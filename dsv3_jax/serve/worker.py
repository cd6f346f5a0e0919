"""Engine thread behind a server: jobs in, progress out; admission and the life of a request; metrics.

Only this thread uses the engine. The results of a step, for all jobs, reach the event loop in one call.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import json
import queue
import re
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import Receive

from dsv3_jax.data.chat_template import ChatTemplate
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.infer import Engine, SamplingParams
from dsv3_jax.infer.request import FinishReason, Request, TokenLogprobs
from dsv3_jax.serve.cli import ServeOptions
from dsv3_jax.serve.requests import ApiError, GenerationRequest, ModelInfo


class Progress(NamedTuple):
    """New tokens of one choice from one step of the engine, and the text that they complete."""

    choice: int
    num_tokens: int
    text: str
    logprobs: list[TokenLogprobs]
    cached: int
    """Tokens of the prompt found in the prefix cache."""
    finish_reason: FinishReason | None


Event = Progress | ApiError | None
"""Event of a job: None when the engine has accepted all its choices, then their progress. An error ends the job."""


class Job:
    """The choices of a request and the queue of their events; created and read on the event loop."""

    def __init__(self, choices: Sequence[tuple[list[int], SamplingParams]]) -> None:
        self.choices = choices
        self.events: asyncio.Queue[Event] = asyncio.Queue()


@dataclasses.dataclass
class _Choice:
    """Choice `index` of a job, and the tokens of its prompt found in the prefix cache."""

    job: Job
    index: int
    cached: int = 0


class Worker:
    """Thread that runs the engine, from `start` to `stop`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._requests: dict[Request, _Choice] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.jobs: set[Job] = set()
        """Jobs submitted and not yet passed to `cancel`, ended ones included; for the event loop alone."""
        self.failure: ApiError | None = None
        """Error sent to all jobs once the engine has failed; None before."""
        self.counts = self._count()
        """Waiting and running completions, and `Engine.counts`, after the last step or command."""

    # Called on the event loop.

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread, which puts the events of jobs into their queues on this loop."""
        self._loop = loop
        self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Ask the thread to stop after its current step, and wait; return False if it still runs after `timeout` s."""
        self._commands.put(None)
        if self._loop is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Queue a job for the engine, without waiting; its first event is None if accepted, else an error."""
        self.jobs.add(job)
        self._commands.put(functools.partial(self._submit, job))
        if self.failure is not None:
            job.events.put_nowait(self.failure)

    def cancel(self, job: Job) -> None:
        """Queue the cancellation of a job's unfinished choices, without waiting; the engine then frees their slots."""
        self.jobs.discard(job)
        self._commands.put(functools.partial(self._cancel, job))

    def send_all(self, error: ApiError) -> None:
        """Put an error into the events of all jobs; the engine runs them until they are cancelled."""
        for job in self.jobs:
            job.events.put_nowait(error)

    def _deliver(self, events: list[tuple[Job, Event]], failure: ApiError | None) -> None:
        for job, event in events:
            job.events.put_nowait(event)
        if failure is not None:
            self.failure = failure
            self.send_all(failure)

    # Called in the thread.

    def _run(self) -> None:
        try:
            while self._run_commands():
                self._send(self._step())
            for request in self._requests:
                self._engine.cancel(request)
        except BaseException:  # Any: clients must receive an error, and the server must end.
            traceback.print_exc(file=sys.stderr)
            self._send([], ApiError(500, "The engine failed and the server ends; see the server's log", code="engine_failed"))

    def _run_commands(self) -> bool:
        """Run the queued commands, waiting while the engine is idle; return True to step it, False at `stop`."""
        while True:
            try:
                command = self._commands.get(block=self._engine.idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            self.counts = self._count()

    def _submit(self, job: Job) -> None:
        try:
            for i, (prompt, params) in enumerate(job.choices):
                self._requests[self._engine.submit(prompt, params)] = _Choice(job, i)
        except ValueError as error:
            self._cancel(job)
            self._send([(job, ApiError(400, str(error)))])
        else:
            self._send([(job, None)])

    def _cancel(self, job: Job) -> None:
        for request in [request for request, choice in self._requests.items() if choice.job is job]:
            self._engine.cancel(request)
            del self._requests[request]

    def _step(self) -> list[tuple[Job, Event]]:
        updates = self._engine.step()
        for request, choice in self._requests.items():
            # The scheduler sets `reused` at the request's admission, and clears it at its end.
            if not request.tokens and request.sequence.state in ("prefilling", "running"):
                choice.cached = request.sequence.reused
        events: list[tuple[Job, Event]] = []
        for update in updates:  # At most one per request.
            if update.request not in self._requests:  # Another choice of its job has failed in this step.
                continue
            request, count, choice = update.request, len(update.tokens), self._requests[update.request]
            if request.error is not None:
                self._cancel(choice.job)
                events.append((choice.job, ApiError(500, request.error, code="not_finite")))
                continue
            logprobs = [] if request.logprobs is None else request.logprobs[len(request.logprobs) - count :]
            progress = Progress(choice.index, count, update.text, logprobs, choice.cached, request.finish_reason)
            events.append((choice.job, progress))
            if request.finish_reason is not None:
                del self._requests[request]
        self.counts = self._count()
        return events

    def _count(self) -> dict[str, int]:
        states = collections.Counter(request.sequence.state for request in self._requests)
        running = states["prefilling"] + states["running"]
        return {"waiting": states["waiting"], "running": running, **self._engine.counts}

    def _send(self, events: list[tuple[Job, Event]], failure: ApiError | None = None) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # The loop is closed once no client is left.
            self._loop.call_soon_threadsafe(self._deliver, events, failure)


# ----------------------------------------------------------------------------------------------------------------------
# Prometheus metrics


# Seconds, from a small model on a desktop machine to a queue in front of a large one.
_TIMES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_GAUGES = {
    "waiting": "Completions waiting for a slot.",
    "running": "Completions in a slot.",
    "pages": "Pages of the cache.",
    "free_pages": "Pages of the cache that hold nothing.",
    "cached_pages": "Pages held by the prefix cache alone.",
}
_COUNTERS = {
    "preemptions": "Times that a completion lost its slot and waited for another.",
    "steps": "Decoding steps of single completions.",
    "step_tokens": "Tokens from these steps; divided by dsv3_steps: tokens per step.",
}


class Metrics(Collector):
    """Prometheus metrics of one server: of its requests, and of the engine by `counts`."""

    def __init__(self, num_pages: int, counts: Callable[[], dict[str, int]]) -> None:
        self._num_pages, self._counts = num_pages, counts
        registry = self._registry = CollectorRegistry()
        registry.register(self)
        help_ = "Requests by endpoint and status; 499: the client disconnected."
        self.requests = Counter("dsv3_requests", help_, ["endpoint", "status"], registry=registry)
        self.prompt_tokens = Counter("dsv3_prompt_tokens", "Tokens of prompts answered without error.", registry=registry)
        self.cached_tokens = Counter("dsv3_cached_prompt_tokens", "Prompt tokens found in the prefix cache.", registry=registry)
        self.generated_tokens = Counter("dsv3_generated_tokens", "Tokens of completions.", registry=registry)
        times: dict[str, Any] = {"buckets": _TIMES, "registry": registry}
        self.first_token = Histogram("dsv3_time_to_first_token_seconds", "Seconds from a request to its first token.", **times)
        self.latency = Histogram("dsv3_request_seconds", "Seconds from a request to its end without error.", **times)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """Yield the engine's gauges and counters, all of the same step; called by Prometheus' client."""
        counts = {"pages": self._num_pages, **self._counts()}
        for name, help_ in _GAUGES.items():
            yield GaugeMetricFamily(f"dsv3_{name}", help_, counts[name])
        for name, help_ in _COUNTERS.items():
            yield CounterMetricFamily(f"dsv3_{name}", help_, counts[name])


# ----------------------------------------------------------------------------------------------------------------------
# Bytes of tokens


# The byte of each character of byte-level BPE: printable bytes stand for themselves, the others follow from U+0100 on.
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_BYTES = {chr(byte): byte for byte in _PRINTABLE}
_BYTES |= {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*_PRINTABLE}))}


class TokenBytes:
    """The bytes of single tokens, as tokenizer.json spells them; log-probabilities report them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Read the vocabulary, which takes a second for a large one."""
        self._tokenizer = tokenizer
        content = json.loads(tokenizer.to_json())
        vocabulary = content["model"]["vocab"]
        # A list of [piece, score] for Unigram, a dict for the others.
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((each[0], i) for i, each in enumerate(vocabulary))
        self._pieces = {token: piece for piece, token in pairs}
        self._is_byte_level = '"type": "ByteLevel"' in json.dumps(content.get("decoder"))

    def __call__(self, token: int) -> bytes:
        """Return the bytes of a token: of an added token its name, of an unused id none."""
        if token in self._tokenizer.added_tokens:
            return self._tokenizer.added_tokens[token].encode()
        piece = self._pieces.get(token, "")
        if self._is_byte_level:
            return bytes(_BYTES[character] for character in piece)
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
        return bytes.fromhex(byte[1]) if byte else self._tokenizer.decode([token]).encode()

    def shown(self, token: int) -> bytes:
        """Return the bytes that a token adds to the text of a completion; a special token adds none."""
        return b"" if token in self._tokenizer.special_tokens else self(token)

    def text(self, token: int) -> str:
        """Return a token as OpenAI writes it: its text, or its bytes if they are not UTF-8."""
        raw = self(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


# ----------------------------------------------------------------------------------------------------------------------
# The served model and its active requests


RETRY = {"retry-after": "1"}
NO_RETRY = {"x-should-retry": "false"}
"""Keeps OpenAI's client from repeating a request that would take as long again."""
DISCONNECTED = 499
"""nginx's status for a disconnected client; only /metrics shows it."""


class Service:
    """A served model, its engine thread and its limits; for the event loop alone."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        template: ChatTemplate | None,
        options: ServeOptions,
        api_key: str | None = None,
        switches: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepare `engine` as the model `name`, not yet started. ValueError: empty name or key, or no `Tokenizer`."""
        if not isinstance(engine.tokenizer, Tokenizer):
            raise ValueError(f"the engine's tokenizer is {engine.tokenizer!r:.60}; a server needs a Tokenizer")
        check_name_and_key(name, api_key)
        self.options, self.api_key = options, api_key
        sizes = engine.sizes.max_length, options.max_choices
        self.model = ModelInfo(name, engine.config, engine.tokenizer, template, *sizes, switches or {})
        self.token_bytes = TokenBytes(engine.tokenizer)
        self.worker = Worker(engine)
        self.metrics = Metrics(engine.sizes.pages, lambda: self.worker.counts)
        self.draining = False
        """True once new requests are refused."""
        self.open_requests = 0
        """Requests of any kind whose responses are not yet sent."""
        self._max_choices = engine.sizes.slots + options.max_queue

    @property
    def open_choices(self) -> int:
        """Completions of all requests not yet closed, waiting, running or ended."""
        return sum(len(job.choices) for job in self.worker.jobs)

    def check_ready(self) -> None:
        """Raise ApiError (503) if the engine has failed or new requests are refused."""
        if self.worker.failure is not None:
            raise ApiError(503, "The engine failed and the server ends; see the server's log", code="engine_failed")
        if self.draining:
            raise ApiError(503, "The server is shutting down; try again later", code="draining", headers=RETRY)

    def cut_off(self) -> None:
        """Refuse new requests, and send all active ones an error (503)."""
        self.draining = True
        message = "The server is shutting down, and the request was cancelled; try again later"
        self.worker.send_all(ApiError(503, message, code="draining", headers=RETRY))

    def admit(self, request: GenerationRequest, receive: Receive) -> ActiveRequest:
        """Submit a request, for the caller to close. Raises ApiError: 400 (too many choices), 429 (queue full), 503."""
        self.check_ready()
        count = len(request.params)
        if count > self._max_choices:
            raise ApiError(400, f"{count} completions are more than this server holds ({self._max_choices}); lower n", "n")
        if self.open_choices + count > self._max_choices:
            raise ApiError(429, f"The queue has no room for {count} completions; try later", code="queue_full", headers=RETRY)
        return ActiveRequest(self, request, receive)


def check_name_and_key(name: str, api_key: str | None) -> None:
    """Raise ValueError if the model's name or the API key is empty; None, no key, is allowed."""
    if not name:
        raise ValueError("the model's name is empty; give the one that clients ask for")
    if api_key == "":
        raise ValueError("the API key is empty; give it characters, or unset DSV3_JAX_API_KEY to serve everyone")


class ActiveRequest(Job):
    """A request, submitted to the engine when created, with its time limit and its client watched, until `close`."""

    def __init__(self, service: Service, request: GenerationRequest, receive: Receive) -> None:
        super().__init__(request.choices)
        self._service, self._request = service, request
        self._started = time.monotonic()
        self._num_prompt_tokens, self._num_tokens = sum(map(len, request.prompts)), 0
        self._cached: dict[int, int] = {}
        # A timeout and a disconnection are events too, so that there is one queue to wait on.
        message = f"The request took more than {service.options.timeout:g} seconds, and was ended; lower max_tokens"
        timed_out = ApiError(504, message, code="timeout", headers=NO_RETRY)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(service.options.timeout, self.events.put_nowait, timed_out)
        self._watch = loop.create_task(self._watch_client(receive))
        service.worker.submit(self)

    async def next_event(self) -> Progress | None:
        """Wait for the next event and return it: first None (request accepted), then progress. Raises it if an ApiError."""
        event = await self.events.get()
        if isinstance(event, ApiError):
            raise event
        return event

    async def progress(self) -> AsyncIterator[Progress]:
        """Yield the progress until every choice has ended, and count it in the metrics. Raises ApiError on failure."""
        left, metrics = len(self._request.params), self._service.metrics
        while left:
            event = await self.next_event()
            assert event is not None
            if not self._num_tokens and event.num_tokens:
                metrics.first_token.observe(time.monotonic() - self._started)
            self._num_tokens += event.num_tokens
            # The n choices of a prompt share its cached tokens.
            if event.choice % self._request.n == 0:
                self._cached[event.choice] = event.cached
            metrics.generated_tokens.inc(event.num_tokens)
            left -= event.finish_reason is not None
            yield event
        metrics.latency.observe(time.monotonic() - self._started)
        metrics.prompt_tokens.inc(self._num_prompt_tokens)
        metrics.cached_tokens.inc(sum(self._cached.values()))

    def usage(self) -> dict[str, Any]:
        """Return the token counts so far in OpenAI's format; prompts count once, regardless of n."""
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_tokens,
            "total_tokens": self._num_prompt_tokens + self._num_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }

    def close(self) -> None:
        """Cancel the timer, the watch of the client, and the choices that the engine still runs, if any."""
        self._timer.cancel()
        self._watch.cancel()
        self._service.worker.cancel(self)

    async def _watch_client(self, receive: Receive) -> None:
        """Wait until the client disconnects, then add an ApiError (499) to the events, which ends the request."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.events.put_nowait(ApiError(DISCONNECTED, "The client has closed the connection"))
