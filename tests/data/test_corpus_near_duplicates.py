"""Near-duplicates against containment computed over sets of words."""

from __future__ import annotations

import random
import re

from dsv3_jax.data.corpus import near_duplicates


def containment(candidate: str, references: list[str]) -> float:
    """Share of the distinct runs of eight words of `candidate` that occur in `references`, with sets of tuples."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text)
        return {tuple(words[start : start + 8]) for start in range(max(len(words) - 7, 1))}

    return len(runs(candidate) & set().union(*map(runs, references))) / len(runs(candidate))


def words(generator: random.Random, count: int, vocabulary: int = 300) -> list[str]:
    return [f"w{generator.randrange(vocabulary)}" for _ in range(count)]


def test_agrees_with_sets_of_words() -> None:
    generator = random.Random(0)
    references = [words(generator, 400) for _ in range(5)]
    candidates = []
    for share in range(11):
        taken = share * 40
        candidates.append(" ".join(references[share % 5][:taken] + words(generator, 400 - taken)))
    texts = [" ".join(reference) for reference in references]
    shares = [containment(candidate, texts) for candidate in candidates]
    assert (min(shares), max(shares)) == (0, 1)
    assert near_duplicates(candidates, texts) == [share >= 0.5 for share in shares]


def test_reformatting_does_not_hide_a_copy() -> None:
    code = "\n".join(f"def function_{i}(first, second): return first + {i} * second" for i in range(20))
    reformatted = "# " + code.replace("(", " ( ").replace("\n", "\n\n    ")
    assert near_duplicates([reformatted, code.replace("function", "other")], [code]) == [True, False]


def test_short_and_wordless_texts() -> None:
    assert near_duplicates(
        ["only four words here", "...", "", "four words here"], ["Only four words here.", "only (four) words: here!"]
    ) == [
        True,
        False,
        False,
        False,
    ]
    assert near_duplicates([], ["text"]) == []
    assert near_duplicates(["text"], []) == [False]
