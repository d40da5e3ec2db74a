"""Gumbel-softmax quantisation, backward.

    dy = C dz     dl_k = y_k (dy_k - delta) / tau + dkl q_k (ln q_k - sum q ln q),   delta = dz . z
    dC = y^T dz

for the y, z and q of gumbel.py, which are made again from the seed and what the forward pass left of each position.

1. dl: programs of BLOCK_M positions, for few positions each with a share of the codes. It reads dz and z once a share,
   and step by step logits and rows of the codebook, and writes the gradient of the logits; each logit is read once and
   each gradient written once. Where the codebook has more than 128 columns, dz is read again for every step.
2. dcodebook: programs of 4 LANES codes, and of 128 columns at most, walk over the positions. The sums of the codes stay
   in registers and are written once; where the codes are too few for the device, the positions are cut into runs,
   whose sums, in float32, a third kernel adds up in a fixed order.

No atomics: the results are the same bits each time. Either of the two is left out where its gradient is not wanted. The
products are, as in the forward pass, of numbers of the logits' dtype, everything else is float32.
"""

import torch
import triton
import triton.language as tl
from dalle_fast.kernels.common import H200, LOG2_E, Compilation, Device, Launch, check_runnable, device_of
from dalle_fast.kernels.gumbel_tiles import (
    BLOCK_CODES,
    LARGEST,
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
    split_words,
    steps_of_share,
    store_tile,
    view_strides,
)
from torch import Tensor

SUM_ELEMENTS = 1024  # that one program of the third kernel adds up

# Chosen as the forward pass's, and measured on no GPU either.
DL_TILES: GumbelTable = {
    **{(generation, 2, width): (GumbelTiles(64, 16, width, 8, 2), 65536) for generation, width in TABLE_ROWS},
    **{(generation, 4, width): (GumbelTiles(32, 16, min(width, 32), 8, 2), 65536) for generation, width in TABLE_ROWS},
}
DCODEBOOK_TILES: GumbelTable = {
    **{(generation, 2, width): (GumbelTiles(64, 16, width, 8, 2), 65536) for generation, width in TABLE_ROWS},
    **{(generation, 4, width): (GumbelTiles(16, 16, width, 8, 2), 65536) for generation, width in TABLE_ROWS},
    # Of 64 rows or more, Triton 3.6 takes tensor cores there, which round float32.
    **{(10, 4, width): (GumbelTiles(16, 16, min(width, 32), 8, 2), 65536) for _, width in TABLE_ROWS},
}


@triton.jit
def _load_rows(pointer, rows, offs_d, stride_d, valid, WIDTH: tl.constexpr):
    """[BLOCK_M, BLOCK_D] of a tensor of the positions, 0 past its ends."""
    addresses = pointer + rows[:, None] + offs_d.to(tl.int64)[None, :] * stride_d
    return tl.load(addresses, mask=valid[:, None] & (offs_d < WIDTH)[None, :], other=0.0)


@triton.jit
def _gradient(raw, x, dy, maximum, scale, delta, kl_scale, logit_maximum, offset, unit, WITH_KL: tl.constexpr,
              INTERPRETED: tl.constexpr):  # fmt: skip
    gradient = exp2((x - maximum) * unit, INTERPRETED) * scale * (dy - delta)
    if WITH_KL:
        # Far below, q is 0, and -inf times that would be NaN.
        difference = tl.maximum(raw.to(tl.float32) - logit_maximum, -120.0)
        gradient = tl.fma(exp2(difference * LOG2_E, INTERPRETED) * kl_scale, difference - offset, gradient)
    return gradient


@triton.jit(do_not_specialize=["num_tiles", "num_shares"])
def _gumbel_dl_kernel(
    logits, codebook, seed, stats, relaxed, grad_quantized, grad_kl, grad_logits,
    stride_lb, stride_lk, stride_lp,
    stride_ck, stride_cd,
    stride_dzb, stride_dzd, stride_dzp,
    stride_dlb, stride_dlk, stride_dlp,
    num_rows, positions, num_codes, num_tiles, num_shares, unit, inverse_tau,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, LANES: tl.constexpr,
    WHOLE: tl.constexpr, PAIRED: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    WITH_KL: tl.constexpr = grad_kl is not None
    size = tl.cast(num_rows, tl.int64)
    pid = tl.program_id(0)
    row, row_high, b, p, valid = rows_of_tile(pid % num_tiles, num_rows, positions, BLOCK_M, WHOLE)
    offsets = row_offsets(b, p, stride_lb, stride_lp, PAIRED)
    dz_rows = b * stride_dzb + p * stride_dzp
    places = b * stride_dlb + p * stride_dlp
    low, high = read_key(seed)

    delta = tl.zeros([BLOCK_M], tl.float32)
    dz = tl.zeros([BLOCK_M, BLOCK_D], grad_quantized.dtype.element_ty)
    for start_d in tl.static_range(0, WIDTH, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        dz = _load_rows(grad_quantized, dz_rows, offs_d, stride_dzd, valid, WIDTH)
        z = _load_rows(relaxed, row * WIDTH, offs_d, 1, valid, WIDTH)
        delta += tl.sum(dz.to(tl.float32) * z, 1)
    delta = delta[:, None]
    maximum = tl.load(stats + row, mask=valid, other=0.0)[:, None]
    scale = tl.load(stats + num_rows + row, mask=valid, other=0.0)[:, None] * inverse_tau
    kl_scale, logit_maximum, offset = delta, delta, delta
    if WITH_KL:
        kl_scale = tl.load(grad_kl + row, mask=valid, other=0.0)[:, None]
        logit_maximum = tl.load(stats + 2 * size + row, mask=valid, other=0.0)[:, None]
        kl_scale *= tl.load(stats + 3 * size + row, mask=valid, other=0.0)[:, None]
        # ln q less sum q ln q is the logit less its maximum, the logarithm of the sum and sum q ln q.
        offset = tl.load(stats + 4 * size + row, mask=valid, other=0.0)[:, None]
        offset += tl.load(stats + 5 * size + row, mask=valid, other=0.0)[:, None]

    begin, end = steps_of_share(pid // num_tiles, num_shares, num_steps(num_codes, LANES))
    for step in range(begin, end):
        raw, x, k, first = perturbed_logits(
            logits, offsets, row, row_high, valid, step, stride_lk, num_codes, low, high, LANES, RAGGED, INTERPRETED
        )
        joined = joined_codes(first, LANES)
        dy = tl.zeros([BLOCK_M, 4 * LANES], tl.float32)
        for start_d in tl.static_range(0, WIDTH, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            if WIDTH > BLOCK_D:
                dz = _load_rows(grad_quantized, dz_rows, offs_d, stride_dzd, valid, WIDTH)
            c = load_codes(codebook, joined, offs_d, stride_ck, stride_cd, num_codes, WIDTH, BLOCK_D, RAGGED)
            dy = tl.dot(dz, tl.trans(c), dy, input_precision=PRECISION)
        dy0, dy1, dy2, dy3 = split_words(dy, BLOCK_M, LANES)
        dl0 = _gradient(
            raw[0], x[0], dy0, maximum, scale, delta, kl_scale, logit_maximum, offset, unit, WITH_KL, INTERPRETED
        )
        dl1 = _gradient(
            raw[1], x[1], dy1, maximum, scale, delta, kl_scale, logit_maximum, offset, unit, WITH_KL, INTERPRETED
        )
        dl2 = _gradient(
            raw[2], x[2], dy2, maximum, scale, delta, kl_scale, logit_maximum, offset, unit, WITH_KL, INTERPRETED
        )
        dl3 = _gradient(
            raw[3], x[3], dy3, maximum, scale, delta, kl_scale, logit_maximum, offset, unit, WITH_KL, INTERPRETED
        )
        store_tile(grad_logits, dl0, places, k[0], stride_dlk, valid, num_codes, RAGGED)
        store_tile(grad_logits, dl1, places, k[1], stride_dlk, valid, num_codes, RAGGED)
        store_tile(grad_logits, dl2, places, k[2], stride_dlk, valid, num_codes, RAGGED)
        store_tile(grad_logits, dl3, places, k[3], stride_dlk, valid, num_codes, RAGGED)


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "num_runs"])
def _gumbel_dcodebook_kernel(
    logits, seed, stats, grad_quantized, grad_codebook,
    stride_lb, stride_lk, stride_lp,
    stride_dzb, stride_dzd, stride_dzp,
    num_rows, positions, num_codes, num_tiles, num_blocks, num_runs, unit,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, LANES: tl.constexpr,
    WHOLE: tl.constexpr, PAIRED: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    # Neighbours read the same positions.
    pid = tl.program_id(0)
    step = pid % num_blocks
    run = pid // num_blocks % num_runs
    offs_d = pid // num_blocks // num_runs * BLOCK_D + tl.arange(0, BLOCK_D)
    low, high = read_key(seed)
    acc = tl.zeros([BLOCK_D, 4 * LANES], tl.float32)
    begin, end = steps_of_share(run, num_runs, num_tiles)
    for tile in range(begin, end):
        row, row_high, b, p, valid = rows_of_tile(tile, num_rows, positions, BLOCK_M, WHOLE)
        _, x, _, _ = perturbed_logits(
            logits, row_offsets(b, p, stride_lb, stride_lp, PAIRED), row, row_high, valid, step, stride_lk, num_codes,
            low, high, LANES, RAGGED, INTERPRETED,
        )  # fmt: skip
        # Past the last position the weights are 0 whatever the noise is.
        maximum = tl.load(stats + row, mask=valid, other=float("inf"))[:, None]
        inverse = tl.load(stats + num_rows + row, mask=valid, other=0.0)[:, None]
        # Joined before the weights are made of them: Triton 3.6 fails on a product that takes what was joined last.
        joined = join_words(x, BLOCK_M, LANES)
        y = exp2((joined - maximum) * unit, INTERPRETED) * inverse
        places = (b * stride_dzb + p * stride_dzp)[None, :] + offs_d.to(tl.int64)[:, None] * stride_dzd
        inside = (offs_d < WIDTH)[:, None] & valid[None, :]
        columns = tl.load(grad_quantized + places, mask=inside, other=0.0)  # [BLOCK_D, BLOCK_M]
        acc = tl.dot(columns, y.to(columns.dtype), acc, input_precision=PRECISION)
    counter = step * LANES
    codes = joined_codes(counter // 32 * BLOCK_CODES + counter % 32, LANES)
    rows = (run.to(tl.int64) * num_codes + codes)[None, :] * WIDTH
    inside = (offs_d < WIDTH)[:, None] & (codes < num_codes)[None, :]
    tl.store(grad_codebook + rows + offs_d[:, None], acc.to(grad_codebook.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_runs"])
def _gumbel_sum_runs_kernel(partial, grad_codebook, size, num_runs, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(num_runs):
        total += tl.load(partial + place, mask=inside, other=0.0)
        partial += size
    tl.store(grad_codebook + place, total.to(grad_codebook.dtype.element_ty), mask=inside)


def plan_bwd(
    logits: Tensor,
    codebook: Tensor,
    seed: Tensor,
    stats: Tensor,
    relaxed: Tensor,
    grad_quantized: Tensor,
    grad_kl: Tensor | None,
    grad_logits: Tensor | None,
    grad_codebook: Tensor | None,
    *,
    tau: float,
    precision: str = "ieee",
    dl_tiles: GumbelTiles | None = None,
    dcodebook_tiles: GumbelTiles | None = None,
    num_shares: int | None = None,
    num_runs: int | None = None,
    device: Device,
) -> list[Launch]:
    """The launches of :func:`gumbel_bwd`, in their order; what is not given comes from the tables and the sizes."""
    num_codes, width = codebook.shape
    inputs = {"logits": logits, "seed": seed, "stats": stats, "grad_quantized": grad_quantized}
    inputs |= view_strides("l", logits, "bkp") | view_strides("dz", grad_quantized, "bdp")
    inputs["unit"] = softmax_unit(tau)
    launches = []
    if grad_logits is not None:
        tiles = dl_tiles or choose_tiles(DL_TILES, device, logits.dtype, width)
        arguments, constants = shape_arguments(logits, tiles)
        num_tiles = arguments["num_tiles"]
        num_shares = num_shares or shares_of_codes(num_tiles, num_codes, device)
        arguments |= inputs | view_strides("c", codebook, "kd") | view_strides("dl", grad_logits, "bkp")
        arguments |= {"codebook": codebook, "relaxed": relaxed, "grad_kl": grad_kl, "grad_logits": grad_logits}
        arguments |= {"num_shares": num_shares, "inverse_tau": min(1 / tau, LARGEST)}
        block_d = min(padded_width(width), tiles.width)
        constants |= {"WIDTH": width, "BLOCK_D": block_d, "PRECISION": precision}
        launches.append(Launch(_gumbel_dl_kernel, num_tiles * num_shares, arguments, constants, tiles.options()))
    if grad_codebook is not None and width > 0:
        tiles = dcodebook_tiles or choose_tiles(DCODEBOOK_TILES, device, logits.dtype, width)
        arguments, constants = shape_arguments(logits, tiles)
        block_d = min(padded_width(width), tiles.width)
        num_blocks = triton.cdiv(num_codes, BLOCK_CODES.value) * (32 // tiles.lanes)
        programs = num_blocks * triton.cdiv(width, block_d)
        num_runs = num_runs or _num_runs(programs, arguments["num_tiles"], device)
        partial = grad_codebook
        if num_runs > 1:
            size = (num_runs, num_codes, width)
            partial = torch.empty(size, dtype=torch.float32, device=grad_codebook.device)
        arguments |= inputs | {"grad_codebook": partial, "num_blocks": num_blocks, "num_runs": num_runs}
        constants |= {"WIDTH": width, "BLOCK_D": block_d, "PRECISION": precision}
        launches.append(Launch(_gumbel_dcodebook_kernel, programs * num_runs, arguments, constants, tiles.options()))
        if num_runs > 1:
            elements = num_codes * width
            arguments = {"partial": partial, "grad_codebook": grad_codebook, "size": elements, "num_runs": num_runs}
            options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
            grid = triton.cdiv(elements, SUM_ELEMENTS)
            launches.append(Launch(_gumbel_sum_runs_kernel, grid, arguments, {"BLOCK": SUM_ELEMENTS}, options))
    return launches


def _num_runs(programs: int, num_tiles: int, device: Device) -> int:
    """Runs of the positions: two programs a multiprocessor, and four tiles a run at least."""
    return max(1, min(2 * device.num_sms // max(programs, 1), num_tiles // 4, 64))


def gumbel_bwd(
    logits: Tensor,
    codebook: Tensor,
    seed: Tensor,
    stats: Tensor,
    relaxed: Tensor,
    grad_quantized: Tensor,
    grad_kl: Tensor | None,
    grad_logits: Tensor | None,
    grad_codebook: Tensor | None,
    *,
    tau: float,
    precision: str = "ieee",
    dl_tiles: GumbelTiles | None = None,
    dcodebook_tiles: GumbelTiles | None = None,
    num_shares: int | None = None,
    num_runs: int | None = None,
) -> None:
    """Gradients of :func:`~dalle_fast.kernels.gumbel.gumbel_fwd`, of quantized (as the soft sample) and of kl.

    Args:
        logits, codebook, seed, stats, relaxed, tau, precision: as the forward pass had and left them.
        grad_quantized: (B, D, P) in logits' dtype, any strides, also 0.
        grad_kl: (B * P) float32, or None.
        grad_logits: (B, K, P) in logits' dtype, any strides, or None. Written.
        grad_codebook: (K, D) in logits' dtype, contiguous, or None. Written.
        dl_tiles, dcodebook_tiles, num_shares, num_runs: instead of those that the tables and the sizes give.

    Raises:
        RuntimeError: as the forward pass.
    """
    check_runnable(logits)
    for launch in plan_bwd(
        logits, codebook, seed, stats, relaxed, grad_quantized, grad_kl, grad_logits, grad_codebook,
        tau=tau, precision=precision, dl_tiles=dl_tiles, dcodebook_tiles=dcodebook_tiles,
        num_shares=num_shares, num_runs=num_runs, device=device_of(logits),
    ):  # fmt: skip
        launch.run(logits.device)


def shipped_configs(device: Device = H200) -> list[Compilation]:
    """What the launches of :func:`gumbel_bwd` compile, for ahead-of-time compilation."""
    found = []
    for name, layout, width, dtype, num_codes in shipped_shapes():
        tensors = shipped_tensors(layout, width, dtype, num_codes)
        logits, codebook = tensors["logits"], tensors["codebook"]
        launches = plan_bwd(
            *(logits, codebook, tensors["seed"], tensors["stats"], tensors["relaxed"], tensors["quantized"]),
            *(tensors["kl"], logits, codebook),
            tau=1.0,
            num_runs=4,
            device=device,
        )
        for kernel, launch in zip(("dl", "dcodebook", "sum"), launches, strict=True):
            found.append(launch.compilation(f"gumbel_{kernel}-{name}"))
    return found
