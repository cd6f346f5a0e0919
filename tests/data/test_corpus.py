"""The held-out split: fixed, disjoint, without near-copies, and the same split of the standard library everywhere."""

from __future__ import annotations

import functools
import json
import sysconfig
from pathlib import Path

import pytest

from dsv3_jax.config import DataConfig
from dsv3_jax.data.corpus import STDLIB_HELDOUT, Corpus, load_corpus, near_duplicates


def text_of(number: int, length: int = 60) -> str:
    """A text that shares no run of words with that of another number."""
    return " ".join(f"d{number}w{i}" for i in range(length)) + "\n"


def write_documents(folder: Path, count: int) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number:03}.txt").write_text(text_of(number))


def split(source: Path, **fields: float) -> Corpus:
    return load_corpus(DataConfig(source=str(source), **fields))


def test_split_hangs_on_names_alone(tmp_path: Path) -> None:
    write_documents(tmp_path / "a", 300)
    first = split(tmp_path / "a", heldout_fraction=0.2)
    validation = {document.name for document in first.validation}
    assert 30 <= len(validation) <= 90  # 60 expected, 7 the standard deviation
    assert validation.isdisjoint(document.name for document in first.train)
    assert len(first.train) + len(first.validation) == 300
    held_bytes = sum(len((tmp_path / "a" / name).read_bytes()) for name in validation)
    assert f"hold out {len(validation)}, {held_bytes / 1e6:.2f} MB" in first.report

    for number in range(150):
        (tmp_path / "a" / f"{number:03}.txt").write_text(text_of(1000 + number))
    assert {document.name for document in split(tmp_path / "a", heldout_fraction=0.2).validation} == validation
    assert {document.name for document in split(tmp_path / "a", heldout_fraction=0.1).validation} < validation


def test_at_least_one_document_on_each_side(tmp_path: Path) -> None:
    write_documents(tmp_path / "few", 3)
    assert [len(side) for side in (split(tmp_path / "few").train, split(tmp_path / "few").validation)] == [2, 1]
    most = split(tmp_path / "few", heldout_fraction=0.999)
    assert [len(most.train), len(most.validation)] == [1, 2]


def test_near_copies_of_training_documents_are_dropped(tmp_path: Path) -> None:
    write_documents(tmp_path / "a", 60)
    clean = split(tmp_path / "a", heldout_fraction=0.2)
    assert clean.dropped == 0
    copied = clean.validation[0].name
    (tmp_path / "a" / copied).write_text(clean.train[0].text.upper().lower() + "and some words more\n")
    copies = split(tmp_path / "a", heldout_fraction=0.2)
    assert copies.dropped == 1
    assert [document.name for document in copies.validation] == [document.name for document in clean.validation[1:]]
    assert [document.name for document in copies.train] == [document.name for document in clean.train]


def test_nothing_but_copies_is_refused(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(text_of(0))
    with pytest.raises(ValueError, match="nearly repeats training documents; remove the copies"):
        split(tmp_path)


def test_lone_document_gives_its_end(tmp_path: Path) -> None:
    lines = [f"line {number} of the text\n" for number in range(100)]
    (tmp_path / "one.txt").write_text("".join(lines))
    corpus = split(tmp_path / "one.txt", heldout_fraction=0.1)
    assert corpus.train[0].text + corpus.validation[0].text == "".join(lines)
    assert corpus.validation[0].text.startswith("line ")
    assert 10 <= corpus.validation[0].text.count("\n") <= 11

    (tmp_path / "flat.txt").write_text("x" * 1000)
    flat = split(tmp_path / "flat.txt")
    assert [len(flat.train[0].text), len(flat.validation[0].text)] == [980, 20]
    (tmp_path / "tiny.txt").write_text("x")
    with pytest.raises(ValueError, match="single character"):
        split(tmp_path / "tiny.txt")


def test_report_counts_and_prints_one_line(tmp_path: Path) -> None:
    records = [json.dumps({"text": text_of(number)}) for number in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(records))
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 " + text_of(99).encode())
    (tmp_path / "c.png").write_bytes(b"\0")
    corpus = split(tmp_path)
    assert (corpus.num_binary, len(corpus.train) + len(corpus.validation)) == (1, 51)
    assert corpus.report.count("\n") == 0
    assert "decoded with replacement: 1; binary files passed over: 1" in corpus.report


def test_train_digest_follows_names_and_texts(tmp_path: Path) -> None:
    write_documents(tmp_path / "a", 20)
    before = split(tmp_path / "a")
    assert split(tmp_path / "a").train_digest == before.train_digest
    (tmp_path / "a" / before.train[3].name).write_text(text_of(77))
    changed = split(tmp_path / "a")
    assert changed.train_digest != before.train_digest
    assert changed.validation_digest == before.validation_digest
    (tmp_path / "a" / before.validation[0].name).write_text(text_of(78))
    assert split(tmp_path / "a").validation_digest != before.validation_digest


@functools.cache
def stdlib() -> Corpus:
    return load_corpus(DataConfig())


def test_stdlib_holds_out_whole_packages() -> None:
    validation = {document.name for document in stdlib().validation}
    assert {name.split("/")[0] for name in validation} == set(STDLIB_HELDOUT)
    assert not {document.name.split("/")[0] for document in stdlib().train} & set(STDLIB_HELDOUT)
    assert {"json/decoder.py", "logging/__init__.py", "importlib/_bootstrap.py"} <= validation
    root = Path(sysconfig.get_paths()["stdlib"])
    for document in stdlib().validation:
        assert document.text == (root / document.name).read_bytes().decode("utf-8")


def test_stdlib_is_the_library_itself_without_tests_tables_and_installed_packages() -> None:
    names = [document.name for document in (*stdlib().train, *stdlib().validation)]
    assert {"argparse.py", "asyncio/tasks.py", "email/message.py", "typing.py"} <= set(names)
    assert len(names) == len(set(names))
    for name in names:
        assert not {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"} & set(
            name.split("/")
        )
        assert Path(name).suffix in (".py", ".rst", ".txt", ".md")
    # On Python 3.11 to 3.13, as built by pyenv or Debian: 8.6 to 10.0 MB and 0.87 to 0.90 MB.
    assert 6e6 < sum(document.num_bytes for document in stdlib().train) < 14e6
    assert 0.6e6 < sum(document.num_bytes for document in stdlib().validation) < 1.0e6


def test_stdlib_copies_would_be_found_and_there_are_none() -> None:
    train = [document.text for document in stdlib().train]
    argparse = next(document.text for document in stdlib().train if document.name == "argparse.py")
    validation = [document.text for document in stdlib().validation]
    assert near_duplicates([argparse.replace("self", "me"), *validation], train) == [True, *[False] * len(validation)]
