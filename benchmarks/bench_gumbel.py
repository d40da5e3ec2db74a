"""Gumbel quantisation at 8192 codes of 128 values, against PyTorch, eager and compiled.

On a CPU 4096 positions in float32, timed by the wall clock; where a GPU is, the 65,536 of 64 images in bfloat16 take
their place, timed between events on the device, the library's row first, since a time limit cuts the end off.

The rival is ``F.gumbel_softmax``, an einsum with the codebook, and the KL from its definition. Its noise comes from
PyTorch's generator, that of ``gumbel_quantize`` is a function of seed, position and code; both are drawn in the timed
call. Each row's extra info has ``peak_bytes``, memory beyond the inputs with the results included, and
``peak_over_logits``, in units of the logits; on a CPU not of compiled code, which leaves much else behind at its first
call. On a GPU it also has ``roofline``, the time of the least traffic (logits read once a pass, their gradient written)
at the rate of a large copy, or that of the products at the rate of a large one if longer, over the measured time, and
``copies``, the measured time in times of copying the logits.
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

ON_GPU = measure.DEVICE == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TAU = 1.0
PEAK = 100.0  # far above any Gumbel noise
FEWEST_ROUNDS, MOST_ROUNDS, SECONDS_A_ROW = 3, 50, 0.4  # on a GPU

OPTIONS = {"min_rounds": 3} | ({"timer": measure.clock} if ON_GPU else {})

Quantize = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Sizes(NamedTuple):
    """Of a problem; and whether it is forward alone."""

    positions: int
    codes: int
    dim: int
    forward: bool = True


LARGE, SMALL = Sizes(65536 if ON_GPU else 4096, 8192, 128), Sizes(64, 256, 16)


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
NAMES = sorted(QUANTIZERS, key=lambda name: name != "gumbel_quantize") if ON_GPU else list(QUANTIZERS)


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
    # A few positions stand for all, whose truth in float64 a GPU has no room for.
    positions = min(sizes.positions, 4096)
    codes = torch.randint(sizes.codes, (positions,), device=measure.DEVICE)
    logits = torch.zeros(positions, sizes.codes, device=measure.DEVICE, dtype=DTYPE)
    logits = logits.scatter_(1, codes[:, None], PEAK).requires_grad_()
    codebook = torch.randn(sizes.codes, sizes.dim, device=measure.DEVICE).to(DTYPE).requires_grad_()
    upstream = torch.randn(positions, sizes.dim, device=measure.DEVICE).to(DTYPE)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if ON_GPU else {}

    def look_up(logits: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return codebook[codes], codes, kl_from_uniform(logits) + 0 * logits.sum()

    truth = logits.detach().double().requires_grad_(), codebook.detach().double().requires_grad_()
    for actual, expected in zip(quantize(logits, codebook), look_up(*truth), strict=True):
        torch.testing.assert_close(actual, expected, check_dtype=False, **tolerance)
    actual_gradients = gradients(quantize, logits, codebook, upstream)
    expected_gradients = gradients(look_up, *truth, upstream.double())
    for actual, expected in zip(actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, expected, check_dtype=False, **tolerance)


def make_call(name: str, sizes: Sizes) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed."""
    generator = torch.Generator(measure.DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=measure.DEVICE, dtype=DTYPE)

    logits, codebook = normal(sizes.positions, sizes.codes), normal(sizes.codes, sizes.dim)
    quantize = QUANTIZERS[name]()
    if sizes.forward:
        return lambda: quantize(logits, codebook)
    upstream = normal(sizes.positions, sizes.dim)
    logits.requires_grad_()
    codebook.requires_grad_()
    return lambda: gradients(quantize, logits, codebook, upstream)


def time_on_device(benchmark, call: Callable[[], tuple[Tensor, ...]], sizes: Sizes) -> None:
    """Time ``call``, which has run before, and record what the module's docstring says of a GPU."""
    once = measure.seconds_of(call)
    rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(SECONDS_A_ROW / once)))
    benchmark.pedantic(measure.timed(call), rounds=rounds)
    median = benchmark.stats.stats.median
    passes, products = (1, 1) if sizes.forward else (4, 3)  # backward two more reads of the logits and a write
    logits_bytes = sizes.positions * sizes.codes * DTYPE.itemsize
    flops = 2 * products * sizes.positions * sizes.codes * sizes.dim
    copy, product = measure.copy_bytes_per_s(), measure.matmul_flops_per_s(DTYPE, torch.get_num_threads())
    benchmark.extra_info |= {
        "positions_per_s": sizes.positions / median,
        "roofline": max(passes * logits_bytes / copy, flops / product) / median,
        "copies": median / (2 * logits_bytes / copy),
        "peak_bytes": (peak := measure.device_peak_bytes(call)),
        "peak_over_logits": peak / logits_bytes,
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "forward",
    [
        pytest.param(True, marks=pytest.mark.benchmark(group="gumbel forward", **OPTIONS), id="forward"),
        pytest.param(False, marks=pytest.mark.benchmark(group="gumbel forward and backward", **OPTIONS), id="training"),
    ],
)
def test_quantize(benchmark, checked, name, forward):
    # The compiled one for the sizes that are timed, which it is compiled for; the others are right at all or at none.
    assert_quantizes(name, LARGE if name == "compiled" else SMALL)
    sizes = LARGE._replace(forward=forward)

    def check(result: tuple[Tensor, ...]) -> None:
        assert all(one.isfinite().all() for one in result)

    if ON_GPU:
        call = make_call(name, sizes)
        check(call())
        if not benchmark.disabled:
            time_on_device(benchmark, call, sizes)
        return
    checked(make_call(name, sizes), check, positions=sizes.positions)
    if benchmark.stats is not None and name != "compiled":
        peak = measure.fresh_host_peak_bytes(make_call, name, sizes, SMALL._replace(forward=forward))
        benchmark.extra_info["peak_bytes"] = peak
        if peak is not None:
            benchmark.extra_info["peak_over_logits"] = peak / (4 * sizes.positions * sizes.codes)
