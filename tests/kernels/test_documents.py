"""Attention within documents, by every backend: against softmax attention spelled out in float64 under the whole mask.

The padding of a row takes part: it sees itself, and its gradients are compared like any other's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import MeshConfig
from dsv3_jax.kernels import hopper, splash
from dsv3_jax.kernels.attention import attend, causal_attention, choose_attention
from dsv3_jax.kernels.documents import first_seen, has_ahead
from dsv3_jax.kernels.splash import splash_attention
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.rope import rotation
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.plan.topology import tpu_devices
from tests.kernels.interpreter import STRICT, assert_no_race
from tests.kernels.reference_attention import SCALE, draw, naive, naive_gradients, pack
from tests.kernels.test_splash import LENGTH, MODEL, SMALL, assert_alike, interpreted  # noqa: F401
from tests.model.tiny import random_variables
from tests.tolerances import TOLERANCE


def value_and_gradients(attend: Callable[..., jax.Array], arrays: list[np.ndarray], starts_BT: Any) -> tuple[Any, Any]:
    def both(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, starts_BT: Any) -> tuple[jax.Array, tuple]:
        o, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, starts_BT), q, k, v)
        return o, pullback(do)

    return jax.jit(both)(*arrays, starts_BT)


def assert_stays_within_documents(
    attend: Callable[..., jax.Array], arrays: list[np.ndarray], rows: list[list[int]], dtype: str
) -> None:
    """`attend(q, k, v, starts_BT)` at SCALE: values and gradients, which are not those of attention across documents."""
    q, k, v, do = arrays
    starts_BT, seen_BTS = pack(rows, q.shape[1])
    found = value_and_gradients(attend, arrays, starts_BT)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, (do, (q, k, v)))
    exact = [a.astype(np.float64) for a in arrays]
    expected, across = (
        (naive(*exact[:3], seen_BTS=seen)[0], naive_gradients(*exact, seen_BTS=seen)) for seen in (seen_BTS, None)
    )
    found = jax.tree.map(lambda a: np.asarray(a, np.float64), found)
    # Sums over up to 1000 queries are of the size of their largest element, not of one.
    unit = jax.tree.map(lambda a: max(1.0, np.abs(a).max()), expected)
    found, expected, across = (jax.tree.map(np.divide, tree, unit) for tree in (found, expected, across))
    chex.assert_trees_all_close(found, expected, **TOLERANCE[dtype])
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(across), strict=True):
        assert np.abs(one - other).max() > 10 * TOLERANCE[dtype]["atol"], "a mask that is ignored would not show"


def random_rows(batch: int, length: int, seed: int) -> list[list[int]]:
    """Documents of all sizes, some padding between them."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(batch):
        rows.append([])
        while (left := length - sum(map(abs, rows[-1]))) > 0:
            size = int(min(left, np.exp(rng.uniform(0, np.log(length)))))
            rows[-1].append(size if rng.random() < 0.8 else -size)
    return rows


# --- The chunked loop ------------------------------------------------------------------------------------------------

CHUNKED = [
    pytest.param(40, 8, [[8, 7, 9, 16], [16, 1, 23]], id="at, before and after the borders of tiles"),
    pytest.param(37, 8, [[20, 17], [5, 5, 27]], id="length that tiles do not divide"),
    pytest.param(37, 8, [[37], []], id="one document, and a row of padding"),
    pytest.param(40, 8, [[-9, 3, -12, 10], [12]], id="padding before, between and after"),
    pytest.param(24, 8, [[1] * 24, [1] * 7 + [17]], id="documents of one token"),
    pytest.param(23, 64, [[10, 13], [4, 4, -3]], id="one tile"),
    pytest.param(300, 64, random_rows(2, 300, 1), id="random"),
    pytest.param(129, 32, random_rows(2, 129, 2), id="random, uneven"),
]


@pytest.mark.parametrize(("kv_heads", "dtype"), [(4, "float32"), (1, "bfloat16")])
@pytest.mark.parametrize(("length", "chunk", "rows"), CHUNKED)
def test_the_chunked_loop(length: int, chunk: int, rows: list[list[int]], kv_heads: int, dtype: str) -> None:
    def within(q: jax.Array, k: jax.Array, v: jax.Array, starts_BT: jax.Array) -> jax.Array:
        return attend(q, k, v, scale=SCALE, chunk=chunk, starts_BT=starts_BT, backend="chunked")

    assert_stays_within_documents(within, draw(length, kv_heads, dtype), rows, dtype)


@pytest.mark.parametrize(("length", "chunk"), [(40, 8), (37, 8), (7, 64)])
def test_one_document_is_attention_without_any_to_the_bit(length: int, chunk: int) -> None:
    """Operation by operation: what a compiler makes of loops of another form is its own business, and may round otherwise."""

    def either(q: jax.Array, k: jax.Array, v: jax.Array, starts_BT: jax.Array | None) -> jax.Array:
        return causal_attention(q, k, v, scale=SCALE, chunk=chunk, starts_BT=starts_BT)

    arrays = draw(length, 2)
    with jax.disable_jit():
        found, expected = (value_and_gradients(either, arrays, s) for s in (np.zeros((2, length), np.int32), None))
    chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize(("parts", "chunk"), [(2, 4), (3, 5), (4, 64), (2, 7)])
def test_the_chunked_loop_on_a_part_of_the_queries(parts: int, chunk: int) -> None:
    """Each part against all keys, and documents that begin in a part before; the place of a part is known only as it runs."""
    size = 12
    part_of = functools.partial(causal_attention, scale=SCALE, chunk=chunk)
    length = parts * size
    rows = [[5, length - 9], random_rows(1, length, parts)[0]]
    assert_stays_within_documents(functools.partial(in_parts, part_of, parts), draw(length, 2), rows, "float32")


def in_parts(part_of: Callable[..., jax.Array], parts: int, q: jax.Array, k: jax.Array, v: jax.Array, starts: Any) -> jax.Array:
    def split(array: jax.Array) -> jax.Array:
        return array.reshape(array.shape[0], parts, -1, *array.shape[2:]).swapaxes(0, 1)

    firsts = jnp.arange(parts) * (q.shape[1] // parts)
    parts_of = split(q), split(starts), firsts
    o = jax.lax.map(lambda part: part_of(part[0], k, v, starts_BT=part[1], first=part[2]), parts_of)
    return o.swapaxes(0, 1).reshape(*q.shape[:3], -1)


def test_the_chunked_loop_passes_over_the_tiles_that_no_query_of_a_tile_sees() -> None:
    """NaN in the values there would otherwise show: a probability of zero times NaN is NaN."""
    q, k, v, do = draw(32, 2)
    v[:, :16], do[:, :16] = np.nan, 0
    starts_BT, _ = pack([[16, 16], [-4, 12, 8, 8]], 32)

    def within(q: jax.Array, k: jax.Array, v: jax.Array, starts_BT: jax.Array) -> jax.Array:
        return causal_attention(q, k, v, scale=SCALE, chunk=8, starts_BT=starts_BT)

    o, (dq, dk, dv) = value_and_gradients(within, [q, k, v, do], starts_BT)
    chex.assert_tree_all_finite([array[:, 16:] for array in (o, dq, dk, dv)])


# --- Splash ----------------------------------------------------------------------------------------------------------

SPLASH = [
    pytest.param(512, [[128, 127, 129, 128], [256, 1, 255]], id="at, before and after the borders of tiles"),
    pytest.param(300, [[300], []], id="one document, and a row of padding"),
    pytest.param(300, [[-9, 130, -120, 10], [120]], id="padding before, between and after"),
    pytest.param(1000, random_rows(2, 1000, 5), id="random, dq by its own kernel"),
]


def within_by_splash(q: jax.Array, k: jax.Array, v: jax.Array, starts_BT: jax.Array) -> jax.Array:
    return splash_attention(q, k, v, scale=SCALE, starts_BT=starts_BT, **SMALL, interpret=True)


@pytest.mark.parametrize(("kv_heads", "dtype"), [(2, "float32"), (1, "bfloat16")])
@pytest.mark.parametrize(("length", "rows"), SPLASH)
def test_splash(length: int, rows: list[list[int]], kv_heads: int, dtype: str) -> None:
    assert_stays_within_documents(within_by_splash, draw(length, kv_heads, dtype, heads=2), rows, dtype)


def test_splash_gets_the_documents_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splash, "splash_attention", functools.partial(splash_attention, **SMALL, interpret=True))

    def within(q: jax.Array, k: jax.Array, v: jax.Array, starts_BT: jax.Array) -> jax.Array:
        return attend(q, k, v, scale=SCALE, chunk=64, starts_BT=starts_BT, backend="splash")

    assert_stays_within_documents(within, draw(200, 3, heads=3), [[90, 110], [128, 72]], "float32")


@pytest.mark.parametrize(("parts", "size"), [(3, 100), pytest.param(2, 256, marks=pytest.mark.slow), (4, 32)])
def test_splash_on_a_part_of_the_queries(parts: int, size: int) -> None:
    """Each part numbers documents from its own starts alone, and the keys before it by the first of them."""
    part_of = functools.partial(splash_attention, scale=SCALE, **SMALL, interpret=True)
    length = parts * size
    rows = [[5, length - 9], random_rows(1, length, parts)[0]]
    assert_stays_within_documents(functools.partial(in_parts, part_of, parts), draw(length, 2, heads=2), rows, "float32")


def test_splash_has_no_race_and_reads_nothing_that_was_not_written(capfd: pytest.CaptureFixture[str]) -> None:
    block = {"forward": (128, 128, 128), "backward": (128, 128, 128)}

    def within(q: jax.Array, k: jax.Array, v: jax.Array, starts_BT: jax.Array) -> jax.Array:
        return splash_attention(q, k, v, scale=SCALE, starts_BT=starts_BT, **block, interpret=STRICT)

    assert_stays_within_documents(within, draw(300, 3, batch=1, heads=3), [[140, 117, -20]], "float32")
    assert_no_race(capfd)


@pytest.mark.parametrize("queries_innermost", [False, True])
@pytest.mark.parametrize("first", [0, 100, 128, 256])
@pytest.mark.parametrize(("block_q", "block_kv"), [(64, 64), (128, 64), (64, 128)])
@pytest.mark.parametrize("seed", range(3))
def test_the_table_skips_what_no_query_sees_and_fetches_what_runs_next(
    seed: int, block_q: int, block_kv: int, first: int, queries_innermost: bool
) -> None:
    queries, keys = 256, 512
    starts_BT, seen_BTS = pack(random_rows(2, keys, seed), keys)
    mine = slice(first, first + queries)
    earliest = first_seen(starts_BT[:, mine], first).min(0)
    info = splash._table_of_documents(first, earliest, keys, block_q, block_kv, queries_innermost=queries_innermost)
    kinds, fetched = (np.asarray(array)[0] for array in (info.block_mask, info.data_next))
    tiles = seen_BTS[:, mine].any(0).reshape(queries // block_q, block_q, keys // block_kv, block_kv).any((1, 3))
    # All between the first key that any query of a block sees and the last: some of these only another sequence needs.
    last = np.maximum.accumulate(tiles[:, ::-1], 1)[:, ::-1]
    runs = np.maximum.accumulate(tiles, 1) & last
    chex.assert_trees_all_equal(kinds, runs.astype(np.int8))

    runs, fetched = (runs.T, fetched.T) if queries_innermost else (runs, fetched)
    for line, (runs_of_line, fetched_of_line) in enumerate(zip(runs, fetched, strict=True)):
        # Past the last that runs: what the next line begins with; with queries innermost, this line for the next head.
        following = runs_of_line if queries_innermost else runs[(line + 1) % len(runs)]
        for place in range(len(runs_of_line)):
            ahead = place + np.flatnonzero(runs_of_line[place:])
            wanted = ahead if len(ahead) else np.flatnonzero(following)
            assert not len(wanted) or fetched_of_line[place] == wanted[0], (line, place)


@pytest.mark.parametrize(
    ("chip", "batch", "length"),
    [
        pytest.param("v5p:2x2x1", 1, 4096, id="v5p, one backward kernel"),
        pytest.param("v6e:2x2", 2, 8192, id="v6e, two"),
        pytest.param("v6e:2x2", 1, 4096, id="v6e, one", marks=pytest.mark.slow),
        pytest.param("v5p:2x2x1", 2, 8192, id="v5p, two", marks=pytest.mark.slow),
    ],
)
def test_splash_compiles_for_tpus(chip: str, batch: int, length: int, tpu_compiler: str) -> None:
    """At the published widths, forward and backward, with a place in the sequence that is known only while it runs."""
    mesh = Mesh(np.array(tpu_devices(chip)[:1]), ("x",), axis_types=(AxisType.Auto,))

    def shape(*axes: int, of: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(axes, of, sharding=NamedSharding(mesh, PartitionSpec()))

    def both(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, starts_BT: jax.Array, first: jax.Array) -> Any:
        attend = functools.partial(splash_attention, scale=SCALE, starts_BT=starts_BT, first=first)
        o, pullback = jax.vjp(attend, q, k, v)
        return o, pullback(do)

    rows, keys = (batch, length // 2, 4), (batch, length, 4)
    arguments = shape(*rows, 192), shape(*keys, 192), shape(*keys, 128), shape(*rows, 128)
    with jax.set_mesh(mesh):
        program = jax.jit(both).lower(*arguments, shape(*rows[:2], of="int32"), shape(of="int32"))
        text = program.compile().as_text()
    assert "splash_mha_fwd_segmented_residuals" in text
    assert "splash_mha_dkv_segmented" in text
    assert ("splash_mha_dq_segmented" in text) == (length > 4096)


# --- On a mesh -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["chunked", "splash"])
@pytest.mark.parametrize(
    "sizes", [{"context": 2, "tensor": 2, "fsdp": 2}, pytest.param({"context": 4, "data": 2}, marks=pytest.mark.slow)]
)
def test_a_layer_on_a_mesh_is_that_of_one_device(
    sizes: dict[str, int],
    backend: str,
    interpreted: Callable[[], None],  # noqa: F811
) -> None:
    """Value and all gradients; documents go on from device to device, and rows have their own."""
    params = jax.tree.map(lambda leaf_L: leaf_L[0], random_variables(MODEL)["params"]["dense_layers"]["self_attn"])
    x_BTD, dy_BTD = np.random.default_rng(0).standard_normal((2, 4, LENGTH, MODEL.hidden_size)).astype(np.float32)
    starts_BT, _ = pack([[70, 200, 30], [160, 160], [LENGTH], random_rows(1, LENGTH, 9)[0]], LENGTH)

    def loss(params: Any, x_BTD: jax.Array, starts_BT: jax.Array | None) -> jax.Array:
        turns = rotation(MODEL, jnp.arange(LENGTH)[None])
        return jnp.sum(dy_BTD * MLA(MODEL).apply({"params": params}, x_BTD, turns, starts_BT=starts_BT)[0])

    def program() -> Callable[..., Any]:
        return jax.jit(jax.value_and_grad(jax.checkpoint(lambda *at: loss(*at)), (0, 1)))

    expected, across = (program()(params, x_BTD, starts) for starts in (starts_BT, None))
    assert abs(expected[0] - across[0]) > 1
    if backend == "splash":
        interpreted()
    with jax.set_mesh(make_mesh(MeshConfig(**sizes))):
        assert_alike(program()(params, x_BTD, starts_BT), expected)


# --- Who can, and who belongs to whom --------------------------------------------------------------------------------


def test_kernels_for_gpus_are_passed_over_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "current_gpu", lambda: hopper.GPU("NVIDIA H200", 132))
    asked = "bfloat16", (192, 128), "gpu"
    assert choose_attention("auto", *asked) == "pallas_gpu"
    assert choose_attention("auto", *asked, documents=True) == "chunked"
    assert choose_attention("auto", *asked[:2], "tpu", documents=True) == "splash"
    refusal = "attention_backend 'pallas_gpu' attends across the documents of a row, and cannot keep them apart; use 'auto' or "
    with pytest.raises(ValueError, match=refusal):
        choose_attention("pallas_gpu", *asked, documents=True)
    q, k, v, _ = draw(4, 4, "bfloat16")
    with pytest.raises(ValueError, match="'pallas_gpu' attends across the documents of a row"):
        attend(q, k, v, scale=SCALE, chunk=4, starts_BT=np.zeros((2, 4), np.int32), backend="pallas_gpu")


def test_the_first_key_and_the_token_ahead() -> None:
    starts_BT = np.array([[0, 0, 0, 3, -1, -1], [-1, 1, 1, 1, 4, 4]], np.int32)
    assert first_seen(starts_BT, 0).tolist() == [[0, 0, 0, 3, 4, 5], [0, 1, 1, 1, 4, 4]]
    assert first_seen(starts_BT[:, 3:], 3).tolist() == [[3, 4, 5], [1, 4, 4]]
    assert has_ahead(starts_BT, 0).tolist() == [[True] * 4 + [False] * 2, [False] + [True] * 5]
    assert has_ahead(starts_BT, 1).astype(int).tolist() == [[1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 1, 0]]
    assert has_ahead(starts_BT, 2).astype(int).tolist() == [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert not has_ahead(starts_BT, 6).any()
