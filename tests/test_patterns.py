"""Every mask recomputed pair by pair from the published rules, and everything derived from the masks."""

import dataclasses
import json
import pickle
import re

import numpy as np
import pytest
import torch
from helpers import every_pattern, pattern_id
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from dalle_fast.patterns import Column, Conv, Full, Pattern, Row, from_dict, schedule

TEXT_LENS = (0, 1, 6)
GRIDS = (4, (1, 1), (1, 5), (5, 1), (2, 3), (5, 4), (3, 7))


def sees(pattern: Pattern, q: int, k: int) -> bool:
    """The rule of one (query, key) pair, in the words of the papers and reimplementations."""
    T, H, W = pattern.text_len, pattern.height, pattern.width
    if k > q:
        return False
    if k < T:
        return True
    d = q - k
    (row_q, col_q), (row_k, col_k) = divmod(q - T, W), divmod(k - T, W)
    if isinstance(pattern, Full):
        return True
    if isinstance(pattern, Row):
        return row_q == row_k if pattern.variant == "same_row" else d <= W
    if isinstance(pattern, Column):
        return col_q == col_k
    size, step = pattern.kernel_size, pattern.dilation
    h = (size - 1) // 2
    if pattern.variant == "raster":
        return d % step == 0 and d // step < (h + 1) * W and (d // step + h) % W <= 2 * h
    if pattern.variant == "clip":
        taps = [tap * step for tap in range(-h, h + 1)]
        return row_q - row_k in taps and col_q - col_k in taps
    if pattern.variant == "torus":
        rows = [tap * step % H for tap in range(-h, h + 1)]
        columns = [tap * step % W for tap in range(-h, h + 1)]
        return (row_q - row_k) % H in rows and (col_q - col_k) % W in columns
    taps = [tap * step for tap in range(size)]
    return row_q - row_k in taps and col_q - col_k in taps


def convolutions(text_len: int, grid: int | tuple[int, int]) -> list[Pattern]:
    sizes = {"raster": (1, 3, 11), "clip": (1, 3, 11), "torus": (1, 3, 11), "corner": (1, 2, 3, 10)}
    return [
        Conv(text_len, grid, kernel_size=size, variant=variant, dilation=dilation)
        for variant in sizes
        for size in sizes[variant]
        for dilation in (1, 2, 3)
    ]


@pytest.mark.parametrize("text_len", TEXT_LENS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_masks_by_brute_force(text_len, grid):
    for pattern in every_pattern(text_len, grid) + convolutions(text_len, grid):
        positions = range(pattern.seq_len)
        expected = np.array([[sees(pattern, q, k) for k in positions] for q in positions])
        np.testing.assert_array_equal(pattern.dense().numpy(), expected, err_msg=repr(pattern))
        assert pattern.nnz() == expected.sum(), pattern


@pytest.mark.parametrize(
    ("kind", "options", "small", "large"),
    [
        (Full, {}, 253, 819_840),
        (Row, {}, 187, 328_304),
        (Column, {}, 157, 311_936),
        (Conv, {}, 193, 356_384),
        (Conv, {"variant": "clip"}, 175, 347_394),
        (Conv, {"variant": "torus"}, 197, 357_504),
    ],
)
def test_published_counts(kind, options, small, large):
    for text_len, side, kernel_size, count in ((6, 4, 3, small), (256, 32, 11, large)):
        size = {"kernel_size": kernel_size} if kind is Conv else {}
        pattern = kind(text_len, side, **options, **size)
        assert pattern.nnz() == count
        assert int(pattern.dense().sum()) == count


@pytest.mark.parametrize(
    ("kind", "options", "small", "large"),
    [
        (Row, {"variant": "same_row"}, 169, 312_928),
        (Column, {}, 169, 312_928),
        (Conv, {"variant": "corner", "kernel_size": 3}, 205, 304_704),
        (Conv, {"variant": "corner", "kernel_size": 5}, 217, 318_539),
        (Conv, {"variant": "corner", "kernel_size": 11}, None, 384_152),
    ],
)
def test_dalle_pytorch_counts(kind, options, small, large):
    """It feeds one text position more (its start token) and leaves out the last image token."""
    for text_len, side, count in ((6, 4, small), (256, 32, large)):
        if count is not None:
            fed = text_len + side**2
            assert int(kind(text_len + 1, side, **options).dense()[:fed, :fed].sum()) == count


@pytest.mark.parametrize(("pattern", "small", "large"), [(Row, 70, 33_264), (Column, 40, 16_896), (Conv, 76, 61_344)])
def test_image_part_counts(pattern, small, large):
    size = {"kernel_size": 3} if pattern is Conv else {}
    assert pattern(0, 4, **size).nnz() == small
    assert pattern(0, 32).nnz() == large


def active_tiles(mask: np.ndarray, tile: int) -> np.ndarray:
    count = len(mask) // tile
    return mask.reshape(count, tile, count, tile).any(axis=(1, 3))


def test_active_tiles():
    text_len, side = 256, 32
    row, column, conv = (kind(text_len, side).dense().numpy() for kind in (Row, Column, Conv))
    raster = np.arange(side**2).reshape(side, side)
    order = np.concatenate([np.arange(text_len), text_len + raster.T.ravel()])
    transposed = column[np.ix_(order, order)]
    table = {
        16: (1349, 2216, 1256, 1914),
        32: (355, 820, 324, 495),
        64: (105, 210, 90, 132),
        128: (34, 55, 27, 40),
    }
    for tile, counts in table.items():
        assert tuple(active_tiles(mask, tile).sum() for mask in (row, column, transposed, conv)) == counts


def test_column_is_block_diagonal_when_transposed():
    height, width = 3, 5
    mask = Column(0, (height, width)).dense().numpy()
    order = np.arange(height * width).reshape(height, width).T.ravel()
    expected = np.kron(np.eye(width, dtype=bool), np.tri(height, dtype=bool))
    np.testing.assert_array_equal(mask[np.ix_(order, order)], expected)


def test_keys_of_an_image_query():
    for pattern, most, mean in ((Row, 289, 288.5), (Column, 288, 272.5), (Conv, 322, 315.9)):
        keys = pattern(256, 32).dense()[256:].sum(1)
        assert keys.max() == most
        assert round(keys.double().mean().item(), 1) == mean


def offsets(pattern: Pattern) -> set[int]:
    query, key = pattern.dense()[pattern.text_len :, pattern.text_len :].nonzero().unbind(1)
    return set((query - key).tolist())


def test_offsets_of_the_figure():
    assert offsets(Row(6, 4)) == {0, 1, 2, 3, 4}
    assert offsets(Column(6, 4)) == {0, 4, 8, 12}
    assert offsets(Conv(6, 4, kernel_size=3)) == {0, 1, 3, 4, 5, 7}
    ranges = ((0, 5), (27, 37), (59, 69), (91, 101), (123, 133), (155, 165), (187, 191))
    expected = {d for first, last in ranges for d in range(first, last + 1)}
    assert len(expected) == 66
    assert offsets(Conv(0, 32)) == expected


@pytest.mark.parametrize("pattern", every_pattern(3, (4, 5)), ids=pattern_id)
class TestDerived:
    def test_properties(self, pattern):
        assert (pattern.text_len, pattern.height, pattern.width) == (3, 4, 5)
        assert (pattern.image_len, pattern.seq_len) == (20, 23)
        assert pattern.grid == (4, 5)

    def test_flops(self, pattern):
        pairs = int(pattern.dense().sum())
        assert pattern.flops(batch=2, heads=3, head_dim=8) == 2 * 3 * pairs * 8 * 2 * 2

    def test_mask_mod(self, pattern):
        size = pattern.seq_len
        mask = create_mask(pattern.mask_mod, None, None, size, size, device="cpu")
        assert torch.equal(mask[0, 0], pattern.dense())

    def test_block_mask(self, pattern):
        size, tile = pattern.seq_len, 8
        blocks = create_block_mask(pattern.mask_mod, None, None, size, size, device="cpu", BLOCK_SIZE=tile)
        padded = np.zeros((24, 24), dtype=bool)
        padded[:size, :size] = pattern.dense().numpy()
        np.testing.assert_array_equal(blocks.to_dense()[0, 0].numpy() != 0, active_tiles(padded, tile))

    def test_dict_round_trip(self, pattern):
        assert from_dict(json.loads(json.dumps(pattern.to_dict()))) == pattern

    def test_equal_patterns_are_one_key(self, pattern):
        copy = pickle.loads(pickle.dumps(pattern))
        assert copy == pattern and hash(copy) == hash(pattern)
        assert {pattern: 1}[copy] == 1

    def test_is_frozen(self, pattern):
        with pytest.raises(dataclasses.FrozenInstanceError):
            pattern.text_len = 4

    def test_every_query_sees_itself(self, pattern):
        assert pattern.dense().diagonal().all()

    def test_dense_on_another_device(self, pattern):
        assert pattern.dense(device="meta").device.type == "meta"


def test_square_grid_is_a_pair():
    assert Row(2, 4) == Row(2, (4, 4)) == Row(2, [4, 4])
    assert Row(2, 4) != Row(2, 4, variant="same_row")
    assert Full(2, 4) != Column(2, 4)


class TestSchedule:
    def test_dalle(self):
        layers = schedule("dalle", 64, 256, 32)
        assert [i for i, layer in enumerate(layers, 1) if isinstance(layer, Column)] == list(range(2, 63, 4))
        assert [i for i, layer in enumerate(layers, 1) if isinstance(layer, Conv)] == [64]
        assert sum(isinstance(layer, Row) for layer in layers) == 47
        assert layers[63] == Conv(256, 32, kernel_size=11, variant="raster")
        assert layers[0] == Row(256, 32, variant="raster")

    @pytest.mark.parametrize("depth", [12, 24, 64])
    def test_ru_dalle(self, depth):
        layers = schedule("ru-dalle", depth, 128, 32)
        paper = schedule("dalle", depth, 128, 32)
        assert layers[:-1] == paper[:-1]
        assert layers[-1] == Conv(128, 32, kernel_size=11, variant="clip")

    @pytest.mark.parametrize("depth", [2, 6, 18])
    def test_ru_dalle_can_end_in_a_column(self, depth):
        assert schedule("ru-dalle", depth, 4, 4)[-1] == Column(4, 4)
        assert schedule("dalle", depth, 4, 4)[-1] == Conv(4, 4)

    def test_dalle_pytorch(self):
        cycle = [
            Full(5, (2, 3)),
            Row(5, (2, 3), variant="same_row"),
            Column(5, (2, 3)),
            Conv(5, (2, 3), kernel_size=5, variant="corner"),
        ]
        assert schedule("dalle-pytorch", 6, 5, (2, 3)) == cycle + cycle[:2]

    def test_one_layer(self):
        assert schedule("dalle", 1, 4, 4) == [Conv(4, 4)]
        assert schedule("dalle-pytorch", 1, 4, 4) == [Full(4, 4)]
        assert schedule("ru-dalle", 1, 4, 4) == [Conv(4, 4, variant="clip")]


GRID_RULE = "grid must be a side >= 1 or a pair (height, width) of sides >= 1, got "


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Full(1, 0), GRID_RULE + "0"),
        (lambda: Full(1, (2, -1)), GRID_RULE + "(2, -1)"),
        (lambda: Full(1, (2, 2, 2)), GRID_RULE + "(2, 2, 2)"),
        (lambda: Full(1, (2.0, 2)), GRID_RULE + "(2.0, 2)"),
        (lambda: Row(-1, 2), "text_len must be an integer >= 0, got -1"),
        (lambda: Row(1.5, 2), "text_len must be an integer >= 0, got 1.5"),
        (lambda: Row(1, 2, variant="clip"), "variant must be one of raster, same_row, got 'clip'"),
        (
            lambda: Conv(1, 2, variant="same_row"),
            "variant must be one of raster, clip, torus, corner, got 'same_row'",
        ),
        (lambda: Conv(1, 2, kernel_size=4), "kernel_size must be a positive odd integer, got 4"),
        (lambda: Conv(1, 2, kernel_size=-1), "kernel_size must be a positive odd integer, got -1"),
        (
            lambda: Conv(1, 2, kernel_size=0, variant="corner"),
            "kernel_size must be a positive integer, got 0",
        ),
        (lambda: Conv(1, 2, dilation=0), "dilation must be >= 1, got 0"),
        (
            lambda: from_dict({"name": "diagonal", "text_len": 1, "grid": [2, 2]}),
            "pattern name must be one of full, row, column, conv, got 'diagonal'",
        ),
        (
            lambda: from_dict({"text_len": 1}),
            "pattern name must be one of full, row, column, conv, got None",
        ),
        (
            lambda: from_dict({"name": "row", "text_len": 1, "grid": [2, 2], "colour": 3}),
            "pattern 'row' cannot be made from {'text_len': 1, 'grid': (2, 2), 'colour': 3}",
        ),
        (lambda: from_dict({"name": "row", "text_len": 1}), "pattern 'row' cannot be made from"),
        (lambda: schedule("dalle", 0, 1, 2), "depth must be >= 1, got 0"),
        (
            lambda: schedule("dalle-2", 4, 1, 2),
            "schedule must be one of dalle, dalle-pytorch, ru-dalle, got 'dalle-2'",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
