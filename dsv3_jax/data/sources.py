"""Text into documents: a file, a JSONL file, a folder of either (also gzipped), or the standard library of the running Python.

The report trains on 14.8T tokens (arXiv 2412.19437, section 4.1); this stands in their place on any machine.
A document keeps the name its file has below the source, so that what hangs on names (the held-out split, the
order of the documents) is the same wherever the source lies. Paths go through etils, so `gs://` works where
its driver is installed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

from etils import epath

STDLIB = "stdlib"
_STDLIB_SUFFIXES = (".py", ".rst", ".txt", ".md")
# Installed packages are not the standard library. Its tests are left out because many distributions do not ship
# them, so the corpus would depend on who built the Python; where they are, they are most of the text, read unlike
# the rest, and would name what the held-out packages define. `encodings` is tables of characters; `config-*` and
# `_sysconfigdata*` describe one machine.
_STDLIB_SKIPPED = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings")
_STDLIB_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


@dataclasses.dataclass(frozen=True)
class Document:
    """One text and its name."""

    name: str
    """Path below the source with forward slashes; a line of a JSONL file adds ":" and its number."""
    text: str
    """Never empty; always encodable as UTF-8."""
    replaced: bool = False
    """Whether bytes (or lone surrogates) that are no text became U+FFFD."""

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8 bytes."""
        return len(self.text.encode("utf-8"))


def read_source(source: str, option: str = "data.source") -> tuple[list[Document], list[str]]:
    """All documents of `source` in the order of their files' names, and the names of the binary files passed over.

    Files below a folder count as text unless they hold a NUL byte; hidden files and folders are not read, nor
    are empty documents.

    Args:
      source: "stdlib", or the path of a text file, a .jsonl file, or a folder of such files.
      option: what `source` was given as, for messages.

    Raises:
      ValueError: if the path is missing, cannot be read or holds no text, or a line of a .jsonl file is not a JSON object
        with a "text" string.
    """
    documents: list[Document] = []
    binary: list[str] = []
    for file in source_files(source, option):
        data = file.read()
        if b"\0" in data:
            binary.append(file.name)
        elif file.is_jsonl:
            documents += (_document(record, file) for record in records(data.split(b"\n"), file))
        else:
            documents.append(Document(file.name, *_decode(data)))
    documents = [document for document in documents if document.text]
    if not documents:
        found = f"binary files (with a NUL byte): {len(binary)}" if binary else "no files but hidden or empty ones"
        raise ValueError(f"{option} {source!r} holds no text ({found}); name UTF-8 text, JSONL, or {STDLIB!r}")
    return documents, binary


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    name: str
    """Path below the source with forward slashes."""
    path: epath.Path
    source: str
    """The source and the option it was given by, for messages."""

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a document; else the file is one."""
        return self.name.removesuffix(".gz").endswith(".jsonl")

    @property
    def is_gzipped(self) -> bool:
        """Whether the file is read through gzip."""
        return self.name.endswith(".gz")

    def read(self) -> bytes:
        """The whole content."""
        with self.open() as file:
            return file.read()

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes] | gzip.GzipFile]:
        """The content as a stream of bytes.

        Raises:
          ValueError: naming the file, if it cannot be opened, or breaks off or turns out damaged while it is read.
        """
        try:
            with self.path.open("rb") as file:
                if self.is_gzipped:
                    with gzip.open(file) as content:
                        yield content
                else:
                    yield file
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{self.source}: {self.name} cannot be read ({error}); make it readable or move it away"
            ) from error


@dataclasses.dataclass(frozen=True)
class Record:
    """One line of a JSONL file."""

    name: str
    """Name of the document: that of the file, ":" and the number of the line."""
    where: str
    """Path and number of the line, for messages."""
    values: dict[str, Any]
    replaced: bool
    """Whether bytes that are no text became U+FFFD."""


def source_files(source: str, option: str) -> list[SourceFile]:
    """The files of `source`, in the order of their names.

    Raises:
      ValueError: if the path is missing.
    """
    root, files = _stdlib_files() if source == STDLIB else _files(source, option)
    return [SourceFile(path.relative_to(root).as_posix(), path, f"{option} {source!r}") for path in files]


def records(lines: Iterable[bytes], file: SourceFile, first_line: int = 1) -> Iterator[Record]:
    """The records of a JSONL file, or of a part of it that opens with the line `first_line`; empty lines are none.

    Raises:
      ValueError: naming the line, if it is not a JSON object.
    """
    for number, line in enumerate(lines, start=first_line):
        if not line.strip():
            continue
        where = f"{file.path}:{number}"
        content, replaced = _decode(line)
        try:
            values = json.loads(content)
        except ValueError as error:
            raise ValueError(f"{where} is not valid JSON ({error}); each line must be one object") from error
        if not isinstance(values, dict):
            raise ValueError(f"{where} is {type(values).__name__}, not an object; each line must be one object")
        yield Record(f"{file.name}:{number}", where, values, replaced)


def documents_of(file: SourceFile, lines: Iterable[bytes], first_line: int = 1) -> Iterator[Document]:
    """The documents of the lines of a JSONL file, empty ones left out, one at a time.

    Raises:
      ValueError: naming the line, if it is not a JSON object with a "text" string.
    """
    for record in records(lines, file, first_line):
        document = _document(record, file)
        if document.text:
            yield document


def whole_document(file: SourceFile) -> Document | None:
    """A file that is one document; None if it is binary or empty."""
    data = file.read()
    return Document(file.name, *_decode(data)) if data and b"\0" not in data else None


def paired(text: str) -> str:
    """`text` with U+FFFD for halves of surrogate pairs, which JSON can spell and no UTF-8 text can hold."""
    return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


def _files(source: str, option: str) -> tuple[epath.Path, list[epath.Path]]:
    """The folder that names count from, and the files to read, sorted."""
    path = epath.Path(source).expanduser()
    if path.is_dir():
        return path, sorted(_walk(path), key=lambda file: file.relative_to(path).parts)
    if path.exists():
        return path.parent, [path]
    raise ValueError(f"{option} {source!r} does not exist; name a text file, a .jsonl file, a folder of them, or {STDLIB!r}")


def _stdlib_files() -> tuple[epath.Path, list[epath.Path]]:
    root = epath.Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in _walk(root, _STDLIB_SKIPPED, _STDLIB_SKIPPED_PREFIXES) if file.suffix in _STDLIB_SUFFIXES]
    return root, sorted(files, key=lambda file: file.relative_to(root).parts)


def _walk(folder: epath.Path, skipped: tuple[str, ...] = (), skipped_prefixes: tuple[str, ...] = ()) -> Iterator[epath.Path]:
    """Files below `folder`, without what is hidden and what is skipped by name."""
    skipped_prefixes = (".", *skipped_prefixes)
    for parent, folders, files in folder.walk():
        # Changed in place: that is how a walk is told where not to go.
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(skipped_prefixes)]
        paths = (parent / name for name in files if not name.startswith(skipped_prefixes))
        # On a disk a pipe would be waited for, and a link may lead nowhere; to etils, which reads gs:// too, both are files.
        yield from (path for path in paths if "://" in str(path) or os.path.isfile(path))


def _decode(data: bytes) -> tuple[str, bool]:
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError:
        return data.decode("utf-8", errors="replace"), True


def _document(record: Record, file: SourceFile) -> Document:
    text = record.values.get("text")
    if not isinstance(text, str):
        looks_like = "; conversations take data.kind chat" if "messages" in record.values else ""
        raise ValueError(f'{record.where} has no "text" string; each line must be an object like {{"text": "..."}}{looks_like}')
    whole = paired(text)
    return Document(record.name, whole, record.replaced or whole != text)
