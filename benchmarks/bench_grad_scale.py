"""Gradient scaling: unscaling 64 Mi float16 gradients of 48 residual blocks at once, and what a scaled block costs.

Unscaling's rivals go block by block: ``eager`` divides, filters and takes norms with PyTorch's foreach operators;
``eager_lazy`` filters only where a norm is not finite, which waits for the device; ``amp`` has PyTorch's own
unscaling of ``torch.amp.GradScaler``, which does not filter, then norms. Scales are 1 while the time is taken, so that
gradients stay what they are from round to round; what is computed is checked with others before. Extra info has bytes
read and written a second, and their share of what a copy reaches.

A block is LayerNorm, a cast, an MLP four times as wide, over 1280 tokens, against x + fn(x) with the same casts.
"""

import functools
import math
import statistics
from collections.abc import Callable

import measure
import pytest
import torch
from torch import Tensor, nn

from dalle_fast.ops.backends import has_cpp_backend
from dalle_fast.ops.grad_scale import scaled_resblock, unscale_

BLOCKS = 48
ELEMENTS = 1 << 26
SHAPES = [(4096,), (512, 768), (768, 512), (256, 512)]  # of a block, and one that fills it up
TOKENS = 1280
Result = tuple[Tensor, Tensor]
Unscale = Callable[[list[Tensor], Tensor, list[int]], Result]

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def by_block(grads: list[Tensor], block_of: list[int]) -> list[list[Tensor]]:
    """The gradients of each block."""
    blocks: list[list[Tensor]] = [[] for _ in range(max(block_of) + 1)]
    for grad, block in zip(grads, block_of, strict=True):
        blocks[block].append(grad)
    return blocks


def norms(grads: list[Tensor]) -> Tensor:
    """Euclidean, float32."""
    return torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32))


def joined(found: list[Tensor]) -> Result:
    """Flags and sum of squares of the blocks' norms."""
    all_norms = torch.stack([norm.square().sum() for norm in found])
    return ~torch.isfinite(all_norms), all_norms.nan_to_num(0.0, 0.0, 0.0).double().sum()


def eager(grads: list[Tensor], scales: Tensor, block_of: list[int]) -> Result:
    """Divide, find, filter, norm."""
    flags, sums = [], []
    for block, own in enumerate(by_block(grads, block_of)):
        torch._foreach_div_(own, scales[block])
        flags.append(~torch.isfinite(torch.stack(torch._foreach_norm(own, math.inf))).all())
        for grad in own:
            grad.nan_to_num_(0.0, 0.0, 0.0)
        sums.append(norms(own).double().square().sum())
    return torch.stack(flags), torch.stack(sums).sum()


def eager_lazy(grads: list[Tensor], scales: Tensor, block_of: list[int]) -> Result:
    """Divide and norm; filter and norm once more where that is not finite."""
    flags, sums = [], []
    for block, own in enumerate(by_block(grads, block_of)):
        torch._foreach_div_(own, scales[block])
        found = norms(own)
        flags.append(~torch.isfinite(found).all())
        if flags[-1]:
            for grad in own:
                grad.nan_to_num_(0.0, 0.0, 0.0)
            found = norms(own)
        sums.append(found.double().square().sum())
    return torch.stack(flags), torch.stack(sums).sum()


def amp(grads: list[Tensor], scales: Tensor, block_of: list[int]) -> Result:
    """torch.amp's kernel a block, and norms."""
    inverse, found_inf = scales.reciprocal(), torch.zeros_like(scales)
    sums = []
    for block, own in enumerate(by_block(grads, block_of)):
        torch._amp_foreach_non_finite_check_and_unscale_(own, found_inf[block : block + 1], inverse[block : block + 1])
        sums.append(norms(own).double().square().sum())
    return found_inf != 0, torch.stack(sums).sum()


def cpp(grads: list[Tensor], scales: Tensor, block_of: list[int]) -> Result:
    """The library."""
    return tuple(unscale_(grads, scales, block_of, backend="cpp"))


def cpp_read_only(grads: list[Tensor], scales: Tensor, block_of: list[int]) -> Result:
    """The library, for an optimiser that divides by itself."""
    return tuple(unscale_(grads, scales, block_of, write=False, backend="cpp"))


OPS: dict[str, Unscale] = {
    "eager": eager,
    "eager_lazy": eager_lazy,
    "amp": amp,
    "cpp": cpp,
    "cpp_read_only": cpp_read_only,
}
WITHOUT_FILTER = ("amp", "cpp_read_only")


def check(op: Unscale, name: str) -> None:
    """Gradients, flags and sum of a small problem with elements that are not finite."""
    grads = [8 * torch.randn(1000, device=measure.DEVICE).half() for _ in range(6)]
    scales, block_of = torch.tensor([2.0, 64.0, 8192.0], device=measure.DEVICE), [0, 1, 1, 2, 0, 2]
    if name not in WITHOUT_FILTER:
        grads[1][5], grads[2][999] = math.nan, math.inf
    expected = [grad.clone() for grad in grads]
    flags, total = unscale_(expected, scales, block_of, backend="reference")
    before = [grad.clone() for grad in grads]
    found_flags, found_total = op(grads, scales, block_of)
    torch.testing.assert_close(found_flags, flags)
    torch.testing.assert_close(found_total, total, rtol=2e-3, atol=0)  # the rivals' quotients are float16
    for grad, other in zip(grads, before if name == "cpp_read_only" else expected, strict=True):
        torch.testing.assert_close(grad, other)


@functools.cache
def problem() -> tuple[list[Tensor], Tensor, list[int]]:
    """64 Mi gradients, 1.4 million a block in tensors of 4096 to 480 thousand."""
    generator, grads, block_of = torch.Generator().manual_seed(0), [], []
    one_block = sum(math.prod(shape) for shape in SHAPES)
    rest = ELEMENTS - BLOCKS * one_block
    for block in range(BLOCKS):
        share = rest // BLOCKS + (rest % BLOCKS if block == BLOCKS - 1 else 0)
        for shape in [*SHAPES, (share,)]:
            grads.append((8 * torch.randn(shape, generator=generator)).half().to(measure.DEVICE))
            block_of.append(block)
    assert sum(grad.numel() for grad in grads) == ELEMENTS
    return grads, torch.ones(BLOCKS, device=measure.DEVICE), block_of


@pytest.mark.parametrize("name", OPS)
@pytest.mark.benchmark(group="unscale 64 Mi float16 of 48 blocks", min_rounds=7, max_time=2.0)
def test_unscale(benchmark, checked, name):
    if name.startswith("cpp") and not has_cpp_backend(torch.device(measure.DEVICE)):
        pytest.skip("dalle_fast._C has no code for this device; dalle-fast info says why")
    check(OPS[name], name)
    grads, scales, block_of = problem()
    truth = sum(grad.double().square().sum() for grad in grads)

    def is_right(found: Result) -> None:
        assert not found[0].any()
        torch.testing.assert_close(found[1], truth, rtol=1e-3, atol=0)

    traffic = 2 * ELEMENTS * (1 if name == "cpp_read_only" else 2)
    checked(measure.timed(lambda: OPS[name](grads, scales, block_of)), is_right, gigabytes=traffic / 1e9)
    if benchmark.stats is not None:
        rate = traffic / benchmark.stats.stats.median
        benchmark.extra_info["share_of_copy"] = rate / measure.copy_bytes_per_s()


class Branch(nn.Module):
    """LayerNorm in float32, a cast, an MLP."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm, self.dtype = nn.LayerNorm(width), dtype
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x).to(self.dtype))


BLOCK_OPS = {
    "plain": lambda x, branch, scale: x + branch(x).to(x.dtype),
    "scaled_resblock": lambda x, branch, scale: scaled_resblock(x, branch, scale),
    "reference": lambda x, branch, scale: scaled_resblock(x, branch, scale, backend="reference"),
}


@each_dtype
@pytest.mark.parametrize("width", [512, 1024])
@pytest.mark.parametrize("name", BLOCK_OPS)
@pytest.mark.benchmark(min_rounds=9, max_time=1.5)
def test_resblock(benchmark, checked, name, width, dtype):
    benchmark.group = f"resblock, width {width}, {dtype}"
    torch.manual_seed(0)
    branch = Branch(width, dtype).to(measure.DEVICE)
    x, upstream = torch.randn(2, TOKENS, width, device=measure.DEVICE)
    x.requires_grad_()
    scale = torch.tensor(2.0**13, device=measure.DEVICE)

    def train(op: str = name) -> tuple[Tensor, ...]:
        out = BLOCK_OPS[op](x, branch, scale)
        return out.detach(), *torch.autograd.grad(out, [x, *branch.parameters()], upstream)

    expected = train("plain")

    def is_right(found: tuple[Tensor, ...]) -> None:
        for index, (actual, true) in enumerate(zip(found, expected, strict=True)):
            wanted = true if index < 2 or name == "plain" else true * scale.to(true.dtype)
            tolerance = 100 * torch.finfo(dtype).eps * float(wanted.abs().max())
            torch.testing.assert_close(actual, wanted, rtol=0, atol=tolerance)

    checked(measure.timed(train), is_right, tokens=TOKENS)
    if benchmark.stats is not None and name != "plain":
        benchmark.extra_info["time_over_plain"] = _ratio(train, lambda: train("plain"))


def _ratio(call: Callable[[], object], other: Callable[[], object], rounds: int = 9) -> float:
    """Median time of one over that of the other, called in turn, so that a drift of the machine's speed hits both."""
    times = [(measure.seconds_of(call), measure.seconds_of(other)) for _ in range(rounds)]
    return statistics.median(own for own, _ in times) / statistics.median(others for _, others in times)
