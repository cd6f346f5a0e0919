"""Which documents mostly repeat others: by the share of their runs of eight words that the others hold.

A held-out file that has a near copy among the training files measures memory, not the model; the split drops
it. Only words count, so new indentation, comment markers or punctuation do not hide a copy.
"""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Iterable, Sequence

import numpy as np

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
