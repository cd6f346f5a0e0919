"""Saves that fail for their disk: the run goes on, says so in one line a save, and saves again when it can be done."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.path import async_path

from dsv3_jax.checkpoint.run import Checkpoints
from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import CheckpointConfig, Config
from tests.checkpoint.test_run_damage import assert_same_bits
from tests.checkpoint.tiny import contents

ROOT = Path(__file__).parents[2]
RUN = Config(checkpoint=CheckpointConfig(keep=2))
SIZE = 2**18
"""Bytes of a checkpoint's arrays; they do not compress."""


def trees(step: int) -> dict[str, Any]:
    bits = np.frombuffer(np.random.default_rng(step).bytes(SIZE), np.int32)
    return {"variables": {"w": jnp.asarray(bits)}, "optimizer": {"count": jnp.int32(step)}}


def assert_loads(path: Path, steps: list[int]) -> None:
    """These checkpoints are there, no others, and bit for bit what was saved."""
    folder = path / "checkpoints"
    assert sorted(int(name) for name in os.listdir(folder) if name.isdigit()) == steps
    with Checkpoints(RunDirectory.existing(str(path))) as checkpoints:
        for step in steps:
            assert_same_bits(checkpoints.restore(step, **trees(step)), trees(step))


def mounted(*command: str) -> None:
    done = subprocess.run(["mount", *command], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this process may not mount: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A run on a disk with room for three checkpoints, and something."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted("-t", "tmpfs", "-o", f"size={SIZE * 5}", "none", str(disk))
    try:
        yield disk / "run"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture
def plain_disk(tmp_path: Path) -> Path:
    return tmp_path / "run"


def opened(path: Path) -> RunDirectory:
    return RunDirectory.create_or_resume(str(path), RUN, resume=False)


def fill(file: Path) -> None:
    """Leaves room for half a checkpoint."""
    disk = os.statvfs(file.parent)
    file.write_bytes(bytes(disk.f_bavail * disk.f_frsize - SIZE // 2))


def failed(step: int, newest: int, reason: str) -> str:
    return (
        f"warning: step {step} could not be saved ({reason}); the newest checkpoint is of step {newest}; "
        "the run goes on and tries again at the next save\n"
    )


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_full_disk(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = opened(small_disk)
    filler = small_disk / "filler"
    with Checkpoints(run, RUN.checkpoint) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, **trees(step))
        checkpoints.wait()
        fill(filler)
        for step in (3, 4):
            checkpoints.save(step, **trees(step))
            checkpoints.wait()
            assert said(capsys) == failed(step, 2, "No space left on device")
            reason = "could not be saved (No space left on device); the newest checkpoint is of step 2"
            assert checkpoints.failed == f"step {step} {reason}"
            assert checkpoints.latest_step() == 2
            assert_loads(small_disk, [1, 2])
        filler.unlink()
        checkpoints.save(5, **trees(5))
        checkpoints.wait()
        assert said(capsys) == "warning: step 5 is saved; saving works again\n"
        assert checkpoints.failed is None
        checkpoints.save(6, **trees(6))
    assert said(capsys) == ""
    # What Orbax would have removed after the first save that failed is removed now, and no part is left.
    assert sorted(os.listdir(small_disk / "checkpoints")) == ["5", "6"]
    assert_loads(small_disk, [5, 6])


def test_a_disk_that_is_full_to_the_end(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Checkpoints(opened(small_disk), RUN.checkpoint) as checkpoints:
        checkpoints.save(1, **trees(1))
        checkpoints.wait()
        fill(small_disk / "filler")
        checkpoints.save(2, **trees(2))
    assert checkpoints.failed == "step 2 could not be saved (No space left on device); the newest checkpoint is of step 1"
    assert said(capsys) == failed(2, 1, "No space left on device")
    assert os.listdir(small_disk / "checkpoints") == ["1"]
    assert_loads(small_disk, [1])


def test_a_read_only_disk(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = str(small_disk.parent)
    with Checkpoints(opened(small_disk), RUN.checkpoint) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, **trees(step))
        checkpoints.wait()
        mounted("-o", "remount,ro", disk)
        before = contents(small_disk)
        checkpoints.save(3, **trees(3))  # At once, before anything is started.
        assert said(capsys) == failed(3, 2, "Read-only file system")
        assert contents(small_disk) == before
        assert_loads(small_disk, [1, 2])
        mounted("-o", "remount,rw", disk)
        checkpoints.save(4, **trees(4))
    assert said(capsys) == "warning: step 4 is saved; saving works again\n"
    assert_loads(small_disk, [2, 4])


def test_a_disk_that_becomes_read_only_during_a_save(
    small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpoints(opened(small_disk), RUN.checkpoint) as checkpoints:
        checkpoints.save(1, **trees(1))
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "_try_folder", lambda: mounted("-o", "remount,ro", str(small_disk.parent)))
            checkpoints.save(2, **trees(2))
        checkpoints.wait()
        assert said(capsys) == failed(2, 1, "Read-only file system")
        mounted("-o", "remount,rw", str(small_disk.parent))
        checkpoints.save(3, **trees(3))
    assert said(capsys) == "warning: step 3 is saved; saving works again\n"
    assert_loads(small_disk, [1, 3])


def _fails_on_mkdir(error: Exception) -> tuple[str, Callable[..., Any]]:
    async def fail(*_: Any, **__: Any) -> None:
        raise error

    return "orbax.checkpoint._src.path.atomicity._create_tmp_directory", fail


def _fails_on_rename(error: Exception) -> tuple[str, Callable[..., Any]]:
    async def fail(*_: Any, **__: Any) -> None:
        raise error

    return "orbax.checkpoint._src.path.async_path.rename", fail


ERRORS = [
    OSError(errno.ENOSPC, "No space left on device"),
    PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
]


def test_any_error_of_the_system(plain_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """First or last in a save, and every other save succeeds."""
    with Checkpoints(opened(plain_disk), RUN.checkpoint) as checkpoints:
        checkpoints.save(1, **trees(1))
        checkpoints.wait()
        newest = 1
        for error, where in itertools.product(ERRORS, (_fails_on_mkdir, _fails_on_rename)):
            with monkeypatch.context() as patch:
                patch.setattr(*where(error))
                checkpoints.save(newest + 1, **trees(newest + 1))
                checkpoints.wait()
            assert said(capsys) == failed(newest + 1, newest, os.strerror(error.errno))
            checkpoints.save(newest + 2, **trees(newest + 2))
            checkpoints.wait()
            assert said(capsys) == f"warning: step {newest + 2} is saved; saving works again\n"
            assert {int(name) for name in os.listdir(plain_disk / "checkpoints")} == {newest, newest + 2}
            newest += 2
    assert_loads(plain_disk, [newest - 2, newest])


@pytest.mark.parametrize("where", [_fails_on_mkdir, _fails_on_rename], ids=["first", "last"])
def test_a_bug_is_raised(plain_disk: Path, monkeypatch: pytest.MonkeyPatch, where: Callable[..., Any]) -> None:
    monkeypatch.setattr(*where(TypeError("a bug")))
    with pytest.raises(TypeError, match="a bug"), Checkpoints(opened(plain_disk), RUN.checkpoint) as checkpoints:
        checkpoints.save(1, **trees(1))


def test_poll_says_it_as_soon_as_it_is_known(
    plain_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpoints(opened(plain_disk), RUN.checkpoint) as checkpoints:
        checkpoints.poll()
        monkeypatch.setattr(*_fails_on_rename(OSError(errno.ENOSPC, "full")))
        checkpoints.save(1, **trees(1))
        while checkpoints._pending is not None:
            checkpoints.poll()
        warning = "warning: step 1 could not be saved (No space left on device); there is no checkpoint yet; "
        assert said(capsys).startswith(warning)
        checkpoints.poll()
        assert said(capsys) == ""


def test_an_old_checkpoint_that_cannot_be_removed(
    plain_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with Checkpoints(opened(plain_disk), RUN.checkpoint) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, **trees(step))
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager._checkpoint_deleter, "delete_steps", refuse)
            checkpoints.save(3, **trees(3))
            checkpoints.wait()
        assert said(capsys) == "warning: step 3 is saved, but an older step cannot be removed (Permission denied); remove it\n"
        assert checkpoints.failed is None
        checkpoints.save(4, **trees(4))
    assert_loads(plain_disk, [3, 4])


def test_a_folder_that_is_gone_is_made_again(plain_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Checkpoints(opened(plain_disk), RUN.checkpoint) as checkpoints:
        (plain_disk / "checkpoints").rmdir()
        checkpoints.save(1, **trees(1))
    assert said(capsys) == ""
    assert_loads(plain_disk, [1])


LIMITED_AND_KILLED = """
import os, resource, signal, sys
from pathlib import Path
import orbax.checkpoint._src.path.async_path as async_path
from dsv3_jax.checkpoint.run import Checkpoints
from tests.checkpoint.test_run_failing_saves import RUN, SIZE, opened, trees
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
rename = async_path.rename
async def killed(source, target):
    if Path(target).name == "4":
        os.kill(os.getpid(), signal.SIGKILL)
    return await rename(source, target)
async_path.rename = killed
with Checkpoints(opened(Path(sys.argv[1])), RUN.checkpoint) as checkpoints:
    checkpoints.save(1, **trees(1))
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, resource.RLIM_INFINITY))
    checkpoints.save(2, **trees(2))
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checkpoints.save(3, **trees(3))
    checkpoints.save(4, **trees(4))
"""


def test_a_write_that_fails_halfway_and_a_kill_inside_a_save(plain_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both in one process.

    The write needs no mount: the system lets a process write no larger files. All that stderr says are our two lines. The
    kill comes with all written and nothing renamed: that is no checkpoint, and goes when the run is continued.
    """
    command = [sys.executable, "-c", LIMITED_AND_KILLED, str(plain_disk)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stderr == failed(2, 1, os.strerror(errno.EFBIG)) + "warning: step 3 is saved; saving works again\n"
    assert sorted(os.listdir(plain_disk / "checkpoints")) == ["1", "3", "4.orbax-checkpoint-tmp"]
    assert_loads(plain_disk, [1, 3])
    run = RunDirectory.create_or_resume(str(plain_disk), RUN, resume=True)
    with Checkpoints(run, RUN.checkpoint) as checkpoints:
        found = checkpoints.restore_newest(**trees(0))
        assert found is not None
        assert found.record.step == 3
        checkpoints.save(4, **trees(4))
    assert "4.orbax-checkpoint-tmp was left by a save that was cut short; it is removed\n" in said(capsys)
    assert_loads(plain_disk, [3, 4])


def test_leaving_waits_for_the_save(plain_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is told to stop in the middle of one only has to leave."""
    rename, may_end = async_path.rename, threading.Event()

    async def held(*paths: Any) -> None:
        assert may_end.wait(timeout=60)
        await rename(*paths)

    monkeypatch.setattr(async_path, "rename", held)
    with Checkpoints(opened(plain_disk), RUN.checkpoint) as checkpoints:
        checkpoints.save(1, **trees(1))
        assert not (plain_disk / "checkpoints" / "1").exists()
        threading.Timer(0.1, may_end.set).start()
    assert_loads(plain_disk, [1])
