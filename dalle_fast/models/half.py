"""What both models need to train in 16 bits: matrices in 16-bit storage, and a gradient scale for each residual block.

The residual stream, LayerNorms, gains and biases stay fp32. Source: arXiv 2102.12092, section 2.4 and appendix D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from dalle_fast.ops.grad_scale import scaled_resblock

_HALVES = (torch.float16, torch.bfloat16)


class Resblock(nn.Module):
    """x + branch(x), or identity(x) + branch(x) with an ``identity``; of a gradient scale's own where it has one."""

    grad_scale: Tensor | None = None

    def branch(self, x: Tensor) -> Tensor:
        """What is added."""
        raise NotImplementedError

    def identity(self) -> Callable[[Tensor], Tensor] | None:
        """What it is added to, as a function of x; None where that is x."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        identity = self.identity()
        if self.grad_scale is not None:
            x = x.float() if x.dtype in _HALVES else x  # autocast's: the residual path is fp32
            return scaled_resblock(x, self.branch, self.grad_scale, identity=identity)
        return (x if identity is None else identity(x)) + self.branch(x)


def set_grad_scales(blocks: Sequence[Resblock], scales: Sequence[Tensor] | None) -> None:
    """Give each block its scale, or none.

    Raises:
        ValueError: another number of scales than of blocks.
    """
    if scales is not None and len(scales) != len(blocks):
        raise ValueError(f"scales must be one a block, {len(blocks)}, got {len(scales)}")
    for index, block in enumerate(blocks):
        block.grad_scale = None if scales is None else scales[index]


def cast_weights(modules: Iterable[nn.Module], name: str, dtype: torch.dtype) -> None:
    """Hold the parameter ``name`` of each module in ``dtype``, the Parameter objects remaining the same."""
    for module in modules:
        weight = getattr(module, name)
        weight.data = weight.data.to(dtype)


def in_weight_dtype(
    function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, **options: int
) -> Tensor:
    """``function(x, weight, bias)`` with x and bias cast to a 16-bit weight's dtype; as it is with a wider weight.

    The bias's gradient is summed in the bias's own dtype: in float16 it would overflow before its terms do.

    On a CPU float16 is what is stored, and the sums are fp32, rounded once, as matrix units do it: PyTorch's own
    float16 products are many times slower there.
    """
    if weight.dtype not in _HALVES:
        return function(x, weight, bias, **options)
    dtype = weight.dtype
    x, rounded_bias = x.to(dtype), None if bias is None else bias.detach().to(dtype)
    if dtype == torch.float16 and x.device.type == "cpu":
        x, weight, rounded_bias = x.float(), weight.float(), None if bias is None else rounded_bias.float()
    out = function(x, weight, rounded_bias, **options)
    if bias is not None:
        out = _BiasGradient.apply(out, bias, 1 - weight.ndim)
    return out.to(dtype)


class _BiasGradient(torch.autograd.Function):
    """out, to which the bias has been added already; its gradient is summed in the bias's dtype."""

    @staticmethod
    def forward(ctx: FunctionCtx, out: Tensor, bias: Tensor, channels: int) -> Tensor:
        """channels: the dimension, from the end, along which the bias lies."""
        ctx.channels, ctx.dtype = channels, bias.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if not ctx.needs_input_grad[1]:
            return grad, None, None
        others = [dim for dim in range(grad.ndim) if dim != grad.ndim + ctx.channels]
        return grad, grad.sum(others, dtype=ctx.dtype) if others else grad.to(ctx.dtype), None
