"""One update of 2^26 parameters, the matrices of a transformer of width 1024: AdamW16 beside torch's AdamW.

Float16 parameters that are rounded stochastically, which is what trains in 16 bits without a copy; then rounded to
nearest, with a float32 master, bfloat16, and float32 with float32 moments. The rivals are ``torch.optim.AdamW`` on as
many float32 parameters, fused and with foreach.

Each row's extra info has ``ns_per_param``, ``gigabytes_per_s`` of what has to be read and written (``traffic_bytes`` a
parameter), ``copy_share`` of a large copy's rate, and ``state_bytes`` a parameter, of moments and masters.
"""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import measure
import pytest
import torch
from torch import Tensor

from dalle_fast.ops.adamw16 import UpdatedTensors, UpdateRule, adamw16_

PARAMS = 1 << 26
WIDTH = 1024
SHAPES = ((3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH))
RULE = UpdateRule(lr=1e-4, beta1=0.9, beta2=0.96, eps=1e-8, weight_decay=0.045, variance_clip=5.0)
CHECKED = 4096  # elements of each parameter, from its start


class Case(NamedTuple):
    """A kind of parameter; bytes that a parameter has, reads and writes."""

    dtype: torch.dtype
    master: bool
    stochastic: bool
    state_bytes: int
    traffic_bytes: int


CASES = {
    "float16": Case(torch.float16, False, True, 4, 14),
    "float16-nearest": Case(torch.float16, False, False, 4, 14),
    "float16-master": Case(torch.float16, True, False, 8, 20),
    "bfloat16": Case(torch.bfloat16, False, True, 4, 14),
    "float32": Case(torch.float32, False, False, 8, 28),
}
RIVALS = ("fused", "foreach")


def make_params(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Parameters and gradients, PARAMS elements in all."""
    generator = torch.Generator(measure.DEVICE).manual_seed(0)
    pairs, left = [], PARAMS
    while left > 0:
        shape = SHAPES[len(pairs) % len(SHAPES)]
        rows = min(shape[0], left // shape[1])
        sizes = {"device": measure.DEVICE, "generator": generator}
        param, grad = (torch.randn(rows, shape[1], **sizes) for _ in range(2))
        pairs.append((param.mul_(0.02).to(dtype), grad.mul_(1e-3).to(dtype)))
        left -= rows * shape[1]
    return pairs


def make_rows(case: Case) -> list[UpdatedTensors]:
    """What adamw16_ takes, with moments of 0."""
    moment = torch.float32 if case.dtype == torch.float32 else torch.int16
    return [
        UpdatedTensors(
            param,
            grad,
            torch.zeros_like(param, dtype=moment),
            torch.zeros_like(param, dtype=moment),
            param.float() if case.master else None,
            group=0,
            block=0,
            index=index,
        )
        for index, (param, grad) in enumerate(make_params(case.dtype))
    ]


def start_of(tensor: Tensor) -> Tensor:
    """The first CHECKED elements, copied."""
    return tensor.detach().flatten()[:CHECKED].clone()


def first_update(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """What one update makes of them in float64: from moments of 0, m / (1 - b1) = g and v / (1 - b2) = g^2."""
    moved = []
    for param, grad in pairs:
        p, g = param.double(), grad.double()
        moved.append(p * (1 - RULE.lr * RULE.weight_decay) - RULE.lr * g / (g.abs() + RULE.eps))
    return moved


def check_close(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """To a last place of dtype, which is what rounding to either side may cost."""
    eps = torch.finfo(dtype).eps
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), wanted, rtol=eps, atol=max(eps * 1e-4, 2.0**-24))


def report(benchmark, state_bytes: int, traffic_bytes: int) -> None:
    """Speed, by the median."""
    benchmark.extra_info |= {"params": PARAMS, "state_bytes": state_bytes, "traffic_bytes": traffic_bytes}
    if benchmark.stats is None:
        return
    seconds = benchmark.stats.stats.median
    rate = traffic_bytes * PARAMS / seconds
    benchmark.extra_info |= {
        "ns_per_param": 1e9 * seconds / PARAMS,
        "gigabytes_per_s": rate / 1e9,
        "copy_share": rate / measure.copy_bytes_per_s(),
    }


def time_updates(benchmark, call: Callable[[], None], params: list[Tensor], grads: list[Tensor]) -> None:
    """Check the first update, then time more of them."""
    dtype = params[0].dtype
    expected = first_update([(start_of(p), start_of(g)) for p, g in zip(params, grads, strict=True)])
    call()
    check_close([start_of(param) for param in params], expected, dtype)
    benchmark.pedantic(measure.timed(call), rounds=7, warmup_rounds=1)


@pytest.mark.benchmark(group="adamw16")
@pytest.mark.parametrize("name", CASES)
def test_adamw16(benchmark, name):
    case, scales = CASES[name], torch.ones(1, device=measure.DEVICE)
    rows = make_rows(case)
    steps = torch.ones(len(rows), dtype=torch.int64, device=measure.DEVICE)
    seed = 1 if case.stochastic else None
    time_updates(
        benchmark,
        lambda: adamw16_(rows, [RULE], steps, scales, seed=seed, backend="cpp"),
        [row.param for row in rows],
        [row.grad for row in rows],
    )
    report(benchmark, case.state_bytes, case.traffic_bytes)
    if benchmark.stats is not None and name == "float16":
        benchmark.extra_info["fused_over_own"] = in_turn(
            make_torch_optimizer("fused").step, lambda: adamw16_(rows, [RULE], steps, scales, seed=seed, backend="cpp")
        )


def in_turn(rival: Callable[[], object], own: Callable[[], object], rounds: int = 15) -> float:
    """Median time of the rival over ours, called in turn, so that a drift of the machine's speed hits both."""
    times = [(measure.seconds_of(rival), measure.seconds_of(own)) for _ in range(rounds + 1)][1:]
    return statistics.median(first for first, _ in times) / statistics.median(second for _, second in times)


@pytest.mark.benchmark(group="adamw16")
@pytest.mark.parametrize("name", RIVALS)
def test_torch(benchmark, name):
    optimizer = make_torch_optimizer(name)
    params = optimizer.param_groups[0]["params"]
    time_updates(benchmark, optimizer.step, params, [param.grad for param in params])
    report(benchmark, 8, 28)


def make_torch_optimizer(name: str) -> torch.optim.AdamW:
    """PyTorch's AdamW over the same parameters in float32, one of RIVALS."""
    params = []
    for param, grad in make_params(torch.float32):
        param.requires_grad_().grad = grad
        params.append(param)
    options = {"betas": (RULE.beta1, RULE.beta2), "eps": RULE.eps, "weight_decay": RULE.weight_decay, name: True}
    return torch.optim.AdamW(params, lr=RULE.lr, **options)
