"""What can happen to a run in weeks, done to one: each time the message, the exit code, and what is left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import train
from dsv3_jax.checkpoint.run import load_run
from dsv3_jax.data import prepare
from tests.cli.conftest import ENDLESS, TRAIN, Done, started_for_long

pytestmark = pytest.mark.slow
PATIENCE = 200


def waited_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def newest(run: Path) -> int:
    folder = run / "checkpoints"
    return max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0) if folder.exists() else 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_fails_saves_and_no_run(workplace: Path, small_disk: Path) -> None:
    run, filler = small_disk / "run", small_disk / "filler"
    child = started_for_long(
        workplace, str(run), "--checkpoint.every", "20", "--checkpoint.keep", "1", "--train.log-every", "10"
    )
    waited_for(lambda: newest(run))
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(2**12)):
            pass
    good = newest(run)
    time.sleep(5)  # Saves fail meanwhile, and so does what is logged.
    assert child.poll() is None
    assert newest(run) <= good + 20
    load_run(str(run))
    filler.unlink()
    good = newest(run)
    waited_for(lambda: newest(run) > good)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 0, err
    assert "stopped after step" in out
    assert re.search(
        r"step \d+ could not be saved \(No space left on device\); the newest checkpoint is of step \d+; the run", err
    )
    assert "saving works again" in err
    logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step for step in logged if step % 10 == 0] == list(range(10, logged[-1] + 1, 10))
    assert load_run(str(run))[2] == logged[-1] > good


def test_a_signal_inside_a_save_leaves_it_whole_and_says_how_to_go_on(workplace: Path, called: Callable[..., Done]) -> None:
    """And before it a second start in the folder, which is refused and harms nothing."""
    run = workplace / "runs" / "signalled"
    child = started_for_long(workplace, "signalled", "--checkpoint.every", "10")
    second = called(train.main, *TRAIN[1:], "runs/signalled", *ENDLESS, "--resume")
    second.assert_refused("runs/signalled is being trained in by process", "name another --run-dir")
    waited_for(lambda: any(path.name[0].isdigit() and "tmp" in path.name for path in (run / "checkpoints").iterdir()))
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=PATIENCE)
    assert (child.returncode, err) == (0, "")
    found = re.search(r"SIGINT: stopped after step (\d+) of 100000, saved; go on with: python (.*)", out)
    assert found, out
    step = int(found[1])
    assert load_run(str(run))[2] == step
    assert not [path for path in (run / "checkpoints").iterdir() if "tmp" in path.name]

    program, *arguments = shlex.split(found[2])
    assert program == TRAIN[0]
    done = called(train.main, *arguments, "--train.steps", str(step + 2))
    assert done.code == 0, done.stderr
    assert f"continuing after step {step} of {step + 2}" in done.stdout
    logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(1, step + 3))


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    straight: tuple[Path, Done], called: Callable[..., Done], workplace: Path
) -> None:
    run = workplace / "runs" / "damaged_newest"
    shutil.copytree(straight[0], run)
    largest = max((run / "checkpoints" / "12" / "variables").rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    done = called(train.main, *TRAIN[1:], "runs/damaged_newest", "--resume")
    assert done.code == 0, done.stderr
    assert "continuing after step 6 of 12" in done.stdout
    assert done.stderr.count("\n") == 1
    assert "checkpoints/12 is damaged" in done.stderr
    assert "step 6 is used instead, and it is now 12.damaged" in done.stderr
    before, after = (json.loads((path / "summary.json").read_text()) for path in (straight[0], run))
    assert after["final_loss"] == before["final_loss"]
    assert (run / "checkpoints" / "12.damaged").is_dir()
    assert load_run(str(run))[2] == 12


def test_text_that_disappears_ends_the_run_by_its_name(
    workplace: Path, straight: tuple[Path, Done], called: Callable[..., Done]
) -> None:
    prepared = workplace / "prepared"
    tokenizer = str(straight[0] / "tokenizer.json")
    flags = "--source", "text", "--tokenizer", tokenizer, "--output", "prepared", "--heldout-fraction", "0.2"
    done = called(prepare.main, *flags)
    assert done.code == 0, done.stderr
    child = started_for_long(workplace, "vanishing", "--data.source", "prepared", "--checkpoint.every", "10")
    run = workplace / "runs" / "vanishing"
    waited_for(lambda: newest(run))
    for shard in prepared.rglob("*.npy"):
        shard.unlink()
    _, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 2, err
    assert err.startswith("error: "), err
    assert "prepared" in err
    assert err.count("\n") == 1
    assert load_run(str(run))[2] == newest(run) > 0
