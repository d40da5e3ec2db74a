"""Cross-entropy of a linear classifier, hidden states to loss in one op: the public op.

What it computes is defined by ``dalle_fast.reference.cross_entropy``; this module checks the arguments and picks the
implementation: the kernels, which take the positions in chunks and never have the logits of all, or the reference.
Logits are float32 or wider, autocast or not (arXiv 2102.12092, appendix D).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_fast import reference
from dalle_fast.ops import backends, cross_entropy_registration
from dalle_fast.ops.checks import (
    cast_under_autocast,
    check_backend,
    check_floating,
    shape_of,
    without_autocast,
)

REDUCTIONS = ("mean", "sum", "none")
_KERNEL_BACKENDS = ("triton", "cpp")
# Logits up to which "auto" takes plain PyTorch on a CPU: 1 MB. There the kernels save no time, and the memory is small.
_SMALL_ELEMENTS = 1 << 18


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of softmax(hidden @ weight^T + bias) at ``target``, in nats.

    Args:
        hidden: (..., D), floating point.
        weight: (V, D), same dtype and device.
        target: (...) int64 in [0, V), or ignore_index: such positions have loss 0 and are not counted. The
            range is checked on a CPU; on an accelerator, where that would synchronise, the kernels make the loss
            of a target out of range NaN, and with the reference PyTorch's own assertion stands.
        bias: (V,), same dtype and device, or None.
        reduction: "mean" over the positions counted, and 0 (not NaN) if there is none; "sum"; "none".
        backend: "auto", the fastest there is for these tensors, on a CPU the reference for up to 2^18 logits; "triton",
            CUDA tensors; "cpp", CPU tensors; both of float32, float16 or bfloat16; "reference", any.

    Returns:
        A scalar, or with "none" target's shape; float32 or wider. Under autocast, 16-bit inputs are first
        cast to float32.

    Raises:
        ValueError: a shape, device, reduction or target out of range.
        TypeError: not floating point, mixed dtypes, or target not int64; float64 for a backend without it.
        RuntimeError: a backend that is not there, with the cause and the remedy; a second derivative of a kernel.
    """
    check_backend("linear_cross_entropy", backend, _KERNEL_BACKENDS)
    hidden, weight, bias = cast_under_autocast(hidden, weight, bias, dtype=torch.float32)
    check_floating(hidden=hidden, weight=weight, **({} if bias is None else {"bias": bias}))
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if hidden.dim() < 1:
        raise ValueError(f"hidden must have shape (..., D), got {shape_of(hidden)}")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must have shape (V, {hidden.shape[-1]}) with V >= 1, got {shape_of(weight)}")
    if bias is not None and shape_of(bias) != (weight.shape[0],):
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {shape_of(bias)}")
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target must be an int64 tensor, got {kind}")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(f"target must have shape {shape_of(hidden)[:-1]}, got {shape_of(target)}")
    if target.device != hidden.device:
        raise ValueError(f"target must be on {hidden.device}, got {target.device}")
    kernel = backends.choose_kernel("linear_cross_entropy", backend, hidden.device, hidden.dtype)
    if backend == "auto" and kernel == "cpp" and target.numel() * weight.shape[0] <= _SMALL_ELEMENTS:
        kernel = None
    if kernel is not None:
        needed = [_needs_grad(tensor) for tensor in (hidden, weight, bias)]
        op = cross_entropy_registration.linear_cross_entropy
        return op(hidden, weight, target, bias, reduction, ignore_index, *needed, kernel)[0]
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(target, weight.shape[0], ignore_index)
    with without_autocast(hidden.device):
        return reference.linear_cross_entropy(
            hidden, weight, target, bias=bias, ignore_index=ignore_index, reduction=reduction
        )


def _needs_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _check_range(target: Tensor, num_classes: int, ignore_index: int) -> None:
    outside = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
    if outside.any():
        first = int(target[outside][0])
        raise ValueError(f"target must be in 0..{num_classes - 1} or ignore_index {ignore_index}, got {first}")
