"""Pattern attention, backward.

    p_ij = exp(scale * q_i . k_j - lse_i)
    dv_j = sum_i p_ij do_i
    ds_ij = p_ij (do_i . v_j - delta_i),   delta_i = o_i . do_i - dlse_i
    dq_i = scale * sum_j ds_ij k_j,        dk_j = scale * sum_i ds_ij q_i

Two passes, each recomputing p from what the forward pass kept, (q, k, v, o, lse), and without atomics, so that equal
inputs give equal bits:

    dq      one program for BLOCK_M queries of a head, with the loops of the forward pass. Reads o and do once, keys and
            values as they come; writes dq, and for the other pass (lse, delta), 8 bytes a query.
    dk, dv  one program for BLOCK_N keys of a key head. A tile of image keys walks over its window of later queries; a
            tile of text keys over all later queries, of which only those in the tile's own rows need a mask. Query
            heads that share the key head are walked over one after another. Where that makes too few programs to
            fill the device, the queries of text keys are cut into num_splits shares, whose sums go to float32
            buffers and are added up, in their order, by a third kernel.

Seven products of S x keys x head_dim in all: three for dq, four for dk and dv, which are computed as keys by queries,
so that no p or ds has to be transposed. Sums, p, ds before it is rounded for its product, lse and delta are float32.
Source: FlashAttention-2 (arXiv 2307.08691), appendix B.2.
"""

import torch
import triton
import triton.language as tl
from dalle_fast.kernels.common import (
    H200,
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
    text_queries,
    tile_geometry,
    tile_lanes,
    tile_window,
    visible,
    visible_text_len,
    window_lanes,
)
from torch import Tensor

# Rows of text keys that one program of the third kernel adds up.
SUM_ROWS = 16

# Chosen as the forward pass's (attention_forward.py), by the compilers' figures, and measured on no GPU either. At head
# size 64 on generation 9 three programs of 168 registers fit for dq, and two of 232 to 254 for dk and dv, which keep
# four blocks of sums and products at a time. At 128 the two groups of warps of dk and dv both compute the scores, for 6
# units of work where 4 would do: 128 keys, or 64 for four warps, spill in Triton 3.6, and steps of 16 queries, which do
# not, take the tensor cores as long. At 256 tiles of 64 keys spill, and those of 32 take mma instead of wgmma.
DQ_TILES: TileTable = {
    (8, 2, 16): (Tiles(64, 64, 32, 4, 2), 8192),
    (8, 2, 32): (Tiles(64, 64, 32, 4, 2), 16384),
    (8, 2, 64): (Tiles(64, 64, 32, 4, 2), 32768),
    (8, 2, 128): (Tiles(64, 32, 32, 8, 2), 53248),
    (8, 2, 256): (Tiles(32, 32, 32, 8, 2), 67584),
    (9, 2, 16): (Tiles(64, 64, 32, 4, 2), 12288),
    (9, 2, 32): (Tiles(64, 64, 32, 4, 2), 24576),
    (9, 2, 64): (Tiles(64, 64, 32, 4, 2, max_registers=168), 49152),
    (9, 2, 128): (Tiles(64, 32, 32, 4, 2), 65536),
    (9, 2, 256): (Tiles(128, 32, 32, 8, 2), 196608),
    (10, 2, 16): (Tiles(64, 64, 32, 4, 2), 14384),
    (10, 2, 32): (Tiles(64, 64, 32, 4, 2), 28720),
    (10, 2, 64): (Tiles(64, 64, 32, 4, 2), 57392),
    (10, 2, 128): (Tiles(64, 32, 32, 4, 2), 74752),
    (10, 2, 256): (Tiles(64, 16, 16, 8, 2), 106544),
    **{(generation, 4, 16): (Tiles(32, 32, 32, 4, 2), 12288) for generation in (8, 9, 10)},
    **{(generation, 4, 32): (Tiles(32, 32, 32, 4, 2), 20480) for generation in (8, 9, 10)},
    **{(generation, 4, 64): (Tiles(32, 32, 16, 4, 2), 36864) for generation in (8, 9, 10)},
    **{(generation, 4, 128): (Tiles(16, 16, 16, 4, 2), 33792) for generation in (8, 9, 10)},
    **{(generation, 4, 256): (Tiles(16, 16, 16, 8, 2), 66560) for generation in (8, 9, 10)},
}
DKDV_TILES: TileTable = {
    (8, 2, 16): (Tiles(64, 64, 32, 4, 2), 8704),
    (8, 2, 32): (Tiles(64, 32, 32, 4, 2, max_registers=168), 12544),
    (8, 2, 64): (Tiles(64, 32, 32, 8, 2), 24832),
    (8, 2, 128): (Tiles(64, 32, 32, 8, 2), 53504),
    (8, 2, 256): (Tiles(32, 32, 32, 8, 2), 67840),
    (9, 2, 16): (Tiles(64, 64, 32, 4, 2), 12800),
    (9, 2, 32): (Tiles(64, 64, 32, 4, 2), 25088),
    (9, 2, 64): (Tiles(64, 64, 32, 4, 2), 50176),
    (9, 2, 128): (Tiles(64, 32, 32, 8, 2), 65792),
    (9, 2, 256): (Tiles(32, 32, 32, 8, 2), 67840),
    (10, 2, 16): (Tiles(64, 64, 32, 4, 2), 17152),
    (10, 2, 32): (Tiles(64, 64, 32, 4, 2), 33792),
    (10, 2, 64): (Tiles(64, 64, 32, 4, 2), 66560),
    (10, 2, 128): (Tiles(64, 32, 32, 4, 2), 82944),
    (10, 2, 256): (Tiles(32, 32, 32, 8, 2), 67840),
    **{(generation, 4, 16): (Tiles(32, 32, 32, 8, 2), 12544) for generation in (8, 9, 10)},
    **{(generation, 4, 32): (Tiles(32, 32, 32, 8, 2), 20736) for generation in (8, 9, 10)},
    **{(generation, 4, 64): (Tiles(32, 16, 16, 4, 2), 26752) for generation in (8, 9, 10)},
    **{(generation, 4, 128): (Tiles(16, 16, 16, 8, 2), 33920) for generation in (8, 9, 10)},
    **{(generation, 4, 256): (Tiles(16, 16, 16, 8, 1), 66560) for generation in (8, 9, 10)},
}


@triton.jit
def _dq_step(q, do, k, v, dq, lse, delta, seen, unit, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = exp_scores(scores, unit, lse[:, None], q.dtype == tl.float32)
    if MASKED:
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _dq_window(
    q, do, dq, lse, delta, lanes, key, value, stride_ks, stride_vs, unit,
    tile, window, begin, end, num_image,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
    GEOMETRY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps begin..end of the window of a tile of queries."""
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
        dq = _dq_step(q, do, k, v, dq, lse, delta, seen, unit, MASKED, PRECISION)
    return dq


@triton.jit(do_not_specialize=["length", "num_tiles", "image_tiles"])
def _attention_dq_kernel(
    query, key, value, out, lse, grad_out, grad_lse, grad_query, stats, text_lens,
    stride_text_lens,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_os,
    stride_dob, stride_doh, stride_dos, stride_dod,
    stride_dqb, stride_dqh, stride_dqs,
    num_heads, group, length, num_tiles, image_tiles, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    GEOMETRY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    NATURAL: tl.constexpr = query.dtype.element_ty == tl.float32
    pid = tl.program_id(0)
    pid_head = pid // num_tiles
    b = (pid_head // num_heads).to(tl.int64)
    h = (pid_head % num_heads).to(tl.int64)
    query += b * stride_qb + h * stride_qh
    key += b * stride_kb + h // group * stride_kh
    value += b * stride_vb + h // group * stride_vh
    out += b * stride_ob + h * stride_oh
    grad_out += b * stride_dob + h * stride_doh
    grad_query += b * stride_dqb + h * stride_dqh
    row = pid_head.to(tl.int64) * length
    tile, is_image, start_m, lanes, position, valid = query_tile(
        pid % num_tiles, num_tiles, image_tiles, length, BLOCK_M, GEOMETRY
    )

    do = load_rows(grad_out, position, stride_dos, stride_dod, valid, HEAD_DIM, BLOCK_D, True)
    o = load_rows(out, position, stride_os, 1, valid, HEAD_DIM, BLOCK_D, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + row + position, mask=valid, other=0.0)
    row_lse = tl.load(lse + row + position, mask=valid, other=0.0)
    if not NATURAL:
        row_lse = row_lse * LOG2_E
    tl.store(stats + 2 * (row + position), row_lse, mask=valid)
    tl.store(stats + 2 * (row + position) + 1, delta, mask=valid)
    q = load_rows(query, position, stride_qs, 1, valid, HEAD_DIM, BLOCK_D, True)
    unit = score_unit(scale, NATURAL)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    text_len = visible_text_len(text_lens, b * stride_text_lens, GEOMETRY.text_len)
    dense_stop, text_stop = text_keys(start_m, length, text_len, BLOCK_M, BLOCK_N)
    for start_n in range(0, dense_stop, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(key, offs_n, stride_ks, 1, None, HEAD_DIM, BLOCK_D, False)
        v = load_rows(value, offs_n, stride_vs, 1, None, HEAD_DIM, BLOCK_D, False)
        dq = _dq_step(q, do, k, v, dq, row_lse, delta, None, unit, False, PRECISION)
    for start_n in range(dense_stop, text_stop, BLOCK_W):
        offs_n = start_n + tl.arange(0, BLOCK_W)
        inside = offs_n < text_stop
        k = load_rows(key, offs_n, stride_ks, 1, inside, HEAD_DIM, BLOCK_D, True)
        v = load_rows(value, offs_n, stride_vs, 1, inside, HEAD_DIM, BLOCK_D, True)
        seen = (position[:, None] >= offs_n[None, :]) & inside[None, :]
        dq = _dq_step(q, do, k, v, dq, row_lse, delta, seen, unit, True, PRECISION)

    num_image = length - GEOMETRY.text_len
    window, dense_begin, dense_end, steps = tile_window(tile, num_image, BLOCK_M, BLOCK_W, GEOMETRY, False)
    dense_begin = tl.where(is_image, dense_begin, 0)
    dense_end = tl.where(is_image, dense_end, 0)
    steps = tl.where(is_image, steps, 0)
    if GEOMETRY.dense:
        if GEOMETRY.rule == ROW_RASTER:
            dq = _dq_window(
                q, do, dq, row_lse, delta, lanes, key, value, stride_ks, stride_vs, unit,
                tile, window, 0, dense_begin, num_image,
                True, HEAD_DIM, BLOCK_D, BLOCK_W, GEOMETRY, PRECISION,
            )  # fmt: skip
        dq = _dq_window(
            q, do, dq, row_lse, delta, lanes, key, value, stride_ks, stride_vs, unit,
            tile, window, dense_begin, dense_end, num_image,
            False, HEAD_DIM, BLOCK_D, BLOCK_W, GEOMETRY, PRECISION,
        )  # fmt: skip
    dq = _dq_window(
        q, do, dq, row_lse, delta, lanes, key, value, stride_ks, stride_vs, unit,
        tile, window, dense_end, steps, num_image,
        True, HEAD_DIM, BLOCK_D, BLOCK_W, GEOMETRY, PRECISION,
    )  # fmt: skip
    store_rows(grad_query, dq * scale, position, stride_dqs, valid, HEAD_DIM, BLOCK_D)


@triton.jit
def _dkdv_step(
    k, v, dk, dv, query, grad_out, stats, q_head, position, inside, seen, length,
    stride_qh, stride_qs, stride_doh, stride_dos, stride_dod, unit,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys by queries of one head. A query that is not inside counts as zeros: its p = 1 meets do = 0 and delta = 0."""
    q = load_rows(query + q_head * stride_qh, position, stride_qs, 1, inside, HEAD_DIM, BLOCK_D, True)
    do = load_rows(grad_out + q_head * stride_doh, position, stride_dos, stride_dod, inside, HEAD_DIM, BLOCK_D, True)
    # As pairs these are wide enough a load to be copied ahead like q and do. As two vectors Triton 3.6 has each thread
    # of the product's layout copy its 16 elements of both: 200 copies instead of 60 in the whole kernel.
    pairs = 2 * (q_head * length + position.to(tl.int64))[:, None] + tl.arange(0, 2)[None, :]
    lse, delta = tl.split(tl.load(stats + pairs, mask=inside[:, None], other=0.0))
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    p = exp_scores(scores, unit, lse[None, :], q.dtype == tl.float32)
    if MASKED:
        p = tl.where(seen, p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _dkdv_text(
    k, v, dk, dv, position, query, grad_out, stats, first_head, length,
    stride_qh, stride_qs, stride_doh, stride_dos, stride_dod, unit, start, begin, end,
    MASKED: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps begin..end over the queries from ``start`` on, each for every head of the group."""
    for index in range(GROUP * begin, GROUP * end):
        offs_m = start + index // GROUP * BLOCK_M + tl.arange(0, BLOCK_M)
        dk, dv = _dkdv_step(
            k, v, dk, dv, query, grad_out, stats, first_head + index % GROUP,
            offs_m, offs_m < length, offs_m[None, :] >= position[:, None], length,
            stride_qh, stride_qs, stride_doh, stride_dos, stride_dod, unit, MASKED, HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
    return dk, dv


@triton.jit
def _dkdv_window(
    k, v, dk, dv, lanes, query, grad_out, stats, first_head, length,
    stride_qh, stride_qs, stride_doh, stride_dos, stride_dod, unit, tile, window, begin, end,
    MASKED: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
    GEOMETRY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps begin..end of the window of a tile of keys, each for every head of the group."""
    for index in range(GROUP * begin, GROUP * end):
        n_q, row_q, col_q, inside = window_lanes(
            tile, index // GROUP, tl.arange(0, BLOCK_W), window, length - GEOMETRY.text_len, BLOCK_W, GEOMETRY, True
        )
        seen = inside[None, :] & visible(
            n_q[None, :], row_q[None, :], col_q[None, :],
            lanes[0][:, None], lanes[1][:, None], lanes[2][:, None], GEOMETRY,
        )  # fmt: skip
        dk, dv = _dkdv_step(
            k, v, dk, dv, query, grad_out, stats, first_head + index % GROUP,
            GEOMETRY.text_len + n_q, inside, seen, length,
            stride_qh, stride_qs, stride_doh, stride_dos, stride_dod, unit, MASKED, HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=["length", "num_tiles", "image_tiles", "num_splits"])
def _attention_dkdv_kernel(
    query, key, value, grad_out, stats, grad_key, grad_value, partial_key, partial_value, text_lens,
    stride_text_lens,
    stride_qb, stride_qh, stride_qs,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_dob, stride_doh, stride_dos, stride_dod,
    stride_dkb, stride_dkh, stride_dks,
    stride_dvb, stride_dvh, stride_dvs,
    stride_pn, stride_ph,
    num_key_heads, length, num_tiles, image_tiles, num_splits, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    GEOMETRY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    NATURAL: tl.constexpr = query.dtype.element_ty == tl.float32
    TEXT_LEN: tl.constexpr = GEOMETRY.text_len
    pid = tl.program_id(0)
    pid_tile = pid % num_tiles
    pid_head = pid // num_tiles
    b = (pid_head // num_key_heads).to(tl.int64)
    h = (pid_head % num_key_heads).to(tl.int64)
    key += b * stride_kb + h * stride_kh
    value += b * stride_vb + h * stride_vh

    # Text keys, which have the most queries, come first, and the shares of a tile are neighbours.
    text_programs = num_tiles - image_tiles
    is_text = pid_tile < text_programs
    start_n = tl.where(is_text, pid_tile // num_splits * BLOCK_N, TEXT_LEN)
    split = pid_tile % num_splits
    tile = max(pid_tile - text_programs, 0)
    offs_n = tl.arange(0, BLOCK_N)
    num_image = length - TEXT_LEN
    n_k, row_k, col_k, valid = tile_lanes(tile, offs_n, num_image, BLOCK_N, GEOMETRY)
    position = tl.where(is_text, start_n + offs_n, TEXT_LEN + n_k)
    valid = tl.where(is_text, start_n + offs_n < min(TEXT_LEN, length), valid)
    text_len = visible_text_len(text_lens, b * stride_text_lens, TEXT_LEN)
    shown = valid & ((position >= TEXT_LEN) | (position < text_len))

    k = load_rows(key, position, stride_ks, 1, shown, HEAD_DIM, BLOCK_D, True)
    v = load_rows(value, position, stride_vs, 1, shown, HEAD_DIM, BLOCK_D, True)
    unit = score_unit(scale, NATURAL)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    first, causal_stop, last = text_queries(start_n, length, text_len, split, num_splits, BLOCK_N, BLOCK_M)
    window, dense_begin, dense_end, steps = tile_window(tile, num_image, BLOCK_N, BLOCK_W, GEOMETRY, True)
    dense_begin = tl.where(is_text, 0, dense_begin)
    dense_end = tl.where(is_text, 0, dense_end)
    steps = tl.where(is_text, 0, steps)

    query += b * stride_qb
    grad_out += b * stride_dob
    stats += 2 * b * num_key_heads * GROUP * length
    first_head = h * GROUP
    dk, dv = _dkdv_text(
        k, v, dk, dv, position, query, grad_out, stats, first_head, length,
        stride_qh, stride_qs, stride_doh, stride_dos, stride_dod, unit, start_n, first, causal_stop,
        True, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M, PRECISION,
    )  # fmt: skip
    dk, dv = _dkdv_text(
        k, v, dk, dv, position, query, grad_out, stats, first_head, length,
        stride_qh, stride_qs, stride_doh, stride_dos, stride_dod, unit, start_n, causal_stop, last,
        False, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M, PRECISION,
    )  # fmt: skip
    if GEOMETRY.dense:
        dk, dv = _dkdv_window(
            k, v, dk, dv, (n_k, row_k, col_k), query, grad_out, stats, first_head, length,
            stride_qh, stride_qs, stride_doh, stride_dos, stride_dod, unit, tile, window, 0, dense_begin,
            True, GROUP, HEAD_DIM, BLOCK_D, BLOCK_W, GEOMETRY, PRECISION,
        )  # fmt: skip
        dk, dv = _dkdv_window(
            k, v, dk, dv, (n_k, row_k, col_k), query, grad_out, stats, first_head, length,
            stride_qh, stride_qs, stride_doh, stride_dos, stride_dod, unit, tile, window, dense_begin, dense_end,
            False, GROUP, HEAD_DIM, BLOCK_D, BLOCK_W, GEOMETRY, PRECISION,
        )  # fmt: skip
    if GEOMETRY.dense == 0 or GEOMETRY.rule == ROW_RASTER:
        dk, dv = _dkdv_window(
            k, v, dk, dv, (n_k, row_k, col_k), query, grad_out, stats, first_head, length,
            stride_qh, stride_qs, stride_doh, stride_dos, stride_dod, unit, tile, window, dense_end, steps,
            True, GROUP, HEAD_DIM, BLOCK_D, BLOCK_W, GEOMETRY, PRECISION,
        )  # fmt: skip

    # What a hidden key gathered is of no key, and maybe not finite.
    dk = tl.where(shown[:, None], dk * scale, 0.0)
    dv = tl.where(shown[:, None], dv, 0.0)
    if partial_key is not None:
        rows = split.to(tl.int64) * stride_pn + pid_head.to(tl.int64) * stride_ph
        is_share = valid & (position < TEXT_LEN)
        store_rows(partial_key + rows, dk, position, HEAD_DIM, is_share, HEAD_DIM, BLOCK_D)
        store_rows(partial_value + rows, dv, position, HEAD_DIM, is_share, HEAD_DIM, BLOCK_D)
        valid = valid & (position >= TEXT_LEN)
    store_rows(grad_key + b * stride_dkb + h * stride_dkh, dk, position, stride_dks, valid, HEAD_DIM, BLOCK_D)
    store_rows(grad_value + b * stride_dvb + h * stride_dvh, dv, position, stride_dvs, valid, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["num_rows", "num_tiles", "num_splits"])
def _attention_sum_splits_kernel(
    partial_key, partial_value, grad_key, grad_value,
    stride_dkb, stride_dkh, stride_dks,
    stride_dvb, stride_dvh, stride_dvs,
    stride_pn, stride_ph,
    num_key_heads, num_rows, num_tiles, num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    pid_head = pid // num_tiles
    b = (pid_head // num_key_heads).to(tl.int64)
    h = (pid_head % num_key_heads).to(tl.int64)
    partial_key += pid_head.to(tl.int64) * stride_ph
    partial_value += pid_head.to(tl.int64) * stride_ph
    position = pid % num_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = position < num_rows
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for _ in range(num_splits):
        dk += load_rows(partial_key, position, HEAD_DIM, 1, valid, HEAD_DIM, BLOCK_D, True)
        dv += load_rows(partial_value, position, HEAD_DIM, 1, valid, HEAD_DIM, BLOCK_D, True)
        partial_key += stride_pn
        partial_value += stride_pn
    store_rows(grad_key + b * stride_dkb + h * stride_dkh, dk, position, stride_dks, valid, HEAD_DIM, BLOCK_D)
    store_rows(grad_value + b * stride_dvb + h * stride_dvh, dv, position, stride_dvs, valid, HEAD_DIM, BLOCK_D)


def plan_bwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    *,
    pattern: tuple[int, ...],
    text_lens: Tensor | None,
    scale: float,
    precision: str = "ieee",
    dq_tiles: Tiles | None = None,
    dkdv_tiles: Tiles | None = None,
    num_splits: int | None = None,
    device: Device,
) -> list[Launch]:
    """The launches of :func:`attention_bwd`, in their order; what is not given comes from the tables."""
    batch, num_heads, length, head_dim = query.shape
    num_key_heads = key.shape[1]
    text_len = min(length, pattern[1])
    num_image = length - text_len
    shape = {"HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim)}
    inputs = {"query": query, "key": key, "value": value, "grad_out": grad_out, "text_lens": text_lens, "scale": scale}
    inputs["stride_text_lens"] = 0 if text_lens is None else text_lens.stride(0)
    stats = torch.empty(batch, num_heads, length, 2, dtype=torch.float32, device=query.device)
    input_strides = strides("q", query) | strides("k", key) | strides("v", value) | strides("do", grad_out, "bhsd")

    tiles = dq_tiles or choose_tiles(DQ_TILES, device, query.dtype, head_dim)
    geometry = tile_geometry(pattern, tiles.block, tiles.window_step)
    image_tiles = num_image_tiles(num_image, tiles.block, geometry)
    num_tiles = image_tiles + triton.cdiv(text_len, tiles.block)
    dq = Launch(
        kernel=_attention_dq_kernel,
        grid=num_tiles * batch * num_heads,
        arguments=inputs
        | input_strides
        | strides("o", out)
        | strides("dq", grad_query)
        | {"out": out, "lse": lse, "grad_lse": grad_lse, "grad_query": grad_query, "stats": stats}
        | {"num_heads": num_heads, "group": num_heads // num_key_heads}
        | {"length": length, "num_tiles": num_tiles, "image_tiles": image_tiles},
        constants=shape
        | {"BLOCK_M": tiles.block, "BLOCK_N": tiles.step, "BLOCK_W": tiles.window_step}
        | {"GEOMETRY": geometry, "PRECISION": precision},
        options=compiler_options(tiles),
    )

    tiles = dkdv_tiles or choose_tiles(DKDV_TILES, device, query.dtype, head_dim)
    geometry = tile_geometry(pattern, tiles.block, tiles.window_step)
    image_tiles = num_image_tiles(num_image, tiles.block, geometry)
    text_tiles = triton.cdiv(text_len, tiles.block)
    if num_splits is None:
        blocks = triton.cdiv(length, tiles.step)
        num_splits = _num_splits(batch * num_key_heads * text_tiles, blocks, device.num_sms)
    num_tiles = image_tiles + text_tiles * num_splits
    partials = [None, None]
    if num_splits > 1:
        size = (2, num_splits, batch, num_key_heads, text_len, head_dim)
        partials = torch.empty(size, dtype=torch.float32, device=query.device).unbind()
    outputs = {"grad_key": grad_key, "grad_value": grad_value} | strides("dk", grad_key) | strides("dv", grad_value)
    partial_head = text_len * head_dim
    shares = {
        **{"partial_key": partials[0], "partial_value": partials[1]},
        **{"stride_pn": batch * num_key_heads * partial_head, "stride_ph": partial_head},
        **{"num_key_heads": num_key_heads, "num_splits": num_splits},
    }
    dkdv = Launch(
        kernel=_attention_dkdv_kernel,
        grid=num_tiles * batch * num_key_heads,
        arguments=inputs
        | input_strides
        | outputs
        | shares
        | {"stats": stats, "length": length, "num_tiles": num_tiles, "image_tiles": image_tiles},
        constants=shape
        | {"BLOCK_M": tiles.step, "BLOCK_N": tiles.block, "BLOCK_W": tiles.window_step}
        | {"GROUP": num_heads // num_key_heads, "GEOMETRY": geometry, "PRECISION": precision},
        options=compiler_options(tiles),
    )
    if num_splits == 1:
        return [dq, dkdv]

    num_tiles = triton.cdiv(text_len, SUM_ROWS)
    sum_splits = Launch(
        kernel=_attention_sum_splits_kernel,
        grid=num_tiles * batch * num_key_heads,
        arguments=outputs | shares | {"num_rows": text_len, "num_tiles": num_tiles},
        constants=shape | {"BLOCK_N": SUM_ROWS},
        options={"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True},
    )
    return [dq, dkdv, sum_splits]


def _num_splits(programs: int, blocks: int, num_sms: int) -> int:
    """Shares of the queries of text keys: two programs a multiprocessor, and two blocks a share at least."""
    if programs == 0:
        return 1
    return max(1, min(2 * num_sms // programs, blocks // 2, 16))


def attention_bwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    *,
    pattern: tuple[int, ...],
    text_lens: Tensor | None,
    scale: float,
    precision: str = "ieee",
    dq_tiles: Tiles | None = None,
    dkdv_tiles: Tiles | None = None,
    num_splits: int | None = None,
) -> None:
    """Gradients of :func:`~dalle_fast.kernels.attention_forward.attention_fwd`, of out and of lse.

    Args:
        query, key, value, out, lse, pattern, text_lens, scale, precision: as the forward pass had and left them.
        grad_out: (B, H, S, D) in query's dtype, any strides, also 0.
        grad_lse: (B, H, S) float32, contiguous, or None.
        grad_query, grad_key, grad_value: like query, key and value; they may be views of one tensor. Written.
        dq_tiles, dkdv_tiles, num_splits: instead of those that the tables and the device give.

    Raises:
        RuntimeError: as the forward pass.
    """
    check_runnable(query)
    for launch in plan_bwd(
        query, key, value, out, lse, grad_out, grad_lse, grad_query, grad_key, grad_value,
        pattern=pattern, text_lens=text_lens, scale=scale, precision=precision,
        dq_tiles=dq_tiles, dkdv_tiles=dkdv_tiles, num_splits=num_splits, device=device_of(query),
    ):  # fmt: skip
        launch.run(query.device)


def shipped_configs(
    head_dims: tuple[int, ...] = SHIPPED_HEAD_DIMS,
    dtypes: tuple[torch.dtype, ...] = SHIPPED_DTYPES,
    device: Device = H200,
) -> list[Compilation]:
    """What the launches of :func:`attention_bwd` compile, for ahead-of-time compilation.

    Every pattern of ``SHIPPED_PATTERNS`` with every head size and dtype, on packed projections; the paper's row
    attention also with text_lens and a gradient of lse, with shared key heads, and with shares of queries.
    """
    found = []
    for name, pattern in SHIPPED_PATTERNS.items():
        for head_dim in head_dims:
            for dtype in dtypes:
                dtype_name = str(dtype).removeprefix("torch.")
                for variant in ("", "-text_lens", "-groups", "-splits") if name == "row-32" else ("",):
                    query, key, value, out = packed_tensors(pattern, head_dim, dtype, 4 if variant == "-groups" else 16)
                    lse = torch.empty(query.shape[:3], dtype=torch.float32, device="meta")
                    text_lens = torch.empty(query.shape[0], dtype=torch.int64, device="meta")
                    launches = plan_bwd(
                        query, key, value, out, lse, out, lse if variant == "-text_lens" else None, query, key, value,
                        pattern=pattern, text_lens=text_lens if variant == "-text_lens" else None, scale=1.0,
                        num_splits=4 if variant == "-splits" else 1, device=device,
                    )  # fmt: skip
                    for kernel, launch in zip(("dq", "dkdv", "sum"), launches, strict=False):
                        full_name = f"attention_{kernel}-{name}-{head_dim}-{dtype_name}{variant}"
                        found.append(launch.compilation(full_name))
    return found
