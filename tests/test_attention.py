"""attention against a loop over queries in float64, its gradients, its edge cases and its messages."""

import math
import re

import pytest
import torch
from helpers import assert_within_budget, every_pattern, pattern_id
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from dalle_fast import reference
from dalle_fast.ops.attention import attention, attention_qkvpacked
from dalle_fast.patterns import Column, Row

BACKENDS = ("auto", "reference")
TEXT_LEN, GRID = 5, (3, 4)
SEQ_LEN = 17
PATTERNS = every_pattern(TEXT_LEN, GRID)
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=pattern_id)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def by_loop(query, key, value, pattern, text_lens=None, scale=None) -> tuple[Tensor, Tensor]:
    """Output and lse in float64, one query at a time, over a list of its keys."""
    query, key, value = query.double(), key.double(), value.double()
    batch, heads, length, head_dim = query.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    mask = pattern.dense()
    out, lse = torch.zeros_like(query), torch.full(query.shape[:3], -math.inf, dtype=torch.float64)
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


PEERS = {"auto": fused, "reference": plain}


def make_inputs(dtype=torch.float64, *, batch=2, heads=2, length=SEQ_LEN, head_dim=8, requires_grad=False):
    """Query, key, value; scaled up, for a nearly uniform softmax would hide a wrong mask."""
    tensors = 3 * torch.randn(3, batch, heads, length, head_dim, dtype=torch.float64)
    return [tensor.to(dtype).detach().requires_grad_(requires_grad) for tensor in tensors]


@each_backend
@each_pattern
@pytest.mark.parametrize("length", [1, 4, 11, SEQ_LEN])
def test_equals_the_loop(pattern, backend, length):
    query, key, value = make_inputs(length=length)
    expected, expected_lse = by_loop(query, key, value, pattern)
    torch.testing.assert_close(attention(query, key, value, pattern, backend=backend), expected)
    out, lse = attention(query, key, value, pattern, return_lse=True, backend=backend)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@each_backend
@each_pattern
def test_text_lens(pattern, backend):
    query, key, value = make_inputs(batch=3)
    text_lens = torch.tensor([0, 2, TEXT_LEN])
    expected, expected_lse = by_loop(query, key, value, pattern, text_lens)
    out, lse = attention(query, key, value, pattern, text_lens=text_lens, return_lse=True, backend=backend)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert torch.equal(attention(query, key, value, pattern, text_lens=text_lens.int(), backend=backend), out)


@each_backend
def test_no_text_positions(backend):
    pattern = Row(0, GRID)
    query, key, value = make_inputs(length=pattern.seq_len)
    expected, _ = by_loop(query, key, value, pattern)
    text_lens = torch.zeros(2, dtype=torch.int64)
    torch.testing.assert_close(attention(query, key, value, pattern, backend=backend), expected)
    out = attention(query, key, value, pattern, text_lens=text_lens, backend=backend)
    torch.testing.assert_close(out, expected)


@each_backend
def test_row_without_keys(backend):
    query, key, value = make_inputs(requires_grad=True)
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


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
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


@each_backend
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
    inputs = make_inputs(requires_grad=True)
    out = attention(*inputs, PATTERNS[1], backend=backend)
    from_sum = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    from_ones = torch.autograd.grad(out, inputs, torch.ones_like(out))
    for a, b in zip(from_sum, from_ones, strict=True):
        torch.testing.assert_close(a, b)


@each_backend
def test_one_tensor_three_times(backend):
    x, *_ = make_inputs(requires_grad=True)
    copies = [x.detach().clone().requires_grad_() for _ in range(3)]
    pattern = PATTERNS[4]
    for run in (attention, torch.compile(attention, fullgraph=True, backend="aot_eager")):
        out = run(x, x, x, pattern, backend=backend)
        expected = attention(*copies, pattern, backend=backend)
        torch.testing.assert_close(out, expected)
        (grad,) = torch.autograd.grad(out, x, torch.cos(out))
        grads = torch.autograd.grad(expected, copies, torch.cos(expected))
        torch.testing.assert_close(grad, sum(grads))


@each_backend
def test_grouped_heads(backend):
    query, _, _ = make_inputs(heads=6)
    _, key, value = make_inputs(heads=2)
    expected, expected_lse = by_loop(query, key, value, PATTERNS[1])
    for lse in (False, True):
        result = attention(query, key, value, PATTERNS[1], enable_gqa=True, return_lse=lse, backend=backend)
        torch.testing.assert_close(result, (expected, expected_lse) if lse else expected)


@each_backend
def test_scale(backend):
    query, key, value = make_inputs()
    for scale in (0.1, 0, -0.5):
        expected, _ = by_loop(query, key, value, PATTERNS[3], scale=scale)
        torch.testing.assert_close(attention(query, key, value, PATTERNS[3], scale=scale, backend=backend), expected)


@each_backend
def test_strided_inputs(backend):
    query, key, value = make_inputs()
    expected = attention(query, key, value, PATTERNS[1], backend=backend)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    strided[2] = torch.cat([value, value], dim=-1)[..., : value.shape[-1]]
    torch.testing.assert_close(attention(*strided, PATTERNS[1], backend=backend), expected)
    shared = query[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(
        attention(shared, key, value, PATTERNS[1], backend=backend),
        attention(shared.contiguous(), key, value, PATTERNS[1], backend=backend),
    )


@each_backend
@each_pattern
def test_qkvpacked(pattern, backend):
    qkv = torch.randn(2, 11, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    text_lens = torch.tensor([2, 5])
    query, key, value = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    for options in ({}, {"text_lens": text_lens, "scale": 0.3}):
        packed = attention_qkvpacked(qkv, pattern, backend=backend, **options)
        apart = attention(query, key, value, pattern, backend=backend, **options).transpose(1, 2)
        torch.testing.assert_close(packed, apart)
        (grad,) = torch.autograd.grad(packed.sum(), qkv)
        (expected,) = torch.autograd.grad(apart.sum(), qkv)
        torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(reference.attention_qkvpacked(qkv, pattern), attention_qkvpacked(qkv, pattern))


@each_backend
def test_extreme_scores(backend):
    query, key, value = make_inputs(torch.float32)
    out = attention(query * 1e4, key * 1e4, value, PATTERNS[1], backend=backend)
    assert torch.isfinite(out).all()


@each_backend
def test_is_deterministic(backend):
    query, key, value = make_inputs(torch.float32, requires_grad=True)

    def run():
        out = attention(query, key, value, PATTERNS[1], backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), (query, key, value))]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_compiled_with_text_lens():
    inputs = make_inputs(torch.float32)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    options = {"text_lens": torch.tensor([0, 3]), "return_lse": True}
    torch.testing.assert_close(compiled(*inputs, PATTERNS[1], **options), attention(*inputs, PATTERNS[1], **options))


@each_backend
def test_autocast(backend):
    query, key, value = make_inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(query, key.bfloat16(), value, PATTERNS[1], backend=backend)
        exact = attention(*make_inputs(torch.float64), PATTERNS[1], backend=backend)
    rounded = [tensor.bfloat16() for tensor in (query, key, value)]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attention(*rounded, PATTERNS[1], backend=backend))
    assert exact.dtype == torch.float64


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


def test_empty_batch():
    query = torch.zeros(0, 2, SEQ_LEN, 8)
    for backend in BACKENDS:
        assert attention(query, query, query, PATTERNS[0], backend=backend).shape == query.shape


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
            (X,),
            {"backend": "triton"},
            RuntimeError,
            'backend "triton" of attention is not part of this version; use backend="auto"',
        ),
        (
            (X,),
            {"backend": "cpp"},
            RuntimeError,
            'backend "cpp" of attention is not part of this version; use backend="auto"',
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
            zeros(1, 4, 3, 2, 8),
            {"backend": "cpp"},
            RuntimeError,
            'backend "cpp" of attention_qkvpacked is not part of this version; use backend="auto"',
        ),
    ],
)
def test_qkvpacked_errors(qkv, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        attention_qkvpacked(qkv, PATTERNS[1], **options)
