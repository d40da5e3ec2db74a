"""Sparse attention over text and image tokens: the public ops.

What they compute is defined by ``dalle_fast.reference.attention``; this module checks the arguments, follows
autocast and picks the implementation: the Triton kernels on a GPU, the C++ ones on a CPU. Where neither is there,
and for float64, "auto" hands PyTorch's scaled_dot_product_attention the dense mask where that means the same, and else
takes the reference.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_fast import reference
from dalle_fast.ops import attention_registration, backends
from dalle_fast.ops.checks import (
    cast_under_autocast,
    check_backend,
    check_floating,
    shape_of,
    without_autocast,
)
from dalle_fast.patterns import Pattern

MAX_HEAD_DIM = 256
_KERNEL_BACKENDS = ("triton", "cpp")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    text_lens: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query to the keys that ``pattern`` shows it: softmax(scale * q k^T) v over them.

    Args:
        query: (B, H, S, D), floating point, any strides with the last dimension contiguous; S is any prefix
            1..pattern.seq_len of the sequence, D 1..256.
        key, value: (B, H, S, D), same dtype and device; with ``enable_gqa`` (B, H / n, S, D) for any whole n.
        pattern: who sees whom.
        text_lens: (B,) integers in 0..pattern.text_len on query's device, or None for whole texts. Text keys
            at or past text_lens[b] are hidden from every query of sample b. The range is checked on a CPU
            only, where that costs no synchronisation; elsewhere a value outside acts as the nearest inside.
        scale: factor of the scores, finite; None is 1 / sqrt(D).
        return_lse: also return the natural logarithm of the softmax denominator.
        backend: "auto", the fastest there is for these tensors; "triton", CUDA tensors; "cpp", CPU tensors;
            "reference", any. Triton and C++ take float32, float16 and bfloat16.

    Returns:
        out (B, H, S, D) in query's dtype; with ``return_lse`` the pair (out, lse), lse (B, H, S) in float32
        or wider. A query that sees no key (every text key hidden) has out 0, lse -inf and zero gradients.
        Under autocast, inputs are first cast to the autocast dtype, float64 excepted.

    Raises:
        ValueError: a shape, stride or value out of range; mixed devices.
        TypeError: not floating point, mixed dtypes, not a pattern; float64 for a backend without it.
        RuntimeError: a backend that is not there, with the cause and the remedy.

    Source: arXiv 2102.12092, appendix B.1 and Figure 11.
    """
    check_backend("attention", backend, _KERNEL_BACKENDS)
    query, key, value = cast_under_autocast(query, key, value)
    check_floating(query=query, key=key, value=value)
    check_pattern(pattern)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (B, H, S, D), got shape {shape_of(tensor)}")
        _check_last_dim(name, tensor)
    batch, num_heads, length, head_dim = query.shape
    if key.shape != value.shape:
        raise ValueError(f"key and value must have one shape, got {shape_of(key)} and {shape_of(value)}")
    if (key.shape[0], *key.shape[2:]) != (batch, length, head_dim):
        raise ValueError(f"key must agree with query in B, S and D, got {shape_of(key)} for {shape_of(query)}")
    num_key_heads = key.shape[1]
    if not enable_gqa and num_key_heads != num_heads:
        raise ValueError(f"key must have query's heads unless enable_gqa is set, got {num_key_heads} for {num_heads}")
    if num_key_heads < 1 or num_heads % num_key_heads != 0:
        raise ValueError(
            f"the heads of query must be a multiple of the heads of key, got {num_heads} for {num_key_heads}"
        )
    _check_sizes(length, head_dim, pattern)
    check_scale(scale)
    if text_lens is not None:
        check_text_lens(text_lens, batch, pattern, query.device)

    kernel = backends.choose_kernel("attention", backend, query.device, query.dtype)
    if kernel is not None:
        factor = head_dim**-0.5 if scale is None else float(scale)
        op = attention_registration.attention
        out, lse = op(query, key, value, text_lens, pattern.code, factor, kernel)
        return (out, lse) if return_lse else out
    with without_autocast(query.device):
        if backend == "auto" and text_lens is None and not return_lse:
            return _dense_attention(query, key, value, pattern, scale, enable_gqa)
        return reference.attention(
            query,
            key,
            value,
            pattern,
            text_lens=text_lens,
            scale=scale,
            enable_gqa=enable_gqa,
            return_lse=return_lse,
        )


def attention_qkvpacked(
    qkv: Tensor,
    pattern: Pattern,
    *,
    text_lens: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`attention` on one packed tensor, as a linear layer produces it.

    Args:
        qkv: (B, S, 3, H, D): queries, keys and values.
        pattern, text_lens, scale, backend: as for :func:`attention`.

    Returns:
        (B, S, H, D) in qkv's dtype.

    Raises:
        As :func:`attention`.
    """
    check_backend("attention_qkvpacked", backend, _KERNEL_BACKENDS)
    (qkv,) = cast_under_autocast(qkv)
    check_floating(qkv=qkv)
    check_pattern(pattern)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must have shape (B, S, 3, H, D), got {shape_of(qkv)}")
    kernel = backends.choose_kernel("attention", backend, qkv.device, qkv.dtype)
    if kernel is None:
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = attention(query, key, value, pattern, text_lens=text_lens, scale=scale, backend=backend)
        return out.transpose(1, 2)
    _check_last_dim("qkv", qkv)
    batch, length, _, _, head_dim = qkv.shape
    _check_sizes(length, head_dim, pattern)
    check_scale(scale)
    if text_lens is not None:
        check_text_lens(text_lens, batch, pattern, qkv.device)
    factor = head_dim**-0.5 if scale is None else float(scale)
    out, _ = attention_registration.attention_qkvpacked(qkv, text_lens, pattern.code, factor, kernel)
    return out


def check_pattern(pattern: Pattern) -> None:
    """Raise unless ``pattern`` is one."""
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be a Pattern, got {type(pattern).__name__}")


def check_head_dim(head_dim: int) -> None:
    """Raise unless ``head_dim`` is in range."""
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be in 1..{MAX_HEAD_DIM}, got {head_dim}")


def check_scale(scale: float | None) -> None:
    """Raise unless ``scale`` is None or finite."""
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


def check_text_lens(text_lens: Tensor, batch: int, pattern: Pattern, device: torch.device) -> None:
    """Raise unless ``text_lens`` is a (batch,) integer tensor on ``device`` with values in 0..text_len."""
    if not isinstance(text_lens, Tensor) or text_lens.is_floating_point() or text_lens.dtype == torch.bool:
        kind = text_lens.dtype if isinstance(text_lens, Tensor) else type(text_lens).__name__
        raise TypeError(f"text_lens must be an integer tensor, got {kind}")
    if shape_of(text_lens) != (batch,):
        raise ValueError(f"text_lens must have shape ({batch},), got {shape_of(text_lens)}")
    if text_lens.device != device:
        raise ValueError(f"text_lens must be on {device}, got {text_lens.device}")
    if torch.compiler.is_compiling() or device.type != "cpu" or batch == 0:
        return
    low, high = (int(bound) for bound in text_lens.aminmax())
    if low < 0 or high > pattern.text_len:
        raise ValueError(f"text_lens must lie in 0..{pattern.text_len}, got {low}..{high}")


def _check_sizes(length: int, head_dim: int, pattern: Pattern) -> None:
    check_head_dim(head_dim)
    if not 1 <= length <= pattern.seq_len:
        raise ValueError(f"the sequence must have 1..{pattern.seq_len} positions, as the pattern, got {length}")


def _check_last_dim(name: str, tensor: Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}")


def _dense_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, scale: float | None, enable_gqa: bool
) -> Tensor:
    """PyTorch's attention under the pattern's dense mask; every query sees itself, so no row is empty."""
    length = query.shape[2]
    # A tensor made while tracing, or a subclass such as a fake tensor, must not stay behind in the cache.
    real = type(query) is Tensor and not torch.compiler.is_compiling()
    mask = _dense_mask(pattern, query.device) if real else pattern.dense(query.device)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask[:length, :length], scale=scale, enable_gqa=enable_gqa
    )


@lru_cache(maxsize=8)
def _dense_mask(pattern: Pattern, device: torch.device) -> Tensor:
    # Outside inference mode, or training could not use a mask that sampling made.
    with torch.inference_mode(False):
        return pattern.dense(device)
