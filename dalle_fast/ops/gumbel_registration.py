"""The Gumbel-softmax kernels as PyTorch ops: torch.library, shapes for tracing, autograd.

    torch.ops.dalle_fast.gumbel_quantize(logits, codebook, seed, tau, hard, dim, backend)
        -> (quantized, indices, kl, stats, relaxed)
    torch.ops.dalle_fast.gumbel_softmax(logits, seed, tau, hard, dim, backend) -> (weights, stats)

and of the first the backward pass. What a backward pass needs besides its inputs is ``stats``, (6, positions) float32,
and ``relaxed``, (positions, D) float32, the soft sample times the codebook. The logits are read, and their gradient is
written, as (batch, K, positions) views, whichever dimension holds the codes. ``seed`` is an int64 of no dimensions, on
the CPU for ``backend`` "cpp" and on logits' device for "triton", whose kernels read it there. ``tau`` is a float64 of
no dimensions on the CPU: a number would be part of a compiled graph, and each temperature of a schedule compile anew.

Nothing is checked here: call ``dalle_fast.gumbel_quantize`` and ``dalle_fast.gumbel_softmax``. The former has no second
derivative.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dalle_fast.ops.registration import define_op

NUM_STATS = 6
# They read the temperature from the CPU's memory when they are called: a CUDA graph that a compiler captures would
# replay the first one.
_READS_TAU = torch.Tag.cudagraph_unsafe


def _three_dims(shape: torch.Size, dim: int) -> tuple[int, int, int]:
    """Batch, codes and positions: the product of the dimensions before ``dim``, itself, and of those after."""
    dim = dim % len(shape)
    return math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])


def _empty_like(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """An uninitialised tensor of the same shape, laid out alike if three dimensions can describe it, and its view."""
    shape, empty = _three_dims(logits.shape, dim), torch.empty_like(logits)
    try:
        return empty, empty.view(shape)
    except (RuntimeError, ValueError):  # the latter while tracing
        empty = torch.empty_like(logits, memory_format=torch.contiguous_format)
        return empty, empty.view(shape)


def _swap_dim(shape: torch.Size, dim: int, size: int) -> list[int]:
    dim = dim % len(shape)
    return [*shape[:dim], size, *shape[dim + 1 :]]


def _drop_dim(shape: torch.Size, dim: int) -> list[int]:
    dim = dim % len(shape)
    return [*shape[:dim], *shape[dim + 1 :]]


def _rows_to_dim(rows: Tensor, logits: Tensor, dim: int) -> Tensor:
    """(positions, D) to the shape of logits with D instead of the codes, in their dtype, contiguous."""
    batch, _, positions = _three_dims(logits.shape, dim)
    moved = rows.view(batch, positions, rows.shape[1]).transpose(1, 2).to(logits.dtype)
    return moved.reshape(_swap_dim(logits.shape, dim, rows.shape[1])).contiguous()


def _dim_to_rows(tensor: Tensor, dim: int) -> Tensor:
    """The reverse, float32 and contiguous."""
    batch, width, positions = _three_dims(tensor.shape, dim)
    rows = tensor.reshape(batch, width, positions).transpose(1, 2).reshape(batch * positions, width)
    return rows.to(torch.float32).contiguous()


def _empty_results(view: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """stats, indices, kl and relaxed for logits (batch, K, positions)."""
    rows = view.shape[0] * view.shape[2]
    return (
        view.new_empty((NUM_STATS, rows), dtype=torch.float32),
        view.new_empty(rows, dtype=torch.int64),
        view.new_empty(rows, dtype=torch.float32),
        view.new_empty((rows, width), dtype=torch.float32),
    )


def _wide(codebook: Tensor) -> Tensor:
    return codebook.to(torch.float32).contiguous()


@define_op(
    "gumbel_quantize(Tensor logits, Tensor codebook, Tensor seed, Tensor tau, bool hard, int dim, str backend) "
    "-> (Tensor quantized, Tensor indices, Tensor kl, Tensor stats, Tensor relaxed)",
    _READS_TAU,
)
def gumbel_quantize(logits, codebook, seed, tau, hard, dim, backend):
    batch, _, positions = dims = _three_dims(logits.shape, dim)
    view, shape, width = logits.reshape(dims), _drop_dim(logits.shape, dim), codebook.shape[1]
    stats, indices, kl, relaxed = _empty_results(view, width)
    if backend == "triton":
        from dalle_fast.kernels.gumbel import gumbel_fwd

        quantized = logits.new_empty(_swap_dim(logits.shape, dim, width))
        columns = quantized.view(batch, width, positions)
        gumbel_fwd(view, codebook, seed, stats, indices, kl, relaxed, columns, tau=tau.item(), hard=hard)
        return quantized, indices.view(shape), kl.view(shape), stats, relaxed
    torch.ops.dalle_fast.gumbel_forward_cpu(view, _wide(codebook), seed, tau.item(), stats, indices, kl, relaxed)
    rows = relaxed
    if hard:
        # NaN where the soft sample is.
        rows = codebook.index_select(0, indices).masked_fill_(~stats[1, :, None].isfinite(), math.nan)
    quantized = _rows_to_dim(rows, logits, dim)
    # Where nothing had to be moved or rounded, the copy is that of ``relaxed``, which no two results may share.
    quantized = quantized.clone() if quantized.data_ptr() == relaxed.data_ptr() else quantized
    return quantized, indices.view(shape), kl.view(shape), stats, relaxed


@define_op(
    "gumbel_quantize_backward(Tensor logits, Tensor codebook, Tensor seed, Tensor stats, Tensor relaxed, "
    "Tensor grad_quantized, Tensor? grad_kl, Tensor tau, int dim, bool to_logits, bool to_codebook, str backend) "
    "-> (Tensor grad_logits, Tensor grad_codebook)",
    _READS_TAU,
)
def _gumbel_quantize_backward(
    logits, codebook, seed, stats, relaxed, grad_quantized, grad_kl, tau, dim, to_logits, to_codebook, backend
):
    batch, _, positions = dims = _three_dims(logits.shape, dim)
    grad_logits, view = _empty_like(logits, dim) if to_logits else (logits.new_empty(0), None)
    shape = codebook.shape if to_codebook else (0,)
    if logits.numel() == 0:
        return grad_logits, codebook.new_zeros(shape)
    grad_kl = None if grad_kl is None else grad_kl.flatten().contiguous()
    if backend == "triton":
        from dalle_fast.kernels.gumbel_backward import gumbel_bwd

        grad_codebook = codebook.new_empty(shape)
        columns = grad_quantized.reshape(batch, codebook.shape[1], positions)
        gumbel_bwd(
            *(logits.reshape(dims), codebook, seed, stats, relaxed, columns, grad_kl),
            *(view, grad_codebook if to_codebook else None),
            tau=tau.item(),
        )
        return grad_logits, grad_codebook
    grad_codebook = codebook.new_empty(shape, dtype=torch.float32)
    torch.ops.dalle_fast.gumbel_backward_cpu(
        *(logits.reshape(dims), _wide(codebook), seed, tau.item(), stats, relaxed),
        *(_dim_to_rows(grad_quantized, dim), grad_kl, view, grad_codebook if to_codebook else None),
    )
    return grad_logits, grad_codebook.to(codebook.dtype)


@define_op(
    "gumbel_softmax(Tensor logits, Tensor seed, Tensor tau, bool hard, int dim, str backend) "
    "-> (Tensor weights, Tensor stats)",
    _READS_TAU,
)
def gumbel_softmax(logits, seed, tau, hard, dim, backend):
    view = logits.reshape(_three_dims(logits.shape, dim))
    stats, indices, kl, _ = _empty_results(view, 0)
    if backend == "triton":
        from dalle_fast.kernels.gumbel import gumbel_fwd

        # Without kl, the numbers that its gradient takes are not made.
        gumbel_fwd(view, None, seed, stats.zero_(), indices, None, None, None, tau=tau.item(), hard=hard)
    else:
        torch.ops.dalle_fast.gumbel_forward_cpu(view, None, seed, tau.item(), stats, indices, kl, None)
    weights, view = _empty_like(logits, dim)
    if hard:
        batch, _, positions = view.shape
        # NaN where the soft sample is: there, the inverse of the weights' sum is not finite.
        zero = (0.0 * stats[1]).to(view.dtype).view(batch, 1, positions)
        view.copy_(zero).scatter_(1, indices.view(batch, 1, positions), 1.0 + zero)
    else:
        _write_weights(logits, seed, tau, stats, view, backend)
    return weights, stats


def _write_weights(logits: Tensor, seed: Tensor, tau: Tensor, stats: Tensor, view: Tensor, backend: str) -> None:
    """Fill ``view``, (batch, K, positions), with the soft samples."""
    if backend == "triton":
        from dalle_fast.kernels.gumbel import gumbel_weights

        gumbel_weights(logits.reshape(view.shape), seed, stats, view, tau=tau.item())
    else:
        torch.ops.dalle_fast.gumbel_weights_cpu(logits.reshape(view.shape), seed, tau.item(), stats, view)


@torch.library.register_fake(gumbel_quantize)
def _(logits, codebook, seed, tau, hard, dim, backend):
    batch, _, positions = _three_dims(logits.shape, dim)
    shape = _drop_dim(logits.shape, dim)
    return (
        logits.new_empty(_swap_dim(logits.shape, dim, codebook.shape[1])),
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty((NUM_STATS, batch * positions), dtype=torch.float32),
        logits.new_empty((batch * positions, codebook.shape[1]), dtype=torch.float32),
    )


@torch.library.register_fake(_gumbel_quantize_backward)
def _(logits, codebook, seed, stats, relaxed, grad_quantized, grad_kl, tau, dim, to_logits, to_codebook, backend):
    grad_logits = _empty_like(logits, dim)[0] if to_logits else logits.new_empty(0)
    return grad_logits, codebook.new_empty(codebook.shape if to_codebook else (0,))


@torch.library.register_fake(gumbel_softmax)
def _(logits, seed, tau, hard, dim, backend):
    batch, _, positions = _three_dims(logits.shape, dim)
    return _empty_like(logits, dim)[0], logits.new_empty((NUM_STATS, batch * positions), dtype=torch.float32)


def _save_quantize(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, codebook, seed, tau, _, ctx.dim, ctx.backend = inputs
    _, indices, _, stats, relaxed = output
    ctx.save_for_backward(logits, codebook, seed, stats, relaxed, tau)
    ctx.mark_non_differentiable(indices, stats, relaxed)
    ctx.set_materialize_grads(False)


def _differentiate_quantize(ctx: Any, grad_quantized: Tensor | None, _indices, grad_kl: Tensor | None, *_) -> tuple:
    logits, codebook, seed, stats, relaxed, tau = ctx.saved_tensors
    if grad_quantized is None:
        if grad_kl is None:
            return (None,) * 7
        shape = _swap_dim(logits.shape, ctx.dim, codebook.shape[1])
        grad_quantized = logits.new_zeros(shape)
    needed = ctx.needs_input_grad[:2]
    grads = _gumbel_quantize_backward(
        logits, codebook, seed, stats, relaxed, grad_quantized, grad_kl, tau, ctx.dim, *needed, ctx.backend
    )
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None, None, None, None


def _save_softmax(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, seed, tau, ctx.hard, ctx.dim, ctx.backend = inputs
    weights, stats = output
    # Of the one-hot sample the gradient is that of the soft one, which is made again.
    ctx.save_for_backward(logits if ctx.hard else weights, seed, stats, tau)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _save_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, stats, tau, ctx.dim, ctx.backend = inputs
    ctx.hard = False
    ctx.save_for_backward(output, seed, stats, tau)
    ctx.set_materialize_grads(False)


def _differentiate_softmax(ctx: Any, grad: Tensor | None, *_) -> tuple:
    saved, seed, stats, tau = ctx.saved_tensors
    if grad is None:
        return (None,) * 6
    weights = saved
    if ctx.hard:
        weights = _gumbel_softmax_weights(saved, seed, stats, tau, ctx.dim, ctx.backend)
    return torch._softmax_backward_data(grad, weights, ctx.dim, weights.dtype) / tau, None, None, None, None, None


@define_op(
    "gumbel_softmax_weights(Tensor logits, Tensor seed, Tensor stats, Tensor tau, int dim, str backend) -> Tensor",
    _READS_TAU,
)
def _gumbel_softmax_weights(logits, seed, stats, tau, dim, backend):
    weights, view = _empty_like(logits, dim)
    _write_weights(logits, seed, tau, stats, view, backend)
    return weights


@torch.library.register_fake(_gumbel_softmax_weights)
def _(logits, seed, stats, tau, dim, backend):
    return _empty_like(logits, dim)[0]


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError('gumbel_quantize has no second derivative; use backend="reference", which has')


torch.library.register_autograd(gumbel_quantize, _differentiate_quantize, setup_context=_save_quantize)
torch.library.register_autograd(gumbel_softmax, _differentiate_softmax, setup_context=_save_softmax)
torch.library.register_autograd(_gumbel_softmax_weights, _differentiate_softmax, setup_context=_save_weights)
torch.library.register_autograd(_gumbel_quantize_backward, _refuse)
