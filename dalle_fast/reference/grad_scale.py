"""Gradient scaling of one residual block, and the rule that moves its scale, in plain PyTorch.

Small gradients of a 16-bit branch are kept above the format's smallest value by a scale of the block's own,
which multiplies the gradient where it enters the branch and is divided out where it leaves. The identity
path's gradient is never scaled and stays in the dtype of x. Source: arXiv 2102.12092, section 2.4, Figure 4
and appendix D.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def scaled_resblock(
    x: Tensor,
    fn: Callable[[Tensor], Tensor],
    scale: float | Tensor,
    identity: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """x + fn(x), or identity(x) + fn(x), with fn's backward run on a scaled gradient.

        backward: g_branch = filter(g * scale);  g_in = Dfn(g_branch);  g_x = g + filter(g_in / scale)

    where filter replaces non-finite elements by 0, g_branch is scaled and filtered in x's dtype before it is
    cast to that of fn's result, and gradients of fn's own parameters keep the scale (:func:`unscale_` takes
    it out). With ``identity``, g_x has its vector-Jacobian product in place of g.

    Args:
        x: float32 or float64.
        fn: the branch; its result has x's shape, or that of identity(x), and any floating-point dtype.
        scale: > 0, a number or a tensor of one element.
        identity: the residual path, which is not scaled; None is the identity.

    Returns:
        x's shape, or that of identity(x), in x's dtype.
    """
    scale = torch.as_tensor(scale, dtype=x.dtype, device=x.device).reshape(())
    branch = fn(_UnscaleGradient.apply(x, scale)).to(x.dtype)
    return (x if identity is None else identity(x)) + _ScaleGradient.apply(branch, scale)


class _ScaleGradient(torch.autograd.Function):
    """The branch's exit: backward multiplies by the scale and filters."""

    @staticmethod
    def forward(ctx: FunctionCtx, branch: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return branch.view_as(branch)

    @staticmethod
    @once_differentiable  # the scale would not cancel in a second derivative
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return filter_nonfinite(grad * scale), None


class _UnscaleGradient(torch.autograd.Function):
    """The branch's entry: backward divides by the scale and filters."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    @once_differentiable  # the scale would not cancel in a second derivative
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return filter_nonfinite(grad / scale), None


def filter_nonfinite(x: Tensor) -> Tensor:
    """x with its NaN and infinite elements replaced by 0."""
    return torch.where(torch.isfinite(x), x, 0.0)


def unscale_(
    grads: Sequence[Tensor], scales: Tensor, blocks: Sequence[int], *, write: bool = True
) -> tuple[Tensor, Tensor]:
    """Divide each gradient by its block's scale, and find which blocks have an element that is not finite.

        grads[i] = filter(grads[i] / scales[blocks[i]])

    Args:
        grads: floating point, any dtypes.
        scales: (n,), > 0.
        blocks: for each gradient an index into ``scales``.
        write: False leaves the gradients as they are, and computes the results alone.

    Returns:
        nonfinite, (n,) bool: whether a quotient of the block is not finite; and the sum of the squares of all finite
        quotients, float64, of no dimensions. Both are of the quotients in float32 or wider, before they are rounded
        to the gradient's dtype, in which a 16-bit one may lose them.
    """
    nonfinite = torch.zeros_like(scales, dtype=torch.bool)
    sum_of_squares = torch.zeros((), dtype=torch.float64, device=scales.device)
    for grad, block in zip(grads, blocks, strict=True):
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        quotient = wide / scales[block].to(wide.dtype)
        nonfinite[block] |= ~torch.isfinite(quotient).all()
        quotient = filter_nonfinite(quotient)
        sum_of_squares += quotient.double().square().sum()
        if write:
            grad.copy_(quotient)
    return nonfinite, sum_of_squares


def update_grad_scale(
    scale: Tensor,
    nonfinite: Tensor,
    updates_since_backoff: Tensor,
    *,
    growth_factor: float = 2 ** (1 / 1000),
    backoff_factor: float = 2**-0.5,
    backoff_interval: int = 125,
    min_scale: float = 2.0**7,
    max_scale: float = 2.0**24,
) -> tuple[Tensor, Tensor]:
    """The scales after one update, one element a block.

        every gradient of the block finite                                           scale * growth_factor
        one not finite, backoff_interval updates or more after the last back-off     scale * backoff_factor
        one not finite, sooner                                                       scale

    each clamped to min_scale..max_scale. Whether the optimiser step is skipped is the caller's: it is if any
    element of ``nonfinite`` is set.

    Args:
        scale: floating point.
        nonfinite: boolean, same shape.
        updates_since_backoff: integers, same shape: updates completed since the one that backed off: 0 right
            after it, backoff_interval for a block that never did.

    Returns:
        The new scale and the new updates_since_backoff.
    """
    elapsed = updates_since_backoff + 1
    back_off = nonfinite & (elapsed >= backoff_interval)
    grown = torch.where(nonfinite, scale, scale * growth_factor)
    moved = torch.where(back_off, scale * backoff_factor, grown)
    return moved.clamp(min_scale, max_scale), torch.where(back_off, 0, elapsed)
