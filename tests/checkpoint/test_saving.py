"""Saving sharded arrays: the files of the unsharded save, byte for byte, and tensors fetched as their turn comes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from dsv3_jax.checkpoint import hugging_face
from dsv3_jax.checkpoint.hugging_face import load_hf, save_hf
from dsv3_jax.checkpoint.tensor_files import Outgoing
from tests.checkpoint.tiny import MESHES, SHARDED_CONFIG, contents, make_mesh, random_tensors, write


@pytest.mark.parametrize(
    ("mesh", "fp8"),
    [
        ("fsdp 2, expert 2, tensor 2", True),
        ("data 2, expert 2, tensor 2", False),
        pytest.param("expert 8", False, marks=pytest.mark.nightly),
    ],
)
def test_sharded_arrays_are_saved_to_the_same_bytes(tmp_path: Path, mesh: str, fp8: bool) -> None:
    source = write(tmp_path / "in", random_tensors(SHARDED_CONFIG), SHARDED_CONFIG, files=3)
    config, expected = load_hf(source, jnp.bfloat16)
    _, variables = load_hf(source, jnp.bfloat16, make_mesh(**MESHES[mesh]))
    save_hf(tmp_path / "expected", config, expected, fp8=fp8, max_shard_bytes=100_000)
    save_hf(tmp_path / "sharded", config, variables, fp8=fp8, max_shard_bytes=100_000)
    assert contents(tmp_path / "sharded") == contents(tmp_path / "expected")


def test_no_sharded_array_is_ever_whole_in_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in", random_tensors(SHARDED_CONFIG), SHARDED_CONFIG)
    config, variables = load_hf(source, jnp.bfloat16, make_mesh(fsdp=2, expert=2, tensor=2))
    fetched: list[Any] = []
    take = hugging_face.take

    def recorded(array: Any, index: tuple[int, ...]) -> Any:
        fetched.append(part := take(array, index))
        return part

    monkeypatch.setattr(hugging_face, "take", recorded)
    save_hf(tmp_path / "out", config, variables)
    largest = max(config.vocab_size * config.hidden_size, 2 * config.hidden_size**2)
    assert max(part.size for part in fetched) <= largest < variables["params"]["moe_layers"]["mlp"]["experts"]["up_proj"].size


def test_an_export_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file by the process that wrote it, then the folder itself; a rename alone may outlive the bytes it names."""
    config, variables = load_hf(write(tmp_path / "in", random_tensors()))
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    synced: set[int] = set()
    fsync, rename = os.fsync, os.rename

    def renamed(source: str, target: str) -> None:
        paths = [Path(source), *Path(source).rglob("*")]
        assert len(paths) > 5
        assert [path.name for path in paths if path.stat().st_ino not in synced] == []
        rename(source, target)

    def synced_too(handle: int) -> None:
        fsync(handle)
        synced.add(os.fstat(handle).st_ino)

    monkeypatch.setattr(os, "fsync", synced_too)
    monkeypatch.setattr(os, "rename", renamed)
    save_hf(tmp_path / "out", config, variables, max_shard_bytes=20_000, tokenizer_from=tmp_path / "in")
    assert (tmp_path / "out").is_dir()
    assert tmp_path.stat().st_ino in synced


def test_two_exports_at_once_leave_each_other_alone(tmp_path: Path) -> None:
    """Both by one process here, as two containers may have the same process id: the first to end has the name."""
    target = epath.Path(tmp_path / "out")
    with pytest.raises(ValueError, match="out exists and is not an empty folder"):  # noqa: PT012
        with hugging_face.new_folder(target, processes=1) as slow:
            (slow / "file").write_text("slow")
            with hugging_face.new_folder(target, processes=1) as quick:
                (quick / "file").write_text("quick")
            assert (slow / "file").read_text() == "slow"
    assert contents(tmp_path / "out") == {"file": b"quick"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_an_export_did_not_make_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugging_face, "same_everywhere", lambda number, processes: 7)
    with hugging_face.new_folder(epath.Path(tmp_path / "out"), processes=1) as folder:
        (folder / "file").write_text("first")
        with pytest.raises(FileExistsError), hugging_face.new_folder(epath.Path(tmp_path / "out"), processes=1):
            pass
    assert contents(tmp_path / "out") == {"file": b"first"}


def _outgoing(log: list[str], name: str) -> Outgoing:
    def fetch() -> str:
        log.append(name)
        return name

    return Outgoing(((name, np.dtype(np.float32), ()),), fetch, lambda part: (part,))  # type: ignore[arg-type]


@pytest.mark.parametrize("me", [0, 1, 2])
def test_every_process_fetches_everything_in_the_same_order_and_keeps_its_own(me: int) -> None:
    log: list[str] = []
    files = [[_outgoing(log, name) for name in names] for names in (["a0", "a1", "a2"], ["b0"])]
    turns = hugging_face._turns(files, me)
    kept = [part for _, part in turns]
    assert log == ["a0", "b0", "a1", "a2"]
    assert kept == [["a0", "a1", "a2"], ["b0"], []][me]


def test_a_consumer_that_fails_leaves_the_other_turns_to_be_taken() -> None:
    log: list[str] = []
    turns = hugging_face._turns([[_outgoing(log, "a0"), _outgoing(log, "a1")], [_outgoing(log, "b0"), _outgoing(log, "b1")]], 0)
    with pytest.raises(RuntimeError):  # noqa: PT012
        for _ in (part for _, part in turns):
            raise RuntimeError
    assert [part for _, part in turns] == ["a1"]
    assert log == ["a0", "b0", "a1", "b1"]
