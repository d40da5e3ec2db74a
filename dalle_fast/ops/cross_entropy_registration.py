"""Cross-entropy of a linear classifier as a PyTorch op: torch.library, shapes for tracing, autograd.

    torch.ops.dalle_fast.linear_cross_entropy(hidden, weight, target, bias, reduction, ignore_index,
                                              to_hidden, to_weight, to_bias, backend)
        -> (loss, grad_hidden, grad_weight, grad_bias)

A sweep takes some of the positions at a time: their logits, one matrix product; losses and, in the logits' place, their
gradients, one kernel; the gradients of hidden and of weight, two matrix products. So (N, V) logits never exist. With a
reduction to one number the upstream gradient is a factor of everything, and the forward pass computes all gradients, in
float32. The first backward pass multiplies them by it in place and gives them away: a copy would be the peak of memory.
Any further one finds none and sweeps again. So does every backward pass of "none", where each position has its own
upstream gradient.

``to_...`` says which gradients the forward pass computes; the others are empty. ``backend`` is "cpp" or "triton". A CPU
takes only the positions that count. An accelerator takes all of them, so as to wait for no number from the device; an
ignored row of logits is not read and its gradient is 0.

Nothing is checked here but, on a CPU, the targets' range: call ``dalle_fast.linear_cross_entropy``. There is no second
derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dalle_fast.ops.checks import without_autocast
from dalle_fast.ops.registration import define_op

# Logits of a chunk. CPU: 8 MB; docs/log.md has the times of others. Accelerators: 256 MB in float32, not measured;
# large enough to fill one with matrix products, and small beside activations and weights.
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
# Fewer rows make the products with the weights bound by memory, however many classes there are.
LEAST_ROWS = 256
# Summed by one thread, so that the order does not depend on how many there are.
SUMMED_AT_ONCE = 8192

_ARGS = "Tensor hidden, Tensor weight, Tensor target, Tensor? bias"
_OPTIONS = "str reduction, int ignore_index, bool to_hidden, bool to_weight, bool to_bias, str backend"


def chunk_rows(rows: int, num_classes: int, device_type: str) -> int:
    """Rows of a chunk: as many as ``CHUNK_ELEMENTS`` allows, and all chunks about equal."""
    elements = CHUNK_ELEMENTS.get(device_type, CHUNK_ELEMENTS["cuda"])
    chunks = -(-rows // max(elements // num_classes, LEAST_ROWS))
    return -(-rows // max(chunks, 1))


def _sweep(hidden, weight, target, bias, upstream, reduction, ignore_index, needed, backend) -> tuple:
    """All positions, chunk by chunk.

    Args:
        upstream: gradient of the result of ``reduction``, float32: a scalar, or with "none" (N,); None is 1.
        needed: three bools, which gradients: of hidden, weight and bias.

    Returns:
        (N,) losses, 0 where ignored; one over the number of positions that count, without dimensions; the three
        gradients. All float32; gradients that are not needed are None.
    """
    with without_autocast(hidden.device):
        hidden, target = hidden.reshape(target.numel(), hidden.shape[-1]), target.reshape(-1).contiguous()
        if backend == "cpp":
            return _sweep_counted(hidden, weight, target, bias, upstream, reduction, ignore_index, needed)
        scale = (target != ignore_index).sum().clamp(min=1).to(torch.float32).reciprocal()
        factor = _row_factors(upstream, scale, reduction, target.shape[0])
        losses, *grads = _chunks(hidden, weight, target, bias, factor, ignore_index, needed, backend)
        return losses, scale, *grads


def _sweep_counted(hidden, weight, target, bias, upstream, reduction, ignore_index, needed) -> tuple:
    """On a CPU: those positions alone whose target is not ignore_index."""
    num_rows, num_classes = target.shape[0], weight.shape[0]
    positions, counted = target.new_empty((2, num_rows)).unbind(0)
    count = torch.ops.dalle_fast.counted_targets_cpu(target, num_classes, ignore_index, positions, counted)
    if count < 0:
        label = target[-1 - count]
        raise ValueError(f"target must be in 0..{num_classes - 1} or ignore_index {ignore_index}, got {label}")
    scale = hidden.new_full((), 1 / max(count, 1), dtype=torch.float32)
    factor = _row_factors(upstream, scale, reduction, num_rows) if any(needed) else None
    if count == num_rows:
        losses, *grads = _chunks(hidden, weight, target, bias, factor, ignore_index, needed, "cpp")
        return losses, scale, *grads
    positions, counted = positions[:count], counted[:count]
    hidden = hidden.index_select(0, positions)
    factor = None if factor is None else factor.index_select(0, positions)
    losses, grad_hidden, *grads = _chunks(hidden, weight, counted, bias, factor, ignore_index, needed, "cpp")
    losses = losses.new_zeros(num_rows).index_copy_(0, positions, losses)
    if grad_hidden is not None:
        grad_hidden = grad_hidden.new_zeros((num_rows, hidden.shape[1])).index_copy_(0, positions, grad_hidden)
    return losses, scale, grad_hidden, *grads


def _row_factors(upstream: Tensor | None, scale: Tensor, reduction: str, num_rows: int) -> Tensor | None:
    """Gradients of the result for each row's loss, (N,) float32; None is 1."""
    if reduction == "mean":
        upstream = scale if upstream is None else upstream * scale
    return None if upstream is None else upstream.to(torch.float32).expand(num_rows).contiguous()


def _chunks(hidden, weight, target, bias, factor, ignore_index, needed, backend) -> tuple:
    """losses, grad_hidden, grad_weight and grad_bias of rows (N, D), whose losses' gradients are ``factor``."""
    (num_rows, dim), num_classes, device = hidden.shape, weight.shape[0], hidden.device
    to_hidden, to_weight, to_bias = needed
    with_grad = any(needed)
    # Tensor cores multiply 16-bit numbers and add in float32; a CPU's products would round the logits.
    is_narrow = device.type == "cuda" and hidden.dtype != torch.float32
    if not is_narrow:
        weight = weight.to(torch.float32)
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    losses = torch.empty(num_rows, dtype=torch.float32, device=device)
    grad_hidden = losses.new_empty((num_rows, dim)) if to_hidden else None
    grad_weight = losses.new_empty(weight.shape) if to_weight else None
    grad_bias = losses.new_zeros(num_classes) if to_bias else None
    if num_rows == 0:
        return losses, grad_hidden, None if grad_weight is None else grad_weight.zero_(), grad_bias
    size = chunk_rows(num_rows, num_classes, device.type)
    logits = losses.new_empty((size, num_classes))
    narrow = logits.new_empty(logits.shape, dtype=hidden.dtype) if is_narrow and with_grad else None
    largest = None
    if is_narrow and factor is not None:
        # So that gradients of 16 bits do not leave their range.
        largest = factor.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        factor = factor / largest
    for start in range(0, num_rows, size):
        end = min(start + size, num_rows)
        rows = hidden[start:end]
        if not is_narrow:
            rows = rows.to(torch.float32)
        part = logits[: end - start]
        _product(rows, weight.t(), part)
        _cross_entropy_rows(
            part,
            bias,
            target[start:end],
            None if factor is None else factor[start:end],
            ignore_index,
            losses[start:end],
            (part if narrow is None else narrow[: end - start]) if with_grad else None,
            backend,
        )
        grads = part if narrow is None else narrow[: end - start]
        if grad_hidden is not None:
            _product(grads, weight, grad_hidden[start:end])
        if grad_weight is not None:
            _product(grads.t(), rows, grad_weight, add=start > 0)
        if grad_bias is not None:
            grad_bias += grads.sum(0, dtype=torch.float32)
    if largest is not None:
        for grad in (grad_hidden, grad_weight, grad_bias):
            if grad is not None:
                grad.mul_(largest)
    return losses, grad_hidden, grad_weight, grad_bias


def _product(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> None:
    """left @ right, or with ``add`` that much more, in float32."""
    wide = {} if left.dtype == torch.float32 else {"out_dtype": torch.float32}
    if add:
        torch.addmm(out, left, right, out=out, **wide)
    else:
        torch.mm(left, right, out=out, **wide)


def _cross_entropy_rows(logits, bias, target, factor, ignore_index, losses, grads, backend) -> None:
    """Fill ``losses`` and, unless it is None, ``grads``, which may be ``logits`` itself."""
    if backend == "cpp":
        torch.ops.dalle_fast.cross_entropy_rows_cpu(logits, bias, target, factor, grads is not None, losses)
    else:
        from dalle_fast.kernels.cross_entropy import cross_entropy_rows

        cross_entropy_rows(logits, bias, target, factor, losses, grads, ignore_index=ignore_index)


def _sum(losses: Tensor) -> Tensor:
    if losses.shape[0] <= SUMMED_AT_ONCE:
        return losses.sum()
    return torch.stack([part.sum() for part in losses.split(SUMMED_AT_ONCE)]).sum()


def _is_needed(tensor: Tensor | None, need: bool) -> bool:
    return need and tensor is not None


@define_op(
    f"linear_cross_entropy({_ARGS}, {_OPTIONS}) "
    "-> (Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)
def linear_cross_entropy(hidden, weight, target, bias, reduction, ignore_index, to_hidden, to_weight, to_bias, backend):
    needed = (False,) * 3 if reduction == "none" else (to_hidden, to_weight, _is_needed(bias, to_bias))
    losses, scale, *grads = _sweep(hidden, weight, target, bias, None, reduction, ignore_index, needed, backend)
    if reduction == "none":
        loss = losses.view(target.shape)
    else:
        loss = _sum(losses) * scale if reduction == "mean" else _sum(losses)
    return loss, *(losses.new_empty(0) if grad is None else grad for grad in grads)


@define_op(
    f"linear_cross_entropy_backward({_ARGS}, Tensor upstream, Tensor grad_hidden, Tensor grad_weight, "
    f"Tensor grad_bias, {_OPTIONS}) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)
def _linear_cross_entropy_backward(
    hidden, weight, target, bias, upstream, grad_hidden, grad_weight, grad_bias,
    reduction, ignore_index, to_hidden, to_weight, to_bias, backend,
):  # fmt: skip
    inputs, needed = (hidden, weight, bias), (to_hidden, to_weight, _is_needed(bias, to_bias))
    grads = grad_hidden, grad_weight, grad_bias
    if all(grad.numel() == x.numel() for grad, x, need in zip(grads, inputs, needed, strict=True) if need):
        grads = [grad * upstream if need else None for grad, need in zip(grads, needed, strict=True)]
    else:
        upstream = upstream.reshape(-1) if reduction == "none" else upstream
        grads = _sweep(hidden, weight, target, bias, upstream, reduction, ignore_index, needed, backend)[2:]
    return tuple(hidden.new_empty(0) if grad is None else _like(grad, x) for grad, x in zip(grads, inputs, strict=True))


def _like(grad: Tensor, tensor: Tensor) -> Tensor:
    return grad.to(tensor.dtype).view(tensor.shape)


@torch.library.register_fake(linear_cross_entropy)
def _(hidden, weight, target, bias, reduction, ignore_index, to_hidden, to_weight, to_bias, backend):
    def wide(shape):
        return hidden.new_empty(shape, dtype=torch.float32)

    if reduction == "none":
        return wide(target.shape), wide(0), wide(0), wide(0)
    return (
        wide(()),
        wide((target.numel(), hidden.shape[-1]) if to_hidden else 0),
        wide(weight.shape if to_weight else 0),
        wide(bias.shape if _is_needed(bias, to_bias) else 0),
    )


@torch.library.register_fake(_linear_cross_entropy_backward)
def _(
    hidden, weight, target, bias, upstream, grad_hidden, grad_weight, grad_bias,
    reduction, ignore_index, to_hidden, to_weight, to_bias, backend,
):  # fmt: skip
    needed = to_hidden, to_weight, _is_needed(bias, to_bias)
    return tuple(
        hidden.new_empty(x.shape if need else 0) for x, need in zip((hidden, weight, bias), needed, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, bias, ctx.reduction, ctx.ignore_index, *_, ctx.backend = inputs
    ctx.save_for_backward(hidden, weight, target, bias)
    ctx.grads = list(output[1:])  # not saved: the first backward pass may change them and give them away
    ctx.mark_non_differentiable(*ctx.grads)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, upstream: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 10
    hidden, weight, target, bias = ctx.saved_tensors
    needed = [ctx.needs_input_grad[place] for place in (0, 1, 3)]
    grads = [None] * 3
    # A pass that is itself recorded, to be differentiated or compiled, must leave everything as it is; so must one for
    # many upstream gradients at once, each of which needs it.
    is_plain = type(upstream) is Tensor and not torch._C._functorch.is_legacy_batchedtensor(upstream)
    if is_plain and not torch.is_grad_enabled():
        grads = [
            _take(ctx.grads, place, upstream, x) if need else None
            for place, (x, need) in enumerate(zip((hidden, weight, bias), needed, strict=True))
        ]
    missing = [need and grad is None for need, grad in zip(needed, grads, strict=True)]
    if any(missing):
        found = _linear_cross_entropy_backward(
            hidden, weight, target, bias, upstream, *ctx.grads, ctx.reduction, ctx.ignore_index, *missing, ctx.backend
        )
        grads = [one if need else grad for one, need, grad in zip(found, missing, grads, strict=True)]
    return grads[0], grads[1], None, grads[2], *(None,) * 6


def _take(grads: list[Tensor], place: int, upstream: Tensor, tensor: Tensor) -> Tensor | None:
    """The gradient of ``tensor`` times ``upstream``, out of the list, or None if it is not there."""
    grad = grads[place]
    if grad.numel() != tensor.numel() or grad.numel() == 0:
        return None
    grads[place] = grad.new_empty(0)
    # On a CPU it costs nothing to look; elsewhere it would be a wait for the device.
    is_one = upstream.device.type == "cpu" and upstream.item() == 1
    return _like(grad if is_one else grad.mul_(upstream), tensor)


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError('linear_cross_entropy has no second derivative; use backend="reference", which has')


torch.library.register_autograd(linear_cross_entropy, _differentiate, setup_context=_save)
torch.library.register_autograd(_linear_cross_entropy_backward, _refuse)
