"""Fill-in-the-middle: its share, its order, that any document comes back, and that the others stay as they are."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Sequence

import hypothesis
import pytest
from hypothesis import strategies

from dsv3_jax.config import DataConfig, ModelConfig
from dsv3_jax.data.sources import Document
from dsv3_jax.data.tokenizer import Tokenizer, train_tokenizer
from dsv3_jax.data.tokens import FillInTheMiddle, encode_documents

FIM_TOKENS = DataConfig.fim_tokens
TEXTS = [f"def function_{i}(argument):\n    return argument + {i**3}\n" for i in range(100)]
TOKENIZER = train_tokenizer(TEXTS, 400, ["<bos>", "<eos>", *FIM_TOKENS])
# Any text that UTF-8 can hold.
UNICODE = strategies.text(strategies.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)


def fim(rate: float, seed: int = 0, tokenizer: Tokenizer = TOKENIZER) -> FillInTheMiddle:
    made = FillInTheMiddle.of(rate, FIM_TOKENS, seed, tokenizer)
    assert made is not None
    return made


def encode(documents: list[Document], made: FillInTheMiddle | None) -> list[list[int]]:
    return list(encode_documents(documents, TOKENIZER, 0, 1, made))


def unfim(made: FillInTheMiddle, ids: Sequence[int], tokenizer: Tokenizer = TOKENIZER) -> str:
    """Return the text of a document from its ids, rearranged or whole; ValueError unless the marks are as `join` puts them."""
    ids, expected = [int(id_) for id_ in ids], [made.begin, made.hole, made.end]
    marks = [id_ for id_ in ids if id_ in expected]
    if not marks:
        return tokenizer.decode(ids)
    if marks != expected:
        raise ValueError(f"the marks of a filled-in document are {marks}; they must be {expected}, once each")
    hole, end = ids.index(made.hole), ids.index(made.end)
    return "".join(map(tokenizer.decode, (ids[:hole], ids[end:], ids[hole:end])))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_share_of_documents_is_the_rate(rate: float) -> None:
    count = 20_000
    for seed in (0, 7):
        chosen = sum(fim(rate, seed).cuts(Document(f"{number}.txt", "text")) is not None for number in range(count))
        assert abs(chosen - rate * count) < 5 * math.sqrt(count * rate * (1 - rate))
    assert all(fim(1.0).cuts(Document(f"{number}", "text")) is not None for number in range(1000))


def test_cuts_are_uniform_over_all_places() -> None:
    cuts = [fim(1.0).cuts(Document(f"{number}", "abc")) for number in range(16_000)]
    counts = collections.Counter(cuts)
    # Two places of four, in either order: the ten pairs, of which the six of different places are twice as likely.
    pairs = list(itertools.combinations_with_replacement(range(4), 2))
    assert sorted(counts) == pairs
    for first, last in pairs:
        expected = 16_000 * (1 if first == last else 2) / 16
        assert abs(counts[first, last] - expected) < 5 * math.sqrt(expected)


def test_the_order_is_prefix_suffix_middle() -> None:
    begin, hole, end = 2, 3, 4
    document = Document("a", TEXTS[5])
    made = fim(1.0)
    first, last = made.cuts(document)
    prefix, middle, suffix = document.text[:first], document.text[first:last], document.text[last:]
    (ids,) = encode([document], made)
    parts = [TOKENIZER.encode(part) for part in (prefix, suffix, middle)]
    assert ids == [0, begin, *parts[0], hole, *parts[1], end, *parts[2], 1]


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(UNICODE, strategies.integers(0, 2**32 - 1))
def test_any_document_comes_back(text: str, seed: int) -> None:
    made = fim(1.0, seed)
    (ids,) = encode([Document("name", text)], made)
    assert [id_ for id_ in ids if id_ < 5] == [0, 2, 3, 4, 1]
    assert unfim(made, ids) == text
    (plain,) = encode([Document("name", text)], None)
    assert unfim(made, plain) == text


def test_text_that_spells_the_marks_comes_back() -> None:
    text = "".join(FIM_TOKENS) + "<eos> " + FIM_TOKENS[1]
    made = fim(1.0)
    (ids,) = encode([Document("name", text)], made)
    assert unfim(made, ids) == text


def test_the_others_are_untouched_and_a_choice_hangs_on_the_name_alone() -> None:
    documents = [Document(f"{number}.txt", text) for number, text in enumerate(TEXTS)]
    made = fim(0.3)
    whole, plain = encode(documents, made), encode(documents, None)
    chosen = [made.cuts(document) is not None for document in documents]
    assert 10 < sum(chosen) < 55
    assert [a == b for a, b in zip(whole, plain, strict=True)] == [not cut for cut in chosen]
    backwards = encode(documents[::-1], made)[::-1]
    assert backwards == whole
    assert [ids for document in documents for ids in encode([document], made)] == whole
    assert encode(documents, fim(0.3, seed=1)) != whole


def test_marks_that_stand_otherwise_are_refused() -> None:
    for ids in ([2, 9, 3], [3, 2, 4], [2, 3, 4, 2]):
        with pytest.raises(ValueError, match=r"marks of a filled-in document are .*; they must be \[2, 3, 4\]"):
            unfim(fim(1.0), ids)


def test_a_tokenizer_without_the_tokens_is_refused_by_name() -> None:
    without = train_tokenizer(TEXTS, 300, ["<bos>", "<eos>", FIM_TOKENS[0]])
    with pytest.raises(ValueError, match=rf"has no tokens \['{FIM_TOKENS[1]}', '{FIM_TOKENS[2]}'\].*data\.fim_rate to 0"):
        fim(0.1, tokenizer=without)
    assert FillInTheMiddle.of(DataConfig.fim_rate, FIM_TOKENS, 0, without) is None


def test_the_config_names_rate_and_tokens() -> None:
    renamed = train_tokenizer(TEXTS, 300, ["<bos>", "<eos>", "<b>", "<h>", "<e>"])
    data = DataConfig(fim_rate=0.25, fim_tokens=("<e>", "<b>", "<h>"))
    made = FillInTheMiddle.of(data.fim_rate, data.fim_tokens, 3, renamed)
    assert made == FillInTheMiddle(0.25, 3, begin=4, hole=2, end=3)
    assert ModelConfig().eos_token_ids
