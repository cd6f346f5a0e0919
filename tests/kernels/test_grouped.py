"""Visits and steps against loops over rows."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from dsv3_jax.kernels.grouped import steps_by_band, steps_by_block, visits_of

ROWS = 16
SIZES = {
    1: [[16]],
    7: [
        [0, 7, 0, 0, 9, 0, 0],
        [3, 0, 0, 0, 0, 5, 8],
        [0, 0, 16, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [4, 4, 4, 4, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 16],
        [2, 1, 0, 0, 0, 0, 0],
    ],
    16: [[1] * 16],
}
"""By the number of groups: those of one are compiled together."""


def rows_by_pair(sizes: list[int], block: int, visit_empty: bool) -> list[tuple[int, int]]:
    """(group, block) of every pair that shares a row, in the order of rows."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    pairs = list(dict.fromkeys((int(g), r // block) for r, g in enumerate(owner)))
    if visit_empty:
        seen = {g for g, _ in pairs}
        starts = np.cumsum([0, *sizes])
        last = (ROWS - 1) // block
        pairs += [(g, min(int(starts[g]) // block, last)) for g, size in enumerate(sizes) if size == 0 and g not in seen]
        pairs.sort()
    return pairs


def filled(groups: int) -> np.ndarray:
    """The sizes with one more group, of the rows past the last."""
    sizes_YG = np.array(SIZES[groups], np.int32)
    return np.concatenate([sizes_YG, ROWS - sizes_YG.sum(1, keepdims=True)], axis=1, dtype=np.int32)


@pytest.mark.parametrize("groups", SIZES)
def test_visits_are_the_pairs_that_share_rows(groups: int) -> None:
    cases = [(block, visit_empty) for block in (4, 5, 16, 32) for visit_empty in (False, True)]

    @jax.jit
    @jax.vmap
    def every(sizes):
        return [visits_of(sizes, ROWS, block, visit_empty=visit_empty) for block, visit_empty in cases]

    for (block, visit_empty), visits in zip(cases, every(np.array(SIZES[groups], np.int32)), strict=True):
        for y, sizes in enumerate(SIZES[groups]):
            found = list(zip(visits.group_V[y].tolist(), visits.block_V[y].tolist(), strict=True))
            assert found[: int(visits.number[y])] == rows_by_pair(sizes, block, visit_empty), (block, visit_empty, sizes)
            assert all(0 <= g < groups and 0 <= b <= (ROWS - 1) // block for g, b in found), "padding is in range, too"
            np.testing.assert_array_equal(visits.start_G[y], np.cumsum([0, *sizes]))


@pytest.mark.parametrize("groups", SIZES)
def test_steps_are_every_tile_of_every_visit_in_order(groups: int) -> None:
    cases = [(block, num_tiles) for block in (4, 5, 32) for num_tiles in (1, 3)]

    @jax.jit
    @jax.vmap
    def every(sizes):
        return [
            steps_by_block(visits_of(sizes, ROWS, block, visit_empty=False), -(-ROWS // block), num_tiles)
            for block, num_tiles in cases
        ]

    for (block, num_tiles), (steps, count) in zip(cases, every(filled(groups)), strict=True):
        num_blocks = -(-ROWS // block)
        for y, sizes in enumerate(filled(groups).tolist()):
            pairs = rows_by_pair(sizes, block, False)
            by_block = [[g for g, b in pairs if b == s] for s in range(num_blocks)]
            want = [(s, t, g) for s in range(num_blocks) for t, g in itertools.product(range(num_tiles), by_block[s])]
            found = list(zip(*(a[y].tolist() for a in (steps.block_I, steps.tile_I, steps.group_I)), strict=True))
            assert found[: int(count[y])] == want, (block, num_tiles, sizes)
            assert all(0 <= s < num_blocks and 0 <= t < num_tiles and 0 <= g <= groups for s, t, g in found)


@pytest.mark.parametrize("groups", SIZES)
def test_steps_by_band_are_every_tile_of_every_group_in_order(groups: int) -> None:
    # Tile, grain, column tiles, band.
    cases = [(2, 1, 3, 2), (4, 4, 1, 1), (4, 2, 3, 100), (8, 4, 3, 2), (32, 8, 2, 1)]

    @jax.jit
    @jax.vmap
    def every(sizes):
        return [steps_by_band(sizes, ROWS, tile, num_tiles, band, grain) for tile, grain, num_tiles, band in cases]

    for (tile, grain, num_tiles, band), (steps, count) in zip(cases, every(filled(groups)), strict=True):
        for y, sizes in enumerate(filled(groups).tolist()):
            want = []
            for group, size in enumerate(sizes):
                own = set(range(sum(sizes[:group]), sum(sizes[:group]) + size))
                firsts = range(min(own, default=0) // grain * grain, max(own, default=-1) + 1, tile)
                mine = [(row, [at for at in range(tile) if row + at in own]) for row in firsts]
                rows = [(row, places[0], places[-1] + 1) for row, places in mine]
                for some in range(0, len(rows), band):
                    want += [(group, *row, t) for t in range(num_tiles) for row in rows[some : some + band]]
            found = list(zip(*(array[y].tolist() for array in steps), strict=True))
            assert found[: int(count[y])] == want, (tile, grain, num_tiles, band, sizes)
            assert all(0 <= group <= groups and 0 <= t < num_tiles for group, *_, t in found), "padding is in range, too"
