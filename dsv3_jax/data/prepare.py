"""`python -m dsv3_jax.data.prepare --source S --tokenizer T --output DIR`: tokenise a corpus once, in parallel and resumably.

The corpus may be far larger than memory. It is cut into pieces by the sizes of its files, and each piece becomes a shard,
written by one process and renamed into place when it is complete. The same command continues a preparation that was killed
at any moment: complete shards stay, and the folder has the same bytes as if nothing had happened, for any number of workers.
`--data.source DIR` then trains on the folder (`shards.py`). Copies among the documents are not detected: deduplicate first.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gzip
import json
import multiprocessing
import os
import signal
import sys
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
from dsv3_jax.data.shards import FORMAT, KINDS, REMEDY, describe, file_record, shard_file, shard_record
from dsv3_jax.data.sources import Document, SourceFile, documents_of, source_files, whole_document
from dsv3_jax.data.storage import digest, draft_of, read_json
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer, named_tokens
from dsv3_jax.data.tokens import FillInTheMiddle, encode_documents, id_dtype


@dataclasses.dataclass(frozen=True)
class PrepareFlags:
    """Source, tokenizer and options of a preparation."""

    source: str
    """Text file, .jsonl file with a "text" field, folder of such files (also gzipped), or "stdlib"."""
    tokenizer: str
    """A tokenizer.json, or its folder."""
    output: str
    """Folder to write; one that holds the beginning of the same preparation is continued."""
    bos_token: str | None = None
    """Token before each document, "" for none; None is the one in tokenizer_config.json, else <bos> if there is one."""
    eos_token: str | None = None
    """Token after each document; None is the one in tokenizer_config.json, else <eos>."""
    fim_rate: Share = 0.0
    """Share of the documents written as prefix, suffix, middle, to be filled in; the report takes 0.1."""
    fim_tokens: tuple[str, str, str] = DataConfig.fim_tokens
    """The special tokens before the prefix, the suffix and the middle."""
    seed: Seed = 0
    """Seed of the choice of these documents."""
    heldout_fraction: OpenShare = 0.001
    """Share of the documents held out (by hash of their names; of a single one, its end); "stdlib" has a fixed split."""
    shard_megabytes: PositiveInt = 128
    """Text of one shard, in units of 10**6 bytes on the disk; a kill loses the work on unfinished shards."""
    workers: PositiveInt | None = None
    """Processes; None is one for each processor."""

    def __post_init__(self) -> None:
        check_fields(self)


@cli_main
def main() -> None:
    """Prepare the corpus as the flags say; print one line: what the folder holds, and the tokens and seconds of this start."""
    started = time.perf_counter()
    meta, tokens = prepare(parse_flags(PrepareFlags, description=__doc__ or ""))
    seconds = time.perf_counter() - started
    print(f"{describe(meta)}; {tokens:,} tokens now, in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)")


def prepare(flags: PrepareFlags) -> tuple[dict[str, Any], int]:
    """Write the folder, or the missing part of it.

    Returns:
      its meta.json, and the number of tokens written by this call.

    Raises:
      ValueError: for every defect of the source or the tokenizer, and if the folder holds something else.
    """
    check("://" not in flags.output, f"--output is {flags.output!r}; name a folder of this machine")
    tokenizer = load_tokenizer(flags.tokenizer)
    named = named_tokens(flags.tokenizer)
    bos = _token_id(tokenizer, "bos_token", flags.bos_token, named)
    eos = _token_id(tokenizer, "eos_token", flags.eos_token, named)
    if eos is None:
        raise ValueError("--eos-token is empty; name the token that ends a document")
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
    names = [file.name for file in files]
    if not _has_begun(folder, options, names):
        pieces = cut_into_pieces(files, flags.shard_megabytes * 10**6)
        check(bool(pieces), f"--source {flags.source!r} holds no text; name UTF-8 text or JSONL")
        _write_whole(folder / "tokenizer.json", tokenizer.to_json())
        _write_whole(folder / "plan.json", json.dumps({"options": options, "files": names, "pieces": pieces}) + "\n")
    plan = read_json(folder / "plan.json", REMEDY)
    pieces = [[Segment(*segment) for segment in piece] for piece in plan["pieces"]]
    plan_digest = digest((folder / "plan.json").read_text("utf-8"))
    is_single = len(files) == 1 and not files[0].is_jsonl
    job = Job(flags.source, files, folder, pieces, plan_digest, bos, eos, fim, flags.heldout_fraction, is_single)
    missing = [number for number in range(len(pieces)) if not _is_whole(job, number)]
    made = _make_shards(job, missing, min(flags.workers or os.cpu_count() or 1, len(missing))) if missing else 0
    return _write_meta(job, options), made


def _token_id(tokenizer: Tokenizer, option: str, given: str | None, named: dict[str, str]) -> int | None:
    """Return the id of a document mark; None if it is given as empty, or is the opening one and nothing names it."""
    ids, default = tokenizer.added_ids, f"<{option[:3]}>"
    text = named.get(option) if given is None else given
    if given == "" or (text is None and option == "bos_token" and default not in ids):
        return None
    text = default if text is None else text
    check(text in ids, f"the tokenizer has no added token {text!r}; name its {option} with --{option.replace('_', '-')}")
    return ids[text]


def _has_begun(folder: Path, options: dict[str, Any], names: list[str]) -> bool:
    """Return True if `folder` holds the beginning of this preparation, False if it is new; else ValueError."""
    output = f"--output {str(folder)!r}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for draft in folder.glob(".draft-*"):
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{output} cannot be written ({error}); name another folder") from error
    if not (folder / "plan.json").exists():
        others = sorted(path.name for path in folder.iterdir() if path.name != "tokenizer.json" and path.name[:1] != ".")
        check(not others, f"{output} holds {others[:1]} and no plan.json; name another folder")
        return False
    plan = read_json(folder / "plan.json", REMEDY)
    before, files = plan.get("options", {}), plan.get("files", [])
    changed = [name for name in options if before.get(name) != options[name]]
    was, now = ", ".join(f"{name} {before.get(name)}" for name in changed), ", ".join(str(options[name]) for name in changed)
    check(not changed, f"{output} was begun with {was}, now {now}; use the same, or name another folder")
    if files != names:
        name = min(set(files) ^ set(names))
        difference = f"{name!r} is {'gone' if name in files else 'new'}; put them back, or name another folder"
        raise ValueError(f"{output} was begun with other files in the source: {difference}")
    return True


def _is_whole(job: Job, number: int) -> bool:
    """Return True if a shard of this plan is complete, with files of the recorded sizes."""
    if not shard_record(job.folder, number).exists():
        return False
    record = read_json(shard_record(job.folder, number), REMEDY)
    paths = {kind: shard_file(job.folder, number, kind) for kind in KINDS}
    sizes = {kind: path.stat().st_size if path.exists() else None for kind, path in paths.items()}
    return record["plan"] == job.plan and sizes == {kind: record["files"][kind]["size"] for kind in KINDS}


def _write_meta(job: Job, options: dict[str, Any]) -> dict[str, Any]:
    shards = [read_json(shard_record(job.folder, number), REMEDY) for number in range(len(job.pieces))]
    counts = {name: sum(shard[name] for shard in shards) for name in COUNTS}
    source = f"--source {job.source!r}"
    check(counts["documents"] > 0, f"{source} gives no document to train on; give more text or a lower --heldout-fraction")
    check(
        counts["heldout_documents"] > 0,
        f"{source}: of {counts['documents']} documents none was chosen to be held out; raise --heldout-fraction "
        f"({job.heldout_fraction}), and name a new folder as --output",
    )
    tokenizer = file_record(job.folder / "tokenizer.json")
    meta = {**options, **counts, "plan": job.plan, "tokenizer": tokenizer, "shards": shards}
    _write_whole(job.folder / "meta.json", json.dumps(meta) + "\n")
    return meta


def _write_whole(path: Path, text: str) -> None:
    with draft_of(path) as draft:
        draft.write_text(text, "utf-8")


def _make_shards(job: Job, missing: list[int], workers: int) -> int:
    """Make the shards `missing`, with a progress bar, or lines without a terminal; return the number of tokens."""
    context = multiprocessing.get_context("spawn")  # A fork would break the threads of the tokenizers library.
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
                # Without their locks, which a killed worker may hold for ever.
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


# ----------------------------------------------------------------------------------------------------------------------
# Pieces of the source, each of which becomes one shard.


_BLOCK = 1 << 24


class Segment(NamedTuple):
    """Bytes start..stop-1 of a file: whole lines of a .jsonl file, or a whole file of another kind."""

    file: int
    """Index among the files of the source."""
    size: int
    """Bytes of the whole file, to detect changes."""
    start: int
    stop: int
    first_line: int
    """Number of the line at `start`, from 1."""


Piece = list[Segment]


def cut_into_pieces(files: Iterable[SourceFile], piece_bytes: int) -> list[Piece]:
    """Return pieces of `piece_bytes` and the rest of their last line or file; the last piece may be smaller."""
    pieces: list[Piece] = [[]]
    room = piece_bytes
    for number, file in enumerate(files):
        for segment in _segments(number, file, room, piece_bytes):
            pieces[-1].append(segment)
            room -= segment.stop - segment.start
            if room <= 0:
                pieces.append([])
                room = piece_bytes
    return pieces if pieces[-1] else pieces[:-1]


def _segments(number: int, file: SourceFile, room: int, piece_bytes: int) -> Iterator[Segment]:
    """Yield the segments of file `number`; the first has `room` bytes, the others `piece_bytes`."""
    size = file.path.stat().length
    start, first_line, line = 0, 1, 1
    if file.is_jsonl and not file.is_gzipped:
        with file.open() as content:
            while start + room < size:
                # To the end of the line that contains the last byte of the room.
                newlines = (content.read(min(left, _BLOCK)).count(b"\n") for left in range(room - 1, 0, -_BLOCK))
                line += sum(newlines) + 1
                stop = start + room - 1 + len(content.readline())
                if stop >= size:
                    break
                yield Segment(number, size, start, stop, first_line)
                start, first_line, room = stop, line, piece_bytes
    if size:
        yield Segment(number, size, start, size, first_line)


def documents_in(piece: Piece, files: list[SourceFile]) -> Iterator[tuple[Document | None, int]]:
    """Yield the documents of a piece, each with the bytes read since the last; None for a file without any.

    Raises:
      ValueError: naming the file or line, if it is damaged or has changed since the pieces were cut.
    """
    for segment in piece:
        file = files[segment.file]
        size = file.path.stat().length if file.path.exists() else 0
        check(
            size == segment.size,
            f"{file.source}: {file.name} is {size} bytes now and was {segment.size}; restore it, or name a new --output",
        )
        if not file.is_jsonl:
            yield whole_document(file), size
            continue
        with file.open() as content:
            on_disk: Any = content.fileobj if isinstance(content, gzip.GzipFile) else content
            before = content.seek(segment.start)
            lines = content if file.is_gzipped else _lines(file, content, segment.stop)
            for document in documents_of(file, lines, segment.first_line):
                position = on_disk.tell()
                yield document, position - before
                before = position


def _lines(file: SourceFile, content: IO[bytes] | gzip.GzipFile, stop: int) -> Iterator[bytes]:
    """Yield the lines from the current position to `stop`; ValueError if the file ends before."""
    while content.tell() < stop:
        line = content.readline()
        check(bool(line), f"{file.source}: {file.name} was cut short while it was read; put it back")
        yield line


# ----------------------------------------------------------------------------------------------------------------------
# Worker processes, each of which makes one shard after another.


COUNTS = (
    "tokens", "documents", "bytes", "fim_documents", "heldout_documents", "heldout_bytes", "replaced", "passed_over",
)  # fmt: skip
"""Counts in the record of a shard."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that a worker needs to make any shard."""

    source: str
    files: list[SourceFile]
    folder: Path
    pieces: list[Piece]
    plan: str
    """Digest of plan.json, in the record of each shard of it."""
    bos: int | None
    eos: int
    fim: FillInTheMiddle | None
    heldout_fraction: float
    is_single: bool
    """True if the source is a single document, whose end is held out."""


# Job and tokenizer of this process; bytes read and tokens made by all workers, and the event that stops them.
_worker: tuple[Job, Tokenizer, Any, Any, Any]


def start_worker(job: Job, read: Any, made: Any, stop: Any) -> None:
    """Initialize a worker process."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # The processes share the cores already.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the parent stops the others.
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _worker = job, load_tokenizer(job.folder), read, made, stop


def make_shard(number: int) -> None:
    """Make the shard of one piece: its three files, then its record."""
    job, tokenizer, _, made, _ = _worker
    counts, ends = dict.fromkeys(COUNTS, 0), []
    dtype = id_dtype(tokenizer.vocab_size)
    with draft_of(shard_file(job.folder, number, "tokens")) as draft, open(draft, "wb") as file:
        # numpy pads the header so that it can be overwritten once the count is known.
        header_size = _write_header(file, dtype, 0)
        for ids in encode_documents(_documents(number, counts), tokenizer, job.bos, job.eos, job.fim):
            file.write(np.array(ids, dtype).tobytes())
            counts["tokens"] += len(ids)
            ends.append(counts["tokens"])
            with made.get_lock():
                made.value += len(ids)
        file.seek(0)
        assert _write_header(file, dtype, counts["tokens"]) == header_size
    with draft_of(shard_file(job.folder, number, "ends")) as draft:
        np.save(draft, np.array(ends, np.int64))
    files = {kind: file_record(shard_file(job.folder, number, kind)) for kind in KINDS}
    _write_whole(shard_record(job.folder, number), json.dumps({"plan": job.plan, **counts, "files": files}) + "\n")


def _write_header(file: IO[bytes], dtype: np.dtype, count: int) -> int:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def _documents(number: int, counts: dict[str, int]) -> Iterator[Document]:
    """Yield the training documents of a piece; write the held-out ones to their file, and count both."""
    job, _, read, _, stop = _worker
    with draft_of(shard_file(job.folder, number, "heldout")) as draft, open(draft, "w", encoding="utf-8") as validation:
        for document, num_bytes in documents_in(job.pieces[number], job.files):
            if stop.is_set():
                raise KeyboardInterrupt
            with read.get_lock():
                read.value += num_bytes
            if document is None:
                counts["passed_over"] += 1
                continue
            counts["replaced"] += document.replaced
            parts = [(document, is_validation(job.source, document.name, job.heldout_fraction))]
            if job.is_single:
                parts = list(zip(split_tail(document, job.heldout_fraction), (False, True), strict=True))
            for part, is_held in parts:
                kind = "heldout_" if is_held else ""
                counts[f"{kind}documents"] += 1
                counts[f"{kind}bytes"] += part.num_bytes
                if is_held:
                    validation.write(json.dumps(dataclasses.asdict(part)) + "\n")
                else:
                    counts["fim_documents"] += job.fim is not None and job.fim.cuts(part) is not None
                    yield part


if __name__ == "__main__":
    main()
