"""Two real processes: a save that fails on one has failed on both, at once, and both read the same checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.checkpoint.run import checksums
from tests.checkpoint.saving_process import SHAPE
from tests.checkpoint.tiny import run_two


@pytest.mark.slow
def test_two_processes_fail_and_fall_back_together(tmp_path: Path) -> None:
    (first, first_err), (second, second_err) = run_two("saving_process.py", tmp_path / "run")
    assert first["steps"] == second["steps"] == [1, 4, 5]
    assert first["failed"][0] is first["failed"][3] is first["failed"][4] is None
    full, newest = "No space left on device", "the newest checkpoint is of step 1"
    assert first["failed"][1] == f"step 2 could not be saved (process 1: {full}); {newest}"
    assert second["failed"][1] == f"step 2 could not be saved ({full}); {newest}"
    assert first["failed"][2] == f"step 3 could not be saved ({full}); {newest}"
    assert second["failed"][2] == f"step 3 could not be saved (process 0: {full}); {newest}"
    assert max(first["seconds"][1:] + second["seconds"][1:]) < 30  # And not twenty minutes.
    assert first["restored"] == second["restored"] == 4
    values = np.random.default_rng(4).standard_normal(SHAPE).astype(np.float32)
    assert first["checksums"] == second["checksums"] == checksums({"w": values})
    assert first["last"] is second["last"] is None
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["1", "4", "5", "5.damaged"]
    lines = first_err.splitlines()
    assert all(line.startswith("warning: ") for line in lines), first_err
    assert len(lines) == 4
    assert "step 4 is used instead, and it is now 5.damaged" in lines[-1]
    assert second_err == ""
