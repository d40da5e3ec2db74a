"""Gradient scaling of residual blocks: the public ops.

What they compute is defined by ``dalle_fast.reference.grad_scale``; this module checks the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dalle_fast import reference
from dalle_fast.ops.checks import check_backend, check_floating, shape_of


def scaled_resblock(x: Tensor, fn: Callable[[Tensor], Tensor], scale: float | Tensor) -> Tensor:
    """x + fn(x), with fn's backward run on a gradient that is multiplied by ``scale``.

    In backward the gradient g of the result is multiplied by the scale before it enters fn and divided by it
    when it leaves, non-finite elements becoming 0 in both places, and is then added to g itself, which is
    never scaled. Gradients of fn's own parameters keep the scale: take it out with :func:`unscale_`.

    Args:
        x: float32 or float64, the residual path.
        fn: the branch; its result has x's shape and any floating-point dtype.
        scale: > 0 and finite, a number or a tensor of one element (whose value is not checked).

    Returns:
        x's shape and dtype.

    Raises:
        TypeError: x is of another dtype, or fn's result is not floating point.
        ValueError: scale out of range, or fn's result is of another shape.

    Source: arXiv 2102.12092, section 2.4 and Figure 4.
    """
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be float32 or float64, for the residual path is not 16-bit, got {kind}")
    _check_scale(scale)

    def checked_fn(entry: Tensor) -> Tensor:
        branch = fn(entry)
        check_floating(**{"fn(x)": branch})
        if branch.shape != entry.shape:
            raise ValueError(f"fn(x) must have x's shape {shape_of(entry)}, got {shape_of(branch)}")
        return branch

    return reference.scaled_resblock(x, checked_fn, scale)


def unscale_(grads: Sequence[Tensor], scale: float | Tensor, *, backend: str = "auto") -> Tensor:
    """Divide the gradients of one block by its scale, in place, and tell whether any element was not finite.

    Non-finite elements are left as they are, for the update is to be skipped. A 16-bit gradient loses what
    falls below its format when it is divided; hold it in float32 to keep that.

    Args:
        grads: floating-point gradients of one block, on one device.
        scale: > 0 and finite, a number or a tensor of one element (whose value is not checked).
        backend: "auto" or "reference".

    Returns:
        Boolean tensor of no dimensions on the gradients' device; false if there are none.

    Raises:
        ValueError: scale out of range, or mixed devices.
        TypeError: a gradient that is not floating point.
        RuntimeError: a backend that is not there.

    Source: arXiv 2102.12092, appendix D.1.
    """
    check_backend("unscale_", backend)
    _check_scale(scale)
    if not grads:
        return torch.zeros((), dtype=torch.bool)
    for index, grad in enumerate(grads):
        check_floating(**{f"grads[{index}]": grad})
        if grad.device != grads[0].device:
            raise ValueError(f"grads must be on one device, got {grads[0].device} and {grad.device}")
    with torch.no_grad():
        return reference.unscale_(grads, scale)


def _check_scale(scale: float | Tensor) -> None:
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"scale must be a number or a tensor of one element, got shape {shape_of(scale)}")
    elif not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be finite and > 0, got {scale}")
