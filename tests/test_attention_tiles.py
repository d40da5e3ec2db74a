"""What the tiles of the Triton kernels visit, walked in numpy: every visible pair once, and no other."""

import numpy as np
import pytest
import torch
from helpers import pattern_id

from dalle_fast.patterns import Column, Conv, Full, Pattern, Row

triton = pytest.importorskip("triton")

from dalle_fast.kernels import attention_backward, attention_forward, common  # noqa: E402
from dalle_fast.kernels.common import Tiles, num_image_tiles, tile_geometry  # noqa: E402

# The kernels' own functions, as plain Python on integers and arrays.
tile_lanes, tile_window, window_lanes = common.tile_lanes.fn, common.tile_window.fn, common.window_lanes.fn
visible, text_keys, text_queries = common.visible.fn, common.text_keys.fn, common.text_queries.fn


class Counts:
    """How often each pair is computed, and the pairs that are computed without a mask."""

    def __init__(self, length: int):
        self.length = length
        self.pairs = np.zeros((length, length), dtype=np.int32)

    def add(self, queries, query_valid, keys, key_valid, seen=True):
        """One step of one tile: what reaches a result are the pairs of lanes that exist."""
        counted = query_valid[:, None] & key_valid[None, :] & seen
        q, k = np.broadcast_arrays(queries[:, None], keys[None, :])
        assert ((q[counted] >= 0) & (q[counted] < self.length) & (k[counted] >= 0) & (k[counted] < self.length)).all()
        np.add.at(self.pairs, (q[counted], k[counted]), 1)


def mask_of(pattern: Pattern, length: int, text_len: int) -> np.ndarray:
    mask = pattern.dense()[:length, :length].numpy().copy()
    mask[:, text_len : pattern.text_len] = False
    return mask


def walk_queries(pattern: Pattern, length: int, text_len: int, tiles: Tiles) -> np.ndarray:
    """Forward and dq: tiles of queries, steps over their keys."""
    counts = Counts(length)
    T, num_image = pattern.text_len, length - pattern.text_len
    geometry = tile_geometry(pattern.code, tiles.block, tiles.window_step)
    lane, text_lane = np.arange(tiles.block), np.arange(tiles.step)
    step_lane = np.arange(tiles.window_step)

    def walk_text(start, positions, valid):
        dense_stop, stop = text_keys(start, length, text_len, tiles.block, tiles.step)
        for k in range(0, dense_stop, tiles.step):
            counts.add(positions, valid, k + text_lane, np.ones(tiles.step, bool))
        for k in range(dense_stop, stop, tiles.window_step):
            keys = k + step_lane
            counts.add(positions, valid, keys, keys < stop, positions[:, None] >= keys[None, :])

    for start in range(0, min(T, length), tiles.block):
        walk_text(start, start + lane, start + lane < min(T, length))
    for tile in range(num_image_tiles(max(num_image, 0), tiles.block, geometry)):
        n_q, row_q, col_q, valid = tile_lanes(tile, lane, num_image, tiles.block, geometry)
        walk_text(T, T + n_q, valid)
        window, dense_start, dense_stop, steps = tile_window(
            tile, num_image, tiles.block, tiles.window_step, geometry, False
        )
        assert 0 <= dense_start <= dense_stop <= steps
        for step in range(steps):
            n_k, row_k, col_k, inside = window_lanes(
                tile, step, step_lane, window, num_image, tiles.window_step, geometry, False
            )
            seen = visible(n_q[:, None], row_q[:, None], col_q[:, None], n_k, row_k, col_k, geometry)
            if dense_start <= step < dense_stop:
                assert geometry.dense
                assert inside.all()
                seen = True
            # Fewer loops are compiled where a rule has no such steps.
            assert not (geometry.dense and step < dense_start) or pattern.code[0] == common.ROW_RASTER.value
            counts.add(T + n_q, valid, T + n_k, inside, seen)
    return counts.pairs


def walk_keys(pattern: Pattern, length: int, text_len: int, tiles: Tiles, num_splits: int) -> np.ndarray:
    """dk and dv: tiles of keys, steps over their queries."""
    counts = Counts(length)
    T, num_image = pattern.text_len, length - pattern.text_len
    geometry = tile_geometry(pattern.code, tiles.block, tiles.window_step)
    lane, step_lane = np.arange(tiles.block), np.arange(tiles.window_step)

    for start in range(0, min(T, length), tiles.block):
        keys = start + lane
        for split in range(num_splits):
            first, causal_stop, last = text_queries(start, length, text_len, split, num_splits, tiles.block, tiles.step)
            assert first <= causal_stop <= last
            for step in range(first, last):
                queries = start + step * tiles.step + np.arange(tiles.step)
                seen = queries[:, None] >= keys[None, :] if step < causal_stop else True
                counts.add(queries, queries < length, keys, keys < min(text_len, length), seen)
    for tile in range(num_image_tiles(max(num_image, 0), tiles.block, geometry)):
        n_k, row_k, col_k, valid = tile_lanes(tile, lane, num_image, tiles.block, geometry)
        window, dense_start, dense_stop, steps = tile_window(
            tile, num_image, tiles.block, tiles.window_step, geometry, True
        )
        assert 0 <= dense_start <= dense_stop <= steps
        for step in range(steps):
            n_q, row_q, col_q, inside = window_lanes(
                tile, step, step_lane, window, num_image, tiles.window_step, geometry, True
            )
            seen = visible(n_q[:, None], row_q[:, None], col_q[:, None], n_k, row_k, col_k, geometry)
            if dense_start <= step < dense_stop:
                assert geometry.dense
                seen = True
            one_loop_less = geometry.dense and pattern.code[0] != common.ROW_RASTER.value
            assert not one_loop_less or step < dense_stop
            counts.add(T + n_q, inside, T + n_k, valid, seen)
    return counts.pairs


def assert_covers(pattern: Pattern, length: int, text_len: int, tiles: Tiles, num_splits: int) -> None:
    mask = mask_of(pattern, length, text_len)
    np.testing.assert_array_equal(walk_queries(pattern, length, text_len, tiles), mask)
    np.testing.assert_array_equal(walk_keys(pattern, length, text_len, tiles, num_splits), mask)


def patterns_on(text_len: int, grid: int | tuple[int, int]) -> list[Pattern]:
    """Every rule, with kernels below and above the grid, and taps apart."""
    found = [Full(text_len, grid), Row(text_len, grid), Row(text_len, grid, variant="same_row"), Column(text_len, grid)]
    for variant, sizes in {"raster": (1, 3, 11), "clip": (3, 11), "torus": (3, 5, 11), "corner": (1, 2, 5)}.items():
        for kernel_size in sizes:
            for dilation in (1, 2, 3):
                found.append(Conv(text_len, grid, kernel_size=kernel_size, variant=variant, dilation=dilation))
    return found


# Every side from 1 on against tiles that are wider, narrower, and no multiple of it.
GRIDS = ((1, 1), (1, 9), (9, 1), (2, 3), 4, (3, 10), (9, 6), (2, 33), (13, 4), (3, 40))
SMALL_TILES = (Tiles(16, 16, 16, 4, 1), Tiles(32, 16, 32, 4, 1), Tiles(16, 32, 64, 4, 1), Tiles(64, 64, 32, 4, 1))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_visible_pair_once(grid):
    for index, text_len in enumerate((0, 5, 35)):
        for number, pattern in enumerate(patterns_on(text_len, grid)):
            image_len = pattern.image_len
            lengths = (pattern.seq_len, text_len + 1 + (image_len - 1) * 2 // 3, max(1, text_len // 2))
            for shift, length in enumerate(lengths):
                tiles = SMALL_TILES[(number + index + shift) % len(SMALL_TILES)]
                visible_text = (text_len, text_len, text_len // 3, 0)[(number + shift) % 4]
                assert_covers(pattern, length, visible_text, tiles, num_splits=1 + (number + shift) % 3)


PUBLISHED = [
    Full(20, 16),
    Row(20, 16),
    Row(20, 16, variant="same_row"),
    Column(20, 16),
    Conv(20, 16, kernel_size=5),
    Conv(20, 16, kernel_size=5, variant="clip"),
    Conv(20, 16, kernel_size=5, variant="torus"),
    Conv(20, 16, kernel_size=5, variant="corner"),
]


def table_tiles() -> list[Tiles]:
    """Every way in which a table cuts up the work."""
    tables = (attention_forward.TILES, attention_backward.DQ_TILES, attention_backward.DKDV_TILES)
    rows = {tiles[:3] for table in tables for tiles, _ in table.values()} | {common.LAST_RESORT[:3]}
    return [Tiles(*row, num_warps=4, num_stages=1) for row in sorted(rows)]


@pytest.mark.parametrize("tiles", table_tiles(), ids=lambda tiles: "x".join(map(str, tiles[:3])))
@pytest.mark.parametrize("pattern", PUBLISHED, ids=pattern_id)
def test_tiles_of_the_tables(pattern, tiles):
    assert_covers(pattern, pattern.seq_len, pattern.text_len, tiles, num_splits=2)
    assert_covers(pattern, pattern.seq_len - 5, 17, tiles, num_splits=1)


@pytest.mark.parametrize(
    ("pattern", "pairs"),
    [
        (Row(256, 32), 96_256),
        (Column(256, 32), 65_536),
        (Conv(256, 32), 237_568),
        (Row(256, 64), 520_192),
        (Column(256, 64), 262_144),
        (Conv(256, 64), 1_261_568),
    ],
    ids=lambda value: pattern_id(value) + f"-{value.width}" if isinstance(value, Pattern) else None,
)
def test_work_of_the_published_patterns(pattern, pairs):
    """Image pairs that tiles of 64 queries and 32 keys compute, masked ones included."""
    geometry = tile_geometry(pattern.code, 64, 32)
    num_tiles = num_image_tiles(pattern.image_len, 64, geometry)
    steps = sum(tile_window(tile, pattern.image_len, 64, 32, geometry, False)[3] for tile in range(num_tiles))
    assert steps * 64 * 32 == pairs
    assert (geometry.tile_cols == 16) == (pattern.name == "conv" and pattern.width == 64)


@pytest.mark.parametrize(
    "pattern", [Row(7, (70, 64)), Column(7, (70, 3)), Conv(7, (6, 70)), Full(7, 12)], ids=pattern_id
)
def test_steps_without_a_mask(pattern):
    """Where windows are wide, part of them is walked without a mask, and it is right there too."""
    tiles = Tiles(16, 16, 16, 4, 1)
    geometry = tile_geometry(pattern.code, 16, 16)
    assert geometry.dense == (pattern.name != "conv")
    assert_covers(pattern, pattern.seq_len, 7, tiles, num_splits=1)
    assert_covers(pattern, pattern.seq_len - 20, 4, tiles, num_splits=3)


def test_numbers_stay_small():
    """Kernels and spacings far beyond the grid do not overflow the 32-bit integers of the kernels."""
    for variant in ("raster", "clip", "torus", "corner"):
        pattern = Conv(2, (3, 5), kernel_size=2**20 + 1, variant=variant, dilation=2**20 + 3)
        assert max(tile_geometry(pattern.code, 16, 16)) < 2**15
        assert_covers(pattern, pattern.seq_len, 2, Tiles(16, 16, 16, 4, 1), num_splits=1)


def test_last_resort():
    """A row is taken where there is shared memory for it, and else tiles that are smaller than any row's."""
    for table in (attention_forward.TILES, attention_backward.DQ_TILES, attention_backward.DKDV_TILES):
        for (generation, itemsize, head_dim), (tiles, shared_bytes) in table.items():
            dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
            for room, expected in ((shared_bytes, tiles), (shared_bytes - 1, common.LAST_RESORT)):
                device = common.Device(capability=(generation, 0), shared_bytes=room, num_sms=100)
                assert common.choose_tiles(table, device, dtype, head_dim) == expected
            assert all(side >= smallest for side, smallest in zip(tiles, common.LAST_RESORT[:3], strict=False))
    consumer_blackwell = common.Device(capability=(12, 0), shared_bytes=101_376, num_sms=170)
    assert common.choose_tiles(attention_forward.TILES, consumer_blackwell, torch.float16, 200).block == 64
