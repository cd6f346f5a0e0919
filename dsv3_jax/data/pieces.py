"""A source cut into pieces of work, each of which becomes one shard of tokens.

Where pieces begin hangs on the sizes of the files and on nothing else, so that any number of workers makes the same shards. A
piece is whole documents: of a large .jsonl file, the lines that begin within its bytes. Finding them takes one pass over the
.jsonl files, which also counts lines, since a document is named by its number; a gzipped file cannot be entered in its
middle, and is not cut.
"""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

from dsv3_jax.config.checks import require
from dsv3_jax.data.sources import Document, SourceFile, documents_of, whole_document

_BLOCK = 1 << 24


class Segment(NamedTuple):
    """A file, or lines of it."""

    file: int
    """Its place among the files of the source."""
    size: int
    """Bytes of the whole file, by which a file that has changed since is found out."""
    start: int
    stop: int
    first_line: int
    """Number of the line at `start`, from 1."""


Piece = list[Segment]
Content = IO[bytes] | gzip.GzipFile


def cut_into_pieces(files: Iterable[SourceFile], piece_bytes: int) -> list[Piece]:
    """Pieces of `piece_bytes` and what is left of their last line or file; the last piece may be smaller."""
    pieces: list[Piece] = [[]]
    room = piece_bytes
    for number, file in enumerate(files):
        size = file.path.stat().length
        for start, stop, line in _segments(file, size, room, piece_bytes):
            pieces[-1].append(Segment(number, size, start, stop, line))
            room -= stop - start
            if room <= 0:
                pieces.append([])
                room = piece_bytes
    return pieces if pieces[-1] else pieces[:-1]


def documents_in(piece: Piece, files: list[SourceFile]) -> Iterator[tuple[Document | None, int]]:
    """The documents of a piece, one at a time, each with the bytes read since the last; None for a file without.

    Raises:
      ValueError: naming the file or line, if it is damaged or another than when the pieces were cut.
    """
    for segment in piece:
        file = files[segment.file]
        size = file.path.stat().length if file.path.exists() else 0
        require(
            size == segment.size,
            f"{file.source}: {file.name} is {size} bytes now and was {segment.size}; put it back, or start in another --output",
        )
        if not file.is_jsonl:
            yield whole_document(file), size
            continue
        with file.open() as content:
            lines = _lines(content, None if file.is_gzipped else segment)
            before = segment.start
            for document in documents_of(file, lines, segment.first_line):
                place = _place(content)
                yield document, place - before
                before = place


def _lines(content: Content, segment: Segment | None) -> Iterator[bytes]:
    """The lines of a segment, or of a whole file."""
    if segment is None:
        yield from content
        return
    place = content.seek(segment.start)
    while place < segment.stop:
        line = content.readline()
        yield line
        place += len(line)


def _place(content: Content) -> int:
    """How far a file is read, in bytes on the disk."""
    below: Any = content.fileobj if isinstance(content, gzip.GzipFile) else content
    return below.tell()


def _segments(file: SourceFile, size: int, room: int, piece_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first line) of the segments of a file, of which the first has `room` bytes."""
    if size == 0:
        return
    if not file.is_jsonl or file.is_gzipped:
        yield 0, size, 1
        return
    start, first_line, line = 0, 1, 1
    with file.open() as content:
        while start + room < size:
            # To the end of the line that holds the last byte of the room.
            line += sum(block.count(b"\n") for block in _blocks(content, room - 1)) + 1
            stop = start + room - 1 + len(content.readline())
            if stop >= size:
                break
            yield start, stop, first_line
            start, first_line, room = stop, line, piece_bytes
    yield start, size, first_line


def _blocks(content: Content, count: int) -> Iterator[bytes]:
    """The next `count` bytes."""
    for left in itertools.count(count, -_BLOCK):
        if left <= 0:
            return
        yield content.read(min(left, _BLOCK))
