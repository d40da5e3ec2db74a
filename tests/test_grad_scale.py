"""Where the scale enters and leaves a block's backward, the rule that moves it, and the AdamW16 update."""

import math
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dalle_fast import reference
from dalle_fast.ops.grad_scale import scaled_resblock, unscale_

SCALES = (1.0, 2.0**13, 0.5, torch.tensor(2.0**13), torch.tensor([2.0**13]))


class Probe(torch.autograd.Function):
    """Identity that records the gradient passing through it and may replace it."""

    @staticmethod
    def forward(ctx, x, seen, replacement):
        ctx.seen, ctx.replacement = seen, replacement
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append(grad)
        return grad if ctx.replacement is None else ctx.replacement, None, None


def make_branch() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)).double()


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_scale_cancels(scale):
    branch = make_branch()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(4, 6, dtype=torch.float64)
    inputs = [x, *branch.parameters()]
    plain = x + branch(x)
    scaled = scaled_resblock(x, branch, scale)
    assert torch.equal(scaled, plain)
    expected = torch.autograd.grad(plain, inputs, upstream)
    actual = torch.autograd.grad(scaled, inputs, upstream)
    torch.testing.assert_close(actual[0], expected[0])
    for grad, expected_grad in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(grad, expected_grad * float(scale))


def test_order_of_the_backward():
    """Scale and filter in float32, cast, branch, cast, unscale and filter, add to the identity's gradient."""
    x = torch.randn(3, requires_grad=True)
    into_branch, out_of_branch = [], []

    def fn(entry):
        inner = Probe.apply(entry, out_of_branch, None).half()
        return Probe.apply(inner * 3, into_branch, None)

    upstream = torch.tensor([1e-6, 1.0, math.inf])
    scaled_resblock(x, fn, 2.0**10).backward(upstream)
    assert into_branch[0].dtype == torch.float16
    # inf * scale is filtered to 0, and 1e-6, below half of float16's smallest normal, survives scaled.
    assert torch.equal(into_branch[0], torch.tensor([1e-6 * 2**10, 2.0**10, 0.0]).half())
    assert out_of_branch[0].dtype == torch.float32
    expected = upstream + out_of_branch[0] / 2**10
    assert torch.equal(x.grad, expected)
    assert x.grad[2] == math.inf


def test_overflow_inside_the_branch_is_filtered_at_its_entry():
    x = torch.randn(4, requires_grad=True)
    broken = torch.tensor([math.nan, math.inf, -math.inf, 2.0])
    scaled_resblock(x, lambda entry: Probe.apply(entry, [], broken), 4.0).sum().backward()
    assert torch.equal(x.grad, torch.tensor([1.0, 1.0, 1.0, 1.5]))


def test_overflow_stays_in_its_block():
    """A block that overflows spoils the gradients of its own weights and of nothing before it."""
    first, second = nn.Linear(4, 4, bias=False).half(), nn.Linear(4, 4, bias=False).half()
    x = torch.randn(2, 4, requires_grad=True)
    middle = scaled_resblock(x, lambda h: first(h.half()), 1.0)
    scaled_resblock(middle, lambda h: second(h.half()), 2.0**20).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(first.weight.grad).all()
    assert not torch.isfinite(second.weight.grad).all()


def test_branch_in_16_bit_keeps_the_residual_in_32():
    x = torch.randn(2, 6, requires_grad=True)
    branch = nn.Linear(6, 6).bfloat16()
    out = scaled_resblock(x, lambda h: branch(h.bfloat16()), 2.0**13)
    assert out.dtype == torch.float32
    assert torch.equal(out, x + branch(x.bfloat16()).float())


def test_stride_0_gradient():
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    branch = make_branch()
    (from_sum,) = torch.autograd.grad(scaled_resblock(x, branch, 8.0).sum(), x)
    (from_ones,) = torch.autograd.grad(scaled_resblock(x, branch, 8.0), x, torch.ones_like(x))
    assert torch.equal(from_sum, from_ones)


@pytest.mark.parametrize("block", [scaled_resblock, reference.scaled_resblock], ids=["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_second_derivative_is_an_error(block, dtype):
    """It would be off by the scale."""
    x = torch.randn(4, 6, dtype=dtype, requires_grad=True)
    out = block(x, torch.sin, 8.0).square().sum()
    (expected,) = torch.autograd.grad(out, x, retain_graph=True)
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    assert torch.equal(grad, expected)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.square().sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_block(use_reentrant):
    branch = make_branch()
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(scaled_resblock(x, branch, 8.0).square().sum(), x)
    out = checkpoint(scaled_resblock, x, branch, 8.0, use_reentrant=use_reentrant)
    out.square().sum().backward()
    assert torch.equal(x.grad, expected)


def test_compiles_without_a_break():
    branch = make_branch()
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(lambda h, scale: scaled_resblock(h, branch, scale), fullgraph=True, backend="aot_eager")
    for scale in (8.0, torch.tensor(8.0)):
        (expected,) = torch.autograd.grad(scaled_resblock(x, branch, scale).square().sum(), x)
        (actual,) = torch.autograd.grad(compiled(x, scale).square().sum(), x)
        torch.testing.assert_close(actual, expected)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("x", "fn", "scale", "error", "message"),
    [
        (
            X.half(),
            torch.sin,
            1.0,
            TypeError,
            "x must be float32 or float64, for the residual path is not 16-bit, got torch.float16",
        ),
        ([1.0], torch.sin, 1.0, TypeError, "x must be float32 or float64"),
        (X, torch.sin, 0.0, ValueError, "scale must be finite and > 0, got 0.0"),
        (X, torch.sin, -2, ValueError, "scale must be finite and > 0, got -2"),
        (X, torch.sin, math.nan, ValueError, "scale must be finite and > 0, got nan"),
        (X, torch.sin, math.inf, ValueError, "scale must be finite and > 0, got inf"),
        (
            X,
            torch.sin,
            torch.ones(2),
            ValueError,
            "scale must be a number or a tensor of one element, got shape (2,)",
        ),
        (X, lambda x: x[:1], 1.0, ValueError, "fn(x) must have x's shape (2, 3), got (1, 3)"),
        (X, lambda x: x.long(), 1.0, TypeError, "fn(x) must be floating point, got torch.int64"),
        (X, lambda x: None, 1.0, TypeError, "fn(x) must be a tensor, got NoneType"),
    ],
)
def test_resblock_errors(x, fn, scale, error, message):
    with pytest.raises(error, match=re.escape(message)):
        scaled_resblock(x, fn, scale)


def make_grads() -> list[torch.Tensor]:
    shapes = {torch.float32: (3, 4), torch.float64: (5,), torch.bfloat16: (2,), torch.float16: ()}
    return [torch.randn(shape).to(dtype) for dtype, shape in shapes.items()]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("write", [True, False])
def test_unscale(backend, write):
    grads, blocks = make_grads(), [0, 1, 1, 2]
    scales = torch.tensor([8.0, 2.0, 0.5])
    quotients = [grad.double() / float(scales[block]) for grad, block in zip(grads, blocks, strict=True)]
    expected = [q.to(g.dtype) if write else g.clone() for q, g in zip(quotients, grads, strict=True)]
    nonfinite, sum_of_squares = unscale_(grads, scales, blocks, write=write, backend=backend)
    assert nonfinite.dtype == torch.bool
    assert nonfinite.tolist() == [False] * 3
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert torch.equal(grad, expected_grad)
    torch.testing.assert_close(sum_of_squares, sum(q.square().sum() for q in quotients), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_unscale_finds_and_filters_nonfinite(bad):
    grads = [torch.ones(3), torch.ones(2, 2), torch.ones(2)]
    grads[1][1, 0] = bad
    nonfinite, sum_of_squares = unscale_(grads, torch.tensor([2.0, 4.0]), [0, 1, 1])
    assert nonfinite.tolist() == [False, True]
    assert torch.equal(grads[0], torch.full((3,), 0.5))
    assert torch.equal(grads[1], torch.tensor([[0.25, 0.25], [0.0, 0.25]]))
    assert sum_of_squares == 3 / 4 + 5 / 16


def test_unscale_with_one_scale():
    grads = [torch.full((3,), 6.0)]
    assert not unscale_(grads, torch.tensor([2.0])).nonfinite
    assert torch.equal(grads[0], torch.full((3,), 3.0))


def test_unscale_flags_a_quotient_beyond_float32():
    grads = [torch.full((1,), 1e38)]
    assert unscale_(grads, torch.tensor([1e-3])).nonfinite
    assert grads[0] == 0


def test_unscale_nothing():
    nonfinite, sum_of_squares = unscale_([], torch.tensor([2.0]))
    assert not nonfinite.any() and sum_of_squares == 0


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("grads", "options", "error", "message"),
    [
        ([X, X.long()], {}, TypeError, "grads[1] must be floating point, got torch.int64"),
        ([X, None], {}, TypeError, "grads[1] must be a tensor, got NoneType"),
        ([X.to_sparse()], {}, TypeError, "grads[0] must be dense, got layout torch.sparse_coo"),
        ([X, X.to("meta")], {}, ValueError, "grads must be on the device of scales, cpu, got meta"),
        ([X], {"scales": ONE.double()}, ValueError, "scales must be float32 of one dimension, got torch.float64"),
        ([X], {"scales": ONE[0]}, ValueError, "scales must be float32 of one dimension, got torch.float32 of shape ()"),
        ([X], {"blocks": [1]}, ValueError, "blocks must lie in [0, 1), got 1"),
        ([X], {"blocks": [0, 0]}, ValueError, "blocks must have an entry for each of the 1 gradients, got 2"),
        (
            [X],
            {"backend": "triton"},
            RuntimeError,
            'backend "triton" of unscale_ is not part of this version; use backend="auto"',
        ),
    ],
)
def test_unscale_errors(grads, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        unscale_(grads, **({"scales": ONE} | options))


class TestUpdate:
    def update(self, scale, nonfinite, since, **options):
        new = reference.update_grad_scale(
            torch.tensor(scale, dtype=torch.float64), torch.tensor(nonfinite), torch.tensor(since), **options
        )
        return [tensor.tolist() for tensor in new]

    def test_growth_doubles_in_1000_updates(self):
        scale, since = torch.tensor([2.0**13], dtype=torch.float64), torch.tensor([125])
        for _ in range(1000):
            scale, since = reference.update_grad_scale(scale, torch.tensor([False]), since)
        torch.testing.assert_close(scale, torch.tensor([2.0**14], dtype=torch.float64))
        assert since.item() == 1125

    def test_only_the_guilty_block_backs_off(self):
        scales, since = self.update([2.0**13, 2.0**13], [False, True], [125, 125])
        assert scales == pytest.approx([2.0**13 * 2**0.001, 2.0**12.5])
        assert since == [126, 0]

    def test_no_second_back_off_within_125_updates(self):
        scale, since = torch.tensor([2.0**20], dtype=torch.float64), torch.tensor([125])
        back_offs = []
        for update in range(251):
            before = scale
            scale, since = reference.update_grad_scale(scale, torch.tensor([True]), since)
            if not torch.equal(scale, before):
                back_offs.append(update)
        assert back_offs == [0, 125, 250]

    def test_nonfinite_within_the_interval_neither_grows_nor_shrinks(self):
        scales, since = self.update([2.0**13], [True], [50])
        assert scales == [2.0**13] and since == [51]

    def test_clamps(self):
        assert self.update([2.0**24, 2.0**7], [False, True], [0, 125])[0] == [2.0**24, 2.0**7]
        scales, _ = self.update([100.0, 1e9], [True, False], [125, 0], min_scale=90.0, max_scale=1e8)
        assert scales == [90.0, 1e8]

    def test_constants(self):
        options = {"growth_factor": 2.0, "backoff_factor": 0.25, "backoff_interval": 3}
        assert self.update([512.0, 1024.0], [False, True], [0, 2], **options) == [[1024.0, 256.0], [1, 0]]

    def test_arguments_are_left_alone(self):
        scale, since = torch.tensor([1024.0]), torch.tensor([125])
        reference.update_grad_scale(scale, torch.tensor([True]), since)
        assert scale.item() == 1024.0 and since.item() == 125


class TestAdamW16:
    def run(self, param, grads, **options):
        """Steps with float32 moments; returns the last state."""
        mean, variance = torch.zeros_like(param), torch.zeros_like(param)
        for step, grad in enumerate(grads, 1):
            param, mean, variance = reference.adamw16_step(param, grad, mean, variance, step, **options)
        return param, mean, variance

    def test_equals_torch_adamw_with_wide_moments(self):
        param, grads = torch.randn(20), torch.randn(10, 20)
        options = {"lr": 1e-2, "betas": (0.9, 0.96), "eps": 1e-8, "weight_decay": 0.045}
        peer = param.clone().requires_grad_()
        optimizer = torch.optim.AdamW([peer], **options)
        for grad in grads:
            peer.grad = grad.clone()
            optimizer.step()
        torch.testing.assert_close(self.run(param, grads, **options)[0], peer.detach())

    def test_variance_is_clipped_before_use(self):
        grad = torch.tensor([100.0])
        param, _, variance = self.run(torch.zeros(1), [grad], lr=1.0, weight_decay=0.0)
        assert variance.item() == 5.0
        # m / (1 - b1) = 100 and v / (1 - b2) = 5 / 0.04.
        assert param.item() == pytest.approx(-100 / math.sqrt(125), rel=1e-5)

    def test_weight_decay_is_decoupled(self):
        param, mean, _ = self.run(torch.tensor([2.0]), [torch.zeros(1)], lr=0.1, weight_decay=0.5)
        assert param.item() == pytest.approx(2.0 * (1 - 0.05))
        assert mean.item() == 0.0

    def test_moments_are_stored_in_16_bit(self):
        param, grad = torch.randn(50), torch.randn(50)
        zeros = torch.zeros(50, dtype=torch.int16)
        narrow = reference.adamw16_step(param, grad, zeros, zeros, 1, lr=0.1)
        wide = reference.adamw16_step(param, grad, torch.zeros(50), torch.zeros(50), 1, lr=0.1)
        assert torch.equal(narrow[0], wide[0])
        assert torch.equal(narrow[1], reference.encode_169(wide[1]))
        assert torch.equal(narrow[2], reference.encode_0610(wide[2]))
        after = reference.adamw16_step(narrow[0], grad, narrow[1], narrow[2], 2, lr=0.1)
        decoded = reference.decode_169(narrow[1]), reference.decode_0610(narrow[2])
        assert torch.equal(after[0], reference.adamw16_step(narrow[0], grad, *decoded, 2, lr=0.1)[0])

    def test_16_bit_parameters(self):
        param, grad = torch.randn(20).half(), torch.randn(20).half()
        moments = torch.zeros(20), torch.zeros(20)
        new = reference.adamw16_step(param, grad, *moments, 1, lr=0.1)[0]
        wide = reference.adamw16_step(param.float(), grad.float(), *moments, 1, lr=0.1)[0]
        assert new.dtype == torch.float16
        assert torch.equal(new, wide.half())
