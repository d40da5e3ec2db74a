"""Gumbel quantisation at 4096 positions, 8192 codes of 128 values, against PyTorch, eager and compiled.

The rival is ``F.gumbel_softmax``, an einsum with the codebook, and the KL from its definition. Its noise comes from
PyTorch's generator, that of ``gumbel_quantize`` is a function of seed, position and code; both are drawn in the timed
call. Each row's extra info has ``peak_bytes``, memory beyond the inputs with the results included, and
``peak_over_logits``, in units of the logits; not of compiled code, which leaves much else behind at its first call.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import measure
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dalle_fast

TAU = 1.0
PEAK = 100.0  # far above any Gumbel noise

Quantize = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Sizes(NamedTuple):
    """Of a problem; and whether it is forward alone."""

    positions: int
    codes: int
    dim: int
    forward: bool = True


LARGE, SMALL = Sizes(4096, 8192, 128), Sizes(64, 256, 16)


def eager(logits: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantised vectors, codes and KL in plain PyTorch."""
    weights = F.gumbel_softmax(logits, TAU, dim=-1)
    quantized = torch.einsum("nk,kd->nd", weights, codebook)
    return quantized, weights.argmax(dim=-1), kl_from_uniform(logits)


def gumbel_quantize(logits: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the library."""
    return dalle_fast.gumbel_quantize(logits, codebook, TAU, dim=-1)


@functools.cache
def compiled() -> Quantize:
    """The same as ``eager``, compiled."""
    return torch.compile(eager, dynamic=False)


QUANTIZERS = {"eager": lambda: eager, "compiled": compiled, "gumbel_quantize": lambda: gumbel_quantize}


def kl_from_uniform(logits: Tensor) -> Tensor:
    """KL of softmax(logits) from uniform, nats a position."""
    log_q = F.log_softmax(logits, dim=-1)
    return (log_q.exp() * log_q).sum(dim=-1) + math.log(logits.shape[-1])


def gradients(quantize: Quantize, logits: Tensor, codebook: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Of the mean KL plus the quantised vectors' products with ``upstream``, for logits and codebook."""
    quantized, _, kl = quantize(logits, codebook)
    weight = torch.full_like(kl, 1 / len(kl))
    return torch.autograd.grad((quantized, kl), (logits, codebook), (upstream, weight))


@functools.cache
def assert_quantizes(name: str, sizes: Sizes) -> None:
    """Where one code stands out beyond all noise, it, its row and their gradients must come out."""
    quantize = QUANTIZERS[name]()
    codes = torch.randint(sizes.codes, (sizes.positions,))
    logits = (PEAK * F.one_hot(codes, sizes.codes)).requires_grad_()
    codebook = torch.randn(sizes.codes, sizes.dim, requires_grad=True)
    upstream = torch.randn(sizes.positions, sizes.dim)

    def look_up(logits: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return codebook[codes], codes, kl_from_uniform(logits) + 0 * logits.sum()

    truth = logits.detach().double().requires_grad_(), codebook.detach().double().requires_grad_()
    for actual, expected in zip(quantize(logits, codebook), look_up(*truth), strict=True):
        torch.testing.assert_close(actual, expected, check_dtype=False)
    actual_gradients = gradients(quantize, logits, codebook, upstream)
    expected_gradients = gradients(look_up, *truth, upstream.double())
    for actual, expected in zip(actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, expected, check_dtype=False)


def make_call(name: str, sizes: Sizes) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(sizes.positions, sizes.codes, generator=generator)
    codebook = torch.randn(sizes.codes, sizes.dim, generator=generator)
    quantize = QUANTIZERS[name]()
    if sizes.forward:
        return lambda: quantize(logits, codebook)
    upstream = torch.randn(sizes.positions, sizes.dim, generator=generator)
    logits.requires_grad_()
    codebook.requires_grad_()
    return lambda: gradients(quantize, logits, codebook, upstream)


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(True, marks=pytest.mark.benchmark(group="gumbel forward", min_rounds=3), id="forward"),
        pytest.param(
            False, marks=pytest.mark.benchmark(group="gumbel forward and backward", min_rounds=3), id="training"
        ),
    ],
)
def test_quantize(benchmark, checked, name, forward):
    # The compiled one for the sizes that are timed, which it is compiled for; the others are right at all or at none.
    assert_quantizes(name, LARGE if name == "compiled" else SMALL)
    sizes = LARGE._replace(forward=forward)

    def check(result: tuple[Tensor, ...]) -> None:
        assert all(one.isfinite().all() for one in result)

    checked(make_call(name, sizes), check, positions=sizes.positions)
    if benchmark.stats is not None and name != "compiled":
        peak = measure.fresh_host_peak_bytes(make_call, name, sizes, SMALL._replace(forward=forward))
        benchmark.extra_info["peak_bytes"] = peak
        if peak is not None:
            benchmark.extra_info["peak_over_logits"] = peak / (4 * sizes.positions * sizes.codes)
