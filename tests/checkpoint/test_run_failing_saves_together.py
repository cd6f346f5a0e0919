"""Two real processes: a save that fails on one has failed on both, at once, and both read the same checkpoint."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.checkpoint.run import checksums
from tests.checkpoint.saving_process import SHAPE

_ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_fail_and_fall_back_together(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    environment |= {
        "PYTHONPATH": str(_ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
    }
    script = str(Path(__file__).with_name("saving_process.py"))
    children = [
        subprocess.Popen(
            [sys.executable, script, str(index), port, str(tmp_path / "run")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in (0, 1)
    ]  # fmt: skip
    try:
        ended = [child.communicate(timeout=240) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], ended
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in ended)
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
    lines = [line for line in ended[0][1].splitlines() if line.startswith("warning: ")]
    assert ended[0][1].splitlines() == lines, ended[0][1]
    assert len(lines) == 4
    assert "step 4 is used instead, and it is now 5.damaged" in lines[-1]
    assert ended[1][1] == ""
