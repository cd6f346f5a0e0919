"""Sources of documents: text and JSONL files, folders of them (also gzipped), and the standard library of the running Python.

The report trains on 14.8T tokens (arXiv 2412.19437, section 4.1); these sources replace them on any machine. A document is
named by the path of its file below the source, so that everything derived from names (the held-out split, the order of the
documents) is the same wherever the source lies. Paths go through etils, so `gs://` works where its driver is installed.
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

from dsv3_jax.config.checks import check

STDLIB = "stdlib"
_STDLIB_SUFFIXES = (".py", ".rst", ".txt", ".md")
# Installed packages are not the standard library. Its tests are excluded because many distributions do not ship them, so the
# corpus would depend on who built the Python; where they exist, they are most of the text, differ in style, and would name
# what the held-out packages define. `encodings` is tables of characters; `config-*` and `_sysconfigdata*` describe one machine.
_STDLIB_SKIPPED = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings")
_STDLIB_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, its name, and whether bytes in it were replaced."""

    name: str
    """Path below the source with forward slashes; for a line of a JSONL file also ":" and its number."""
    text: str
    """Never empty; always encodable as UTF-8."""
    replaced: bool = False
    """True if bytes (or lone surrogates) that are not text became U+FFFD."""

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8 bytes."""
        return len(self.text.encode("utf-8"))


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    name: str
    """Path below the source with forward slashes."""
    path: epath.Path
    source: str
    """The source and its option, for messages."""

    @property
    def is_jsonl(self) -> bool:
        """True if each line is a document; otherwise the file is one."""
        return self.name.removesuffix(".gz").endswith(".jsonl")

    @property
    def is_gzipped(self) -> bool:
        """True if the file is read through gzip."""
        return self.name.endswith(".gz")

    def read(self) -> bytes:
        """Return the whole content."""
        with self.open() as file:
            return file.read()

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes] | gzip.GzipFile]:
        """Open the content as a stream of bytes.

        Raises:
          ValueError: naming the file, if it cannot be opened, ends early or is damaged, also inside the `with` block.
        """
        try:
            with self.path.open("rb") as file:
                if self.is_gzipped:
                    with gzip.open(file) as content:
                        yield content
                else:
                    yield file
        except (OSError, EOFError, zlib.error) as error:
            remedy = "make it readable or move it away"
            raise ValueError(f"{self.source}: {self.name} cannot be read ({error}); {remedy}") from error


@dataclasses.dataclass(frozen=True)
class Record:
    """One line of a JSONL file."""

    name: str
    """Name of the file, ":" and the number of the line."""
    where: str
    """Path and number of the line, for messages."""
    values: dict[str, Any]
    replaced: bool
    """True if bytes that are not text became U+FFFD."""


def read_source(source: str, option: str = "data.source") -> tuple[list[Document], list[str]]:
    """Return all documents of `source`, ordered by file name, and the names of the binary files skipped.

    Files below a folder are text unless they contain a NUL byte. Hidden files and folders and empty documents are skipped.

    Args:
      source: "stdlib", or the path of a text file, a .jsonl file, or a folder of such files.
      option: the option that gave `source`, for messages.

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
            documents += documents_of(file, data.split(b"\n"))
        elif data:
            check_no_array(file, data)
            documents.append(Document(file.name, *_decode(data)))
    found = f"binary files (with a NUL byte): {len(binary)}" if binary else "no files but hidden or empty ones"
    check(bool(documents), f"{option} {source!r} holds no text ({found}); name UTF-8 text, JSONL, or {STDLIB!r}")
    return documents, binary


def source_files(source: str, option: str) -> list[SourceFile]:
    """Return the files of `source`, ordered by name; ValueError if the path is missing."""
    if source == STDLIB:
        root = epath.Path(sysconfig.get_paths()["stdlib"])
        files = [file for file in _walk(root, _STDLIB_SKIPPED, _STDLIB_SKIPPED_PREFIXES) if file.suffix in _STDLIB_SUFFIXES]
    else:
        root = epath.Path(source).expanduser()
        if root.is_dir():
            files = list(_walk(root))
        else:
            remedy = f"name a text file, a .jsonl file, a folder of them, or {STDLIB!r}"
            check(root.exists(), f"{option} {source!r} does not exist; {remedy}")
            root, files = root.parent, [root]
    files.sort(key=lambda file: file.relative_to(root).parts)
    return [SourceFile(file.relative_to(root).as_posix(), file, f"{option} {source!r}") for file in files]


def records(lines: Iterable[bytes], file: SourceFile, first_line: int = 1) -> Iterator[Record]:
    """Yield the records of JSONL lines, without empty ones; ValueError naming a line that is not an object."""
    for number, line in enumerate(lines, start=first_line):
        if not line.strip():
            continue
        where = f"{file.path}:{number}"
        content, replaced = _decode(line)
        try:
            values = json.loads(content)
        except ValueError as error:
            raise ValueError(f"{where} is not valid JSON ({error}); each line must be one object") from error
        check(isinstance(values, dict), f"{where} is {type(values).__name__}, not an object; each line must be one object")
        yield Record(f"{file.name}:{number}", where, values, replaced)


def documents_of(file: SourceFile, lines: Iterable[bytes], first_line: int = 1) -> Iterator[Document]:
    """Yield the documents of JSONL lines, without empty ones; ValueError naming a line without a "text" string."""
    for record in records(lines, file, first_line):
        text = record.values.get("text")
        if not isinstance(text, str):
            hint = "; conversations take data.kind chat" if "messages" in record.values else ""
            raise ValueError(f'{record.where} has no "text" string; each line must be an object like {{"text": "..."}}{hint}')
        if text:
            whole = paired(text)
            yield Document(record.name, whole, record.replaced or whole != text)


def whole_document(file: SourceFile) -> Document | None:
    """Return a file that is one document; None if it is binary or empty."""
    data = file.read()
    check_no_array(file, data)
    return Document(file.name, *_decode(data)) if data and b"\0" not in data else None


_RECORD_KEYS = {"text", "messages", "conversations"}


def check_no_array(file: SourceFile, data: bytes) -> None:
    """Raise ValueError for a .json file that is an array of texts or conversations, which would be read as one text."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not file.name.lower().removesuffix(".gz").endswith(".json") or data.lstrip()[:1] != b"[":
        return
    try:
        values = json.loads(data)
    except ValueError:
        return
    check(
        not values or not all(isinstance(each, dict) and _RECORD_KEYS & each.keys() for each in values),
        f"{file.source}: {file.name} is one JSON array; write one object per line into a .jsonl file "
        "(jq -c '.[]' data.json > data.jsonl)",
    )


def paired(text: str) -> str:
    """Replace lone surrogates, which JSON can spell and UTF-8 cannot encode, by U+FFFD."""
    return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


def _walk(folder: epath.Path, skipped: tuple[str, ...] = (), skipped_prefixes: tuple[str, ...] = ()) -> Iterator[epath.Path]:
    """Yield the files below `folder`, except hidden ones and those skipped by name."""
    skipped_prefixes = (".", *skipped_prefixes)
    for parent, folders, files in folder.walk():
        # Changing the list in place stops the walk from entering these folders.
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(skipped_prefixes)]
        paths = (parent / name for name in files if not name.startswith(skipped_prefixes))
        # etils, which also reads gs://, lists pipes and dangling links as files; on a disk only regular files are read.
        yield from (path for path in paths if "://" in str(path) or os.path.isfile(path))


def _decode(data: bytes) -> tuple[str, bool]:
    text = data.decode("utf-8", errors="replace")
    return text, text.encode("utf-8") != data
