"""Prepared folders: tokenised shards as `python -m dsv3_jax.data.prepare` writes them, opened and verified.

    tokenizer.json        tokenizer of the ids
    plan.json             pieces of the source and options of the preparation
    00000.tokens.npy      ids of the documents of piece 0, marks included, uint16 or uint32 [tokens]
    00000.ends.npy        position after each document among them, int64 [documents]
    00000.heldout.jsonl   held-out documents of the piece, as text, since bits per byte need bytes
    00000.json            counts and digests of the three, written once they are complete
    meta.json             everything about the folder, written once all shards are complete

Opening a folder compares the size and the digest of every file. Digests read all files, at about 1 GB/s a core; the result is
remembered in `data.cache_dir` until the size or time of a file changes. Ids are then read slice by slice (`storage.py`), so
that a file that is damaged during a run gives an error that names it.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from dsv3_jax.config.checks import check
from dsv3_jax.data.corpus import digest_of
from dsv3_jax.data.sources import Document
from dsv3_jax.data.storage import NpyFile, Part, digest, load_or_make, read_json, stamp
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer

FORMAT = "dsv3_jax tokens, version 1"
KINDS = {"tokens": "tokens.npy", "ends": "ends.npy", "heldout": "heldout.jsonl"}
REMEDY = "prepare the folder again"


class Prepared(NamedTuple):
    """An opened prepared folder."""

    meta: dict[str, Any]
    parts: list[Part]
    """The shards that contain documents."""
    validation: list[Document]
    tokenizer: Tokenizer
    train_digest: str
    """Digest of meta.json, which contains the digests of the shards."""
    validation_digest: str
    """Digest of the held-out documents."""
    report: str
    """One line about the folder."""


def describe(meta: dict[str, Any]) -> str:
    """Return one line about a prepared folder."""
    filled = f", {meta['fim_documents']:,} of them to be filled in" if meta["fim_documents"] else ""
    return (
        f"train on {meta['tokens']:,} tokens of {meta['documents']:,} documents{filled}, {meta['bytes'] / 1e6:.2f} MB in "
        f"{len(meta['shards'])} shards; hold out {meta['heldout_documents']:,}, {meta['heldout_bytes'] / 1e6:.2f} MB; "
        f"decoded with replacement: {meta['replaced']}; binary or empty files passed over: {meta['passed_over']}"
    )


def is_prepared(source: str) -> bool:
    """Return True if `source` is a prepared folder; ValueError if it is unfinished or not on a local disk."""
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
    """Open a prepared folder.

    Args:
      source: the folder.
      cache_dir: folder that remembers files whose digests have been verified.

    Raises:
      ValueError: naming the file, if it is missing, damaged, or belongs to another preparation.
    """
    folder = Path(source).expanduser()
    meta = read_json(folder / "meta.json", REMEDY)
    found = meta.get("format")
    check(found == FORMAT, f"{folder / 'meta.json'} is of the format {found!r}, not {FORMAT!r}; {REMEDY}")
    expected = {folder / "tokenizer.json": meta["tokenizer"]}
    for number, shard in enumerate(meta["shards"]):
        expected |= {shard_file(folder, number, kind): shard["files"][kind] for kind in KINDS}
    _check_files(expected, Path(cache_dir))
    parts, validation = [], []
    for number, shard in enumerate(meta["shards"]):
        path, count = shard_file(folder, number, "tokens"), shard["tokens"]
        if count:
            tokens, ends = NpyFile(path), NpyFile(shard_file(folder, number, "ends"))
            wanted = f"{np.dtype(meta['dtype'])}[{count}]"
            check(
                f"{tokens.dtype}[{tokens.size}]" == wanted,
                f"{path} holds {tokens.dtype}[{tokens.size}], not {wanted}; {REMEDY}",
            )
            parts.append(Part(tokens, ends))
        lines = shard_file(folder, number, "heldout").read_text("utf-8").split("\n")
        validation += [Document(**json.loads(line)) for line in lines if line]
    train_digest = digest(json.dumps(meta, sort_keys=True))
    return Prepared(meta, parts, validation, load_tokenizer(folder), train_digest, digest_of(validation), describe(meta))


def shard_file(folder: Path, number: int, kind: str) -> Path:
    """Return the path of a file of a shard: "tokens", "ends" or "heldout"."""
    return folder / f"{number:05}.{KINDS[kind]}"


def shard_record(folder: Path, number: int) -> Path:
    """Return the path of the file that marks a shard as complete."""
    return folder / f"{number:05}.json"


def file_record(path: Path) -> dict[str, Any]:
    """Return size and digest of a file, as in meta.json."""
    with open(path, "rb") as file:
        hashed = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
    return {"size": path.stat().st_size, "digest": hashed.hexdigest()}


def _check_files(expected: dict[Path, dict[str, Any]], cache_dir: Path) -> None:
    """Raise ValueError for a file of another size than recorded, or another digest (of files not verified before)."""
    foreign = "it is damaged or foreign: copy or prepare it again"
    stamps = {path: stamp(path) for path in expected}
    for path, file in expected.items():
        check(
            stamps[path][0] == file["size"],
            f"{path} is {stamps[path][0]} bytes, and was prepared with {file['size']}; {foreign}",
        )

    def check_digest(path: Path) -> None:
        check(file_record(path) == expected[path], f"{path} does not have the digest it was prepared with; {foreign}")

    def check_all(done: Path) -> None:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(check_digest, expected))
        done.touch()

    verified = digest(*(f"{path.absolute()} {stamps[path]} {file['digest']}" for path, file in expected.items()))
    load_or_make(cache_dir / f"verified-{verified}", load=lambda path: None, write=check_all)
