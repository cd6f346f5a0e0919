"""Documents to one flat array of token ids, made once and kept in `data.cache_dir`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tokenizers

from dsv3_jax.config import DataConfig, ModelConfig
from dsv3_jax.config.checks import require
from dsv3_jax.data.cache import digest, load_or_make
from dsv3_jax.data.corpus import Corpus
from dsv3_jax.data.fim import FillInTheMiddle
from dsv3_jax.data.npy_file import NpyFile
from dsv3_jax.data.sources import Document
from dsv3_jax.data.tokenizer import Tokenizer, document_marks

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
        require(tokens.dtype == dtype, f"holds {tokens.dtype}, not {dtype}")
        ends = np.flatnonzero(tokens[:] == eos)
        require(ends.size == len(corpus.train) and ends[-1] == tokens.size - 1, "documents are missing")
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
