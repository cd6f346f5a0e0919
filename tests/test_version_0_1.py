"""Files that version 0.1 wrote are read and continued: a run, caches, prepared shards, a batch file, an export.

tests/fixtures/version_0_1.tar.gz holds them, made by that version's programs in one folder:

    python train.py --config config.py --run-dir run                      (4 steps, with the exchange `ring`)
    python -m dsv3_jax.data.prepare --source text --tokenizer run/tokenizer.json --output prepared --heldout-fraction 0.3
    python infer.py --checkpoint run --batch-file prompts.jsonl completions.jsonl --max-tokens 6       (less its last line)
    python -m dsv3_jax.convert run export

expected.npz has the logits of the export and the first rows of the shards; expected_metrics.jsonl and
expected_completion.jsonl what that version wrote when it continued.
"""

from __future__ import annotations

import dataclasses
import json
import tarfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import infer
import train
from dsv3_jax import DeepSeekV3, load_hf
from dsv3_jax.checkpoint.run import load_run
from dsv3_jax.config import Config
from dsv3_jax.data import prepare
from dsv3_jax.data.text import build_dataset
from tests.cli.conftest import in_this_process
from tests.tolerances import TOLERANCE

ARCHIVE = Path(__file__).parent / "fixtures" / "version_0_1.tar.gz"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_former_name_of_the_exchange_is_read(folder: Path) -> None:
    text = (folder / "run" / "config.json").read_text()
    assert '"expert_exchange": "ring"' in text
    assert Config.from_json(text).model.expert_exchange == "all_gather"


def test_an_export_has_the_logits_it_had(folder: Path) -> None:
    expected = np.load(folder / "expected.npz")
    config, variables = load_hf("export", dtype=jnp.float32)
    output = DeepSeekV3(config).apply(variables, expected["tokens"], mtp=True)
    np.testing.assert_allclose(output.logits, expected["logits"], **TOLERANCE["float32"])
    np.testing.assert_allclose(output.mtp_logits[0], expected["mtp_logits"], **TOLERANCE["float32"])
    np.testing.assert_array_equal(load_run("run")[1]["params"]["lm_head"]["kernel"], variables["params"]["lm_head"]["kernel"])


def test_shards_give_the_rows_they_gave_and_are_not_made_again(folder: Path) -> None:
    before, expected = contents(folder / "prepared"), np.load(folder / "expected.npz")
    config = Config.from_json((folder / "run" / "config.json").read_text())
    data = dataclasses.replace(config.data, source="prepared", tokenizer="prepared/tokenizer.json")
    rows = build_dataset(data, config.model, config.train).rows
    np.testing.assert_array_equal(np.stack([rows[i].tokens_T for i in range(3)]), expected["row_tokens"])
    np.testing.assert_array_equal(np.stack([rows[i].targets_T for i in range(3)]), expected["row_targets"])
    arguments = ["--source", "text", "--tokenizer", "run/tokenizer.json", "--output", "prepared"]
    with in_this_process(folder) as call:
        done = call(prepare.main, *arguments, "--heldout-fraction", "0.3", "--workers", "1")
    assert (done.code, done.stderr) == (0, "")
    assert "; 0 tokens now" in done.stdout
    assert contents(folder / "prepared") == before


@pytest.mark.slow
def test_a_run_continues_from_its_caches_with_the_losses_it_had(folder: Path) -> None:
    cached = contents(folder / "cache")
    with in_this_process(folder) as call:
        done = call(train.main, "--config", "run/config.json", "--run-dir", "run", "--resume", "--train.steps", "6")
    assert done.code == 0, done.stderr
    assert "continuing after step 4" in done.stdout
    rows, expected = lines(folder / "run" / "metrics.jsonl"), lines(folder / "expected_metrics.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [1, 2, 3, 4, 5, 6]
    for row, wanted in zip(rows[4:], expected[4:], strict=True):
        for name in ("loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-5), name
    now = {name: data for name, data in contents(folder / "cache").items() if not name.startswith("xla/")}
    assert now == cached
    assert json.loads((folder / "run" / "config.json").read_text())["model"]["expert_exchange"] == "all_gather"


@pytest.mark.slow
def test_a_batch_file_continues(folder: Path) -> None:
    arguments = ["--checkpoint", "run", "--batch-file", "prompts.jsonl", "completions.jsonl", "--max-tokens", "6"]
    before = (folder / "completions.jsonl").read_text()
    with in_this_process(folder) as call:
        done = call(infer.main, *arguments)
    assert done.code == 0, done.stderr
    assert "2 of 3 lines are in completions.jsonl already" in done.stderr
    assert (folder / "completions.jsonl").read_text() == before + (folder / "expected_completion.jsonl").read_text()
