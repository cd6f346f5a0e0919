"""Profiler traces of chosen steps, for XProf."""

from __future__ import annotations

import contextlib
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config.checks import check


def profiled_steps(spec: str | None, *, steps: int, done: int = 0) -> range:
    """Return the steps of `--profile`, counted from 1: "10:13" is steps 10, 11 and 12; None is none.

    `done` steps were taken before this start, and are left out.

    Raises:
      ValueError: if it is of another form, names no step, or steps outside 1..steps.
    """
    if spec is None:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", spec, re.ASCII)
    if match is None:
        raise ValueError(f"--profile is {spec!r}; write the first step and the one after the last, such as 10:13")
    first, end = map(int, match.groups())
    check(first < end, f"--profile is {spec!r}, which holds no step; the second number is the step after the last")
    remedy = f"its steps must lie in 1..{steps} (train.steps), as {steps}:{steps + 1} does"
    check(first >= 1 and end - 1 <= steps, f"--profile is {spec!r}; {remedy}")
    return range(max(first, done + 1), end)


class StepProfiler(contextlib.ExitStack):
    """Trace of the given steps into the run's `profile/`; a context manager, which leaves no trace running.

    Only the first process traces, and only its own devices: all run one program, and a late process shows in the time that
    collectives wait for it. If a trace cannot be written, the run goes on without it.
    """

    def __init__(self, run: RunDirectory, steps: range, *, traces: bool = True, say: Callable[[str], None] = print) -> None:
        """Args: steps: from `profiled_steps`; traces: True in the process that traces; say: prints a line."""
        super().__init__()
        self._target = run.profile
        self._steps = steps if traces else range(0)
        self._say = say
        self._annotation: Any = None

    def before(self, step: int) -> None:
        """Before a step is dispatched: start the trace if it is the first of `steps`, and mark each of `steps` in the trace."""
        if step not in self._steps:
            return
        if step == self._steps[0]:
            # A local folder first: the profiler cannot write to object stores.
            try:
                folder = self.enter_context(tempfile.TemporaryDirectory(prefix="profile-"))
                jax.profiler.start_trace(folder)
            except (OSError, jax.errors.JaxRuntimeError) as error:
                self._say(f"warning: {self._named} cannot be traced ({error}); the run goes on without a trace")
                self._steps = range(0)
                return
            self.callback(self._stop, pathlib.Path(folder))
        self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._annotation.__enter__()

    def after(self, step: int, state: Any) -> None:
        """After a dispatch: wait for its `state` before the first and after the last of `steps`, then write the trace."""
        if step + 1 in self._steps and step not in self._steps:
            jax.block_until_ready(state)  # The trace must not contain an earlier step.
        if step not in self._steps:
            return
        self._end_step()
        if step == self._steps[-1]:
            jax.block_until_ready(state)
            self.close()

    def _end_step(self) -> None:
        annotation, self._annotation = self._annotation, None
        if annotation is not None:
            annotation.__exit__(None, None, None)

    def _stop(self, folder: pathlib.Path) -> None:
        self._end_step()  # The loop may have ended within a step.
        try:
            jax.profiler.stop_trace()
            for file in folder.rglob("*"):
                if file.is_file():
                    copy = self._target / file.relative_to(folder).as_posix()
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_bytes(file.read_bytes())
        except (OSError, jax.errors.JaxRuntimeError) as error:
            self._say(f"warning: the trace of {self._named} could not be written ({error}); the run goes on")
            return
        remedy = f"to look at it: pip install xprof, xprof --port 8791 {self._target}"
        self._say(f"{self._named} traced in {self._target}; {remedy}")

    @property
    def _named(self) -> str:
        first, last = self._steps[0], self._steps[-1]
        return f"step {first}" if first == last else f"steps {first} to {last}"
