"""Runs that are killed with SIGKILL again and again, and resumed each time, end as the run that never was: to the last bit.

A kill counts if it lands between two checkpoints (steps were logged after the newest) or inside a save (the folder of one
that was not finished is left). `DSV3_JAX_KILLS=20 pytest -m "slow or nightly" tests/slow/test_kills.py -s` makes 20 in a
run, on eight devices too, and prints the counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest

from dsv3_jax.checkpoint.run import Checkpoints
from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import MeshConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.train.start import init_or_restore
from tests.cli.conftest import TRAIN
from tests.cli.processes import running

pytestmark = pytest.mark.slow

RUN = "--model.num-nextn-predict-layers", "0", "--train.eval-every", "90", "--checkpoint.keep", "3", "--resume"
ON_TWO = "--mesh.expert", "2"
ON_EIGHT = "--mesh.fsdp", "2", "--mesh.expert", "4", "--model.q-lora-rank", "16", "--train.batch-size", "8"
TIMED = "tokens_per_second", "input_wait", "model_flops_per_second"
PATIENCE = 240
KILLS = int(os.environ.get("DSV3_JAX_KILLS", "2"))


def checkpoints_of(run: Path) -> tuple[list[int], bool]:
    """The steps of the complete checkpoints, and whether one is being written (or was when its process died)."""
    folder = run / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isdigit()), any(name[0].isdigit() and "tmp" in name for name in names)


def logged(run: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl, without what differs by speed."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [{name: value for name, value in json.loads(line).items() if name not in TIMED} for line in lines]


def last_step(run: Path) -> int:
    """The step of the last complete line."""
    with (run / "metrics.jsonl").open("rb") as file:
        file.seek(max(file.seek(0, 2) - 4096, 0))
        lines = file.read().split(b"\n")
    return json.loads(lines[-2])["step"] if len(lines) > 2 else 0


class Killing:
    """One run, killed over and over."""

    def __init__(
        self, workplace: Path, name: str, arguments: tuple[str, ...], *, processes: int, devices: int, steps: int, every: int
    ) -> None:
        self.run = workplace / "runs" / name
        self._workplace = workplace
        self._command = (
            *TRAIN,
            f"runs/{name}",
            *RUN,
            *arguments,
            "--train.steps",
            str(steps),
            "--checkpoint.every",
            str(every),
        )
        self._processes, self._devices = processes, devices
        self.between = self.inside = self.missed = 0
        self.resumed_after: list[int] = []

    @contextlib.contextmanager
    def started(self) -> Iterator[list[subprocess.Popen]]:
        with running(self._workplace, *[self._command] * self._processes, devices=self._devices) as children:
            yield children

    def kill(self, victim: int, in_save: bool) -> None:
        """Starts the run, waits for a checkpoint that it makes, and kills it when the moment has come."""
        before = max(checkpoints_of(self.run)[0], default=0)
        with self.started() as children:
            deadline = time.monotonic() + PATIENCE
            while not self._the_moment(before, in_save):
                assert all(child.poll() is None for child in children), [child.communicate() for child in children]
                assert time.monotonic() < deadline, f"no moment to kill came in {PATIENCE} s"
                time.sleep(0.001)
            children[victim].send_signal(signal.SIGKILL)
            for child in children:  # None that is left alone goes on.
                assert child.wait(timeout=PATIENCE) != 0
            outputs = [child.communicate(timeout=PATIENCE) for child in children]
        steps, unfinished = checkpoints_of(self.run)
        if unfinished:
            self.inside += 1
        elif max(row["step"] for row in logged(self.run)) > steps[-1]:
            self.between += 1
        else:
            self.missed += 1
        self._note(outputs[0][0], before)

    def finish(self) -> None:
        """Resumes the run for the last time."""
        with self.started() as children:
            outputs = [child.communicate(timeout=PATIENCE) for child in children]
            assert [child.returncode for child in children] == [0] * len(children), outputs
        self._note(outputs[0][0], 0)

    def _the_moment(self, before: int, in_save: bool) -> bool:
        steps, saving = checkpoints_of(self.run)
        if max(steps, default=0) <= before:
            return False
        if in_save:
            return saving
        return not saving and last_step(self.run) > steps[-1] + 3

    def _note(self, stdout: str, before: int) -> None:
        found = re.search(r"continuing after step (\d+)", stdout)
        if before or found:
            assert found, stdout
            self.resumed_after.append(int(found[1]))


def final_state(run: Path, steps: int) -> Any:
    """Everything in the last checkpoint."""
    directory = RunDirectory.existing(str(run))
    config = directory.config()
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    with Checkpoints(directory) as checkpoints:
        state, saved = init_or_restore(config, one, checkpoints)
    assert saved is not None
    assert saved.record.step == steps
    return jax.tree.map(np.asarray, state)


@pytest.mark.parametrize(
    ("name", "arguments", "how", "kills"),
    [
        ("one_device", (), {"processes": 1, "devices": 1, "every": 20}, KILLS),
        pytest.param(
            *("eight_devices", ON_EIGHT, {"processes": 1, "devices": 8, "every": 20}, KILLS), marks=pytest.mark.nightly
        ),
        # That a process takes the other along, and that two continue, tests/cli/test_processes.py has as well.
        pytest.param(
            *("two_processes", ON_TWO, {"processes": 2, "devices": 1, "every": 10}, (KILLS + 3) // 4), marks=pytest.mark.nightly
        ),
    ],
)
def test_a_run_killed_again_and_again_is_the_run_never_killed(
    workplace: Path, name: str, arguments: tuple[str, ...], how: dict[str, int], kills: int
) -> None:
    how, inside = how | {"steps": how["every"] * (kills + 7)}, (kills + 3) // 4
    unbroken = Killing(workplace, f"unbroken_{name}", arguments, **how)
    unbroken.finish()
    killed = Killing(workplace, f"killed_{name}", arguments, **how)
    turns = 0
    while killed.between + killed.inside < kills or killed.inside < inside:
        assert turns < 2 * kills + 2, (killed.between, killed.inside, killed.missed)
        killed.kill(victim=(turns + 1) % how["processes"], in_save=turns % 2 == 0)
        turns += 1
    killed.finish()

    print(
        f"\n{name}: {killed.between} kills between two checkpoints, {killed.inside} inside a save, {killed.missed} that do not "
        f"count; resumed after steps {killed.resumed_after}"
    )
    assert len(killed.resumed_after) == turns
    assert min(killed.resumed_after) > 0
    rows, expected = logged(killed.run), logged(unbroken.run)
    assert [row["step"] for row in rows] == list(range(1, how["steps"] + 1))
    for row, wanted in zip(rows, expected, strict=True):
        assert row == wanted
    states = (final_state(run.run, how["steps"]) for run in (killed, unbroken))
    chex.assert_trees_all_equal(*states)
