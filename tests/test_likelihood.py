"""logit_laplace_nll against float64 and autograd: values, gradients at the edges, what is kept, compiler, messages."""

import math
import re

import pytest
import torch
from helpers import assert_within_budget

from dalle_fast import reference
from dalle_fast.ops.likelihood import logit_laplace_nll

BACKENDS = ("auto", "reference")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
LAYOUTS = ["contiguous", "channels_last", "slices"]


def make_inputs(dtype=torch.float32, layout="contiguous", spread=2.0, shape=(2, 3, 7, 5)):
    """target, mu and log_scale; "slices" are the halves of what a channels-last decoder gives."""
    batch, channels, height, width = shape
    statistics = spread * torch.randn(batch, 2 * channels, height, width)
    target = (0.1 + 0.8 * torch.rand(shape)).to(dtype)
    if layout != "contiguous":
        statistics = statistics.contiguous(memory_format=torch.channels_last)
        target = target.contiguous(memory_format=torch.channels_last)
    mu, log_scale = statistics.to(dtype).chunk(2, dim=1)
    if layout == "channels_last":
        mu, log_scale = (x.contiguous(memory_format=torch.channels_last) for x in (mu, log_scale))
    return target, mu, log_scale


def written_out(target, mu, log_scale):
    """The formula, as autograd differentiates it."""
    target, mu, log_scale = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (target, mu, log_scale))
    distance = (torch.log(target) - torch.log1p(-target) - mu).abs()
    return distance * torch.exp(-log_scale) + log_scale + math.log(2) + torch.log(target) + torch.log1p(-target)


def run(function, inputs, grad):
    """The result and the gradients of the three inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "spread"),
    [
        (torch.float32, 0.3),
        (torch.float32, 3.0),
        (torch.float32, 20.0),
        (torch.float16, 2.0),
        (torch.bfloat16, 2.0),
        (torch.bfloat16, 20.0),
    ],
)
def test_value_and_gradients(backend, layout, dtype, spread):
    inputs = make_inputs(dtype, layout, spread)
    grad = torch.randn(2, 3, 7, 5)
    actual = run(lambda *x: logit_laplace_nll(*x, backend=backend), inputs, grad)
    same_dtype = run(written_out, inputs, grad)
    truth = run(written_out, [x.double() for x in inputs], grad)
    assert actual[0].dtype == torch.promote_types(dtype, torch.float32)
    assert all(x.dtype == dtype for x in actual[1:])
    for one, peer, true in zip(actual, same_dtype, truth, strict=True):
        assert_within_budget(one, peer, true)


@each_backend
def test_float64_stays(backend):
    inputs, grad = make_inputs(torch.float64), torch.randn(2, 3, 7, 5)
    actual = run(lambda *x: logit_laplace_nll(*x, backend=backend), inputs, grad)
    for one, true in zip(actual, run(written_out, inputs, grad), strict=True):
        torch.testing.assert_close(one, true, rtol=1e-13, atol=1e-13)


@each_backend
@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("log_scale", [-80.0, -20.0, -3.0, 0.0, 20.0, 80.0, 200.0, 65504.0, 1e30])
@pytest.mark.parametrize("mu", [-1e30, -65504.0, -3.0, 0.0, 3.0, 65504.0, 1e30])
def test_no_nan_and_no_infinity_before_float32_ends(backend, target, mu, log_scale):
    inputs = [torch.tensor([value]) for value in (target, mu, log_scale)]
    truth = run(written_out, [x.double() for x in inputs], torch.ones(1))
    same_dtype = run(written_out, inputs, torch.ones(1))
    actual = run(lambda *x: logit_laplace_nll(*x, backend=backend), inputs, torch.ones(1))
    for one, peer, true in zip(actual, same_dtype, truth, strict=True):
        assert not one.isnan().any()
        if true.abs() <= torch.finfo(torch.float32).max:
            assert_within_budget(one, peer, true)


@pytest.mark.parametrize("log_scale", [-88.0, -100.0, -1e4, -65504.0, -3e38])
def test_the_smallest_scales(log_scale):
    """1 / b stops at e^88; the gradients of a mean over an image are finite, and show the way back to larger b."""
    target, mu = torch.tensor([0.1, 0.3, 0.9]), torch.tensor([-1e3, 0.0, 1e3])
    log_scales = torch.full((3,), log_scale)
    count = 3 * 256 * 256
    for backend in BACKENDS:
        inputs = target, mu, log_scales
        _, grad_target, grad_mu, grad_scale = run(
            lambda *x, backend=backend: logit_laplace_nll(*x, backend=backend), inputs, torch.full((3,), 1 / count)
        )
        assert all(x.isfinite().all() for x in (grad_target, grad_mu, grad_scale))
        assert (grad_scale < 0).all()
        torch.testing.assert_close(grad_mu, torch.tensor([-1.0, 1.0, 1.0]) * math.exp(88) / count, rtol=1e-4, atol=0)


@each_backend
@pytest.mark.parametrize("log_scale", [-65504.0, -100.0, -3.0, 0.0, 100.0])
def test_target_met_exactly(backend, log_scale):
    """At logit x = mu the distance has gradient 0, as |.| at 0 has, however small b is."""
    target, mu = torch.tensor([0.5]), torch.tensor([0.0])
    inputs = target, mu, torch.tensor([log_scale])
    out, grad_target, grad_mu, grad_scale = run(
        lambda *x: logit_laplace_nll(*x, backend=backend), inputs, torch.ones(1)
    )
    assert out.item() == pytest.approx(log_scale - math.log(2), rel=1e-6)
    assert (grad_target.item(), grad_mu.item(), grad_scale.item()) == (0, 0, 1)


@each_backend
def test_gradcheck(backend):
    inputs = [x.requires_grad_() for x in make_inputs(torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: logit_laplace_nll(*x, backend=backend), inputs)


@each_backend
def test_one_scale_for_all(backend):
    target, mu, _ = make_inputs()
    expected = written_out(target, mu, torch.full_like(mu, -1.3))
    torch.testing.assert_close(logit_laplace_nll(target, mu, -1.3, backend=backend), expected)
    scale = torch.tensor(-1.3, requires_grad=True)
    logit_laplace_nll(target, mu, scale, backend=backend).sum().backward()
    wide = torch.tensor(-1.3, dtype=torch.float64, requires_grad=True)
    written_out(target.double(), mu.double(), wide).sum().backward()
    torch.testing.assert_close(scale.grad.double(), wide.grad, rtol=1e-5, atol=0)


def test_keeps_its_inputs_alone():
    target, mu, log_scale = (x.detach() for x in make_inputs())
    mu, log_scale = mu.requires_grad_(), log_scale.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        logit_laplace_nll(target, mu, log_scale)
    assert set(kept) == {target.data_ptr(), mu.data_ptr(), log_scale.data_ptr()}


def test_gradient_of_some_inputs():
    target, mu, log_scale = make_inputs()
    everything = run(logit_laplace_nll, (target, mu, log_scale), torch.ones_like(mu))
    for number in range(3):
        leaves = [x.detach().requires_grad_(index == number) for index, x in enumerate((target, mu, log_scale))]
        # A sum hands over a gradient of stride 0.
        logit_laplace_nll(*leaves).sum().backward()
        torch.testing.assert_close(leaves[number].grad, everything[number + 1], rtol=0, atol=0)


def test_gradients_have_the_inputs_layout():
    """The decoder goes on backwards with the gradient of its result, the two halves put together, without a copy."""
    target, mu, log_scale = make_inputs(layout="slices")
    statistics = torch.cat([mu, log_scale], 1).contiguous(memory_format=torch.channels_last).requires_grad_()
    logit_laplace_nll(target, *statistics.chunk(2, dim=1)).mean().backward()
    assert statistics.grad.is_contiguous(memory_format=torch.channels_last)


def test_same_bits_again():
    inputs, grad = make_inputs(), torch.randn(2, 3, 7, 5)
    for first, second in zip(run(logit_laplace_nll, inputs, grad), run(logit_laplace_nll, inputs, grad), strict=True):
        assert torch.equal(first, second)


def test_no_second_derivative():
    target, mu, log_scale = (x.detach().requires_grad_() for x in make_inputs(torch.float64))
    (grad,) = torch.autograd.grad(logit_laplace_nll(target, mu, log_scale).sum(), log_scale, create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative; use backend="reference", which has'):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(
        logit_laplace_nll(target, mu, log_scale, backend="reference").sum(), log_scale, create_graph=True
    )
    grad.sum().backward()
    assert log_scale.grad.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, layout):
    inputs = [x.detach().requires_grad_() for x in make_inputs(dtype, layout)]
    torch.library.opcheck(torch.ops.dalle_fast.logit_laplace_nll.default, inputs)
    grad = torch.randn(2, 3, 7, 5)
    for needed in ((True, True, True), (False, True, False), (False, False, True)):
        tensors = [x.detach() for x in inputs]
        torch.library.opcheck(
            torch.ops.dalle_fast.logit_laplace_nll_backward.default,
            (*tensors, grad, *needed),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("function", [logit_laplace_nll, torch.ops.dalle_fast.logit_laplace_nll])
def test_compile(function):
    inputs, grad = make_inputs(), torch.randn(2, 3, 7, 5)
    compiled = run(torch.compile(function, fullgraph=True), inputs, grad)
    truth = run(written_out, [x.double() for x in inputs], grad)
    for one, peer, true in zip(compiled, run(written_out, inputs, grad), truth, strict=True):
        assert_within_budget(one, peer, true)


def test_autocast():
    inputs = make_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = logit_laplace_nll(*inputs)
    assert torch.equal(out, logit_laplace_nll(*inputs))


def test_empty():
    inputs = [torch.empty(0, 3, 2, 2, requires_grad=True) for _ in range(3)]
    logit_laplace_nll(*inputs).sum().backward()
    assert inputs[1].grad.shape == (0, 3, 2, 2)


def test_reference_is_exported():
    inputs = make_inputs()
    torch.testing.assert_close(reference.logit_laplace_nll(*inputs), written_out(*inputs))


HALF = torch.full((2, 3), 0.5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((HALF.int(), HALF, HALF), TypeError, "target must be a floating-point tensor, got torch.int32"),
        ((HALF, 0.5, HALF), TypeError, "mu must be a floating-point tensor, got float"),
        ((HALF, HALF[0], HALF), ValueError, "mu must have target's shape (2, 3), got (3,)"),
        ((HALF, HALF, HALF[:1]), ValueError, "log_scale must have target's shape (2, 3), got (1, 3)"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        logit_laplace_nll(*arguments)


def test_backends():
    with pytest.raises(ValueError, match="backend must be one of auto, triton, cpp, reference, got 'gpu'"):
        logit_laplace_nll(HALF, HALF, HALF, backend="gpu")
    with pytest.raises(RuntimeError, match='backend "cpp" of logit_laplace_nll is not part of this version'):
        logit_laplace_nll(HALF, HALF, HALF, backend="cpp")
