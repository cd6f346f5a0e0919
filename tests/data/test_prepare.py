"""`python -m dsv3_jax.data.prepare`: the same folder for any number of workers and after any kill; what it refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3_jax.config import DataConfig, ModelConfig, TrainConfig
from dsv3_jax.config.cli import parse_flags
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.data.prepare import PrepareFlags, main, prepare
from dsv3_jax.data.shards import open_prepared
from dsv3_jax.data.text import build_dataset
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.data.tokens import FillInTheMiddle, tokenize_corpus

ROOT = Path(__file__).parents[2]
WORDS = [f"word{number}" for number in range(500)]
TOKENIZER = train_tokenizer([" ".join(WORDS)] * 5, 400, ["<bos>", "<eos>", *DataConfig.fim_tokens])
MODEL = ModelConfig(vocab_size=400)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 4 MB in files of both kinds, and a tokenizer."""
    folder = tmp_path_factory.mktemp("prepare")
    generator = random.Random(0)
    (folder / "corpus").mkdir()

    def text() -> str:
        return " ".join(generator.choices(WORDS, k=generator.randrange(20, 400)))

    for part in range(2):
        lines = (json.dumps({"text": text()}) for _ in range(900))
        (folder / "corpus" / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    for part in range(400):
        (folder / "corpus" / f"{part}.txt").write_text(text())
    TOKENIZER.save(folder / "tokenizer.json")
    return folder


def flags(workplace: Path, output: str, **fields: Any) -> PrepareFlags:
    given = {"fim_rate": 0.1, "heldout_fraction": 0.05, "shard_megabytes": 1, "workers": 1} | fields
    return PrepareFlags(str(workplace / "corpus"), str(workplace / "tokenizer.json"), str(workplace / output), **given)


@pytest.fixture(scope="module")
def made(workplace: Path) -> dict[str, Any]:
    """The folder `whole`, made at one go."""
    meta, tokens = prepare(flags(workplace, "whole"))
    assert meta["tokens"] == tokens
    return meta


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_what_it_makes_is_what_a_run_makes_of_the_source(workplace: Path, made: dict[str, Any]) -> None:
    prepared = open_prepared(str(workplace / "whole"), str(workplace / "cache"))
    assert len(made["shards"]) > 3
    data = DataConfig(source=str(workplace / "corpus"), cache_dir=str(workplace / "cache"), heldout_fraction=0.05)
    corpus = load_corpus(data)
    assert corpus.dropped == 0
    fim = FillInTheMiddle.of(0.1, DataConfig.fim_tokens, 0, TOKENIZER)
    tokens = tokenize_corpus(corpus, TOKENIZER, data, MODEL, fim)[:]
    parts = [part.read(0, part.num_tokens) for part in prepared.parts]
    assert {part.dtype for part in parts} == {np.dtype(np.uint16)}
    np.testing.assert_array_equal(np.concatenate(parts), tokens)
    ends = np.concatenate([part.ends() + start for part, start in zip(prepared.parts, starts(parts), strict=True)])
    np.testing.assert_array_equal(ends, np.flatnonzero(tokens == 1) + 1)
    assert prepared.validation == corpus.validation
    counts = [(len(part), sum(document.num_bytes for document in part)) for part in (corpus.train, corpus.validation)]
    assert [(made["documents"], made["bytes"]), (made["heldout_documents"], made["heldout_bytes"])] == counts
    assert made["fim_documents"] == sum(fim.cuts(document) is not None for document in corpus.train)


def starts(parts: list[np.ndarray]) -> np.ndarray:
    return np.cumsum([0, *(part.size for part in parts[:-1])])


def test_any_number_of_workers_makes_the_same_folder(
    workplace: Path, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv3_jax.data.prepare.multiprocessing", multiprocessing)  # As a user's are started.
    meta, _ = prepare(flags(workplace, "two", workers=2))
    assert meta == made
    assert contents(workplace / "two") == contents(workplace / "whole")


def started(workplace: Path, output: str) -> subprocess.Popen[bytes]:
    given = ["--fim-rate", "0.1", "--heldout-fraction", "0.05", "--shard-megabytes", "1", "--workers", "2"]
    paths = ["--source", "corpus", "--tokenizer", "tokenizer.json", "--output", output]
    command = [sys.executable, "-m", "dsv3_jax.data.prepare", *paths, *given]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(command, cwd=workplace, env=environment, stdout=subprocess.PIPE)


@pytest.mark.slow
def test_killed_at_any_moment_it_is_continued_to_the_same_bytes(workplace: Path, made: dict[str, Any]) -> None:
    generator = random.Random(1)
    folder = workplace / "killed"
    kept: dict[Path, int] = {}
    kills = 0
    while kills < 3 and not (folder / "meta.json").exists():
        before = set(folder.glob("*")) | set(folder.glob(".draft*"))
        with started(workplace, "killed") as program:
            # Somewhere from the first file it writes on, but no later than a quick machine needs for a shard or two.
            while program.poll() is None and not (set(folder.glob("*")) | set(folder.glob(".draft*"))) - before:
                time.sleep(0.005)
            time.sleep(generator.uniform(0, 0.15))
            program.kill()
        kills += 1
        for path, stamp in kept.items():  # Finished shards are not made again.
            assert path.stat().st_mtime_ns == stamp
        kept |= {path: path.stat().st_mtime_ns for path in folder.glob("0*.json")}
    # The last one may have come too late; those before it have not.
    assert kills >= 2
    with started(workplace, "killed") as program:
        assert program.wait() == 0
        assert program.stdout.read().startswith(b"train on ")
    assert contents(workplace / "killed") == contents(workplace / "whole")


def test_what_is_missing_is_made_again_and_nothing_else(workplace: Path, made: dict[str, Any]) -> None:
    folder = shutil.copytree(workplace / "whole", workplace / "holes")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "00001.json").unlink()
    (folder / "00002.tokens.npy").write_bytes(b"short")
    (folder / "meta.json").unlink()
    (folder / ".draft-00001.tokens.npy-abc").write_bytes(b"left by a kill")
    with pytest.raises(ValueError, match=r"holes is not whole yet \(no meta\.json\): run the same .* again"):
        build_dataset(DataConfig(source=str(folder), fim_rate=0.1), MODEL, TrainConfig())
    meta, tokens = prepare(flags(workplace, "holes", workers=2))
    assert tokens == made["shards"][1]["tokens"] + made["shards"][2]["tokens"]
    assert contents(folder) == contents(workplace / "whole")
    assert meta == made
    unchanged = [path for path, stamp in before.items() if path.stat().st_mtime_ns == stamp]
    assert {path.name[:5] for path in before} - {path.name[:5] for path in unchanged} == {"00001", "00002", "meta."}


def test_a_whole_folder_is_left_alone(workplace: Path, made: dict[str, Any]) -> None:
    assert prepare(flags(workplace, "whole")) == (made, 0)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"fim_rate": 0.2}, "begun with fim_rate 0.1, now 0.2; use the same, or name another folder"),
        ({"seed": 1}, "begun with seed 0, now 1"),
        ({"heldout_fraction": 0.1}, "begun with heldout_fraction 0.05, now 0.1"),
        ({"bos_token": ""}, "begun with bos_token_id 0, now None"),
        ({"eos_token": "<end>"}, "the tokenizer has no added token '<end>'; name its eos_token with --eos-token"),
        ({"fim_tokens": ("a", "b", "c")}, r"the tokenizer has no tokens \['a', 'b', 'c'\]"),
    ],
)
def test_another_preparation_is_refused(workplace: Path, made: dict[str, Any], fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        prepare(flags(workplace, "whole", **fields))


def test_a_source_that_has_changed_is_refused(workplace: Path, made: dict[str, Any]) -> None:
    new = workplace / "corpus" / "new.txt"
    new.write_text("text")
    with pytest.raises(ValueError, match=r"begun with other files in the source: 'new\.txt' is new; put them back"):
        prepare(flags(workplace, "whole"))
    new.unlink()


def test_a_folder_of_something_else_is_refused(workplace: Path) -> None:
    with pytest.raises(ValueError, match=r"holds \['0\.jsonl'\] and no plan\.json; name another folder"):
        prepare(flags(workplace, "corpus"))
    with pytest.raises(ValueError, match=r"cannot be written"):
        prepare(flags(workplace, "tokenizer.json"))


def test_the_command_line(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse_flags(PrepareFlags, ["--help"], "what it does")
    text = capsys.readouterr().out
    assert {field.name for field in dataclasses.fields(PrepareFlags)} <= set(re.findall(r"--(\w+)", text))
    required = ["--source", "a", "--tokenizer", "b", "--output"]
    assert parse_flags(PrepareFlags, [*required, "c", "--fim-rate", "0.1"]) == PrepareFlags("a", "b", "c", fim_rate=0.1)
    for given, complaint in (
        (["c", "--workers", "0"], "workers is 0; it must be at least 1"),
        (["c", "--shard-megabytes", "0"], "shard_megabytes is 0"),
        (["c", "--fim-rate", "2"], r"fim_rate is 2\.0; it must lie in 0\.\.1"),
        (["c", "--heldout-fraction", "0"], r"heldout_fraction is 0\.0; it must lie strictly between"),
        (["c", "--seed", "-1"], "seed is -1"),
    ):
        with pytest.raises(ValueError, match=complaint):
            parse_flags(PrepareFlags, [*required, *given])
    with pytest.raises(ValueError, match=r"--output is 'gs://bucket'; name a folder of this machine"):
        prepare(dataclasses.replace(flags(workplace, "x"), output="gs://bucket"))


def test_the_module_is_a_program(
    workplace: Path, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"source": "corpus", "tokenizer": "tokenizer.json", "output": "whole"}
    given = [word for name, path in options.items() for word in (f"--{name}", str(workplace / path))]
    given += ["--fim-rate", "0.1", "--heldout-fraction", "0.05", "--shard-megabytes", "1"]
    monkeypatch.setattr(sys, "argv", ["prepare", *given])
    monkeypatch.delitem(sys.modules, "dsv3_jax.data.prepare")
    runpy.run_module("dsv3_jax.data.prepare", run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out.startswith(f"train on {made['tokens']:,} tokens of ")


def test_a_bad_line_ends_it_by_name(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    source, tokenizer = str(tmp_path / "a.jsonl"), str(workplace / "tokenizer.json")
    given = ["--source", source, "--tokenizer", tokenizer, "--output", str(tmp_path / "out"), "--workers", "2"]
    monkeypatch.setattr(sys, "argv", ["prepare", *given])
    monkeypatch.delenv("DSV3_JAX_TRACEBACK", raising=False)
    with pytest.raises(SystemExit, match="2"):
        main()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "a.jsonl:2 has no" in error


def test_a_lone_text_gives_its_end(tmp_path: Path, workplace: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(1000))
    (tmp_path / "one.txt").write_text(text)
    options = {"heldout_fraction": 0.1, "workers": 1}
    prepare(PrepareFlags(str(tmp_path / "one.txt"), str(workplace / "tokenizer.json"), str(tmp_path / "out"), **options))
    prepared = open_prepared(str(tmp_path / "out"), str(tmp_path / "cache"))
    (part,), (validation,) = prepared.parts, prepared.validation
    assert TOKENIZER.decode(part.read(0, part.num_tokens)) + validation.text == text
    assert 95 < validation.text.count("\n") < 105


def test_nothing_to_hold_out_or_to_train_on_is_refused(tmp_path: Path, workplace: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    for fraction, complaint in (
        (1e-9, "of 2 documents none was chosen to be held out; raise"),
        (0.999999, "gives no document"),
    ):
        given = PrepareFlags(
            str(tmp_path),
            str(workplace / "tokenizer.json"),
            str(workplace / f"of{fraction}"),
            heldout_fraction=fraction,
            workers=1,
        )
        with pytest.raises(ValueError, match=complaint):
            prepare(given)


def test_marks_are_those_that_the_tokenizer_files_name(tmp_path: Path, workplace: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"text {number}")
    TOKENIZER.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": {"content": "<bos>"}}))
    options = {"heldout_fraction": 0.2, "workers": 1}
    meta, _ = prepare(PrepareFlags(str(tmp_path / "text"), str(tmp_path), str(tmp_path / "out"), bos_token="", **options))
    assert (meta["bos_token_id"], meta["eos_token_id"]) == (None, 0)
    with pytest.raises(ValueError, match=r"model\.bos_token_id is 0, but '.*out' was prepared with None; set it"):
        build_dataset(DataConfig(source=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache")), MODEL, TrainConfig())
