"""An engine on the devices of several processes: process 0 is asked, and the others do what it does.

What the programs of an engine are given follows from the requests, their order among the steps, and the tokens that came, which
every process reads. So each process has an engine of its own, made alike, and process 0 tells what is asked of its own, call by
call; the others repeat it. What is told goes through the key-value store of `parallel/multihost.py`: a device that waits for
a request is not occupied, and process 0 waits for the others' devices only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import weakref
from collections.abc import Iterator
from typing import Any

import jax

from dsv3_jax.infer.engine import Engine
from dsv3_jax.infer.request import Request
from dsv3_jax.infer.sampling import SamplingParams
from dsv3_jax.parallel.multihost import OF_INPUT, kv_delete, kv_get, kv_set

CALLS_OF_A_PAGE = 1000
"""Calls told under one folder of the store; it is removed when every process has read on for as many."""
_FOLDER = "dsv3_jax/lockstep"
_POLL_MILLISECONDS = 3_600_000


@contextlib.contextmanager
def leader(engine: Engine) -> Iterator[None]:
    """On process 0: the others, in `follower`, do what this engine does until the end of the context. Alone it does nothing.

    What is raised within ends them too, an error of input in the same line. Once a step was broken off, the others may be
    inside it, waiting: the engine then raises RuntimeError whatever it is asked, and the end of this process ends them.
    """
    if jax.process_count() == 1:
        yield
        return
    journal, before = _CommandLog(engine), engine.tell
    engine.tell, engine.digest = journal.note, 0
    try:
        yield
    except OF_INPUT as error:
        journal.end(str(error))
        raise
    finally:
        journal.end()
        if not journal.broken:
            engine.tell = before


def follower(engine: Engine) -> None:
    """On every other process: does what process 0 does, until its `leader` ends.

    SIGTERM and Ctrl-C are left to process 0, whose end ends this one; whoever stops all of them sends them to all, often twice.

    Raises:
      ValueError: if process 0 was ended by an error, or broke off a step.
      RuntimeError: if the tokens here are not those of process 0.
    """
    requests: weakref.WeakValueDictionary[int, Request] = weakref.WeakValueDictionary()  # The engine drops those that end.
    engine.digest = 0
    with _signals_left_to_first():
        for call, digest, *what in _heard():
            if call == "end":
                if what:
                    raise ValueError(what[0])
                return
            if digest != engine.digest:
                raise RuntimeError(
                    f"process {jax.process_index()} has come to other tokens than process 0; give all hosts the same "
                    "checkpoint, and devices of one kind"
                )
            if call == "submit":
                number, prompt, params = what
                requests[number] = engine.submit(prompt, _params(params))
            elif call == "cancel":
                engine.cancel(requests[what[0]])
            elif call == "step":
                engine.step()
            else:
                engine.warm_up()


class _CommandLog:
    """What is asked of an engine, as the others are told."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._calls = 0
        self._numbers: weakref.WeakKeyDictionary[Request, int] = weakref.WeakKeyDictionary()
        self.broken = self._ended = False

    def note(self, call: str, request: Request | None = None) -> None:
        """Tells of a call; "broken" is that the one before was broken off."""
        if call == "broken":
            self.end("process 0 broke off a step")
            self.broken = True
            return
        if self.broken:
            raise RuntimeError("a step was broken off, which the other processes may wait in for ever; start all of them anew")
        told: list[Any] = [call, self._engine.digest]
        if request is not None:
            told.append(self._numbers.setdefault(request, self._calls))
        if request is not None and call == "submit":
            told += [request.sequence.prompt, dataclasses.asdict(request.params)]
        try:
            self._tell(told)
        except BaseException:  # Whether it was told cannot be known.
            self.broken = True
            raise

    def end(self, error: str | None = None) -> None:
        """Tells that nothing more will come, and why if that is an error; only once."""
        if not self.broken and not self._ended:
            self._ended = True
            self._tell(["end", 0, *([] if error is None else [error])])

    def _tell(self, told: list[Any]) -> None:
        page, place = divmod(self._calls, CALLS_OF_A_PAGE)
        if place == 0 and page >= 2:
            for process in range(1, jax.process_count()):
                kv_get(f"{_FOLDER}/{page - 2}/read/{process}")
            kv_delete(f"{_FOLDER}/{page - 2}/")
        kv_set(f"{_FOLDER}/{page}/{place}", json.dumps(told))
        self._calls += 1


def _heard() -> Iterator[list[Any]]:
    calls = 0
    while True:
        page, place = divmod(calls, CALLS_OF_A_PAGE)
        yield json.loads(kv_get(f"{_FOLDER}/{page}/{place}", _POLL_MILLISECONDS))
        calls += 1
        if place == CALLS_OF_A_PAGE - 1:
            kv_set(f"{_FOLDER}/{page}/read/{jax.process_index()}", "")


def _params(values: dict[str, Any]) -> SamplingParams:
    """What `dataclasses.asdict` and JSON have made of them: its keys are texts."""
    return SamplingParams(**values | {"logit_bias": {int(token): bias for token, bias in values["logit_bias"].items()}})


@contextlib.contextmanager
def _signals_left_to_first() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
