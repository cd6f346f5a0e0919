"""Attention within documents, by every backend: against softmax attention spelled out in float64 under the whole mask.

The padding of a row takes part: it sees itself, and its gradients are compared like any other's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import MeshConfig
from dsv3_jax.kernels.attention import attend, causal_attention, choose_attention
from dsv3_jax.kernels.documents import first_seen, has_ahead
from dsv3_jax.kernels.gpu import hopper
from dsv3_jax.kernels.tpu import splash
from dsv3_jax.kernels.tpu.splash import splash_attention
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.plan.topology import tpu_devices
from tests.kernels.interpreter import STRICT, assert_no_race
from tests.kernels.reference_attention import (
    SCALE,
    assert_is_attention,
    draw,
    expected_of,
    in_parts,
    pack,
    value_and_gradients,
)
from tests.kernels.tpu.test_splash import INTERPRETED, LENGTH, SMALL, assert_alike, interpreted, layers_on  # noqa: F401
from tests.tolerances import TOLERANCE


def assert_stays_within_documents(
    attend: Callable[..., jax.Array], arrays: list[np.ndarray], rows: list[list[int]], dtype: str
) -> None:
    """`attend(q, k, v, segment_starts_BT=)` at SCALE: values and gradients, unlike those of attention across documents."""
    segment_starts_BT, seen_BTS = pack(rows, arrays[0].shape[1])
    expected, across = (expected_of(arrays, seen_BTS=seen) for seen in (seen_BTS, None))
    assert_is_attention(value_and_gradients(attend, arrays, segment_starts_BT), expected, arrays, dtype)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(across), strict=True):
        unit = max(1.0, np.abs(one).max())
        assert np.abs(one - other).max() > 10 * unit * TOLERANCE[dtype]["atol"], "a mask that is ignored would not show"


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

CHUNKED = {
    (40, 8): {
        "at, before and after the borders of tiles": [[8, 7, 9, 16], [16, 1, 23]],
        "padding before, between and after": [[-9, 3, -12, 10], [12]],
        "documents of one token": [[1] * 40, [1] * 7 + [33]],
        "random": random_rows(2, 40, 1),
    },
    (37, 8): {
        "a length that tiles do not divide": [[20, 17], [5, 5, 27]],
        "one document, and a row of padding": [[37], []],
        "random": random_rows(2, 37, 2),
    },
    (23, 64): {"one tile": [[10, 13], [4, 4, -3]]},
    (300, 64): {"random": random_rows(2, 300, 1)},
}
"""By length and chunk: cases of these are compiled together."""


@pytest.mark.parametrize(
    ("size", "kv_heads", "dtype"),
    [
        ((40, 8), 4, "float32"),
        ((40, 8), 1, "bfloat16"),
        ((37, 8), 1, "float32"),
        ((23, 64), 4, "bfloat16"),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in (
                ((37, 8), 4, "bfloat16"),
                ((23, 64), 1, "float32"),
                ((300, 64), 4, "float32"),
                ((300, 64), 1, "bfloat16"),
            )
        ),
    ],
)
def test_the_chunked_loop(size: tuple[int, int], kv_heads: int, dtype: str) -> None:
    within = functools.partial(attend, scale=SCALE, chunk=size[1], backend="chunked")
    for rows in CHUNKED[size].values():
        assert_stays_within_documents(within, draw(size[0], kv_heads, dtype), rows, dtype)


@pytest.mark.parametrize(
    ("length", "chunk"), [(7, 4), *(pytest.param(*size, marks=pytest.mark.nightly) for size in ((40, 8), (7, 64)))]
)
def test_one_document_is_attention_without_any_to_the_bit(length: int, chunk: int) -> None:
    """Operation by operation: what a compiler makes of loops of another form is its own business, and may round otherwise."""

    either = functools.partial(causal_attention, scale=SCALE, chunk=chunk)
    arrays = draw(length, 2)
    with jax.disable_jit():
        found, expected = (value_and_gradients(either, arrays, s) for s in (np.zeros((2, length), np.int32), None))
    chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize(
    ("parts", "chunk"), [(3, 5), (4, 64), *(pytest.param(2, chunk, marks=pytest.mark.nightly) for chunk in (4, 7))]
)
def test_the_chunked_loop_on_a_part_of_the_queries(parts: int, chunk: int) -> None:
    """Documents that begin in a part before."""
    part_of = functools.partial(causal_attention, scale=SCALE, chunk=chunk)
    length = parts * 12
    rows = [[5, length - 9], random_rows(1, length, parts)[0]]
    assert_stays_within_documents(functools.partial(in_parts, part_of, parts), draw(length, 2), rows, "float32")


def test_the_chunked_loop_passes_over_the_tiles_that_no_query_of_a_tile_sees() -> None:
    """NaN in the values there would otherwise show: a probability of zero times NaN is NaN."""
    q, k, v, do = draw(32, 2)
    v[:, :16], do[:, :16] = np.nan, 0
    segment_starts_BT, _ = pack([[16, 16], [-4, 12, 8, 8]], 32)

    within = functools.partial(causal_attention, scale=SCALE, chunk=8)
    o, (dq, dk, dv) = value_and_gradients(within, [q, k, v, do], segment_starts_BT)
    chex.assert_tree_all_finite([array[:, 16:] for array in (o, dq, dk, dv)])


# --- Splash ----------------------------------------------------------------------------------------------------------

SPLASH = {
    300: {
        "at, before and after the borders of tiles": [[128, 127, 45], [256, 1, 43]],
        "one document, and a row of padding": [[300], []],
        "padding before, between and after": [[-9, 130, -120, 10], [120]],
    },
    768: {"random, dq by its own kernel": random_rows(2, 768, 5)},
    512: {"at, before and after the borders of tiles": [[128, 127, 129, 128], [256, 1, 255]]},
    1000: {"random, dq by its own kernel": random_rows(2, 1000, 5)},
}
"""By length: cases of one are compiled together."""


@pytest.mark.parametrize(
    ("length", "kv_heads", "dtype"),
    [
        (300, 2, "float32"),
        (300, 1, "bfloat16"),
        (768, 1, "float32"),
        *(
            pytest.param(length, kv_heads, dtype, marks=pytest.mark.nightly)
            for length in (512, 1000)
            for kv_heads, dtype in ((2, "float32"), (1, "bfloat16"))
        ),
    ],
)
def test_splash(length: int, kv_heads: int, dtype: str) -> None:
    for rows in SPLASH[length].values():
        assert_stays_within_documents(INTERPRETED, draw(length, kv_heads, dtype, heads=2), rows, dtype)


@pytest.mark.nightly
def test_splash_gets_the_documents_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splash, "splash_attention", functools.partial(splash_attention, **SMALL, interpret=True))
    within = functools.partial(attend, scale=SCALE, chunk=64, backend="splash")
    assert_stays_within_documents(within, draw(200, 3, heads=3), [[90, 110], [128, 72]], "float32")


# Parts of 32 queries are in test_splash.py.
@pytest.mark.parametrize(
    ("parts", "size"), [(3, 100), *(pytest.param(*case, marks=pytest.mark.nightly) for case in ((2, 256), (4, 32)))]
)
def test_splash_on_a_part_of_the_queries(parts: int, size: int) -> None:
    """Each part numbers documents from its own starts alone, and the keys before it by the first of them."""
    length = parts * size
    rows = [[5, length - 9], random_rows(1, length, parts)[0]]
    within = functools.partial(in_parts, INTERPRETED, parts)
    assert_stays_within_documents(within, draw(length, 2, heads=2), rows, "float32")


def test_splash_has_no_race_and_reads_nothing_that_was_not_written(capfd: pytest.CaptureFixture[str]) -> None:
    block = {"forward": (128, 128, 128), "backward": (128, 128, 128)}
    within = functools.partial(splash_attention, scale=SCALE, **block, interpret=STRICT)
    assert_stays_within_documents(within, draw(300, 3, batch=1, heads=3), [[140, 117, -20]], "float32")
    assert_no_race(capfd)


table = jax.jit(splash._table_of_documents, static_argnums=(2, 3, 4), static_argnames="queries_innermost")


@pytest.mark.parametrize("queries_innermost", [False, True])
@pytest.mark.parametrize("first", [0, 100, 128, 256])
@pytest.mark.parametrize(("block_q", "block_kv"), [(64, 64), (128, 64), (64, 128)])
@pytest.mark.parametrize("seed", range(3))
def test_the_table_skips_what_no_query_sees_and_fetches_what_runs_next(
    seed: int, block_q: int, block_kv: int, first: int, queries_innermost: bool
) -> None:
    queries, keys = 256, 512
    segment_starts_BT, seen_BTS = pack(random_rows(2, keys, seed), keys)
    mine = slice(first, first + queries)
    earliest = np.asarray(first_seen(segment_starts_BT[:, mine], first)).min(0)
    info = table(first, earliest, keys, block_q, block_kv, queries_innermost=queries_innermost)
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
        pytest.param("v5p:2x2x1", 1, 4096, id="v5p, one backward kernel", marks=pytest.mark.slow),
        pytest.param("v6e:2x2", 2, 8192, id="v6e, two"),
        pytest.param("v6e:2x2", 1, 4096, id="v6e, one", marks=pytest.mark.nightly),
        pytest.param("v5p:2x2x1", 2, 8192, id="v5p, two", marks=pytest.mark.nightly),
    ],
)
def test_splash_compiles_for_tpus(chip: str, batch: int, length: int, tpu_compiler: str) -> None:
    """At the published widths, forward and backward, with a place in the sequence that is known only while it runs."""
    mesh = Mesh(np.array(tpu_devices(chip)[:1]), ("x",), axis_types=(AxisType.Auto,))

    def shape(*axes: int, of: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(axes, of, sharding=NamedSharding(mesh, PartitionSpec()))

    def both(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, segment_starts_BT: jax.Array, first: jax.Array) -> Any:
        attend = functools.partial(splash_attention, scale=SCALE, segment_starts_BT=segment_starts_BT, first=first)
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


@functools.cache
def on_one_device() -> tuple[np.ndarray, Any, Any]:
    """Where the documents of four rows begin, and `layers_on` one device with them and without, by the chunked loop."""
    segment_starts_BT, _ = pack([[70, 200, 30], [160, 160], [LENGTH], random_rows(1, LENGTH, 9)[0]], LENGTH)
    within, across = layers_on(None, segment_starts_BT, np.zeros_like(segment_starts_BT))
    assert abs(within[0] - across[0]) > 1, "a mask that is ignored would not show"
    return segment_starts_BT, within, across


MESH, OTHER_MESH = {"context": 2, "tensor": 2, "fsdp": 2}, {"context": 4, "data": 2}


@pytest.mark.parametrize(
    ("sizes", "backend", "documents"),
    [
        (MESH, "chunked", True),
        (MESH, "splash", True),
        (MESH, "splash", False),
        pytest.param(OTHER_MESH, "chunked", True, marks=pytest.mark.nightly),
        pytest.param(OTHER_MESH, "splash", True, marks=pytest.mark.nightly),
        pytest.param(OTHER_MESH, "splash", False, marks=pytest.mark.nightly),
    ],
)
def test_layers_on_a_mesh_are_those_of_one_device(
    sizes: dict[str, int],
    backend: str,
    documents: bool,
    interpreted: Callable[[], None],  # noqa: F811
) -> None:
    """Documents go on from device to device, and rows have their own; a query's place differs by device."""
    segment_starts_BT, within, across = on_one_device()
    if backend == "splash":
        interpreted()
    (found,) = layers_on(make_mesh(MeshConfig(**sizes)), segment_starts_BT if documents else None)
    assert_alike(found, within if documents else across)


# --- Who can, and who belongs to whom --------------------------------------------------------------------------------


def test_kernels_for_gpus_are_passed_over_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "current_gpu", lambda: hopper.GPU("NVIDIA H200", 132))
    asked = "bfloat16", (192, 128), "gpu"
    assert choose_attention("auto", *asked) == "pallas_gpu"
    assert choose_attention("auto", *asked, documents=True) == "chunked"
    assert choose_attention("auto", *asked[:2], "tpu", documents=True) == "splash"
    unsupported_reason = (
        "attention_backend 'pallas_gpu' .* attends across the documents of a row, and cannot keep them apart; use 'auto' or "
    )
    with pytest.raises(ValueError, match=unsupported_reason):
        choose_attention("pallas_gpu", *asked, documents=True)
    q, k, v, _ = draw(4, 4, "bfloat16")
    with pytest.raises(ValueError, match="'pallas_gpu' attends across the documents of a row"):
        attend(q, k, v, scale=SCALE, chunk=4, segment_starts_BT=np.zeros((2, 4), np.int32), backend="pallas_gpu")


def test_the_first_key_and_the_token_ahead() -> None:
    segment_starts_BT = np.array([[0, 0, 0, 3, -1, -1], [-1, 1, 1, 1, 4, 4]], np.int32)
    assert first_seen(segment_starts_BT, 0).tolist() == [[0, 0, 0, 3, 4, 5], [0, 1, 1, 1, 4, 4]]
    assert first_seen(segment_starts_BT[:, 3:], 3).tolist() == [[3, 4, 5], [1, 4, 4]]
    assert has_ahead(segment_starts_BT, 0).tolist() == [[True] * 4 + [False] * 2, [False] + [True] * 5]
    assert has_ahead(segment_starts_BT, 1).astype(int).tolist() == [[1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 1, 0]]
    assert has_ahead(segment_starts_BT, 2).astype(int).tolist() == [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert not has_ahead(segment_starts_BT, 6).any()
