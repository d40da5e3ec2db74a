"""A linear layer with LayerNorm before it, and activation and residual after it, for the few rows of a decoding step.

What it computes is defined by ``dalle_fast.reference.decode_linear``. With so few rows the time is that of reading the
weights: it is one pass over them in C++, with float32 activations whatever the weights' dtype is, and the same bits for
a row whatever rows are beside it. It is for CPUs alone; elsewhere the model's own modules do the same.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dalle_fast.ops import backends
from dalle_fast.reference.decode_linear import ACTIVATIONS

__all__ = ["ACTIVATIONS", "bind_decode_linear", "has_decode_kernel"]

_ACTIVATION_CODES = {None: 0, "fast_gelu": 1, "gelu": 2, "gelu_tanh": 3}

if backends.extension is not None:
    torch.library.register_fake("dalle_fast::decode_linear_cpu", lambda *args: None)


def has_decode_kernel(weight: Tensor) -> bool:
    """Whether the C++ kernel runs on such weights."""
    return weight.device.type == "cpu" and weight.dtype in backends.KERNEL_DTYPES and backends.extension is not None


def bind_decode_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    out: Tensor,
) -> partial:
    """A call that writes residual + act(weight LayerNorm(x) + bias) into ``out`` in C++; unchecked.

    Args:
        x: (rows, K) float32, contiguous.
        weight: (N, K), contiguous, one for which :func:`has_decode_kernel` is True.
        bias: (N,), float32.
        norm: gain (K,), bias (K,) and epsilon of a LayerNorm, or None.
        activation: "fast_gelu", "gelu", "gelu_tanh" or None.
        residual: (rows, N) float32, contiguous; may be ``out`` itself.
        out: (rows, N) float32, contiguous; not x.
    """
    gain, shift, eps = (None, None, 0.0) if norm is None else norm
    weight, bias, gain, shift = (x if x is None else x.detach() for x in (weight, bias, gain, shift))
    code = _ACTIVATION_CODES[activation]
    op = torch.ops.dalle_fast.decode_linear_cpu.default
    return partial(op, x, weight, bias, gain, shift, eps, code, residual, out)
