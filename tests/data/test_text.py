"""What a run makes of its text: sources of every kind, alone and mixed; the digest that a continued run has to share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_jax.config import DataConfig, ModelConfig, TrainConfig
from dsv3_jax.data.prepare import PrepareFlags, prepare
from dsv3_jax.data.rows import MixedRows
from dsv3_jax.data.shards import open_prepared
from dsv3_jax.data.text import Dataset, build_dataset
from dsv3_jax.data.tokenizer import load_tokenizer, train_tokenizer
from dsv3_jax.data.tokens import FillInTheMiddle
from tests.data.test_chat_template import BOS, DEEPSEEK, EOS, IDS, TOKENIZER, USER
from tests.data.test_tokens_fim import unfim

MODEL = ModelConfig(vocab_size=400)
TRAIN = TrainConfig(steps=10, batch_size=4, sequence_length=32)


def write_text(folder: Path, prefix: str, count: int = 60) -> str:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.txt").write_text(" ".join(f"{prefix}{number}x{i}" for i in range(60)))
    return str(folder)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of text, a tokenizer, one of the folders prepared, and a checkpoint's tokenizer with conversations."""
    folder = tmp_path_factory.mktemp("text")
    a, b = (write_text(folder / name, name) for name in "ab")
    texts = [path.read_text() for source in (a, b) for path in Path(source).iterdir()]
    train_tokenizer(texts, 400, ["<bos>", "<eos>", *DataConfig.fim_tokens]).save(folder / "tokenizer.json")
    options = {"heldout_fraction": 0.1, "workers": 1}
    prepare(PrepareFlags(b, str(folder / "tokenizer.json"), str(folder / "prepared"), **options))
    (folder / "checkpoint").mkdir()
    TOKENIZER.save(folder / "checkpoint" / "tokenizer.json")
    config = {"bos_token": BOS, "eos_token": EOS, "chat_template": DEEPSEEK}
    (folder / "checkpoint" / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("one", "other"):
        lines = []
        for number in range(60):
            messages = [
                {"role": "user", "content": f"{name} {number}?"},
                {"role": "assistant", "content": f"{name} {number * 2}"},
            ]
            lines.append(json.dumps({"messages": messages}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def made(workplace: Path, train: TrainConfig = TRAIN, model: ModelConfig = MODEL, **fields: Any) -> Dataset:
    data = DataConfig(**{"cache_dir": str(workplace / "cache"), "heldout_fraction": 0.1} | fields)
    return build_dataset(data, model, train)


def test_a_lone_source(workplace: Path) -> None:
    source = str(workplace / "a")
    text = made(workplace, source=source)
    assert list(text.validation) == list(text.sources) == [source]
    assert text.validation[source].num_bytes == sum(document.num_bytes for document in text.sources[source].documents)
    assert text.report.count("\n") == 0
    assert text.epochs(100)[source] == pytest.approx(3200 / text.sources[source].rows._stream.epoch_length)
    assert (text.rows[5].loss_weight_T == 1).all()


def test_a_prepared_source_brings_its_tokenizer(workplace: Path) -> None:
    source = str(workplace / "prepared")
    text = made(workplace, source=source)
    assert text.tokenizer.to_json() == load_tokenizer(workplace / "tokenizer.json").to_json()
    read = text.tokenizer.decode(np.concatenate([text.rows[number].targets_T for number in range(50)]).tolist())
    assert "b1x" in read
    assert "a1x" not in read
    # The same as reading the text, but for the tokenizer that was named there.
    direct = made(workplace, source=str(workplace / "b"), tokenizer=str(workplace / "tokenizer.json"))
    np.testing.assert_equal(direct.rows[17], text.rows[17])
    batches = zip(direct.validation[str(workplace / "b")], text.validation[source], strict=True)
    for one, other in batches:
        np.testing.assert_equal(one, other)


def test_a_mixture_has_one_tokenizer_and_every_source_its_windows(workplace: Path) -> None:
    a, b = str(workplace / "a"), str(workplace / "b")
    text = made(workplace, mixture=((a, 3.0), (b, 1.0)))
    assert isinstance(text.rows, MixedRows)
    assert list(text.validation) == [a, b]
    assert text.rows.rows_by_source(1024) == {a: 768, b: 256}
    assert text.report.startswith("2 sources\n  ")
    assert text.epochs(1024).keys() == {a, b}
    # Trained on both: words of either are few tokens.
    for name in "ab":
        assert len(text.tokenizer.encode(f"{name}1x1 {name}2x2 {name}3x3")) < 20
    assert text.validation_digest != made(workplace, source=a).validation_digest


def test_prepared_and_other_sources_mix(workplace: Path) -> None:
    a, prepared = str(workplace / "a"), str(workplace / "prepared")
    text = made(workplace, mixture=((a, 0.5), (prepared, 0.5)))
    assert text.tokenizer.to_json() == load_tokenizer(workplace / "tokenizer.json").to_json()


def test_what_a_prepared_source_does_not_fit_is_said(workplace: Path, tmp_path: Path) -> None:
    prepared = str(workplace / "prepared")
    with pytest.raises(
        ValueError, match=r"data\.fim_rate is 0\.1, but .* was prepared with 0\.0; set it to the same, or prepare"
    ):
        made(workplace, source=prepared, fim_rate=0.1)
    vocab_size = load_tokenizer(prepared).vocab_size
    with pytest.raises(ValueError, match=rf"the tokenizer of .* has {vocab_size} ids; raise model\.vocab_size"):
        made(workplace, source=prepared, model=ModelConfig(vocab_size=vocab_size - 1))
    other = train_tokenizer(["other"], 300, ["<bos>", "<eos>"])
    other.save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"is not the one that .* was prepared with; prepare the folder again"):
        made(workplace, source=prepared, tokenizer=str(tmp_path))
    options = {"heldout_fraction": 0.1, "workers": 1}
    prepare(PrepareFlags(str(workplace / "a"), str(tmp_path / "tokenizer.json"), str(tmp_path / "out"), **options))
    with pytest.raises(ValueError, match=r"have different tokenizers; prepare one of them again"):
        made(workplace, mixture=((prepared, 1.0), (str(tmp_path / "out"), 1.0)))
    with pytest.raises(ValueError, match=r"data\.mixture '.*prepared': the training text is \d+ tokens, less than one row"):
        made(workplace, mixture=((prepared, 1.0), (str(workplace / "a"), 1.0)), train=TrainConfig(sequence_length=4096 * 16))


def test_filled_in_documents_come_back_from_the_rows(workplace: Path) -> None:
    source = str(workplace / "a")
    text = made(workplace, source=source, fim_rate=1.0)
    assert text.tokenizer.special_tokens == dict(enumerate(["<bos>", "<eos>", *DataConfig.fim_tokens]))
    fim = FillInTheMiddle.of(1.0, DataConfig.fim_tokens, TRAIN.seed, text.tokenizer)
    stream = text.sources[source].rows._stream
    tokens, _ = stream.read(0, stream.epoch_length)
    documents = np.split(tokens, np.flatnonzero(tokens == 1) + 1)[:-1]
    read = {unfim(fim, ids, text.tokenizer) for ids in documents}
    validation = {document.text for document in text.sources[source].documents}
    assert read == {path.read_text() for path in Path(source).iterdir()} - validation
    # Held-out text stays as it is.
    scored = next(iter(text.validation[source]))
    assert not set(scored.targets_BT.ravel()) & {2, 3, 4}


CHAT: dict[str, Any] = {"kind": "chat", "cross_document_attention": False}


def test_conversations(workplace: Path) -> None:
    one, other, checkpoint = (str(workplace / name) for name in ("one.jsonl", "other.jsonl", "checkpoint"))
    chat = {**CHAT, "tokenizer": checkpoint}
    model = ModelConfig(vocab_size=400, bos_token_id=IDS[BOS], eos_token_id=IDS[EOS])
    text = made(workplace, model=model, mixture=((one, 1.0), (other, 1.0)), **chat)
    row = text.rows[0]
    said = text.tokenizer.decode(row.targets_T[row.loss_weight_T == 1].tolist())
    assert said
    assert "?" not in said
    assert IDS[USER] in row.tokens_T
    assert "conversations cut at the end of a row: 0 (tokens: 0)" in text.report
    for windows, documents in ((source.windows, source.documents) for source in text.sources.values()):
        batch = next(iter(windows))
        assert batch.segment_starts_BT is not None
        assert windows.num_bytes == sum(document.num_bytes for document in documents)
        decoded = text.tokenizer.decode(np.concatenate([b.targets_BT[b.loss_weight_BT == 1] for b in windows]).tolist())
        assert sorted(decoded) == sorted("".join(document.text for document in documents))


def test_conversations_take_a_checkpoints_tokenizer(workplace: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data\.tokenizer is None, but conversations .* take the tokenizer and the chat template"
    ):
        made(workplace, **CHAT, source=str(workplace / "one.jsonl"))
    with pytest.raises(ValueError, match=r"has no chat template"):
        made(workplace, **CHAT, source=str(workplace / "one.jsonl"), tokenizer=str(workplace / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"one\.jsonl:1 has no \"text\" string; .*; conversations take data\.kind chat"):
        made(workplace, source=str(workplace / "one.jsonl"))


def test_the_digest_covers_whatever_changes_the_rows(workplace: Path, tmp_path: Path) -> None:
    a, b, tokenizer = (str(workplace / name) for name in ("a", "b", "tokenizer.json"))
    mixture = ((a, 3.0), (b, 1.0))
    digests = {
        "mixture": made(workplace, mixture=mixture, tokenizer=tokenizer).digest,
        "weights": made(workplace, mixture=((a, 2.0), (b, 1.0)), tokenizer=tokenizer).digest,
        "order": made(workplace, mixture=((b, 1.0), (a, 3.0)), tokenizer=tokenizer).digest,
        "one source": made(workplace, source=a, tokenizer=tokenizer).digest,
        "tokenizer": made(workplace, source=a).digest,
        "fim": made(workplace, source=a, tokenizer=tokenizer, fim_rate=0.1).digest,
        "prepared": made(workplace, source=str(workplace / "prepared")).digest,
    }
    assert len(set(digests.values())) == len(digests)
    # The same weights in other words, and the same text elsewhere, are the same.
    assert made(workplace, mixture=((a, 6.0), (b, 2.0)), tokenizer=tokenizer).digest == digests["mixture"]
    write_text(tmp_path / "a", "a")
    assert made(workplace, source=str(tmp_path / "a"), tokenizer=tokenizer).digest == digests["one source"]
    # A training document that changes is noticed; a prepared folder is what meta.json says it is.
    trained = open_prepared(str(workplace / "prepared"), str(workplace / "cache"))
    shutil.copytree(workplace / "prepared", tmp_path / "prepared")
    (tmp_path / "prepared" / "meta.json").write_text(json.dumps(trained.meta | {"seed": 7}))
    assert open_prepared(str(tmp_path / "prepared"), str(tmp_path)).train_digest != trained.train_digest
    held = {document.name for document in made(workplace, source=a, tokenizer=tokenizer).sources[a].documents}
    changed = next(path for path in sorted((tmp_path / "a").iterdir()) if path.name not in held)
    changed.write_text("changed")
    assert made(workplace, source=str(tmp_path / "a"), tokenizer=tokenizer).digest != digests["one source"]


def test_the_digest_of_conversations_covers_their_template(workplace: Path, tmp_path: Path) -> None:
    model = ModelConfig(vocab_size=400, bos_token_id=IDS[BOS], eos_token_id=IDS[EOS])
    chat = {"model": model, **CHAT, "source": str(workplace / "one.jsonl")}
    before = made(workplace, tokenizer=str(workplace / "checkpoint"), **chat).digest
    TOKENIZER.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
    (tmp_path / "chat_template.jinja").write_text(DEEPSEEK)
    assert made(workplace, tokenizer=str(tmp_path), **chat).digest == before
    (tmp_path / "chat_template.jinja").write_text(DEEPSEEK + "{# changed #}")
    assert made(workplace, tokenizer=str(tmp_path), **chat).digest != before
