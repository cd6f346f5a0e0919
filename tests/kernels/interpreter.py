"""TPU kernels on a CPU, in the thorough one of Pallas' interpreters, and what it saw."""

from __future__ import annotations

from typing import Any

from jax.experimental.pallas import tpu as pltpu

STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
"""Memory that is full of NaN until it is written, reads out of bounds refused, and races looked for."""
TWO_CORES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2, random_seed=0)
"""The same on two cores, which share the parallel dimensions of a grid."""


def assert_no_race(capfd: Any) -> None:
    """That no race was printed; from jax 0.11 on the interpreter raises instead. test_interpreter.py holds it to that."""
    assert "RACE DETECTED" not in capfd.readouterr().out, "a race was detected"
