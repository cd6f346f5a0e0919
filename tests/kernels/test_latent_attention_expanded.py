"""Attention over cached latents in the materialised form against softmax attention spelled out in float64."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels import latent_attention as module
from dsv3_jax.kernels.latent_attention import CachedLatents, expanded_attention
from tests.intermediates import intermediate_shapes
from tests.tolerances import TOLERANCE

SCALE, N, H, W, C, P = 0.37, 3, 6, 5, 12, 4
# The blocks of 512 cached tokens have their ends among them.
LENGTHS = 0, 1, 511, 512, 513, 1030


def naive(
    kernel: np.ndarray, q: np.ndarray, q_rope: np.ndarray, latent_SC: np.ndarray, rope_SP: np.ndarray, past: int
) -> np.ndarray:
    """One sequence, query by query and head by head."""
    o_TNW = np.zeros((len(q), N, W))
    for t, n in np.ndindex(len(q), N):
        seen = past + t + 1
        k_SH, v_SW = np.split(latent_SC[:seen] @ kernel[:, n], [H], axis=-1)
        logits_S = SCALE * (k_SH @ q[t, n] + rope_SP[:seen] @ q_rope[t, n])
        weight_S = np.exp(logits_S - logits_S.max())
        o_TNW[t, n] = weight_S @ v_SW / weight_S.sum()
    return o_TNW


def case(new: int, page: int | None) -> tuple[list[np.ndarray], CachedLatents, np.ndarray]:
    """Arguments, cache and expected result; NaN is wherever no token is."""
    rng = np.random.default_rng(new)
    B, S = len(LENGTHS), 1088
    shapes = (new, N, H), (new, N, P), (new, C), (new, P), (S, C), (S, P)
    q, q_rope, latent, rope, old, old_rope = (rng.standard_normal((B, *shape)).astype(np.float32) for shape in shapes)
    kernel = (rng.standard_normal((C, N, H + W)) / C**0.5).astype(np.float32)
    expected = np.zeros((B, new, N, W))
    for b, past in enumerate(LENGTHS):
        everything = [np.concatenate(pair) for pair in ((old[b, :past], latent[b]), (old_rope[b, :past], rope[b]))]
        expected[b] = naive(kernel, q[b], q_rope[b], *everything, past)
        old[b, past:], old_rope[b, past:] = np.nan, np.nan
    if page is None:
        return [kernel, q, q_rope, latent, rope], CachedLatents(jnp.asarray(old), jnp.asarray(old_rope)), expected
    pages = rng.permutation(B * S // page).reshape(B, -1).astype(np.int32)
    pools = []
    for rows in (old, old_rope):
        pool = np.full((B * S // page, page, rows.shape[-1]), np.nan, np.float32)
        pool[pages] = rows.reshape(B, -1, page, rows.shape[-1])
        pools.append(jnp.asarray(pool))
    # Past the end of each table stand numbers of no page.
    table = np.where(np.arange(pages.shape[1]) * page < np.array(LENGTHS)[:, None], pages, 10**6)
    return [kernel, q, q_rope, latent, rope], CachedLatents(*pools, jnp.asarray(table)), expected


@pytest.mark.parametrize(
    ("new", "page"),
    [
        *((1, 16), (1, 1088), (33, None), (33, 64)),
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in ((1, None), (1, 64), (33, 16), (33, 1088))),
    ],
)
def test_it_is_softmax_attention(page: int | None, new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_OWN_BLOCK", 16)  # So that there are several, the last one short.
    arguments, cached, expected = case(new, page)
    found = jax.jit(functools.partial(expanded_attention, scale=SCALE))(*arguments, cached, jnp.asarray(LENGTHS))
    chex.assert_shape(found, expected.shape)
    np.testing.assert_allclose(found, expected, **TOLERANCE["float32"])


def test_nothing_of_all_keys_by_all_queries_exists() -> None:
    arguments, cached, _ = case(33, 16)
    attend = functools.partial(expanded_attention, scale=SCALE)
    shapes = intermediate_shapes(attend, *arguments, cached, jnp.asarray(LENGTHS))
    largest = max(np.prod(shape) for shape in shapes if N in shape)
    assert largest <= len(LENGTHS) * N * 512 * 33
