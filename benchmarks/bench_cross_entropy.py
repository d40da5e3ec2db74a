"""Cross-entropy of a linear classifier, forward and backward, at 2048 positions, 512 values, 8192 classes.

Also the size of the demo's images, a vocabulary four times as large, and positions of which half are ignored. The
rivals are ``F.cross_entropy(F.linear(...))`` and, where PyTorch has it, ``F.linear_cross_entropy``, as it is and with
its chunking switched on. Each row's extra info has ``peak_bytes``, memory beyond the inputs with the gradients
included, and ``peak_over_logits``, in units of the logits of all positions; where the logits are many and none is
ignored.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import measure
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dalle_fast

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
IGNORED = 0  # a class, as padding is


class Sizes(NamedTuple):
    """Of a problem; every ``ignored_every``-th position is ignored, 0 is none."""

    positions: int
    width: int
    classes: int
    ignored_every: int = 0


CASES = {
    "8192": Sizes(2048, 512, 8192),
    "small": Sizes(8 * 64, 128, 256),
    "large-vocabulary": Sizes(512, 512, 32768),
    "half-ignored": Sizes(2048, 512, 8192, ignored_every=2),
}
MEASURED_MEMORY = ("8192", "large-vocabulary")  # a process of its own for each
WARM_UP = Sizes(64, 16, 32)


def cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The loss in plain PyTorch."""
    return F.cross_entropy(F.linear(hidden, weight), target, ignore_index=IGNORED)


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """PyTorch's own op, as it is."""
    return F.linear_cross_entropy(hidden, weight, target, ignore_index=IGNORED)


def torch_chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """PyTorch's own op, in chunks."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, target, ignore_index=IGNORED, options=options)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The same by the library."""
    return dalle_fast.linear_cross_entropy(hidden, weight, target, ignore_index=IGNORED)


OPS: dict[str, Loss] = {"cross_entropy": cross_entropy, "linear_cross_entropy": linear_cross_entropy}
if hasattr(F, "linear_cross_entropy"):
    OPS["torch_linear_cross_entropy"] = torch_linear_cross_entropy
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        OPS["torch_chunked"] = torch_chunked


def make_inputs(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and weights that need gradients, and targets."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sizes.positions, sizes.width, generator=generator)
    weight = 3 * torch.randn(sizes.classes, sizes.width, generator=generator) / sizes.width**0.5
    target = torch.randint(1, sizes.classes, (sizes.positions,), generator=generator)
    if sizes.ignored_every:
        target[:: sizes.ignored_every] = IGNORED
    return (
        hidden.to(measure.DEVICE).requires_grad_(),
        weight.to(measure.DEVICE).requires_grad_(),
        target.to(measure.DEVICE),
    )


def train(op: Loss, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients."""
    loss = op(hidden, weight, target)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


@functools.cache
def truth(sizes: Sizes) -> tuple[Tensor, ...]:
    """Loss and gradients in float64."""
    hidden, weight, target = make_inputs(sizes)
    wide = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    return tuple(one.float() for one in train(cross_entropy, *wide, target))


def make_call(name: str, sizes: Sizes) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed."""
    inputs = make_inputs(sizes)
    return lambda: train(OPS[name], *inputs)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.benchmark(group=f"cross-entropy {case}", min_rounds=5), id=case)
        for case in CASES
    ],
)
def test_train(benchmark, checked, name, case):
    sizes = CASES[case]

    def check(result: tuple[Tensor, ...]) -> None:
        for actual, expected in zip(result, truth(sizes), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))

    call = make_call(name, sizes)
    timed = measure.timed(call)
    if timed is not call:
        check(call())
    checked(timed, check, positions=sizes.positions)
    if benchmark.stats is not None and case in MEASURED_MEMORY:
        if measure.DEVICE == "cuda":
            peak = measure.device_peak_bytes(call)
        else:
            peak = measure.fresh_host_peak_bytes(make_call, name, sizes, WARM_UP)
        benchmark.extra_info["peak_bytes"] = peak
        if peak is not None:
            benchmark.extra_info["peak_over_logits"] = peak / (4 * sizes.positions * sizes.classes)
