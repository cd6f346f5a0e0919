"""The documents of a source, split into training and held-out text, without near-duplicates among the latter.

The split does not depend on the seed, the order of reading or the machine: for the standard library it is whole packages,
the same ones on every Python; for other sources it follows the hash of each document's name. Held-out documents that nearly
repeat training documents are dropped; every byte of the rest is scored (see `tokens.py`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from dsv3_jax.config import DataConfig
from dsv3_jax.config.checks import check
from dsv3_jax.data.sources import STDLIB, Document, read_source
from dsv3_jax.data.storage import digest

# Chosen before any model was trained: part of every Python since 3.11, however it is packaged, of many kinds
# (data structures, import machinery, parsing, logging, network, servers), without tables, 0.9 MB in all.
STDLIB_HELDOUT = ("collections", "concurrent", "importlib", "json", "logging", "urllib", "wsgiref", "xmlrpc")


class _NamedText(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def text(self) -> str: ...


Named = TypeVar("Named", bound=_NamedText)


@dataclasses.dataclass(frozen=True)
class Split(Generic[Named]):
    """Training and held-out documents or conversations, and the number of held-out copies left out."""

    train: list[Named]
    validation: list[Named]
    dropped: int
    """Held-out ones dropped because training ones repeat them."""

    @functools.cached_property
    def train_digest(self) -> str:
        """Digest of the training names and texts, in order: the key of caches and of resumed runs."""
        return digest_of(self.train)

    @functools.cached_property
    def validation_digest(self) -> str:
        """Digest of the held-out names and texts, on which the processes of a run have to agree."""
        return digest_of(self.validation)


@dataclasses.dataclass(frozen=True)
class Corpus(Split[Document]):
    """Training and held-out documents."""

    num_binary: int
    """Files skipped because they are not text."""

    @property
    def report(self) -> str:
        """One line about the documents."""
        return (
            f"train on {len(self.train):,} documents, {_megabytes(self.train)} MB; "
            f"hold out {len(self.validation):,}, {_megabytes(self.validation)} MB (near-duplicates dropped: {self.dropped}); "
            f"decoded with replacement: {sum(document.replaced for document in (*self.train, *self.validation))}; "
            f"binary files passed over: {self.num_binary}"
        )


def load_corpus(config: DataConfig) -> Corpus:
    """Read `config.source` and split it; ValueError as in `read_source`, or if nothing can be held out."""
    documents, binary = read_source(config.source)
    if config.source == STDLIB:
        train = [document for document in documents if not is_validation(STDLIB, document.name, 0)]
        validation = [document for document in documents if is_validation(STDLIB, document.name, 0)]
        remedy = "name a data.source of your own"
        check(bool(train and validation), f"the standard library of this Python is not installed as source files; {remedy}")
    elif len(documents) == 1:
        # The two halves of one text are naturally similar, so they are not compared.
        head, tail = split_tail(documents[0], config.heldout_fraction)
        return Corpus([head], [tail], 0, len(binary))
    else:
        train, validation = split_by_name(documents, config.heldout_fraction)
    is_copy = near_duplicates([document.text for document in validation], (document.text for document in train))
    kept = [document for document, repeats in zip(validation, is_copy, strict=True) if not repeats]
    check(
        bool(kept),
        f"data.source {config.source!r}: nothing is left to hold out, as each of the {len(validation)} documents chosen "
        "by name nearly repeats training documents; remove the copies or raise data.heldout_fraction",
    )
    return Corpus(train, kept, len(validation) - len(kept), len(binary))


def digest_of(documents: Iterable[_NamedText]) -> str:
    """Return the digest of names and texts, in order."""
    return digest(*(part for document in documents for part in (document.name, document.text)))


def is_validation(source: str, name: str, fraction: float) -> bool:
    """Return True if a document is held out by its name alone: its hash, or of the standard library its package."""
    if source == STDLIB:
        package, _, below = name.partition("/")
        return bool(below) and package in STDLIB_HELDOUT
    return _hash_fraction(name) < fraction


def split_by_name(documents: list[Named], fraction: float) -> tuple[list[Named], list[Named]]:
    """Hold out the documents whose names hash below `fraction`; at least one, and never all of them."""
    hashes = {document.name: _hash_fraction(document.name) for document in documents}
    names = sorted(hashes, key=lambda name: (hashes[name], name))
    chosen = sum(value < fraction for value in hashes.values())  # As in `is_validation`.
    held = set(names[: min(max(chosen, 1), len(names) - 1)])
    train = [document for document in documents if document.name not in held]
    return train, [document for document in documents if document.name in held]


def split_tail(document: Document, fraction: float) -> tuple[Document, Document]:
    """Hold out the end of a single document, from the start of a line if possible."""
    text = document.text
    cut = min(max(round(len(text) * (1 - fraction)), 1), len(text) - 1)
    cut = text.rfind("\n", 0, cut) + 1 or cut
    check(cut >= 1, f"{document.name!r} is a single character; nothing can be held out of it, so give more text")
    tail = dataclasses.replace(document, name=f"{document.name}#tail", text=text[cut:])
    return dataclasses.replace(document, text=text[:cut]), tail


def _hash_fraction(name: str) -> float:
    """Return a hash of `name`, between 0 and 1."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") / 2**64


def _megabytes(documents: Sequence[Document]) -> str:
    return f"{sum(document.num_bytes for document in documents) / 1e6:.2f}"


# ----------------------------------------------------------------------------------------------------------------------
# Near-duplicates: texts most of whose runs of eight words occur in other texts.


SHINGLE_WORDS = 8
CONTAINMENT = 0.5
_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def near_duplicates(candidates: Sequence[str], references: Iterable[str]) -> list[bool]:
    """For each candidate, return True if at least half of its distinct runs of eight words occur in the references.

    A text of fewer words is one run. A text without words is never a near-duplicate.
    """
    word_ids: dict[str, int] = collections.defaultdict(itertools.count().__next__)
    runs = [np.unique(_shingles(text, word_ids)) for text in candidates]
    known = np.unique(np.concatenate([np.zeros(0, np.uint64), *runs]))
    if not known.size:
        return [False] * len(candidates)
    found = np.zeros(known.size, bool)
    for text in references:
        shingles = _shingles(text, word_ids)
        positions = np.minimum(np.searchsorted(known, shingles), known.size - 1)
        found[positions[known[positions] == shingles]] = True
    return [run.size > 0 and bool(found[np.searchsorted(known, run)].mean() >= CONTAINMENT) for run in runs]


def _shingles(text: str, word_ids: dict[str, int]) -> np.ndarray:
    """Return a 64-bit hash of every run of eight words, uint64."""
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
