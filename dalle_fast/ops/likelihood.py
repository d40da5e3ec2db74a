"""The logit-Laplace likelihood of a pixel: the public op, and its registration.

What it computes is defined by ``dalle_fast.reference.likelihood``. Written out, autograd keeps three more tensors of
the size of the image for the backward pass; the op keeps its inputs and has the gradient in closed form:

    d = logit x - mu
    -ln f(x | mu, b)  =  |d| / b + ln b + ln(2 x (1 - x))
    d mu = -sign(d) / b        d ln b = 1 - |d| / b        d x = (sign(d) / b + 1 - 2 x) / (x (1 - x))

Forward reads x, mu and ln b and works in place on three temporaries; backward makes d and 1 / b again. The gradient
that comes in is multiplied in before |d| is, so that a mean over many pixels stays finite for small b. Under
torch.compile the reference is traced instead, which the compiler fuses.

    torch.ops.dalle_fast.logit_laplace_nll(target, mu, log_scale) -> Tensor

Numerics: float32 inside, also for 16-bit inputs; float64 stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dalle_fast import reference
from dalle_fast.ops.checks import check_backend, shape_of
from dalle_fast.ops.registration import define_op
from dalle_fast.reference.likelihood import largest_exponent

__all__ = ["logit_laplace_nll"]


def logit_laplace_nll(target: Tensor, mu: Tensor, log_scale: Tensor | float, *, backend: str = "auto") -> Tensor:
    """-ln of the logit-Laplace density, in nats, elementwise.

        -ln f(x | mu, b) = |logit x - mu| / b + ln b + ln 2 + ln x + ln(1 - x)

    Args:
        target: x, floating point, values in (0, 1), as :func:`dalle_fast.models.dvae.map_pixels` gives them.
        mu: same shape.
        log_scale: ln b, same shape or one number. Below -88 (-709 in float64) it counts as that in 1 / b, whose largest
            value is e^88.
        backend: "auto" or "reference", which has second derivatives.

    Returns:
        Target's shape, float32 or wider; negative where the density is above 1. The gradient of mu at logit x is 0.

    Raises:
        ValueError: shapes differ.
        TypeError: not floating point.
        RuntimeError: a backend that is not there.

    Source: arXiv 2102.12092, appendix A.3, equation 2.
    """
    check_backend("logit_laplace_nll", backend)
    for name, value in (("target", target), ("mu", mu)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if mu.shape != target.shape:
        raise ValueError(f"mu must have target's shape {shape_of(target)}, got {shape_of(mu)}")
    if not isinstance(log_scale, Tensor):
        log_scale = torch.full((), log_scale, dtype=torch.promote_types(mu.dtype, torch.float32), device=mu.device)
    elif log_scale.dim() == 0:
        log_scale = log_scale.expand(mu.shape)
    elif log_scale.shape != mu.shape:
        raise ValueError(f"log_scale must have target's shape {shape_of(target)}, got {shape_of(log_scale)}")
    if backend == "reference" or torch.compiler.is_compiling():
        return reference.logit_laplace_nll(target, mu, log_scale)
    return _op(target, mu, log_scale)


def _widen(target: Tensor, mu: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(mu.dtype, torch.float32)
    return target.to(wide), mu.to(wide), log_scale.to(wide)


def _inverse_scale(log_scale: Tensor) -> Tensor:
    return torch.neg(log_scale).clamp_(max=largest_exponent(log_scale.dtype)).exp_()


def _forward(target: Tensor, mu: Tensor, log_scale: Tensor) -> Tensor:
    x, mu, log_scale = _widen(target, mu, log_scale)
    out = torch.rsub(x, 2, alpha=2).mul_(x).log_()  # ln(2 x (1 - x))
    distance = torch.logit(x).sub_(mu).abs_()
    return out.add_(log_scale).addcmul_(distance, _inverse_scale(log_scale))


def _backward(
    target: Tensor,
    mu: Tensor,
    log_scale: Tensor,
    grad: Tensor,
    to_target: bool,
    to_mu: bool,
    to_log_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtypes = target.dtype, mu.dtype, log_scale.dtype
    x, mu, log_scale = _widen(target, mu, log_scale)
    distance = torch.logit(x).sub_(mu)
    # In place where possible: the layout is that of the inputs, whatever that of grad, which of a mean has strides 0.
    scaled = _inverse_scale(log_scale)
    scaled = scaled.mul_(grad) if scaled.shape == grad.shape else scaled * grad
    empty = grad.new_empty
    grad_mu = torch.sign(distance).mul_(scaled) if to_mu or to_target else empty(0)
    grad_log_scale = empty(0)
    if to_log_scale:
        grad_log_scale = torch.addcmul(grad, distance.abs_(), scaled, value=-1, out=distance)
    grad_target = empty(0)
    if to_target:
        slope = torch.rsub(x, 1, alpha=2).mul_(grad)
        grad_target = slope.add_(grad_mu).div_(torch.rsub(x, 1).mul_(x))
    grad_mu = grad_mu.neg_() if to_mu else empty(0)
    grads = grad_target, grad_mu, grad_log_scale
    return tuple(tensor.to(dtype) for tensor, dtype in zip(grads, dtypes, strict=True))


_op = define_op("logit_laplace_nll(Tensor target, Tensor mu, Tensor log_scale) -> Tensor")(_forward)
_backward_op = define_op(
    "logit_laplace_nll_backward(Tensor target, Tensor mu, Tensor log_scale, Tensor grad, bool to_target, bool to_mu, "
    "bool to_log_scale) -> (Tensor grad_target, Tensor grad_mu, Tensor grad_log_scale)"
)(_backward)
# Both are made of PyTorch's ops, so that what they do to fake tensors says what shapes and strides come out.
torch.library.register_fake(_op)(_forward)
torch.library.register_fake(_backward_op)(_backward)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    grads = _backward_op(*ctx.saved_tensors, grad, *needed)
    return tuple(tensor if need else None for tensor, need in zip(grads, needed, strict=True))


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError('logit_laplace_nll has no second derivative; use backend="reference", which has')


torch.library.register_autograd(_op, _differentiate, setup_context=_save)
torch.library.register_autograd(_backward_op, _refuse)
