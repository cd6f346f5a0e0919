"""The online softmax against a softmax over everything at once."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.attention import MASKED, OnlineSoftmax


@pytest.mark.parametrize("block", [1, 3, 12])
def test_blocks_add_up(block: int) -> None:
    rng = np.random.default_rng(0)
    # Far apart, so that the greatest logit of a block is often below one before, and often above.
    logits, values = rng.normal(0, 30, (2, 3, 12)), rng.normal(size=(2, 12, 5))
    logits[0, 0, :9] = MASKED
    running = OnlineSoftmax.empty(jnp.asarray(values, jnp.float32), (2, 3), 5)
    for first in range(0, 12, block):
        here = slice(first, first + block)
        running = running.fold(
            jnp.asarray(logits[..., here], jnp.float32), jnp.asarray(values[:, here], jnp.float32), "BTZ,BZW->BTW"
        )
    p = np.exp(logits - logits.max(-1, keepdims=True))
    np.testing.assert_allclose(running.mixed / running.total[..., None], (p / p.sum(-1, keepdims=True)) @ values, atol=1e-5)
    np.testing.assert_allclose(running.top + np.log(running.total), logits.max(-1) + np.log(p.sum(-1)), rtol=1e-6)
