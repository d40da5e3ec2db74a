"""Gumbel quantisation at 1024 positions, 1024 codes of 64 values, against eager PyTorch.

The rival is ``F.gumbel_softmax``, an einsum with the codebook, and the KL from its definition. Its noise comes from
PyTorch's generator, that of ``gumbel_quantize`` is a function of seed, position and code; both are drawn in the timed
call.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dalle_fast

POSITIONS, CODES, DIM = 1024, 1024, 64
TAU = 1.0
PEAK = 100.0  # far above any Gumbel noise

Quantize = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def eager(logits: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantised vectors, codes and KL in plain PyTorch."""
    weights = F.gumbel_softmax(logits, TAU, dim=-1)
    quantized = torch.einsum("nk,kd->nd", weights, codebook)
    return quantized, weights.argmax(dim=-1), kl_from_uniform(logits)


def gumbel_quantize(logits: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the library."""
    return dalle_fast.gumbel_quantize(logits, codebook, TAU, dim=-1)


def kl_from_uniform(logits: Tensor) -> Tensor:
    """KL of softmax(logits) from uniform, nats a position."""
    log_q = F.log_softmax(logits, dim=-1)
    return (log_q.exp() * log_q).sum(dim=-1) + math.log(logits.shape[-1])


def gradients(quantize: Quantize, logits: Tensor, codebook: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Of the mean KL plus the quantised vectors' products with ``upstream``, for logits and codebook."""
    quantized, _, kl = quantize(logits, codebook)
    weight = torch.full_like(kl, 1 / len(kl))
    return torch.autograd.grad((quantized, kl), (logits, codebook), (upstream, weight))


def assert_quantizes(quantize: Quantize) -> None:
    """Where one code stands out beyond all noise, it, its row and their gradients must come out."""
    codes = torch.randint(CODES, (POSITIONS,))
    logits = (PEAK * F.one_hot(codes, CODES)).requires_grad_()
    codebook = torch.randn(CODES, DIM, requires_grad=True)
    upstream = torch.randn(POSITIONS, DIM)

    def look_up(logits: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return codebook[codes], codes, kl_from_uniform(logits) + 0 * logits.sum()

    truth = logits.detach().double().requires_grad_(), codebook.detach().double().requires_grad_()
    for actual, expected in zip(quantize(logits, codebook), look_up(*truth), strict=True):
        torch.testing.assert_close(actual, expected, check_dtype=False)
    actual_gradients = gradients(quantize, logits, codebook, upstream)
    expected_gradients = gradients(look_up, *truth, upstream.double())
    for actual, expected in zip(actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, expected, check_dtype=False)


@pytest.mark.benchmark(group="gumbel forward", min_rounds=10)
@pytest.mark.parametrize("quantize", [eager, gumbel_quantize])
def test_forward(checked, quantize):
    assert_quantizes(quantize)
    logits, codebook = torch.randn(POSITIONS, CODES), torch.randn(CODES, DIM)

    def check(result: tuple[Tensor, Tensor, Tensor]) -> None:
        assert result[0].isfinite().all()
        torch.testing.assert_close(result[2], kl_from_uniform(logits.double()), check_dtype=False)

    checked(lambda: quantize(logits, codebook), check, positions=POSITIONS)


@pytest.mark.benchmark(group="gumbel forward and backward", min_rounds=10)
@pytest.mark.parametrize("quantize", [eager, gumbel_quantize])
def test_forward_and_backward(checked, quantize):
    assert_quantizes(quantize)
    logits, codebook = torch.randn(POSITIONS, CODES, requires_grad=True), torch.randn(CODES, DIM, requires_grad=True)
    upstream = torch.randn(POSITIONS, DIM)

    def check(result: tuple[Tensor, Tensor]) -> None:
        assert all(gradient.isfinite().all() for gradient in result)

    checked(lambda: gradients(quantize, logits, codebook, upstream), check, positions=POSITIONS)
