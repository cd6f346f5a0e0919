"""Splash attention, interpreted: against softmax attention spelled out in float64, and in the model against the chunked loop.

That the TPU compiler takes it is shown in tests/plan/test_program.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from dsv3_jax.kernels.tpu import splash
from dsv3_jax.kernels.tpu.memory import round_up
from dsv3_jax.kernels.tpu.splash import splash_attention
from dsv3_jax.model import mla, training_loss
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.rope import rope_angles
from tests.intermediates import intermediate_shapes
from tests.kernels.interpreter import STRICT, assert_no_race
from tests.kernels.reference_attention import SCALE, assert_is_attention, draw, expected_of, in_parts, value_and_gradients
from tests.model.tiny import DENSE_ONLY, random_tokens, random_variables

SMALL = {"forward": (128, 256, 128), "backward": (256, 128, 128)}
"""Blocks of several shapes, so that short sequences have several of each; for more than 512 keys dq has its own kernel."""


INTERPRETED = functools.partial(splash_attention, scale=SCALE, **SMALL, interpret=True)


def assert_is_softmax_attention(attend: Callable[..., jax.Array], arrays: list[np.ndarray], dtype: str) -> None:
    """`attend` at SCALE: values and gradients of the whole sequence."""
    assert_is_attention(value_and_gradients(attend, arrays), expected_of(arrays), arrays, dtype)


OFTEN = [(1, 2, "bfloat16"), (128, 2, "float32"), (129, 1, "float32"), (600, 1, "bfloat16")]
NIGHTLY = [
    *((length, kv_heads, "float32") for length, kv_heads in ((1, 2), (127, 1), (1000, 2))),
    *((length, kv_heads, "bfloat16") for length, kv_heads in ((127, 1), (128, 2), (129, 1), (1000, 2))),
]


@pytest.mark.parametrize(
    ("length", "kv_heads", "dtype"), [*OFTEN, *(pytest.param(*case, marks=pytest.mark.nightly) for case in NIGHTLY)]
)
def test_splash_attention_is_softmax_attention(length: int, kv_heads: int, dtype: str) -> None:
    """A key-value head for each query head, or one for all, as in the absorbed form."""
    assert_is_softmax_attention(INTERPRETED, draw(length, kv_heads, dtype, heads=2), dtype)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.nightly)])
def test_at_the_published_widths_and_with_its_own_blocks(dtype: str) -> None:
    q, k, v, do = draw(300, 2, dtype, batch=1, heads=2, widths=(192, 128))
    q = (q.astype(np.float32) / 8).astype(q.dtype)  # Logits of about unit size.
    assert_is_softmax_attention(functools.partial(splash_attention, scale=SCALE, interpret=True), [q, k, v, do], dtype)


# Parts of a hundred queries are in test_attention_documents.py.
@pytest.mark.parametrize(
    ("parts", "size"), [(4, 32), *(pytest.param(*case, marks=pytest.mark.nightly) for case in ((3, 100), (2, 256)))]
)
def test_queries_of_a_part_of_the_sequence(parts: int, size: int) -> None:
    arrays = draw(parts * size, 2, heads=2)
    assert_is_softmax_attention(functools.partial(in_parts, INTERPRETED, parts), arrays, "float32")


table = jax.jit(splash._table, static_argnums=(1, 2, 3, 4), static_argnames="queries_innermost")


@pytest.mark.parametrize("queries_innermost", [False, True])
@pytest.mark.parametrize("first", [0, 100, 126, 127, 128, 129, 256])
@pytest.mark.parametrize(("block_q", "block_kv"), [(64, 64), (128, 64), (64, 128)])
def test_the_table_skips_what_no_query_sees_and_fetches_what_runs_next(
    first: int, block_q: int, block_kv: int, queries_innermost: bool
) -> None:
    """A tile that is worked on for nothing, or compared where nothing is masked, changes no value: it only costs time."""
    queries, keys = 256, 512
    seen = (first + np.arange(queries)[:, None]) >= np.arange(keys)
    tiles = seen.reshape(queries // block_q, block_q, keys // block_kv, block_kv).swapaxes(1, 2)
    some, full = tiles.any((2, 3)), tiles.all((2, 3))
    info = table(first, queries, keys, block_q, block_kv, queries_innermost=queries_innermost)
    kinds, fetched = (np.asarray(array)[0] for array in (info.block_mask, info.data_next))
    chex.assert_trees_all_equal(kinds, (some.astype(np.int8) + full))

    # In the order of the grid: the outer axis first.
    runs, fetched = (some.T, fetched.T) if queries_innermost else (some, fetched)
    for line, fetched_of_line in zip(runs, fetched, strict=True):
        for place, runs_here in enumerate(line):
            ahead = place + np.flatnonzero(line[place:])
            # Past the last tile that runs in a line: the first block of keys, which the next line begins with; but a line of
            # queries ends with one that runs, if any does.
            following = ahead[0] if len(ahead) else (len(line) - 1 if queries_innermost else 0)
            assert fetched_of_line[place] == following, (place, runs_here)


@pytest.mark.slow
def test_no_race_and_nothing_that_was_not_written(capfd: pytest.CaptureFixture[str]) -> None:
    """Under an interpreter that fills memory with NaN, walks heads in any order, and reports accesses that nothing orders.

    It knows no grid with a dimension from `vmap`, so there is an odd number of heads, which are not halved.
    """
    block = {"forward": (128, 128, 128), "backward": (128, 128, 128)}
    attend = functools.partial(splash_attention, scale=SCALE, **block, interpret=STRICT)
    assert_is_softmax_attention(attend, draw(200, 1, batch=3, heads=1), "float32")
    assert_no_race(capfd)


def test_the_matrix_is_never_built() -> None:
    length = 1000

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(INTERPRETED(q, k, v)))

    shapes = intermediate_shapes(jax.value_and_grad(loss, (0, 1, 2)), *draw(length, 2, heads=2)[:3])
    assert any(max(shape, default=0) >= length for shape in shapes)
    assert not any(sum(axis >= length for axis in shape) >= 2 for shape in shapes)


@pytest.mark.parametrize("length", [*range(1, 3000, 41), 300, 513, 768, 1024, 1100, 1152, 1280, 1536, 2048, 2304, 4096])
def test_little_is_padded(length: int) -> None:
    forward = splash._evenly(splash.FORWARD, length, length)
    queries, keys = round_up(length, forward[0]), round_up(length, forward[1])
    assert queries - length < 128 * -(-length // 1024)
    assert keys - length < 256 * -(-length // 1024)
    for block in (forward, splash._dividing(splash.BACKWARD, queries, keys)):
        assert queries % block[0] == keys % block[1] == block[1] % block[2] == 0
        assert all(size % 128 == 0 for size in block)


def test_other_dtypes_are_refused() -> None:
    q, k, v = (jnp.asarray(a, jnp.float16) for a in draw(4, 4)[:3])
    with pytest.raises(ValueError, match="float16; it takes float32 and bfloat16"):
        splash_attention(q, k, v, scale=SCALE)


def test_mixed_dtypes_are_refused() -> None:
    q, k, v, _ = draw(4, 4)
    with pytest.raises(ValueError, match="q float32, k bfloat16 and v float32"):
        splash_attention(q, jnp.asarray(k, jnp.bfloat16), v, scale=SCALE)


# --- In the model ----------------------------------------------------------------------------------------------------

MODEL = dataclasses.replace(
    DENSE_ONLY,
    num_attention_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    hidden_size=32,
    max_position_embeddings=512,
    attention_chunk=64,
    remat="full",
)
LENGTH = 320


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Once called, the model takes splash, interpreted, though it runs on CPU devices."""

    def begin() -> None:
        monkeypatch.setattr(mla, "choose_attention", lambda *_: "splash")
        monkeypatch.setattr(splash, "splash_attention", functools.partial(splash_attention, **SMALL, interpret=True))

    return begin


def assert_alike(found: Any, expected: Any) -> None:
    """Each array of a tree within 1e-5 of the other's norm."""
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        apart = np.linalg.norm(np.asarray(one) - np.asarray(other)) / np.linalg.norm(other)
        assert apart < 1e-5, (jax.tree_util.keystr(path), apart)


def layers_on(mesh: Mesh | None, *documents: np.ndarray | None) -> list[Any]:
    """Return value and gradients of two scanned layers with recomputation; also for test_attention_documents.py.

    Args:
      mesh: None for one device.
      documents: where they begin, [B, T], for each result.
    """
    params = random_variables(MODEL)["params"]["dense_layers"]["self_attn"]
    x_BTD, dy_BTD = np.random.default_rng(0).standard_normal((2, 4, LENGTH, MODEL.hidden_size)).astype(np.float32)

    def loss(params: Any, x_BTD: jax.Array, segment_starts_BT: Any) -> jax.Array:
        turns = rope_angles(MODEL, jnp.arange(LENGTH)[None])

        @jax.checkpoint
        def layer(x_BTD: jax.Array, params: Any) -> tuple[jax.Array, None]:
            return x_BTD + MLA(MODEL).apply({"params": params}, x_BTD, turns, segment_starts_BT=segment_starts_BT)[0], None

        return jnp.sum(dy_BTD * jax.lax.scan(layer, x_BTD, params)[0])

    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        program = jax.jit(jax.value_and_grad(loss, (0, 1)))
        return [program(params, x_BTD, segment_starts_BT) for segment_starts_BT in documents]


@pytest.mark.slow
def test_a_scanned_model_that_computes_its_layers_again(interpreted: Callable[[], None]) -> None:
    variables = random_variables(MODEL)
    tokens_BT = random_tokens(2, 161)

    def program() -> Callable[..., Any]:
        def objective(params: Any) -> jax.Array:
            return training_loss(params, variables["router"], MODEL, tokens_BT[:, :-1], tokens_BT[:, 1:], 0.3).loss

        return jax.jit(jax.value_and_grad(objective))

    expected = program()(variables["params"])
    interpreted()
    assert_alike(program()(variables["params"]), expected)
