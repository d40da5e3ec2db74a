"""One AdamW update with 16-bit moments, in plain PyTorch.

    m = b1 m + (1 - b1) g,   v = min(b2 v + (1 - b2) g^2, variance_clip)
    p = p (1 - lr weight_decay) - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

Arithmetic is float32; m is stored in 1-6-9 and v in 0-6-10 after it was used. The order of the operations, and which of
them are fused, is part of the definition: every backend gives the same bits. A 16-bit p is rounded to nearest, or
stochastically: up with the probability that makes the mean exact, from 16 random bits an element. Source: arXiv
2102.12092, appendix B.2, which does not say how weights are rounded; Gupta et al., "Deep learning with limited
numerical precision", 2015 (stochastic rounding).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dalle_fast.reference.formats import decode_0610, decode_169, encode_0610, encode_169
from dalle_fast.reference.philox import philox

_MASK32 = 0xFFFFFFFF
_NOISE_ROUNDS = 7
_FLOAT32_INFINITY = 0x7F800000


def adamw16_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.96),
    eps: float = 1e-8,
    weight_decay: float = 0.045,
    variance_clip: float = 5.0,
    grad_factor: float = 1.0,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The parameter and its moments after one update; the arguments are left as they were.

    Args:
        param: floating point.
        grad: same shape.
        exp_avg, exp_avg_sq: the running mean and variance, same shape: int16 words of 1-6-9 and 0-6-10, or
            float32 for a parameter whose moments are not compressed (gains, biases, embeddings).
        step: number of this update, 1 for the first.
        variance_clip: the running variance is clipped to it before it is used or stored.
        grad_factor: grad is multiplied by it.
        noise: same shape, 16 random bits an element: rounds a 16-bit param by :func:`round_stochastically`.

    Returns:
        param, exp_avg, exp_avg_sq in the dtypes given.
    """
    beta1, beta2 = betas
    compressed = exp_avg.dtype == torch.int16
    mean = decode_169(exp_avg) if compressed else exp_avg
    variance = decode_0610(exp_avg_sq) if compressed else exp_avg_sq
    g, p = grad.to(torch.float32), param.to(torch.float32)

    mean = _fma(_float32(beta1), mean, g * ((1 - beta1) * grad_factor))
    root = g * (math.sqrt(1 - beta2) * grad_factor)
    variance = _fma(root, root, variance * beta2).clamp(max=variance_clip)
    # The denominator is divided by the step size instead of its result multiplied by it.
    size = lr / (1 - beta1**step)
    moves = abs(size) >= 1e-30  # else float32 may not know its inverse
    of_root = 1 / (math.sqrt(1 - beta2**step) * size) if moves else 0.0
    rest = eps / size if moves else math.inf
    # By way of float64, since torch's float32 square root may be off by a bit.
    denominator = _fma(_float32(of_root), variance.double().sqrt().float(), _float32(rest))
    p = _fma(_float32(1 - lr * weight_decay), p, -(mean / denominator))

    if compressed:
        mean, variance = encode_169(mean), encode_0610(variance)
    p = p.to(param.dtype) if noise is None else round_stochastically(p, noise, param.dtype)
    return p, mean, variance


def _float32(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float32)


def _fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x y + z of float32 tensors, rounded once."""
    product, z = x.double() * y.double(), z.double()  # exact
    total = product + z
    # What the sum lost decides a tie: where it lost something, its last bit is set (rounding to odd).
    share = total - product
    lost = (product - (total - share)) + (z - share)
    bits = total.view(torch.int64)
    outwards = torch.where((lost > 0) == (total > 0), 1, -1)
    odd = torch.where((lost != 0) & lost.isfinite() & (bits % 2 == 0), bits + outwards, bits)
    return odd.view(torch.float64).float()


def rounding_noise(numel: int, *, seed: int, index: int, step: int, device: torch.device | None = None) -> Tensor:
    """The 16 random bits of each element of a parameter at one update, int64 in 0 .. 2^16 - 1.

        word  = philox((i // 8 mod 2^32, i // 8 // 2^32, index, step), seed, rounds=7)[i % 8 // 2]
        noise = word mod 2^16 where i is even, word // 2^16 where it is odd

    for element i in the order of memory, so that eight neighbours share a counter.

    Args:
        seed: 64 bits.
        index: which of the optimiser's parameters it is, from 0.
        step: number of this update, 1 for the first.
    """
    group = torch.arange(-(-numel // 8), device=device)
    counter, key = (group & _MASK32, group >> 32, index, step), (seed & _MASK32, seed >> 32 & _MASK32)
    words = torch.stack(philox(counter, key, rounds=_NOISE_ROUNDS), 1)
    return torch.stack([words & 0xFFFF, words >> 16], dim=2).flatten()[:numel]


def round_stochastically(x: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 to float16 or bfloat16, to one of the two neighbours, each as likely as x is near to it.

    The noise is added below the last bit kept, and what lies below is cut off. Of float16's subnormal numbers, whose
    last bit is 2^-24, |x| 2^24 + noise / 2^16 is rounded to float32 before it is cut. What passes the largest finite
    value, infinities included, becomes that value with x's sign; NaN stays NaN.

    Args:
        x: float32.
        noise: same shape, integers in 0 .. 2^16 - 1.
        dtype: float16 or bfloat16; any other is a plain cast.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return x.to(dtype)
    magnitude = x.abs()
    dropped = 13 if dtype == torch.float16 else 16
    bits = magnitude.contiguous().view(torch.int32).to(torch.int64) + (noise >> (16 - dropped))
    rounded = (bits >> dropped << dropped).clamp(max=_FLOAT32_INFINITY).to(torch.int32).view(torch.float32)
    if dtype == torch.float16:
        subnormal = torch.floor(magnitude * 2.0**24 + noise.to(torch.float32) * 2.0**-16) * 2.0**-24
        rounded = torch.where(magnitude < 2.0**-14, subnormal, rounded)
    rounded = rounded.clamp(max=torch.finfo(dtype).max)
    return torch.where(torch.isnan(x), x, torch.copysign(rounded, x)).to(dtype)
