"""An engine on the devices of several processes: process 0 is asked, and the others do what it does.

What the programs of an engine are given follows from the requests, their order among the steps, and the tokens that came, which
every process reads. So each process has an engine of its own, made alike, and process 0 tells what is asked of its own, call by
call; the others repeat it. What is told goes through the key-value store of `parallel/distributed.py`: a device that waits for
a request waits for nothing else, and process 0 waits for nobody.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax

from dsv3_jax.infer.engine import Engine
from dsv3_jax.infer.request import Request
from dsv3_jax.infer.sampling import SamplingParams
from dsv3_jax.parallel.distributed import forget, hear, tell

_FOLDER = "dsv3_jax/lockstep"
CALLS_OF_A_PAGE = 1000
"""Calls told under one folder of the store; it is removed when every process has read on for as many."""


@contextlib.contextmanager
def leading(engine: Engine) -> Iterator[None]:
    """On process 0: the others, in `follow`, do what this engine does until the end of the context. Alone it does nothing.

    Once a step was broken off, the others may be inside it, waiting: the engine then raises RuntimeError, and it is the end of
    this process that ends them.
    """
    if jax.process_count() == 1:
        yield
        return
    journal, before = _Journal(), engine.tell
    engine.tell = journal.note
    try:
        yield
    finally:
        if not journal.broken:
            journal.note("end")
            engine.tell = before


def follow(engine: Engine) -> None:
    """On every other process: does what process 0 does, until its `leading` ends.

    SIGTERM and Ctrl-C are left to process 0, which ends this one with itself; a second one ends it anyhow.
    """
    requests: weakref.WeakValueDictionary[int, Request] = weakref.WeakValueDictionary()  # The engine drops those that end.
    with _signals_left_to_first():
        for call, *what in _heard():
            if call == "submit":
                number, prompt, params = what
                requests[number] = engine.submit(prompt, _params(params))
            elif call == "cancel":
                engine.cancel(requests[what[0]])
            elif call == "step":
                engine.step()
            elif call == "warm_up":
                engine.warm_up()
            else:
                return


class _Journal:
    """What is asked of an engine, as the others are told."""

    def __init__(self) -> None:
        self._calls = 0
        self._numbers: weakref.WeakKeyDictionary[Request, int] = weakref.WeakKeyDictionary()
        self.broken = False

    def note(self, call: str, request: Request | None = None) -> None:
        """Tells of a call."""
        if call == "broken":
            self.broken = True
            return
        if self.broken:
            raise RuntimeError("a step was broken off, which the other processes may wait in for ever; start all of them anew")
        told: list[Any] = [call]
        if request is not None:
            told.append(self._numbers.setdefault(request, self._calls))
        if request is not None and call == "submit":
            told += [request.sequence.prompt, dataclasses.asdict(request.params)]
        page, place = divmod(self._calls, CALLS_OF_A_PAGE)
        if place == 0 and page >= 2:
            for process in range(1, jax.process_count()):
                hear(f"{_FOLDER}/{page - 2}/read/{process}")
            forget(f"{_FOLDER}/{page - 2}/")
        tell(f"{_FOLDER}/{page}/{place}", json.dumps(told))
        self._calls += 1


def _heard() -> Iterator[list[Any]]:
    calls = 0
    while True:
        page, place = divmod(calls, CALLS_OF_A_PAGE)
        yield json.loads(hear(f"{_FOLDER}/{page}/{place}"))
        calls += 1
        if place == CALLS_OF_A_PAGE - 1:
            tell(f"{_FOLDER}/{page}/read/{jax.process_index()}", "")


def _params(values: dict[str, Any]) -> SamplingParams:
    """What `dataclasses.asdict` and JSON have made of them: its keys are texts."""
    return SamplingParams(**values | {"logit_bias": {int(token): bias for token, bias in values["logit_bias"].items()}})


@contextlib.contextmanager
def _signals_left_to_first() -> Iterator[None]:
    def note(number: int, _: FrameType | None) -> None:
        signal.signal(number, before[number])
        print(f"{signal.Signals(number).name}: process 0 ends this one; again ends it now", file=sys.stderr, flush=True)

    before = {int(number): signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
