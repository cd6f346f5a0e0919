"""Training batches: documents to tokens, tokens packed into rows, rows into batches, each a pure function of (seed, step).

The documents of an epoch follow one another in an order drawn from (seed, epoch), each between its marks, and
epoch follows epoch: one endless stream of tokens. It is cut into rows of `sequence_length` targets, so that every
token of every epoch is a target exactly once and nothing is padded (the report packs documents without masking
attention between them, arXiv 2412.19437, section 4.1). Rows that lie together come from the same document, so
the rows of each stretch as long as an epoch are shuffled too. A row is computed from its number alone: a run
resumes at any step, on any number of processes, without reading what came before.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tokenizers

from dsv3_jax.config import DataConfig, ModelConfig, TrainConfig
from dsv3_jax.config.checks import require
from dsv3_jax.data.cache import digest, load_or_make
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.sources import Document
from dsv3_jax.data.tokenizer import Tokenizer, document_marks

if TYPE_CHECKING:
    import grain

_DOCUMENTS_AT_ONCE = 1024
_PREFETCHED_BATCHES = 8


class Batch(NamedTuple):
    """One step's rows of tokens and, for each, the token that follows."""

    tokens_BT: np.ndarray
    """int32."""
    targets_BT: np.ndarray
    """int32; targets_BT[b, t] follows tokens_BT[b, t]."""


def tokenize_corpus(corpus: Corpus, tokenizer: Tokenizer, data: DataConfig, model: ModelConfig) -> np.ndarray:
    """The training documents as one flat array of ids, each document between its marks; kept in `data.cache_dir`.

    An encoder never makes the end mark out of text, so the marks alone tell where documents end.

    Returns:
      ids [N], uint16 where they fit, else uint32; mapped from disk, read-only.
    """
    bos, eos = document_marks(model)
    dtype = np.dtype(np.uint16 if max(tokenizer.vocab_size, model.vocab_size) <= 2**16 else np.uint32)
    key = digest(corpus.train_digest, tokenizer.to_json(), f"{bos} {eos} {dtype}", tokenizers.__version__)

    def load(path: Path) -> np.ndarray:
        try:
            tokens = np.load(path, mmap_mode="r")
        except (OSError, EOFError) as error:
            raise ValueError(str(error)) from error
        require(tokens.dtype == dtype and tokens.ndim == 1, f"holds {tokens.dtype}{list(tokens.shape)}, not {dtype}[N]")
        ends = np.flatnonzero(tokens == eos)
        require(ends.size == len(corpus.train) and ends[-1] == tokens.size - 1, "documents are missing")
        return tokens

    def write(path: Path) -> None:
        np.save(path, _tokenize(corpus.train, tokenizer, bos, eos, dtype))

    return load_or_make(Path(data.cache_dir) / f"tokens-{key}.npy", load, write)


def _tokenize(documents: list[Document], tokenizer: Tokenizer, bos: int | None, eos: int, dtype: np.dtype) -> np.ndarray:
    opening = [] if bos is None else [bos]
    parts = []
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        texts = [document.text for document in documents[start : start + _DOCUMENTS_AT_ONCE]]
        parts += [np.array([*opening, *ids, eos], dtype) for ids in tokenizer.encode_batch(texts)]
    return np.concatenate(parts)


class TokenStream:
    """Every document of every epoch, one after the other, without end."""

    def __init__(self, tokens: np.ndarray, eos: int, seed: int) -> None:
        """Args: tokens: ids [N], each document closed by `eos`; seed: of the orders of the documents."""
        self._tokens = tokens
        self._eos = eos
        self._seed = seed
        self._ends = np.flatnonzero(tokens == eos) + 1
        self._starts = np.concatenate([[0], self._ends[:-1]])
        # A row, and the shuffled rows around it, touch two neighbouring epochs.
        self._epoch = functools.lru_cache(maxsize=4)(self._shuffle)

    @property
    def epoch_length(self) -> int:
        """Tokens of one epoch, marks included."""
        return self._tokens.size

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 of the stream, int32; before the first one stands an end mark."""
        parts = [np.full(max(-start, 0), self._eos)]
        start = max(start, 0)
        while start < stop:
            epoch, place = divmod(start, self.epoch_length)
            order, ends = self._epoch(epoch)
            turn = int(np.searchsorted(ends, place, side="right"))
            document = order[turn]
            left = int(ends[turn]) - place
            first = int(self._ends[document]) - left
            parts.append(self._tokens[first : first + min(left, stop - start)])
            start += parts[-1].size
        return np.concatenate(parts).astype(np.int32)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents of an epoch in their order, and where each one ends in it."""
        order = _generator(self._seed, 0, epoch).permutation(self._ends.size)
        return order, np.cumsum((self._ends - self._starts)[order])


class PackedRows:
    """The rows that this process reads, in the order it reads them: a random-access source for grain."""

    def __init__(self, stream: TokenStream, config: TrainConfig, rows: Sequence[int]) -> None:
        """Args: rows: which of the batch_size rows of each global batch are read."""
        self._stream = stream
        self._config = config
        self._rows = rows
        self._rows_per_block = stream.epoch_length // config.sequence_length
        self._block = functools.lru_cache(maxsize=4)(self._shuffle)

    def __len__(self) -> int:
        return self._config.steps * len(self._rows)

    def __getitem__(self, index: int) -> np.ndarray:
        """Row `index` as int32 [T + 1]: its tokens and the one after, so that each but the first is a target."""
        step, place = divmod(int(index), len(self._rows))
        block, turn = divmod(step * self._config.batch_size + self._rows[place], self._rows_per_block)
        row = block * self._rows_per_block + int(self._block(block)[turn])
        start = row * self._config.sequence_length
        return self._stream.read(start - 1, start + self._config.sequence_length)

    def _shuffle(self, block: int) -> np.ndarray:
        return _generator(self._config.seed, 1, block).permutation(self._rows_per_block)


class TrainBatches:
    """The batches of a run: `batches[step]`, and `batches.iterate(step)` that reads ahead in the background."""

    def __init__(self, config: TrainConfig, model: ModelConfig, tokens: np.ndarray, rows: Sequence[int] | None = None) -> None:
        """Sets up the pipeline; nothing is read yet.

        Args:
          config: gives steps, batch_size, sequence_length and seed.
          model: gives the end mark that closes each document of `tokens`.
          tokens: flat ids [N] from `tokenize_corpus`.
          rows: the rows of each global batch that this process makes; None for all of them.

        Raises:
          ValueError: if the corpus does not fill one row.
        """
        require(
            tokens.size >= config.sequence_length,
            f"the training text is {tokens.size} tokens, less than one row of train.sequence_length "
            f"({config.sequence_length}); give more text or a shorter train.sequence_length",
        )
        import grain  # takes a second, which tokenizing and evaluating should not wait for

        rows = range(config.batch_size) if rows is None else rows
        stream = TokenStream(tokens, document_marks(model)[1], config.seed)
        self._batches: grain.MapDataset = (
            grain.MapDataset.source(PackedRows(stream, config, rows)).batch(len(rows)).map(_split_targets)
        )

    def __len__(self) -> int:
        """Steps of the run."""
        return len(self._batches)

    def __getitem__(self, step: int) -> Batch:
        """The batch of `step`, counted from 0."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of a run of {len(self)} steps")
        return self._batches[step]

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """The batches of the steps from `start` on, in order, made ahead of time by a thread."""
        import grain

        reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES)
        yield from self._batches.slice(slice(start, len(self))).to_iter_dataset(reading)


def _split_targets(rows: np.ndarray) -> Batch:
    return Batch(tokens_BT=rows[:, :-1], targets_BT=rows[:, 1:])


def _generator(seed: int, purpose: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, number])
