"""What the attention kernels share: the geometry of their tiles, the mask, and how a launch is put together.

A sequence is text_len text positions and then height * width image positions in raster order; n counts the image
positions from 0. An image tile is BLOCK positions in one of two shapes,

    raster   n = tile * BLOCK + lane                       Full, Row, and Conv where a patch saves no work
    patch    (BLOCK / tile_cols) rows x tile_cols columns  Column, whose patch is a strip of columns, and Conv

and walks over its window, the image positions it may share a visible pair with, STEP positions at a time: earlier
ones for a tile of queries, later ones (LATER) for a tile of keys. A raster window is a span of n, two spans for the
torus; a patch window is rows of window_cols columns. Under the raster rule of Conv these rows run over the sides of
the grid: the position dr rows and dc columns before n is dr * width + dc places back whatever the row it falls in,
so no column is clipped. Steps dense_start..dense_stop of a window need no mask.

The functions of the geometry use operators alone. ``function.fn`` therefore evaluates them on plain integers and on
arrays, and what the tiles visit is compared with the pattern's definition without running a kernel.

``pattern`` is a pattern's ``code``: (rule, text_len, height, width, kernel_size, dilation).
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

FULL, ROW_RASTER, ROW_SAME_ROW, COLUMN, CONV_RASTER, CONV_CLIP, CONV_TORUS, CONV_CORNER = (
    tl.constexpr(rule) for rule in range(8)
)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Geometry(NamedTuple):
    """A pattern and the shape of its image tiles. Compiled code sees the fields alone, so there are no methods."""

    rule: int
    text_len: int
    height: int
    width: int
    # Conv has taps at multiples of step: half on either side, for the corner rule half before.
    half: int
    step: int
    # x is a tap modulo a side if the divisor divides it and x / divisor * inverse is a tap of step 1 modulo
    # side / divisor.
    row_divisor: int
    row_inverse: int
    col_divisor: int
    col_inverse: int
    # The farthest earlier key a query sees: in raster order, in rows, in columns to its left and right. A torus with
    # far_rows > 0 also sees rows from that many above it on, and none between.
    reach: int
    above: int
    left: int
    right: int
    far_rows: int
    # 1: rows of a patch window run over the sides of the grid.
    overrun: int
    # tile_cols 0 is a raster tile. dense 0: every step of every window needs the mask.
    tile_cols: int
    window_cols: int
    dense: int


_geometries: dict[tuple[tuple[int, ...], int, int], Geometry] = {}


def tile_geometry(pattern: tuple[int, ...], block: int, step: int) -> Geometry:
    """The tiles of ``block`` positions, and ``step`` of their windows at a time, that compute the fewest pairs."""
    cached = _geometries.get((pattern, block, step))
    if cached is None:
        raster = raster_geometry(pattern)
        shapes = [] if pattern[0] == COLUMN.value else [raster]
        shapes += _patches(raster, block, step)
        cached = min(shapes, key=lambda shape: _pairs(shape, block, step))
        cached = cached._replace(dense=_has_dense_steps(cached, block, step))
        _geometries[pattern, block, step] = cached
    return cached


def raster_geometry(pattern: tuple[int, ...]) -> Geometry:
    rule, text_len, height, width, kernel_size, dilation = pattern
    image_len = height * width
    row_divisor, row_inverse = _residues(dilation, height)
    col_divisor, col_inverse = _residues(dilation, width)
    # No tap that lies outside the image is told from another, and the numbers stay small.
    half = min(max(kernel_size - 1, 0) if rule == CONV_CORNER.value else max(kernel_size - 1, 0) // 2, image_len)
    edge, step = half * dilation, min(max(dilation, 1), image_len)

    reach, above, left, right, far_rows = image_len - 1, height - 1, width - 1, width - 1, 0
    if rule in (ROW_RASTER.value, ROW_SAME_ROW.value):
        reach = width if rule == ROW_RASTER.value else width - 1
    elif rule == COLUMN.value:
        left = right = 0
    elif rule == CONV_RASTER.value:
        reach = ((half + 1) * width - 1) * step if half else 0
        above, left, right = half + 1 if half else 0, half, half
    elif rule in (CONV_CLIP.value, CONV_CORNER.value):
        above, left = min(edge, height - 1), min(edge, width - 1)
        right = left if rule == CONV_CLIP.value else 0
        reach = above * width + left
    elif rule == CONV_TORUS.value and 2 * edge + 1 < height:
        above, far_rows = edge, height - edge
    return Geometry(
        *(rule, text_len, height, width, half, step),
        *(row_divisor, row_inverse, col_divisor, col_inverse),
        *(min(reach, image_len - 1), above, left, right, far_rows),
        *(int(rule == CONV_RASTER.value and half > 0), 0, 0, 0),
    )


def _residues(step: int, side: int) -> tuple[int, int]:
    """The divisor and the inverse of Geometry for one side."""
    divisor = math.gcd(step, side)
    return divisor, pow(step // divisor, -1, side // divisor)


def _patches(raster: Geometry, block: int, step: int) -> list[Geometry]:
    """Every patch shape that can stand for ``raster``."""
    if raster.rule == COLUMN.value:
        # As many rows as the grid has, up to one column a tile: each key then meets more queries of its column.
        cols = min(block // min(block, triton.next_power_of_2(raster.height)), step)
        return [raster._replace(tile_cols=cols, window_cols=cols)]
    if raster.rule not in (CONV_RASTER.value, CONV_CLIP.value, CONV_CORNER.value):
        return []
    shapes = []
    for cols in (8, 16, 32):
        window_cols = triton.next_power_of_2(cols + raster.left + raster.right)
        # In a wider window two places of one row would be the same position.
        unique = raster.rule != CONV_RASTER.value or (window_cols <= raster.width and raster.step == 1)
        if cols <= block and window_cols <= step and unique:
            shapes.append(raster._replace(tile_cols=cols, window_cols=window_cols))
    return shapes


def _pairs(shape: Geometry, block: int, step: int) -> int:
    """About how many image-image pairs the tiles compute, clipped windows counted whole."""
    image_len = shape.height * shape.width
    if shape.tile_cols == 0:
        steps = triton.cdiv(min(block + shape.reach, image_len), step)
    else:
        rows = min(block // shape.tile_cols + shape.above, shape.height)
        steps = triton.cdiv(rows, step // shape.window_cols)
    return num_image_tiles(image_len, block, shape) * steps * block * step


def _has_dense_steps(shape: Geometry, block: int, step: int) -> int:
    if shape.rule == COLUMN.value:
        return int(shape.tile_cols == 1 and block < shape.height)
    return int(shape.rule in (FULL.value, ROW_RASTER.value) and shape.reach + 2 >= block + step)


def num_image_tiles(num_image: int, block: int, geometry: Geometry) -> int:
    """How many tiles the first ``num_image`` image positions need."""
    if geometry.tile_cols == 0:
        return triton.cdiv(num_image, block)
    tile_rows, num_rows = block // geometry.tile_cols, triton.cdiv(num_image, geometry.width)
    return triton.cdiv(num_rows, tile_rows) * triton.cdiv(geometry.width, geometry.tile_cols)


@triton.jit
def tile_lanes(tile, lane, num_image, BLOCK: tl.constexpr, geometry: tl.constexpr):
    """n, row and column of the lanes of an image tile, and which of them are positions of the sequence."""
    if geometry.tile_cols > 0:
        ACROSS: tl.constexpr = (geometry.width + geometry.tile_cols - 1) // geometry.tile_cols
        row = tile // ACROSS * (BLOCK // geometry.tile_cols) + lane // geometry.tile_cols
        col = tile % ACROSS * geometry.tile_cols + lane % geometry.tile_cols
        n = row * geometry.width + col
    else:
        n = tile * BLOCK + lane
        row = n // geometry.width
        col = n % geometry.width
    return n, row, col, (col < geometry.width) & (n < num_image)


@triton.jit
def tile_window(tile, num_image, BLOCK: tl.constexpr, STEP: tl.constexpr, geometry: tl.constexpr, LATER: tl.constexpr):
    """The window of an image tile.

    Returns:
        (start, stop, far_start, far_stop): a span of n, or the rows of a patch window, which begin at -1 where rows
            run over the sides; the other span of n of a torus, which is walked first.
        dense_start, dense_stop, steps: which steps need no mask, and how many there are.
    """
    if geometry.tile_cols > 0:
        ACROSS: tl.constexpr = (geometry.width + geometry.tile_cols - 1) // geometry.tile_cols
        TILE_ROWS: tl.constexpr = BLOCK // geometry.tile_cols
        STEP_ROWS: tl.constexpr = STEP // geometry.window_cols
        row = tile // ACROSS * TILE_ROWS
        num_rows = (num_image + geometry.width - 1) // geometry.width
        if LATER:
            start = row
            stop = min(row + TILE_ROWS + geometry.above, num_rows + geometry.overrun)
        else:
            start = max(row - geometry.above, -geometry.overrun)
            stop = min(row + TILE_ROWS, num_rows)
        far_start = start
        far_stop = start
        steps = (stop - start + STEP_ROWS - 1) // STEP_ROWS
        dense_start = 0
        dense_stop = 0
        if geometry.dense:
            if LATER:
                dense_start = min((TILE_ROWS - 1 + STEP_ROWS - 1) // STEP_ROWS, steps)
                dense_stop = steps
            else:
                dense_stop = (row - start + 1) // STEP_ROWS
    else:
        WIDTH: tl.constexpr = geometry.width
        n = tile * BLOCK
        n_stop = min(n + BLOCK, num_image)
        if LATER:
            start = n
            if geometry.rule == ROW_SAME_ROW:
                stop = min(((n_stop - 1) // WIDTH + 1) * WIDTH, num_image)
            elif geometry.rule == CONV_TORUS:
                stop = min(((n_stop - 1) // WIDTH + 1 + geometry.above) * WIDTH, num_image)
            else:
                stop = min(n_stop + geometry.reach, num_image)
        else:
            stop = n_stop
            if geometry.rule == ROW_SAME_ROW:
                start = n - n % WIDTH
            elif geometry.rule == CONV_TORUS:
                start = max(n // WIDTH - geometry.above, 0) * WIDTH
            else:
                start = max(n - geometry.reach, 0)
        far_start = 0
        far_stop = 0
        if geometry.far_rows > 0:
            if LATER:
                far_start = max((n // WIDTH + geometry.far_rows) * WIDTH, stop)
                far_stop = max(num_image, far_start)
            else:
                far_stop = min(max((n_stop - 1) // WIDTH + 1 - geometry.far_rows, 0) * WIDTH, start)
        steps = (far_stop - far_start + STEP - 1) // STEP + (stop - start + STEP - 1) // STEP
        dense_start = 0
        dense_stop = 0
        if geometry.dense:
            if LATER:
                dense_start = min((BLOCK - 1 + STEP - 1) // STEP, steps)
                dense_stop = steps
                if geometry.rule == ROW_RASTER:
                    dense_stop = max(min((geometry.reach + 1) // STEP, steps), dense_start)
            else:
                if geometry.rule != FULL:
                    dense_start = min((max(n + BLOCK - 1 - geometry.reach - start, 0) + STEP - 1) // STEP, steps)
                dense_stop = max((n + 1 - start) // STEP, dense_start)
    return (start, stop, far_start, far_stop), dense_start, dense_stop, steps


@triton.jit
def window_lanes(
    tile, step, lane, window, num_image, STEP: tl.constexpr, geometry: tl.constexpr, LATER: tl.constexpr
):  # fmt: skip
    """n, row and column of the lanes of one step of a tile's window, and which of them belong to it.

    Row and column are those of the window: column -1 of row 1 is the last position of row 0.
    """
    start = window[0]
    stop = window[1]
    if geometry.tile_cols > 0:
        ACROSS: tl.constexpr = (geometry.width + geometry.tile_cols - 1) // geometry.tile_cols
        MARGIN: tl.constexpr = geometry.right if LATER else geometry.left
        row = start + step * (STEP // geometry.window_cols) + lane // geometry.window_cols
        col = tile % ACROSS * geometry.tile_cols - MARGIN + lane % geometry.window_cols
        n = row * geometry.width + col
        inside = (n >= 0) & (n < num_image)
        if geometry.rule != CONV_RASTER:
            inside = inside & (col >= 0) & (col < geometry.width)
    else:
        if geometry.far_rows > 0:
            far_start = window[2]
            far_stop = window[3]
            far_steps = (far_stop - far_start + STEP - 1) // STEP
            # 1 in the far span, 0 in the near one.
            far = min(max(far_steps - step, 0), 1)
            begin = far * (far_start + step * STEP) + (1 - far) * (start + (step - far_steps) * STEP)
            end = far * far_stop + (1 - far) * stop
        else:
            begin = start + step * STEP
            end = stop
        n = begin + lane
        row = n // geometry.width
        col = n % geometry.width
        inside = n < end
    return n, row, col, inside


@triton.jit
def visible(n_q, row_q, col_q, n_k, row_k, col_k, geometry: tl.constexpr):
    """Whether the image query sees the image key, for coordinates of a tile and a step of its window; broadcasts.

    Differences that causality excludes may be negative: what is then divided does not matter.
    """
    distance = n_q - n_k
    WIDTH: tl.constexpr = geometry.width
    HALF: tl.constexpr = geometry.half
    EDGE: tl.constexpr = geometry.half * geometry.step
    if geometry.rule == FULL:
        seen = distance >= 0
    elif geometry.rule == ROW_RASTER:
        seen = (distance >= 0) & (distance <= geometry.reach)
    elif geometry.rule == ROW_SAME_ROW:
        seen = (distance >= 0) & (distance <= col_q)
    elif geometry.rule == COLUMN:
        seen = row_q >= row_k
        if geometry.tile_cols > 1:
            seen = seen & (col_q == col_k)
    elif geometry.rule == CONV_RASTER:
        seen = (distance >= 0) & (distance <= geometry.reach)
        if geometry.tile_cols > 0:
            seen = seen & (col_q - col_k >= -HALF) & (col_q - col_k <= HALF)
        else:
            if geometry.step > 1:
                seen = seen & (distance % geometry.step == 0)
            if 2 * HALF + 1 < WIDTH:
                seen = seen & ((distance // geometry.step + HALF) % WIDTH <= 2 * HALF)
    elif geometry.rule == CONV_TORUS:
        # A tap t * step = x modulo the side, |t| <= half, is what the divisor and the inverse turn into |t| <= half.
        rows = (row_q - row_k + geometry.height) % geometry.height
        cols = (col_q - col_k + WIDTH) % WIDTH
        PERIOD: tl.constexpr = geometry.height // geometry.row_divisor
        COL_PERIOD: tl.constexpr = WIDTH // geometry.col_divisor
        seen = (distance >= 0) & (rows % geometry.row_divisor == 0) & (cols % geometry.col_divisor == 0)
        if 2 * HALF + 1 < PERIOD:
            seen = seen & ((rows // geometry.row_divisor * geometry.row_inverse + HALF) % PERIOD <= 2 * HALF)
        if 2 * HALF + 1 < COL_PERIOD:
            seen = seen & ((cols // geometry.col_divisor * geometry.col_inverse + HALF) % COL_PERIOD <= 2 * HALF)
    else:
        BEFORE: tl.constexpr = EDGE if geometry.rule == CONV_CLIP else 0
        seen = (distance >= 0) & (row_q - row_k <= EDGE) & (col_q - col_k <= EDGE) & (col_k - col_q <= BEFORE)
        if geometry.step > 1:
            seen = seen & ((row_q - row_k) % geometry.step == 0) & ((col_q - col_k) % geometry.step == 0)
    return seen


@triton.jit
def text_keys(start, length, text_len, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Text keys of a tile of queries that begins at ``start``, for image tiles the first image position.

    Returns:
        dense_stop, stop: all queries of the tile see the keys before the first, some of them keys before the second.
    """
    return min(start + 1, text_len) // STEP * STEP, min(min(start + BLOCK, length), text_len)


@triton.jit
def text_queries(start, length, text_len, split, num_splits, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Queries of a tile of text keys that begins at ``start``, in steps that count from there.

    A tile of hidden keys has none: where the whole text is hidden, its queries have no finite lse.

    Returns:
        first, causal_stop, last: the steps of this share; those before causal_stop need the causal mask.
    """
    shown = min(max(text_len - start, 0), 1)
    num_steps = shown * ((length - start + STEP - 1) // STEP)
    share = (num_steps + num_splits - 1) // num_splits
    first = min(split * share, num_steps)
    last = min(first + share, num_steps)
    return first, max(min((BLOCK + STEP - 2) // STEP, last), first), last


@triton.jit
def query_tile(pid_tile, num_tiles, image_tiles, length, BLOCK: tl.constexpr, geometry: tl.constexpr):
    """A tile of queries. Image tiles, which have the most keys, come first, and of either kind the last one.

    Returns:
        tile: number of the image tile, and 0 for a tile of text.
        is_image, start: whether it is an image tile; the first position of a tile of text, or of the image.
        (n, row, column): of its lanes, if it is an image tile.
        position, valid: where they are in the sequence, and which of them are.
    """
    lane = tl.arange(0, BLOCK)
    is_image = pid_tile < image_tiles
    tile = max(image_tiles - 1 - pid_tile, 0)
    start = tl.where(is_image, geometry.text_len, (num_tiles - 1 - pid_tile) * BLOCK)
    n, row, col, valid = tile_lanes(tile, lane, length - geometry.text_len, BLOCK, geometry)
    position = tl.where(is_image, geometry.text_len + n, start + lane)
    valid = tl.where(is_image, valid, start + lane < min(geometry.text_len, length))
    return tile, is_image, start, (n, row, col), position, valid


@triton.jit
def visible_text_len(text_lens, offset, TEXT_LEN: tl.constexpr):
    """How many text keys of a sample may be seen."""
    if text_lens is None:
        return TEXT_LEN
    else:
        return tl.maximum(tl.minimum(tl.load(text_lens + offset).to(tl.int64), TEXT_LEN), 0).to(tl.int32)


@triton.jit
def score_unit(scale, NATURAL: tl.constexpr):
    """The factor that brings scores to the unit of the running maximum and of lse: log2, or with NATURAL ln.

    Units of log2 save a product a score. float32 takes NATURAL: a product and the lse that a caller keeps then agree
    to the last bit, where a round trip through log2 loses two units in the last place of lse, an error of p.
    """
    return scale if NATURAL else scale * LOG2_E


@triton.jit
def exp_scores(scores, unit, base, NATURAL: tl.constexpr):
    """exp(scale * scores - base), ``unit`` and ``base`` as of :func:`score_unit`."""
    if NATURAL:
        # The sum keeps the compiler from fusing the product with the difference: rounded like base, they cancel.
        return tl.exp2((tl.fma(scores, unit, 0.0) - base) * LOG2_E)
    else:
        # One instruction. Scaling q instead would round it and keep it in registers.
        return tl.exp2(tl.fma(scores, unit, -base))


@triton.jit
def load_rows(
    pointer, position, stride, stride_d, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """Rows [len(position), BLOCK_D] of a tensor; 0 past HEAD_DIM, and with RAGGED where not ``inside``."""
    offs_d = tl.arange(0, BLOCK_D)
    addresses = pointer + position.to(tl.int64)[:, None] * stride + offs_d.to(tl.int64)[None, :] * stride_d
    if RAGGED:
        if HEAD_DIM < BLOCK_D:
            return tl.load(addresses, mask=inside[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
        else:
            return tl.load(addresses, mask=inside[:, None], other=0.0)
    else:
        if HEAD_DIM < BLOCK_D:
            return tl.load(addresses, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
        else:
            return tl.load(addresses)


@triton.jit
def store_rows(pointer, rows, position, stride, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write [len(position), BLOCK_D] rows where ``inside``, in the pointer's dtype."""
    offs_d = tl.arange(0, BLOCK_D)
    addresses = pointer + position.to(tl.int64)[:, None] * stride + offs_d[None, :]
    mask = inside[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    tl.store(addresses, rows.to(pointer.dtype.element_ty), mask=mask)


class Tiles(NamedTuple):
    """How a kernel cuts up its work, and how it is compiled.

    Attributes:
        block: positions of a program: queries, for the gradients of key and value keys.
        step: positions of text, or to text keys of queries, that one step of the loop takes.
        window_step: positions of a window that one step takes.
        num_warps, num_stages: options of the compiler.
        max_registers: that a thread may take, 0 without a bound: it buys another program on a multiprocessor where
            the compiler would miss it by a few registers, and can do without them.
    """

    block: int
    step: int
    window_step: int
    num_warps: int
    num_stages: int
    max_registers: int = 0


# (generation of the GPU, bytes of an element, padded head size) -> tiles, and the bytes of shared memory they take.
TileTable = dict[tuple[int, int, int], tuple[Tiles, int]]

# What fits wherever Triton runs.
LAST_RESORT = Tiles(16, 16, 16, 4, 1)


class Device(NamedTuple):
    """What a choice of tiles depends on."""

    capability: tuple[int, int]
    shared_bytes: int  # that one block may take
    num_sms: int


H200 = Device(capability=(9, 0), shared_bytes=232448, num_sms=132)


def choose_tiles(table: TileTable, device: Device, dtype: torch.dtype, head_dim: int) -> Tiles:
    """The table's row if the device has the shared memory for it. Which window a rule walks is tile_geometry's choice.

    Generations are those of the tensor cores: 9 (wgmma), 10 (tcgen05, also 11), and 8 for every other (mma).
    """
    generation = {9: 9, 10: 10, 11: 10}.get(device.capability[0], 8)
    tiles, shared_bytes = table[generation, dtype.itemsize, padded_head_dim(head_dim)]
    return tiles if shared_bytes <= device.shared_bytes else LAST_RESORT


def padded_head_dim(head_dim: int) -> int:
    """The side of the blocks that hold a head: a power of two, and no smaller than a tensor core takes."""
    return max(16, triton.next_power_of_2(head_dim))


def strides(name: str, tensor: Tensor, axes: str = "bhs") -> dict[str, int]:
    """The arguments stride_<name><axis> of a tensor (B, H, S, D), of its first axes."""
    return {f"stride_{name}{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=False)}


def device_of(tensor: Tensor) -> Device:
    """The tensor's device; for the interpreter, and for tensors without memory, what an H200 has."""
    if not tensor.is_cuda:
        return H200
    properties = torch.cuda.get_device_properties(tensor.device)
    return Device(
        capability=(properties.major, properties.minor),
        shared_bytes=properties.shared_memory_per_block_optin,
        num_sms=properties.multi_processor_count,
    )


class Launch(NamedTuple):
    """One kernel with everything it is launched with: what runs is also what is compiled ahead of time.

    Attributes:
        grid: number of programs.
        arguments: tensors, integers, floats and None by name.
        constants: constexpr values by name.
        options: of the compiler.
    """

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]

    def run(self, device: torch.device) -> None:
        """Launch on the current stream of ``device``."""
        if self.grid == 0:
            return
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._launch()
        else:
            self._launch()

    def _launch(self) -> None:
        self.kernel[(self.grid,)](**self.arguments, **self.constants, **self.options)

    def compilation(self, name: str) -> "Compilation":
        """What the just-in-time compiler would make of this launch.

        It compiles anew for integers equal to 1, for tensors and integers divisible by 16, and for None. A tensor
        without memory counts as aligned.
        """
        signature, constants, attributes = {}, {}, {}
        fixed = self.kernel.do_not_specialize or ()
        for index, argument in enumerate(self.kernel.arg_names):
            is_constant = argument in self.constants
            value = self.constants[argument] if is_constant else self.arguments[argument]
            if is_constant or value is None or (isinstance(value, int) and value == 1 and argument not in fixed):
                signature[argument], constants[(index,)] = "constexpr", value
                continue
            divisible = False
            if isinstance(value, Tensor):
                signature[argument] = f"*{_TYPE_NAMES[value.dtype]}"
                divisible = value.device.type == "meta" or value.data_ptr() % 16 == 0
            elif isinstance(value, int):
                signature[argument] = "i32" if -(2**31) <= value < 2**31 else "i64"
                divisible = value % 16 == 0 and argument not in fixed
            else:
                signature[argument] = "fp32"
            if divisible:
                attributes[(index,)] = [["tt.divisibility", 16]]
        return Compilation(name, self.kernel, signature, constants, attributes, self.options)


class Compilation(NamedTuple):
    """Arguments of ``triton.compiler.ASTSource`` (kernel to attributes) and ``triton.compile`` (options)."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int], Any]
    attributes: dict[tuple[int], list[list[Any]]]
    options: dict[str, int]


def compiler_options(tiles: Tiles) -> dict[str, int]:
    """Options of a launch. Products and sums are fused, as was the default before Triton 3.10."""
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "enable_fp_fusion": True}
    return options | {"maxnreg": tiles.max_registers} if tiles.max_registers else options


_TYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


# What is compiled ahead of time: every rule at the paper's size, and the published ones on larger grids.
SHIPPED_PATTERNS = {
    "full-32": (FULL.value, 256, 32, 32, 0, 0),
    "row-32": (ROW_RASTER.value, 256, 32, 32, 0, 0),
    "row-64": (ROW_RASTER.value, 256, 64, 64, 0, 0),
    "row-128": (ROW_RASTER.value, 256, 128, 128, 0, 0),
    "same_row-32": (ROW_SAME_ROW.value, 256, 32, 32, 0, 0),
    "column-32": (COLUMN.value, 256, 32, 32, 0, 0),
    "column-64": (COLUMN.value, 256, 64, 64, 0, 0),
    "column-128": (COLUMN.value, 256, 128, 128, 0, 0),
    "conv-32": (CONV_RASTER.value, 256, 32, 32, 11, 1),
    "conv-64": (CONV_RASTER.value, 256, 64, 64, 11, 1),
    "clip-32": (CONV_CLIP.value, 256, 32, 32, 11, 1),
    "clip-64": (CONV_CLIP.value, 256, 64, 64, 11, 1),
    "torus-32": (CONV_TORUS.value, 256, 32, 32, 11, 1),
    "corner-32": (CONV_CORNER.value, 256, 32, 32, 11, 1),
}
SHIPPED_HEAD_DIMS = (16, 32, 64, 80, 128, 256)
SHIPPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def packed_tensors(pattern: tuple[int, ...], head_dim: int, dtype: torch.dtype, key_heads: int = 16):
    """Query, key, value and an output of 16 heads as a projection to (B, S, 3, H, D) leaves them, without memory."""
    heads, length = 16, pattern[1] + pattern[2] * pattern[3]
    qkv = torch.empty(8, length, 3, heads, head_dim, dtype=dtype, device="meta")
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    out = torch.empty(8, length, heads, head_dim, dtype=dtype, device="meta").transpose(1, 2)
    return query, key[:, :key_heads], value[:, :key_heads], out


def check_runnable(tensor: Tensor) -> None:
    """Raise where the kernels would not compute what they say.

    Raises:
        RuntimeError: bfloat16 in Triton's interpreter; a tensor that is not on a CUDA device, outside of it.
    """
    interpreted = not isinstance(tile_lanes, triton.JITFunction)
    if interpreted and tensor.dtype == torch.bfloat16:
        raise RuntimeError(
            "Triton's interpreter computes bfloat16 on its bit patterns, so its results mean nothing; "
            "unset TRITON_INTERPRET, or use float16 or float32"
        )
    if not interpreted and not tensor.is_cuda:
        raise RuntimeError(
            f"the Triton kernels run on CUDA devices, got a tensor on {tensor.device}; "
            "move it to one, or set TRITON_INTERPRET=1 before triton is imported"
        )
