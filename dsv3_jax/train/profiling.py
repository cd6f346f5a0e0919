"""A trace of chosen steps, for XProf: what the devices and the host did, and when."""

from __future__ import annotations

import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from dsv3_jax.checkpoint.run_directory import RunDirectory


def profiled_steps(spec: str | None, *, steps: int, done: int = 0) -> range:
    """The steps that `--profile` names, counted from 1: "10:13" is steps 10, 11 and 12; None is none.

    Args:
      spec: what the user wrote.
      steps: of the run.
      done: steps that were taken before this start, and are left out.

    Raises:
      ValueError: if it is of another form, names no step, or steps beyond the end of the run.
    """
    if spec is None:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", spec, re.ASCII)
    if match is None:
        raise ValueError(f"--profile is {spec!r}; write the first step and the one after the last, such as 10:13")
    first, end = map(int, match.groups())
    if first >= end:
        raise ValueError(f"--profile is {spec!r}, which holds no step; the second number is the step after the last")
    if first < 1 or end - 1 > steps:
        raise ValueError(f"--profile is {spec!r}; its steps must lie in 1..{steps} (train.steps), as {steps}:{steps + 1} does")
    return range(max(first, done + 1), end)


class StepProfiler:
    """Traces the given steps into the run's `profile/`; a context manager, which leaves no trace running.

    Of many processes only the first traces, and it sees its own devices alone: all run one program, and one that is late shows
    in how long the others wait for it in their collectives. Where a trace cannot be written, the run goes on without it.
    """

    def __init__(self, run: RunDirectory, steps: range, *, traces: bool = True, say: Callable[[str], None] = print) -> None:
        """Args: steps: from `profiled_steps`; traces: whether this process does; say: prints a line."""
        self._run = run
        self._steps = steps if traces else range(0)
        self._say = say
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._annotation: Any = None

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:  # The loop did not come to the last of the steps; it says why itself.
            self._stop()

    def before(self, step: int) -> None:
        """To be called before a step is dispatched."""
        if step not in self._steps:
            return
        if step == self._steps[0]:
            # By way of a local folder: what writes the trace knows nothing of object stores.
            try:
                self._folder = tempfile.TemporaryDirectory(prefix="profile-")
                jax.profiler.start_trace(self._folder.name)
            except (OSError, jax.errors.JaxRuntimeError) as error:
                self._say(f"warning: {self._named} cannot be traced: {error}")
                self._steps, self._folder = range(0), None
                return
        self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._annotation.__enter__()

    def after(self, step: int, state: Any) -> None:
        """To be called with the step's results, which may still be on their way."""
        if step + 1 in self._steps and step not in self._steps:
            jax.block_until_ready(state)  # The trace is to hold no step before its first.
        if step not in self._steps:
            return
        self._annotation.__exit__(None, None, None)
        self._annotation = None
        if step == self._steps[-1]:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None
        folder, self._folder = self._folder, None
        assert folder is not None
        with folder:
            try:
                jax.profiler.stop_trace()
                self._keep(pathlib.Path(folder.name))
            except (OSError, jax.errors.JaxRuntimeError) as error:
                self._say(f"warning: the trace of {self._named} could not be written: {error}")
                return
        self._say(
            f"{self._named} traced in {self._run.profile}; to look at it: pip install xprof, "
            f"xprof --port 8791 {self._run.profile}"
        )

    @property
    def _named(self) -> str:
        first, last = self._steps[0], self._steps[-1]
        return f"step {first}" if first == last else f"steps {first} to {last}"

    def _keep(self, folder: pathlib.Path) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                target = self._run.profile / file.relative_to(folder).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
