"""benchmarks/gpu_suite.py from end to end at toy sizes, on a CPU."""

from __future__ import annotations

import functools
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import ROOT, Done, in_this_process, plain_environment

SUITE = str(ROOT / "benchmarks" / "gpu_suite.py")


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Starts the suite in this process."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # As the suite sets it.

    def call(*arguments: str) -> Done:
        with in_this_process(tmp_path) as call:
            return call(functools.partial(runpy.run_path, SUITE, run_name="__main__"), *arguments)

    return call


@pytest.mark.slow
def test_the_suite_runs_and_goes_on_where_it_stopped(tmp_path: Path, called: Callable[..., Done]) -> None:
    out = tmp_path / "rows.jsonl"
    first = called("--toy", "--out", str(out), "--only", "ceilings")
    assert first.code == 0, first.stderr
    kept = out.read_text()
    assert [json.loads(line)["row"] for line in kept.splitlines()] == ["dense product", "copy"]

    # As a stop in the middle of a line leaves it.
    out.write_text(kept + kept.splitlines()[0][:40])
    command = [sys.executable, SUITE, "--toy", "--out", str(out)]
    second = subprocess.run(command, capture_output=True, text=True, env=plain_environment(), check=False)
    assert second.returncode == 0, second.stderr
    measured = [json.loads(line) for line in second.stdout.splitlines() if line.startswith("{")]
    names = [row["row"] for row in measured]
    assert not set(names) & {json.loads(line)["row"] for line in kept.splitlines()}, "measured again"
    assert {name.split(":")[0] for name in names} == {"attention", "experts", "cache", "training step", "decoding"}
    assert all(row["correct"] for row in measured if "correct" in row)
    assert any(row.get("of_dense", 0) > 0 for row in measured)
    assert second.stdout.count("\n| ") >= len(names) + len(kept.splitlines())

    third = called("--toy", "--out", str(out), "--only", "decoding")
    assert third.code == 0, third.stderr
    assert not any(line.startswith("{") for line in third.stdout.splitlines())


def test_without_a_gpu_it_says_so(tmp_path: Path, called: Callable[..., Done]) -> None:
    result = called("--out", str(tmp_path / "rows.jsonl"))
    assert result.code == 2
    assert result.stderr.startswith("error: JAX runs on cpu here; the suite measures a GPU, and --toy runs it anywhere")
