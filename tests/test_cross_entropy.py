"""linear_cross_entropy against float64 written out, its gradients, ignored targets and messages."""

import re

import pytest
import torch
from helpers import assert_within_budget, needs_extension
from torch import Tensor
from torch.nn import functional as F

from dalle_fast.ops.cross_entropy import linear_cross_entropy

BACKENDS = ("auto", "reference", pytest.param("cpp", marks=needs_extension))
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def widest(backend: str) -> torch.dtype:
    """The widest dtype that the backend takes."""
    return torch.float32 if backend == "cpp" else torch.float64


def by_hand(hidden, weight, target, bias=None, ignore_index=-100) -> Tensor:
    """Losses of the positions, one at a time."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    losses = torch.zeros(len(flat), dtype=hidden.dtype)
    for i, label in enumerate(target.reshape(-1).tolist()):
        if label != ignore_index:
            logits = weight @ flat[i] + (0 if bias is None else bias)
            losses[i] = logits.exp().sum().log() - logits[label]
    return losses.reshape(target.shape)


def make_inputs(dtype=torch.float64, requires_grad=False):
    hidden, weight, bias = torch.randn(2, 7, 6), torch.randn(11, 6), torch.randn(11)
    target = torch.randint(0, 11, (2, 7))
    tensors = [tensor.to(dtype).requires_grad_(requires_grad) for tensor in (hidden, weight, bias)]
    return *tensors, target


@each_backend
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 3, -1])
def test_equals_the_sum_written_out(backend, with_bias, ignore_index):
    hidden, weight, bias, target = make_inputs(widest(backend))
    target[0, 2:4] = ignore_index
    options = {"bias": bias if with_bias else None, "ignore_index": ignore_index, "backend": backend}
    losses = by_hand(hidden, weight, target, options["bias"], ignore_index)
    for reduction, expected in (
        ("none", losses),
        ("sum", losses.sum()),
        ("mean", losses.sum() / (target != ignore_index).sum()),
    ):
        torch.testing.assert_close(
            linear_cross_entropy(hidden, weight, target, reduction=reduction, **options), expected
        )
    assert (losses[target == ignore_index] == 0).all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients(backend, reduction):
    hidden, weight, bias, target = make_inputs(requires_grad=True)
    target[1, 0] = -100

    def run(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, target, bias=bias, reduction=reduction, backend=backend)

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_budget(backend, dtype):
    *narrow, target = make_inputs(dtype, requires_grad=True)
    wide = [tensor.detach().double().requires_grad_() for tensor in narrow]
    loss = linear_cross_entropy(narrow[0], narrow[1], target, bias=narrow[2], backend=backend)
    peer, truth = (F.cross_entropy(F.linear(h, w, b).flatten(0, 1), target.flatten()) for h, w, b in (narrow, wide))
    assert loss.dtype == torch.float32
    assert_within_budget(loss.to(dtype), peer, truth)
    results = (torch.autograd.grad(value, inputs) for value, inputs in ((loss, narrow), (peer, narrow), (truth, wide)))
    for actual, expected_peer, expected in zip(*results, strict=True):
        assert actual.dtype == dtype
        assert_within_budget(actual, expected_peer, expected)


@each_backend
def test_all_targets_ignored(backend):
    hidden, weight, _, target = make_inputs(widest(backend), requires_grad=True)
    for reduction in ("mean", "sum", "none"):
        loss = linear_cross_entropy(hidden, weight, torch.full_like(target, -100), reduction=reduction, backend=backend)
        assert (loss == 0).all()
        for grad in torch.autograd.grad(loss.sum(), (hidden, weight)):
            assert (grad == 0).all()


@each_backend
def test_no_positions(backend):
    loss = linear_cross_entropy(
        torch.zeros(0, 6), torch.zeros(11, 6), torch.zeros(0, dtype=torch.int64), backend=backend
    )
    assert loss == 0


@each_backend
def test_one_position_without_batch(backend):
    hidden, weight, _, target = make_inputs(widest(backend))
    loss = linear_cross_entropy(hidden[0, 0], weight, target[0, 0], reduction="none", backend=backend)
    torch.testing.assert_close(loss, by_hand(hidden, weight, target)[0, 0])


@each_backend
def test_large_logits(backend):
    hidden, weight, _, target = make_inputs(torch.float32)
    loss = linear_cross_entropy(hidden * 1e4, weight, target, backend=backend)
    assert torch.isfinite(loss)


@each_backend
def test_stride_0_gradient(backend):
    hidden, weight, _, target = make_inputs(widest(backend), requires_grad=True)
    losses = linear_cross_entropy(hidden, weight, target, reduction="none", backend=backend)
    (from_sum,) = torch.autograd.grad(losses.sum(), hidden, retain_graph=True)
    (from_ones,) = torch.autograd.grad(losses, hidden, torch.ones_like(losses))
    torch.testing.assert_close(from_sum, from_ones)


def test_compiles_without_a_break():
    hidden, weight, bias, target = make_inputs()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(hidden, weight, target, bias=bias), linear_cross_entropy(hidden, weight, target, bias=bias)
    )


def test_autocast_keeps_float32_logits():
    hidden, weight, bias, target = make_inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, target, bias=bias)
        mixed = linear_cross_entropy(hidden.bfloat16(), weight, target, bias=bias)
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, target, bias=bias))
    rounded = hidden.bfloat16().float()
    assert torch.equal(mixed, linear_cross_entropy(rounded, weight, target, bias=bias))


HIDDEN, WEIGHT, TARGET = torch.zeros(2, 3, 6), torch.zeros(11, 6), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.tensor(1.0)}, ValueError, "hidden must have shape (..., D), got ()"),
        ({"hidden": HIDDEN.long()}, TypeError, "hidden must be floating point, got torch.int64"),
        (
            {"weight": WEIGHT.double()},
            TypeError,
            "hidden, weight must have one dtype, got torch.float32, torch.float64",
        ),
        ({"weight": WEIGHT.to("meta")}, ValueError, "hidden, weight must be on one device, got cpu, meta"),
        ({"weight": WEIGHT[0]}, ValueError, "weight must have shape (V, 6) with V >= 1, got (6,)"),
        ({"weight": WEIGHT[:0]}, ValueError, "weight must have shape (V, 6) with V >= 1, got (0, 6)"),
        ({"weight": WEIGHT[:, :5]}, ValueError, "weight must have shape (V, 6) with V >= 1, got (11, 5)"),
        ({"bias": torch.zeros(10)}, ValueError, "bias must have shape (11,), got (10,)"),
        ({"target": TARGET.int()}, TypeError, "target must be an int64 tensor, got torch.int32"),
        ({"target": [0]}, TypeError, "target must be an int64 tensor, got list"),
        ({"target": TARGET[0]}, ValueError, "target must have shape (2, 3), got (3,)"),
        ({"target": TARGET.to("meta")}, ValueError, "target must be on cpu, got meta"),
        ({"target": TARGET + 11}, ValueError, "target must be in 0..10 or ignore_index -100, got 11"),
        ({"target": TARGET - 1}, ValueError, "target must be in 0..10 or ignore_index -100, got -1"),
        ({"reduction": "max"}, ValueError, "reduction must be one of mean, sum, none, got 'max'"),
        ({"backend": "gpu"}, ValueError, "backend must be one of auto, triton, cpp, reference, got 'gpu'"),
        pytest.param(
            {"target": TARGET - 1, "backend": "cpp"},
            ValueError,
            "target must be in 0..10 or ignore_index -100, got -1",
            marks=needs_extension,
        ),
        (
            {"hidden": HIDDEN.double(), "weight": WEIGHT.double(), "backend": "cpp"},
            TypeError,
            'backend "cpp" of linear_cross_entropy takes float32, float16 and bfloat16, got torch.float64; '
            'use backend="reference"',
        ),
        (
            {"hidden": HIDDEN.to("meta"), "weight": WEIGHT.to("meta"), "target": TARGET.to("meta"), "backend": "cpp"},
            RuntimeError,
            'backend="cpp"',
        ),
        (
            {
                "hidden": HIDDEN.to("meta"),
                "weight": WEIGHT.to("meta"),
                "target": TARGET.to("meta"),
                "backend": "triton",
            },
            RuntimeError,
            'backend="triton" is not available',
        ),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        linear_cross_entropy(**({"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET} | changes))
