"""`python -m dsv3_jax.data.prepare --source S --tokenizer T --output DIR`: tokenises a corpus once, in parallel.

The corpus may be far larger than memory. It is cut into pieces by the sizes of its files (`pieces.py`), and each piece becomes
a shard, made by one process and renamed into place when it is whole. A preparation that was killed, at whatever moment, is
continued by the same command: whole shards stay, and the folder comes out the same to the byte as if nothing had happened,
and for any number of workers. `--data.source DIR` then trains on the folder (`shards.py`). Copies among the documents are not
looked for: deduplicate first.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import gzip
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import tokenizers
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from dsv3_jax.config import DataConfig
from dsv3_jax.config.checks import OpenShare, PositiveInt, Seed, Share, check, check_fields
from dsv3_jax.config.cli import cli_main, parse_flags
from dsv3_jax.data.corpus import is_validation, split_tail
from dsv3_jax.data.shards import FORMAT, KINDS, describe, file_record, read_json, shard_file, shard_record
from dsv3_jax.data.sources import Document, SourceFile, documents_of, source_files, whole_document
from dsv3_jax.data.storage import digest
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer, named_tokens
from dsv3_jax.data.tokens import FillInTheMiddle, encode_documents, id_dtype


@dataclasses.dataclass(frozen=True)
class PrepareFlags:
    """What to tokenise, and how."""

    source: str
    """Text file, .jsonl file with a "text" field, folder of such files (also gzipped), or "stdlib"."""
    tokenizer: str
    """A tokenizer.json, or its folder."""
    output: str
    """Folder to write; one that holds the beginning of the same preparation is continued."""
    bos_token: str | None = None
    """Token that opens a document, "" for none; None is what tokenizer_config.json names, else <bos> if there is one."""
    eos_token: str | None = None
    """Token that ends a document; None is what tokenizer_config.json names, else <eos>."""
    fim_rate: Share = 0.0
    """Share of the documents that are written as prefix, suffix, middle, to be filled in; the report takes 0.1."""
    fim_tokens: tuple[str, str, str] = DataConfig.fim_tokens
    """The special tokens before the prefix, the suffix and the middle."""
    seed: Seed = 0
    """Seed of which documents these are."""
    heldout_fraction: OpenShare = 0.001
    """Share of the documents held out (by hash of their names; of a lone one, its end); "stdlib" has a fixed split."""
    shard_megabytes: PositiveInt = 128
    """Text that one shard holds, in units of 10**6 bytes as they lie on the disk; the work of a shard is lost by a kill."""
    workers: PositiveInt | None = None
    """Processes; None is one for each processor."""

    def __post_init__(self) -> None:
        check_fields(self)


@cli_main
def main() -> None:
    """The command line; prints one line."""
    started = time.perf_counter()
    meta, tokens = prepare(parse_flags(PrepareFlags, description=__doc__ or ""))
    seconds = time.perf_counter() - started
    print(f"{describe(meta)}; {tokens:,} tokens now, in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)")


def prepare(flags: PrepareFlags) -> tuple[dict[str, Any], int]:
    """Makes the folder, or what is missing of it.

    Returns:
      its meta.json, and the tokens that were made by this call.

    Raises:
      ValueError: on whatever is wrong with the source, the tokenizer, or a folder that holds something else.
    """
    check("://" not in flags.output, f"--output is {flags.output!r}; name a folder of this machine")
    tokenizer = load_tokenizer(flags.tokenizer)
    named = named_tokens(flags.tokenizer)
    bos = _token_id(tokenizer, "bos_token", flags.bos_token, named.get("bos_token"), "<bos>")
    eos = _token_id(tokenizer, "eos_token", flags.eos_token, named.get("eos_token"), "<eos>")
    check(eos is not None, "--eos-token is empty; name the token that ends a document")
    assert eos is not None
    fim = FillInTheMiddle.of(flags.fim_rate, flags.fim_tokens, flags.seed, tokenizer)
    options = {
        "format": FORMAT,
        "tokenizer_digest": digest(tokenizer.to_json()),
        "tokenizers_version": tokenizers.__version__,
        "vocab_size": tokenizer.vocab_size,
        "dtype": id_dtype(tokenizer.vocab_size).name,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "fim_rate": flags.fim_rate,
        "fim_tokens": list(flags.fim_tokens) if fim else [],
        "seed": flags.seed if fim else 0,
        "heldout_fraction": flags.heldout_fraction,
        "shard_megabytes": flags.shard_megabytes,
    }
    folder = Path(flags.output).expanduser()
    files = source_files(flags.source, "--source")
    plan = _open_folder(folder, options, [file.name for file in files])
    if plan is None:
        pieces = cut_into_pieces(files, flags.shard_megabytes * 10**6)
        check(bool(pieces), f"--source {flags.source!r} holds no text; name UTF-8 text or JSONL")
        write_whole(folder / "tokenizer.json", tokenizer.to_json())
        plan = {"options": options, "files": [file.name for file in files], "pieces": pieces}
        write_whole(folder / "plan.json", json.dumps(plan) + "\n")
    pieces = [[Segment(*segment) for segment in piece] for piece in plan["pieces"]]
    # Read again from the file: JSON makes lists of the tuples.
    plan_digest = digest((folder / "plan.json").read_text("utf-8"))
    is_lone = len(files) == 1 and not files[0].is_jsonl
    job = Job(flags.source, files, folder, pieces, plan_digest, bos, eos, fim, flags.heldout_fraction, is_lone)
    missing = [number for number in range(len(pieces)) if not _is_whole(job, number)]
    made = _make_all(job, missing, min(flags.workers or os.cpu_count() or 1, max(len(missing), 1)))
    return _write_meta(job, options), made


def _token_id(tokenizer: Tokenizer, option: str, given: str | None, named: str | None, usual: str) -> int | None:
    """The id of a document mark; None where it is given as empty, or is the opening one and nothing names it."""
    ids = {text: id_ for id_, text in tokenizer.added_tokens.items()}
    if given == "":
        return None
    text = given if given is not None else named if named is not None else usual
    if given is None and named is None and option == "bos_token" and usual not in ids:
        return None
    check(text in ids, f"the tokenizer has no added token {text!r}; name its {option} with --{option.replace('_', '-')}")
    return ids[text]


def _open_folder(folder: Path, options: dict[str, Any], names: list[str]) -> dict[str, Any] | None:
    """The plan of a preparation that has begun; None if the folder is new.

    Raises:
      ValueError: if the folder holds another preparation, or something else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for draft in folder.glob(".draft-*"):
            _remove_stale(draft)
    except OSError as error:
        raise ValueError(f"--output {str(folder)!r} cannot be written ({error}); name another folder") from error
    if not (folder / "plan.json").exists():
        others = sorted(path.name for path in folder.iterdir() if path.name != "tokenizer.json" and path.name[:1] != ".")
        check(not others, f"--output {str(folder)!r} holds {others[:1]} and no plan.json; name another folder")
        return None
    plan = read_json(folder / "plan.json")
    before = plan.get("options", {})
    changed = [name for name in options if before.get(name) != options[name]]
    check(
        not changed,
        f"--output {str(folder)!r} was begun with {', '.join(f'{name} {before.get(name)}' for name in changed)}, now "
        f"{', '.join(str(options[name]) for name in changed)}; use the same, or name another folder",
    )
    if plan.get("files") != names:
        raise ValueError(
            f"--output {str(folder)!r} was begun with other files in the source: {_difference(plan.get('files', []), names)}; "
            "put them back, or name another folder"
        )
    return plan


def _difference(before: list[str], now: list[str]) -> str:
    gone, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
    return f"{gone[0]!r} is gone" if gone else f"{new[0]!r} is new"


def _remove_stale(draft: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # Another preparation may have finished it.
        draft.unlink()


def _is_whole(job: Job, number: int) -> bool:
    if not shard_record(job.folder, number).exists():
        return False
    record = read_json(shard_record(job.folder, number))
    paths = {kind: shard_file(job.folder, number, kind) for kind in KINDS}
    sizes = {kind: path.stat().st_size if path.exists() else None for kind, path in paths.items()}
    return record["plan"] == job.plan and sizes == {kind: record["files"][kind]["size"] for kind in KINDS}


def _write_meta(job: Job, options: dict[str, Any]) -> dict[str, Any]:
    shards = [read_json(shard_record(job.folder, number)) for number in range(len(job.pieces))]
    counts = {name: sum(shard[name] for shard in shards) for name in COUNTS}
    place = f"--source {job.source!r}"
    check(counts["documents"] > 0, f"{place} gives no document to train on; give more text or a lower --heldout-fraction")
    check(
        counts["heldout_documents"] > 0,
        f"{place}: of {counts['documents']} documents none was chosen to be held out; raise --heldout-fraction "
        f"({job.heldout_fraction}), in another --output",
    )
    tokenizer = file_record(job.folder / "tokenizer.json")
    meta = {**options, **counts, "plan": job.plan, "tokenizer": tokenizer, "shards": shards}
    write_whole(job.folder / "meta.json", json.dumps(meta) + "\n")
    return meta


def _make_all(job: Job, missing: list[int], workers: int) -> int:
    """Makes the shards of the pieces `missing`, and shows a bar, or lines where there is no terminal; the tokens made."""
    if not missing:
        return 0
    context = multiprocessing.get_context("spawn")  # A fork would take the threads of the tokenizers library apart.
    read, made, stop = context.Value("q", 0), context.Value("q", 0), context.Event()
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    total = sum(segment.stop - segment.start for number in missing for segment in job.pieces[number])
    started, shown = time.perf_counter(), 0
    with (
        Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress,
        concurrent.futures.ProcessPoolExecutor(workers, context, start_worker, (job, read, made, stop)) as pool,
    ):
        task = progress.add_task(f"{len(missing)} shards", total=total)
        try:
            waiting = {pool.submit(make_shard, number) for number in missing}
            while waiting:
                done, waiting = concurrent.futures.wait(waiting, 0.2, concurrent.futures.FIRST_EXCEPTION)
                for future in done:
                    future.result()
                # Without their locks, which a worker that is killed may hold for ever.
                bytes_read, tokens = read.get_obj().value, made.get_obj().value
                rate = tokens / (time.perf_counter() - started)
                text = f"{len(waiting)} of {len(missing)} shards to go  {rate:,.0f} tokens/s"
                progress.update(task, completed=bytes_read, description=text)
                if not console.is_terminal and 10 * bytes_read // total > shown:
                    shown = 10 * bytes_read // total
                    print(text, file=sys.stderr, flush=True)
        except concurrent.futures.BrokenExecutor as error:
            raise ValueError(
                f"a worker was killed, maybe for want of memory; the same command with fewer --workers than {workers} continues"
            ) from error
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
    return made.get_obj().value


if __name__ == "__main__":
    main()


# ----------------------------------------------------------------------------------------------------------------------
# A source cut into pieces of work, each of which becomes one shard of tokens.


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
        check(
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


# ----------------------------------------------------------------------------------------------------------------------
# The processes of a preparation: each makes one shard after the other, of the pieces that it is given.


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
        with _draft(shard_file(self.job.folder, number, "heldout")) as draft, open(draft, "w", encoding="utf-8") as validation:
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
                    validation.write(json.dumps(dataclasses.asdict(held)) + "\n")
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
        if is_validation(self.job.source, document.name, self.job.heldout_fraction):
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
