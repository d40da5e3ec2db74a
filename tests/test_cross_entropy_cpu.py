"""linear_cross_entropy in C++ at every CPU level: error budget, chunks, ignored targets, second backward, memory."""

import itertools
import math
import shutil

import pytest
import torch
from helpers import assert_within_budget, needs_extension
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dalle_fast import reference
from dalle_fast.ops import cross_entropy_registration
from dalle_fast.ops.cross_entropy import linear_cross_entropy

pytestmark = needs_extension

OPS = torch.ops.dalle_fast
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of few rows, so that small problems have several."""
    monkeypatch.setitem(cross_entropy_registration.CHUNK_ELEMENTS, "cpu", 1)
    monkeypatch.setattr(cross_entropy_registration, "LEAST_ROWS", 5)


def make(rows, width, classes, dtype=torch.float32, size=3.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias and target, with logits that differ by much."""
    hidden, weight = torch.randn(rows, width), size * torch.randn(classes, width) / math.sqrt(max(width, 1))
    tensors = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, torch.randn(classes))]
    return *tensors, torch.randint(classes, (rows,))


def run(inputs, upstream=None, backend="cpp", **options) -> list[Tensor]:
    """The loss and its gradients."""
    hidden, weight, bias, target = inputs
    loss = linear_cross_entropy(hidden, weight, target, bias=bias, backend=backend, **options)
    leaves = [tensor for tensor in (hidden, weight, bias) if tensor is not None and tensor.requires_grad]
    grads = torch.autograd.grad(loss, leaves, None if upstream is None else upstream.to(loss.dtype))
    return [loss.detach(), *grads]


def widen(inputs) -> list[Tensor | None]:
    hidden, weight, bias, target = inputs
    return [*(x if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, bias)), target]


def check(inputs, **options) -> None:
    """Loss and gradients within the error budget of plain PyTorch."""
    shape = inputs[3].shape if options.get("reduction") == "none" else ()
    upstream = torch.randn(shape)
    found = run(inputs, upstream, **options)
    truth = run(widen(inputs), upstream, backend="reference", **options)
    peer = run(inputs, upstream, backend="reference", **options)
    for actual, same, exact in zip(found, peer, truth, strict=True):
        assert actual.dtype == same.dtype
        assert_within_budget(actual, same, exact)


@each_dtype
@each_reduction
@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17, 63, 64, 65, 700])
def test_numbers_of_classes(level, dtype, reduction, classes):
    check(make(37, 24, classes, dtype), reduction=reduction)


@each_reduction
@pytest.mark.parametrize("rows", [1, 4, 5, 6, 10, 11, 24])
def test_chunks(small_chunks, reduction, rows):
    check(make(rows, 12, 50), reduction=reduction)
    inputs = make(rows, 12, 50)
    inputs[3][::3] = -100
    check(inputs, reduction=reduction)


def test_rows_of_chunks():
    size = cross_entropy_registration.chunk_rows
    assert size(0, 10, "cpu") == 0
    assert size(1, 10, "cpu") == 1
    assert size(2048, 8192, "cpu") == 256
    assert size(2049, 8192, "cpu") == 228  # nine, and not eight and one of a single row
    assert size(10_000, 1 << 30, "cpu") == 250
    assert size(4096, 8192, "cuda") == 4096


@each_dtype
@each_reduction
@pytest.mark.parametrize("ignored", ["first", "last", "every other", "all but one", "all"])
def test_ignored_targets(small_chunks, dtype, reduction, ignored):
    inputs = make(23, 12, 50, dtype)
    where = {"first": slice(3), "last": slice(-4, None), "every other": slice(None, None, 2), "all but one": slice(22)}
    inputs[3][where.get(ignored, slice(None))] = 7
    check(inputs, reduction=reduction, ignore_index=7)
    grads = run(inputs, torch.ones(23 if reduction == "none" else ()), reduction=reduction, ignore_index=7)
    assert (grads[1][inputs[3] == 7] == 0).all()
    if ignored == "all":
        assert all((one == 0).all() for one in grads)


def test_ignored_rows_are_not_read():
    inputs = make(9, 6, 20)
    inputs[3][2] = -100
    before = run(inputs)
    with torch.no_grad():
        inputs[0][2] = math.nan
    for one, other in zip(run(inputs), before, strict=True):
        assert torch.equal(one, other)


@each_reduction
@pytest.mark.parametrize("needed", list(itertools.product([True, False], repeat=3)))
def test_some_gradients(small_chunks, reduction, needed):
    inputs = make(23, 12, 50)
    inputs[3][4] = -100
    upstream = torch.randn(23 if reduction == "none" else ())
    full = run(inputs, upstream, reduction=reduction)
    leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs[:3], needed, strict=True)]
    if not any(needed):
        loss = linear_cross_entropy(leaves[0], leaves[1], inputs[3], bias=leaves[2], reduction=reduction, backend="cpp")
        assert not loss.requires_grad and torch.equal(loss, full[0])
        return
    found = run([*leaves, inputs[3]], upstream, reduction=reduction)
    expected = [full[0], *(grad for grad, need in zip(full[1:], needed, strict=True) if need)]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_without_gradients_nothing_is_prepared():
    hidden, weight, bias, target = make(23, 12, 50)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, target, bias=bias, backend="cpp")
    assert not loss.requires_grad
    assert torch.equal(loss, run((hidden, weight, bias, target))[0])


@each_dtype
@each_reduction
def test_backward_again(small_chunks, dtype, reduction):
    """The first call gives its gradients away, scaled in place: others must not see it, nor what becomes of them."""
    inputs = make(23, 12, 50, dtype)
    hidden, weight, bias, target = inputs
    leaves = [hidden, weight, bias]
    loss = linear_cross_entropy(hidden, weight, target, bias=bias, reduction=reduction, backend="cpp")
    for factor in (3.0, 0.0, -0.5, 1.0):
        upstream = factor * torch.randn_like(loss)
        grads = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
        truth = run(widen(inputs), upstream, backend="reference", reduction=reduction)
        peer = run(inputs, upstream, backend="reference", reduction=reduction)
        for actual, same, exact in zip(grads, peer[1:], truth[1:], strict=True):
            assert_within_budget(actual, same, exact)
            actual.fill_(math.nan)


def test_backward_of_one_input_after_the_other():
    hidden, weight, bias, target = make(23, 12, 50)
    expected = run((hidden, weight, bias, target))[1:]
    loss = linear_cross_entropy(hidden, weight, target, bias=bias, backend="cpp")
    for leaf, grad in zip((hidden, weight, bias), expected, strict=True):
        (found,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        torch.testing.assert_close(found, grad)


@each_reduction
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_many_upstream_gradients_at_once(reduction):
    hidden, weight, bias, target = make(23, 12, 50)
    losses = [
        linear_cross_entropy(hidden, weight, target, bias=bias, reduction=reduction, backend=backend)
        for backend in ("cpp", "reference")
    ]
    upstream = torch.randn(3, *losses[0].shape)
    for _ in range(2):
        found, expected = (
            torch.autograd.grad(loss, (hidden, weight, bias), upstream, retain_graph=True, is_grads_batched=True)
            for loss in losses
        )
        torch.testing.assert_close(found, expected)


def test_gradients_add_up_over_steps():
    hidden, weight, bias, target = make(23, 12, 50)
    expected = run((hidden, weight, bias, target))[1:]
    for _ in range(2):
        linear_cross_entropy(hidden, weight, target, bias=bias, backend="cpp").backward()
    for leaf, grad in zip((hidden, weight, bias), expected, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * grad)


def test_shared_input():
    """One tensor as hidden and as weight."""
    x, target = torch.randn(20, 8, requires_grad=True), torch.randint(20, (20,))
    found, expected = (
        torch.autograd.grad(linear_cross_entropy(x, x, target, backend=backend), x) for backend in ("cpp", "reference")
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layout", ["transposed", "every other", "expanded"])
def test_layouts(layout):
    hidden, weight, bias, target = make(24, 12, 50)
    hidden = hidden.detach()
    moved = {
        "transposed": hidden.t().contiguous().t(),
        "every other": torch.stack([hidden, hidden], 1)[:, 0],
        "expanded": hidden[:1].expand(24, 12),
    }[layout].detach()
    other_weight = weight.detach().t().contiguous().t()
    wide_target = torch.stack([target, target], 1)[:, 0]
    found = run((moved.requires_grad_(), other_weight.requires_grad_(), bias, wide_target))
    expected = run((moved.detach().clone().requires_grad_(), weight, bias, target))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_batches_keep_their_shape():
    hidden, weight, bias, target = make(24, 12, 50)
    expected = run((hidden, weight, bias, target), torch.ones(24), reduction="none")
    batched = hidden.detach().view(2, 3, 4, 12).requires_grad_()
    found = run((batched, weight, bias, target.view(2, 3, 4)), torch.ones(2, 3, 4), reduction="none")
    assert found[0].shape == (2, 3, 4) and found[1].shape == batched.shape
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.flatten(), other.flatten())


@pytest.mark.parametrize("values", [[math.nan], [math.inf], [-math.inf], [math.inf, -math.inf]])
def test_not_numbers_among_the_logits(level, values):
    """In the rows where F.cross_entropy has them."""
    logits = torch.randn(6, 70)
    for place, value in enumerate(values):
        logits[1, place] = logits[4, 68 - place] = value
    target = torch.tensor([3, 0, 5, 69, 68, 0])
    logits[5] = -math.inf
    expected_logits = logits.clone().requires_grad_()
    expected = F.cross_entropy(expected_logits, target, reduction="none")
    expected.sum().backward()
    rows, losses = logits.clone(), torch.empty(6)
    OPS.cross_entropy_rows_cpu(rows, None, target, None, True, losses)
    torch.testing.assert_close(losses, expected.detach(), equal_nan=True)
    torch.testing.assert_close(rows, expected_logits.grad, equal_nan=True)


def test_impossible_classes():
    """A bias of -inf takes a class out."""
    hidden, weight, bias, target = make(9, 6, 40)
    bias = bias.detach()
    bias[30:] = -math.inf
    target %= 30
    found = run((hidden, weight, bias, target))
    expected = run((hidden, weight, bias, target), backend="reference")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert (found[2][30:] == 0).all()


def test_large_logits(level):
    inputs = make(9, 6, 40, size=1e4)
    check(inputs)


@each_reduction
def test_no_positions(reduction):
    found = run(make(0, 6, 9), torch.zeros(0 if reduction == "none" else ()), reduction=reduction)
    assert [tuple(one.shape) for one in found[1:]] == [(0, 6), (9, 6), (9,)]
    assert all((one == 0).all() for one in found)


def test_hidden_states_without_values():
    inputs = make(5, 0, 9)
    found = run(inputs)
    torch.testing.assert_close(found[0], run(inputs, backend="reference")[0])
    assert [tuple(one.shape) for one in found[1:]] == [(5, 0), (9, 0), (9,)]


def test_autocast_changes_nothing():
    inputs = make(23, 12, 50)
    expected = run(inputs, torch.ones(23), reduction="none")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(inputs, torch.ones(23), reduction="none")
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_the_kernel_gives_the_same_bits_for_any_number_of_threads(level):
    before = torch.get_num_threads()
    logits, target, results = 3 * torch.randn(70, 3001), torch.randint(3001, (70,)), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            rows, losses = logits.clone(), torch.empty(70)
            OPS.cross_entropy_rows_cpu(rows, None, target, None, True, losses)
            results.append((rows, losses))
    finally:
        torch.set_num_threads(before)
    for rows, losses in results[1:]:
        assert torch.equal(rows, results[0][0]) and torch.equal(losses, results[0][1])


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that any op returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


class LiveBytes(torch.autograd.profiler.profile):
    """Peak of what PyTorch's CPU allocator has given out since the start."""

    def peak(self) -> int:
        live = most = 0
        for event in self.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                most = max(most, live)
        return most


def peak_bytes(backend: str, reduction: str) -> int:
    """Of forward and backward, beyond the inputs."""
    hidden, weight, _, target = make(1024, 64, 4096)
    with LiveBytes(profile_memory=True, use_cpu=True) as profile:
        run(
            (hidden, weight, None, target),
            torch.ones(1024 if reduction == "none" else ()),
            backend,
            reduction=reduction,
        )
    return profile.peak()


@each_reduction
def test_memory_is_below_a_quarter(monkeypatch, reduction):
    monkeypatch.setitem(cross_entropy_registration.CHUNK_ELEMENTS, "cpu", 1 << 19)
    monkeypatch.setattr(cross_entropy_registration, "LEAST_ROWS", 64)
    own, peer = peak_bytes("cpp", reduction), peak_bytes("reference", reduction)
    logits = 4 * 1024 * 4096
    assert peer >= 2 * logits  # what is measured is there
    assert own < peer / 4
    assert own < logits / 2


@each_dtype
@each_reduction
@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(dtype, reduction, with_bias):
    hidden, weight, bias, target = make(14, 6, 20, dtype)
    target[3] = -100
    bias = bias if with_bias else None
    target = target.view(2, 7)
    hidden = hidden.detach().view(2, 7, 6).requires_grad_()
    for needed in ((True, True, True), (True, False, False), (False, True, False)):
        torch.library.opcheck(OPS.linear_cross_entropy, (hidden, weight, target, bias, reduction, -100, *needed, "cpp"))
    detached = [None if x is None else x.detach() for x in (hidden, weight, bias)]
    first = detached[0], detached[1], target, detached[2]
    loss, *grads = OPS.linear_cross_entropy(*first, reduction, -100, True, True, True, "cpp")
    factor = torch.randn_like(loss)
    for saved in (grads, [torch.empty(0)] * 3):
        torch.library.opcheck(
            OPS.linear_cross_entropy_backward, (*first, factor, *saved, reduction, -100, True, False, True, "cpp")
        )


@each_reduction
def test_fake_tensors_are_like_real_ones(reduction):
    hidden, weight, bias, target = (x.detach() for x in make(14, 6, 20, torch.bfloat16))
    args = hidden, weight, target, bias, reduction, -100, True, False, True, "cpp"
    real = OPS.linear_cross_entropy(*args)
    with FakeTensorMode() as mode:
        fake = OPS.linear_cross_entropy(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args))
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@each_reduction
def test_compiled_equals_eager(reduction):
    torch._dynamo.reset()
    backend = "inductor" if shutil.which("g++") else "aot_eager"
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=backend)
    hidden, weight, bias, target = make(23, 12, 50)
    target[5] = -100
    upstream = torch.randn(23 if reduction == "none" else ())
    results = []
    for function in (compiled, linear_cross_entropy):
        loss = function(hidden, weight, target, bias=bias, reduction=reduction, backend="cpp")
        results.append([loss])
        for _ in range(2):
            results[-1] += torch.autograd.grad(loss, (hidden, weight, bias), upstream, retain_graph=True)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    torch._dynamo.reset()


@each_reduction
def test_second_derivative_is_refused(reduction):
    hidden, weight, bias, target = make(23, 12, 50)
    loss = linear_cross_entropy(hidden, weight, target, bias=bias, reduction=reduction, backend="cpp").sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no second derivative; use backend="):
        (loss + grad.square().sum()).backward()


def test_auto_takes_the_kernel_where_the_logits_are_many():
    inputs = make(300, 16, 1000)
    for one, other in zip(run(inputs, backend="auto"), run(inputs), strict=True):
        assert torch.equal(one, other)
    few = make(30, 16, 100)
    assert torch.equal(
        run(few, backend="auto")[0], reference.linear_cross_entropy(few[0], few[1], few[3], bias=few[2]).detach()
    )


def test_no_tensor_has_the_size_of_all_logits(small_chunks):
    hidden, weight, _, target = make(100, 4, 50)
    with LargestResult() as largest:
        run((hidden, weight, None, target))
    assert largest.elements < 100 * 50 / 4
