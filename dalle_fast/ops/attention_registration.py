"""The attention kernels as PyTorch ops: torch.library, shapes for tracing, autograd.

    torch.ops.dalle_fast.attention(query, key, value, text_lens, pattern, scale, backend) -> (out, lse)
    torch.ops.dalle_fast.attention_qkvpacked(qkv, text_lens, pattern, scale, backend) -> (out, lse)

and of each the backward pass, ``..._backward``. ``pattern`` is ``Pattern.code``, ``backend`` "cpp" or "triton". The
packed ops hand the kernels three views of qkv, and three views of its gradient to write to: nothing is copied.

Nothing is checked here: call ``dalle_fast.attention`` and ``dalle_fast.attention_qkvpacked``. Neither op has a second
derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dalle_fast.ops.registration import define_op

_FORWARD_ARGS = "Tensor? text_lens, int[] pattern, float scale, str backend"


def _run_forward(query, key, value, out, lse, text_lens, pattern, scale, backend) -> None:
    if query.numel() == 0:
        return
    if backend == "cpp":
        lens = None if text_lens is None else text_lens.to(torch.int64).contiguous()
        torch.ops.dalle_fast.attention_forward_cpu(query, key, value, lens, pattern, scale, out, lse)
    else:
        from dalle_fast.kernels.attention_forward import attention_fwd

        attention_fwd(query, key, value, out, lse, pattern=tuple(pattern), text_lens=text_lens, scale=scale)


def _run_backward(saved, grad_out, grad_lse, grads, text_lens, pattern, scale, backend) -> None:
    """Fill ``grads``, of query, key and value; ``saved`` is query, key, value, out, lse."""
    if saved[0].numel() == 0:
        for grad in grads:  # of keys that no query head has
            grad.zero_()
        return
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    if backend == "cpp":
        lens = None if text_lens is None else text_lens.to(torch.int64).contiguous()
        torch.ops.dalle_fast.attention_backward_cpu(*saved, grad_out, grad_lse, lens, pattern, scale, *grads)
    else:
        from dalle_fast.kernels.attention_backward import attention_bwd

        attention_bwd(*saved, grad_out, grad_lse, *grads, pattern=tuple(pattern), text_lens=text_lens, scale=scale)


def _empty_rows_like(tensor: Tensor) -> Tensor:
    """An uninitialised tensor of the same shape, in the same order in memory if that leaves rows contiguous."""
    empty = torch.empty_like(tensor)
    return empty if empty.stride(-1) == 1 else torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _empty_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_rows_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)


def _empty_packed_outputs(qkv: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, _, heads, head_dim = qkv.shape
    lse = qkv.new_empty((batch, heads, length), dtype=torch.float32)
    return qkv.new_empty((batch, length, heads, head_dim)), lse


def _unpack(qkv: Tensor) -> tuple[Tensor, ...]:
    """(B, S, 3, H, D) as three (B, H, S, D)."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


@define_op(f"attention(Tensor query, Tensor key, Tensor value, {_FORWARD_ARGS}) -> (Tensor out, Tensor lse)")
def attention(query, key, value, text_lens, pattern, scale, backend):
    out, lse = _empty_outputs(query)
    _run_forward(query, key, value, out, lse, text_lens, pattern, scale, backend)
    return out, lse


@define_op(
    "attention_backward(Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor grad_out, "
    f"Tensor? grad_lse, {_FORWARD_ARGS}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)
def _attention_backward(query, key, value, out, lse, grad_out, grad_lse, text_lens, pattern, scale, backend):
    grads = tuple(_empty_rows_like(tensor) for tensor in (query, key, value))
    saved = (query, key, value, out, lse)
    _run_backward(saved, grad_out, grad_lse, grads, text_lens, pattern, scale, backend)
    return grads


@define_op(f"attention_qkvpacked(Tensor qkv, {_FORWARD_ARGS}) -> (Tensor out, Tensor lse)")
def attention_qkvpacked(qkv, text_lens, pattern, scale, backend):
    out, lse = _empty_packed_outputs(qkv)
    _run_forward(*_unpack(qkv), out.transpose(1, 2), lse, text_lens, pattern, scale, backend)
    return out, lse


@define_op(
    f"attention_qkvpacked_backward(Tensor qkv, Tensor out, Tensor lse, Tensor grad_out, {_FORWARD_ARGS}) "
    "-> Tensor grad_qkv"
)
def _attention_qkvpacked_backward(qkv, out, lse, grad_out, text_lens, pattern, scale, backend):
    grad_qkv = _empty_rows_like(qkv)
    saved = (*_unpack(qkv), out.transpose(1, 2), lse)
    grads = _unpack(grad_qkv)
    _run_backward(saved, grad_out.transpose(1, 2), None, grads, text_lens, pattern, scale, backend)
    return grad_qkv


@torch.library.register_fake(attention)
def _(query, key, value, text_lens, pattern, scale, backend):
    return _empty_outputs(query)


@torch.library.register_fake(_attention_backward)
def _(query, key, value, out, lse, grad_out, grad_lse, text_lens, pattern, scale, backend):
    return tuple(_empty_rows_like(tensor) for tensor in (query, key, value))


@torch.library.register_fake(attention_qkvpacked)
def _(qkv, text_lens, pattern, scale, backend):
    return _empty_packed_outputs(qkv)


@torch.library.register_fake(_attention_qkvpacked_backward)
def _(qkv, out, lse, grad_out, text_lens, pattern, scale, backend):
    return _empty_rows_like(qkv)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.pattern, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, text_lens, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out) if grad_lse is not None else None
    if grad_out is None:
        return (None,) * 7
    grads = _attention_backward(
        query, key, value, out, lse, grad_out, grad_lse, text_lens, ctx.pattern, ctx.scale, ctx.backend
    )
    return *grads, None, None, None, None


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(output[1])


def _differentiate_packed(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    qkv, text_lens, out, lse = ctx.saved_tensors
    if grad_out is None:
        return (None,) * 5
    grad_qkv = _attention_qkvpacked_backward(qkv, out, lse, grad_out, text_lens, ctx.pattern, ctx.scale, ctx.backend)
    return grad_qkv, None, None, None, None


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError('attention has no second derivative; use backend="reference", which has')


torch.library.register_autograd(attention, _differentiate, setup_context=_save)
torch.library.register_autograd(attention_qkvpacked, _differentiate_packed, setup_context=_save_packed)
torch.library.register_autograd(_attention_backward, _refuse)
torch.library.register_autograd(_attention_qkvpacked_backward, _refuse)
