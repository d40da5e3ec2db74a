"""One AdamW update with 16-bit moments, in plain PyTorch.

    m = b1 m + (1 - b1) g,   v = min(b2 v + (1 - b2) g^2, variance_clip)
    p = p (1 - lr weight_decay) - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

Arithmetic is float32; m is stored in 1-6-9 and v in 0-6-10 after it was used. Source: arXiv 2102.12092,
appendix B.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_fast.reference.formats import decode_0610, decode_169, encode_0610, encode_169


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The parameter and its moments after one update; the arguments are left as they were.

    Args:
        param: floating point.
        grad: same shape.
        exp_avg, exp_avg_sq: the running mean and variance, same shape: int16 words of 1-6-9 and 0-6-10, or
            float32 for a parameter whose moments are not compressed (gains, biases, embeddings).
        step: number of this update, 1 for the first.
        variance_clip: the running variance is clipped to it before it is used or stored.

    Returns:
        param, exp_avg, exp_avg_sq in the dtypes given.
    """
    beta1, beta2 = betas
    compressed = exp_avg.dtype == torch.int16
    mean = decode_169(exp_avg) if compressed else exp_avg
    variance = decode_0610(exp_avg_sq) if compressed else exp_avg_sq
    g, p = grad.to(torch.float32), param.to(torch.float32)

    mean = beta1 * mean + (1 - beta1) * g
    variance = (beta2 * variance + (1 - beta2) * g.square()).clamp(max=variance_clip)
    unbiased_mean, unbiased_variance = mean / (1 - beta1**step), variance / (1 - beta2**step)
    p = p * (1 - lr * weight_decay) - lr * unbiased_mean / (unbiased_variance.sqrt() + eps)

    if compressed:
        mean, variance = encode_169(mean), encode_0610(variance)
    return p.to(param.dtype), mean, variance
