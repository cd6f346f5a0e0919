"""The wheel: built, installed into a folder of its own, and used outside the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import CONFIG, ROOT, plain_environment

pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=plain_environment() | environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_trains_and_samples_outside_the_repository(tmp_path: Path) -> None:
    sources = tmp_path / "sources"  # A build leaves folders beside the sources.
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "tests", "docs", "benchmarks")
    shutil.copytree(ROOT, sources, ignore=ignored)
    pip = sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"
    run(
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        str(tmp_path),
        str(sources),
        cwd=tmp_path,
    )
    (wheel,) = tmp_path.glob("dsv3_jax-*.whl")
    site, work = tmp_path / "site", tmp_path / "work"
    run(*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=tmp_path)
    work.mkdir()
    (work / "text").mkdir()
    shutil.copy(ROOT / "LICENSE", work / "text" / "a.txt")
    shutil.copy(ROOT / "README.md", work / "text" / "b.txt")
    shutil.copy(ROOT / "CHANGELOG.md", work / "text" / "c.txt")
    (work / "config.py").write_text(f"from dsv3_jax.config import *\n\nconfig = {CONFIG!r}\n")
    paths = {"PYTHONPATH": str(site), "PATH": os.pathsep.join((str(site / "bin"), os.environ["PATH"]))}
    run("dsv3-train", "--config", "config.py", "--run-dir", "run", "--train.steps", "1", cwd=work, **paths)
    assert json.loads((work / "run" / "summary.json").read_text())["steps"] == 1
    assert run("dsv3-infer", "--checkpoint", "run", "--prompt", "x", "--max-tokens", "2", cwd=work, **paths).startswith("x")
    where = run(sys.executable, "-c", "import dsv3_jax, train; print(dsv3_jax.__file__, train.__file__)", cwd=work, **paths)
    assert all(path.startswith(str(site)) for path in where.split())
