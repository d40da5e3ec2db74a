"""Gumbel-softmax sampling and quantisation: the public ops.

What they compute is defined by ``dalle_fast.reference.gumbel``; this module checks the arguments and picks the
implementation: the C++ kernels on a CPU and Triton's on a GPU, which keep neither noise nor weights, and else the
reference. The noise is a function of (seed, position, code) alone, so a seed gives the same sample on every backend and
device, up to rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dalle_fast import reference
from dalle_fast.ops import backends, gumbel_registration
from dalle_fast.ops.checks import (
    cast_under_autocast,
    check_backend,
    check_floating,
    shape_of,
    without_autocast,
)
from dalle_fast.reference import GumbelOutput
from dalle_fast.reference.gumbel import draw_seed

_KERNEL_BACKENDS = ("triton", "cpp")

__all__ = ["GumbelOutput", "gumbel_quantize", "gumbel_softmax"]


def gumbel_softmax(
    logits: Tensor,
    tau: float = 1.0,
    hard: bool = False,
    dim: int = -1,
    *,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A relaxed one-hot sample of softmax(logits): softmax((logits + g) / tau), g standard Gumbel noise.

    Args:
        logits: floating point, any shape, with codes in ``dim``. -inf means a code that is never drawn.
        tau: temperature, finite and > 0.
        hard: return the one-hot vector of the argmax instead, with the gradient of the relaxed sample.
        dim: the code dimension.
        seed: in [0, 2^64), or an int64 tensor of no dimensions, >= 0; None draws one from PyTorch's default
            generator, so that torch.manual_seed decides it.
        backend: "auto", the fastest there is; "cpp", CPU tensors, and "triton", CUDA tensors, of float32, float16
            or bfloat16; "reference", any.

    Returns:
        logits' shape and dtype. Noise and softmax are computed in float32 or wider, autocast or not.

    Raises:
        ValueError: tau or seed out of range, no such dimension, no codes in it, or a position whose logits
            are all -inf (on an accelerator found by a reduction and a synchronisation; not looked for under
            torch.compile and while a CUDA graph is captured, where such a position becomes NaN).
        TypeError: logits are not floating point, or float64 for a backend without it; seed is of another type.
        RuntimeError: a backend that is not there.

    Source: arXiv 2102.12092, section 2.1.
    """
    check_backend("gumbel_softmax", backend, _KERNEL_BACKENDS)
    check_floating(logits=logits)
    _check_draw(logits, tau, dim, seed)
    kernel = backends.choose_kernel("gumbel_softmax", backend, logits.device, logits.dtype)
    if kernel is not None:
        op = gumbel_registration.gumbel_softmax
        weights, stats = op(logits, _seed_tensor(seed, kernel, logits), _tau_tensor(tau), hard, dim, kernel)
        _check_maxima(stats[0])
        return weights
    _check_positions(logits, dim)
    return reference.gumbel_softmax(logits, tau, hard, dim, seed=seed)


def gumbel_quantize(
    logits: Tensor,
    codebook: Tensor,
    tau: float = 1.0,
    *,
    hard: bool = False,
    dim: int = 1,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> GumbelOutput:
    """Relaxed vector quantisation: a Gumbel-softmax sample times the codebook, its codes, and the KL term.

        quantized = softmax((logits + g) / tau) @ codebook
        kl        = sum_k q_k ln q_k + ln K,   q = softmax(logits), whatever tau is

    Args:
        logits: (B, K, *spatial) with ``dim`` 1, or (..., K) with ``dim`` -1.
        codebook: (K, D), same dtype and device.
        tau, hard, seed, backend: as for :func:`gumbel_softmax`; with ``hard``, quantized is the codebook's
            row of the argmax, and both gradients are those of the relaxed sample.
        dim: the code dimension of logits, and the D dimension of quantized.

    Returns:
        GumbelOutput: quantized (B, D, *spatial) or (..., D) in logits' dtype; indices (B, *spatial) or (...)
        in int64, argmax of the perturbed logits; kl of the same shape, nats a position, float32 or wider.
        Under autocast, 16-bit inputs are first cast to float32.

    Raises:
        As :func:`gumbel_softmax`; also ValueError for a codebook of another shape or device, TypeError for
        one of another dtype.

    Source: arXiv 2102.12092, section 2.1 and appendix A.2.
    """
    check_backend("gumbel_quantize", backend, _KERNEL_BACKENDS)
    logits, codebook = cast_under_autocast(logits, codebook, dtype=torch.float32)
    check_floating(logits=logits, codebook=codebook)
    _check_draw(logits, tau, dim, seed)
    num_codes = logits.shape[dim]
    if codebook.dim() != 2 or codebook.shape[0] != num_codes:
        raise ValueError(f"codebook must have shape ({num_codes}, D), got {shape_of(codebook)}")
    kernel = backends.choose_kernel("gumbel_quantize", backend, logits.device, logits.dtype)
    if kernel is not None:
        op = gumbel_registration.gumbel_quantize
        quantized, indices, kl, stats, _ = op(
            logits, codebook, _seed_tensor(seed, kernel, logits), _tau_tensor(tau), hard, dim, kernel
        )
        _check_maxima(stats[0])
        return GumbelOutput(quantized, indices, kl)
    _check_positions(logits, dim)
    with without_autocast(logits.device):
        return reference.gumbel_quantize(logits, codebook, tau, hard=hard, dim=dim, seed=seed)


def _check_draw(logits: Tensor, tau: float, dim: int, seed: int | Tensor | None) -> None:
    if not 0 < tau < math.inf:
        raise ValueError(f"tau must be finite and > 0, got {tau}")
    if not -logits.dim() <= dim < logits.dim():
        raise ValueError(f"dim must be a dimension of logits, got {dim} for shape {shape_of(logits)}")
    if logits.shape[dim] == 0:
        raise ValueError(f"logits must have at least one code in dimension {dim}, got shape {shape_of(logits)}")
    _check_seed(seed)


def _tau_tensor(tau: float) -> Tensor:
    # The gradient of gumbel_softmax divides by it in float32, where a smaller one is 0 or loses digits.
    return torch.full((), max(tau, 2.0**-126), dtype=torch.float64, device="cpu")


def _seed_tensor(seed: int | Tensor | None, kernel: str, logits: Tensor) -> Tensor:
    """The seed as an int64 tensor, of which the kernels read the bits: for "cpp" on the CPU, else on logits' device.

    Nothing waits for an accelerator that does not have the seed already.
    """
    device = torch.device("cpu") if kernel == "cpp" else logits.device
    if seed is None:
        seed = draw_seed()
    if isinstance(seed, Tensor):
        # As a number it reaches an accelerator with the launch that writes it there, in a captured graph too.
        can_read = seed.device.type == "cpu" and type(seed) is Tensor and not torch.compiler.is_compiling()
        if seed.device == device or not can_read:
            return seed.to(device)
        seed = int(seed)
    return torch.full((), seed if seed < 2**63 else seed - 2**64, dtype=torch.int64, device=device)


def _check_positions(logits: Tensor, dim: int) -> None:
    if not torch.compiler.is_compiling() and not logits.is_meta:
        _check_maxima(logits.detach().amax(dim))


def _check_maxima(maxima: Tensor) -> None:
    """Raise where the largest logit of a position, with noise or without, is -inf."""
    if torch.compiler.is_compiling() or type(maxima) is not Tensor:  # a fake tensor has no values
        return
    if maxima.is_cuda and torch.cuda.is_current_stream_capturing():  # nor has one that is being captured
        return
    impossible = maxima == -math.inf
    if impossible.any():
        count = int(impossible.sum())
        raise ValueError(f"logits must have a code above -inf at each position, got {count} without")


def _check_seed(seed: int | Tensor | None) -> None:
    if seed is None:
        return
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise TypeError(f"a seed tensor must be int64 of no dimensions, got {seed.dtype} {shape_of(seed)}")
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, an int64 tensor or None, got {type(seed).__name__}")
    elif not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2^64), got {seed}")
