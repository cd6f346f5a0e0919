"""A run that shows nothing fails, and every test has eight devices."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

CONFTEST = pathlib.Path(__file__).with_name("conftest.py")


def test_there_are_eight_cpu_devices():
    assert len(jax.devices("cpu")) == 8


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("def test(): pass", pytest.ExitCode.OK),
        ("def test(): assert False", pytest.ExitCode.TESTS_FAILED),
        ("import pytest\npytest.importorskip('no_such_module')", pytest.ExitCode.NO_TESTS_COLLECTED),
        ("import pytest\n@pytest.mark.skip\ndef test(): pass", pytest.ExitCode.NO_TESTS_COLLECTED),
        ("import pytest\n@pytest.mark.skip\ndef test(): pass\ndef test_other(): pass", pytest.ExitCode.OK),
        ("", pytest.ExitCode.NO_TESTS_COLLECTED),
    ],
)
def test_a_run_without_a_test_fails(body: str, code: int, tmp_path: pathlib.Path):
    shutil.copy(CONFTEST, tmp_path)
    (tmp_path / "test_it.py").write_text(body)
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", str(tmp_path), str(tmp_path)]
    assert subprocess.run(command, capture_output=True, cwd=tmp_path, timeout=60).returncode == code
