"""The documents of a run, split into training and held-out text.

What is held out does not depend on the seed, the order of reading or the machine: for the standard library it
is whole packages, the same ones on every Python; for a source of your own it is chosen by the hash of each
document's name. Held-out documents that nearly repeat training documents are dropped; every byte of the rest
is scored (see `heldout.py`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from dsv3_jax.config import DataConfig
from dsv3_jax.data.sources import STDLIB, Document, read_source
from dsv3_jax.data.storage import digest

# Chosen before any model was trained: part of every Python since 3.11, however it is packaged, of many kinds
# (data structures, import machinery, parsing, logging, network, servers), without tables, 0.9 MB in all.
STDLIB_HELDOUT = ("collections", "concurrent", "importlib", "json", "logging", "urllib", "wsgiref", "xmlrpc")


class _HasName(Protocol):
    @property
    def name(self) -> str: ...


Named = TypeVar("Named", bound=_HasName)


@dataclasses.dataclass(frozen=True)
class CorpusReport:
    """What became of a source."""

    train_documents: int
    train_bytes: int
    heldout_documents: int
    heldout_bytes: int
    near_duplicates: int
    """Held-out documents dropped because training documents repeat them."""
    replaced: int
    """Documents in which bytes that are not UTF-8 became U+FFFD."""
    binary: int
    """Files passed over because they are not text."""

    def __str__(self) -> str:
        return (
            f"train on {self.train_documents:,} documents, {self.train_bytes / 1e6:.2f} MB; "
            f"hold out {self.heldout_documents:,}, {self.heldout_bytes / 1e6:.2f} MB "
            f"(near-duplicates dropped: {self.near_duplicates}); "
            f"decoded with replacement: {self.replaced}; binary files passed over: {self.binary}"
        )


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and held-out documents."""

    train: list[Document]
    validation: list[Document]
    report: CorpusReport

    @functools.cached_property
    def train_digest(self) -> str:
        """Digest of the training documents' names and texts, in order: what caches and a resumed run hang on."""
        return _digest(self.train)

    @functools.cached_property
    def validation_digest(self) -> str:
        """The same of the held-out documents, on which the processes of a run have to agree."""
        return _digest(self.validation)


def load_corpus(config: DataConfig) -> Corpus:
    """Reads `config.source` and splits it.

    Raises:
      ValueError: as `read_source` does, and if no held-out text can be set aside.
    """
    documents, binary = read_source(config.source)
    if config.source == STDLIB:
        train, validation = _split_stdlib(documents)
    elif len(documents) == 1:
        # The two halves of one text are alike by nature, so they are not compared.
        return _corpus(*split_tail(documents[0], config.heldout_fraction), dropped=0, binary=len(binary))
    else:
        train, validation = split_by_name(documents, config.heldout_fraction)
    repeated = near_duplicates([document.text for document in validation], (document.text for document in train))
    kept = [document for document, repeats in zip(validation, repeated, strict=True) if not repeats]
    if not kept:
        raise ValueError(
            f"data.source {config.source!r}: nothing is left to hold out, as each of the {len(validation)} documents chosen "
            "by name nearly repeats training documents; remove the copies or raise data.heldout_fraction"
        )
    return _corpus(train, kept, dropped=len(validation) - len(kept), binary=len(binary))


def _digest(documents: list[Document]) -> str:
    return digest(*(part for document in documents for part in (document.name, document.text)))


def _corpus(train: list[Document], validation: list[Document], *, dropped: int, binary: int) -> Corpus:
    report = CorpusReport(
        train_documents=len(train),
        train_bytes=sum(document.num_bytes for document in train),
        heldout_documents=len(validation),
        heldout_bytes=sum(document.num_bytes for document in validation),
        near_duplicates=dropped,
        replaced=sum(document.replaced for document in (*train, *validation)),
        binary=binary,
    )
    return Corpus(train, validation, report)


def is_validation(source: str, name: str, fraction: float) -> bool:
    """Whether the document of this name is held out, told by its name alone."""
    if source == STDLIB:
        package, _, below = name.partition("/")
        return bool(below) and package in STDLIB_HELDOUT
    return _position(name) < fraction


def _split_stdlib(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    train: list[Document] = []
    validation: list[Document] = []
    for document in documents:
        (validation if is_validation(STDLIB, document.name, 0) else train).append(document)
    if not train or not validation:
        raise ValueError("the standard library of this Python is not installed as source files; name a data.source of your own")
    return train, validation


def split_by_name(documents: list[Named], fraction: float) -> tuple[list[Named], list[Named]]:
    """Holds out the documents whose names hash below `fraction`; at least one, and never all of them."""
    position = {document.name: _position(document.name) for document in documents}
    names = sorted(position, key=lambda name: (position[name], name))
    chosen = sum(position[name] < fraction for name in names)  # As `is_validation` says.
    validation_names = set(names[: min(max(chosen, 1), len(names) - 1)])
    train = [document for document in documents if document.name not in validation_names]
    return train, [document for document in documents if document.name in validation_names]


def _position(name: str) -> float:
    """Where the hash of `name` lies between 0 and 1."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") / 2**64


def split_tail(document: Document, fraction: float) -> tuple[list[Document], list[Document]]:
    """Holds out the end of a lone document, from the start of a line where there is one."""
    text = document.text
    cut = min(max(round(len(text) * (1 - fraction)), 1), len(text) - 1)
    line = text.rfind("\n", 0, cut) + 1
    cut = line or cut
    if cut < 1:
        raise ValueError(f"{document.name!r} is a single character; nothing can be held out of it, so give more text")
    head = dataclasses.replace(document, text=text[:cut])
    return [head], [dataclasses.replace(document, name=f"{document.name}#tail", text=text[cut:])]


# ----------------------------------------------------------------------------------------------------------------------
# Which documents mostly repeat others: by the share of their runs of eight words that the others hold.


SHINGLE_WORDS = 8
CONTAINMENT = 0.5
_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def near_duplicates(candidates: Sequence[str], references: Iterable[str]) -> list[bool]:
    """For each candidate, whether at least half of its distinct runs of eight words occur in the references.

    A text of fewer words is one run. A text without words is never a near-duplicate.
    """
    word_ids: dict[str, int] = collections.defaultdict(itertools.count().__next__)
    runs = [np.unique(_shingles(text, word_ids)) for text in candidates]
    known = np.unique(np.concatenate([np.zeros(0, np.uint64), *runs]))
    found = np.zeros(known.size, bool)
    for text in references:
        shingles = _shingles(text, word_ids)
        places = np.minimum(np.searchsorted(known, shingles), max(known.size - 1, 0))
        if known.size:
            found[places[known[places] == shingles]] = True
    return [run.size > 0 and bool(found[np.searchsorted(known, run)].mean() >= CONTAINMENT) for run in runs]


def _shingles(text: str, word_ids: dict[str, int]) -> np.ndarray:
    """A 64-bit hash of every run of eight words, uint64."""
    words = np.fromiter(map(word_ids.__getitem__, _WORD.findall(text)), dtype=np.uint64)
    length = min(SHINGLE_WORDS, words.size)
    if length == 0:
        return words
    scattered = (words + np.uint64(1)) * _MULTIPLIER
    scattered ^= scattered >> np.uint64(32)
    hashes = np.zeros(words.size - length + 1, np.uint64)
    for offset in range(length):
        hashes = hashes * _MULTIPLIER + scattered[offset : offset + hashes.size]
    return hashes
