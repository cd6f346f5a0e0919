"""The processes of a preparation: each makes one shard after the other, of the pieces that it is given.

A file is written beside its place and renamed into it, and the record of a shard comes last, so that what is there is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.data.corpus import is_held_out, split_tail
from dsv3_jax.data.fim import FillInTheMiddle
from dsv3_jax.data.pieces import Piece, documents_in
from dsv3_jax.data.shards import KINDS, file_record, shard_file, shard_record
from dsv3_jax.data.sources import Document, SourceFile
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.data.tokens import encode_documents, id_dtype

COUNTS = (
    "tokens", "documents", "bytes", "fim_documents", "heldout_documents", "heldout_bytes", "replaced", "passed_over",
)  # fmt: skip
"""What the record of a shard counts."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker needs to know to make any piece."""

    source: str
    files: list[SourceFile]
    folder: Path
    pieces: list[Piece]
    plan: str
    """Digest of plan.json, which says that a shard belongs to it."""
    bos: int | None
    eos: int
    fim: FillInTheMiddle | None
    heldout_fraction: float
    is_lone: bool
    """Whether the source is a single document, whose end is held out."""


class _Worker:
    """A process that makes shards."""

    def __init__(self, job: Job, read: Any, made: Any, stop: Any) -> None:
        self.job = job
        self.tokenizer = load_tokenizer(job.folder)
        self._read = read
        self._made = made
        self._stop = stop

    def documents(self, number: int, counts: dict[str, int]) -> Iterator[Document]:
        """The training documents of a piece; what is held out goes to `counts` and its file."""
        with _draft(shard_file(self.job.folder, number, "heldout")) as draft, open(draft, "w", encoding="utf-8") as heldout:
            for document, num_bytes in documents_in(self.job.pieces[number], self.job.files):
                if self._stop.is_set():
                    raise KeyboardInterrupt
                with self._read.get_lock():
                    self._read.value += num_bytes
                if document is None:
                    counts["passed_over"] += 1
                    continue
                counts["replaced"] += document.replaced
                train, held = self._split(document)
                if held is not None:
                    counts["heldout_documents"] += 1
                    counts["heldout_bytes"] += held.num_bytes
                    heldout.write(json.dumps(dataclasses.asdict(held)) + "\n")
                if train is not None:
                    counts["documents"] += 1
                    counts["bytes"] += train.num_bytes
                    counts["fim_documents"] += self.job.fim is not None and self.job.fim.cuts(train) is not None
                    yield train

    def add_tokens(self, count: int) -> None:
        """Tells the progress bar."""
        with self._made.get_lock():
            self._made.value += count

    def _split(self, document: Document) -> tuple[Document | None, Document | None]:
        if self.job.is_lone:
            (train,), (held,) = split_tail(document, self.job.heldout_fraction)
            return train, held
        if is_held_out(self.job.source, document.name, self.job.heldout_fraction):
            return None, document
        return document, None


_worker: _Worker


def start_worker(job: Job, read: Any, made: Any, stop: Any) -> None:
    """What each process does first."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # The processes share the cores already.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of them; the first one stops the others.
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _worker = _Worker(job, read, made, stop)


def make_shard(number: int) -> None:
    """Makes the shard of one piece: its three files, then its record."""
    job, counts, ends = _worker.job, dict.fromkeys(COUNTS, 0), []
    dtype = id_dtype(_worker.tokenizer.vocab_size)
    with _draft(shard_file(job.folder, number, "tokens")) as draft, open(draft, "wb") as file:
        # The header leaves room for the count to grow, so that it can be written again over itself.
        header_size = _write_header(file, dtype, 0)
        documents = encode_documents(_worker.documents(number, counts), _worker.tokenizer, job.bos, job.eos, job.fim)
        for ids in documents:
            file.write(np.array(ids, dtype).tobytes())
            counts["tokens"] += len(ids)
            ends.append(counts["tokens"])
            _worker.add_tokens(len(ids))
        file.seek(0)
        assert _write_header(file, dtype, counts["tokens"]) == header_size
    with _draft(shard_file(job.folder, number, "ends")) as draft:
        with open(draft, "wb") as file:
            np.save(file, np.array(ends, np.int64))
    files = {kind: file_record(shard_file(job.folder, number, kind)) for kind in KINDS}
    write_whole(shard_record(job.folder, number), json.dumps({"plan": job.plan, **counts, "files": files}) + "\n")


def _write_header(file: Any, dtype: np.dtype, count: int) -> int:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


@contextlib.contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place, whole and on the disk, when all went well."""
    descriptor, name = tempfile.mkstemp(prefix=f".draft-{path.name}-", dir=path.parent)
    os.close(descriptor)
    draft = Path(name)
    try:
        yield draft
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        draft.chmod(0o666 & ~_umask())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole, or not at all."""
    with _draft(path) as draft:
        draft.write_text(text, "utf-8")
