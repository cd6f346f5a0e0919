"""Documents as token ids: the cached array of the training text, fill-in-the-middle, and the windows of held-out text."""

from __future__ import annotations

import contextlib
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
from dsv3_jax.data.rows import Row, segment_starts
from dsv3_jax.data.sources import Document
from dsv3_jax.data.storage import NpyFile, cached_tokens, digest
from dsv3_jax.data.tokenizer import Tokenizer, document_marks
from dsv3_jax.model.losses import ValidationBatch

_DOCUMENTS_AT_ONCE = 1024
_CHARACTERS_AT_ONCE = 4_000_000


def tokenize_corpus(
    corpus: Corpus, tokenizer: Tokenizer, data: DataConfig, model: ModelConfig, fim: FillInTheMiddle | None = None
) -> NpyFile:
    """Return the training documents as one array of ids, each between its marks; kept in `data.cache_dir`.

    Text is never encoded to the end mark, so the marks alone show where documents end.

    Returns:
      ids [N] on disk, uint16 if they fit, else uint32.
    """
    bos, eos = document_marks(model)
    dtype = id_dtype(max(tokenizer.vocab_size, model.vocab_size))
    key = digest(corpus.train_digest, tokenizer.to_json(), f"{bos} {eos} {dtype} {fim}", tokenizers.__version__)

    def make() -> Iterator[np.ndarray]:
        return (np.array(ids, dtype) for ids in encode_documents(corpus.train, tokenizer, bos, eos, fim))

    return cached_tokens(Path(data.cache_dir) / f"tokens-{key}.npy", dtype, len(corpus.train), lambda ids: ids == eos, make)


def id_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype that ids below `vocab_size` are stored in: uint16 if they fit, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, bos: int | None, eos: int, fim: FillInTheMiddle | None
) -> Iterator[list[int]]:
    """Yield the ids of each document between its marks, some rearranged by `fim`; encode in batches, on all cores."""
    opening = [] if bos is None else [bos]
    for batch in _batches(documents):
        parts = [(document.text,) if fim is None else fim.parts(document) for document in batch]
        encoded = iter(tokenizer.encode_documents([text for texts in parts for text in texts]))
        for texts in parts:
            ids = [next(encoded) for _ in texts]
            yield [*opening, *(fim.join(*ids) if fim and len(ids) == 3 else ids[0]), eos]


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
# Fill-in-the-middle: some documents as prefix, suffix, middle, so that the model learns the middle from both sides.


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle:
    """Share and seed of the documents to rearrange, and the ids before the three parts."""

    rate: float
    seed: int
    begin: int
    hole: int
    end: int

    @classmethod
    def of(cls, rate: float, tokens: Sequence[str], seed: int, tokenizer: Tokenizer) -> FillInTheMiddle | None:
        """Look the three tokens up in `tokenizer`; None if the rate is 0; ValueError naming the missing ones."""
        if rate == 0:
            return None
        missing = [token for token in tokens if token not in tokenizer.added_ids]
        check(
            not missing,
            f"the tokenizer has no tokens {missing} to fill in the middle with; name those it has (data.fim_tokens), or set "
            "data.fim_rate to 0",
        )
        return cls(rate, seed, *(tokenizer.added_ids[token] for token in tokens))

    def parts(self, document: Document) -> tuple[str, ...]:
        """Return prefix, middle and suffix of a document, or the whole text if it is not chosen."""
        cut = self.cuts(document)
        return (
            (document.text,) if cut is None else (document.text[: cut[0]], document.text[slice(*cut)], document.text[cut[1] :])
        )

    def cuts(self, document: Document) -> tuple[int, int] | None:
        """Return the positions of the two cuts, uniform over all pairs; None if the document is not chosen."""
        name = document.name.encode("utf-8", "surrogatepass")
        drawn = hashlib.blake2b(name, digest_size=24, key=self.seed.to_bytes(8, "little"), person=b"fim").digest()
        chosen, one, other = (int.from_bytes(drawn[at : at + 8], "little") for at in (0, 8, 16))
        if chosen >= self.rate * 2**64:
            return None
        # A 64-bit number times the count of positions, without the lower 64 bits, is uniform over the positions.
        first, last = sorted(number * (len(document.text) + 1) >> 64 for number in (one, other))
        return first, last

    def join(self, prefix: list[int], middle: list[int], suffix: list[int]) -> list[int]:
        """Return the ids of a rearranged document, without its marks."""
        return [self.begin, *prefix, self.hole, *suffix, self.end, *middle]


# ----------------------------------------------------------------------------------------------------------------------
# Held-out text: windows that score every byte of it once, and general compressors on the same bytes.


class ValidationWindows:
    """Held-out windows in batches of one shape; each token that spells the text is scored once."""

    def __init__(self, rows: Row, num_bytes: int, *, batch_size: int, across_documents: bool) -> None:
        """Collect the windows.

        Args:
          rows: all windows, [R, T]; weights are 1 for the tokens that spell the text, else 0.
          num_bytes: UTF-8 bytes of the text.
          batch_size: windows of a batch.
          across_documents: True if attention crosses documents, so that batches need no segment starts.
        """
        self.num_bytes = num_bytes
        self.num_tokens = int(np.count_nonzero(rows.loss_weight_T))
        """Scored tokens."""
        self._rows = rows
        self._batch_size = batch_size
        self._across_documents = across_documents

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self._rows.tokens_T) // self._batch_size)

    def __iter__(self) -> Iterator[ValidationBatch]:
        """Yield all batches."""
        return self._batches(np.arange(len(self._rows.tokens_T)))

    def sample(self, num_batches: int) -> Iterator[ValidationBatch]:
        """Yield at most `num_batches` batches of windows spread evenly over the text: always the same ones."""
        windows = len(self._rows.tokens_T)
        rows = min(num_batches * self._batch_size, windows)
        return self._batches(np.arange(rows) * windows // rows)

    def bits_per_byte(self, nats: float) -> float:
        """Convert the summed loss of all scored tokens, in nats, to bits per byte."""
        return nats / math.log(2) / self.num_bytes

    def _batches(self, rows: np.ndarray) -> Iterator[ValidationBatch]:
        for start in range(0, len(rows), self._batch_size):
            chosen = rows[start : start + self._batch_size]
            padding = ((0, self._batch_size - len(chosen)), (0, 0))
            tokens, targets, weights = (np.pad(array[chosen], padding) for array in self._rows[:3])
            starts = np.pad(self._rows.segment_starts_T[chosen], padding, constant_values=-1)
            yield ValidationBatch(tokens, targets, weights, None if self._across_documents else starts)


def document_windows(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    model: ModelConfig,
    *,
    batch_size: int,
    sequence_length: int,
    across_documents: bool = True,
) -> ValidationWindows:
    """Tokenize held-out documents and cut them into windows.

    The documents follow one another between their marks, as in training. Windows do not overlap; the first token of a window
    is the last target of the window before it.

    Raises:
      ValueError: if there is no document, if decoding does not give a document back unchanged, so that its tokens would not
        stand for all of the bytes, or if there are ids outside the model's vocabulary.
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
    count = len(tokens) - 1
    windows = -(-count // sequence_length)

    def cut(values: Sequence[int], dtype: type) -> np.ndarray:
        return np.pad(np.array(values, dtype), (0, windows * sequence_length - count)).reshape(windows, sequence_length)

    starts = segment_starts(np.array(opens), windows, sequence_length)
    starts.reshape(-1)[count:] = -1
    rows = Row(cut(tokens[:-1], np.int32), cut(tokens[1:], np.int32), cut(scored[1:], np.float32), starts)
    num_bytes = sum(document.num_bytes for document in documents)
    return ValidationWindows(rows, num_bytes, batch_size=batch_size, across_documents=across_documents)


def check_reproduced(documents: Sequence[Document], encoded: Sequence[Sequence[int]], tokenizer: Tokenizer) -> None:
    """Raise ValueError, naming a document, unless its ids decode to all of its text."""
    for document, ids in zip(documents, encoded, strict=True):
        check(
            tokenizer.decode(ids) == document.text,
            f"the tokenizer does not reproduce {document.name!r}, so bits per byte would be wrong; use a byte-level one",
        )


def compressor_bits_per_byte(documents: Sequence[Document]) -> dict[str, float | None]:
    """Return bits per byte of `gzip -9` and `xz -9` on the joined documents: the bytes that the model is scored on.

    Returns:
      {"gzip": ..., "xz": ...}; "xz" is None if this Python was built without lzma.
    """
    data = "".join(document.text for document in documents).encode("utf-8")
    figures: dict[str, float | None] = {"gzip": 8 * len(gzip.compress(data, compresslevel=9)) / len(data), "xz": None}
    with contextlib.suppress(ImportError):
        import lzma  # An optional part of Python.

        figures["xz"] = 8 * len(lzma.compress(data, preset=9)) / len(data)
    return figures
