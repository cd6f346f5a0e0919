"""Text into documents: a file, a JSONL file, a folder of either, or the standard library of the running Python.

The report trains on 14.8T tokens (arXiv 2412.19437, section 4.1); this stands in their place on any machine.
A document keeps the name its file has below the source, so that what hangs on names (the held-out split, the
order of the documents) is the same wherever the source lies. Paths go through etils, so `gs://` works where
its driver is installed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sysconfig
from collections.abc import Iterator

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
    if source == STDLIB:
        root, files = _stdlib_files()
    else:
        root, files = _files(source, option)
    documents: list[Document] = []
    binary: list[str] = []
    for path in files:
        name = path.relative_to(root).as_posix()
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(
                f"{option} {source!r}: {name} cannot be read ({error}); make it readable or move it away"
            ) from error
        if b"\0" in data:
            binary.append(name)
        elif name.endswith(".jsonl"):
            documents += _jsonl_documents(name, path, data)
        else:
            documents.append(Document(name, *_decode(data)))
    documents = [document for document in documents if document.text]
    if not documents:
        found = f"binary files (with a NUL byte): {len(binary)}" if binary else "no files but hidden or empty ones"
        raise ValueError(f"{option} {source!r} holds no text ({found}); name UTF-8 text, JSONL, or {STDLIB!r}")
    return documents, binary


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


def _jsonl_documents(name: str, path: epath.Path, data: bytes) -> Iterator[Document]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        content, replaced = _decode(line)
        try:
            record = json.loads(content)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not valid JSON ({error}); each line must be one object") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(f'{path}:{number} has no "text" string; each line must be an object like {{"text": "..."}}')
        # JSON can spell half of a surrogate pair, which no UTF-8 text can hold.
        paired = text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
        yield Document(f"{name}:{number}", paired, replaced or paired != text)
