"""A prepared folder: whatever is missing, damaged or foreign is refused by name, at the start or while a run goes on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_jax.data.prepare import PrepareFlags, prepare
from dsv3_jax.data.shards import Prepared, is_prepared, open_prepared
from dsv3_jax.data.tokenizer import train_tokenizer

WORDS = [f"word{number}" for number in range(300)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "text").mkdir()
    for number in range(60):
        (folder / "text" / f"{number}.txt").write_text(" ".join(np.random.default_rng(number).choice(WORDS, 6000)))
    train_tokenizer([" ".join(WORDS)], 400, ["<bos>", "<eos>"]).save(folder / "tokenizer.json")
    for name, validation in (("out", 0.1), ("other", 0.2)):
        paths = str(folder / "text"), str(folder / "tokenizer.json"), str(folder / name)
        prepare(PrepareFlags(*paths, heldout_fraction=validation, shard_megabytes=1, workers=1))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original / "out", tmp_path / "out"))


def opened(folder: Path) -> Prepared:
    return open_prepared(str(folder), str(folder.parent / "cache"))


def test_it_is_told_from_a_folder_of_text(folder: Path, original: Path) -> None:
    assert is_prepared(str(folder))
    assert not is_prepared(str(original / "text"))
    assert not is_prepared("stdlib")
    assert len(opened(folder).parts) == 3
    assert "tokens of" in opened(folder).report


@pytest.mark.parametrize("name", ["00001.tokens.npy", "00000.ends.npy", "00002.heldout.jsonl", "tokenizer.json"])
@pytest.mark.parametrize("harm", ["missing", "cut", "flipped", "foreign"])
def test_what_is_not_as_it_was_made_is_refused_by_name(folder: Path, original: Path, name: str, harm: str) -> None:
    file = folder / name
    content = bytearray(file.read_bytes())
    if harm == "missing":
        file.unlink()
    elif harm == "cut":
        file.write_bytes(content[:-3])
    elif harm == "flipped":
        content[-2] ^= 4
        file.write_bytes(content)
    else:
        other = {"00002.heldout.jsonl": "00000.heldout.jsonl", "tokenizer.json": "plan.json"}.get(name, name)
        (folder / name).write_bytes((original / "other" / other).read_bytes())
    complaint = {"missing": "is missing", "cut": "is damaged or foreign", "flipped": "does not have the digest"}
    with pytest.raises(ValueError, match=rf"{name} .*{complaint.get(harm, 'is damaged or foreign')}.*again"):
        open_prepared(str(folder), str(folder.parent / "cache"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"format": "another"}'])
def test_a_damaged_meta_is_refused(folder: Path, content: bytes) -> None:
    (folder / "meta.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"meta\.json .*; prepare the folder again"):
        opened(folder)


def test_digests_are_read_once_until_a_file_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(folder)

    def refuse(path: Path) -> dict[str, Any]:
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr("dsv3_jax.data.shards.file_record", refuse)
    opened(folder)
    os.utime(folder / "00001.tokens.npy", ns=(1, 1))
    with pytest.raises(AssertionError, match=r"is read again"):
        opened(folder)


def test_what_goes_wrong_while_a_run_goes_on_is_named(folder: Path) -> None:
    """Each is one line; the process lives."""
    part = opened(folder).parts[1]
    file = folder / "00001.tokens.npy"
    before = part.read(5, 900)
    content = file.read_bytes()
    os.truncate(file, len(content) // 2)
    with pytest.raises(
        ValueError, match=r"00001\.tokens\.npy was changed while the run goes on; put it back, or make it again"
    ):
        part.read(part.num_tokens - 100, part.num_tokens)
    file.unlink()
    with pytest.raises(ValueError, match=r"00001\.tokens\.npy is missing"):
        part.read(5, 900)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"was changed while the run goes on"):
        part.read(5, 900)
    np.testing.assert_array_equal(opened(folder).parts[1].read(5, 900), before)
    (folder / "00001.ends.npy").unlink()
    with pytest.raises(ValueError, match=r"00001\.ends\.npy is missing"):
        part.ends()


def test_digests_follow_everything_the_folder_holds(folder: Path, original: Path) -> None:
    one, same, other = opened(folder), opened(original / "out"), opened(original / "other")
    assert (one.train_digest, one.validation_digest) == (same.train_digest, same.validation_digest)
    assert one.train_digest != other.train_digest
    assert one.validation_digest != other.validation_digest
    meta = json.loads((folder / "meta.json").read_text())
    assert [shard["tokens"] for shard in meta["shards"]] == [part.num_tokens for part in one.parts]
