"""benchmarks/gpu_suite.py from end to end at toy sizes, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parent.parent / "benchmarks" / "gpu_suite.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, str(SUITE), *arguments], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.slow
def test_the_suite_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    first = run("--toy", "--out", str(out), "--only", "ceilings", "--only", "attention")
    assert first.returncode == 0, first.stderr
    kept = out.read_text()
    assert [json.loads(line)["row"] for line in kept.splitlines()][:2] == ["dense product", "copy"]

    # As a stop in the middle of a line leaves it.
    out.write_text(kept + kept.splitlines()[0][:40])
    second = run("--toy", "--out", str(out))
    assert second.returncode == 0, second.stderr
    measured = [json.loads(line) for line in second.stdout.splitlines() if line.startswith("{")]
    names = [row["row"] for row in measured]
    assert not set(names) & {json.loads(line)["row"] for line in kept.splitlines()}, "measured again"
    assert {name.split(":")[0] for name in names} == {"experts", "cache", "training step", "decoding"}
    assert all(row["correct"] for row in measured if "correct" in row)
    assert any(row.get("of_dense", 0) > 0 for row in measured)
    assert second.stdout.count("\n| ") >= len(names) + len(kept.splitlines())

    third = run("--toy", "--out", str(out))
    assert third.returncode == 0, third.stderr
    assert not any(line.startswith("{") for line in third.stdout.splitlines())


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = run("--out", str(tmp_path / "rows.jsonl"))
    assert result.returncode == 2
    assert result.stderr.startswith("error: JAX runs on cpu here; the suite measures a GPU, and --toy runs it anywhere")
