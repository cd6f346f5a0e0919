"""`python -m dsv3_jax.evaluate` on the run of train.py: its figures, and what it refuses."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from dsv3_jax import evaluate
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.data.sources import Document
from dsv3_jax.data.tokens import document_windows
from dsv3_jax.infer.load import load_model
from dsv3_jax.train.evaluation import Evaluator
from tests.cli.conftest import CONFIG, Done

KEYS = {"checkpoint", "bytes", "tokens", "loss", "bits_per_byte", "gzip_bits_per_byte", "xz_bits_per_byte", "mtp_acceptance"}


def test_the_figures_of_a_text_file(straight: tuple[Path, Done], called: Callable[..., Done], workplace: Path) -> None:
    text = (workplace / "text" / "bisect.py").read_text()
    done = called(evaluate.main, "--checkpoint", "runs/straight", "--text", "text/bisect.py")
    assert done.code == 0, done.stderr
    (line,) = done.stdout.splitlines()
    figures = json.loads(line)
    assert figures.keys() == KEYS
    assert figures["checkpoint"] == "run runs/straight at step 12"
    data = text.encode()
    assert figures["bytes"] == len(data)
    assert figures["gzip_bits_per_byte"] == pytest.approx(8 * len(gzip.compress(data, 9)) / len(data))
    assert figures["xz_bits_per_byte"] == pytest.approx(8 * len(lzma.compress(data, preset=9)) / len(data))

    model = load_model(str(straight[0]))
    shape = {"batch_size": 8, "sequence_length": CONFIG.train.sequence_length}
    windows = document_windows([Document("bisect.py", text)], model.tokenizer, model.config, **shape)
    scored = Evaluator(model.config)(model.variables, windows)
    assert figures["tokens"] == scored.tokens == len(model.tokenizer.encode(text))
    assert figures["loss"] == pytest.approx(scored.loss, rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(windows.bits_per_byte(scored.nats), rel=1e-6)
    assert figures["mtp_acceptance"] == scored.acceptance
    assert 0 <= figures["mtp_acceptance"] <= 1


def test_the_held_out_documents_score_as_at_the_end_of_the_run(
    straight: tuple[Path, Done], called: Callable[..., Done], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached: list[str] = []
    monkeypatch.setattr(evaluate, "cache_compilations", cached.append)
    (workplace / "heldout").mkdir()
    for document in load_corpus(CONFIG.data).validation:
        (workplace / "heldout" / document.name).write_text(document.text)
    done = called(evaluate.main, "--checkpoint", "runs/straight", "--text", "heldout", "--batch-size", "3")
    summary = json.loads((straight[0] / "summary.json").read_text())
    figures = json.loads(done.stdout)
    assert cached == [".cache"]
    assert figures["bits_per_byte"] == pytest.approx(summary["heldout_bits_per_byte"], rel=1e-5)
    assert figures["gzip_bits_per_byte"] == summary["gzip_bits_per_byte"]
    assert figures["xz_bits_per_byte"] == summary["xz_bits_per_byte"]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--checkpoint", "nowhere", "--text", "text"], "nowhere holds no config.json"),
        (["--checkpoint", "runs/straight", "--text", "nowhere"], "--text 'nowhere' does not exist"),
        (["--checkpoint", "runs/straight"], "--text is missing"),
        (
            ["--checkpoint", "runs/straight", "--text", "text", "--sequence-length", "65"],
            "--sequence-length is 65; it must lie in 1..64",
        ),
        (["--checkpoint", "runs/straight", "--text", "text", "--sequence-length", "0"], "--sequence-length is 0"),
        (["--checkpoint", "runs/straight", "--text", "text", "--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    straight: tuple[Path, Done], called: Callable[..., Done], arguments: list[str], fragment: str
) -> None:
    called(evaluate.main, *arguments).assert_refused(fragment)
