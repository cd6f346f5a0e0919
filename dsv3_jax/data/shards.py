"""A folder of prepared tokens, as `python -m dsv3_jax.data.prepare` writes it, and how it is opened and read.

    tokenizer.json        what its ids mean
    plan.json             how the source was cut into pieces, and the options of the preparation
    00000.tokens.npy      ids of the documents of piece 0, marks included, uint16 or uint32 [tokens]
    00000.ends.npy        where each document ends among them, int64 [documents]
    00000.heldout.jsonl   the held-out documents of the piece, as text, since bits per byte need bytes
    00000.json            counts and digests of the three, written when they are whole
    meta.json             everything about the folder, written when all shards are whole

Opening one compares every file with its size and digest. Digests take a reading of all files, at some 1 GB/s a core; that it
was done is remembered in `data.cache_dir`, until a file gets another size or time. Ids are then read piece by piece
(`npy_file.py`), so that a file that is damaged while a run goes on is an error that names it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from dsv3_jax.config.checks import check
from dsv3_jax.data.sources import Document
from dsv3_jax.data.storage import NpyFile, Part, digest, load_or_make, stamp
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer

FORMAT = "dsv3_jax tokens, version 1"
KINDS = {"tokens": "tokens.npy", "ends": "ends.npy", "heldout": "heldout.jsonl"}


class Shard:
    """The documents of one shard; a `Part` that reads from its files."""

    def __init__(self, tokens: Path, ends: Path, dtype: np.dtype, num_tokens: int) -> None:
        """Raises: ValueError, naming the file, if it is missing or is not what the folder's meta.json says."""
        self._tokens = NpyFile(tokens)
        self._ends_path = ends
        check(
            self._tokens.dtype == dtype and self._tokens.size == num_tokens,
            f"{tokens} holds {self._tokens.dtype}[{self._tokens.size}], not {dtype}[{num_tokens}]; prepare the folder again",
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return self._tokens.size

    def ends(self) -> np.ndarray:
        """Where each document ends."""
        return NpyFile(self._ends_path)[:]

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids start..stop-1; ValueError, naming the file, if it is gone or another than when it was opened."""
        return self._tokens[start:stop]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A prepared folder, opened."""

    folder: Path
    meta: dict[str, Any]
    parts: list[Part]
    """The shards that hold documents."""
    validation: list[Document]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """What the ids mean."""
        return load_tokenizer(self.folder)

    @functools.cached_property
    def train_digest(self) -> str:
        """Of the shards, whose digests meta.json holds, and of everything else it says."""
        return digest(json.dumps(self.meta, sort_keys=True))

    @functools.cached_property
    def validation_digest(self) -> str:
        """Of the held-out documents."""
        return digest(*(part for document in self.validation for part in (document.name, document.text)))

    @property
    def report(self) -> str:
        """One line about the folder."""
        return describe(self.meta)


def describe(meta: dict[str, Any]) -> str:
    """One line about a prepared folder."""
    filled = f", {meta['fim_documents']:,} of them to be filled in" if meta["fim_documents"] else ""
    return (
        f"train on {meta['tokens']:,} tokens of {meta['documents']:,} documents{filled}, {meta['bytes'] / 1e6:.2f} MB in "
        f"{len(meta['shards'])} shards; hold out {meta['heldout_documents']:,}, {meta['heldout_bytes'] / 1e6:.2f} MB; "
        f"decoded with replacement: {meta['replaced']}; binary or empty files passed over: {meta['passed_over']}"
    )


def is_prepared(source: str) -> bool:
    """Whether `source` is a folder that the preparation has made, or has begun.

    Raises:
      ValueError: if it has begun and not ended, or lies elsewhere than on a disk.
    """
    folder = epath.Path(source).expanduser()
    if not (folder / "plan.json").exists() or not (folder / "tokenizer.json").exists():
        return False
    check("://" not in source, f"{source} is a prepared folder; copy it to a disk of this machine, where it can be read fast")
    check(
        (folder / "meta.json").exists(),
        f"{source} is not whole yet (no meta.json): run the same python -m dsv3_jax.data.prepare again, which continues it",
    )
    return True


def open_prepared(source: str, cache_dir: str) -> Prepared:
    """Opens a prepared folder.

    Args:
      source: the folder.
      cache_dir: where it is remembered that the digests of these very files were right.

    Raises:
      ValueError: naming the file, if it is missing, damaged, or belongs to another preparation.
    """
    folder = Path(source).expanduser()
    meta = read_json(folder / "meta.json")
    check(
        meta.get("format") == FORMAT,
        f"{folder / 'meta.json'} is of the format {meta.get('format')!r}, not {FORMAT!r}; prepare the folder again",
    )
    expected = {folder / "tokenizer.json": meta["tokenizer"]}
    for number, shard in enumerate(meta["shards"]):
        expected |= {shard_file(folder, number, kind): shard["files"][kind] for kind in KINDS}
    for path, file in expected.items():
        size = stamp(path)[0]
        check(
            size == file["size"],
            f"{path} is {size} bytes, and was prepared with {file['size']}; it is damaged or foreign: copy or prepare it again",
        )
    _check_digests(expected, cache_dir)
    dtype = np.dtype(meta["dtype"])
    parts: list[Part] = [
        Shard(shard_file(folder, number, "tokens"), shard_file(folder, number, "ends"), dtype, shard["tokens"])
        for number, shard in enumerate(meta["shards"])
        if shard["tokens"]
    ]
    validation = [
        Document(**json.loads(line))
        for number in range(len(meta["shards"]))
        for line in shard_file(folder, number, "heldout").read_text("utf-8").split("\n")
        if line
    ]
    return Prepared(folder, meta, parts, validation)


def shard_file(folder: Path, number: int, kind: str) -> Path:
    """The file of a shard: "tokens", "ends" or "heldout"."""
    return folder / f"{number:05}.{KINDS[kind]}"


def shard_record(folder: Path, number: int) -> Path:
    """The file that says that a shard is whole."""
    return folder / f"{number:05}.json"


def file_record(path: Path) -> dict[str, Any]:
    """Size and digest of a file, as meta.json keeps them."""
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "digest": hashlib.file_digest(file, _hash).hexdigest()}


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file of the folder; ValueError if it is none."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); prepare the folder again") from error
    check(isinstance(content, dict), f"{path} holds no object; prepare the folder again")
    return content


def _hash() -> Any:
    return hashlib.blake2b(digest_size=16)


def _check_digests(expected: dict[Path, dict[str, Any]], cache_dir: str) -> None:
    """Reads every file, unless these very ones were found right before."""

    def check_file(item: tuple[Path, dict[str, Any]]) -> None:
        path, file = item
        check(
            file_record(path) == file,
            f"{path} does not have the digest it was prepared with; it is damaged or foreign: copy or prepare it again",
        )

    def check_all(done: Path) -> None:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(check_file, expected.items()))
        done.touch()

    seen = digest(*(f"{path.absolute()} {stamp(path)} {file['digest']}" for path, file in expected.items()))
    load_or_make(Path(cache_dir) / f"verified-{seen}", load=lambda path: None, write=check_all)
