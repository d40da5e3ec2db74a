"""Gumbel-softmax quantisation, forward, and the samples themselves.

    x = logits + g      y = softmax(x / tau)      z = y C      kl = sum_k q_k ln q_k + ln K,  q = softmax(logits)

g = -ln(-ln u) is noise from Philox-4x32-10, a function of (seed, position, code): docs/gumbel.md. The four words of a
counter serve codes 32 apart, so a step makes the counters of LANES codes of a block of 128 and has four tiles
[BLOCK_M, LANES] of noise, one a word.

Forward, one pass, one program for BLOCK_M positions. Step by step it makes the noise in registers, follows the maximum
and sum of x / tau, those of the logits with the moment that the KL needs, and where x was largest (online softmax), and
adds y times the step's rows of the codebook to z. It reads the logits once and writes z, the code, kl and six numbers a
position; noise and y never reach memory. A codebook of more than 128 columns is cut into blocks, one program each,
which all repeat the softmax. Weights, for gumbel_softmax, one pass: the noise again, and y from two of the six numbers.

2 K D FLOPs a position and about 50 instructions an element of noise and softmax, which hold up more than the products
do. All of it is float32 but the product with a 16-bit codebook, for which y, at most 1, is rounded to that dtype.
Logits are read as they lie, positions or codes contiguous: whichever stride is 1 is compiled in. Offsets are 64-bit.

Source: arXiv 2102.12092, section 2.1; Salmon et al. (2011), Philox. Limits: none on K, D, the number of positions.
"""

import math

import triton
import triton.language as tl
from dalle_fast.kernels.common import H200, LOG2_E, Compilation, Device, Launch, check_runnable, device_of
from dalle_fast.kernels.gumbel_tiles import (
    BLOCK_CODES,
    MOST_WIDTH,
    TABLE_ROWS,
    GumbelTable,
    GumbelTiles,
    choose_tiles,
    exp2,
    join_words,
    joined_codes,
    load_codes,
    num_steps,
    padded_width,
    perturbed_logits,
    read_key,
    row_offsets,
    rows_of_tile,
    shape_arguments,
    shares_of_codes,
    shipped_shapes,
    shipped_tensors,
    softmax_unit,
    steps_of_share,
    store_tile,
    view_strides,
)
from torch import Tensor

# Chosen by what the compilers make of them (Triton 3.6 and 3.9), not by time: none was measured on a GPU. Tiles that do
# not spill in either version; steps of 128 codes do in some, and would save a tenth of the instructions.
FORWARD_TILES: GumbelTable = {
    **{(generation, 2, width): (GumbelTiles(64, 16, width, 8, 2), 65536) for generation, width in TABLE_ROWS},
    **{(8, 4, width): (GumbelTiles(16, 16, width, 8, 2), 65536) for _, width in TABLE_ROWS},
    **{(generation, 4, width): (GumbelTiles(32, 16, width, 8, 2), 65536) for generation, width in TABLE_ROWS[4:]},
}
WEIGHTS_TILES = GumbelTiles(64, 32, 16, 8, 1)


@triton.jit
def _add_moments(logits, base, total, moment, INTERPRETED: tl.constexpr):
    """Sums of e^(l - base) and of that times l - base, [BLOCK_M, LANES]."""
    # Far below, e^(l - base) is 0, and -inf times that would be NaN.
    difference = tl.maximum(logits.to(tl.float32) - base[:, None], -120.0)
    weight = exp2(difference * LOG2_E, INTERPRETED)
    return total + weight, tl.fma(weight, difference, moment)


@triton.jit(do_not_specialize=["num_tiles"])
def _gumbel_fwd_kernel(
    logits, codebook, seed, stats, indices, kl, relaxed, quantized,
    stride_lb, stride_lk, stride_lp,
    stride_ck, stride_cd,
    stride_zb, stride_zd, stride_zp,
    num_rows, positions, num_codes, num_tiles, unit, log_codes,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, LANES: tl.constexpr,
    WHOLE: tl.constexpr, PAIRED: tl.constexpr, RAGGED: tl.constexpr, HARD: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    pid_d = pid // num_tiles
    row, row_high, b, p, valid = rows_of_tile(pid % num_tiles, num_rows, positions, BLOCK_M, WHOLE)
    offsets = row_offsets(b, p, stride_lb, stride_lp, PAIRED)
    low, high = read_key(seed)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    lost = tl.zeros([BLOCK_M], tl.float32)
    best = tl.zeros([BLOCK_M], tl.int32)
    logit_maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    logit_total = tl.zeros([BLOCK_M], tl.float32)
    moment = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for step in range(0, num_steps(num_codes, LANES)):
        raw, x, k, first = perturbed_logits(
            logits, offsets, row, row_high, valid, step, stride_lk, num_codes, low, high, LANES, RAGGED, INTERPRETED
        )
        if kl is not None:
            top = tl.max(tl.maximum(tl.maximum(raw[0], raw[1]), tl.maximum(raw[2], raw[3])), 1).to(tl.float32)
            new_maximum = tl.maximum(logit_maximum, top)
            base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            # The differences so far grow by as much as the maximum; of sums that are 0, by nothing. Far below, the sums
            # become 0, and an infinite product times that would be NaN.
            rise = tl.where(logit_maximum == float("-inf"), 0.0, tl.maximum(logit_maximum - base, -120.0))
            rescale = exp2(rise * LOG2_E, INTERPRETED)
            logit_maximum = new_maximum
            zeros = tl.zeros([BLOCK_M, LANES], tl.float32)
            weights, moments = _add_moments(raw[0], base, zeros, zeros, INTERPRETED)
            weights, moments = _add_moments(raw[1], base, weights, moments, INTERPRETED)
            weights, moments = _add_moments(raw[2], base, weights, moments, INTERPRETED)
            weights, moments = _add_moments(raw[3], base, weights, moments, INTERPRETED)
            moment = (moment + logit_total * rise) * rescale + tl.sum(moments, 1)
            logit_total = logit_total * rescale + tl.sum(weights, 1)
        top = tl.max(tl.maximum(tl.maximum(x[0], x[1]), tl.maximum(x[2], x[3])), 1)
        new_maximum = tl.maximum(maximum, top)
        # The first code that has it, in the order of the codes.
        place = tl.where(x[3] == top[:, None], 96, BLOCK_CODES)
        place = tl.where(x[2] == top[:, None], 64, place)
        place = tl.where(x[1] == top[:, None], 32, place)
        place = tl.where(x[0] == top[:, None], 0, place)
        place = tl.min(place + k[0][None, :], 1)
        # Two steps take turns in a block of 128 codes.
        best = tl.where(top > maximum, place, tl.where(top == maximum, tl.minimum(best, place), best))
        # Nothing but -inf so far: all differences are -inf and all weights 0.
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        rescale = exp2((maximum - base) * unit, INTERPRETED)
        maximum = new_maximum
        y0 = exp2((x[0] - base[:, None]) * unit, INTERPRETED)
        y1 = exp2((x[1] - base[:, None]) * unit, INTERPRETED)
        y2 = exp2((x[2] - base[:, None]) * unit, INTERPRETED)
        y3 = exp2((x[3] - base[:, None]) * unit, INTERPRETED)
        # What rounding takes from the sum is kept: a gradient is off by as much as the weights' sum is from 1. The fma
        # keeps the compiler from fusing the product with the sum after it.
        before = tl.fma(total, rescale, 0.0)
        added = tl.sum((y0 + y1) + (y2 + y3), 1) - tl.fma(lost, rescale, 0.0)
        total = before + added
        lost = (total - before) - added
        if WIDTH > 0:
            y = join_words((y0, y1, y2, y3), BLOCK_M, LANES)
            c = load_codes(
                codebook, joined_codes(first, LANES), offs_d, stride_ck, stride_cd, num_codes, WIDTH, BLOCK_D, RAGGED
            )
            acc = tl.dot(y.to(c.dtype), c, acc * rescale[:, None], input_precision=PRECISION)

    inverse = 1.0 / total
    # A maximum passes over NaN, a sum does not.
    size = tl.cast(num_rows, tl.int64)
    is_number = total == total
    is_first = row < tl.where(pid_d == 0, num_rows, 0)
    tl.store(stats + row, tl.where(is_number, maximum, total), mask=is_first)
    tl.store(stats + size + row, inverse, mask=is_first)
    tl.store(indices + row, best.to(tl.int64), mask=is_first)
    if kl is not None:
        log_total = tl.where(is_number, tl.log(logit_total), total)
        negentropy = moment / logit_total - log_total
        tl.store(stats + 2 * size + row, logit_maximum, mask=is_first)
        tl.store(stats + 3 * size + row, 1.0 / logit_total, mask=is_first)
        tl.store(stats + 4 * size + row, log_total, mask=is_first)
        tl.store(stats + 5 * size + row, negentropy, mask=is_first)
        tl.store(kl + row, negentropy + log_codes, mask=is_first)
    if WIDTH > 0:
        z = acc * inverse[:, None]
        inside = valid[:, None] & (offs_d < WIDTH)[None, :]
        tl.store(relaxed + row[:, None] * WIDTH + offs_d[None, :], z, mask=inside)
        if HARD:
            chosen = best.to(tl.int64)[:, None] * stride_ck + offs_d.to(tl.int64)[None, :] * stride_cd
            z = tl.load(codebook + chosen, mask=inside, other=0.0).to(tl.float32)
            # NaN where the soft sample is.
            z = tl.where((total > 0.0)[:, None], z, float("nan"))
        places = (b * stride_zb + p * stride_zp)[:, None] + offs_d.to(tl.int64)[None, :] * stride_zd
        tl.store(quantized + places, z.to(quantized.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tiles", "num_shares"])
def _gumbel_weights_kernel(
    logits, seed, stats, weights,
    stride_lb, stride_lk, stride_lp,
    stride_yb, stride_yk, stride_yp,
    num_rows, positions, num_codes, num_tiles, num_shares, unit,
    BLOCK_M: tl.constexpr, LANES: tl.constexpr, WHOLE: tl.constexpr, PAIRED: tl.constexpr, RAGGED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row, row_high, b, p, valid = rows_of_tile(pid % num_tiles, num_rows, positions, BLOCK_M, WHOLE)
    offsets = row_offsets(b, p, stride_lb, stride_lp, PAIRED)
    places = row_offsets(b, p, stride_yb, stride_yp, False)
    low, high = read_key(seed)
    maximum = tl.load(stats + row, mask=valid, other=0.0)[:, None]
    inverse = tl.load(stats + num_rows + row, mask=valid, other=0.0)[:, None]
    begin, end = steps_of_share(pid // num_tiles, num_shares, num_steps(num_codes, LANES))
    for step in range(begin, end):
        _, x, k, _ = perturbed_logits(
            logits, offsets, row, row_high, valid, step, stride_lk, num_codes, low, high, LANES, RAGGED, INTERPRETED
        )
        y0 = exp2((x[0] - maximum) * unit, INTERPRETED) * inverse
        y1 = exp2((x[1] - maximum) * unit, INTERPRETED) * inverse
        y2 = exp2((x[2] - maximum) * unit, INTERPRETED) * inverse
        y3 = exp2((x[3] - maximum) * unit, INTERPRETED) * inverse
        store_tile(weights, y0, places, k[0], stride_yk, valid, num_codes, RAGGED)
        store_tile(weights, y1, places, k[1], stride_yk, valid, num_codes, RAGGED)
        store_tile(weights, y2, places, k[2], stride_yk, valid, num_codes, RAGGED)
        store_tile(weights, y3, places, k[3], stride_yk, valid, num_codes, RAGGED)


def plan_fwd(
    logits: Tensor,
    codebook: Tensor | None,
    seed: Tensor,
    stats: Tensor,
    indices: Tensor,
    kl: Tensor | None,
    relaxed: Tensor | None,
    quantized: Tensor | None,
    *,
    tau: float,
    hard: bool,
    precision: str = "ieee",
    tiles: GumbelTiles | None = None,
    device: Device,
) -> Launch:
    """The launch of :func:`gumbel_fwd`, with the given tiles or those of the table."""
    width = 0 if codebook is None else codebook.shape[1]
    tiles = tiles or choose_tiles(FORWARD_TILES, device, logits.dtype, width)
    block_d = min(padded_width(width), tiles.width)
    arguments, constants = shape_arguments(logits, tiles)
    arguments |= {
        "logits": logits,
        "codebook": codebook,
        "seed": seed,
        "stats": stats,
        "indices": indices,
        "kl": kl,
        "relaxed": relaxed,
        "quantized": quantized,
        **view_strides("l", logits, "bkp"),
        **view_strides("c", codebook, "kd"),
        **view_strides("z", quantized, "bdp"),
        "unit": softmax_unit(tau),
        "log_codes": math.log(logits.shape[1]),
    }
    constants |= {"WIDTH": width, "BLOCK_D": block_d, "HARD": hard, "PRECISION": precision}
    grid = arguments["num_tiles"] * max(1, triton.cdiv(width, block_d))
    return Launch(_gumbel_fwd_kernel, grid, arguments, constants, tiles.options())


def gumbel_fwd(
    logits: Tensor,
    codebook: Tensor | None,
    seed: Tensor,
    stats: Tensor,
    indices: Tensor,
    kl: Tensor | None,
    relaxed: Tensor | None,
    quantized: Tensor | None,
    *,
    tau: float,
    hard: bool,
    precision: str = "ieee",
    tiles: GumbelTiles | None = None,
) -> None:
    """A relaxed sample of each position's codes, times the codebook.

    Args:
        logits: (B, K, P) float16, bfloat16 or float32, any strides. Row b * P + p of the noise is position p of b.
        codebook: (K, D) in logits' dtype, any strides; None for the statistics alone.
        seed: int64 of no dimensions, on logits' device; its 64 bits are the key.
        stats: (6, B * P) float32. Written: the maximum of logits + g and 1 / sum exp((logits + g - maximum) / tau);
            with kl, the maximum of the logits, 1 / sum exp(logits - maximum), the logarithm of that sum, sum q ln q.
        indices: (B * P) int64. Written: where logits + g is largest.
        kl: (B * P) float32, or None. Written, nats.
        relaxed: (B * P, D) float32, contiguous, or None. Written: z.
        quantized: (B, D, P) in logits' dtype, any strides, or None. Written: z, or with ``hard`` the row of the code.
        tau: > 0.
        precision: of products of float32 matrices: "ieee", or "tf32" or "tf32x3" for tensor cores.
        tiles: instead of those of the table.

    Raises:
        RuntimeError: bfloat16 in Triton's interpreter; tensors that are not on a CUDA device outside of it.
    """
    check_runnable(logits)
    plan_fwd(
        logits, codebook, seed, stats, indices, kl, relaxed, quantized,
        tau=tau, hard=hard, precision=precision, tiles=tiles, device=device_of(logits),
    ).run(logits.device)  # fmt: skip


def plan_weights(
    logits: Tensor,
    seed: Tensor,
    stats: Tensor,
    weights: Tensor,
    *,
    tau: float,
    tiles: GumbelTiles | None = None,
    num_shares: int | None = None,
    device: Device,
) -> Launch:
    """The launch of :func:`gumbel_weights`; what is not given follows from the sizes."""
    tiles = tiles or WEIGHTS_TILES
    arguments, constants = shape_arguments(logits, tiles)
    num_shares = num_shares or shares_of_codes(arguments["num_tiles"], logits.shape[1], device)
    arguments |= {
        "logits": logits,
        "seed": seed,
        "stats": stats,
        "weights": weights,
        **view_strides("l", logits, "bkp"),
        **view_strides("y", weights, "bkp"),
        "num_shares": num_shares,
        "unit": softmax_unit(tau),
    }
    grid = arguments["num_tiles"] * num_shares
    return Launch(_gumbel_weights_kernel, grid, arguments, constants, tiles.options())


def gumbel_weights(
    logits: Tensor,
    seed: Tensor,
    stats: Tensor,
    weights: Tensor,
    *,
    tau: float,
    tiles: GumbelTiles | None = None,
    num_shares: int | None = None,
) -> None:
    """The relaxed samples themselves, from the statistics of :func:`gumbel_fwd`.

    Args:
        logits, seed, stats, tau: as :func:`gumbel_fwd` had and left them.
        weights: (B, K, P) in logits' dtype, any strides. Written.
        tiles, num_shares: instead of those that the table and the sizes give.

    Raises:
        RuntimeError: as :func:`gumbel_fwd`.
    """
    check_runnable(logits)
    plan_weights(
        logits, seed, stats, weights, tau=tau, tiles=tiles, num_shares=num_shares, device=device_of(logits)
    ).run(logits.device)


def shipped_configs(device: Device = H200) -> list[Compilation]:
    """What the launches of :func:`gumbel_fwd` and :func:`gumbel_weights` compile, for ahead-of-time compilation."""
    found = []
    for name, layout, width, dtype, num_codes in shipped_shapes():
        tensors = shipped_tensors(layout, width, dtype, num_codes)
        launch = plan_fwd(**tensors, tau=1.0, hard=False, device=device)
        found.append(launch.compilation(f"gumbel_fwd-{name}"))
        if width == MOST_WIDTH:
            logits, seed, stats = (tensors[key] for key in ("logits", "seed", "stats"))
            launch = plan_weights(logits, seed, stats, logits, tau=1.0, device=device)
            found.append(launch.compilation(f"gumbel_weights-{name}"))
    return found
