"""attention as a PyTorch op: opcheck, fake tensors, torch.compile, autograd's corners, threads."""

import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import every_pattern, needs_extension, pattern_id
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from dalle_fast.ops.attention import attention, attention_qkvpacked
from dalle_fast.patterns import Column, Conv, Full, Row

pytestmark = needs_extension

OPS = torch.ops.dalle_fast
PATTERN = Row(5, (3, 4))
SEQ_LEN = PATTERN.seq_len
HAS_COMPILER = shutil.which((os.environ.get("CXX") or "g++").split()[0]) is not None
COMPILER = "inductor" if HAS_COMPILER else "aot_eager"


def make_inputs(*, batch=2, heads=4, key_heads=4, length=SEQ_LEN, head_dim=8, dtype=torch.float32) -> list[Tensor]:
    """Query, key, value that require gradients."""
    shapes = [(batch, h, length, head_dim) for h in (heads, key_heads, key_heads)]
    return [(2 * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes]


def permuted(tensor: Tensor) -> Tensor:
    """The same values, heads next to positions in memory."""
    return tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(tensor.requires_grad)


def expanded(tensor: Tensor) -> Tensor:
    """The first sample for all, without memory for it."""
    return tensor[:1].expand_as(tensor)


def sliced(tensor: Tensor) -> Tensor:
    """The same values between others."""
    return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]


def same(tensor: Tensor) -> Tensor:
    return tensor


LENS = torch.tensor([0, 3])
each_layout = pytest.mark.parametrize("layout", [same, permuted, expanded, sliced])
each_layout_and_text_lens = pytest.mark.parametrize(
    ("layout", "text_lens"),
    [(same, None), (same, LENS), (permuted, LENS), (expanded, None), (sliced, LENS)],
    ids=["contiguous", "contiguous-text_lens", "permuted-text_lens", "expanded", "sliced-text_lens"],
)


def forward_args(layout, text_lens, key_heads=4, dtype=torch.float32) -> tuple:
    """Arguments of the op attention."""
    tensors = [layout(tensor.detach()) for tensor in make_inputs(key_heads=key_heads, dtype=dtype)]
    return *tensors, text_lens, PATTERN.code, 0.4, "cpp"


def backward_args(layout, text_lens, key_heads=4, dtype=torch.float32, with_lse=True) -> tuple:
    """Arguments of the op attention_backward."""
    *tensors, _, code, scale, backend = forward_args(layout, text_lens, key_heads, dtype)
    out, lse = OPS.attention(*tensors, text_lens, code, scale, backend)
    grads = layout(torch.randn_like(out)), torch.randn_like(lse) if with_lse else None
    return *tensors, out, lse, *grads, text_lens, code, scale, backend


def packed_args(layout, text_lens, dtype=torch.float32) -> tuple:
    """Arguments of the op attention_qkvpacked."""
    qkv = torch.randn(2, SEQ_LEN, 3, 4, 8).to(dtype)
    return layout(qkv).detach(), text_lens, PATTERN.code, 0.4, "cpp"


def packed_backward_args(layout, text_lens, dtype=torch.float32) -> tuple:
    """Arguments of the op attention_qkvpacked_backward."""
    qkv, *common = packed_args(layout, text_lens, dtype)
    out, lse = OPS.attention_qkvpacked(qkv, *common)
    return qkv, out, lse, layout(torch.randn_like(out)), *common


@each_layout_and_text_lens
def test_opcheck_of_attention(layout, text_lens):
    *tensors, _, code, scale, backend = forward_args(layout, text_lens, key_heads=1 if layout is permuted else 4)
    # Gradients reach the tensors that the views are of.
    args = [layout(tensor.requires_grad_()) for tensor in tensors]
    torch.library.opcheck(OPS.attention, (*args, text_lens, code, scale, backend))


@each_layout_and_text_lens
def test_opcheck_of_the_backward(layout, text_lens):
    key_heads, with_lse = (1, False) if layout is permuted else (4, True)
    torch.library.opcheck(OPS.attention_backward, backward_args(layout, text_lens, key_heads, with_lse=with_lse))


@each_layout_and_text_lens
def test_opcheck_of_the_packed_ops(layout, text_lens):
    qkv, *common = packed_args(layout, text_lens)
    torch.library.opcheck(OPS.attention_qkvpacked, (qkv.requires_grad_(), *common))
    torch.library.opcheck(OPS.attention_qkvpacked_backward, packed_backward_args(layout, text_lens))


@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("op", "make_args"),
    [
        (OPS.attention, forward_args),
        (OPS.attention_backward, backward_args),
        (OPS.attention_qkvpacked, packed_args),
        (OPS.attention_qkvpacked_backward, packed_backward_args),
    ],
    ids=["attention", "attention_backward", "attention_qkvpacked", "attention_qkvpacked_backward"],
)
def test_fake_tensors_are_like_real_ones(layout, dtype, op, make_args):
    args = make_args(layout, LENS, dtype=dtype)
    real = op(*args)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args))
    real, fake = ((x,) if isinstance(x, Tensor) else x for x in (real, fake))
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def run_all(run, inputs, *args, **options) -> list[Tensor]:
    """Outputs of ``run`` and gradients of ``inputs``."""
    out = run(*inputs, *args, **options)
    outs = out if isinstance(out, tuple) else (out,)
    upstream = [torch.cos(tensor.detach().masked_fill(tensor == -math.inf, 0.0)) for tensor in outs]
    return [*outs, *torch.autograd.grad(outs, inputs, upstream)]


def assert_same_bits(actual, expected) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_equals_eager(dtype, fresh_compiler):
    compiled = torch.compile(attention, fullgraph=True, backend=COMPILER)
    inputs = make_inputs(key_heads=2, dtype=dtype)
    options = {"text_lens": torch.tensor([0, 3]), "enable_gqa": True, "return_lse": True, "scale": 0.3}
    assert_same_bits(run_all(compiled, inputs, PATTERN, **options), run_all(attention, inputs, PATTERN, **options))
    packed = torch.compile(attention_qkvpacked, fullgraph=True, backend=COMPILER)
    qkv = [torch.randn(2, SEQ_LEN, 3, 4, 8).to(dtype).requires_grad_()]
    assert_same_bits(run_all(packed, qkv, PATTERN), run_all(attention_qkvpacked, qkv, PATTERN))


def test_compiled_layer_equals_eager(fresh_compiler):
    # As a model calls it: views of a product before it, a product after it, two patterns.
    weights = [torch.randn(32, 96) / 6, torch.randn(32, 32) / 6]

    def model(x, project, merge, text_lens):
        qkv = (x @ project).unflatten(-1, (3, 4, 8))
        apart = attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0), PATTERN, text_lens=text_lens).transpose(1, 2)
        return x + (attention_qkvpacked(qkv, Column(5, (3, 4)), text_lens=text_lens) + apart).flatten(2) @ merge

    inputs = [tensor.requires_grad_() for tensor in (torch.randn(2, SEQ_LEN, 32), *weights)]
    compiled = torch.compile(model, fullgraph=True, backend=COMPILER)
    text_lens = torch.tensor([4, 0])
    expected = run_all(model, inputs, text_lens)
    torch.testing.assert_close(run_all(compiled, inputs, text_lens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", COMPILER])
def test_one_tensor_three_times_compiled(backend, fresh_compiler):
    def run(x, pattern):
        return attention(x, x, x, pattern)

    x = make_inputs()[:1]
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    actual, expected = run_all(compiled, x, PATTERN), run_all(run, x, PATTERN)
    assert torch.equal(actual[0], expected[0])
    # Three gradients are added up, in either order.
    torch.testing.assert_close(actual[1], expected[1])


def test_new_batch_sizes_and_text_lengths_do_not_recompile(fresh_compiler):
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")

    def check(batch: int, mark: bool = False) -> None:
        inputs = make_inputs(batch=batch)
        text_lens = torch.randint(PATTERN.text_len + 1, (batch,))
        for tensor in (*inputs, text_lens) if mark else ():
            torch._dynamo.mark_dynamic(tensor, 0)
        options = {"text_lens": text_lens, "return_lse": True}
        assert_same_bits(run_all(compiled, inputs, PATTERN, **options), run_all(attention, inputs, PATTERN, **options))

    check(2, mark=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (3, 5, 7, 2, 4, 6, 8, 9, 11, 13, 2, 3, 16, 17, 10, 12, 14, 15, 19, 23):
            check(batch)


def test_new_lengths_do_not_recompile(fresh_compiler):
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    packed = torch.compile(attention_qkvpacked, fullgraph=True, backend="aot_eager", dynamic=True)

    def check(length: int) -> None:
        inputs = make_inputs(length=length, batch=3)
        assert_same_bits(run_all(compiled, inputs, PATTERN), run_all(attention, inputs, PATTERN))
        qkv = [torch.stack([tensor.detach().transpose(1, 2) for tensor in inputs], 2).requires_grad_()]
        assert_same_bits(run_all(packed, qkv, PATTERN), run_all(attention_qkvpacked, qkv, PATTERN))

    check(6)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (SEQ_LEN, 2, 7, 5, 9, 16, 3, 11, 12, 13, 14, 15, 8, 10):
            check(length)


def test_compiled_checks_its_arguments(fresh_compiler):
    compiled = torch.compile(attention, backend="aot_eager")
    x = torch.zeros(1, 1, SEQ_LEN + 1, 8)
    with pytest.raises(ValueError, match=r"the sequence must have 1\.\.17 positions, as the pattern, got 18"):
        compiled(x, x, x, PATTERN)


def test_compiled_text_lens_out_of_range_act_as_the_nearest_inside(fresh_compiler):
    # Their values are not looked at while compiling; memory outside is not either.
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    inputs = make_inputs()
    outside = run_all(compiled, inputs, PATTERN, text_lens=torch.tensor([-7, 10**9]))
    assert_same_bits(outside, run_all(attention, inputs, PATTERN, text_lens=torch.tensor([0, PATTERN.text_len])))


def test_autocast_inside_compile(fresh_compiler):
    def run(query, key, value):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attention(query, key, value, PATTERN)

    inputs = make_inputs()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    actual = run_all(compiled, inputs)
    assert actual[0].dtype == torch.bfloat16
    assert_same_bits(actual, run_all(run, inputs))


def test_compile_inside_autocast(fresh_compiler):
    inputs = make_inputs()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = compiled(*inputs, PATTERN), attention(*inputs, PATTERN)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("pattern", every_pattern(5, (3, 4)), ids=pattern_id)
def test_with_deterministic_algorithms(pattern):
    # Fresh memory is NaN then.
    inputs = make_inputs()
    options = {"text_lens": torch.tensor([0, 3]), "return_lse": True}
    expected = run_all(attention, inputs, pattern, **options)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        actual = run_all(attention, inputs, pattern, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    def run(query, key, value):
        return attention(torch.tanh(query), key, value, PATTERN, text_lens=torch.tensor([2, 5]))

    def run_again(*inputs):
        out = checkpoint(run, *inputs, use_reentrant=use_reentrant)
        out.backward(torch.cos(out.detach()))
        return [out, *(tensor.grad for tensor in inputs)]

    inputs = make_inputs()
    assert_same_bits(run_again(*inputs), run_all(run, inputs))


def test_second_derivative_is_refused():
    inputs = make_inputs()
    out = attention(*inputs, PATTERN)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match='attention has no second derivative; use backend="reference"'):
        grad.sum().backward()
    qkv = torch.randn(2, SEQ_LEN, 3, 4, 8, requires_grad=True)
    out = attention_qkvpacked(qkv, PATTERN)
    (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="attention has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    inputs = make_inputs()
    expected, expected_lse = attention(*inputs, PATTERN, return_lse=True)
    with mode():
        out, lse = attention(*inputs, PATTERN, return_lse=True)
        fresh = attention(*(tensor.clone() for tensor in inputs), PATTERN)
        packed = attention_qkvpacked(torch.stack([tensor.transpose(1, 2) for tensor in inputs], 2), PATTERN)
    assert not out.requires_grad and not lse.requires_grad
    assert_same_bits([out, lse, fresh, packed.transpose(1, 2)], [expected, expected_lse, expected, expected])


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_gradients_of_some_inputs(needed):
    inputs = make_inputs()
    expected = run_all(attention, inputs, PATTERN)[1:]
    some = [tensor.detach().requires_grad_(need) for tensor, need in zip(inputs, needed, strict=True)]
    out = attention(*some, PATTERN)
    out.backward(torch.cos(out.detach()))
    for tensor, need, grad in zip(some, needed, expected, strict=True):
        assert torch.equal(tensor.grad, grad) if need else tensor.grad is None


def test_what_is_saved_for_the_backward():
    inputs = make_inputs(key_heads=2)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        out, lse = attention(*inputs, PATTERN, enable_gqa=True, return_lse=True)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    expected = [*inputs, out, lse]
    assert storages == {tensor.untyped_storage().data_ptr(): tensor.numel() * 4 for tensor in expected}
    qkv = torch.randn(2, SEQ_LEN, 3, 4, 8, requires_grad=True)
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        out = attention_qkvpacked(qkv, PATTERN)
    assert sorted(tensor.numel() for tensor in saved) == sorted([qkv.numel(), out.numel(), out.numel() // 8])


def test_the_packed_gradient_is_one_tensor():
    # The kernel writes into the gradient that reaches the linear layer; nothing is put together from three.
    qkv = torch.randn(2, SEQ_LEN, 3, 4, 8, requires_grad=True)
    with torch.profiler.profile() as profile:
        (grad,) = torch.autograd.grad(attention_qkvpacked(qkv, PATTERN).sum(), qkv)
    assert grad.is_contiguous() and grad.shape == qkv.shape
    names = {event.name for event in profile.events()}
    assert "dalle_fast::attention_qkvpacked_backward" in names
    assert not names & {"aten::cat", "aten::stack", "aten::copy_", "aten::add_", "aten::select_backward"}


def test_key_heads_without_a_query_head():
    query = torch.zeros(1, 0, SEQ_LEN, 8, requires_grad=True)
    key, value = (torch.randn(1, 2, SEQ_LEN, 8, requires_grad=True) for _ in range(2))
    for backend in ("cpp", "reference"):
        out = attention(query, key, value, PATTERN, enable_gqa=True, backend=backend)
        assert out.shape == query.shape
        for grad in torch.autograd.grad(out.sum(), (key, value)):
            assert (grad == 0).all()


def test_inputs_changed_in_place_are_noticed():
    query, key, value = make_inputs()
    scaled = query * 1.0
    out = attention(scaled, key, value, PATTERN)
    scaled.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_inputs_are_left_alone():
    inputs = make_inputs()
    before = [tensor.detach().clone() for tensor in inputs]
    text_lens = torch.tensor([1, 4])
    run_all(attention, inputs, PATTERN, text_lens=text_lens)
    assert_same_bits([*inputs, text_lens], [*before, torch.tensor([1, 4])])


def test_from_several_threads():
    work = []
    for seed, pattern in enumerate([*every_pattern(5, (3, 4)), Full(9, (2, 9)), Conv(2, (6, 6), kernel_size=5)]):
        torch.manual_seed(seed)
        inputs = make_inputs(length=pattern.seq_len)
        work.append((inputs, pattern, run_all(attention, inputs, pattern)))

    def work_off(offset: int) -> None:
        for index in range(4 * len(work)):
            inputs, pattern, expected = work[(index + offset) % len(work)]
            assert_same_bits(run_all(attention, inputs, pattern), expected)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work_off, offset) for offset in range(6)]:
            done.result()
