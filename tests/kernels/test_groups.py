"""Visits and steps against loops over rows."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.groups import steps_by_band, steps_by_block, visits_of

SIZES = [[3, 0, 5, 8], [0, 0, 16, 0], [16], [0, 0], [1] * 16, [4, 4, 4, 4], [0, 7, 0, 0, 9, 0], [2, 1]]


def rows_by_pair(sizes: list[int], num_rows: int, block: int, visit_empty: bool) -> list[tuple[int, int]]:
    """(group, block) of every pair that shares a row, in the order of rows."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    pairs = list(dict.fromkeys((int(g), r // block) for r, g in enumerate(owner)))
    if visit_empty:
        seen = {g for g, _ in pairs}
        starts = np.cumsum([0, *sizes])
        last = (num_rows - 1) // block
        pairs += [(g, min(int(starts[g]) // block, last)) for g, size in enumerate(sizes) if size == 0 and g not in seen]
        pairs.sort()
    return pairs


@pytest.mark.parametrize("visit_empty", [False, True])
@pytest.mark.parametrize("block", [4, 5, 16, 32])
@pytest.mark.parametrize("sizes", SIZES)
def test_visits_are_the_pairs_that_share_rows(sizes: list[int], block: int, visit_empty: bool) -> None:
    num_rows = 16
    visits = jax.jit(lambda s: visits_of(s, num_rows, block, visit_empty=visit_empty))(jnp.array(sizes, jnp.int32))
    count = int(visits.number)
    found = list(zip(visits.group_V.tolist(), visits.block_V.tolist(), strict=True))
    assert found[:count] == rows_by_pair(sizes, num_rows, block, visit_empty)
    assert all(0 <= g < len(sizes) and 0 <= b <= (num_rows - 1) // block for g, b in found), "padding is in range, too"
    np.testing.assert_array_equal(visits.start_G, np.cumsum([0, *sizes]))


@pytest.mark.parametrize("num_tiles", [1, 3])
@pytest.mark.parametrize("block", [4, 5, 32])
@pytest.mark.parametrize("sizes", SIZES)
def test_steps_are_every_tile_of_every_visit_in_order(sizes: list[int], block: int, num_tiles: int) -> None:
    num_rows = 16
    sizes = [*sizes, num_rows - sum(sizes)]
    num_blocks = -(-num_rows // block)

    @jax.jit
    def both(s):
        return steps_by_block(visits_of(s, num_rows, block, visit_empty=False), num_blocks, num_tiles)

    steps, count = both(jnp.array(sizes, jnp.int32))
    pairs = rows_by_pair(sizes, num_rows, block, False)
    by_block = [[g for g, b in pairs if b == s] for s in range(num_blocks)]
    want = [(s, t, g) for s in range(num_blocks) for t, g in itertools.product(range(num_tiles), by_block[s])]
    found = list(zip(steps.block_I.tolist(), steps.tile_I.tolist(), steps.group_I.tolist(), strict=True))
    assert found[: int(count)] == want
    assert all(0 <= s < num_blocks and 0 <= t < num_tiles and 0 <= g < len(sizes) for s, t, g in found)


@pytest.mark.parametrize(
    ("tile", "grain", "num_tiles", "band"), [(2, 1, 3, 2), (4, 4, 1, 1), (4, 2, 3, 100), (8, 4, 3, 2), (32, 8, 2, 1)]
)
@pytest.mark.parametrize("sizes", SIZES)
def test_steps_by_band_are_every_tile_of_every_group_in_order(
    sizes: list[int], tile: int, grain: int, num_tiles: int, band: int
) -> None:
    num_rows = 16
    sizes = [*sizes, num_rows - sum(sizes)]
    steps, count = jax.jit(lambda s: steps_by_band(s, num_rows, tile, num_tiles, band, grain))(jnp.array(sizes, jnp.int32))

    want = []
    for group, size in enumerate(sizes):
        own = set(range(sum(sizes[:group]), sum(sizes[:group]) + size))
        firsts = range(min(own, default=0) // grain * grain, max(own, default=-1) + 1, tile)
        mine = [(row, [at for at in range(tile) if row + at in own]) for row in firsts]
        rows = [(row, places[0], places[-1] + 1) for row, places in mine]
        for some in range(0, len(rows), band):
            want += [(group, *row, t) for t in range(num_tiles) for row in rows[some : some + band]]
    found = list(zip(*(array.tolist() for array in steps), strict=True))
    assert found[: int(count)] == want
    assert all(0 <= group < len(sizes) and 0 <= t < num_tiles for group, *_, t in found), "padding is in range, too"
