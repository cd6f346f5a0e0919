"""infer.py on the run of train.py: the text that it streams, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import infer
from dsv3_jax import Engine, SamplingParams
from dsv3_jax.infer.load import load_model
from tests.cli.conftest import CONFIG, ROOT, Done, started

PROGRAM = str(ROOT / "infer.py")


def completed(run: Path, prompt: str, params: SamplingParams) -> tuple[str, int]:
    """Prompt and completion as one text, and the number of new tokens, by an engine of our own."""
    model = load_model(str(run))
    (completion,) = Engine(model.config, model.variables, model.tokenizer).generate([prompt], params)
    return f"{prompt}{completion.text}\n", len(completion.tokens)


def test_a_prompt_is_completed(straight: tuple[Path, Done], workplace: Path) -> None:
    expected, count = completed(straight[0], "import ", SamplingParams(max_tokens=20, temperature=0.8, top_p=0.9, seed=5))
    flags = ["--temperature", "0.8", "--top-p", "0.9", "--seed", "5", "--max-tokens", "20"]
    done = started(workplace, PROGRAM, "--checkpoint", "runs/straight", "--prompt", "import ", *flags)
    assert (done.code, done.stdout) == (0, expected), done.stderr
    first, last = done.stderr.splitlines()
    assert first.startswith("run runs/straight at step 12, in float32 on ")
    assert last.startswith(f"{count} tokens; the first after ")


def test_the_runs_own_prompt_and_limits_are_the_defaults(straight: tuple[Path, Done], called: Callable[..., Done]) -> None:
    expected, _ = completed(straight[0], CONFIG.infer.prompt, SamplingParams(max_tokens=CONFIG.infer.max_tokens))
    done = called(infer.main, "--checkpoint", "runs/straight")
    assert (done.code, done.stdout) == (0, expected)


def test_a_prompt_longer_than_the_context_ends_the_process_with_code_2(straight: tuple[Path, Done], workplace: Path) -> None:
    done = started(workplace, PROGRAM, "--checkpoint", "runs/straight", "--prompt", "x = 1\n" * 50)
    done.assert_refused("tokens leave no room in max_length 64 (the model's context is 64); shorten it")


def test_the_whole_context_of_the_model_may_be_used(
    straight: tuple[Path, Done], called: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv3_jax.infer.engine.LONGEST_BY_DEFAULT", 16)
    done = called(infer.main, "--checkpoint", "runs/straight", "--prompt", "x = 1\n" * 8, "--max-tokens", "2")
    assert done.code == 0, done.stderr


@pytest.mark.slow
def test_of_damaged_checkpoints_the_one_before_is_used_and_the_last_refused(
    straight: tuple[Path, Done], workplace: Path
) -> None:
    damaged = workplace / "runs" / "damaged"
    shutil.copytree(straight[0], damaged)

    def damage(step: str) -> None:
        for file in (damaged / "checkpoints" / step / "variables" / "d").iterdir():
            file.write_bytes(b"")

    damage("12")
    done = started(workplace, PROGRAM, "--checkpoint", "runs/damaged")
    assert done.code == 0, done.stderr
    warning = done.stderr.splitlines()[0]
    assert re.fullmatch(r"warning: .*/12 is damaged \(.*\); step 6 is used instead", warning), warning
    damage("6")
    done = started(workplace, PROGRAM, "--checkpoint", "runs/damaged")
    assert (done.code, done.stdout) == (2, "")
    assert re.match(r"error: no checkpoint is whole: .*/12 is damaged .*/6 is damaged .*; restore one", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (
            ["--checkpoint", "nowhere"],
            "nowhere holds no config.json; name a run directory of train.py or a Hugging Face folder",
        ),
        (["--checkpoint", "text"], "text holds no config.json"),
        (["--checkpoint", "foreign"], "is neither a run's config nor a Hugging Face one"),
        ([], "--checkpoint is missing"),
        (["--checkpoint", "runs/straight", "--temperature", "-1"], "temperature is -1.0; it cannot be negative"),
        (["--checkpoint", "runs/straight", "--max-tokens", "0"], "max_tokens is 0; it must be at least 1"),
        (["--checkpoint", "runs/straight", "--dtype", "int8"], "--dtype is 'int8'; give"),
        (["--checkpoint", "runs/straight", "--promt", "x"], "--promt does not exist; the nearest is --prompt"),
    ],
)
def test_what_cannot_be_completed_is_refused(
    straight: tuple[Path, Done], called: Callable[..., Done], workplace: Path, arguments: list[str], fragment: str
) -> None:
    (workplace / "foreign").mkdir(exist_ok=True)
    (workplace / "foreign" / "config.json").write_text(json.dumps({"hidden_size": 3}))
    called(infer.main, *arguments).assert_refused(fragment)
