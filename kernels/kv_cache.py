"""One step of decoding with cached keys and values: append a position and attend from it, in one launch.

    out = (e^(s - m) v + sum_j e^(s_j - m) v_j) / (e^(s - m) + sum_j e^(s_j - m)),   s_j = scale * q . k_j

over the text keys of the prompt and the earlier image positions j that the pattern shows the new one, whose own score
is s; m is the largest.

One program for BLOCK_M samples of one prompt and one head. It reads their queries, keys and values of the position,
writes keys and values to their slots and starts from them a running maximum, sum and output (online softmax): nothing
that it writes is read back. Then two loops of matrix products. The samples are the rows of a product with their
prompt's text, whose keys lie transposed: text comes from memory once a prompt and head, from L2 once a program. Image
keys are each sample's own. They are read BLOCK_W at a time, one sample after the other and visible ones alone, and
multiplied with all rows of the tile, of which that sample's counts: the tensor cores have little else to do, and one
sample's keys of one head are one stretch of memory. 4 * head_dim * itemsize bytes a visible image key and sample,
of which the step is made where many samples share a prompt. Scores, softmax and sums are float32; weights, and queries
of float32 over a 16-bit cache, are rounded to the cache's dtype for the products.

Who is visible is not tested but enumerated: :func:`earlier_key` is a position's t-th earlier key. It, ``num_earlier``
and ``slot_of`` use operators alone, so that ``function.fn`` evaluates them on integers and arrays.

The position is read from ``held`` on the device: a captured graph can be replayed. Between launches ``held`` is the
position. During one, its upper 32 bits count the programs that have read it: one atomic addition reads and counts, and
the program that finds all others counted writes the next position. Launches on one cache must follow each other, as on
one stream they do; those on different caches share nothing.

Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1; samples as the rows of a product with a shared prompt:
Hydragen (arXiv 2402.05099), section 3. Limits: head_dim 1..256; the cache's tensors contiguous, of the others the last
dimension.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from dalle_fast.kernels.attention_forward import SMALLEST_SCALE, attend
from dalle_fast.kernels.common import (
    COLUMN,
    CONV_CLIP,
    CONV_CORNER,
    CONV_RASTER,
    CONV_TORUS,
    H200,
    LAST_RESORT,
    ROW_SAME_ROW,
    SHIPPED_DTYPES,
    SHIPPED_HEAD_DIMS,
    SHIPPED_PATTERNS,
    Compilation,
    Device,
    Launch,
    Tiles,
    TileTable,
    check_runnable,
    choose_tiles,
    compiler_options,
    device_of,
    load_rows,
    padded_head_dim,
    raster_geometry,
    score_unit,
    store_rows,
    strides,
    visible_text_len,
)
from torch import Tensor

ARRIVED = tl.constexpr(1 << 32)  # what a program adds to ``held``

# Chosen by what the compilers make of them (Triton 3.6 and 3.9; row-32, and every pattern of SHIPPED_PATTERNS at head
# size 64 on generation 9), not by time: no row was measured on a GPU. Sixteen samples are the fewest that the tensor
# cores take, and what a product of image keys does in vain is in proportion to them; 32 would read the text from L2
# half as often, but make the last programs of a launch longer. 32 keys of a window are all that rows have at the
# paper's size. Few warps need few barriers and leave room for many programs, as a step waits for memory.
_MANY = {
    (2, 16): (Tiles(16, 64, 32, 1, 2), 4608),
    (2, 32): (Tiles(16, 64, 32, 2, 2), 11264),
    (2, 64): (Tiles(16, 64, 32, 2, 2), 20480),
    (2, 128): (Tiles(16, 64, 32, 4, 2), 38912),
    (2, 256): (Tiles(16, 64, 32, 4, 2), 75776),
    (4, 16): (Tiles(16, 32, 32, 4, 2), 7232),
    (4, 32): (Tiles(16, 32, 32, 4, 2), 12288),
    (4, 64): (Tiles(16, 32, 32, 4, 2), 22592),
    (4, 128): (Tiles(16, 16, 16, 8, 2), 25664),
    (4, 256): (Tiles(16, 16, 16, 8, 2), 50240),
}
# For launches of two programs a multiprocessor at most: all of a text of 256 is under way at once.
_FEW = _MANY | {
    (2, 16): (Tiles(16, 64, 32, 4, 4), 12800),
    (2, 32): (Tiles(16, 64, 32, 4, 4), 27648),
    (2, 64): (Tiles(16, 64, 32, 4, 4), 53248),
}
MANY_TILES: TileTable = {(generation, *key): row for generation in (8, 9, 10) for key, row in _MANY.items()}
FEW_TILES: TileTable = {(generation, *key): row for generation in (8, 9, 10) for key, row in _FEW.items()}


class Neighbours(NamedTuple):
    """The earlier image keys of an image position, as compiled code wants them."""

    rule: int
    text_len: int
    height: int
    width: int
    slots: int
    # A run of keys stride apart, the farthest at most reach back; stride 0 for convolutions, which have taps.
    stride: int
    reach: int
    # Taps: above rows of them over the query's own and across in each, right of them to the right of the query; a step
    # apart. On a torus both count from a shift, modulo the sides.
    row_step: int
    col_step: int
    above: int
    across: int
    right: int
    row_shift: int
    col_shift: int


def neighbours(pattern: tuple[int, ...], slots: int) -> Neighbours:
    """Of a pattern's ``code`` and the image positions that a sample keeps."""
    g = raster_geometry(pattern)
    near = Neighbours(g.rule, g.text_len, g.height, g.width, slots, 1, g.reach, g.step, g.step, 0, 0, 0, 0, 0)
    taps = 2 * g.half + 1
    if g.rule == COLUMN.value:
        return near._replace(stride=g.width)
    if g.rule == CONV_RASTER.value:
        if taps >= g.width:  # without a gap between rows of them
            return near._replace(stride=g.step)
        return near._replace(stride=0, above=g.half + 1, across=taps, right=g.half)
    if g.rule == CONV_TORUS.value:
        row_step, col_step = pattern[5] % g.height, pattern[5] % g.width
        return near._replace(
            stride=0,
            row_step=row_step,
            col_step=col_step,
            above=min(taps, g.height // g.row_divisor) - 1,
            across=min(taps, g.width // g.col_divisor),
            row_shift=-g.half * row_step % g.height,
            col_shift=-g.half * col_step % g.width,
        )
    if g.rule in (CONV_CLIP.value, CONV_CORNER.value):
        right = g.right // g.step
        return near._replace(stride=0, above=g.above // g.step, across=g.left // g.step + right + 1, right=right)
    return near


@triton.jit
def num_earlier(n, near: tl.constexpr):
    """The number of t for which :func:`earlier_key` has a key of image position n, or none in its place."""
    if near.rule == ROW_SAME_ROW:
        number = n % near.width
    elif near.stride > 0:
        number = min(n, near.reach) // near.stride
    elif near.rule == CONV_TORUS:
        number = min(n, 1) * (near.above + 1) * near.across
    elif near.rule == CONV_RASTER:
        # Over the query's own row of taps as many as the image begins with; half of the last one.
        rows = min((n // near.row_step + near.right) // near.width, near.above)
        number = min((rows + 1) * near.across - near.right, near.above * near.across) - 1
    else:
        rows = min(n // near.width // near.row_step, near.above)
        number = (rows + 1) * near.across - near.right - 1
    return number


@triton.jit
def earlier_key(t, n, near: tl.constexpr):
    """The t-th image key that image position n sees before itself, from the nearest on, and whether there is one."""
    if near.stride > 0:
        n_k = n - (t + 1) * near.stride
        seen = n_k >= 0
    elif near.rule == CONV_TORUS:
        row_k = n // near.width - (t // near.across * near.row_step + near.row_shift) % near.height
        left = (t % near.across * near.col_step + near.col_shift) % near.width
        n_k = row_k * near.width + (n % near.width + near.width - left) % near.width
        seen = (row_k >= 0) & (n_k < n)
    else:
        tap = t + near.right + 1
        left = (tap % near.across - near.right) * near.col_step
        n_k = n - tap // near.across * near.row_step * near.width
        if near.rule == CONV_RASTER:
            # left is in taps of one step in raster order, whatever row they fall in.
            n_k = n_k - left
            seen = n_k >= 0
        else:
            col_k = n % near.width - left
            n_k = n_k - left
            seen = (n_k >= 0) & (col_k >= 0) & (col_k < near.width)
    return n_k, seen


@triton.jit
def slot_of(n, near: tl.constexpr):
    """Where image position n is kept."""
    if near.rule == COLUMN:
        return n % near.width * near.height + n // near.width
    else:
        return n % near.slots


@triton.jit
def _load_text_keys(
    pointer, offs_n, TEXT_LEN: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """[BLOCK_D, len(offs_n)] of the transposed keys; 0 past HEAD_DIM, and with RAGGED past TEXT_LEN."""
    offs_d = tl.arange(0, BLOCK_D)
    addresses = pointer + offs_d[:, None] * TEXT_LEN + offs_n[None, :]
    if RAGGED:
        return tl.load(addresses, mask=(offs_d < HEAD_DIM)[:, None] & (offs_n < TEXT_LEN)[None, :], other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(addresses, mask=(offs_d < HEAD_DIM)[:, None], other=0.0)
    else:
        return tl.load(addresses)


@triton.jit(do_not_specialize=["num_heads", "samples", "num_tiles"])
def _attend_step_kernel(
    query, key, value, text_key, text_value, image_key, image_value, held, text_lens, out,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_ob, stride_oh,
    num_heads, samples, num_tiles, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    NEAR: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    NATURAL: tl.constexpr = image_key.dtype.element_ty == tl.float32
    TEXT_LEN: tl.constexpr = NEAR.text_len
    pid = tl.program_id(0)
    start = pid % num_tiles * BLOCK_M
    head = (pid // num_tiles % num_heads).to(tl.int64)
    prompt = (pid // num_tiles // num_heads).to(tl.int64)
    b = prompt * samples + start
    count = min(samples - start, BLOCK_M)
    lane = tl.arange(0, BLOCK_M)
    valid = lane < count

    q = load_rows(query + b * stride_qb + head * stride_qh, lane, stride_qb, 1, valid, HEAD_DIM, BLOCK_D, True)
    k = load_rows(key + b * stride_kb + head * stride_kh, lane, stride_kb, 1, valid, HEAD_DIM, BLOCK_D, True)
    v = load_rows(value + b * stride_vb + head * stride_vh, lane, stride_vb, 1, valid, HEAD_DIM, BLOCK_D, True)
    k = k.to(image_key.dtype.element_ty)
    v = v.to(image_value.dtype.element_ty)

    word = tl.atomic_add(held, tl.full((), ARRIVED, tl.int64), sem="relaxed")
    position = word.to(tl.int32)
    n = position - TEXT_LEN
    fits = (n >= 0) & (n < NEAR.height * NEAR.width)
    is_last = (word >> 32) == tl.num_programs(0) - 1
    tl.store(held, position.to(tl.int64) + fits.to(tl.int64), mask=is_last)

    written = lane < tl.where(fits, count, 0)
    stride_ib = tl.cast(num_heads, tl.int64) * (NEAR.slots * HEAD_DIM)
    image = b * stride_ib + head * (NEAR.slots * HEAD_DIM)
    place = image + slot_of(n, NEAR) * HEAD_DIM
    store_rows(image_key + place, k, lane, stride_ib, written, HEAD_DIM, BLOCK_D)
    store_rows(image_value + place, v, lane, stride_ib, written, HEAD_DIM, BLOCK_D)

    if NEGATIVE:
        q = -q
    unit = score_unit(scale, NATURAL)
    m = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * unit
    total = tl.full([BLOCK_M], 1.0, tl.float32)
    acc = v.to(tl.float32)
    q = q.to(k.dtype)

    text = (prompt * num_heads + head) * (TEXT_LEN * HEAD_DIM)
    text_len = visible_text_len(text_lens, prompt, TEXT_LEN)
    dense_stop = text_len // BLOCK_N * BLOCK_N
    for start_n in range(0, dense_stop, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        keys = _load_text_keys(text_key + text, offs_n, TEXT_LEN, HEAD_DIM, BLOCK_D, False)
        values = load_rows(text_value + text, offs_n, HEAD_DIM, 1, None, HEAD_DIM, BLOCK_D, False)
        acc, m, total = attend(q, tl.trans(keys), values, acc, m, total, None, unit, False, PRECISION)
    for start_n in range(dense_stop, text_len, BLOCK_W):
        offs_n = start_n + tl.arange(0, BLOCK_W)
        inside = offs_n < text_len
        # Hidden keys are read, so that the loads stay wide; of values, which would make NaN of 0 times NaN, none.
        keys = _load_text_keys(text_key + text, offs_n, TEXT_LEN, HEAD_DIM, BLOCK_D, True)
        values = load_rows(text_value + text, offs_n, HEAD_DIM, 1, inside, HEAD_DIM, BLOCK_D, True)
        acc, m, total = attend(q, tl.trans(keys), values, acc, m, total, inside[None, :], unit, True, PRECISION)

    earlier = num_earlier(n, NEAR)
    blocks = tl.where(fits, (earlier + BLOCK_W - 1) // BLOCK_W, 0)
    for step in range(0, count * blocks):
        sample = step // blocks
        t = (step - sample * blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
        n_k, seen = earlier_key(t, n, NEAR)
        seen = seen & (t < earlier)
        slots, own = slot_of(n_k, NEAR), image + sample * stride_ib
        keys = load_rows(image_key + own, slots, HEAD_DIM, 1, seen, HEAD_DIM, BLOCK_D, True)
        values = load_rows(image_value + own, slots, HEAD_DIM, 1, seen, HEAD_DIM, BLOCK_D, True)
        seen = (lane == sample)[:, None] & seen[None, :]
        acc, m, total = attend(q, keys, values, acc, m, total, seen, unit, True, PRECISION)

    store_rows(
        out + b * stride_ob + head * stride_oh, acc / total[:, None], lane, stride_ob, written, HEAD_DIM, BLOCK_D
    )


def plan_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    image_key: Tensor,
    image_value: Tensor,
    held: Tensor,
    text_lens: Tensor,
    out: Tensor,
    *,
    pattern: tuple[int, ...],
    scale: float,
    precision: str = "ieee",
    tiles: Tiles | None = None,
    device: Device,
) -> Launch:
    """The launch of :func:`attend_step`, with the given tiles or those of the table."""
    batch, num_heads, slots, head_dim = image_key.shape
    prompts = text_key.shape[0]
    samples = batch // prompts
    programs = triton.cdiv(samples, LAST_RESORT.block) * num_heads * prompts
    table = FEW_TILES if programs <= 2 * device.num_sms else MANY_TILES
    tiles = tiles or choose_tiles(table, device, image_key.dtype, head_dim)
    num_tiles = triton.cdiv(samples, tiles.block)
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "text_key": text_key,
        "text_value": text_value,
        "image_key": image_key,
        "image_value": image_value,
        "held": held,
        "text_lens": text_lens,
        "out": out,
        **strides("q", query, "bh"),
        **strides("k", key, "bh"),
        **strides("v", value, "bh"),
        **strides("o", out, "bh"),
        "num_heads": num_heads,
        "samples": samples,
        "num_tiles": num_tiles,
        "scale": max(abs(scale), SMALLEST_SCALE),
    }
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "BLOCK_M": tiles.block,
        "BLOCK_N": tiles.step,
        "BLOCK_W": tiles.window_step,
        "NEAR": neighbours(pattern, slots),
        "NEGATIVE": scale < 0,
        "PRECISION": precision,
    }
    return Launch(_attend_step_kernel, num_tiles * num_heads * prompts, arguments, constants, compiler_options(tiles))


def attend_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    image_key: Tensor,
    image_value: Tensor,
    held: Tensor,
    text_lens: Tensor,
    out: Tensor,
    *,
    pattern: tuple[int, ...],
    scale: float,
    precision: str = "ieee",
    tiles: Tiles | None = None,
) -> None:
    """Append a position to a cache and attend from it; of a full cache, or one without its text, nothing is written.

    Args:
        query, key, value: (B, H, 1, D) of the position, in the cache's dtype, or in float32 over a 16-bit cache; any
            strides but the last, which is 1.
        text_key, text_value: (P, H, D, T) and (P, H, T, D), contiguous; B is a multiple of P, samples of a prompt
            side by side.
        image_key, image_value: (B, H, slots, D) float16, bfloat16 or float32, contiguous. The position's slot is
            written.
        held: int64 of no dimensions: the position. Advanced by one.
        text_lens: (P,) int64, contiguous. Text keys at or past text_lens[p] are hidden; values outside 0..T act as the
            nearest inside.
        out: (B, H, 1, D) in query's dtype, any strides but the last, which is 1. Written.
        pattern: a pattern's ``code``.
        scale: factor of the scores.
        precision: of products of float32 matrices: "ieee", or "tf32" or "tf32x3" for tensor cores.
        tiles: instead of those of the table.

    Raises:
        RuntimeError: bfloat16 in Triton's interpreter; tensors that are not on a CUDA device outside of it.
    """
    check_runnable(image_key)
    plan_step(
        query, key, value, text_key, text_value, image_key, image_value, held, text_lens, out,
        pattern=pattern, scale=scale, precision=precision, tiles=tiles, device=device_of(image_key),
    ).run(image_key.device)  # fmt: skip


def shipped_configs(
    head_dims: tuple[int, ...] = SHIPPED_HEAD_DIMS,
    dtypes: tuple[torch.dtype, ...] = SHIPPED_DTYPES,
    device: Device = H200,
) -> list[Compilation]:
    """What the launches of :func:`attend_step` compile, for ahead-of-time compilation.

    512 samples of one prompt, on packed projections, of every pattern of ``SHIPPED_PATTERNS`` with every head size and
    dtype; a single sample, and float32 over a 16-bit cache, with the paper's row attention.
    """
    found = []
    for name, pattern in SHIPPED_PATTERNS.items():
        for head_dim in head_dims:
            for dtype in dtypes:
                for suffix, batch, wide in (("", 512, dtype), ("-single", 1, dtype), ("-wide", 512, torch.float32)):
                    if suffix and (name != "row-32" or (suffix == "-wide" and dtype == torch.float32)):
                        continue
                    tensors = _shipped_tensors(pattern, batch, head_dim, dtype, wide)
                    launch = plan_step(*tensors, pattern=pattern, scale=1.0, device=device)
                    dtype_name = str(dtype).removeprefix("torch.")
                    found.append(launch.compilation(f"attend_step-{name}-{head_dim}-{dtype_name}{suffix}"))
    return found


def _shipped_tensors(
    pattern: tuple[int, ...], batch: int, head_dim: int, dtype: torch.dtype, wide: torch.dtype
) -> list[Tensor]:
    """The tensors of a launch for 16 heads and one prompt, without memory."""
    heads, text_len, image_len = 16, pattern[1], pattern[2] * pattern[3]
    slots = image_len if pattern[0] == COLUMN.value else min(raster_geometry(pattern).reach + 1, image_len)

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, key, value = meta(batch, 3, heads, 1, head_dim, dtype=wide).unbind(1)
    text = meta(1, heads, head_dim, text_len), meta(1, heads, text_len, head_dim)
    image = meta(batch, heads, slots, head_dim)
    numbers = meta(dtype=torch.int64), meta(1, dtype=torch.int64)
    return [query, key, value, *text, image, image, *numbers, meta(batch, heads, 1, head_dim, dtype=wide)]
