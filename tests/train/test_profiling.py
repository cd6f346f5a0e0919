"""Traces of chosen steps, and which steps can be chosen."""

from __future__ import annotations

import gzip
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src import profiler as jax_profiler

from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.train.profiling import StepProfiler, profiled_steps


@pytest.mark.parametrize(("spec", "steps"), [("10:13", [10, 11, 12]), ("1:2", [1]), ("20:21", [20]), (None, [])])
def test_the_second_number_is_the_step_after_the_last(spec: str | None, steps: list[int]) -> None:
    assert list(profiled_steps(spec, steps=20)) == steps


@pytest.mark.parametrize(
    ("spec", "done", "message"),
    [
        ("x", 0, "--profile is 'x'; write the first step and the one after the last, such as 10:13"),
        ("10", 0, "such as 10:13"),
        ("10:", 0, "such as 10:13"),
        ("10-13", 0, "such as 10:13"),
        ("-1:3", 0, "such as 10:13"),
        ("1:2:3", 0, "such as 10:13"),
        ("13:10", 0, "--profile is '13:10', which holds no step; the second number is the step after the last"),
        ("10:10", 0, "which holds no step"),
        ("0:3", 0, "--profile is '0:3'; its steps must lie in 1..20"),
        ("19:22", 0, r"--profile is '19:22'; its steps must lie in 1..20 \(train.steps\), as 20:21 does"),
    ],
)
def test_what_cannot_be_traced_is_refused(spec: str, done: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        profiled_steps(spec, steps=20, done=done)
    assert "\n" not in str(refused.value)


@pytest.fixture
def run(tmp_path: pathlib.Path) -> RunDirectory:
    return RunDirectory(str(tmp_path / "run"))


step = jax.jit(lambda x: x @ x / 2)


def loop(profiler: StepProfiler, first: int, last: int, fail_at: int | None = None) -> list[bool]:
    """Takes steps; whether a trace ran during each."""
    state, tracing = jnp.eye(64), []
    for number in range(first, last + 1):
        profiler.before(number)
        tracing.append(is_tracing())
        state = step(state)
        if number == fail_at:
            raise RuntimeError("the loop broke")
        profiler.after(number, state)
    return tracing


def is_tracing() -> bool:
    return jax_profiler._profile_state.profile_session is not None


def traced_steps(run: RunDirectory) -> list[set[int]]:
    """The numbers of the steps in every trace of the run."""
    found = []
    for file in pathlib.Path(run.profile).rglob("*.trace.json.gz"):
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        found.append({int(event["args"]["step_num"]) for event in events if event.get("name") == "train"})
    return found


def test_the_steps_and_no_others_are_traced(run: RunDirectory) -> None:
    said: list[str] = []
    with StepProfiler(run, profiled_steps("3:5", steps=6), say=said.append) as profiler:
        assert loop(profiler, 1, 6) == [False, False, True, True, False, False]
    assert traced_steps(run) == [{3, 4}]
    # Where XProf looks for it.
    assert list(pathlib.Path(run.profile).glob("plugins/profile/*/*.xplane.pb"))
    (line,) = said
    assert line.startswith(f"steps 3 to 4 traced in {run.profile};")
    assert line.endswith(f"xprof --port 8791 {run.profile}")


def test_the_first_step_of_a_start_can_be_traced(run: RunDirectory) -> None:
    with StepProfiler(run, profiled_steps("8:9", steps=9, done=7)) as profiler:
        assert loop(profiler, 8, 9) == [True, False]
    assert traced_steps(run) == [{8}]


@pytest.mark.parametrize("fail_at", [3, 4, 5])
def test_a_loop_that_breaks_leaves_no_trace_running(run: RunDirectory, fail_at: int) -> None:
    with pytest.raises(RuntimeError, match="the loop broke"):
        with StepProfiler(run, profiled_steps("4:6", steps=9)) as profiler:
            loop(profiler, 1, 9, fail_at)
    assert not is_tracing()
    # What it has seen until then is kept.
    assert traced_steps(run) == ([set(range(4, fail_at + 1))] if fail_at >= 4 else [])


def test_a_run_that_stops_early_keeps_what_was_traced(run: RunDirectory) -> None:
    with StepProfiler(run, profiled_steps("2:9", steps=9)) as profiler:
        loop(profiler, 1, 3)
    assert not is_tracing()
    assert traced_steps(run) == [{2, 3}]


def test_without_steps_and_on_other_processes_nothing_happens(run: RunDirectory) -> None:
    for profiler in (StepProfiler(run, range(0)), StepProfiler(run, range(1, 3), traces=False)):
        with profiler:
            assert loop(profiler, 1, 3) == [False] * 3
    assert not run.profile.exists()


def test_a_full_disk_does_not_end_the_run(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    said: list[str] = []
    monkeypatch.setattr(type(run.path), "write_bytes", fail)
    with StepProfiler(run, range(1, 2), say=said.append) as profiler:
        loop(profiler, 1, 2)
    assert said == ["warning: the trace of step 1 could not be written (No space left on device); the run goes on"]
