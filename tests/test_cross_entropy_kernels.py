"""The Triton kernel of cross-entropy in Triton's interpreter, against float64; on a machine without a GPU too.

The interpreter is chosen when triton is imported, and other tests need its compiler: this module runs itself once more
in a process of its own. What the interpreter cannot show (registers, bfloat16, races) is not tested here.
"""

import math

import pytest
import torch
from helpers import assert_within_budget
from interpreter import INTERPRETED, interpreted, run_interpreted
from torch import Tensor
from torch.nn import functional as F

from dalle_fast.ops import cross_entropy_registration
from dalle_fast.ops.cross_entropy import linear_cross_entropy

pytest.importorskip("triton")

from dalle_fast.kernels.cross_entropy import cross_entropy_rows


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.skipif(INTERPRETED, reason="the compiled kernels")
def test_no_cpu_tensors_outside_the_interpreter():
    rows, target = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="run on CUDA devices, got a tensor on cpu; move it to one, or set"):
        cross_entropy_rows(rows, None, target, None, torch.zeros(2), rows, ignore_index=-100)


@interpreted
def test_bfloat16_is_refused():
    rows, target = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(
        RuntimeError, match=r"interpreter computes bfloat16 on its bit patterns.*unset TRITON_INTERPRET"
    ):
        cross_entropy_rows(rows, None, target, None, torch.zeros(2), rows.bfloat16(), ignore_index=-100)


def poisoned(values: Tensor) -> Tensor:
    """``values`` (N, V) in the middle of a buffer of NaN."""
    buffer = torch.full((values.shape[0] + 2, values.shape[1] + 70), math.nan, dtype=values.dtype)
    view = buffer[1:-1, 35:-35]
    view.copy_(values)
    return view


def surroundings_untouched(view: Tensor) -> bool:
    buffer = view._base.clone()
    torch.as_strided(buffer, view.shape, view.stride(), view.storage_offset()).fill_(math.nan)
    return bool(buffer.isnan().all())


def expected(logits, bias, target, factor, dtype, ignore_index) -> tuple[Tensor, Tensor]:
    """Losses and gradients of PyTorch in ``dtype``."""
    x = logits.to(dtype).requires_grad_()
    losses = F.cross_entropy(
        x if bias is None else x + bias.to(dtype), target, ignore_index=ignore_index, reduction="none"
    )
    (grad,) = torch.autograd.grad(losses, x, torch.ones_like(losses) if factor is None else factor.to(dtype))
    return losses.detach(), grad


@interpreted
@pytest.mark.parametrize("grads", ["in place", "float16", "none"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias-factor"])
@pytest.mark.parametrize("classes", [1, 5, 31, 32, 33, 100])
def test_rows(grads, extras, classes):
    values, target = 4 * torch.randn(9, classes), torch.randint(classes, (9,))
    target[[1, 8]] = -100
    bias, factor = (torch.randn(classes), torch.randn(9)) if extras else (None, None)
    logits, losses = poisoned(values), torch.full((9,), math.nan)
    dtype = torch.float16 if grads == "float16" else torch.float32
    other = poisoned(torch.full((9, classes), math.nan, dtype=dtype))
    written = {"in place": logits, "float16": other, "none": None}[grads]
    cross_entropy_rows(logits, bias, target, factor, losses, written, ignore_index=-100, block_n=32)
    truth = expected(values, bias, target, factor, torch.float64, -100)
    peer = expected(values, bias, target, factor, torch.float32, -100)
    assert_within_budget(losses, peer[0], truth[0])
    if written is None:
        assert torch.equal(logits, values)
        return
    assert surroundings_untouched(written)
    assert_within_budget(written, peer[1].to(dtype), truth[1])
    assert (written[[1, 8]] == 0).all()


@interpreted
def test_ignored_rows_are_not_read():
    logits, losses = torch.full((3, 40), math.nan), torch.full((3,), math.nan)
    logits[1] = 0.0
    target = torch.tensor([7, 3, 7])
    cross_entropy_rows(logits, None, target, None, losses, logits, ignore_index=7, block_n=16)
    assert losses[0] == losses[2] == 0 and losses[1].isfinite()
    assert (logits[[0, 2]] == 0).all() and logits[1].isfinite().all()


@interpreted
@pytest.mark.parametrize("label", [-1, 40, 2**40])
def test_a_target_out_of_range_makes_the_loss_nan(label):
    logits, losses = poisoned(torch.randn(2, 40)), torch.zeros(2)
    cross_entropy_rows(logits, None, torch.tensor([3, label]), None, losses, None, ignore_index=-100, block_n=16)
    assert losses[0].isfinite() and losses[1].isnan()


@interpreted
@pytest.mark.parametrize("values", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf]])
def test_not_numbers_among_the_logits(values):
    """In the rows where F.cross_entropy has them."""
    logits = torch.randn(6, 70)
    for place, value in enumerate(values):
        logits[1, place] = logits[4, 68 - place] = value
    target = torch.tensor([3, 0, 5, 69, 68, 0])
    logits[5] = -math.inf
    logits[2, :32] = -math.inf  # the whole first block
    truth = expected(logits, None, target.clamp(min=0), None, torch.float32, -100)
    losses = torch.empty(6)
    cross_entropy_rows(logits, None, target, None, losses, logits, ignore_index=-100, block_n=32)
    torch.testing.assert_close(losses, truth[0], equal_nan=True)
    torch.testing.assert_close(logits, truth[1], equal_nan=True)


@interpreted
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_op(monkeypatch, reduction, with_bias):
    """Chunks around the kernel, forward and twice backward."""
    monkeypatch.setitem(cross_entropy_registration.CHUNK_ELEMENTS, "cpu", 1)
    monkeypatch.setattr(cross_entropy_registration, "LEAST_ROWS", 4)
    leaves = [torch.randn(13, 8).requires_grad_(), torch.randn(40, 8).requires_grad_()]
    bias = torch.randn(40).requires_grad_() if with_bias else None
    leaves += [bias] if with_bias else []
    target = torch.randint(40, (13,))
    target[::3] = -100
    upstream = torch.randn(13 if reduction == "none" else ())
    results = []
    for backend in ("triton", "reference"):
        loss = linear_cross_entropy(leaves[0], leaves[1], target, bias=bias, reduction=reduction, backend=backend)
        results.append([loss])
        for _ in range(2):
            results[-1] += torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
