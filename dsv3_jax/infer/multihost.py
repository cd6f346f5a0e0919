"""An engine on the devices of several processes: process 0 takes the requests, and the others repeat the calls of its engine.

The inputs of an engine's programs follow from the requests, their order among the steps, and the tokens produced, which every
process reads. So each process has an equal engine of its own; process 0 sends every call of its engine through the key-value
store of `parallel/multihost.py`, and the others repeat it. No device is occupied while they wait for a request.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
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
"""Calls in one folder of the store. Process 0 begins folder n only after all have read n - 2, which it then deletes."""
_FOLDER = "dsv3_jax/lockstep"
_POLL_MILLISECONDS = 3_600_000


@contextlib.contextmanager
def leader(engine: Engine) -> Iterator[None]:
    """On process 0: send the calls of `engine` to the `follower`s until the context ends. With one process, do nothing.

    An error within the context also ends the followers, one of `OF_INPUT` as a ValueError with its message. After an
    interrupted step, in which they may wait, every call of the engine raises RuntimeError; they end with this process.
    """
    if jax.process_count() == 1:
        yield
        return
    log, before = _CommandLog(engine), engine.tell
    engine.tell, engine.digest = log.record, 0
    try:
        yield
    except OF_INPUT as error:
        log.end(str(error))
        raise
    finally:
        log.end()
        if not log.broken:
            engine.tell = before


def follower(engine: Engine) -> None:
    """On every other process: repeat the calls of process 0 until its `leader` ends.

    SIGTERM and Ctrl-C are ignored: launchers send them to all processes, often twice, and the end of process 0 ends this one.

    Raises:
      ValueError: if an error of `OF_INPUT` ended the `leader`, or one of its steps was interrupted.
      RuntimeError: if the tokens here differ from those of process 0.
    """
    requests: weakref.WeakValueDictionary[int, Request] = weakref.WeakValueDictionary()  # The engine drops finished ones.
    engine.digest = 0
    with _ignored_signals():
        for call, digest, *arguments in _calls():
            if call == "end":
                if arguments:
                    raise ValueError(arguments[0])
                return
            if digest != engine.digest:
                raise RuntimeError(
                    f"process {jax.process_index()} has come to other tokens than process 0; give all hosts the same "
                    "checkpoint, and devices of one kind"
                )
            if call == "submit":
                number, prompt, params = arguments
                requests[number] = engine.submit(prompt, _params(params))
            elif call == "cancel":
                engine.cancel(requests[arguments[0]])
            elif call == "step":
                engine.step()
            else:
                engine.warm_up()


class _CommandLog:
    """Writer of the calls of process 0's engine to the key-value store, where the followers read them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._num_calls = 0
        self._numbers: weakref.WeakKeyDictionary[Request, int] = weakref.WeakKeyDictionary()
        self.broken = self._ended = False

    def record(self, call: str, request: Request | None = None) -> None:
        """Write one call for the followers to repeat; "broken" ends them instead, and each later call raises RuntimeError."""
        if call == "broken":
            self.end("process 0 broke off a step, see its error; start all processes again")
            self.broken = True
            return
        if self.broken:
            raise RuntimeError("an earlier call was interrupted, and other processes may wait in it; start all of them again")
        arguments: list[Any] = []
        if request is not None:
            arguments.append(self._numbers.setdefault(request, self._num_calls))
        if request is not None and call == "submit":
            arguments += [request.sequence.prompt, dataclasses.asdict(request.params)]
        try:
            self._write([call, self._engine.digest, *arguments])
        except BaseException:  # The followers may or may not have received it.
            self.broken = True
            raise

    def end(self, error: str | None = None) -> None:
        """Write the end of the calls, and the error that followers raise, if any. Does nothing after an end or a "broken"."""
        if not self.broken and not self._ended:
            self._ended = True
            self._write(["end", 0] if error is None else ["end", 0, error])

    def _write(self, call: list[Any]) -> None:
        page, i = divmod(self._num_calls, CALLS_OF_A_PAGE)
        if i == 0 and page >= 2:
            for process in range(1, jax.process_count()):
                kv_get(f"{_FOLDER}/{page - 2}/read/{process}")
            kv_delete(f"{_FOLDER}/{page - 2}/")
        kv_set(f"{_FOLDER}/{page}/{i}", json.dumps(call))
        self._num_calls += 1


def _calls() -> Iterator[list[Any]]:
    """Yield the calls that a `_CommandLog` writes, waiting for each, without end; mark each full folder as read."""
    for page in itertools.count():
        for i in range(CALLS_OF_A_PAGE):
            yield json.loads(kv_get(f"{_FOLDER}/{page}/{i}", _POLL_MILLISECONDS))
        kv_set(f"{_FOLDER}/{page}/read/{jax.process_index()}", "")


def _params(values: dict[str, Any]) -> SamplingParams:
    """Return the parameters from their fields as read from JSON: the keys of logit_bias become integers again."""
    return SamplingParams(**values | {"logit_bias": {int(token): bias for token, bias in values["logit_bias"].items()}})


@contextlib.contextmanager
def _ignored_signals() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
