"""TPU kernels on a CPU: Pallas' interpreters, and what the thorough one saw."""

from __future__ import annotations

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

THOROUGH = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)
"""Two cores, memory that is full of NaN until it is written, reads out of bounds refused, and races looked for."""


def assert_no_race() -> None:
    """Of the last kernel that ran under `THOROUGH`: a race is printed there, and from jax 0.11 on raised."""
    races = interpret_pallas_call.races
    assert races is not None, "no kernel was looked at"
    assert not races.races_found
