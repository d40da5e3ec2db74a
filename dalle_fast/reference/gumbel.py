"""The Gumbel-softmax relaxation in plain PyTorch: seeded noise, relaxed samples, quantisation.

    y = softmax((logits + g) / tau),   g = -ln(-ln u),   u uniform in (0, 1)

Softmax, noise and the product with the codebook are computed in float32 or wider. Source: arXiv 2102.12092,
section 2.1 (relaxation and KL of the dVAE); Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
(Philox-4x32-10).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_fast.reference.philox import philox

_MASK32 = 0xFFFFFFFF

# Codes that one block of counters serves: 32 counters of four outputs each.
_BLOCK_CODES, _BLOCK_COUNTERS = 128, 32


class GumbelOutput(NamedTuple):
    """What :func:`gumbel_quantize` returns; shapes for logits (B, K, *spatial).

    Attributes:
        quantized: (B, D, *spatial), the codebook averaged with the relaxed weights, or its one chosen row.
        indices: (B, *spatial) int64, argmax of the perturbed logits.
        kl: (B, *spatial), KL divergence of softmax(logits), without noise or tau, from uniform, in nats.
    """

    quantized: Tensor
    indices: Tensor
    kl: Tensor


def gumbel_noise(
    seed: int | Tensor,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard Gumbel noise as a function of (seed, row, code), the same on every backend.

    ``shape`` is (..., K); ``row`` is the flat index over the leading dimensions, ``code`` the index in the
    last. With Philox-4x32-10 under the key (seed mod 2^32, seed // 2^32),

        group = code // 128 * 32 + code % 32
        r     = philox((row mod 2^32, row // 2^32, group, 0))[code % 128 // 32]
        u     = ((r >> 9) + 0.5) * 2^-23
        g     = -ln(-ln u)

    so that the four words of a counter serve codes 32 apart within a block of 128. u keeps 23 bits because
    its half step must be exact in float32: with 24, the largest u would round to 1 and its noise to infinity.

    Args:
        seed: in [0, 2^64), or an int64 tensor of no dimensions, >= 0.
        shape: of the noise, codes last.
        dtype: in which u and g are computed: float32 or float64.
        device: of the result.

    Returns:
        Noise between -2.82 and 16.64, of mean 0.5772 and variance pi^2 / 6.
    """
    *leading, codes = shape
    row = torch.arange(math.prod(leading), device=device)
    if isinstance(seed, Tensor) and seed.device.type != "cpu":  # a number on the CPU goes with any device
        seed = seed.to(row.device)
    return noise_of_rows(seed, row, codes, dtype=dtype).reshape(*leading, codes)


def noise_of_rows(seed: int | Tensor, row: Tensor, codes: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows of :func:`gumbel_noise` with these numbers: (N,) int64 to (N, codes).

    Args:
        seed: one for all, or (N, 1) int64, one each.
    """
    blocks = -(-codes // _BLOCK_CODES)
    row = row[:, None]
    group = torch.arange(blocks * _BLOCK_COUNTERS, device=row.device)
    words = philox((row & _MASK32, row >> 32, group, 0), (seed & _MASK32, seed >> 32))
    r = torch.stack(words, dim=1).unflatten(-1, (blocks, _BLOCK_COUNTERS))  # [rows, 4, blocks, 32]
    r = r.transpose(1, 2).reshape(len(row), blocks * _BLOCK_CODES)[:, :codes]
    u = ((r >> 9).to(dtype) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u))


def draw_seed() -> Tensor:
    """A seed from PyTorch's default CPU generator, as an int64 tensor of no dimensions."""
    return torch.randint(2**63 - 1, (), device="cpu")


def gumbel_softmax(
    logits: Tensor, tau: float = 1.0, hard: bool = False, dim: int = -1, *, seed: int | Tensor | None = None
) -> Tensor:
    """A relaxed one-hot sample of softmax(logits): softmax((logits + g) / tau), or its argmax, one-hot.

    Args:
        logits: any shape with codes in ``dim``; position and code index the noise in the order of
            ``logits.movedim(dim, -1)``.
        tau: temperature, > 0.
        hard: return the one-hot vector of the argmax, with the gradient of the relaxed sample.
        dim: the code dimension.
        seed: of :func:`gumbel_noise`; None draws one from PyTorch's default generator.

    Returns:
        Same shape and dtype as logits.
    """
    weights, _ = _relax(logits.movedim(dim, -1), tau, hard, seed)
    return weights.movedim(-1, dim).to(logits.dtype)


def gumbel_quantize(
    logits: Tensor,
    codebook: Tensor,
    tau: float = 1.0,
    *,
    hard: bool = False,
    dim: int = 1,
    seed: int | Tensor | None = None,
) -> GumbelOutput:
    """Relaxed vector quantisation: :func:`gumbel_softmax` times the codebook, the codes, and the KL term.

        quantized = y @ codebook,   kl = sum_k q_k ln q_k + ln K,   q = softmax(logits)

    Args:
        logits: (B, K, *spatial) with ``dim`` 1, or (..., K) with ``dim`` -1.
        codebook: (K, D).
        tau, seed: as for :func:`gumbel_softmax`.
        hard: give the codebook's row of the argmax, with both gradients of the relaxed sample.
        dim: the code dimension of logits, and the D dimension of the result.

    Returns:
        quantized in logits' dtype, indices in int64, kl in float32 or wider.
    """
    rows = logits.movedim(dim, -1)
    weights, indices = _relax(rows, tau, False, seed)
    wide = codebook.to(weights.dtype)
    quantized = weights @ wide
    if hard:
        # The difference is exactly 0; both gradients, the codebook's too, are those of the relaxed sample.
        quantized = wide[indices].detach() + (quantized - quantized.detach())
    return GumbelOutput(quantized.movedim(-1, dim).to(logits.dtype), indices, kl_from_uniform(rows))


def kl_from_uniform(logits: Tensor) -> Tensor:
    """KL(softmax(logits) || uniform) over the last dimension, in nats; a logit of -inf adds 0."""
    log_q = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    # 0 * -inf is NaN, in the value and in its gradient.
    finite = log_q.masked_fill(log_q == -math.inf, 0.0)
    return (log_q.exp() * finite).sum(-1) + math.log(logits.shape[-1])


def _relax(rows: Tensor, tau: float, hard: bool, seed: int | Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and argmax of the perturbed logits over the last dimension."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    noise = gumbel_noise(draw_seed() if seed is None else seed, rows.shape, dtype=wide, device=rows.device)
    perturbed = rows.to(wide) + noise
    indices = perturbed.argmax(-1)
    weights = torch.softmax(perturbed / tau, dim=-1)
    if hard:
        one_hot = F.one_hot(indices, rows.shape[-1]).to(wide)
        # The difference is exactly 0, so the value stays one-hot and the gradient is that of the weights.
        weights = one_hot + (weights - weights.detach())
    return weights, indices
