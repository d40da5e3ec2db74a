"""Gradient scaling of residual blocks: the public ops.

What they compute is defined by ``dalle_fast.reference.grad_scale``; this module checks the arguments and picks the
code that runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from dalle_fast import reference
from dalle_fast.ops import backends
from dalle_fast.ops.checks import check_backend, check_floating, shape_of
from dalle_fast.ops.tensor_table import CHUNK, DTYPE_CODES, is_dense, make_table

_RESBLOCK_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


if backends.extension is not None:
    # All they do is to write into their arguments.
    for _op in ("resblock_scale", "resblock_unscale_add"):
        torch.library.register_fake(f"dalle_fast::{_op}", lambda *args: None)


class Unscaled(NamedTuple):
    """What :func:`unscale_` found."""

    nonfinite: Tensor  # (n,) bool, one a block
    sum_of_squares: Tensor  # float64, no dimensions


class GradScaling(NamedTuple):
    """What an optimiser that reads scaled gradients has to know about them.

    Attributes:
        scales: (n,) float32; the gradient of a parameter is to be divided by its block's.
        block_of: each parameter's index into ``scales``.
        skip: bool, no dimensions: whether the whole update is to be left out.
        sum_of_squares: float64, no dimensions: of all quotients.
    """

    scales: Tensor
    block_of: Mapping[Tensor, int]
    skip: Tensor
    sum_of_squares: Tensor


def scaled_resblock(
    x: Tensor,
    fn: Callable[[Tensor], Tensor],
    scale: float | Tensor,
    *,
    identity: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """x + fn(x), with fn's backward run on a gradient that is multiplied by ``scale``.

    In backward the gradient g of the result is multiplied by the scale before it enters fn and divided by it
    when it leaves, non-finite elements becoming 0 in both places, and is then added to g itself, which is
    never scaled. Gradients of fn's own parameters keep the scale: :class:`dalle_fast.ResblockGradScaler` takes it out.
    The scale does not cancel in a second derivative, so that asking for one is an error of autograd's.

    Args:
        x: float32 or float64, the residual path.
        fn: the branch; its result has the shape of the residual path and any floating-point dtype.
        scale: > 0 and finite, a number or a tensor of one element (whose value is not checked, and which is read on
            its device in backward: a scaler may change it in place between two updates).
        identity: replaces x by identity(x) where the block changes the number of channels; its own parameters'
            gradients are not scaled.
        backend: "auto", "cpp" or "reference". Under torch.compile "auto" leaves the arithmetic to the compiler, which
            fuses it with what stands beside it.

    Returns:
        The shape of the residual path, x's dtype.

    Raises:
        TypeError: x is of another dtype, or fn's result is not floating point.
        ValueError: scale out of range, or fn's result is of another shape.
        RuntimeError: a backend that is not there.

    Source: arXiv 2102.12092, section 2.4 and Figure 4.
    """
    check_backend("scaled_resblock", backend, ("cpp",))
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be float32 or float64, for the residual path is not 16-bit, got {kind}")
    _check_scale(scale)
    if backend == "cpp":
        backends.require_cpp_backend(x.device)
        if x.dtype != torch.float32:
            raise RuntimeError(f'backend "cpp" of scaled_resblock takes float32, got {x.dtype}')
    native = backend == "cpp" or (
        backend == "auto"
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and backends.has_cpp_backend(x.device)
    )
    scale = torch.as_tensor(scale, dtype=x.dtype, device=x.device).reshape(())
    entry, residual = _EnterBlock.apply(x, scale, native)
    branch = fn(entry)
    if identity is not None:
        residual = identity(residual).to(x.dtype)
    check_floating(**{"fn(x)": branch})
    if branch.shape != residual.shape:
        name = "x" if identity is None else "identity(x)"
        raise ValueError(f"fn(x) must have {name}'s shape {shape_of(residual)}, got {shape_of(branch)}")
    return _LeaveBlock.apply(residual, branch, scale, native)


class _EnterBlock(torch.autograd.Function):
    """x twice, for the branch and for the residual path, so that backward adds their gradients in one pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, native: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(scale)
        ctx.native = native
        return x.view_as(x), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, grad_residual: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        if not ctx.native:
            return grad_residual + reference.filter_nonfinite(grad / scale), None, None
        grad_residual = _dense(grad_residual)
        out = torch.empty_like(grad_residual)
        torch.ops.dalle_fast.resblock_unscale_add(_laid_out_as(grad, grad_residual), scale, grad_residual, out)
        return out, None, None


class _LeaveBlock(torch.autograd.Function):
    """residual + branch; backward scales and filters the branch's gradient and casts it to the branch's dtype."""

    @staticmethod
    def forward(ctx: FunctionCtx, residual: Tensor, branch: Tensor, scale: Tensor, native: bool) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.native = native and branch.dtype in _RESBLOCK_DTYPES
        ctx.dtype = branch.dtype
        return residual + branch.to(residual.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        if not ctx.native:
            return grad, reference.filter_nonfinite(grad * scale).to(ctx.dtype), None, None
        if not ctx.needs_input_grad[1]:
            return grad, None, None, None
        dense = _dense(grad)
        out = torch.empty_like(dense, dtype=ctx.dtype)
        torch.ops.dalle_fast.resblock_scale(dense, scale, out)
        return grad, out, None, None


def _dense(tensor: Tensor) -> Tensor:
    return tensor if is_dense(tensor) else tensor.contiguous()


def _laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def unscale_(
    grads: Sequence[Tensor],
    scales: Tensor,
    blocks: Sequence[int] | None = None,
    *,
    write: bool = True,
    backend: str = "auto",
) -> Unscaled:
    """Divide each gradient by its block's scale, in place, and find which blocks have an element that is not finite.

        grads[i] = filter(grads[i] / scales[blocks[i]])

    where filter replaces non-finite elements by 0. A 16-bit gradient loses what falls below its format when it is
    divided: hold it in float32, or leave the division to an optimiser that reads scaled gradients
    (:class:`dalle_fast.AdamW16`) with ``write=False``. C++ does all tensors in one pass, on a GPU in one launch, and
    its results do not depend on the number of threads.

    Args:
        grads: floating point, on one device, dense or strided.
        scales: (n,) float32 on the gradients' device, > 0 (which is not checked).
        blocks: for each gradient an index into ``scales``; None where there is one scale.
        write: False leaves the gradients as they are, and computes the results alone.
        backend: "auto", "cpp" (float32, float16 and bfloat16) or "reference".

    Returns:
        ``nonfinite``, (n,) bool, whether a quotient of the block is not finite, and ``sum_of_squares``, float64, of
        all finite quotients, before they are rounded to the gradients' dtypes.

    Raises:
        ValueError: mixed devices, a block out of range, or another number of blocks than of gradients.
        TypeError: a gradient that is no floating-point tensor, or sparse.
        RuntimeError: a backend that is not there, or does not take the dtypes.

    Source: arXiv 2102.12092, appendix D.1.
    """
    check_backend("unscale_", backend, ("cpp",))
    blocks = [0] * len(grads) if blocks is None else list(blocks)
    _check_unscale(grads, scales, blocks)
    native = all(grad.dtype in DTYPE_CODES for grad in grads)
    if backend == "cpp":
        backends.require_cpp_backend(scales.device)
        if not native:
            dtypes = ", ".join(sorted({str(grad.dtype) for grad in grads}))
            raise RuntimeError(f'backend "cpp" of unscale_ takes float32, float16 and bfloat16, got {dtypes}')
    with torch.no_grad():
        if backend == "reference" or not native or not backends.has_cpp_backend(scales.device):
            return Unscaled(*reference.unscale_(grads, scales, blocks, write=write))
        return _native_unscale_(grads, scales, blocks, write)


def _native_unscale_(grads: Sequence[Tensor], scales: Tensor, blocks: list[int], write: bool) -> Unscaled:
    found = Unscaled(
        torch.zeros(scales.shape, dtype=torch.bool, device=scales.device),
        torch.zeros((), dtype=torch.float64, device=scales.device),
    )
    if not any(grad.numel() for grad in grads):
        return found
    dense = [_dense(grad) for grad in grads]
    table = make_table([dense, blocks])
    torch.ops.dalle_fast.multi_tensor_unscale(
        table.rows, table.num_chunks, CHUNK, scales.contiguous(), write, found.nonfinite, found.sum_of_squares
    )
    if write:
        for grad, copy in zip(grads, dense, strict=True):
            if copy is not grad:
                grad.copy_(copy)
    return found


def _check_unscale(grads: Sequence[Tensor], scales: Tensor, blocks: list[int]) -> None:
    check_floating(scales=scales)
    if scales.ndim != 1 or scales.dtype != torch.float32:
        raise ValueError(f"scales must be float32 of one dimension, got {scales.dtype} of shape {shape_of(scales)}")
    if len(blocks) != len(grads):
        raise ValueError(f"blocks must have an entry for each of the {len(grads)} gradients, got {len(blocks)}")
    device, num_blocks = scales.device, len(scales)
    for index, (grad, block) in enumerate(zip(grads, blocks, strict=True)):
        if not isinstance(grad, Tensor) or not grad.is_floating_point():
            check_floating(**{f"grads[{index}]": grad})
        if grad.layout != torch.strided:
            raise TypeError(f"grads[{index}] must be dense, got layout {grad.layout}")
        if grad.device != device:
            raise ValueError(f"grads must be on the device of scales, {device}, got {grad.device}")
        if not 0 <= block < num_blocks:
            raise ValueError(f"blocks must lie in [0, {num_blocks}), got {block}")


def _check_scale(scale: float | Tensor) -> None:
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"scale must be a number or a tensor of one element, got shape {shape_of(scale)}")
    elif not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be finite and > 0, got {scale}")
