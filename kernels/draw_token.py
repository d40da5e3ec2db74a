"""From scores to a token of each sample, in one launch: guidance, temperature, filters, noise and likelihood.

    x = u + w (c - u)                    c with the caption, u without it; x = c without guidance
    y = (max x - x) / temperature        kept are the k smallest, then the smallest whose e^-y have p of their mass
    token = argmax_kept g - y            g standard Gumbel noise; at a temperature of 0 it is argmax x
    score = c_token - ln sum e^c

One program a sample, with all codes in registers: it reads 4 bytes a code, with guidance 8, and writes two numbers.
Filters keep what is at most the k-th smallest y, and what equals it. That is found bit by bit from the highest on, as
the largest number below which fewer than k lie: a y is not negative, so that its bits have the order of its value. For
p it is the same with e^-y in the place of counts. Each bit is a sum over all codes, 31 of them a filter. Noise is that
of Gumbel quantisation (gumbel_tiles.py) with each sample's seed for the key and the raster index for the row. All
arithmetic is float32; no product is fused and divisions are rounded to nearest, as in the reference, for codes that
are equal there to be so here.

A NaN among the scores c makes the score NaN; where there is one in x, the token is any.

Source: Gumbel, "Statistical theory of extreme values", 1954; classifier-free guidance: arXiv 2207.12598, equation 6.
Limits: at most 16384 codes, every tensor contiguous.
"""

import torch
import triton
import triton.language as tl
from dalle_fast.kernels.common import Compilation, Launch, check_runnable
from dalle_fast.kernels.gumbel_tiles import BLOCK_CODES, BLOCK_COUNTERS, join_words, perturb, random_words, read_key
from torch import Tensor

MOST_CODES = 16384
SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny

# Chosen by what the compilers make of them (Triton 3.6 and 3.9), not by time: none was measured on a GPU. With eight
# codes a thread takes 46 registers and less time than with 16, of which 16384 codes leave it 64: enough, but for a few
# with guidance and all filters on sm_80 in Triton 3.6.
CODES_OF_THREAD, MOST_WARPS = 8, 32

INFINITE = tl.constexpr(0x7F800000)  # the bits of infinity


@triton.jit
def noise_words(seed, row, BLOCK_K: tl.constexpr):
    """32 random bits for each of BLOCK_K codes, in the order of :func:`noise_codes`; row an int64."""
    low, high = read_key(seed)
    counters = tl.arange(0, BLOCK_K // 4).to(tl.uint32)[None, :]
    rows = tl.full([1, 1], row.to(tl.uint32), tl.uint32)
    words = random_words(rows, (row >> 32).to(tl.uint32), counters, low, high)
    return tl.reshape(join_words(words, 1, BLOCK_K // 4), (BLOCK_K,))


@triton.jit
def noise_codes(BLOCK_K: tl.constexpr):
    """The codes in the order in which a thread has the words of its counters."""
    column = tl.arange(0, BLOCK_K)
    counter, word = column // 4, column % 2 * 2 + column // 2 % 2
    return counter // BLOCK_COUNTERS * BLOCK_CODES + word * BLOCK_COUNTERS + counter % BLOCK_COUNTERS


@triton.jit
def _load_word(scores, unconditional, cond_scale, num_codes, WORD: tl.constexpr, BLOCK_K: tl.constexpr):
    """Scores, and those that decide the draw, of the codes that have a word of the counters; -inf past the last."""
    counter = tl.arange(0, BLOCK_K // 4)
    code = counter // BLOCK_COUNTERS * BLOCK_CODES + counter % BLOCK_COUNTERS + WORD * BLOCK_COUNTERS
    c = tl.load(scores + code, mask=code < num_codes, other=float("-inf"))
    if unconditional is None:
        x = c
    else:
        u = tl.load(unconditional + code, mask=code < num_codes, other=0.0)
        # Past the last code the sum could be anything.
        x = tl.where(code < num_codes, u + cond_scale * (c - u), float("-inf"))
    return c[None, :], x[None, :]


@triton.jit
def _load_scores(scores, unconditional, cond_scale, num_codes, BLOCK_K: tl.constexpr):
    """The same of all codes, in the order of :func:`noise_codes`."""
    c0, x0 = _load_word(scores, unconditional, cond_scale, num_codes, 0, BLOCK_K)
    c1, x1 = _load_word(scores, unconditional, cond_scale, num_codes, 1, BLOCK_K)
    c2, x2 = _load_word(scores, unconditional, cond_scale, num_codes, 2, BLOCK_K)
    c3, x3 = _load_word(scores, unconditional, cond_scale, num_codes, 3, BLOCK_K)
    c = tl.reshape(join_words((c0, c1, c2, c3), 1, BLOCK_K // 4), (BLOCK_K,))
    x = tl.reshape(join_words((x0, x1, x2, x3), 1, BLOCK_K // 4), (BLOCK_K,))
    return c, x


@triton.jit
def _last_kept(bits, weight, enough):
    """The largest number such that the weights of the bits below it are less than enough: the last bits to keep."""
    last = tl.full((), 0, tl.int32)
    for place in range(31):
        number = last + (1 << (30 - place))
        below = tl.sum(tl.where(bits < number, weight, 0), 0)
        last = tl.where(below < enough, number, last)
    return last


@triton.jit
def _first_of(values, codes, num_codes):
    """The lowest code of the largest value, and some code where there is none."""
    largest = values == tl.max(values, 0)
    return tl.minimum(tl.min(tl.where(largest, codes, num_codes), 0), num_codes - 1)


@triton.jit(do_not_specialize=["batch", "length", "top_k"])
def _draw_step_kernel(
    logits, seeds, position, keep, tokens, scores,
    batch, num_codes, length, temperature, top_k, top_p, cond_scale,
    BLOCK_K: tl.constexpr, GREEDY: tl.constexpr, BY_RANK: tl.constexpr, BY_MASS: tl.constexpr, GUIDED: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n = tl.load(position)
    logits += b * num_codes
    codes = noise_codes(BLOCK_K)

    unconditional = logits + tl.cast(batch, tl.int64) * num_codes if GUIDED else None
    c, x = _load_scores(logits, unconditional, cond_scale, num_codes, BLOCK_K)
    maximum = tl.max(c, 0)
    log_total = tl.log(tl.sum(tl.exp(c - maximum), 0))
    if not GREEDY:
        y = tl.div_rn(tl.max(x, 0) - x, tl.full([BLOCK_K], temperature, tl.float32))
        bits = y.to(tl.int32, bitcast=True)
        last = tl.full((), INFINITE, tl.int32)
        if BY_RANK:
            last = _last_kept(bits, tl.full([BLOCK_K], 1, tl.int32), top_k)
        if BY_MASS:
            weight = tl.where(bits <= last, tl.exp(-y), 0.0)
            last = _last_kept(bits, weight, top_p * tl.sum(weight, 0))
        x = perturb(tl.where(bits <= last, -y, float("-inf")), noise_words(seeds + b, n, BLOCK_K), True, False)
    token = _first_of(x, codes, num_codes).to(tl.int64)

    inside = (n >= 0) & (n < length)
    place = b * length + n
    if keep is not None:
        is_kept = tl.load(keep + place, mask=inside, other=0) != 0
        token = tl.where(is_kept, tl.load(tokens + place, mask=inside, other=0), token)
    chosen = tl.load(logits + token, mask=(token >= 0) & (token < num_codes), other=float("nan"))
    tl.store(tokens + place, token, mask=inside)
    tl.store(scores + b, tl.load(scores + b) + (chosen - maximum - log_total), mask=inside)


def plan_step(
    logits: Tensor,
    seeds: Tensor,
    position: Tensor,
    keep: Tensor | None,
    tokens: Tensor,
    scores: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    cond_scale: float | None,
) -> Launch:
    """The launch of :func:`draw_step`."""
    batch, length = tokens.shape
    codes = logits.shape[1]
    block = max(BLOCK_CODES.value, triton.next_power_of_2(codes))
    arguments = {
        "logits": logits,
        "seeds": seeds,
        "position": position,
        "keep": None if keep is None else keep.view(torch.uint8),
        "tokens": tokens,
        "scores": scores,
        "batch": batch,
        "num_codes": codes,
        "length": length,
        "temperature": float(temperature),
        "top_k": top_k,
        "top_p": float(top_p),
        "cond_scale": 1.0 if cond_scale is None else float(cond_scale),
    }
    constants = {
        "BLOCK_K": block,
        "GREEDY": temperature < SMALLEST_TEMPERATURE,
        "BY_RANK": top_k < codes,
        "BY_MASS": top_p < 1,
        "GUIDED": cond_scale is not None,
    }
    warps = min(max(4, block // (32 * CODES_OF_THREAD)), MOST_WARPS)
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}
    return Launch(_draw_step_kernel, batch, arguments, constants, options)


def draw_step(
    logits: Tensor,
    seeds: Tensor,
    position: Tensor,
    keep: Tensor | None,
    tokens: Tensor,
    scores: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    cond_scale: float | None,
) -> None:
    """Draw the token of every sample at ``position`` and add up its log-likelihood; of a position past L, nothing.

    Args:
        logits: (B, K) float32, contiguous; with ``cond_scale`` (2 B, K), those of all samples without captions last.
        seeds: (B,) int64, contiguous: keys of the noise.
        position: int64 of no dimensions on the device, the raster index and row of the noise.
        keep: (B, L) bool, contiguous, or None. True: the token that is there stays and is the one that counts.
        tokens: (B, L) int64, contiguous. Column ``position`` is written.
        scores: (B,) float32, contiguous. The log-likelihoods, in nats, are added.
        temperature: >= 0, of which one below the smallest normal float32 takes the likeliest code.
        top_k, top_p: of the filters; K and 1 keep all.
        cond_scale: weight of the captions, None without guidance.

    Raises:
        ValueError: more than MOST_CODES codes.
        RuntimeError: tensors that are not on a CUDA device, outside of Triton's interpreter.
    """
    check_runnable(logits)
    if logits.shape[1] > MOST_CODES:
        raise ValueError(f"logits must have at most {MOST_CODES} codes, got {logits.shape[1]}")
    plan_step(
        logits, seeds, position, keep, tokens, scores,
        temperature=temperature, top_k=top_k, top_p=top_p, cond_scale=cond_scale,
    ).run(logits.device)  # fmt: skip


def shipped_configs() -> list[Compilation]:
    """What the launches of :func:`draw_step` compile, for ahead-of-time compilation: 1024 positions, some settings."""
    batch, length = 512, 1024

    def meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    found = []
    plain = {"temperature": 1.0, "top_k": 1 << 20, "top_p": 1.0, "cond_scale": None}
    for name, codes, with_keep, changes in (
        ("8192", 8192, False, {}),
        ("8192-all", 8192, True, {"top_k": 128, "top_p": 0.9, "cond_scale": 3.0}),
        ("8192-greedy", 8192, False, {"temperature": 0.0}),
        ("16384-all", 16384, True, {"top_k": 128, "top_p": 0.9, "cond_scale": 3.0}),
        ("1024-top_k", 1024, False, {"top_k": 128}),
        ("1000", 1000, False, {}),
    ):
        settings = plain | changes
        rows = batch if settings["cond_scale"] is None else 2 * batch
        launch = plan_step(
            meta(rows, codes, dtype=torch.float32), meta(batch), meta(),
            meta(batch, length, dtype=torch.bool) if with_keep else None,
            meta(batch, length), meta(batch, dtype=torch.float32), **settings,
        )  # fmt: skip
        found.append(launch.compilation(f"draw_step-{name}"))
    return found
