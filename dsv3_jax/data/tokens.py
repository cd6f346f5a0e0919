"""Documents to one flat array of token ids, made once and kept in `data.cache_dir`."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from dsv3_jax.config import DataConfig, ModelConfig
from dsv3_jax.config.checks import check
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.rows import Row
from dsv3_jax.data.sources import Document
from dsv3_jax.data.storage import NpyFile, digest, load_or_make
from dsv3_jax.data.tokenizer import Tokenizer, document_marks
from dsv3_jax.model.losses import ValidationBatch

_DOCUMENTS_AT_ONCE = 1024
_CHARACTERS_AT_ONCE = 4_000_000


def tokenize_corpus(
    corpus: Corpus, tokenizer: Tokenizer, data: DataConfig, model: ModelConfig, fim: FillInTheMiddle | None = None
) -> NpyFile:
    """The training documents as one flat array of ids, each document between its marks; kept in `data.cache_dir`.

    An encoder never makes the end mark out of text, so the marks alone tell where documents end.

    Returns:
      ids [N], uint16 where they fit, else uint32; read from disk when they are asked for.
    """
    bos, eos = document_marks(model)
    dtype = id_dtype(max(tokenizer.vocab_size, model.vocab_size))
    key = digest(corpus.train_digest, tokenizer.to_json(), f"{bos} {eos} {dtype} {fim}", tokenizers.__version__)

    def load(path: Path) -> NpyFile:
        tokens = NpyFile(path)
        check(tokens.dtype == dtype, f"holds {tokens.dtype}, not {dtype}")
        ends = np.flatnonzero(tokens[:] == eos)
        check(ends.size == len(corpus.train) and ends[-1] == tokens.size - 1, "documents are missing")
        return tokens

    def write(path: Path) -> None:
        documents = encode_documents(corpus.train, tokenizer, bos, eos, fim)
        np.save(path, np.concatenate([np.array(ids, dtype) for ids in documents]))

    return load_or_make(Path(data.cache_dir) / f"tokens-{key}.npy", load, write)


def id_dtype(vocab_size: int) -> np.dtype:
    """The dtype that ids are stored in."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, bos: int | None, eos: int, fim: FillInTheMiddle | None
) -> Iterator[list[int]]:
    """The ids of each document between its marks; some of them cut to be filled in. Many are encoded at once, on all cores."""
    opening = [] if bos is None else [bos]
    for batch in _batches(documents):
        cuts = [None if fim is None else fim.cuts(document) for document in batch]
        texts = [part for document, cut in zip(batch, cuts, strict=True) for part in _parts(document.text, cut)]
        encoded = iter(tokenizer.encode_documents(texts))
        for cut in cuts:
            if cut is None or fim is None:
                yield [*opening, *next(encoded), eos]
            else:
                yield [*opening, *fim.join(next(encoded), next(encoded), next(encoded)), eos]


def _parts(text: str, cut: tuple[int, int] | None) -> tuple[str, ...]:
    return (text,) if cut is None else (text[: cut[0]], text[cut[0] : cut[1]], text[cut[1] :])


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _DOCUMENTS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# ----------------------------------------------------------------------------------------------------------------------
# Fill-in-the-middle: some documents become prefix, suffix, middle, so that the middle is learnt from both sides.


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle:
    """Which documents are cut, and the ids that stand before the three parts."""

    rate: float
    seed: int
    begin: int
    hole: int
    end: int

    @classmethod
    def of(cls, rate: float, tokens: Sequence[str], seed: int, tokenizer: Tokenizer) -> FillInTheMiddle | None:
        """What the three tokens are to `tokenizer`; None where the rate is 0.

        Raises:
          ValueError: naming the tokens that the tokenizer lacks.
        """
        if rate == 0:
            return None
        known = {text: id_ for id_, text in tokenizer.added_tokens.items()}
        missing = [token for token in tokens if token not in known]
        check(
            not missing,
            f"the tokenizer has no tokens {missing} to fill in the middle with; name those it has (data.fim_tokens), or set "
            "data.fim_rate to 0",
        )
        return cls(rate, seed, *(known[token] for token in tokens))

    def cuts(self, document: Document) -> tuple[int, int] | None:
        """The characters at which the document is cut, uniform over all pairs of places; None if it stays whole."""
        name = document.name.encode("utf-8", "surrogatepass")
        drawn = hashlib.blake2b(name, digest_size=24, key=self.seed.to_bytes(8, "little"), person=b"fim").digest()
        chosen, one, other = (int.from_bytes(drawn[at : at + 8], "little") for at in (0, 8, 16))
        if chosen >= self.rate * 2**64:
            return None
        # The product of a 64-bit number and the count of places, without its lower 64 bits: uniform over the places.
        first, last = sorted(number * (len(document.text) + 1) >> 64 for number in (one, other))
        return first, last

    def join(self, prefix: list[int], middle: list[int], suffix: list[int]) -> list[int]:
        """The ids of a cut document, marks aside."""
        return [self.begin, *prefix, self.hole, *suffix, self.end, *middle]

    def unfim(self, ids: Sequence[int], tokenizer: Tokenizer) -> str:
        """The text of a document from its ids, cut or whole, marks or not.

        Raises:
          ValueError: if the three ids stand in it otherwise than `join` writes them.
        """
        ids = [int(id_) for id_ in ids]
        marks = [id_ for id_ in ids if id_ in (self.begin, self.hole, self.end)]
        if not marks:
            return tokenizer.decode(ids)
        check(
            marks == [self.begin, self.hole, self.end],
            f"the marks of a filled-in document are {marks}; they must be {[self.begin, self.hole, self.end]}, once each",
        )
        hole, end = ids.index(self.hole), ids.index(self.end)
        return "".join(map(tokenizer.decode, (ids[:hole], ids[end:], ids[hole:end])))


def fill_in_the_middle(data: DataConfig, seed: int, tokenizer: Tokenizer) -> FillInTheMiddle | None:
    """As the config of a run says; None where nothing is filled in.

    Raises:
      ValueError: naming the tokens that the tokenizer lacks.
    """
    return FillInTheMiddle.of(data.fim_rate, data.fim_tokens, seed, tokenizer)


# ----------------------------------------------------------------------------------------------------------------------
# Held-out text: windows that score every byte of it once, and what general compressors make of the same bytes.


class ValidationWindows:
    """All batches of the held-out documents, each of the same shape.

    The documents stand one after the other between their marks, as in training, cut into windows that do not
    overlap; the first token of a window is the last target of the window before it.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: Tokenizer,
        model: ModelConfig,
        *,
        batch_size: int,
        sequence_length: int,
        across_documents: bool = True,
    ) -> None:
        """Tokenizes the documents.

        Args:
          across_documents: whether attention crosses documents, so that a batch need not say where they start.

        Raises:
          ValueError: if there is no document, if the tokenizer does not give a document back unchanged, so that
            its tokens would not stand for all of the bytes, or if it gives ids outside the model's vocabulary.
        """
        check(len(documents) > 0, "there is no held-out text to score")
        bos, eos = document_marks(model)
        opening = [] if bos is None else [bos]
        tokens, scored, opens = [eos], [False], []
        encoded = tokenizer.encode_documents([document.text for document in documents])
        check_reproduced(documents, encoded, tokenizer)
        for ids in encoded:
            opens.append(len(tokens))
            tokens += [*opening, *ids, eos]
            scored += [*[False] * len(opening), *[True] * len(ids), False]
        highest = max(tokens)
        check(
            highest < model.vocab_size,
            f"the tokenizer gives token id {highest}, outside the model's vocabulary of {model.vocab_size}; use the "
            "tokenizer.json that the model was trained with",
        )
        windows = -(-(len(tokens) - 1) // sequence_length)
        rows = Row(
            _windows(np.array(tokens[:-1], np.int32), windows, sequence_length),
            _windows(np.array(tokens[1:], np.int32), windows, sequence_length),
            _windows(np.array(scored[1:], np.float32), windows, sequence_length),
            _starts(opens, len(tokens) - 1, windows, sequence_length),
        )
        self._set(rows, sum(document.num_bytes for document in documents), batch_size, across_documents)

    @classmethod
    def of_rows(cls, rows: Sequence[Row], num_bytes: int, batch_size: int, *, across_documents: bool) -> ValidationWindows:
        """Windows made elsewhere; their weights are 1 at the tokens that spell the `num_bytes` bytes, each once."""
        check(len(rows) > 0, "there is no held-out text to score")
        windows = cls.__new__(cls)
        windows._set(Row(*map(np.stack, zip(*rows, strict=True))), num_bytes, batch_size, across_documents)
        return windows

    def _set(self, rows: Row, num_bytes: int, batch_size: int, across_documents: bool) -> None:
        """Args: rows: all windows, [R, T]."""
        self.num_bytes = num_bytes
        self.num_tokens = int(np.count_nonzero(rows.loss_weight_T))
        """Scored tokens: those that spell the bytes."""
        self._rows = rows
        self._batch_size = batch_size
        self._across_documents = across_documents

    def __len__(self) -> int:
        """Batches."""
        return -(-len(self._rows.tokens_T) // self._batch_size)

    def __iter__(self) -> Iterator[ValidationBatch]:
        """All batches; each scored token is in exactly one."""
        return self._batches(np.arange(len(self._rows.tokens_T)))

    def sample(self, num_batches: int) -> Iterator[ValidationBatch]:
        """At most `num_batches` batches of windows spread evenly over the text: always the same ones."""
        windows = len(self._rows.tokens_T)
        rows = min(num_batches * self._batch_size, windows)
        return self._batches(np.arange(rows) * windows // rows)

    def bits_per_byte(self, nats: float) -> float:
        """Bits per byte, from the summed loss of all scored tokens in nats."""
        return nats / math.log(2) / self.num_bytes

    def _batches(self, rows: np.ndarray) -> Iterator[ValidationBatch]:
        for start in range(0, len(rows), self._batch_size):
            chosen = rows[start : start + self._batch_size]
            padding = ((0, self._batch_size - len(chosen)), (0, 0))
            tokens, targets, weights = (np.pad(array[chosen], padding) for array in self._rows[:3])
            starts = np.pad(self._rows.segment_starts_T[chosen], padding, constant_values=-1)
            yield ValidationBatch(tokens, targets, weights, None if self._across_documents else starts)


def check_reproduced(documents: Sequence[Document], encoded: Sequence[Sequence[int]], tokenizer: Tokenizer) -> None:
    """Raises ValueError, naming a document, unless its ids stand for all of its bytes."""
    for document, ids in zip(documents, encoded, strict=True):
        check(
            tokenizer.decode(ids) == document.text,
            f"the tokenizer does not reproduce {document.name!r}, so bits per byte would be wrong; use a byte-level one",
        )


def _windows(values: np.ndarray, windows: int, length: int) -> np.ndarray:
    """A flat array as [windows, length], zeros at its end."""
    return np.pad(values, (0, windows * length - len(values))).reshape(windows, length)


def _starts(opens: Sequence[int], count: int, windows: int, length: int) -> np.ndarray:
    """[windows, length]: where in its window the document of each of `count` tokens begins, -1 for what is left."""
    begins = np.zeros(windows * length, np.int64)
    opens_at = np.array([place for place in opens if place < count], np.int64)
    begins[opens_at] = opens_at
    firsts = np.repeat(np.arange(windows) * length, length)
    starts = np.maximum(np.maximum.accumulate(begins), firsts) - firsts
    starts[count:] = -1
    return starts.astype(np.int32).reshape(windows, length)


def compressor_bits_per_byte(documents: Sequence[Document]) -> dict[str, float | None]:
    """Bits per byte of `gzip -9` and `xz -9` on the documents put together: the bytes the model is scored on.

    Returns:
      {"gzip": ..., "xz": ...}; "xz" is None where this Python was built without lzma.
    """
    data = "".join(document.text for document in documents).encode("utf-8")
    sizes: dict[str, int | None] = {"gzip": len(gzip.compress(data, compresslevel=9)), "xz": None}
    try:
        import lzma  # an optional part of Python
    except ImportError:
        pass
    else:
        sizes["xz"] = len(lzma.compress(data, preset=9))
    return {name: size if size is None else 8 * size / len(data) for name, size in sizes.items()}
