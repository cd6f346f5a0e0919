"""Pieces: every document in one piece, whole, whatever their size, under the name that reading the source gives it."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path

import pytest

from dsv3_jax.data.prepare import cut_into_pieces, documents_in
from dsv3_jax.data.sources import read_source, source_files


def write_source(folder: Path) -> None:
    generator = random.Random(0)
    lines = [json.dumps({"text": f"{number} " + "é" * generator.randrange(60)}, ensure_ascii=False) for number in range(200)]
    lines[7:7] = ["", "   "]
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "b.jsonl").write_text("\n".join(lines[:30]), "utf-8")  # no newline at its end
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:50]).encode()))
    (folder / "d.txt").write_text("text " * 50)
    (folder / "e.bin").write_bytes(b"\0")
    (folder / "empty.jsonl").write_text("")
    (folder / "empty.txt").write_text("")
    (folder / "sub" / "f.txt.gz").write_bytes(gzip.compress(b"more text"))


@pytest.mark.parametrize("piece_bytes", [1, 2, 50, 137, 1000, 5000, 10**9])
def test_pieces_are_the_source(tmp_path: Path, piece_bytes: int) -> None:
    write_source(tmp_path)
    files = source_files(str(tmp_path), "--source")
    pieces = cut_into_pieces(files, piece_bytes)
    read = [list(documents_in(piece, files)) for piece in pieces]
    documents, _ = read_source(str(tmp_path))
    assert [document for part in read for document, _ in part if document is not None] == documents
    for piece in pieces[:-1]:
        size = sum(segment.stop - segment.start for segment in piece)
        assert size >= piece_bytes
        assert size - (piece[-1].stop - piece[-1].start) < piece_bytes
    assert len(pieces) == 1 if piece_bytes == 10**9 else len(pieces) > 3
    # Progress: what is read adds up to the files, less what stands behind their last documents.
    total = sum(segment.stop - segment.start for piece in pieces for segment in piece)
    assert 0.9 * total <= sum(size for part in read for _, size in part) <= total


def test_a_file_that_has_changed_is_named(tmp_path: Path) -> None:
    write_source(tmp_path)
    files = source_files(str(tmp_path), "--source")
    pieces = cut_into_pieces(files, 1000)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"--source '.*': a\.jsonl is \d+ bytes now and was \d+; restore it"):
        list(documents_in(pieces[1], files))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(ValueError, match=r"a\.jsonl is 0 bytes now"):
        list(documents_in(pieces[1], files))


def test_a_bad_line_is_named_by_its_number(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"line {number}"}) for number in range(100)]
    lines[70] = '{"text": '
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    files = source_files(str(tmp_path), "--source")
    pieces = cut_into_pieces(files, 300)
    assert len(pieces) > 4
    with pytest.raises(ValueError, match=r"a\.jsonl:71 is not valid JSON"):
        [list(documents_in(piece, files)) for piece in pieces]


def test_a_file_that_is_cut_short_while_it_is_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": "x" * 1000}) + "\n") * 2000)
    files = source_files(str(tmp_path), "--source")
    (piece,) = cut_into_pieces(files, 10**9)
    reading = documents_in(piece, files)
    next(reading)
    os.truncate(tmp_path / "a.jsonl", 1000 * 1013)
    with pytest.raises(ValueError, match=r"--source '.*': a\.jsonl was cut short while it was read"):
        list(reading)
