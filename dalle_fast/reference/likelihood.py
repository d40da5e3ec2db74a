"""The logit-Laplace likelihood of a pixel in plain PyTorch.

    -ln f(x | mu, b) = |logit x - mu| / b + ln b + ln 2 + ln x + ln(1 - x)

Source: arXiv 2102.12092, appendix A.3, equation 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logit_laplace_nll(target: Tensor, mu: Tensor, log_scale: Tensor) -> Tensor:
    """-ln of the logit-Laplace density, in nats, elementwise.

    1 / b is at most e^88 (e^709 of float64 inputs), about the largest number there is, with the gradient that it would
    have without that bound; so a target that is met exactly costs ln b and not NaN however small b is.

    Args:
        target: x, in (0, 1).
        mu, log_scale: ln b; shapes that broadcast with target's.

    Returns:
        Float32 or wider.
    """
    wide = torch.promote_types(mu.dtype, torch.float32)
    x, mu, log_scale = target.to(wide), mu.to(wide), log_scale.to(wide)
    distance = (torch.log(x) - torch.log1p(-x) - mu).abs()
    # The difference is 0 and carries the gradient past the bound.
    bounded = log_scale.detach().clamp(min=-largest_exponent(wide)) + (log_scale - log_scale.detach())
    return distance * torch.exp(-bounded) + log_scale + math.log(2) + torch.log(x) + torch.log1p(-x)


def largest_exponent(dtype: torch.dtype) -> float:
    """The largest whole number whose exponential ``dtype`` holds."""
    return float(math.floor(math.log(torch.finfo(dtype).max)))
