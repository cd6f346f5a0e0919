"""Documents as one array of ids between their marks; the cache of tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.config import DataConfig, ModelConfig
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.data.tokenizer import prepare_tokenizer
from dsv3_jax.data.tokens import tokenize_corpus


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
    tokens = tokenize_corpus(corpus, tokenizer, data, model)[:]
    assert tokens.dtype == dtype
    parts = np.split(tokens, np.flatnonzero(tokens == eos) + 1)[:-1]
    for part, document in zip(parts, corpus.train, strict=True):
        ids = part.tolist()
        assert ids[-1] == eos
        assert bos is None or ids[0] == bos
        assert tokenizer.decode(ids) == document.text
        assert tokenizer.encode(document.text) == ids[0 if bos is None else 1 : -1]
    validation = {document.text for document in corpus.validation}
    assert validation
    assert validation.isdisjoint(tokenizer.decode(part.tolist()) for part in parts)


@pytest.mark.parametrize("broken", [b"", b"\x93NUMPY nonsense", "half", "float", "short"])
def test_token_cache_is_used_and_remade_when_broken(
    tmp_path: Path, broken: bytes | str, caplog: pytest.LogCaptureFixture
) -> None:
    data, model = write_corpus(tmp_path / "text"), ModelConfig(vocab_size=400)
    corpus = load_corpus(data)
    tokenizer = prepare_tokenizer(data, model, corpus)
    first = tokenize_corpus(corpus, tokenizer, data, model)[:]
    (file,) = (tmp_path / "cache").glob("tokens-*.npy")
    stamp = file.stat().st_mtime_ns
    np.testing.assert_array_equal(tokenize_corpus(corpus, tokenizer, data, model)[:], first)
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
    np.testing.assert_array_equal(tokenize_corpus(corpus, tokenizer, data, model)[:], first)
    np.testing.assert_array_equal(np.load(file), first)
    assert "again" in caplog.text
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()) == ["tokenizer", "tokens"]


def test_corpora_do_not_share_a_token_cache(tmp_path: Path) -> None:
    model = ModelConfig(vocab_size=300)
    made = []
    for name in ("one", "other"):
        data = write_corpus(tmp_path / name, prefix=name)
        corpus = load_corpus(data)
        made.append(tokenize_corpus(corpus, prepare_tokenizer(data, model, corpus), data, model)[:])
    assert not np.array_equal(made[0], made[1])
    assert len(list((tmp_path / "cache").glob("tokens-*.npy"))) == 2
