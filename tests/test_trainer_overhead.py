"""benchmarks/trainer_overhead.py on a smaller configs/tiny.py: that it measures, not what."""

from __future__ import annotations

import dataclasses
import functools
import json
import runpy
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import CONFIG, ROOT, TEXTS, Done, in_this_process


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with a small text, and with a toy under the name of the tiny config, logged as seldom as that."""
    (tmp_path / "text").mkdir()
    for name in TEXTS:
        shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / name, tmp_path / "text")
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, log_every=10))
    (tmp_path / "configs").mkdir()
    program = f"from dsv3_jax.config import Config\n\nconfig = Config.from_json({config.to_json()!r})\n"
    (tmp_path / "configs" / "tiny.py").write_text(program)
    return tmp_path


@pytest.fixture
def measured(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Starts the benchmark in this process."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    program = functools.partial(runpy.run_path, str(ROOT / "benchmarks" / "trainer_overhead.py"), run_name="__main__")

    def run(*flags: str) -> Done:
        with in_this_process(workplace) as call:
            return call(program, *flags)

    return run


@pytest.mark.slow
def test_it_prints_one_line_of_numbers_however_few_the_steps(measured: Callable[..., Done]) -> None:
    done = measured("--steps", "5", "--repeats", "2")
    assert done.code == 0, done.stderr
    assert done.stdout.count("\n") == 1

    def no_number(word: str) -> None:
        raise AssertionError(word)

    result = json.loads(done.stdout, parse_constant=no_number)
    assert result["steps"] == 5
    assert len(result["ratios"]) == 2
    assert 0 < min(result["ratios"]) <= result["ratio"] <= max(result["ratios"])
    assert 0 <= result["input_wait"] < 1
    assert "first step done" in done.stderr  # What a run says, it says here as well.


@pytest.mark.parametrize("flags", [("--steps", "1"), ("--repeats", "0")])
def test_what_measures_nothing_is_refused(measured: Callable[..., Done], flags: tuple[str, str]) -> None:
    done = measured(*flags)
    assert (done.code, done.stdout) == (2, "")
    assert f"{flags[0]} is {flags[1]}; it must be at least" in done.stderr
