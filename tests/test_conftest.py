"""A run that shows nothing fails, and every test has eight devices."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

CONFTEST = pathlib.Path(__file__).with_name("conftest.py")


def test_there_are_eight_cpu_devices():
    assert len(jax.devices("cpu")) == 8


BODIES = {
    "def test(): pass": pytest.ExitCode.OK,
    "def test(): assert False": pytest.ExitCode.TESTS_FAILED,
    "import pytest\npytest.importorskip('no_such_module')": pytest.ExitCode.NO_TESTS_COLLECTED,
    "import pytest\n@pytest.mark.skip\ndef test(): pass": pytest.ExitCode.NO_TESTS_COLLECTED,
    "import pytest\n@pytest.mark.skip\ndef test(): pass\ndef test_other(): pass": pytest.ExitCode.OK,
    "": pytest.ExitCode.NO_TESTS_COLLECTED,
}

RUNS = """
import sys
import pytest
options = "-q", "--import-mode=importlib", "-c", "/dev/null", "--rootdir"
print([int(pytest.main([*options, folder, folder])) for folder in sys.argv[1:]])
"""


def test_a_run_without_a_test_fails(tmp_path: pathlib.Path):
    """Six runs in one process, and so of six modules."""
    folders = [tmp_path / str(number) for number in range(len(BODIES))]
    for folder, body in zip(folders, BODIES, strict=True):
        folder.mkdir()
        shutil.copy(CONFTEST, folder)
        (folder / f"test_{folder.name}.py").write_text(body)
    command = [sys.executable, "-c", RUNS, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, timeout=60, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == list(BODIES.values()), done.stdout
