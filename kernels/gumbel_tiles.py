"""What the kernels of Gumbel quantisation share: noise, tiles of the logits, and how a launch is put together.

The four words of a Philox counter serve codes 32 apart within a block of 128. A step of a kernel makes the counters of
LANES codes and has four tiles [BLOCK_M, LANES] of noise, one a word; their products with the codebook are taken as
one, with the columns in an order that leaves each element in the thread that has it. Rows are pairs of sample and
position.

Source: docs/gumbel.md for the noise; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (Philox-4x32-10).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from dalle_fast.kernels.common import LN_2, LOG2_E, SHIPPED_DTYPES, Device
from torch import Tensor

PHILOX_LEFT, PHILOX_RIGHT = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
PHILOX_LOW_STEP, PHILOX_HIGH_STEP = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)

BLOCK_CODES = tl.constexpr(128)  # that share 32 counters, of four words each
BLOCK_COUNTERS = tl.constexpr(32)
MOST_WIDTH = 128  # columns of the codebook that one program takes
LARGEST = 3e38  # of 1 / tau: where it were infinite, 0 times it would be NaN
SMALLEST = 2e-38  # where it were 0, -inf times it would be NaN


class GumbelTiles(NamedTuple):
    """How a kernel cuts up its work, and how it is compiled.

    Attributes:
        block: positions that are together in a tile.
        lanes: counters of a step, 16 or 32; a step has four times as many codes.
        width: columns of the codebook that are together in a product, at most.
        num_warps, num_stages: options of the compiler.
        max_registers: that a thread may take, 0 without a bound.
    """

    block: int
    lanes: int
    width: int
    num_warps: int
    num_stages: int
    max_registers: int = 0

    def options(self) -> dict[str, int]:
        """Of a launch. Products and sums are fused, as was the default before Triton 3.10."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options | {"maxnreg": self.max_registers} if self.max_registers else options


# (generation of the GPU, bytes of an element, padded columns of a product) -> tiles, and their bytes of shared memory.
GumbelTable = dict[tuple[int, int, int], tuple[GumbelTiles, int]]
TABLE_ROWS = [(generation, width) for generation in (8, 9, 10) for width in (16, 32, 64, 128)]

# What fits wherever Triton runs.
LAST_RESORT = GumbelTiles(16, 16, 16, 4, 1)


@triton.jit
def _multiply(a, FACTOR: tl.constexpr):
    """Upper and lower half of a 64-bit product, which is one instruction."""
    product = a.to(tl.uint64) * FACTOR
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def random_words(row, row_high, group, low, high):
    """Philox-4x32-10 of counters (row, row_high, group, 0) under the key (low, high).

    In the first two rounds no product depends on both row and group, as a tile's rows share ``row_high``.

    Args:
        row: lower halves of the rows [BLOCK_M, 1] uint32.
        group: [1, LANES] uint32.
        row_high, low, high: uint32.

    Returns:
        Four words [BLOCK_M, LANES] uint32.
    """
    row_left_high, row_left_low = _multiply(row, PHILOX_LEFT)  # [BLOCK_M, 1]
    group_right_high, group_right_low = _multiply(group, PHILOX_RIGHT)  # [1, LANES]
    group_left_high, group_left_low = _multiply(group_right_high ^ row_high ^ low, PHILOX_LEFT)
    row_right_high, row_right_low = _multiply(row_left_high ^ high, PHILOX_RIGHT)
    low += PHILOX_LOW_STEP
    high += PHILOX_HIGH_STEP
    c0 = row_right_high ^ (group_right_low ^ low)
    c2 = row_left_low ^ (group_left_high ^ high)
    c1, _ = tl.broadcast(row_right_low, c0)
    c3, _ = tl.broadcast(group_left_low, c0)
    for _ in tl.static_range(8):
        low += PHILOX_LOW_STEP
        high += PHILOX_HIGH_STEP
        left_high, left_low = _multiply(c0, PHILOX_LEFT)
        right_high, right_low = _multiply(c2, PHILOX_RIGHT)
        c0 = right_high ^ c1 ^ low
        c2 = left_high ^ c3 ^ high
        c1 = right_low
        c3 = left_low
    return c0, c1, c2, c3


@triton.jit
def _approximate_log2(x, INTERPRETED: tl.constexpr):
    """One instruction: right to 2^-22 within 0.5..2 and, relative, to 2^-22 outside."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def exp2(x, INTERPRETED: tl.constexpr):
    """One instruction; results below 2^-126 are 0."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def perturb(logits, word, PRECISE: tl.constexpr, INTERPRETED: tl.constexpr):
    """logits + g, float32, g from 32 random bits.

    What is off in -ln u, relative to it, is off in g. With PRECISE both logarithms are right to the last bits. Else the
    inner one is a series where u is near 1, and both are right to 5e-6.
    """
    # A float in [1, 2) whose fraction is the word's 23 upper bits, and of u = (bits + 1/2) 2^-23 none is lost.
    u = ((word >> 9) + 0x3F800000).to(tl.float32, bitcast=True) - (1.0 - 2.0**-24)
    if PRECISE:
        return logits.to(tl.float32) - tl.log(-tl.log(u))
    else:
        w = 1.0 - u
        series = w * tl.fma(w, tl.fma(w, tl.fma(w, 0.25, 1.0 / 3.0), 0.5), 1.0)
        minus_log = tl.where(w < 1.0 / 32.0, series, _approximate_log2(u, INTERPRETED) * -LN_2)
        return tl.fma(_approximate_log2(minus_log, INTERPRETED), -LN_2, logits.to(tl.float32))


@triton.jit
def read_key(seed):
    """The two words of the key, from an int64 in memory."""
    number = tl.load(seed)
    return number.to(tl.uint32), (number >> 32).to(tl.uint32)


@triton.jit
def rows_of_tile(tile, num_rows, positions, BLOCK_M: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of the rows, which are pairs of sample and position; with WHOLE, all are of one sample.

    Returns:
        row, its upper half, which they share, sample and position; which rows there are.
    """
    start = tl.cast(tile, tl.int64) * BLOCK_M
    lane = tl.arange(0, BLOCK_M)
    row = start + lane
    if WHOLE:
        b = start // positions
        # What Triton 3.6 does not find out: its loads would be of single elements.
        p = tl.multiple_of(start % positions, BLOCK_M) + lane
    else:
        b = row // positions
        p = row % positions
    return row, (start >> 32).to(tl.uint32), b, p, row < num_rows


@triton.jit
def row_offsets(b, p, stride_b, stride_p, PAIRED: tl.constexpr):
    """Where the rows of a tile begin. PAIRED: positions are contiguous, and a thread is to have two of them.

    It would load eight of 16 bits together; but then it would hold all that is kept of eight rows.
    """
    offsets = b * stride_b + p * stride_p
    if PAIRED:
        offsets = tl.max_contiguous(offsets, 2)
    return offsets


@triton.jit
def num_steps(num_codes, LANES: tl.constexpr):
    return (num_codes + BLOCK_CODES - 1) // BLOCK_CODES * (BLOCK_COUNTERS // LANES)


@triton.jit
def steps_of_share(share, num_shares, steps):
    """The first and the last step, excluded, of one of several shares."""
    size = (steps + num_shares - 1) // num_shares
    begin = min(share * size, steps)
    return begin, min(begin + size, steps)


@triton.jit
def codes_of_step(step, LANES: tl.constexpr):
    """The step's counters, and the first of its codes: lane i of word w is code first + 32 w + i."""
    counter = tl.cast(step, tl.int32) * LANES
    first = tl.multiple_of(counter // BLOCK_COUNTERS * BLOCK_CODES + counter % BLOCK_COUNTERS, LANES)
    return (counter + tl.arange(0, LANES)).to(tl.uint32), first


@triton.jit
def load_tile(pointer, rows, codes, stride_k, valid, num_codes, RAGGED: tl.constexpr):
    """[BLOCK_M, LANES] of the logits; -inf past the last code."""
    addresses = pointer + rows[:, None] + codes.to(tl.int64)[None, :] * stride_k
    if RAGGED:
        return tl.load(addresses, mask=valid[:, None] & (codes < num_codes)[None, :], other=float("-inf"))
    else:
        return tl.load(addresses, mask=valid[:, None], other=0.0)


@triton.jit
def store_tile(pointer, values, rows, codes, stride_k, valid, num_codes, RAGGED: tl.constexpr):
    addresses = pointer + rows[:, None] + codes.to(tl.int64)[None, :] * stride_k
    mask = valid[:, None]
    if RAGGED:
        mask = mask & (codes < num_codes)[None, :]
    tl.store(addresses, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_codes(
    codebook, codes, offs_d, stride_k, stride_d, num_codes, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """Rows [len(codes), BLOCK_D] of the codebook, 0 past its ends."""
    addresses = codebook + codes.to(tl.int64)[:, None] * stride_k + offs_d.to(tl.int64)[None, :] * stride_d
    if RAGGED:
        return tl.load(addresses, mask=(codes < num_codes)[:, None] & (offs_d < WIDTH)[None, :], other=0.0)
    elif WIDTH % BLOCK_D:
        return tl.load(addresses, mask=(offs_d < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(addresses)


@triton.jit
def join_words(tiles, BLOCK_M: tl.constexpr, LANES: tl.constexpr):
    """The four tiles of a step as one [BLOCK_M, 4 LANES], for one product; column by column as :func:`joined_codes`."""
    pairs = tl.join(tl.join(tiles[0], tiles[1]), tl.join(tiles[2], tiles[3]))  # [BLOCK_M, LANES, 2, 2]
    return tl.reshape(pairs, (BLOCK_M, 4 * LANES))


@triton.jit
def split_words(joined, BLOCK_M: tl.constexpr, LANES: tl.constexpr):
    """The reverse of :func:`join_words`."""
    even, odd = tl.split(tl.reshape(joined, (BLOCK_M, LANES, 2, 2)))
    tile_0, tile_1 = tl.split(even)
    tile_2, tile_3 = tl.split(odd)
    return tile_0, tile_1, tile_2, tile_3


@triton.jit
def joined_codes(first, LANES: tl.constexpr):
    """The codes of the columns of :func:`join_words`."""
    column = tl.arange(0, 4 * LANES)
    return first + column // 4 + BLOCK_COUNTERS * (column % 2 * 2 + column // 2 % 2)


@triton.jit
def perturbed_logits(
    logits, offsets, row, row_high, valid, step, stride_k, num_codes, low, high,
    LANES: tl.constexpr, RAGGED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Of a step's four tiles the logits as they lie in memory, the perturbed ones and the codes; and the first code."""
    PRECISE: tl.constexpr = logits.dtype.element_ty == tl.float32
    counters, first = codes_of_step(step, LANES)
    words = random_words(row.to(tl.uint32)[:, None], row_high, counters[None, :], low, high)
    k0 = first + tl.arange(0, LANES)
    k1, k2, k3 = k0 + 32, k0 + 64, k0 + 96
    l0 = load_tile(logits, offsets, k0, stride_k, valid, num_codes, RAGGED)
    l1 = load_tile(logits, offsets, k1, stride_k, valid, num_codes, RAGGED)
    l2 = load_tile(logits, offsets, k2, stride_k, valid, num_codes, RAGGED)
    l3 = load_tile(logits, offsets, k3, stride_k, valid, num_codes, RAGGED)
    x0 = perturb(l0, words[0], PRECISE, INTERPRETED)
    x1 = perturb(l1, words[1], PRECISE, INTERPRETED)
    x2 = perturb(l2, words[2], PRECISE, INTERPRETED)
    x3 = perturb(l3, words[3], PRECISE, INTERPRETED)
    return (l0, l1, l2, l3), (x0, x1, x2, x3), (k0, k1, k2, k3), first


def choose_tiles(table: GumbelTable, device: Device, dtype: torch.dtype, width: int) -> GumbelTiles:
    """The table's row if the device has the shared memory for it.

    Generations are those of the tensor cores: 9 (wgmma), 10 (tcgen05, also 11), and 8 for every other (mma).
    """
    generation = {9: 9, 10: 10, 11: 10}.get(device.capability[0], 8)
    tiles, shared_bytes = table[generation, dtype.itemsize, padded_width(width)]
    return tiles if shared_bytes <= device.shared_bytes else LAST_RESORT


def padded_width(width: int) -> int:
    """The columns of a product with a codebook: a power of two, no smaller than a tensor core takes."""
    return min(max(16, triton.next_power_of_2(width)), MOST_WIDTH)


def is_interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, which knows no inline assembly."""
    return not isinstance(random_words, triton.JITFunction)


def softmax_unit(tau: float) -> float:
    """What turns differences of perturbed logits into powers of two."""
    return min(max(LOG2_E.value / tau, SMALLEST), LARGEST)


def shape_arguments(logits: Tensor, tiles: GumbelTiles) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every kernel is told of logits (B, K, P): arguments and constants."""
    batch, num_codes, positions = logits.shape
    rows = batch * positions
    whole = batch == 1 or positions % tiles.block == 0
    arguments = {
        "num_rows": rows,
        "positions": positions,
        "num_codes": num_codes,
        "num_tiles": triton.cdiv(rows, tiles.block),
    }
    constants = {
        "BLOCK_M": tiles.block,
        "LANES": tiles.lanes,
        "WHOLE": whole,
        "RAGGED": num_codes % BLOCK_CODES.value != 0,
        "PAIRED": logits.stride(2) == 1 and logits.stride(1) != 1 and whole,
        "INTERPRETED": is_interpreted(),
    }
    return arguments, constants


def view_strides(name: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    """The arguments stride_<name><axis> of a tensor; 0 without one."""
    steps = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"stride_{name}{axis}": step for axis, step in zip(axes, steps, strict=True)}


def shares_of_codes(programs: int, num_codes: int, device: Device) -> int:
    """Into how many shares the steps of a tile are cut: four programs a multiprocessor, two blocks of codes a share."""
    if programs == 0:
        return 1
    blocks = triton.cdiv(num_codes, BLOCK_CODES.value)
    return max(1, min(4 * device.num_sms // programs, blocks // 2))


# What is compiled ahead of time: 64 images of 32 x 32 positions with 8192 codes, channels first and last.
SHIPPED_LAYOUTS = ("first", "last")
SHIPPED_WIDTHS = (16, 64, 128)
RAGGED_CODES = 1000


def shipped_tensors(layout: str, width: int, dtype: torch.dtype, num_codes: int = 8192) -> dict[str, Tensor]:
    """Arguments of :func:`plan_fwd` and of the backward pass by name, without memory."""
    batch, positions = 64, 1024
    rows = batch * positions

    def columns(size: int) -> Tensor:
        if layout == "first":
            return torch.empty(batch, size, positions, dtype=dtype, device="meta")
        return torch.empty(batch, positions, size, dtype=dtype, device="meta").transpose(1, 2)

    def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return {
        "logits": columns(num_codes),
        "codebook": numbers(num_codes, width, dtype=dtype),
        "seed": numbers(dtype=torch.int64),
        "stats": numbers(6, rows),
        "indices": numbers(rows, dtype=torch.int64),
        "kl": numbers(rows),
        "relaxed": numbers(rows, width),
        "quantized": columns(width),
    }


def shipped_shapes() -> list[tuple[str, str, int, torch.dtype, int]]:
    """What is compiled: name, layout, width, dtype and number of codes."""
    found = []
    for layout in SHIPPED_LAYOUTS:
        for width in SHIPPED_WIDTHS:
            for dtype in SHIPPED_DTYPES:
                name = f"{layout}-{width}-{str(dtype).removeprefix('torch.')}"
                found.append((name, layout, width, dtype, 8192))
                if width == MOST_WIDTH:
                    found.append((f"{name}-ragged", layout, width, dtype, RAGGED_CODES))
    return found
