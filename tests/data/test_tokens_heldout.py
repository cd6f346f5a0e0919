"""Held-out windows: each byte scored once, in context; the compressors on the same bytes."""

from __future__ import annotations

import gzip
import lzma
import math
import subprocess

import chex
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from dsv3_jax.config import ModelConfig
from dsv3_jax.data.sources import Document
from dsv3_jax.data.tokenizer import Tokenizer, train_tokenizer
from dsv3_jax.data.tokens import ValidationWindows, compressor_bits_per_byte, document_windows

DOCUMENTS = [
    Document("a", "The first document, <eos> spelt out.\n" + " ".join(map(str, range(1000, 1050)))),
    Document("b", "é"),
    Document("c", "漢字 and replaced \ufffd bytes", replaced=True),
    Document("d", "".join(f"def f{i}(x):\n    return x * {i**3}\n" for i in range(40))),
]
TOKENIZER = train_tokenizer([document.text for document in DOCUMENTS], 290, ["<bos>", "<eos>"])
MODEL = ModelConfig(vocab_size=300)


def windows(model: ModelConfig = MODEL, batch_size: int = 3, sequence_length: int = 10) -> ValidationWindows:
    return document_windows(DOCUMENTS, TOKENIZER, model, batch_size=batch_size, sequence_length=sequence_length)


@pytest.mark.parametrize(("batch_size", "sequence_length"), [(3, 10), (1, 7), (64, 16), (2, 1000)])
def test_every_byte_is_scored_once_in_order(batch_size: int, sequence_length: int) -> None:
    validation = windows(batch_size=batch_size, sequence_length=sequence_length)
    batches = list(validation)
    assert len(batches) == len(validation)
    for batch in batches:
        arrays = [batch.tokens_BT, batch.targets_BT, batch.loss_weight_BT]
        chex.assert_shape(arrays, (batch_size, sequence_length))
        chex.assert_type(arrays, [np.int32, np.int32, np.float32])
        assert batch.segment_starts_BT is None
        assert set(np.unique(batch.loss_weight_BT)) <= {0, 1}
    targets = np.concatenate([batch.targets_BT.ravel() for batch in batches])
    scored = np.concatenate([batch.loss_weight_BT.ravel() for batch in batches]) == 1
    assert TOKENIZER.decode(targets[scored].tolist()) == "".join(document.text for document in DOCUMENTS)
    assert scored.sum() == sum(len(TOKENIZER.encode(document.text)) for document in DOCUMENTS)
    assert validation.num_bytes == sum(len(document.text.encode()) for document in DOCUMENTS)
    assert set(targets[~scored]) <= {0, 1}


@pytest.mark.parametrize(("bos", "eos"), [(0, 1), (None, 1)])
def test_windows_cut_one_stream_and_carry_the_token_before(bos: int | None, eos: int) -> None:
    opening = [] if bos is None else [bos]
    stream = [eos]
    for document in DOCUMENTS:
        stream += [*opening, *TOKENIZER.encode(document.text), eos]
    batches = list(windows(ModelConfig(vocab_size=300, bos_token_id=bos, eos_token_id=eos)))
    tokens = np.concatenate([batch.tokens_BT.ravel() for batch in batches])
    targets = np.concatenate([batch.targets_BT.ravel() for batch in batches])
    np.testing.assert_array_equal(tokens[: len(stream) - 1], stream[:-1])
    np.testing.assert_array_equal(targets[: len(stream) - 1], stream[1:])
    assert not tokens[len(stream) - 1 :].any()
    assert not np.concatenate([batch.loss_weight_BT.ravel() for batch in batches])[len(stream) - 1 :].any()


@pytest.mark.parametrize("bos", [0, None])
def test_starts_say_where_in_its_window_a_document_begins(bos: int | None) -> None:
    model = ModelConfig(vocab_size=300, bos_token_id=bos)
    validation = document_windows(DOCUMENTS, TOKENIZER, model, batch_size=3, sequence_length=10, across_documents=False)
    batches = list(validation)
    tokens = np.concatenate([batch.tokens_BT for batch in batches])
    starts = np.concatenate([batch.segment_starts_BT for batch in batches])
    length = 1 + sum(len(TOKENIZER.encode(document.text)) + (1 if bos is None else 2) for document in DOCUMENTS) - 1
    for number, (row, row_starts) in enumerate(zip(tokens.tolist(), starts.tolist(), strict=True)):
        begins = 0
        for place in range(len(row)):
            if number * 10 + place >= length:
                assert row_starts[place] == -1
                continue
            # A document begins behind the end of the one before it.
            previous = row[place - 1] if place else None
            begins = place if previous == 1 else begins
            assert row_starts[place] == begins


def test_sample_is_spread_over_the_text_and_always_the_same() -> None:
    validation = windows()
    rows = {row.tobytes(): index for index, row in enumerate(np.concatenate([batch.targets_BT for batch in validation]))}
    assert len(rows) > 3 * (len(validation) - 1)  # no two windows are alike
    sampled = np.concatenate([batch.targets_BT for batch in validation.sample(2)])
    assert sampled.shape == (6, 10)
    places = [rows[row.tobytes()] for row in sampled]
    assert places == sorted(set(places))
    assert places[0] == 0
    assert places[-1] >= len(rows) * 0.6
    chex.assert_trees_all_equal(list(validation.sample(2)), list(validation.sample(2)))
    chex.assert_trees_all_equal(list(validation.sample(1000)), list(validation))


def test_bits_per_byte_of_a_uniform_model() -> None:
    validation = windows()
    num_tokens = sum(float(batch.loss_weight_BT.sum()) for batch in validation)
    assert validation.bits_per_byte(num_tokens * math.log(256)) == pytest.approx(8 * num_tokens / validation.num_bytes)


def test_tokenizer_that_loses_text_is_refused() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"the": 2, "<unk>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="does not reproduce 'a'"):
        document_windows(DOCUMENTS, Tokenizer(backend), MODEL, batch_size=1, sequence_length=8)


def test_tokenizer_with_more_ids_than_the_vocabulary_is_refused() -> None:
    highest = max(max(TOKENIZER.encode(document.text)) for document in DOCUMENTS)
    windows(ModelConfig(vocab_size=highest + 1))
    with pytest.raises(ValueError, match=f"gives token id {highest}, outside the model's vocabulary of {highest}; use"):
        windows(ModelConfig(vocab_size=highest))


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(ValueError, match="no held-out text"):
        document_windows([], TOKENIZER, MODEL, batch_size=1, sequence_length=8)


def test_compressors_are_those_of_the_command_line() -> None:
    data = "".join(document.text for document in DOCUMENTS).encode()
    figures = compressor_bits_per_byte(DOCUMENTS)
    assert gzip.decompress(gzip.compress(data)) == data
    for name in ("gzip", "xz"):
        try:
            packed = subprocess.run([name, "-9", "-c"], input=data, capture_output=True, check=True).stdout
        except FileNotFoundError:
            continue
        unpacked = {"gzip": gzip.decompress, "xz": lzma.decompress}[name](packed)
        assert unpacked == data
        assert figures[name] == pytest.approx(8 * len(packed) / len(data), abs=1e-9)
