"""Drawing the tokens of one step: guidance, temperature, filters and a seeded draw in one op.

What it computes is defined by ``dalle_fast.reference.draw_token``; this module writes it where it belongs, without
waiting for the device, and picks the implementation.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from dalle_fast import reference
from dalle_fast.ops import backends
from dalle_fast.ops.checks import check_backend
from dalle_fast.ops.registration import define_op

_TRITON_CODES = 16384  # a program of the kernel has all of them in registers

if backends.extension is not None:
    torch.library.register_fake("dalle_fast::draw_token_cpu", lambda *args: None)


def check_sampling(
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    cond_scale: float | None = None,
    *,
    codes: int | None = None,
) -> None:
    """Raise ValueError for settings that mean nothing.

    That is: temperature < 0 or infinite, top_k < 1 or above the number of codes, top_p outside (0, 1], cond_scale
    infinite.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be >= 1, got {top_k}")
    if top_k is not None and codes is not None and top_k > codes:
        raise ValueError(f"top_k must be at most the {codes} codes of the vocabulary, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if cond_scale is not None and not math.isfinite(cond_scale):
        raise ValueError(f"cond_scale must be finite, got {cond_scale}")


def draw_token(
    logits: Tensor,
    seeds: Tensor,
    position: Tensor,
    tokens: Tensor,
    scores: Tensor,
    *,
    keep: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    cond_scale: float | None = None,
    backend: str = "auto",
) -> None:
    """Draw token ``position`` of every sample into ``tokens`` and add its log-likelihood to ``scores``.

    Args:
        logits: (B, K), or with ``cond_scale`` (2 B, K): those of all samples given the caption, then those without.
            Contiguous.
        seeds: (B,) int64, >= 0, contiguous.
        position: raster index, int64 of no dimensions on the device, in 0..L - 1.
        tokens: (B, L) int64, contiguous; column ``position`` is written.
        scores: (B,) in float32, or in logits' dtype if wider; contiguous.
        keep: (B, L) bool, contiguous; True where ``tokens`` holds a token already. It stays, and its
            log-likelihood is added.
        temperature, top_k, top_p, cond_scale: see :func:`dalle_fast.reference.draw_token`.
        backend: "auto", "triton" (CUDA tensors, at most 16384 codes), "cpp" (CPU tensors) or "reference"; "triton"
            and "cpp" take float32 logits.

    Raises:
        ValueError: a setting out of range; more codes than the backend takes.
        RuntimeError: a backend that is not there.
    """
    check_backend("draw_token", backend, ("triton", "cpp"))
    check_sampling(temperature, top_k, top_p, cond_scale, codes=logits.shape[1])
    kernel = choose_kernel(backend, logits)
    settings = {"keep": keep, "temperature": temperature, "top_k": top_k, "top_p": top_p, "cond_scale": cond_scale}
    if kernel is None:
        _draw_in_pytorch(logits, seeds, position, tokens, scores, **settings)
    else:
        bind_draw_token(logits, seeds, position, tokens, scores, **settings, kernel=kernel)()


def bind_draw_token(
    logits: Tensor,
    seeds: Tensor,
    position: Tensor,
    tokens: Tensor,
    scores: Tensor,
    *,
    keep: Tensor | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    cond_scale: float | None,
    kernel: str,
) -> partial:
    """A call that does :func:`draw_token` with the kernel that :func:`choose_kernel` named; settings are unchecked."""
    top_k = logits.shape[1] if top_k is None else top_k
    top_p = 1.0 if top_p is None else float(top_p)
    return partial(
        _OPS[kernel], logits, seeds, position, keep, float(temperature), top_k, top_p, cond_scale, tokens, scores
    )


def choose_kernel(backend: str, logits: Tensor) -> str | None:
    """See :func:`dalle_fast.ops.backends.choose_kernel`; "auto" gives Triton no more codes than it takes."""
    kernel = backends.choose_kernel("draw_token", backend, logits.device, logits.dtype, (torch.float32,))
    too_many = backend == "auto" and kernel == "triton" and logits.shape[1] > _TRITON_CODES
    return None if too_many else kernel


def _draw_in_pytorch(
    logits: Tensor,
    seeds: Tensor,
    position: Tensor,
    tokens: Tensor,
    scores: Tensor,
    keep: Tensor | None,
    **settings: float | None,
) -> None:
    """``settings`` are the reference's: temperature, top_k, top_p, cond_scale."""
    drawn, likelihoods = reference.draw_token(logits, seeds, position, **settings)
    column = position.reshape(1)
    if keep is not None:
        held = tokens.index_select(1, column).squeeze(1)
        drawn = torch.where(keep.index_select(1, column).squeeze(1), held, drawn)
        conditional = logits[: len(drawn)].to(likelihoods.dtype)
        likelihoods = conditional.log_softmax(dim=-1).gather(-1, drawn[:, None]).squeeze(-1)
    tokens.index_copy_(1, column, drawn[:, None])
    scores += likelihoods


@define_op(
    "draw_token_triton(Tensor logits, Tensor seeds, Tensor position, Tensor? keep, float temperature, int top_k, "
    "float top_p, float? cond_scale, Tensor(a!) tokens, Tensor(b!) scores) -> ()"
)
def _triton_op(logits, seeds, position, keep, temperature, top_k, top_p, cond_scale, tokens, scores) -> None:
    from dalle_fast.kernels.draw_token import draw_step

    draw_step(
        logits,
        seeds,
        position,
        keep,
        tokens,
        scores,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        cond_scale=cond_scale,
    )


torch.library.register_fake(_triton_op, lambda *args: None)

_OPS = {"triton": _triton_op}
if backends.extension is not None:
    _OPS["cpp"] = torch.ops.dalle_fast.draw_token_cpu.default
