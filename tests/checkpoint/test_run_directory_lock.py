"""Two runs in one folder: the second is refused by the name of the first, which may end in any way."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import Config
from tests.checkpoint.tiny import contents

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import Config
run = RunDirectory.create_or_resume(sys.argv[1], Config(), resume=True)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that trains in tmp_path/run."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        yield child
        child.kill()


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path, holder: subprocess.Popen) -> None:
    path = tmp_path / "run"
    before = contents(path)
    message = rf"{path} is being trained in by process {holder.pid} on {socket.gethostname()}; wait until it has ended, or name"
    with pytest.raises(ValueError, match=message) as error:
        RunDirectory.create_or_resume(str(path), Config(), resume=True)
    assert "\n" not in str(error.value)
    assert contents(path) == before
    RunDirectory.existing(str(path))  # To read is free.

    holder.send_signal(signal.SIGKILL)
    holder.wait()
    until = time.monotonic() + 10
    while True:
        try:
            run = RunDirectory.create_or_resume(str(path), Config(), resume=True)
            break
        except ValueError:
            assert time.monotonic() < until
            time.sleep(0.05)
    assert run.lock_file.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_a_lock_ends_with_its_run_directory(tmp_path: Path) -> None:
    run = RunDirectory.create_or_resume(str(tmp_path), Config(), resume=False)
    with pytest.raises(ValueError, match=f"is being trained in by process {os.getpid()} on "):
        RunDirectory.create_or_resume(str(tmp_path), Config(), resume=True)
    run.unlock()
    run.unlock()
    again = RunDirectory.create_or_resume(str(tmp_path), Config(), resume=True)
    del again
    RunDirectory.create_or_resume(str(tmp_path), Config(), resume=True)


def test_what_is_refused_is_not_locked(tmp_path: Path) -> None:
    run = RunDirectory.create_or_resume(str(tmp_path), Config(), resume=False)
    run.unlock()
    run.lock_file.unlink()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="already holds a run"):
        RunDirectory.create_or_resume(str(tmp_path), Config(), resume=False)
    assert contents(tmp_path) == before
