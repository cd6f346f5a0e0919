"""The thread that owns the engine: it takes jobs and cancellations from a queue, steps, and tells the event loop what came.

Nobody else touches the engine. What a step brings for all jobs crosses to the event loop in one call.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import queue
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import NamedTuple

from dsv3_jax.infer import Engine, SamplingParams
from dsv3_jax.infer.request import FinishReason, Request, TokenLogprobs, Update


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


class HungUp(NamedTuple):
    """The client is gone."""


class CutOff(NamedTuple):
    """The server ends now."""


class TimedOut(NamedTuple):
    """The time of a request is over."""


Event = Accepted | Refused | Failed | Progress | HungUp | CutOff | TimedOut


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
