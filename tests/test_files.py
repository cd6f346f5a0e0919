"""Files written whole: a process killed in the middle of it, a disk that is full, and what a reader then finds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from dsv3_jax import files
from dsv3_jax.data.chat_template import ChatTemplate
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.files import part_of, write_whole

ROOT = Path(__file__).parent.parent


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("data", ["text \u00e9\n", b"\0\1\2"])
def test_a_file_is_written_and_written_again(tmp_path: Path, data: str | bytes) -> None:
    path = epath.Path(tmp_path / "file")
    for content in (b"before", data):
        write_whole(path, content)
    assert contents(tmp_path) == {"file": data.encode() if isinstance(data, str) else data}


def test_the_bytes_are_on_the_disk_before_they_have_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    synced = []

    def fsync(handle: int) -> None:
        assert path.read_text() == "before"
        synced.append(os.fstat(handle).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(epath.Path(path), "after")
    assert path.read_text() == "after"
    assert synced == [path.stat().st_ino]


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("before")

    def fails(path: epath.Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "to_disk", fails)
    with pytest.raises(OSError, match="no space left"):
        write_whole(epath.Path(tmp_path / "file"), "after")
    assert contents(tmp_path) == {"file": b"before"}


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    path = epath.Path(tmp_path / "file")
    part_of(path).write_text("half of what was to be th")
    write_whole(path, "after")
    assert contents(tmp_path) == {"file": b"after"}


# Saves what a resumed run reads again, in processes that the kernel kills once a file grows past a limit, amid a write.
KILLED = """
import os, resource, signal, sys
from dsv3_jax.data.chat_template import ChatTemplate
from dsv3_jax.data.tokenizer import load_tokenizer

folder = sys.argv[1]
tokenizer = load_tokenizer(folder)
template = ChatTemplate("b" * 5000, {})
for save in (lambda: tokenizer.save(f"{folder}/tokenizer.json"), lambda: template.save(folder)):
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python would ignore it.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        save()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_tokenizer_and_template_outlive_a_kill_while_they_are_written(tmp_path: Path) -> None:
    """A run writes them at every start, and a resumed one reads its own."""
    train_tokenizer(["for i in range(3):"], 300, ["<bos>", "<eos>"]).save(tmp_path / "tokenizer.json")
    ChatTemplate("a" * 5000, {"bos_token": "<bos>"}).save(tmp_path)
    before = contents(tmp_path)
    assert len(before["tokenizer.json"]) > 1000
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [str(-signal.SIGXFSZ)] * 2, done.stderr
    left = contents(tmp_path)
    assert {name: left[name] for name in before} == before
