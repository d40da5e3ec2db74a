"""attention against a loop over queries in float64, its gradients, its edge cases and its messages."""

import importlib.util
import math
import re

import pytest
import torch
from helpers import (
    assert_attention_within_budget,
    assert_within_budget,
    attention_formulas,
    every_pattern,
    needs_extension,
    pattern_id,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from dalle_fast import reference
from dalle_fast.ops import backends
from dalle_fast.ops.attention import attention, attention_qkvpacked
from dalle_fast.patterns import Column, Full, Row

BACKENDS = ("auto", "reference", pytest.param("cpp", marks=needs_extension))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TEXT_LEN, GRID = 5, (3, 4)
SEQ_LEN = 17
PATTERNS = every_pattern(TEXT_LEN, GRID)
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=pattern_id)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def by_loop(query, key, value, pattern, text_lens=None, scale=None, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """Output and lse in ``dtype``, one query at a time, over a list of its keys."""
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    batch, heads, length, head_dim = query.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    mask = pattern.dense()
    out, lse = torch.zeros_like(query), torch.full(query.shape[:3], -math.inf, dtype=dtype)
    for b in range(batch):
        text_len = pattern.text_len if text_lens is None else int(text_lens[b])
        for q in range(length):
            keys = [k for k in range(length) if mask[q, k] and not text_len <= k < pattern.text_len]
            for h in range(heads if keys else 0):
                group = h * key.shape[1] // heads
                scores = key[b, group, keys] @ query[b, h, q] * scale
                out[b, h, q] = torch.softmax(scores, 0) @ value[b, group, keys]
                lse[b, h, q] = torch.logsumexp(scores, 0)
    return out, lse


def plain(query, key, value, pattern) -> Tensor:
    """What a user of plain PyTorch writes, in the inputs' dtype."""
    length = query.shape[2]
    scores = (query @ key.mT) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~pattern.dense()[:length, :length], -math.inf)
    return torch.softmax(scores, -1) @ value


def fused(query, key, value, pattern) -> Tensor:
    """PyTorch's fused attention; its backward recomputes the softmax and errs more than that of plain."""
    length = query.shape[2]
    return F.scaled_dot_product_attention(query, key, value, pattern.dense()[:length, :length])


PEERS = {"auto": fused, "reference": plain, "cpp": fused}


def widest(backend) -> torch.dtype:
    """The widest dtype that ``backend`` takes."""
    return torch.float32 if backend == "cpp" else torch.float64


def assert_equals_the_loop(result, *inputs, **options) -> None:
    """out, or (out, lse), against by_loop: nearly equal in float64, within the error budget in float32."""
    results = result if isinstance(result, tuple) else (result,)
    truth = by_loop(*inputs, **options)[: len(results)]
    if results[0].dtype == torch.float64:
        torch.testing.assert_close(results, truth)
        return
    for one, peer, true in zip(results, by_loop(*inputs, **options, dtype=results[0].dtype), truth, strict=False):
        assert_within_budget(one, peer, true)


def assert_same(actual, expected, backend) -> None:
    """Equal bits from the kernels, nearly equal results from PyTorch's products, which depend on the strides."""
    tolerance = {"rtol": 0, "atol": 0} if backend == "cpp" else {}
    torch.testing.assert_close(actual, expected, **tolerance)


def make_inputs(dtype=torch.float64, *, batch=2, heads=2, length=SEQ_LEN, head_dim=8, requires_grad=False):
    """Query, key, value; scaled up, for a nearly uniform softmax would hide a wrong mask."""
    tensors = 3 * torch.randn(3, batch, heads, length, head_dim, dtype=torch.float64)
    return [tensor.to(dtype).detach().requires_grad_(requires_grad) for tensor in tensors]


@each_backend
@each_pattern
@pytest.mark.parametrize("length", [1, 4, 11, SEQ_LEN])
def test_equals_the_loop(pattern, backend, length):
    inputs = make_inputs(widest(backend), length=length)
    assert_equals_the_loop(attention(*inputs, pattern, backend=backend), *inputs, pattern)
    assert_equals_the_loop(attention(*inputs, pattern, return_lse=True, backend=backend), *inputs, pattern)


@each_backend
@each_pattern
def test_text_lens(pattern, backend):
    inputs = make_inputs(widest(backend), batch=3)
    text_lens = torch.tensor([0, 2, TEXT_LEN])
    result = attention(*inputs, pattern, text_lens=text_lens, return_lse=True, backend=backend)
    assert_equals_the_loop(result, *inputs, pattern, text_lens)
    for lens in (text_lens.int(), text_lens.to(torch.uint8), text_lens.repeat_interleave(2)[::2]):
        assert torch.equal(attention(*inputs, pattern, text_lens=lens, backend=backend), result[0])


@each_backend
def test_no_text_positions(backend):
    pattern = Row(0, GRID)
    inputs = make_inputs(widest(backend), length=pattern.seq_len)
    for text_lens in (None, torch.zeros(2, dtype=torch.int64)):
        assert_equals_the_loop(attention(*inputs, pattern, text_lens=text_lens, backend=backend), *inputs, pattern)


@each_backend
def test_row_without_keys(backend):
    query, key, value = make_inputs(widest(backend), requires_grad=True)
    text_lens = torch.tensor([0, TEXT_LEN])
    out, lse = attention(query, key, value, PATTERNS[1], text_lens=text_lens, return_lse=True, backend=backend)
    assert (out[0, :, :TEXT_LEN] == 0).all()
    assert (lse[0, :, :TEXT_LEN] == -math.inf).all()
    assert torch.isfinite(lse[0, :, TEXT_LEN:]).all()
    (out.sum() + lse[lse.isfinite()].sum()).backward()
    for tensor in (query, key, value):
        assert torch.isfinite(tensor.grad).all()
        assert (tensor.grad[0, :, :TEXT_LEN] == 0).all()
        assert (tensor.grad[1, :, :TEXT_LEN] != 0).any()


def test_formulas_are_the_reference():
    # What the kernels' gradients are held against, against autograd.
    query, _, _ = make_inputs(heads=4, requires_grad=True)
    _, key, value = make_inputs(requires_grad=True)
    text_lens = torch.tensor([0, 3])
    for pattern in PATTERNS:
        out, lse = reference.attention(
            query, key, value, pattern, text_lens=text_lens, scale=0.3, enable_gqa=True, return_lse=True
        )
        upstream = torch.randn_like(out), torch.randn_like(lse)
        grads = torch.autograd.grad((out, lse), (query, key, value), upstream)
        found = attention_formulas(query, key, value, *upstream, pattern, text_lens, 0.3)
        torch.testing.assert_close(found, [out, lse, *grads])


@each_backend
@each_dtype
@pytest.mark.parametrize("length", [11, SEQ_LEN])
def test_error_budget(backend, dtype, length):
    for pattern in PATTERNS:
        inputs = make_inputs(dtype, length=length, requires_grad=True)
        wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
        out = attention(*inputs, pattern, backend=backend)
        peer, truth = PEERS[backend](*inputs, pattern), plain(*wide, pattern)
        assert out.dtype == dtype
        assert_within_budget(out, peer, truth)
        upstream = torch.randn_like(out)
        grads = torch.autograd.grad(out, inputs, upstream)
        peer_grads = torch.autograd.grad(peer, inputs, upstream)
        true_grads = torch.autograd.grad(truth, wide, upstream.double())
        for grad, peer_grad, true_grad in zip(grads, peer_grads, true_grads, strict=True):
            assert_within_budget(grad, peer_grad, true_grad)


@each_backend
@each_dtype
def test_error_budget_of_lse_and_groups(backend, dtype):
    text_lens = torch.tensor([0, 3, TEXT_LEN, 4])
    for pattern in PATTERNS:
        query, _, _ = make_inputs(dtype, batch=4, heads=6, requires_grad=True)
        _, key, value = make_inputs(dtype, batch=4, heads=2, requires_grad=True)
        out, lse = attention(
            query, key, value, pattern, text_lens=text_lens, enable_gqa=True, return_lse=True, backend=backend
        )
        assert out.dtype == dtype and lse.dtype == torch.float32
        upstream = torch.randn_like(out), torch.randn_like(lse)
        grads = torch.autograd.grad((out, lse), (query, key, value), upstream, retain_graph=True)
        tensors = [query, key, value, *upstream]
        assert_attention_within_budget([out, lse, *grads], tensors, pattern, text_lens=text_lens)
        # Either output may be used alone.
        for used in (0, 1):
            grads = torch.autograd.grad(
                (out, lse)[used], (query, key, value), upstream[used], retain_graph=True, allow_unused=True
            )
            alone = [torch.zeros_like(upstream[0]), torch.zeros_like(upstream[1])]
            alone[used] = upstream[used]
            grads = [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, tensors[:3], strict=True)]
            results = [out, lse, *grads]
            assert_attention_within_budget(results, [query, key, value, *alone], pattern, text_lens=text_lens)


@each_backend
@each_pattern
def test_later_tokens_do_not_leak(pattern, backend):
    query, key, value = make_inputs(torch.float32)
    text_lens = torch.tensor([3, TEXT_LEN])
    for lens in (None, text_lens):
        before = attention(query, key, value, pattern, text_lens=lens, backend=backend)
        for position in range(SEQ_LEN):
            changed = [tensor.clone() for tensor in (query, key, value)]
            for tensor in changed:
                tensor[:, :, position] += 100.0
            after = attention(*changed, pattern, text_lens=lens, backend=backend)
            assert torch.equal(after[:, :, :position], before[:, :, :position])


@each_backend
@each_pattern
def test_unseen_keys_do_not_matter(pattern, backend):
    # Scaled down: every visible key must carry a weight that shows.
    query, key, value = (tensor / 10 for tensor in make_inputs(torch.float32))
    before = attention(query, key, value, pattern, backend=backend)
    mask = pattern.dense()
    for position in range(SEQ_LEN):
        changed_key, changed_value = key.clone(), value.clone()
        changed_key[:, :, position] += 1.0
        changed_value[:, :, position] += 1.0
        same = (attention(query, changed_key, changed_value, pattern, backend=backend) == before).all(-1)
        assert same[:, :, ~mask[:, position]].all()
        assert not same[:, :, mask[:, position]].any()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("pattern", [Row(3, (2, 3)), Column(3, (2, 3))], ids=pattern_id)
def test_gradients(pattern, backend):
    inputs = make_inputs(batch=1, heads=2, length=9, head_dim=3, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, pattern, backend=backend), inputs)


def test_gradients_of_out_and_lse():
    query, key, value = make_inputs(batch=2, heads=2, length=9, head_dim=3, requires_grad=True)

    def run(query, key, value):
        lens = torch.tensor([1, 3])
        return attention(
            query, key[:, :1], value[:, :1], Row(3, (2, 3)), text_lens=lens, enable_gqa=True, return_lse=True
        )

    assert torch.autograd.gradcheck(run, (query, key, value))


@each_backend
def test_stride_0_gradient(backend):
    inputs = make_inputs(widest(backend), requires_grad=True)
    out = attention(*inputs, PATTERNS[1], backend=backend)
    from_sum = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    from_ones = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert_same(from_sum, from_ones, backend)


@each_backend
def test_one_tensor_three_times(backend):
    x, *_ = make_inputs(widest(backend), requires_grad=True)
    copies = [x.detach().clone().requires_grad_() for _ in range(3)]
    pattern = PATTERNS[4]
    for run in (attention, torch.compile(attention, fullgraph=True, backend="aot_eager")):
        out = run(x, x, x, pattern, backend=backend)
        expected = attention(*copies, pattern, backend=backend)
        assert_same(out, expected, backend)
        (grad,) = torch.autograd.grad(out, x, torch.cos(out))
        grads = torch.autograd.grad(expected, copies, torch.cos(expected))
        torch.testing.assert_close(grad, sum(grads))


@each_backend
def test_grouped_heads(backend):
    query, _, _ = make_inputs(widest(backend), heads=6)
    for num_key_heads in (1, 2, 3):
        _, key, value = make_inputs(widest(backend), heads=num_key_heads)
        for lse in (False, True):
            result = attention(query, key, value, PATTERNS[1], enable_gqa=True, return_lse=lse, backend=backend)
            assert_equals_the_loop(result, query, key, value, PATTERNS[1])


@each_backend
def test_scale(backend):
    inputs = make_inputs(widest(backend))
    for scale in (0.1, 0, -0.5):
        result = attention(*inputs, PATTERNS[3], scale=scale, backend=backend)
        assert_equals_the_loop(result, *inputs, PATTERNS[3], scale=scale)


@each_backend
def test_strided_inputs(backend):
    query, key, value = make_inputs(widest(backend))
    expected = attention(query, key, value, PATTERNS[1], backend=backend)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    strided[2] = torch.cat([value, value], dim=-1)[..., : value.shape[-1]]
    assert_same(attention(*strided, PATTERNS[1], backend=backend), expected, backend)
    shared = query[:1].expand(2, -1, -1, -1)
    assert_same(
        attention(shared, key, value, PATTERNS[1], backend=backend),
        attention(shared.contiguous(), key, value, PATTERNS[1], backend=backend),
        backend,
    )
    # A last dimension of one element may have any stride.
    thin = [
        tensor[..., :1].clone().as_strided((*tensor.shape[:3], 1), (34, 17, 1, 5)) for tensor in (query, key, value)
    ]
    result = attention(*thin, PATTERNS[1], backend=backend)
    assert_same(result, attention(*(t.contiguous() for t in thin), PATTERNS[1], backend=backend), backend)


@each_backend
@each_pattern
def test_qkvpacked(pattern, backend):
    qkv = torch.randn(2, 11, 3, 2, 8, dtype=widest(backend), requires_grad=True)
    text_lens = torch.tensor([2, 5])
    query, key, value = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    for options in ({}, {"text_lens": text_lens, "scale": 0.3}):
        packed = attention_qkvpacked(qkv, pattern, backend=backend, **options)
        apart = attention(query, key, value, pattern, backend=backend, **options).transpose(1, 2)
        assert_same(packed, apart, backend)
        (grad,) = torch.autograd.grad(packed.square().sum(), qkv)
        (expected,) = torch.autograd.grad(apart.square().sum(), qkv)
        assert_same(grad, expected, backend)
        assert grad.is_contiguous() or backend != "cpp"
    torch.testing.assert_close(
        reference.attention_qkvpacked(qkv, pattern), attention_qkvpacked(qkv, pattern, backend=backend)
    )


@each_backend
def test_extreme_scores(backend):
    inputs = make_inputs(torch.float32, requires_grad=True)
    query, key, value = inputs
    out = attention(query * 1e4, key * 1e4, value, PATTERNS[1], backend=backend)
    assert torch.isfinite(out).all()
    if backend == "auto":  # may be PyTorch's attention, whose weights exceed 1 here
        return
    # Every weight is at most 1, whatever the rounding of scores and lse.
    (grad_value,) = torch.autograd.grad(out.sum(), value, retain_graph=True)
    assert (grad_value >= 0).all() and (grad_value <= SEQ_LEN * 1.001).all()
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(out.sum(), inputs))


@each_backend
@each_dtype
@pytest.mark.parametrize("size", [2.0**5, 2.0**9, 2.0**13])
def test_one_hot_weights(backend, dtype, size):
    # Small integers times a power of two: sums of products are exact, and the scores up to 4e9 are the same bits in
    # every order of summation.
    integers = [torch.randint(-2, 3, (2, 2, SEQ_LEN, 16)) * size for _ in range(2)]
    value = torch.randn(2, 2, SEQ_LEN, 16)
    inputs = [tensor.to(dtype).requires_grad_() for tensor in (*integers, value)]
    upstream = torch.randn(2, 2, SEQ_LEN, 16).to(dtype) / 64, torch.randn(2, 2, SEQ_LEN) / 64
    for pattern in PATTERNS:
        out, lse = attention(*inputs, pattern, return_lse=True, backend=backend)
        grads = torch.autograd.grad((out, lse), inputs, upstream)
        assert_attention_within_budget([out, lse, *grads], [*inputs, *upstream], pattern)


@each_backend
@each_dtype
def test_is_deterministic(backend, dtype):
    pattern = Full(20, (8, 9))
    query, key, value = make_inputs(dtype, length=pattern.seq_len, requires_grad=True)

    def run():
        out, lse = attention(query, key, value, pattern, return_lse=True, backend=backend)
        return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), (query, key, value))]

    expected = run()
    for _ in range(5):
        for a, b in zip(run(), expected, strict=True):
            assert torch.equal(a, b)


@needs_extension
@each_dtype
def test_is_deterministic_for_any_number_of_threads(dtype):
    before = torch.get_num_threads()
    try:
        for pattern in (Full(20, (8, 9)), *every_pattern(20, (8, 9))):
            for batch, heads in ((1, 1), (1, 3), (4, 2)):
                inputs = make_inputs(dtype, batch=batch, heads=heads, length=pattern.seq_len, requires_grad=True)
                results = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    out, lse = attention(*inputs, pattern, return_lse=True, backend="cpp")
                    grads = torch.autograd.grad((out, lse), inputs, (torch.cos(out), torch.cos(lse)))
                    results.append([out, lse, *grads])
                for others in results[1:]:
                    assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))
    finally:
        torch.set_num_threads(before)


def test_compiled_with_text_lens():
    inputs = make_inputs(torch.float32)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    options = {"text_lens": torch.tensor([0, 3]), "return_lse": True}
    torch.testing.assert_close(compiled(*inputs, PATTERNS[1], **options), attention(*inputs, PATTERNS[1], **options))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(backend, dtype):
    query, key, value = make_inputs(torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out = attention(query, key.to(dtype), value, PATTERNS[1], backend=backend)
        if backend != "cpp":
            assert attention(*make_inputs(), PATTERNS[1], backend=backend).dtype == torch.float64
    rounded = [tensor.to(dtype) for tensor in (query, key, value)]
    assert out.dtype == dtype
    assert torch.equal(out, attention(*rounded, PATTERNS[1], backend=backend))
    qkv = torch.stack([tensor.transpose(1, 2) for tensor in (query, key, value)], 2)
    with torch.autocast("cpu", dtype=dtype):
        packed = attention_qkvpacked(qkv, PATTERNS[1], backend=backend)
    assert_same(packed, out.transpose(1, 2), backend)
    grads = torch.autograd.grad(out.float().square().sum(), (query, key, value))
    assert all(grad.dtype == torch.float32 and torch.isfinite(grad).all() for grad in grads)


def test_training_after_inference_mode():
    pattern = Row(4, (2, 5))
    with torch.inference_mode():
        attention(*make_inputs(length=pattern.seq_len), pattern)
    inputs = make_inputs(length=pattern.seq_len, requires_grad=True)
    attention(*inputs, pattern).sum().backward()
    assert inputs[0].grad is not None


def test_eager_after_fake_tensors():
    pattern = Row(4, (2, 6))
    inputs = make_inputs(length=pattern.seq_len)
    with FakeTensorMode() as mode:
        fake = attention(*(mode.from_tensor(tensor) for tensor in inputs), pattern)
    assert fake.shape == inputs[0].shape
    torch.testing.assert_close(attention(*inputs, pattern), by_loop(*inputs, pattern)[0])


@each_backend
def test_empty_batch(backend):
    query = torch.zeros(0, 2, SEQ_LEN, 8, requires_grad=True)
    text_lens = torch.zeros(0, dtype=torch.int64)
    out, lse = attention(query, query, query, PATTERNS[0], text_lens=text_lens, return_lse=True, backend=backend)
    assert out.shape == query.shape and lse.shape == query.shape[:3]
    (out.sum() + lse.sum()).backward()
    assert query.grad.shape == query.shape
    qkv = torch.zeros(0, SEQ_LEN, 3, 2, 8, requires_grad=True)
    packed = attention_qkvpacked(qkv, PATTERNS[0], backend=backend)
    assert packed.shape == (0, SEQ_LEN, 2, 8)
    assert torch.autograd.grad(packed.sum(), qkv)[0].shape == qkv.shape


X = torch.zeros(2, 4, SEQ_LEN, 8)
HIDDEN_DIM_LAST = X.transpose(2, 3).contiguous().transpose(2, 3)


def zeros(*shape, **options) -> Tensor:
    return torch.zeros(shape, **options)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((X[0], X, X), {}, ValueError, "query must have 4 dimensions (B, H, S, D), got shape (4, 17, 8)"),
        ((X, X[0], X), {}, ValueError, "key must have 4 dimensions (B, H, S, D), got shape (4, 17, 8)"),
        ((X, X, X[0]), {}, ValueError, "value must have 4 dimensions (B, H, S, D), got shape (4, 17, 8)"),
        (([1.0], X, X), {}, TypeError, "query must be a tensor, got list"),
        ((X.long(), X, X), {}, TypeError, "query must be floating point, got torch.int64"),
        ((X, X, X.to(torch.complex64)), {}, TypeError, "value must be floating point, got torch.complex64"),
        (
            (X, X.double(), X),
            {},
            TypeError,
            "query, key, value must have one dtype, got torch.float32, torch.float64, torch.float32",
        ),
        ((X, X.to("meta"), X), {}, ValueError, "query, key, value must be on one device, got cpu, meta, cpu"),
        (
            (HIDDEN_DIM_LAST, X, X),
            {},
            ValueError,
            "query must be contiguous in its last dimension, got strides (544, 136, 1, 17)",
        ),
        (
            (X, X, X[:, :2]),
            {},
            ValueError,
            "key and value must have one shape, got (2, 4, 17, 8) and (2, 2, 17, 8)",
        ),
        (
            (X, X[:, :, :16], X[:, :, :16]),
            {},
            ValueError,
            "key must agree with query in B, S and D, got (2, 4, 16, 8) for (2, 4, 17, 8)",
        ),
        (
            (X, X[:, :2], X[:, :2]),
            {},
            ValueError,
            "key must have query's heads unless enable_gqa is set, got 2 for 4",
        ),
        (
            (X, X[:, :3], X[:, :3]),
            {"enable_gqa": True},
            ValueError,
            "the heads of query must be a multiple of the heads of key, got 4 for 3",
        ),
        (
            (X, X[:, :0], X[:, :0]),
            {"enable_gqa": True},
            ValueError,
            "the heads of query must be a multiple of the heads of key, got 4 for 0",
        ),
        ((zeros(1, 1, 2, 257),) * 1, {}, ValueError, "head_dim must be in 1..256, got 257"),
        ((zeros(1, 1, 2, 0),) * 1, {}, ValueError, "head_dim must be in 1..256, got 0"),
        (
            (zeros(1, 1, 18, 8),) * 1,
            {},
            ValueError,
            "the sequence must have 1..17 positions, as the pattern, got 18",
        ),
        (
            (zeros(1, 1, 0, 8),) * 1,
            {},
            ValueError,
            "the sequence must have 1..17 positions, as the pattern, got 0",
        ),
        ((X,), {"scale": math.nan}, ValueError, "scale must be finite, got nan"),
        ((X,), {"scale": math.inf}, ValueError, "scale must be finite, got inf"),
        (
            (X,),
            {"text_lens": torch.tensor([1.0, 2.0])},
            TypeError,
            "text_lens must be an integer tensor, got torch.float32",
        ),
        ((X,), {"text_lens": [1, 2]}, TypeError, "text_lens must be an integer tensor, got list"),
        (
            (X,),
            {"text_lens": torch.tensor([True, False])},
            TypeError,
            "text_lens must be an integer tensor, got torch.bool",
        ),
        (
            (X,),
            {"text_lens": torch.tensor([1, 2, 3])},
            ValueError,
            "text_lens must have shape (2,), got (3,)",
        ),
        (
            (X,),
            {"text_lens": torch.tensor([1, 6])},
            ValueError,
            "text_lens must lie in 0..5, got 1..6",
        ),
        (
            (X,),
            {"text_lens": torch.tensor([-1, 2])},
            ValueError,
            "text_lens must lie in 0..5, got -1..2",
        ),
        (
            (X,),
            {"text_lens": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            "text_lens must be on cpu, got meta",
        ),
        (
            (X,),
            {"backend": "cuda"},
            ValueError,
            "backend must be one of auto, triton, cpp, reference, got 'cuda'",
        ),
        (
            (X.double(),),
            {"backend": "triton"},
            TypeError,
            'backend "triton" of attention takes float32, float16 and bfloat16, got torch.float64; '
            'use backend="reference"',
        ),
        (
            (X.double(),),
            {"backend": "cpp"},
            TypeError,
            'backend "cpp" of attention takes float32, float16 and bfloat16, got torch.float64; '
            'use backend="reference"',
        ),
    ],
)
def test_errors(args, options, error, message):
    tensors = args * 3 if len(args) == 1 else args
    with pytest.raises(error, match=re.escape(message)):
        attention(*tensors, PATTERNS[1], **options)


def test_pattern_error():
    with pytest.raises(TypeError, match="pattern must be a Pattern, got str"):
        attention(X, X, X, "row")


@pytest.mark.parametrize(
    ("qkv", "options", "error", "message"),
    [
        (X, {}, ValueError, "qkv must have shape (B, S, 3, H, D), got (2, 4, 17, 8)"),
        (zeros(1, 4, 2, 2, 8), {}, ValueError, "qkv must have shape (B, S, 3, H, D), got (1, 4, 2, 2, 8)"),
        (zeros(1, 4, 3, 2, 8).long(), {}, TypeError, "qkv must be floating point, got torch.int64"),
        (
            zeros(1, 4, 3, 2, 8).double(),
            {"backend": "cpp"},
            TypeError,
            'backend "cpp" of attention takes float32, float16 and bfloat16, got torch.float64; '
            'use backend="reference"',
        ),
        (zeros(1, 18, 3, 2, 8), {}, ValueError, "the sequence must have 1..17 positions, as the pattern, got 18"),
        (zeros(1, 4, 3, 2, 257), {}, ValueError, "head_dim must be in 1..256, got 257"),
        (zeros(1, 4, 3, 2, 8), {"scale": math.inf}, ValueError, "scale must be finite, got inf"),
        (
            zeros(1, 4, 3, 2, 8),
            {"text_lens": torch.tensor([6])},
            ValueError,
            "text_lens must lie in 0..5, got 6..6",
        ),
        (zeros(1, 4, 3, 2, 8), {"backend": "cuda"}, ValueError, "backend must be one of auto, triton, cpp, reference"),
    ],
)
def test_qkvpacked_errors(qkv, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        attention_qkvpacked(qkv, PATTERNS[1], **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_qkvpacked_last_dim_error(backend):
    qkv = zeros(1, 4, 3, 8, 2).mT
    # Its three parts carry the names of attention where they are handed to it.
    with pytest.raises(ValueError, match=r"(qkv|query) must be contiguous in its last dimension, got strides"):
        attention_qkvpacked(qkv, PATTERNS[1], backend=backend)


QKV = zeros(2, SEQ_LEN, 3, 4, 8)


def assert_raises_for_both(backend, message, device="cpu") -> None:
    """attention and attention_qkvpacked refuse ``backend`` with this RuntimeError."""
    x, qkv = X.to(device), QKV.to(device)
    with pytest.raises(RuntimeError, match=message):
        attention(x, x, x, PATTERNS[1], backend=backend)
    with pytest.raises(RuntimeError, match=message):
        attention_qkvpacked(qkv, PATTERNS[1], backend=backend)


def test_cpp_without_the_extension(monkeypatch):
    monkeypatch.setattr(backends, "extension", None)
    monkeypatch.setattr(backends, "extension_error", ImportError("undefined symbol: torch_x"))
    assert_raises_for_both("cpp", r"undefined symbol: torch_x.*pip install --no-build-isolation \.")
    inputs = make_inputs(torch.float32)
    assert_equals_the_loop(attention(*inputs, PATTERNS[1]), *inputs, PATTERNS[1])


@needs_extension
def test_cpp_on_another_device():
    assert_raises_for_both("cpp", 'backend="cpp" runs on cpu and cuda tensors, got a tensor on meta', "meta")


@needs_extension
def test_cpp_on_cuda(monkeypatch):
    monkeypatch.setattr(backends, "has_cuda_extension", True)
    with (
        FakeTensorMode(),
        pytest.raises(RuntimeError, match='backend "cpp" of attention runs on cpu tensors, got cuda'),
    ):
        query = torch.empty(2, 4, SEQ_LEN, 8, device="cuda")
        attention(query, query, query, PATTERNS[1], backend="cpp")


def test_triton_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(backends, "has_triton", False)
    assert_raises_for_both(
        "triton", 'backend="triton" is not available: triton is not installed; .* pip install triton'
    )


def test_triton_on_the_cpu(monkeypatch):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert_raises_for_both("triton", "it runs on cuda tensors, got a tensor on cpu; .* or set TRITON_INTERPRET=1")
    assert_raises_for_both("triton", "it runs on cuda tensors, got a tensor on meta", "meta")
