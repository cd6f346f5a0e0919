"""Attention over cached latents, by every backend, against softmax attention spelled out in float64."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.kernels import latent_attention as contract
from dsv3_jax.kernels.latent_attention import CachedLatents, latent_attention
from dsv3_jax.kernels.tpu.latent_attention import past_attention_tpu
from dsv3_jax.plan.topology import tpu_devices
from tests.intermediates import intermediate_shapes
from tests.kernels.interpreter import STRICT, TWO_CORES, assert_no_race
from tests.tolerances import TOLERANCE

SCALE = 0.37
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# Each block of 256 tokens, each chunk of 512, and each half of the batch has its ends among them. Sequences that have ended
# still pass through decoding, and their count runs on: beyond the cache it is a full one.
LENGTHS = 129, 0, 1000, 300, 1, 127, 0, 128, 1100, 5000
ROOM = 1152
N, C, P = 3, 24, 8
INTERPRETED: dict[str, Any] = {"interpreted": True, "strict": STRICT, "two_cores": TWO_CORES}


def naive(q_TNC: np.ndarray, q_rope_TNP: np.ndarray, latent_SC: np.ndarray, rope_SP: np.ndarray, past: int) -> np.ndarray:
    """One sequence, query by query and head by head, over the concatenation of what was cached and what is new."""
    o_TNC = np.zeros(q_TNC.shape)
    for t, n in np.ndindex(q_TNC.shape[:2]):
        seen = past + t + 1
        logits_S = SCALE * (latent_SC[:seen] @ q_TNC[t, n] + rope_SP[:seen] @ q_rope_TNP[t, n])
        weight_S = np.exp(logits_S - logits_S.max())
        o_TNC[t, n] = weight_S @ latent_SC[:seen] / weight_S.sum()
    return o_TNC


def case(
    new: int, dtype: str, page: int | None, widths: tuple[int, int] = (C, P)
) -> tuple[list[np.ndarray], CachedLatents, np.ndarray, np.ndarray]:
    """Queries and new latents, cache, lengths, expected mixture. NaN and infinities are wherever no token is.

    Args:
      new: tokens at hand.
      dtype: of all arrays.
      page: page size of a shuffled pool, with numbers of no page past the end of each table; None for a contiguous cache.
      widths: of the latents and of the rotary keys.
    """
    rng = np.random.default_rng(new)
    C, P = widths
    cached_length_B = np.array(LENGTHS, np.int32)
    B, S = len(cached_length_B), ROOM
    shapes = {"q": (new, N, C), "q_rope": (new, N, P), "latent": (new, C), "rope": (new, P), "old": (S, C), "old_rope": (S, P)}
    arrays = {name: rng.standard_normal((B, *shape)).astype(DTYPES[dtype]) for name, shape in shapes.items()}
    expected = np.zeros((B, new, N, C))
    for b, past in enumerate(np.minimum(cached_length_B, S)):
        x = {name: array[b].astype(np.float64) for name, array in arrays.items()}
        latent_SC, rope_SP = (np.concatenate([x[f"old{k}"][:past], x[own]]) for k, own in (("", "latent"), ("_rope", "rope")))
        expected[b] = naive(x["q"], x["q_rope"], latent_SC, rope_SP, past)
        arrays["old"][b, past:] = np.nan
        arrays["old_rope"][b, past:] = np.inf if b % 2 else np.nan
    *own, old, old_rope = arrays.values()
    if page is None:
        return own, CachedLatents(old, old_rope), cached_length_B, expected

    J, spare = S // page, 5
    page_table_BJ = rng.permutation(B * J + spare)[: B * J].reshape(B, J).astype(np.int32)
    pools = [np.full((B * J + spare, page, a.shape[-1]), np.nan, a.dtype) for a in (old, old_rope)]
    for pool, a in zip(pools, (old, old_rope), strict=True):
        pool[page_table_BJ] = a.reshape(B, J, page, -1)
    past_end_BJ = np.arange(J) * page >= cached_length_B[:, None]
    nowhere_BJ = rng.choice(np.array([-1, -7, B * J + spare, 2**31 - 1, -(2**31)]), (B, J))
    return (
        own,
        CachedLatents(*pools, np.where(past_end_BJ, nowhere_BJ, page_table_BJ).astype(np.int32)),
        cached_length_B,
        expected,
    )


@pytest.fixture(autouse=True)
def interpreted_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The TPU kernel by the names of the ways it is interpreted in, in blocks of 256 tokens."""
    for name, how in INTERPRETED.items():
        monkeypatch.setitem(contract._BACKENDS, name, functools.partial(past_attention_tpu, interpret=how, block=256))


@functools.partial(jax.jit, static_argnames="backend")
def run(own: list[jax.Array], cached: CachedLatents, cached_length_B: jax.Array, backend: str) -> jax.Array:
    return latent_attention(*own, cached, cached_length_B, scale=SCALE, backend=backend)


# Backends, new tokens, dtypes and pages: each with each other.
OFTEN = [
    ("chunked", 1, "float32", None),
    ("chunked", 1, "bfloat16", 16),
    ("chunked", 3, "bfloat16", None),
    ("chunked", 3, "float32", 128),
    ("interpreted", 1, "bfloat16", None),
    ("interpreted", 3, "float32", 32),
    ("strict", 1, "float32", 64),
    ("strict", 3, "bfloat16", None),
    ("two_cores", 1, "float32", 128),
]
NIGHTLY = [
    *(("chunked", new, dtype, page) for new in (1, 3) for dtype in DTYPES for page in (None, 16, 128)),
    *(("interpreted", new, dtype, page) for new, dtype in ((1, "bfloat16"), (3, "float32")) for page in (None, 32, 128)),
    *(("strict", new, dtype, page) for new, dtype in ((1, "float32"), (3, "bfloat16")) for page in (None, 64, 128)),
]


@pytest.mark.parametrize(
    ("backend", "new", "dtype", "page"),
    [*OFTEN, *(pytest.param(*case, marks=pytest.mark.nightly) for case in NIGHTLY if case not in OFTEN)],
)
def test_latent_attention(backend: str, new: int, dtype: str, page: int | None, capfd: Any) -> None:
    """Mixed lengths, around the borders of blocks, and sequences without a past; garbage wherever no token is."""
    own, cached, cached_length_B, expected = case(new, dtype, page)
    found = run(own, cached, cached_length_B, backend)
    chex.assert_shape(found, expected.shape)
    assert found.dtype == DTYPES[dtype]
    chex.assert_trees_all_close(np.asarray(found, np.float64), expected, **TOLERANCE[dtype])
    assert_no_race(capfd)


def test_no_backend_is_given_an_entry_that_names_no_page(monkeypatch: Any) -> None:
    """The kernel fetches whole blocks and does not check where from; an interpreter would clip the entries itself."""
    own, cached, cached_length_B = jax.tree.map(jnp.asarray, case(1, "float32", 128)[:3])
    pages = len(cached.latent_YZC)
    given: list[np.ndarray] = []

    def past(q_latent_BTNC: jax.Array, *args: Any, scale: float) -> tuple[jax.Array, jax.Array]:
        given.append(np.asarray(args[3]))
        return q_latent_BTNC, q_latent_BTNC[..., 0]

    monkeypatch.setitem(contract._BACKENDS, "pallas_tpu", past)
    latent_attention(*own, cached, cached_length_B, scale=SCALE, backend="pallas_tpu")
    (page_table_BJ,) = given
    chex.assert_trees_all_equal(page_table_BJ, np.clip(np.asarray(cached.page_table_BJ), 0, pages - 1))


@pytest.mark.parametrize(("backend", "dtype", "page"), [("chunked", "float32", 128), ("strict", "bfloat16", None)])
def test_without_a_past_there_is_only_the_tokens_own_attention(backend: str, dtype: str, page: int | None) -> None:
    """To the bit, whatever the cache holds."""
    own, cached, cached_length_B, _ = case(3, dtype, page)
    garbage = run(own, cached, np.zeros_like(cached_length_B), backend)
    zeros = run(own, jax.tree.map(np.zeros_like, cached), np.zeros_like(cached_length_B), backend)
    expected = np.stack([naive(*(a[b].astype(np.float64) for a in own), past=0) for b in range(len(cached_length_B))])
    chex.assert_trees_all_equal(garbage, zeros)
    chex.assert_trees_all_close(np.asarray(garbage, np.float64), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["chunked", "interpreted"])
def test_large_logits_neither_overflow_nor_lose_the_row(backend: str) -> None:
    """The running maximum rises from block to block, or is reached in the first one."""
    rng = np.random.default_rng(0)
    B, S = 2, 1024
    shapes = (B, 1, N, C), (B, 1, N, P), (B, 1, C), (B, 1, P), (B, S, C), (B, S, P)
    *own, old, old_rope = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    rising_S = np.linspace(1, 40, S, dtype=np.float32)
    old *= np.stack([rising_S, rising_S[::-1]])[..., None]
    found = run(own, CachedLatents(old, old_rope), np.full(B, S, np.int32), backend)
    for b in range(B):
        q, q_rope, latent, rope = (a[b].astype(np.float64) for a in own)
        expected = naive(q, q_rope, np.concatenate([old[b], latent]), np.concatenate([old_rope[b], rope]), past=S)
        chex.assert_trees_all_close(np.asarray(found[b], np.float64), expected, rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize("page", [None, 128])
def test_no_array_has_all_heads_and_a_whole_cache(page: int | None) -> None:
    own, cached, cached_length_B, _ = case(1, "float32", page)
    attend = functools.partial(latent_attention, scale=SCALE, backend="chunked")
    shapes = intermediate_shapes(attend, *own, cached, cached_length_B)
    assert any(N in shape and 512 in shape for shape in shapes), "the search does not find the logits of a chunk"
    assert {shape for shape in shapes if N in shape and max(shape) >= 1000} == set()


@pytest.mark.parametrize("backend", ["chunked", "interpreted"])
def test_on_a_mesh_each_device_has_its_sequences(backend: str) -> None:
    """Within `jax.shard_map`: a batch that is split, and one query that all devices share.

    JAX cannot check the interpreted kernel there; the compiled one is checked below.
    """
    own, cached, cached_length_B, expected = (jax.tree.map(lambda a: a[:4], tree) for tree in case(1, "float32", None))
    own, q = own[1:], own[0][:1]
    for b in range(1, 4):
        exact = [a[b].astype(np.float64) for a in own]
        latent_SC, rope_SP = (
            np.concatenate([a[b, : cached_length_B[b]], new]) for a, new in zip(cached[:2], exact[1:], strict=True)
        )
        expected[b] = naive(q[0].astype(np.float64), exact[0], latent_SC, rope_SP, cached_length_B[b])
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    whole, split = PartitionSpec(), PartitionSpec("x")

    def attend(q: jax.Array, *rest: Any) -> jax.Array:
        return run([jnp.broadcast_to(q, (2, *q.shape[1:])), *rest[:3]], *rest[3:], backend)

    sharded = jax.shard_map(attend, mesh=mesh, in_specs=(whole, *(split,) * 5), out_specs=split, check_vma=backend == "chunked")
    found = jax.jit(sharded)(q, *own, cached, cached_length_B)
    chex.assert_trees_all_close(np.asarray(found, np.float64), expected, **TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("B", "T", "J", "dtype", "message"),
    [
        (256, 1, 1024, jnp.bfloat16, "a table of 256 x 1024 pages takes 1,048,576 bytes of scalar memory"),
        (1, 32, 1, jnp.bfloat16, "32 tokens of 128 heads at a time are 4096 rows of 512 values; the kernel has room for 3072"),
        (1, 1, 1, jnp.float16, "got float16; it takes float32 and bfloat16"),
    ],
)
def test_what_the_kernel_has_no_room_for_is_refused(B: int, T: int, J: int, dtype: Any, message: str) -> None:
    def shape(*axes: int, of: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(axes, of)

    own = shape(B, T, 128, 512), shape(B, T, 128, 64), shape(B, T, 512), shape(B, T, 64)
    cached = CachedLatents(shape(8, 128, 512), shape(8, 128, 64), shape(B, J, of=jnp.int32))
    attend = functools.partial(latent_attention, scale=SCALE, backend="pallas_tpu")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(attend, *own, cached, shape(B, of=jnp.int32))


def test_pages_that_a_tpu_cannot_tile_are_refused() -> None:
    own = [np.zeros(shape, DTYPES["bfloat16"]) for shape in ((1, 1, N, C), (1, 1, N, P), (1, 1, C), (1, 1, P))]
    cached = CachedLatents(*(np.zeros((1, 24, width), DTYPES["bfloat16"]) for width in (C, P)))
    with pytest.raises(ValueError, match=r"pages of 24 tokens of bfloat16 .* multiple of 16"):
        run(own, cached, np.ones(1, np.int32), "interpreted")


# --- The TPU compiler -------------------------------------------------------------------------------------------------

PUBLISHED = [
    ("v5p:2x2x1", 1, 128, 128),
    ("v6e:2x2", 1, 128, 128),
    ("tpu7x:2x2x1", 2, 16, None),
    pytest.param("v6e:2x2", 4, 128, 64, marks=pytest.mark.slow),
    pytest.param("tpu7x:2x2x1", 1, 128, 128, marks=pytest.mark.nightly),
    pytest.param("v5p:2x2x1", 4, 128, None, marks=pytest.mark.nightly),
    pytest.param("v5p:2x2x1", 2, 16, 16, marks=pytest.mark.nightly),
]


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.parametrize(("topology", "new", "heads", "page"), PUBLISHED)
def test_it_compiles_for_a_tpu(tpu_compiler: str, topology: str, new: int, heads: int, page: int | None) -> None:
    """At the published 512 + 64 in bfloat16, inside `jax.shard_map` with its checks, and without a copy of the cache."""
    devices = tpu_devices(topology)
    B, S = 8 * len(devices), 8192
    pool = (B, S) if page is None else (B * S // page, page)
    shapes = (B, new, heads, 512), (B, new, heads, 64), (B, new, 512), (B, new, 64), (*pool, 512), (*pool, 64)
    *own, latent, rope = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    table = None if page is None else jax.ShapeDtypeStruct((B, S // page), jnp.int32)
    args = *own, CachedLatents(latent, rope, table), jax.ShapeDtypeStruct((B,), jnp.int32)
    mesh, spec = Mesh(np.array(devices), ("x",)), PartitionSpec("x")
    attend = functools.partial(latent_attention, scale=SCALE, backend="pallas_tpu")
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)
    compiled = jax.jit(sharded, in_shardings=NamedSharding(mesh, spec)).lower(*args).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
    # XLA copies the rotary keys of small pages, as the kernel's file says.
    place = f"bf16[{','.join(str(size) for size in (pool[0] // len(devices), pool[1], 64))}]"
    copied = [line for line in compiled.as_text().splitlines() if f" = {place}" in line and " copy(" in line]
    assert bool(copied) == (page is not None and page < 128)
