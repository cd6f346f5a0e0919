"""Packed batches: every token once an epoch, shuffled, a pure function of (seed, step); the cache of tokens."""

from __future__ import annotations

import collections
import hashlib
import itertools
import subprocess
import sys
import threading
from pathlib import Path

import chex
import numpy as np
import pytest

from dsv3_jax.config import DataConfig, ModelConfig, TrainConfig
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.data.pipeline import Batch, PackedRows, TokenStream, TrainBatches, tokenize_corpus
from dsv3_jax.data.tokenizer import prepare_tokenizer

BOS, EOS = 0, 1
MODEL = ModelConfig(vocab_size=5000, bos_token_id=BOS, eos_token_id=EOS)


def flat_tokens(lengths: list[int]) -> np.ndarray:
    """Documents of the given lengths, marks and all; apart from the marks every token is another number."""
    numbers = itertools.count(2)
    return np.concatenate([[BOS, *itertools.islice(numbers, length - 2), EOS] for length in lengths]).astype(np.uint16)


def config(**fields: int) -> TrainConfig:
    return TrainConfig(**{"steps": 50, "batch_size": 4, "sequence_length": 16, "seed": 3, **fields})


def rows_of(tokens: np.ndarray, train: TrainConfig) -> PackedRows:
    return PackedRows(TokenStream(tokens, EOS, train.seed), train, range(train.batch_size))


def documents_in(stream: np.ndarray) -> list[tuple[int, ...]]:
    ends = np.flatnonzero(stream == EOS) + 1
    return [tuple(part.tolist()) for part in np.split(stream, ends)[:-1]]


def test_an_epoch_is_every_document_once_in_an_order_of_its_own() -> None:
    tokens = flat_tokens([5, 9, 2, 30, 17, 4, 4, 8])
    stream = TokenStream(tokens, EOS, seed=0)
    epochs = [stream.read(epoch * tokens.size, (epoch + 1) * tokens.size) for epoch in range(6)]
    orders = [documents_in(epoch) for epoch in epochs]
    for order in orders:
        assert sorted(order) == sorted(documents_in(tokens))
    assert len({tuple(order) for order in orders}) == 6
    np.testing.assert_array_equal(stream.read(0, 6 * tokens.size), np.concatenate(epochs))
    np.testing.assert_array_equal(stream.read(-1, 3), [EOS, *epochs[0][:3]])
    assert documents_in(TokenStream(tokens, EOS, seed=1).read(0, tokens.size)) != orders[0]


@pytest.mark.parametrize("length", [16, 13])  # 160 tokens: a whole number of rows, and not
def test_every_token_of_every_epoch_is_a_target_once(length: int) -> None:
    tokens = flat_tokens([40, 7, 60, 23, 30])
    train = config(sequence_length=length, batch_size=1, steps=length * (160 // length) * 3)
    rows = rows_of(tokens, train)
    # As many shuffled stretches as make whole epochs: length * (160 // length) * 160 tokens a 160 rows.
    num_rows = 160 * (160 // length)
    epochs = num_rows * length // 160
    targets = np.concatenate([rows[index][1:] for index in range(num_rows)])
    counts = collections.Counter(targets.tolist())
    assert counts == collections.Counter(np.tile(tokens, epochs).tolist())


def test_targets_follow_their_tokens() -> None:
    tokens = flat_tokens([40, 7, 60, 23, 30])
    rows = rows_of(tokens, config())
    # In the stream a token is followed by the next of its document, an end by any beginning.
    following = {int(a): int(b) for a, b in itertools.pairwise(tokens) if a not in (BOS, EOS)}
    beginnings = {int(first) for first in tokens[1:][tokens[:-1] == BOS]}
    for index in range(100):
        for token, target in itertools.pairwise(rows[index].tolist()):
            if token == EOS:
                assert target == BOS
            elif token == BOS:
                assert target in beginnings
            else:
                assert target == following[token]


def test_rows_of_a_batch_lie_apart() -> None:
    tokens = flat_tokens([1600])
    rows = rows_of(tokens, config(batch_size=8))
    first = [int(rows[index][2]) // 16 for index in range(100)]
    assert sorted(first) == list(range(100))
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(first)) < 10


def test_batches_have_the_shape_of_the_run() -> None:
    train = config(batch_size=6, sequence_length=20)
    batches = TrainBatches(train, MODEL, flat_tokens([300]))
    assert len(batches) == train.steps
    for batch in (batches[0], batches[train.steps - 1], next(batches.iterate())):
        assert isinstance(batch, Batch)
        chex.assert_shape(list(batch), (6, 20))
        assert {array.dtype for array in batch} == {np.dtype(np.int32)}
        np.testing.assert_array_equal(batch.tokens_BT[:, 1:], batch.targets_BT[:, :-1])
    for step in (-1, train.steps):
        with pytest.raises(IndexError):
            batches[step]


def test_batch_does_not_depend_on_the_number_of_steps() -> None:
    tokens = flat_tokens([90, 70])
    short, long = (TrainBatches(config(steps=steps), MODEL, tokens) for steps in (20, 4000))
    for step in range(20):
        chex.assert_trees_all_equal(short[step], long[step])
    assert long[3999].targets_BT.min() >= 0  # 1600 epochs further


def test_seeds_give_other_batches() -> None:
    tokens = flat_tokens([90, 70, 50, 30])
    one, other, largest = (TrainBatches(config(seed=seed), MODEL, tokens)[0].tokens_BT for seed in (0, 1, 2**32 - 1))
    assert not np.array_equal(one, other)
    assert not np.array_equal(largest, other)


def test_iterate_is_the_steps_in_order_from_any_start() -> None:
    batches = TrainBatches(config(steps=30), MODEL, flat_tokens([90, 70]))
    for start in (0, 17, 29, 30):
        read = list(batches.iterate(start))
        assert len(read) == 30 - start
        for step, batch in enumerate(read, start):
            chex.assert_trees_all_equal(batch, batches[step])


def test_leaving_an_iterator_early_leaves_no_thread_behind() -> None:
    batches = TrainBatches(config(steps=5000), MODEL, flat_tokens([90, 70]))
    before = set(threading.enumerate())
    iterator = batches.iterate()
    next(iterator)
    started = set(threading.enumerate()) - before
    assert started
    iterator.close()
    del iterator
    for thread in started:
        thread.join(timeout=10)
    assert not [thread for thread in started if thread.is_alive()]


def test_processes_share_the_rows_of_a_batch() -> None:
    tokens = flat_tokens([90, 70, 300])
    train = config(batch_size=8)
    whole = TrainBatches(train, MODEL, tokens)
    parts = [TrainBatches(train, MODEL, tokens, rows) for rows in (range(3), range(3, 4), range(4, 8))]
    for step in (0, 7, 49):
        joined = np.concatenate([part[step].tokens_BT for part in parts])
        np.testing.assert_array_equal(joined, whole[step].tokens_BT)


PROGRAM = """
import hashlib, sys
import numpy as np
from dsv3_jax.config import ModelConfig, TrainConfig
from dsv3_jax.data.pipeline import TrainBatches
tokens = np.load(sys.argv[1])
batches = TrainBatches(TrainConfig(steps=50, batch_size=4, sequence_length=16, seed=3), ModelConfig(vocab_size=5000), tokens)
print(hashlib.sha256(b"".join(batches[step].tokens_BT.tobytes() for step in (49, 0, 20))).hexdigest())
"""


def test_another_process_makes_the_same_batches(tmp_path: Path) -> None:
    tokens = flat_tokens([90, 70, 300])
    np.save(tmp_path / "tokens.npy", tokens)
    other = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "tokens.npy")],
        check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    batches = TrainBatches(config(), MODEL, tokens)
    mine = hashlib.sha256(b"".join(batches[step].tokens_BT.tobytes() for step in (49, 0, 20))).hexdigest()
    assert other.stdout.split()[-1] == mine


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"15 tokens, less than one row of train\.sequence_length \(16\); give more text"):
        TrainBatches(config(), MODEL, flat_tokens([15]))
    TrainBatches(config(), MODEL, flat_tokens([16]))[0]


def write_corpus(folder: Path, prefix: str = "w") -> DataConfig:
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text(" ".join(f"{prefix}{number}x{i} <eos>" for i in range(40)) + " é\n")
    return DataConfig(source=str(folder), cache_dir=str(folder.parent / "cache"), heldout_fraction=0.2)


@pytest.mark.parametrize(("bos", "vocab_size", "dtype"), [(0, 400, np.uint16), (None, 400, np.uint16), (0, 70000, np.uint32)])
def test_tokens_are_the_training_documents_between_their_marks(
    tmp_path: Path, bos: int | None, vocab_size: int, dtype: type
) -> None:
    data = write_corpus(tmp_path / "text")
    model = ModelConfig(vocab_size=vocab_size, bos_token_id=bos, eos_token_id=1 if bos == 0 else 0)
    eos = model.eos_token_ids[0]
    corpus = load_corpus(data)
    tokenizer = prepare_tokenizer(data, model, corpus)
    tokens = tokenize_corpus(corpus, tokenizer, data, model)
    assert tokens.dtype == dtype
    parts = np.split(tokens, np.flatnonzero(tokens == eos) + 1)[:-1]
    for part, document in zip(parts, corpus.train, strict=True):
        ids = part.tolist()
        assert ids[-1] == eos
        assert bos is None or ids[0] == bos
        assert tokenizer.decode(ids) == document.text
        assert tokenizer.encode(document.text) == ids[0 if bos is None else 1 : -1]
    heldout = {document.text for document in corpus.heldout}
    assert heldout
    assert heldout.isdisjoint(tokenizer.decode(part.tolist()) for part in parts)


@pytest.mark.parametrize("broken", [b"", b"\x93NUMPY nonsense", "half", "float", "short"])
def test_token_cache_is_used_and_remade_when_broken(
    tmp_path: Path, broken: bytes | str, caplog: pytest.LogCaptureFixture
) -> None:
    data, model = write_corpus(tmp_path / "text"), ModelConfig(vocab_size=400)
    corpus = load_corpus(data)
    tokenizer = prepare_tokenizer(data, model, corpus)
    first = np.array(tokenize_corpus(corpus, tokenizer, data, model))
    (file,) = (tmp_path / "cache").glob("tokens-*.npy")
    stamp = file.stat().st_mtime_ns
    np.testing.assert_array_equal(tokenize_corpus(corpus, tokenizer, data, model), first)
    assert file.stat().st_mtime_ns == stamp
    assert caplog.text == ""

    if broken == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif broken == "float":
        np.save(file, first.astype(np.float32))
    elif broken == "short":
        np.save(file, first[:100])
    else:
        assert isinstance(broken, bytes)
        file.write_bytes(broken)
    np.testing.assert_array_equal(tokenize_corpus(corpus, tokenizer, data, model), first)
    np.testing.assert_array_equal(np.load(file), first)
    assert "again" in caplog.text
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()) == ["tokenizer", "tokens"]


def test_corpora_do_not_share_a_token_cache(tmp_path: Path) -> None:
    model = ModelConfig(vocab_size=300)
    made = []
    for name in ("one", "other"):
        data = write_corpus(tmp_path / name, prefix=name)
        corpus = load_corpus(data)
        made.append(np.array(tokenize_corpus(corpus, prepare_tokenizer(data, model, corpus), data, model)))
    assert not np.array_equal(made[0], made[1])
    assert len(list((tmp_path / "cache").glob("tokens-*.npy"))) == 2
