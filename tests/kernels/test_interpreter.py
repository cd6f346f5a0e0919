"""The race detector that other tests rely on finds a race where there is one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tests.kernels.interpreter import STRICT, assert_no_race


@pytest.mark.parametrize("waits", [False, True])
def test_a_race_is_seen(waits: bool, capfd: Any) -> None:
    """Reading what a copy brings, before or after waiting for it."""

    def kernel(x: Any, y: Any, scratch: Any, arrived: Any) -> None:
        copy = pltpu.make_async_copy(x, scratch, arrived)
        copy.start()
        if waits:
            copy.wait()
        y[...] = scratch[...]
        if not waits:
            copy.wait()

    x = jnp.ones((8, 128))
    scratch = [pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA]
    run = pl.pallas_call(kernel, x, in_specs=[pl.BlockSpec(memory_space=pl.ANY)], scratch_shapes=scratch, interpret=STRICT)

    def look() -> None:
        jax.block_until_ready(run(x))
        assert_no_race(capfd)

    if waits:
        look()
        return
    with pytest.raises(Exception, match=r"(?i)race"):  # Raised by the interpreter, or by the assertion.
        look()
