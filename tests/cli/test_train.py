"""train.py from text to summary: what it leaves behind, that it resumes to the bit, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest

import train
from dsv3_jax.checkpoint.run import Checkpoints, load_run
from dsv3_jax.checkpoint.run_directory import RunDirectory
from dsv3_jax.config import Config
from dsv3_jax.config.cli import how_to_resume
from dsv3_jax.convert import main as convert
from dsv3_jax.data.batches import TrainBatches
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.train.state import state_of
from tests.cli.conftest import CONFIG, ENDLESS, TRAIN, Done, contents, started, started_for_long

STEPS = CONFIG.train.steps
TOKENS_PER_STEP = CONFIG.train.batch_size * CONFIG.train.sequence_length
LOGGED = {
    "step",
    "loss",
    "main_loss",
    "mtp_loss",
    "balance_loss",
    "grad_norm",
    "skipped",
    "learning_rate",
    "exchange_rounds",
    "max_violation",
    "tokens",
    "batch_size",
    "tokens_per_second",
    "input_wait",
    "model_flops_per_second",
}
TIMED = {"tokens_per_second", "input_wait", "model_flops_per_second"}
HELDOUT = {"heldout_loss", "heldout_bits_per_byte", "mtp_acceptance"}
SUMMARY = {
    "steps",
    "tokens",
    "seconds",
    "tokens_per_second",
    "final_loss",
    "skipped",
    "heldout_loss",
    "mtp_acceptance",
    "heldout_bits_per_byte",
    "gzip_bits_per_byte",
    "xz_bits_per_byte",
}
FLAGS = TRAIN[1:]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(run: Path) -> list[dict[str, float]]:
    """The logged rows without what differs from one run to the next: their speed."""
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows(run)]


def optimizer(run: Path) -> Any:
    """The optimizer of the last checkpoint."""
    like = state_of(CONFIG, load_run(str(run))[1]).optimizer
    with Checkpoints(RunDirectory.existing(str(run))) as checkpoints:
        return checkpoints.restore(STEPS, optimizer=like)["optimizer"]


def test_a_run_leaves_everything_behind(straight: tuple[Path, Done], workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, done = straight
    monkeypatch.chdir(workplace)
    left = {path.name for path in run.iterdir()}
    assert left == {
        "config.json",
        "text.digest",
        "tokenizer.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "expert_load.npz",
        "report.png",
        "run.lock",
        "summary.json",
    }
    assert Config.from_json((run / "config.json").read_text()) == CONFIG
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["12", "6"]
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").iterdir())
    assert load_tokenizer(run).vocab_size == CONFIG.model.vocab_size

    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary == json.loads((run / "summary.json").read_text())
    assert summary.keys() == SUMMARY
    assert (summary["steps"], summary["tokens"]) == (STEPS, STEPS * TOKENS_PER_STEP)
    assert summary["final_loss"] == rows(run)[-1]["loss"]
    validation = load_corpus(CONFIG.data).validation
    chance = math.log2(CONFIG.model.vocab_size) * len(load_tokenizer(run).encode("".join(d.text for d in validation)))
    assert 0 < summary["heldout_bits_per_byte"] < 0.95 * chance / sum(document.num_bytes for document in validation)
    assert 0 < summary["gzip_bits_per_byte"] < 8
    assert 0 < summary["xz_bits_per_byte"] < 8
    # What is not said for machines says what it runs on, and by what.
    assert "experts by tiles" in done.stdout
    assert "parameters, computing in float32" in done.stdout


def test_metrics_hold_every_logged_step(straight: tuple[Path, Done]) -> None:
    logged = rows(straight[0])
    assert [row["step"] for row in logged] == list(range(1, STEPS + 1))
    for row in logged:
        evaluated = row["step"] % CONFIG.train.eval_every == 0
        timed = TIMED if row["step"] > 1 else set()  # The first step compiles.
        assert row.keys() == (LOGGED - TIMED) | timed | (HELDOUT if evaluated else set())
        assert all(math.isfinite(value) for value in row.values())
        assert row["tokens"] == row["step"] * TOKENS_PER_STEP
        assert row["learning_rate"] == pytest.approx(CONFIG.schedules.learning_rate(row["step"] - 1))
        parts = row["main_loss"] + CONFIG.train.mtp_loss_weight * row["mtp_loss"] + 1e-4 * row["balance_loss"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
    assert logged[0]["main_loss"] == pytest.approx(math.log(CONFIG.model.vocab_size), rel=0.05)
    assert logged[-1]["main_loss"] < 0.95 * logged[0]["main_loss"]


def test_biases_have_moved_by_gamma_a_step(straight: tuple[Path, Done]) -> None:
    _, variables, step = load_run(str(straight[0]))
    assert step == STEPS
    moves = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(variables["router"])]) / CONFIG.train.bias_update_speed
    np.testing.assert_allclose(moves, np.round(moves), atol=1e-3)
    assert 0 < np.abs(moves).max() <= STEPS + 1e-3


def test_a_resumed_run_ends_as_one_without_interruption_to_the_bit(
    straight: tuple[Path, Done], called: Callable[..., Done], workplace: Path
) -> None:
    """Interrupted after the checkpoint of step 6: the steps after it were logged, the last line only in part."""
    run = workplace / "runs" / "resumed"
    shutil.copytree(straight[0], run)
    shutil.rmtree(run / "checkpoints" / "12")
    for name in ("summary.json", "report.png"):
        (run / name).unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:9]) + lines[9][:40])

    done = called(train.main, *FLAGS, "runs/resumed", "--resume")
    assert done.code == 0, done.stderr
    assert "continuing after step 6 of 12" in done.stdout
    assert untimed(run) == untimed(straight[0])
    assert (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:6] == lines[:6]
    for a, b in ((load_run(str(run))[1], load_run(str(straight[0]))[1]), (optimizer(run), optimizer(straight[0]))):
        chex.assert_trees_all_equal(a, b)
    before, after = (json.loads((path / "summary.json").read_text()) for path in (straight[0], run))
    for name in SUMMARY - {"seconds", "tokens_per_second"}:
        assert after[name] == before[name], name
    assert (run / "report.png").exists()

    # And once more: there is nothing left to do but to sum up.
    kept = contents(run / "checkpoints")
    done = called(train.main, *FLAGS, "runs/resumed", "--resume")
    assert done.code == 0, done.stderr
    assert "continuing after step 12 of 12" in done.stdout
    assert untimed(run) == untimed(straight[0])
    assert contents(run / "checkpoints") == kept
    again = json.loads(done.stdout.splitlines()[-1])
    assert {**after, "seconds": again["seconds"]} == again


@pytest.mark.slow
def test_a_hugging_face_checkpoint_is_trained_further(
    straight: tuple[Path, Done], called: Callable[..., Done], workplace: Path
) -> None:
    """The commands of the README: what the run has learned is there at the first step."""
    for source, target in (("runs/straight", "published"), ("published", "runs/continued")):
        convert([str(workplace / source), str(workplace / target)])
    flags = "--data.source", "text", "--data.cache_dir", "cache", "--train.steps", "1"
    done = called(train.main, "--config", "runs/continued/config.json", "--resume", *flags)
    assert done.code == 0, done.stderr
    assert "continuing after step 0 of 1" in done.stdout
    (row,) = rows(workplace / "runs" / "continued")
    assert row["main_loss"] == pytest.approx(rows(straight[0])[-1]["main_loss"], rel=0.05)
    assert row["main_loss"] < 0.95 * math.log(CONFIG.model.vocab_size)


def test_a_second_start_is_refused(straight: tuple[Path, Done], called: Callable[..., Done]) -> None:
    before = contents(straight[0])
    done = called(train.main, *FLAGS, "runs/straight")
    done.assert_refused("runs/straight already holds a run; continue it with --resume, or name another --run-dir")
    assert contents(straight[0]) == before


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--train.seed", "4"], ["train.seed 3, not 4"]),
        (["--train.batch_size", "2"], ["train.batch_size 4, not 2"]),
        (["--model.hidden_size", "48"], ["model.hidden_size 32, not 48"]),
        (["--optimizer.learning_rate", "1e-3"], ["optimizer.learning_rate 0.005, not 0.001"]),
        (["--data.heldout_fraction", "0.5"], ["data.heldout_fraction 0.2, not 0.5"]),
    ],
)
def test_another_config_is_not_continued(
    straight: tuple[Path, Done], called: Callable[..., Done], arguments: list[str], fragments: list[str]
) -> None:
    before = contents(straight[0])
    done = called(train.main, *FLAGS, "runs/straight", "--resume", *arguments)
    done.assert_refused("runs/straight holds a run with", *fragments)
    assert contents(straight[0]) == before


@pytest.mark.slow
def test_another_text_is_not_continued(straight: tuple[Path, Done], called: Callable[..., Done], workplace: Path) -> None:
    before = contents(straight[0])
    # Several files, so that some fall among the training documents whatever their hashes.
    more = [workplace / "text" / f"more{i}.py" for i in range(8)]
    for i, file in enumerate(more):
        file.write_text(f"print('more {i}')\n" * 10)
    try:
        done = called(train.main, *FLAGS, "runs/straight", "--resume")
    finally:
        for file in more:
            file.unlink()
    done.assert_refused("runs/straight was trained on another text")
    assert contents(straight[0]) == before


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--train.step", "3"], ["--train.step does not exist; the nearest is --train.steps"]),
        (["--train.steps", "many"], ["--train.steps is 'many'; give an integer"]),
        (["--train.sequence_length", "65"], ["train.sequence_length (65) exceeds model.max_position_embeddings (64)"]),
        (["--model.n_routed_experts", "5"], ["n_routed_experts (5) is not a multiple of n_group (2)"]),
        (["--data.source", "nowhere"], ["'nowhere' does not exist"]),
        (["--data.source", "empty"], ["'empty' holds no text"]),
        (["--model.vocab_size", "200"], ["200", "at least 258"]),
        (["--config", "none.py"], ["'none.py' does not exist"]),
    ],
)
def test_what_cannot_be_run_is_refused_before_a_folder_is_made(
    called: Callable[..., Done], workplace: Path, arguments: list[str], fragments: list[str]
) -> None:
    (workplace / "empty").mkdir(exist_ok=True)
    called(train.main, *FLAGS, "runs/new", *arguments).assert_refused(*fragments)
    assert not (workplace / "runs" / "new").exists()


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["start", "resume"])
def test_a_foreign_folder_is_left_alone(called: Callable[..., Done], workplace: Path, resume: list[str]) -> None:
    before = contents(workplace / "text")
    done = called(train.main, *FLAGS, "text", *resume)
    done.assert_refused("text is not empty and holds no run (no config.json); name another --run-dir")
    assert contents(workplace / "text") == before


def test_a_wrong_flag_ends_the_process_with_code_2(workplace: Path) -> None:
    started(workplace, *TRAIN, "runs/new", "--train.step", "3").assert_refused("the nearest is --train.steps")


# Ending before the time, and steps that cannot be taken.


def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(workplace: Path) -> None:
    """The one run of the default suite in a process of its own."""
    child = started_for_long(workplace, "stopped")
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (0, "")
    found = re.search(r"SIGTERM: stopped after step (\d+) of 100000, saved; go on with: python (.*)", out)
    assert found, out
    step = int(found[1])
    run = workplace / "runs" / "stopped"
    assert load_run(str(run))[2] == step == rows(run)[-1]["step"]
    assert (run / "report.png").exists()
    assert not (run / "summary.json").exists()
    assert shlex.split(found[2]) == [*TRAIN, str(run), *ENDLESS, "--resume"]
    assert list((workplace / "cache" / "xla").iterdir())  # What was compiled is kept.


@pytest.mark.slow
def test_a_resumed_run_may_leave_out_what_it_was_told_once(
    straight: tuple[Path, Done], workplace: Path, called: Callable[..., Done]
) -> None:
    """Steps to trace that are taken already, another size of micro-batch, other steps between held-out losses."""
    run = workplace / "runs" / "otherwise"
    shutil.copytree(straight[0], run)
    flags = "--train.micro-batch-size", "2", "--profile", "2:4", "--train.eval-every", "5", "--train.log-every", "4"
    done = called(train.main, *FLAGS, "runs/otherwise", "--resume", "--train.steps", "16", *flags)
    assert done.code == 0, done.stderr
    logged = {row["step"]: row for row in rows(run)}
    assert list(logged) == [*range(1, 13), 15, 16]
    assert "heldout_loss" in logged[15]
    assert "heldout_loss" not in logged[16]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["--resume"], []),
        (["--train.steps", "9", "--resume", "True", "--profile", "2:3", "--a=b"], ["--train.steps", "9", "--a=b"]),
        (["--profile=2:3", "--data.source", "a b"], ["--data.source", "a b"]),
    ],
)
def test_the_command_to_go_on_with(given: list[str], kept: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    assert shlex.split(how_to_resume()) == ["python", "train.py", *kept, "--resume"]


def poison(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Makes a weight of the loss NaN in the batches of some steps, counted from 1."""
    make = TrainBatches.__getitem__

    def make_bad(self: Any, index: int) -> Any:
        batch = make(self, index)
        weights = batch.loss_weight_ABT.copy()
        weights[0, 0, 0] = np.nan if bad(index + 1) else 1.0
        return batch._replace(loss_weight_ABT=weights)

    monkeypatch.setattr(TrainBatches, "__getitem__", make_bad)


@pytest.mark.slow
def test_a_bad_batch_is_skipped_and_counted(
    workplace: Path, called: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda step: step in (3, 12))
    done = called(train.main, *FLAGS, "runs/skipping", "--train.max-skipped", "2")
    assert done.code == 0, done.stderr
    logged = rows(workplace / "runs" / "skipping")
    assert [row["skipped"] for row in logged] == [0, 0, *[1] * 9, 2]
    assert ["loss" in row for row in logged] == [step not in (3, 12) for step in range(1, 13)]
    assert json.loads(done.stdout.splitlines()[-1])["skipped"] == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_run(str(workplace / "runs" / "skipping"))[1]))


@pytest.mark.slow
def test_too_many_bad_batches_end_the_run_with_one_of_them_on_disk(
    workplace: Path, called: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda step: step >= 8)
    done = called(train.main, *FLAGS, "runs/poisoned", "--train.max-skipped", "3")
    assert done.code == 2
    message = (
        "error: the loss or gradient of 3 steps in a row, up to step 10, was not finite; all were skipped; the batch of step 10"
    )
    assert done.stderr.startswith(message), done.stderr
    assert done.stderr.count("\n") == 1
    with np.load(workplace / "runs" / "poisoned" / "skipped_step_10.npz") as batch:
        assert np.isnan(batch["weights_ABT"]).sum() == 1
        assert batch["tokens_ABT"].shape == (1, 4, 32)
    assert load_run(str(workplace / "runs" / "poisoned"))[2] == 11  # As step 7 left it; it is seen a step later.
