"""Damaged checkpoints: each is found, named, and left as it is; the newest that is whole is used, with a warning."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.checkpoint.run import Checkpoints
from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import CheckpointConfig, Config, TrainConfig
from tests.checkpoint.tiny import MESHES, contents, make_mesh

RUN = Config(train=TrainConfig(steps=9), checkpoint=CheckpointConfig(keep=3))
Tree = dict[str, Any]


@functools.cache
def trees(step: int) -> dict[str, Tree]:
    """Arrays of every dtype of a run, small enough to read a thousand times."""
    rng = np.random.default_rng(step)
    variables = {
        "params": {"w": jnp.asarray(rng.standard_normal((16, 24)), jnp.float32), "v": jnp.asarray(rng.standard_normal(40))},
        "router": {"bias": jnp.asarray(rng.standard_normal(8), jnp.float32)},
    }
    moment = jnp.asarray(rng.standard_normal((16, 24)), jnp.bfloat16)
    return {"variables": variables, "optimizer": {"mu": moment, "count": jnp.int32(step)}}


def like(dtype: Any = None) -> dict[str, Tree]:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=device), trees(0))


def assert_same_bits(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 3, 6 and 9. Not to be written to."""
    path = tmp_path_factory.mktemp("saved") / "run"
    run = RunDirectory.create_or_resume(str(path), RUN, resume=False)
    with Checkpoints(run, RUN.checkpoint) as checkpoints:
        for step in (3, 6, 9):
            checkpoints.save(step, **trees(step))
    run.unlock()
    return path


@pytest.fixture
def path(saved: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(saved, tmp_path / "run")


def restored(path: Path, *, trains: bool = False) -> tuple[int, dict[str, Tree]]:
    run = RunDirectory.existing(str(path))
    with Checkpoints(run, RUN.checkpoint if trains else None) as checkpoints:
        found = checkpoints.restore_newest(**like())
    assert found is not None
    return found.record.step, found.items


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def largest(folder: Path) -> Path:
    return max(files(folder), key=lambda file: file.stat().st_size)


def flip(file: Path, place: int, bits: int = 0xFF) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= bits
    file.write_bytes(data)


def _truncated(checkpoint: Path) -> None:
    file = largest(checkpoint / "variables")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _emptied(checkpoint: Path) -> None:
    for file in files(checkpoint):
        file.write_bytes(b"")


def _without_file(checkpoint: Path) -> None:
    largest(checkpoint / "optimizer").unlink()


def _flipped(checkpoint: Path) -> None:
    file = largest(checkpoint / "variables")
    flip(file, file.stat().st_size // 2)


def _without_optimizer(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "optimizer")


def _without_record(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "progress")


def _other_record(checkpoint: Path) -> None:
    """Of another step, whole in itself."""
    shutil.rmtree(checkpoint / "progress")
    shutil.copytree(checkpoint.parent / "3" / "progress", checkpoint / "progress")


def _other_arrays(checkpoint: Path) -> None:
    """Of another step, whole in themselves: only the checksums can tell."""
    shutil.rmtree(checkpoint / "variables")
    shutil.copytree(checkpoint.parent / "3" / "variables", checkpoint / "variables")


def _changed_record(checkpoint: Path) -> None:
    file = checkpoint / "progress" / "metadata"
    values = json.loads(file.read_text())
    values["record"]["counters"]["skipped"] = 1
    file.write_text(json.dumps(values))


def _garbage_metadata(checkpoint: Path) -> None:
    (checkpoint / "optimizer" / "_METADATA").write_bytes(b"\xff\x00{")


DAMAGE = {
    _truncated: "",
    _emptied: "",
    _without_file: "",
    _flipped: "",
    _without_optimizer: r"it lacks optimizer",
    _without_record: r"it lacks progress, without which nothing in it can be verified",
    _other_record: r"its record is of step 3",
    _other_arrays: r"variables/params/v and 2 more does not match its checksum",
    _changed_record: r"ValueError: its record does not match its own digest",
    _garbage_metadata: "",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    newest = path / "checkpoints" / "9"
    damage(newest)
    before = contents(path)
    step, found = restored(path)
    captured = capsys.readouterr()
    assert step == 6
    assert_same_bits(found, trees(6))
    assert captured.out == ""
    message = rf"warning: {newest} is damaged \(.*{DAMAGE[damage]}.*\); step 6 is used instead\n"
    assert re.fullmatch(message, captured.err), captured.err
    # To read changes nothing; nor are the others any different.
    assert contents(path) == before
    with Checkpoints(RunDirectory.existing(str(path))) as checkpoints:
        assert_same_bits(checkpoints.restore(3, **like()), trees(3))
        with pytest.raises(ValueError, match=f"^{newest} is damaged: .*; remove it to go on from the checkpoint before$"):
            checkpoints.restore(9, **like())


def test_a_continued_run_sets_it_aside_and_saves_the_step_again(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = path / "checkpoints"
    asides = {"9.damaged": _flipped, "9.damaged.1": _without_optimizer, "9.damaged.2": _emptied}
    for aside, damage in asides.items():
        damage(folder / "9")
        broken = contents(folder / "9")
        run = RunDirectory.existing(str(path))
        with Checkpoints(run, RUN.checkpoint) as checkpoints:
            found = checkpoints.restore_newest(**like())
            assert found is not None
            assert found.record.step == 6
            assert f"step 6 is used instead, and it is now {aside}\n" in capsys.readouterr().err
            assert checkpoints.latest_step() == 6
            checkpoints.save(9, **trees(9))
        assert contents(folder / aside) == broken
        step, items = restored(path, trains=True)
        assert step == 9
        assert_same_bits(items, trees(9))
        assert capsys.readouterr().err == ""
    # What is set aside stays when others are removed.
    with Checkpoints(run, RUN.checkpoint) as checkpoints:
        for step in (10, 11):
            checkpoints.save(step, **trees(step))
    assert sorted(os.listdir(folder)) == ["10", "11", "9", *asides]


def test_two_in_a_row(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, damage in (("9", _truncated), ("6", _without_file)):
        damage(path / "checkpoints" / name)
    step, found = restored(path, trains=True)
    assert step == 3
    assert_same_bits(found, trees(3))
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"\(.*\)", "()", line) for line in lines] == [
        f"warning: {path}/checkpoints/{name} is damaged (); step 3 is used instead, and it is now {name}.damaged"
        for name in ("9", "6")
    ]


def test_if_none_is_whole_all_are_named_and_none_is_touched(path: Path) -> None:
    for name in ("3", "6", "9"):
        _flipped(path / "checkpoints" / name)
    before = contents(path)
    folder = path / "checkpoints"
    message = "; ".join(rf"{folder}/{name} is damaged \(.*\)" for name in (9, 6, 3))
    with pytest.raises(
        ValueError, match=f"^no checkpoint is whole: {message}; restore one, or name another --run-dir$"
    ) as error:
        restored(path, trains=True)
    assert "\n" not in str(error.value)
    assert contents(path) == before


def test_another_model_is_an_error_and_no_damage(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(path)
    other = like()
    other["variables"]["params"]["w"] = other["optimizer"]["mu"].update(shape=(16, 25))
    with Checkpoints(RunDirectory.existing(str(path)), RUN.checkpoint) as checkpoints:
        message = (
            r"9/variables holds another model than .*: params/w is \[16, 24\] there and \[16, 25\] here; restore the config"
        )
        with pytest.raises(ValueError, match=message):
            checkpoints.restore_newest(**other)
    assert capsys.readouterr().err == ""
    assert contents(path) == before


def test_what_this_machine_cannot_read_is_an_error_and_no_damage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "file")

    monkeypatch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.restore", refuse)
    with pytest.raises(
        ValueError, match=r"9/optimizer cannot be read \(.*Permission denied.*\); make it readable, and start again"
    ):
        with Checkpoints(RunDirectory.existing(str(path)), RUN.checkpoint) as checkpoints:
            checkpoints.restore_newest(optimizer=like()["optimizer"])
    assert sorted(os.listdir(path / "checkpoints")) == ["3", "6", "9"]


def test_leftovers_of_a_save_that_was_cut_short_go_when_training_starts(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = path / "checkpoints" / "12.orbax-checkpoint-tmp"
    shutil.copytree(path / "checkpoints" / "9", left)
    assert restored(path)[0] == 9
    assert (left.exists(), capsys.readouterr().err) == (True, "")
    assert restored(path, trains=True)[0] == 9
    assert not left.exists()
    assert capsys.readouterr().err == f"warning: {left} was left by a save that was cut short; it is removed\n"


def test_what_a_read_says_after_a_damaged_checkpoint_was_given_up_is_not_heard(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Exception] = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    _truncated(path / "checkpoints" / "9")
    assert restored(path)[0] == 6
    # As a thread of TensorStore's calls it.
    sys.unraisablehook(SimpleNamespace(object=None, exc_value=RuntimeError("Event loop is closed")))
    assert not heard


def read_or_refused(checkpoints: Checkpoints, **wanted: Any) -> dict[str, Any] | str:
    try:
        return checkpoints.restore(9, **wanted)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("flips", [30, pytest.param(200, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    ("item", "dtype"),
    [("variables", None), ("optimizer", None), ("progress", None), (".", None), ("variables", jnp.bfloat16)],
    ids=["variables", "optimizer", "progress", ".", "variables cast"],
)
def test_no_flipped_byte_passes(path: Path, item: str, dtype: Any, flips: int) -> None:
    """Of every file, at random places: each either changes nothing that is read, or is found."""
    rng = np.random.default_rng(0)
    checkpoint = path / "checkpoints" / "9"
    wanted = {name: tree for name, tree in like(dtype).items() if item in (name, "progress", ".")}
    expected = {name: jax.tree.map(lambda leaf: leaf.astype(dtype or leaf.dtype), trees(9)[name]) for name in wanted}
    among = [file for file in (checkpoint.iterdir() if item == "." else files(checkpoint / item)) if file.is_file()]
    found = 0
    with Checkpoints(RunDirectory.existing(str(path))) as checkpoints:
        for number in range(flips):
            file = among[number % len(among)]
            whole = file.read_bytes()
            flip(file, int(rng.integers(len(whole))), int(rng.integers(1, 256)))
            outcome = read_or_refused(checkpoints, **wanted)
            if isinstance(outcome, str):
                assert outcome.startswith(f"{checkpoint} is damaged: ")
                found += 1
            else:
                assert_same_bits(outcome, expected)
            file.write_bytes(whole)
        assert_same_bits(checkpoints.restore(9, **wanted), expected)
    if item != ".":
        assert found > 0.2 * flips


_COPIED = "fsdp 2, expert 2, tensor 2", "data 2, expert 2, tensor 2"
"""The meshes that repeat an array on some devices and split it over others; the rest split more or repeat more."""


@pytest.mark.parametrize("mesh", [pytest.param(name, marks=[] if name in _COPIED else pytest.mark.nightly) for name in MESHES])
def test_any_mesh_gets_the_same_bits_and_the_same_checksums(saved: Path, mesh: str) -> None:
    specs = {
        "w": PartitionSpec("fsdp", ("expert", "tensor")),
        "mu": PartitionSpec(("expert", "fsdp")),
        "v": PartitionSpec("tensor"),
    }
    devices = make_mesh(**MESHES[mesh])

    def place(path: Any, leaf: Any) -> Any:
        spec = specs.get(path[-1].key, PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(devices, spec))

    onto = jax.tree.map_with_path(place, trees(9))
    with Checkpoints(RunDirectory.existing(str(saved))) as checkpoints:
        found = checkpoints.restore(9, **onto)
    assert found["variables"]["params"]["w"].sharding == onto["variables"]["params"]["w"].sharding
    assert_same_bits(found, trees(9))


def test_what_is_cast_is_read_bit_by_bit(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one array at a time."""
    monkeypatch.setattr("dsv3_jax.checkpoint.run._CAST_BYTES", 1)
    with Checkpoints(RunDirectory.existing(str(saved))) as checkpoints:
        found = checkpoints.restore(9, **like(jnp.float16))
    assert_same_bits(found, jax.tree.map(lambda leaf: leaf.astype(jnp.float16), trees(9)))


def test_what_nothing_is_read_from_may_go(path: Path) -> None:
    """What counts is that every array is what was saved."""
    (path / "checkpoints" / "9" / "variables" / "_METADATA").unlink()
    step, found = restored(path)
    assert step == 9
    assert_same_bits(found, trees(9))
