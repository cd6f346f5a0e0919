"""Loading takes hardly more host memory than the model itself: the benchmark that measures it, held to a bound."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the benchmark reads /proc")
def test_peak_memory_is_near_the_size_of_the_model() -> None:
    command = [sys.executable, str(_ROOT / "benchmarks" / "load_hf_memory.py"), "--megabytes", "100"]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    result = json.loads(output)
    assert result["model_bytes"] > 60e6
    # One array of experts is a quarter of this model: a copy of a single one would show.
    assert 0.95 < result["peak_ratio"] < 1.15, result
