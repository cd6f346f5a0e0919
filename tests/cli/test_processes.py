"""train.py as several real processes that meet over a socket: they train, save and continue as one process does."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

import infer
import train
from dsv3_jax.parallel.mesh import make_mesh
from tests.cli.conftest import TRAIN, Done, started
from tests.cli.processes import running

pytestmark = pytest.mark.slow

_MESH = "--mesh.fsdp", "2", "--mesh.expert", "2"
_OTHER_MESH = "--mesh.context", "2", "--mesh.tensor", "2"
_NAMES = "loss", "main_loss", "mtp_loss", "max_violation"


def _together(folder: Path, *processes: tuple[str, ...], devices: int = 2, slurm: bool = False) -> list[Done]:
    """How the processes of a run ended. Their output is short enough for the pipes."""
    with running(folder, *processes, devices=devices, slurm=slurm) as children:
        outputs = [child.communicate(timeout=300) for child in children]
        return [Done(child.returncode, *output) for child, output in zip(children, outputs, strict=True)]


def _assert_trained(outcomes: list[Done]) -> None:
    assert [done.code for done in outcomes] == [0] * len(outcomes), outcomes
    assert [done.stderr for done in outcomes] == [""] * len(outcomes)
    assert json.loads(outcomes[0].stdout.splitlines()[-1])["steps"] == 12
    assert [done.stdout for done in outcomes[1:]] == [""] * (len(outcomes) - 1)


def _assert_same(run: Path, other: Path) -> None:
    rows, expected = ([json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (run, other))
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == list(range(1, 13))
    for row, wanted in zip(rows, expected, strict=True):
        assert [row[name] for name in _NAMES] == pytest.approx([wanted[name] for name in _NAMES], abs=1e-5), row["step"]
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=5e-4), row["step"]
        assert ("heldout_loss" in row) == (row["step"] % 6 == 0)
        if "heldout_loss" in row:
            assert row["heldout_loss"] == pytest.approx(wanted["heldout_loss"], abs=2e-3), row["step"]


def _copy_up_to(step: int, run: Path, copy: Path) -> None:
    """Copies a run as it was when it had saved `step`."""
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)


@pytest.fixture(scope="module")
def two(workplace: Path) -> Path:
    arguments = (*TRAIN, "runs/two", *_MESH)
    _assert_trained(_together(workplace, arguments, arguments))
    return workplace / "runs" / "two"


def test_two_processes_train_as_one_device(straight: tuple[Path, Done], two: Path) -> None:
    _assert_same(two, straight[0])


def test_each_process_writes_its_share_of_a_checkpoint(two: Path) -> None:
    for item in "variables", "optimizer":
        shares = [two / "checkpoints" / "12" / item / f"ocdbt.process_{index}" for index in (0, 1)]
        sizes = [sum(file.stat().st_size for file in share.rglob("*") if file.is_file()) for share in shares]
        # Half of the values each; but what the store writes more than once by the way hangs on the moment (0.52 to 0.63 for
        # one of them in one run, once more than 0.7).
        assert min(sizes) > 0.15 * sum(sizes), sizes


def test_a_checkpoint_goes_from_two_processes_to_one_on_another_mesh_and_back(
    workplace: Path,
    straight: tuple[Path, Done],
    two: Path,
    called: Callable[..., Done],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_one, by_two = workplace / "runs" / "by_one", workplace / "runs" / "by_two"
    monkeypatch.setattr(train, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:4]))
    _copy_up_to(6, two, by_one)
    done = called(train.main, *TRAIN[1:], str(by_one), *_OTHER_MESH, "--checkpoint.every", "3", "--resume")
    _assert_trained([done])
    assert "continuing after step 6" in done.stdout
    _assert_same(by_one, straight[0])

    _copy_up_to(9, by_one, by_two)
    arguments = (*TRAIN, str(by_two), *_MESH, "--resume")
    outcomes = _together(workplace, arguments, arguments, slurm=True)
    _assert_trained(outcomes)
    assert "continuing after step 9" in outcomes[0].stdout
    _assert_same(by_two, straight[0])


def test_a_run_of_two_is_evaluated_and_sampled(workplace: Path, two: Path, called: Callable[..., Done]) -> None:
    done = started(workplace, "-m", "dsv3_jax.evaluate", "--checkpoint", str(two), "--text", "text/heapq.py")
    assert (done.code, done.stderr) == (0, "")
    assert 1 < json.loads(done.stdout)["bits_per_byte"] < 8
    done = called(infer.main, "--checkpoint", str(two))
    assert done.code == 0, done.stderr
    assert done.stdout.startswith("def f(")


@pytest.mark.parametrize(
    ("first", "second", "fragment"),
    [
        (("runs/two",), ("runs/two",), "runs/two already holds a run; continue it with --resume"),
        pytest.param(
            *(("runs/new", "--data.source", "absent"),) * 2, "data.source 'absent' does not exist", marks=pytest.mark.nightly
        ),
        (("runs/new", "--train.seed", "5"), ("runs/new", "--train.seed", "6"), "process 1 has train.seed 6, process 0 has 5"),
        pytest.param(
            ("runs/new",),
            ("runs/other",),
            "process 1 has run_dir 'runs/other', process 0 has 'runs/new'",
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["run directory", "text", "config", "run directories"],
)
def test_what_is_wrong_ends_all_with_the_same_line(
    workplace: Path, two: Path, first: tuple[str, ...], second: tuple[str, ...], fragment: str
) -> None:
    begun = time.perf_counter()
    outcomes = _together(workplace, *((*TRAIN, *own, *_MESH) for own in (first, second)))
    assert time.perf_counter() - begun < 60
    for done in outcomes:
        done.assert_refused(fragment)
    assert outcomes[0].stderr == outcomes[1].stderr
    assert not (workplace / "runs" / "new").exists()


def _wait_for_steps(run: Path, children: list[subprocess.Popen]) -> None:
    """Waits until three steps are logged, with every process alive."""
    until = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 3:
        assert time.monotonic() < until
        assert [child.poll() for child in children] == [None, None], [child.communicate() for child in children if child.poll()]
        time.sleep(0.1)


@pytest.mark.parametrize("dead", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_a_process_that_dies_takes_the_others_along(workplace: Path, dead: int) -> None:
    run = workplace / "runs" / f"dead_{dead}"
    endless = "--train.steps", "100000", "--train.eval-every", "0", "--checkpoint.every", "5"
    arguments = (*TRAIN, str(run), *_MESH, *endless)
    with running(workplace, arguments, arguments, devices=2) as children:
        _wait_for_steps(run, children)
        children[dead].send_signal(signal.SIGKILL)
        assert children[1 - dead].wait(timeout=120) != 0


@pytest.mark.parametrize("told", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_a_signal_to_one_process_stops_both_after_the_same_step(workplace: Path, told: int) -> None:
    run = workplace / "runs" / f"told_{told}"
    arguments = (*TRAIN, str(run), *_MESH, "--train.steps", "100000", "--train.eval-every", "0")
    with running(workplace, arguments, arguments, devices=2) as children:
        _wait_for_steps(run, children)
        children[told].send_signal(signal.SIGTERM)
        outputs = [child.communicate(timeout=120) for child in children]
        assert [child.returncode for child in children] == [0, 0], outputs
    reason = "SIGTERM" if told == 0 else "another process"
    (stopped,) = (line for line in outputs[0][0].splitlines() if "stopped after step" in line)
    assert stopped.startswith(reason)
    step = int(stopped.partition("after step ")[2].split()[0])
    assert max(int(path.name) for path in (run / "checkpoints").iterdir()) == step
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step
