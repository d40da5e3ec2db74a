"""A linear layer and what surrounds it in a residual block, in plain PyTorch: what a step of decoding consists of.

    out = residual + act(W LayerNorm(x) + b)

each part but W optional. LayerNorm is computed in float32 or wider; x is then rounded to the weight's dtype for the
product, as in training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def fast_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "fast_gelu": fast_gelu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def decode_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + act(weight LayerNorm(x) + bias).

    Args:
        x: (rows, K).
        weight: (N, K).
        bias: (N,).
        norm: gain (K,), bias (K,) and epsilon of a LayerNorm, or None.
        activation: a key of ``ACTIVATIONS``, or None.
        residual: (rows, N).

    Returns:
        (rows, N), in residual's dtype where there is one, else in weight's.
    """
    if norm is not None:
        gain, shift, eps = norm
        wide = torch.promote_types(x.dtype, torch.float32)
        x = F.layer_norm(x.to(wide), (x.shape[1],), gain.to(wide), shift.to(wide), eps)
    out = F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
    if activation is not None:
        out = ACTIVATIONS[activation](out)
    return out if residual is None else residual + out
