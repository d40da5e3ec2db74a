"""Pattern attention, forward.

    out_i = sum_j p_ij v_j,   p_ij = exp(scale * q_i . k_j - lse_i),   lse_i = ln sum_j exp(scale * q_i . k_j)

over the keys j that query i sees; out_i = 0 and lse_i = -inf if there are none.

One pass, one program for BLOCK_M queries of a head. It reads its queries once, text keys and values BLOCK_N at a time
and those of the tile's window (common.py) BLOCK_W at a time, keeps a running maximum, sum and output (online softmax)
and writes out and lse. Image queries see all of the text: that part, 80% of the pairs of row attention at the paper's
size, is a dense product without a mask. Text among text, the rest of a text that is no multiple of BLOCK_N, and most
windows are masked. 4 * head_dim operations a pair; scores, softmax, sums and lse are float32, p is rounded to the
dtype of the values for its product.

Keys of a window are read where they are, whatever its shape: a row of head_dim = 64 16-bit elements is one 128-byte
line, so a column costs no more to read than a row. All offsets are 64-bit.

Source: arXiv 2102.12092, appendix B.1 and Figure 11 (the patterns); FlashAttention-2 (arXiv 2307.08691), algorithm 1.
Limits: head_dim 1..256, the last dimension of every tensor contiguous.
"""

import torch
import triton
import triton.language as tl
from dalle_fast.kernels.common import (
    H200,
    LN_2,
    LOG2_E,
    ROW_RASTER,
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
    exp_scores,
    load_rows,
    num_image_tiles,
    packed_tensors,
    padded_head_dim,
    query_tile,
    score_unit,
    store_rows,
    strides,
    text_keys,
    tile_geometry,
    tile_window,
    visible,
    visible_text_len,
    window_lanes,
)
from torch import Tensor

# A scale of 0 would make NaN of a masked score, -inf; this one makes the same 0 of every other.
SMALLEST_SCALE = 1e-30

# Chosen by what the compilers make of them (Triton 3.6 and 3.9; every pattern of SHIPPED_PATTERNS at head size 64 on
# generation 9, row-32 and conv-64 otherwise), not by time: no row was measured on a GPU. The largest tiles that do not
# spill in either version, and of these what leaves room for most programs on a multiprocessor: at head size 64 on
# generation 9 four of 128 registers, where windows of 64 take 150 to 210 and leave two or three. A bound above what is
# needed keeps ptxas from spilling a few registers for a rounder number of them. Eight warps have 128 queries on
# generation 9: with 64, both groups of four would compute all scores. float32 takes no tensor cores, and small tiles,
# because a thread holds whole rows of the factors.
TILES: TileTable = {
    (8, 2, 16): (Tiles(64, 64, 32, 4, 2, max_registers=128), 6144),
    (8, 2, 32): (Tiles(64, 64, 32, 4, 2), 12288),
    (8, 2, 64): (Tiles(64, 64, 32, 4, 2), 24576),
    (8, 2, 128): (Tiles(64, 64, 32, 8, 2), 57344),
    (8, 2, 256): (Tiles(64, 32, 32, 8, 2), 69632),
    (9, 2, 16): (Tiles(64, 64, 32, 4, 2), 10240),
    (9, 2, 32): (Tiles(64, 64, 32, 4, 2), 20480),
    (9, 2, 64): (Tiles(64, 64, 32, 4, 2, max_registers=128), 40960),
    (9, 2, 128): (Tiles(64, 64, 32, 4, 2), 81920),
    (9, 2, 256): (Tiles(128, 32, 32, 8, 2), 131072),
    (10, 2, 16): (Tiles(64, 64, 32, 4, 2, max_registers=128), 10272),
    (10, 2, 32): (Tiles(64, 64, 32, 4, 2), 20512),
    (10, 2, 64): (Tiles(64, 64, 32, 4, 2), 40992),
    (10, 2, 128): (Tiles(64, 64, 32, 4, 2), 81952),
    (10, 2, 256): (Tiles(64, 32, 32, 8, 2), 98848),
    **{(generation, 4, 16): (Tiles(32, 32, 32, 4, 2), 10368) for generation in (8, 9, 10)},
    **{(generation, 4, 32): (Tiles(32, 32, 32, 4, 2), 16384) for generation in (8, 9, 10)},
    **{(generation, 4, 64): (Tiles(32, 32, 32, 4, 2), 28800) for generation in (8, 9, 10)},
    **{(generation, 4, 128): (Tiles(32, 16, 16, 8, 2), 34944) for generation in (8, 9, 10)},
    **{(generation, 4, 256): (Tiles(32, 16, 16, 8, 1), 65536) for generation in (8, 9, 10)},
}


@triton.jit
def attend(q, k, v, acc, m, total, seen, unit, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax; m is the running maximum of the scores in ``unit``."""
    NATURAL: tl.constexpr = q.dtype == tl.float32
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1) * unit)
    base = m_new
    if MASKED:
        # A query that has seen no key yet: exp(-inf - 0), not exp(-inf + inf). A large finite mask value would not do:
        # fused, its product is not rounded as m_new was, and the difference could be anything.
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
    rescale = tl.exp2((m - base) * LOG2_E) if NATURAL else tl.exp2(m - base)
    p = exp_scores(scores, unit, base[:, None], NATURAL)
    total = total * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, m_new, total


@triton.jit
def _attend_window(
    q, acc, m, total, lanes, key, value, stride_ks, stride_vs, unit, tile, window, begin, end, num_image,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
    GEOMETRY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps begin..end of an image tile's window."""
    for step in range(begin, end):
        n_k, row_k, col_k, inside = window_lanes(
            tile, step, tl.arange(0, BLOCK_W), window, num_image, BLOCK_W, GEOMETRY, False
        )
        k = load_rows(key, GEOMETRY.text_len + n_k, stride_ks, 1, inside, HEAD_DIM, BLOCK_D, MASKED)
        v = load_rows(value, GEOMETRY.text_len + n_k, stride_vs, 1, inside, HEAD_DIM, BLOCK_D, MASKED)
        seen = inside[None, :] & visible(
            lanes[0][:, None], lanes[1][:, None], lanes[2][:, None],
            n_k[None, :], row_k[None, :], col_k[None, :], GEOMETRY,
        )  # fmt: skip
        acc, m, total = attend(q, k, v, acc, m, total, seen, unit, MASKED, PRECISION)
    return acc, m, total


@triton.jit(do_not_specialize=["length", "num_tiles", "image_tiles"])
def _attention_fwd_kernel(
    query, key, value, out, lse, text_lens,
    stride_text_lens,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os,
    num_heads, group, length, num_tiles, image_tiles, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    GEOMETRY: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    NATURAL: tl.constexpr = query.dtype.element_ty == tl.float32
    # The tiles of a head are neighbours, so that its keys stay in L2.
    pid = tl.program_id(0)
    pid_head = pid // num_tiles
    b = (pid_head // num_heads).to(tl.int64)
    h = (pid_head % num_heads).to(tl.int64)
    query += b * stride_qb + h * stride_qh
    key += b * stride_kb + h // group * stride_kh
    value += b * stride_vb + h // group * stride_vh
    out += b * stride_ob + h * stride_oh
    lse += pid_head.to(tl.int64) * length
    tile, is_image, start_m, lanes, position, valid = query_tile(
        pid % num_tiles, num_tiles, image_tiles, length, BLOCK_M, GEOMETRY
    )

    q = load_rows(query, position, stride_qs, 1, valid, HEAD_DIM, BLOCK_D, True)
    if NEGATIVE:
        q = -q
    unit = score_unit(scale, NATURAL)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    text_len = visible_text_len(text_lens, b * stride_text_lens, GEOMETRY.text_len)
    dense_stop, text_stop = text_keys(start_m, length, text_len, BLOCK_M, BLOCK_N)
    for start_n in range(0, dense_stop, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(key, offs_n, stride_ks, 1, None, HEAD_DIM, BLOCK_D, False)
        v = load_rows(value, offs_n, stride_vs, 1, None, HEAD_DIM, BLOCK_D, False)
        acc, m, total = attend(q, k, v, acc, m, total, None, unit, False, PRECISION)
    for start_n in range(dense_stop, text_stop, BLOCK_W):
        offs_n = start_n + tl.arange(0, BLOCK_W)
        inside = offs_n < text_stop
        k = load_rows(key, offs_n, stride_ks, 1, inside, HEAD_DIM, BLOCK_D, True)
        v = load_rows(value, offs_n, stride_vs, 1, inside, HEAD_DIM, BLOCK_D, True)
        seen = (position[:, None] >= offs_n[None, :]) & inside[None, :]
        acc, m, total = attend(q, k, v, acc, m, total, seen, unit, True, PRECISION)

    num_image = length - GEOMETRY.text_len
    window, dense_begin, dense_end, steps = tile_window(tile, num_image, BLOCK_M, BLOCK_W, GEOMETRY, False)
    dense_begin = tl.where(is_image, dense_begin, 0)
    dense_end = tl.where(is_image, dense_end, 0)
    steps = tl.where(is_image, steps, 0)
    if GEOMETRY.dense:
        if GEOMETRY.rule == ROW_RASTER:
            acc, m, total = _attend_window(
                q, acc, m, total, lanes, key, value, stride_ks, stride_vs, unit,
                tile, window, 0, dense_begin, num_image,
                True, HEAD_DIM, BLOCK_D, BLOCK_W, GEOMETRY, PRECISION,
            )  # fmt: skip
        acc, m, total = _attend_window(
            q, acc, m, total, lanes, key, value, stride_ks, stride_vs, unit,
            tile, window, dense_begin, dense_end, num_image,
            False, HEAD_DIM, BLOCK_D, BLOCK_W, GEOMETRY, PRECISION,
        )  # fmt: skip
    acc, m, total = _attend_window(
        q, acc, m, total, lanes, key, value, stride_ks, stride_vs, unit,
        tile, window, dense_end, steps, num_image,
        True, HEAD_DIM, BLOCK_D, BLOCK_W, GEOMETRY, PRECISION,
    )  # fmt: skip

    # A query that saw nothing has total 0 and m -inf: out 0, lse -inf.
    total = tl.where(total == 0.0, 1.0, total)
    store_rows(out, acc / total[:, None], position, stride_os, valid, HEAD_DIM, BLOCK_D)
    natural_lse = m + tl.log2(total) * LN_2 if NATURAL else (m + tl.log2(total)) * LN_2
    tl.store(lse + position, natural_lse, mask=valid)


def plan_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    pattern: tuple[int, ...],
    text_lens: Tensor | None,
    scale: float,
    precision: str = "ieee",
    tiles: Tiles | None = None,
    device: Device,
) -> Launch:
    """The launch of :func:`attention_fwd`, with the given tiles or those of the table."""
    batch, num_heads, length, head_dim = query.shape
    tiles = tiles or choose_tiles(TILES, device, query.dtype, head_dim)
    geometry = tile_geometry(pattern, tiles.block, tiles.window_step)
    image_tiles = num_image_tiles(max(length - pattern[1], 0), tiles.block, geometry)
    num_tiles = image_tiles + triton.cdiv(min(length, pattern[1]), tiles.block)
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "out": out,
        "lse": lse,
        "text_lens": text_lens,
        "stride_text_lens": 0 if text_lens is None else text_lens.stride(0),
        **strides("q", query),
        **strides("k", key),
        **strides("v", value),
        **strides("o", out),
        "num_heads": num_heads,
        "group": num_heads // key.shape[1],
        "length": length,
        "num_tiles": num_tiles,
        "image_tiles": image_tiles,
        "scale": max(abs(scale), SMALLEST_SCALE),
    }
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "BLOCK_M": tiles.block,
        "BLOCK_N": tiles.step,
        "BLOCK_W": tiles.window_step,
        "GEOMETRY": geometry,
        "NEGATIVE": scale < 0,
        "PRECISION": precision,
    }
    grid = num_tiles * batch * num_heads
    return Launch(_attention_fwd_kernel, grid, arguments, constants, compiler_options(tiles))


def attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    pattern: tuple[int, ...],
    text_lens: Tensor | None,
    scale: float,
    precision: str = "ieee",
    tiles: Tiles | None = None,
) -> None:
    """Attention of every query to the keys that the pattern shows it, written to ``out`` and ``lse``.

    Args:
        query: (B, H, S, D) float16, bfloat16 or float32, with any strides but the last, which is 1.
        key, value: (B, H / n, S, D), likewise; n query heads in a row share a key head.
        out: (B, H, S, D) in query's dtype, likewise. Written.
        lse: (B, H, S) float32, contiguous. Written: the natural logarithm of the softmax's denominator.
        pattern: a pattern's ``code``; S is 1..text_len + height * width.
        text_lens: (B,) integers, or None. Text keys at or past text_lens[b] are hidden; values outside
            0..text_len act as the nearest inside.
        scale: factor of the scores.
        precision: of products of float32 matrices: "ieee", or "tf32" or "tf32x3" for tensor cores.
        tiles: instead of those of the table.

    Raises:
        RuntimeError: bfloat16 in Triton's interpreter; tensors that are not on a CUDA device outside of it.
    """
    check_runnable(query)
    plan_fwd(
        query, key, value, out, lse,
        pattern=pattern, text_lens=text_lens, scale=scale, precision=precision, tiles=tiles, device=device_of(query),
    ).run(query.device)  # fmt: skip


def shipped_configs(
    head_dims: tuple[int, ...] = SHIPPED_HEAD_DIMS,
    dtypes: tuple[torch.dtype, ...] = SHIPPED_DTYPES,
    device: Device = H200,
) -> list[Compilation]:
    """What the launches of :func:`attention_fwd` compile, for ahead-of-time compilation.

    Every pattern of ``SHIPPED_PATTERNS`` with every head size and dtype, on packed projections; the paper's row
    attention also with text_lens.
    """
    found = []
    for name, pattern in SHIPPED_PATTERNS.items():
        for head_dim in head_dims:
            for dtype in dtypes:
                query, key, value, out = packed_tensors(pattern, head_dim, dtype)
                lse = torch.empty(query.shape[:3], dtype=torch.float32, device="meta")
                text_lens = torch.empty(query.shape[0], dtype=torch.int64, device="meta")
                for suffix, lens in {"": None, "-text_lens": text_lens}.items():
                    if lens is not None and name != "row-32":
                        continue
                    launch = plan_fwd(
                        query, key, value, out, lse, pattern=pattern, text_lens=lens, scale=1.0, device=device
                    )
                    dtype_name = str(dtype).removeprefix("torch.")
                    found.append(launch.compilation(f"attention_fwd-{name}-{head_dim}-{dtype_name}{suffix}"))
    return found
