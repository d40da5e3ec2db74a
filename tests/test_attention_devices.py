"""attention on each kind of device through the public functions: the C++ kernels on a CPU, Triton's on a GPU.

Every test that can runs on both, so that it is known to work where there is no GPU. Those of a GPU alone come first.
Whatever constant is compiled into a Triton kernel takes a second there, so the tests share patterns, head sizes and
groups of heads.
"""

import math
import shutil

import pytest
import torch
from helpers import (
    AttentionBudget,
    every_pattern,
    needs_extension,
    no_cuda_synchronisation,
    pattern_id,
    random_captions,
    random_image_tokens,
    tiny_dalle,
)
from torch import Tensor

from dalle_fast.ops import backends
from dalle_fast.ops.attention import attention, attention_qkvpacked
from dalle_fast.patterns import Column, Conv, Full, Row

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
each_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=needs_extension), pytest.param("cuda", marks=needs_gpu)]
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)

TEXT_LEN, GRID = 37, (9, 11)
ROW = Row(TEXT_LEN, GRID)
SEQ_LEN = ROW.seq_len


def make_inputs(
    pattern=ROW, dtype=torch.float32, *, batch=2, heads=4, key_heads=None, length=None, head_dim=16
) -> list[Tensor]:
    """Query, key, value and the gradients of out and lse, on the CPU; scores of about +-4 tell a wrong mask."""
    length = length or pattern.seq_len
    shapes = [(batch, h, length, head_dim) for h in (heads, key_heads or heads, key_heads or heads, heads)]
    tensors = [torch.randn(shape) for shape in shapes]
    for tensor in tensors[:2]:
        tensor *= 2
    return [*(tensor.to(dtype) for tensor in tensors), torch.randn(batch, heads, length)]


def run(tensors, pattern=ROW, *, device=None, text_lens=None, function=attention, **options) -> list[Tensor]:
    """out, lse and the gradients of query, key and value; computed on ``device`` and left there."""
    query, key, value, *upstream = (tensor.to(device) for tensor in tensors)
    inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    lens = None if text_lens is None else text_lens.to(device)
    results = function(*inputs, pattern, text_lens=lens, enable_gqa=True, return_lse=True, **options)
    return [*(result.detach() for result in results), *torch.autograd.grad(results, inputs, upstream)]


def run_and_add(budget: AttentionBudget, tensors, pattern, *, device, **options) -> list[Tensor]:
    results = run(tensors, pattern, device=device, **options)
    assert all(result.device.type == device for result in results)
    budget.add([result.cpu() for result in results], tensors, pattern, **options)
    return results


def assert_same_bits(actual, expected) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@needs_gpu
def test_model_on_cuda():
    model = tiny_dalle().train()
    tokens = random_captions(model.config, [5, 3]), random_image_tokens(model.config, 2)
    results = []
    for device in ("cpu", "cuda"):
        model.zero_grad()
        model.to(device)
        loss = model.loss(*(x.to(device) for x in tokens)).total
        loss.backward()
        results.append([loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters())])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@needs_gpu
@each_dtype
def test_cuda_tensors_take_triton(dtype):
    assert backends.choose_kernel("attention", "auto", torch.device("cuda"), dtype) == "triton"


@needs_gpu
@needs_extension
def test_cuda_tensors_are_refused_by_cpp():
    with pytest.raises(RuntimeError, match='"cpp"'):
        run(make_inputs(), device="cuda", backend="cpp")


@needs_gpu
@pytest.mark.parametrize("pattern", [Row(64, 16), Column(64, 16), Conv(64, 16)], ids=pattern_id)
def test_cuda_graph(pattern):
    """Captured after one call, replayed on other values and other lengths of texts; dk and dv are made in shares."""

    def fresh():
        values = make_inputs(pattern, torch.bfloat16, key_heads=2, head_dim=64)
        return [*(value.cuda() for value in values), torch.randint(pattern.text_len + 1, (2,)).cuda()]

    static = fresh()
    run(static[:5], pattern, text_lens=static[5])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(static[:5], pattern, text_lens=static[5])
    for _ in range(2):
        other = fresh()
        for place, value in zip(static, other, strict=True):
            place.copy_(value)
        graph.replay()
        assert_same_bits(captured, run(other[:5], pattern, text_lens=other[5]))


@needs_gpu
def test_cuda_stream_of_the_caller():
    tensors = [tensor.cuda() for tensor in make_inputs(head_dim=64)]
    expected = run(tensors)
    late = [torch.zeros_like(tensor) for tensor in tensors]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # clocks; on another stream the op would read zeros
        for place, tensor in zip(late, tensors, strict=True):
            place.copy_(tensor)
        results = run(late)
    stream.synchronize()
    assert_same_bits(results, expected)


@needs_gpu
def test_no_cuda_synchronisation():
    tensors, text_lens = [tensor.cuda() for tensor in make_inputs()], torch.tensor([3, 9]).cuda()
    run(tensors, text_lens=text_lens)
    with no_cuda_synchronisation():
        run(tensors, text_lens=text_lens)


@needs_gpu
def test_another_cuda_device_than_the_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("one device alone")
    tensors = make_inputs()
    with torch.cuda.device(0):
        results = run(tensors, device="cuda:1")
    assert all(result.device.index == 1 for result in results)
    assert_same_bits((x.cpu() for x in results), (x.cpu() for x in run(tensors, device="cuda:0")))


@needs_gpu
@pytest.mark.parametrize("axis", ["batch", "head", "position"])
def test_cuda_offsets_beyond_32_bits(axis):
    pattern, far, head_dim = Row(2, (1, 3)), 2**30, 16
    sizes = {"batch": (3, 1, 5), "head": (1, 3, 5), "position": (1, 1, 5)}[axis]
    strides = {"batch": (far, 128, 128), "head": (128, far, 128), "position": (128, 128, far)}[axis]
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    elements = last + 4 * head_dim
    assert last > 2**31
    if torch.cuda.mem_get_info()[0] < 3 * elements:
        pytest.skip(f"takes {3 * elements / 2**30:.0f} GiB of free memory")
    near = [torch.randn(*sizes, head_dim, dtype=torch.float16, device="cuda") for _ in range(4)]
    arena = torch.empty(elements, dtype=torch.float16, device="cuda")
    views = [torch.as_strided(arena, (*sizes, head_dim), (*strides, 1), i * head_dim) for i in range(4)]
    for view, values in zip(views, near, strict=True):
        view.copy_(values)
    grad_lse = torch.randn(sizes, device="cuda")
    assert_same_bits(run([*views, grad_lse], pattern), run([*near, grad_lse], pattern))


@needs_gpu
@each_dtype
@pytest.mark.parametrize(("batch", "heads"), [(4, 64), (1, 1)])
def test_cuda_memory(dtype, batch, heads):
    """No more than the results, 16 bytes a query, and for few heads shares of dk and dv: two tiles a multiprocessor."""
    pattern, head_dim = Row(256, 32), 64
    qkv = torch.randn(batch, pattern.seq_len, 3, heads, head_dim, device="cuda", dtype=dtype).requires_grad_()
    grad_out = torch.randn(batch, pattern.seq_len, heads, head_dim, device="cuda", dtype=dtype)

    def step() -> Tensor:
        return torch.autograd.grad(attention_qkvpacked(qkv, pattern), qkv, grad_out)[0]

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grad = step()
    torch.cuda.synchronize()
    results = (qkv.numel() + grad_out.numel()) * qkv.element_size()
    shares = 0
    if batch * heads < 8:
        tiles = 2 * torch.cuda.get_device_properties(0).multi_processor_count
        shares = tiles * 2 * 64 * head_dim * 4
    most = results + 16 * batch * heads * pattern.seq_len + shares + 2**20
    assert torch.cuda.max_memory_allocated() - before <= most
    assert grad.is_contiguous()


@each_device
@each_dtype
@pytest.mark.parametrize("pattern", every_pattern(TEXT_LEN, GRID), ids=pattern_id)
def test_every_pattern(device, dtype, pattern):
    """Against float64, and the same bits each time, of two draws; of twenty on a GPU."""
    options = {"device": device, "text_lens": torch.tensor([TEXT_LEN, 5, 0])}
    budget = AttentionBudget()
    for length in (pattern.seq_len, TEXT_LEN + 70) * (10 if device == "cuda" else 1):
        tensors = make_inputs(pattern, dtype, batch=3, key_heads=2, length=length, head_dim=64)
        results = run_and_add(budget, tensors, pattern, **options)
        for _ in range(3):
            assert_same_bits(run(tensors, pattern, **options), results)
    budget.check()


@each_device
@each_dtype
@pytest.mark.parametrize("head_dim", [1, 16, 24, 32, 48, 64, 80, 128, 160, 256])
def test_head_dims(device, dtype, head_dim):
    budget = AttentionBudget()
    run_and_add(budget, make_inputs(ROW, dtype, head_dim=head_dim), ROW, device=device)
    budget.check()


@each_device
@each_dtype
@pytest.mark.parametrize(
    "pattern",
    [Full(256, 32), Row(256, 32), Column(256, 32), Conv(256, 32), Column(64, 64), Conv(64, 48, kernel_size=7)],
    ids=pattern_id,
)
def test_real_sizes(device, dtype, pattern):
    budget = AttentionBudget()
    run_and_add(budget, make_inputs(pattern, dtype, batch=1, heads=1, head_dim=64), pattern, device=device)
    budget.check()


@each_device
@each_dtype
def test_every_end_of_a_tile(device, dtype):
    for pattern in (Row(64, (9, 16)), Column(50, (12, 10)), Conv(0, (10, 20), kernel_size=3)):
        budget = AttentionBudget()
        for length in sorted({1, 15, 16, 17, 31, 32, 33, 49, 50, 51, 63, 64, 65, 127, 128, 129, pattern.seq_len}):
            run_and_add(budget, make_inputs(pattern, dtype, heads=1, length=length), pattern, device=device)
        budget.check()


@each_device
@pytest.mark.parametrize("scale", [-0.4, 0.0, 1e-40, 7.5])
def test_scales(device, scale):
    budget = AttentionBudget()
    run_and_add(budget, make_inputs(), ROW, device=device, scale=scale)
    budget.check()


@each_device
@each_dtype
def test_packed_is_the_same_as_apart(device, dtype):
    qkv = torch.randn(2, SEQ_LEN, 3, 4, 32).to(device, dtype).requires_grad_()
    grad_out = torch.randn(2, SEQ_LEN, 4, 32).to(device, dtype)
    text_lens = torch.tensor([TEXT_LEN, 6], device=device)
    out = attention_qkvpacked(qkv, ROW, text_lens=text_lens)
    (grad,) = torch.autograd.grad(out, qkv, grad_out)
    parts = [part.detach().requires_grad_() for part in qkv.permute(2, 0, 3, 1, 4).unbind(0)]
    apart = attention(*parts, ROW, text_lens=text_lens)
    grads = torch.autograd.grad(apart, parts, grad_out.transpose(1, 2))
    assert_same_bits([out, grad], [apart.transpose(1, 2), torch.stack(grads).permute(1, 3, 0, 2, 4)])


@each_device
def test_every_result_is_written(device):
    # Fresh memory is NaN then.
    text_lens = torch.tensor([0, 20])
    torch.use_deterministic_algorithms(True)
    try:
        for pattern in every_pattern(TEXT_LEN, GRID):
            for result in run(
                make_inputs(pattern, key_heads=2, head_dim=64), pattern, device=device, text_lens=text_lens
            ):
                assert not result.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


def permuted(tensor: Tensor) -> Tensor:
    """The same values, heads next to positions in memory."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def among_nan(tensor: Tensor) -> Tensor:
    """The same values, with NaN before and after every row, position, head and sample."""
    buffer = torch.full([size + 6 for size in tensor.shape], math.nan, dtype=tensor.dtype, device=tensor.device)
    view = buffer[(slice(3, -3),) * tensor.dim()]
    return view.copy_(tensor)


@each_device
@each_dtype
@pytest.mark.parametrize("layout", [permuted, among_nan])
def test_layouts(device, dtype, layout):
    *tensors, grad_lse = (tensor.to(device) for tensor in make_inputs(dtype=dtype, key_heads=2))
    assert_same_bits(run([*map(layout, tensors), grad_lse]), run([*tensors, grad_lse]))


@each_device
def test_one_sample_for_all(device):
    query, *tensors = (tensor.to(device) for tensor in make_inputs(batch=3))
    shared = query[:1].expand_as(query)
    one_number = torch.ones((), device=device).expand_as(query)
    tensors = [*tensors[:2], one_number, tensors[3]]
    assert_same_bits(run([shared, *tensors]), run([shared.contiguous(), *(x.contiguous() for x in tensors)]))


@each_device
def test_hidden_text_does_not_leak(device):
    text_lens, results = torch.tensor([5, 18]), []
    query, key, value, *upstream = make_inputs()
    for fill in (0.0, math.nan):
        for b, text_len in enumerate(text_lens):
            key[b, :, text_len:TEXT_LEN] = value[b, :, text_len:TEXT_LEN] = fill
        results.append(run([query, key, value, *upstream], device=device, text_lens=text_lens))
    assert_same_bits(*results)
    assert all((grad[0, :, 5:TEXT_LEN] == 0).all() for grad in results[0][3:])


@each_device
def test_later_tokens_do_not_leak(device):
    for pattern in every_pattern(TEXT_LEN, GRID):
        inputs = [tensor.to(device) for tensor in make_inputs(pattern, head_dim=64)[:3]]
        before = attention(*inputs, pattern)
        for position in (0, 20, TEXT_LEN, TEXT_LEN + 40):
            changed = [tensor.clone() for tensor in inputs]
            for tensor in changed:
                tensor[:, :, position:] += 100.0
            assert torch.equal(attention(*changed, pattern)[:, :, :position], before[:, :, :position])


@each_device
def test_text_lens_of_every_integer_dtype(device):
    tensors, text_lens = make_inputs(batch=3), torch.tensor([0, 12, TEXT_LEN])
    expected = run(tensors, device=device, text_lens=text_lens)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert_same_bits(run(tensors, device=device, text_lens=text_lens.to(dtype)), expected)
    strided = text_lens.repeat_interleave(2).to(device)[::2]
    assert_same_bits(run([tensor.to(device) for tensor in tensors], text_lens=strided), expected)


@each_device
def test_empty_batch(device):
    shapes = [(0, 4, SEQ_LEN, 16)] * 5
    for result, shape in zip(run(make_inputs(batch=0), device=device), shapes, strict=True):
        assert result.shape in (shape, shape[:3])


@each_device
def test_more_heads_than_a_grid_has_rows(device):
    # The second and third axes of a CUDA grid end at 65535.
    pattern = Row(2, (2, 3))
    one = make_inputs(pattern, torch.float16, batch=1, heads=1)
    many = [tensor.to(device).expand(70_000, 2, *tensor.shape[2:]) for tensor in one]
    for result in run(many, pattern):
        assert (result == result[:1, :1]).all()


@each_device
@each_dtype
def test_compiled_equals_eager(device, dtype):
    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" and shutil.which("gcc") else "aot_eager"
    compiled = torch.compile(attention, fullgraph=True, backend=backend)
    text_lens = torch.tensor([4, 30])
    tensors = make_inputs(dtype=dtype, key_heads=2)
    expected = run(tensors, device=device, text_lens=text_lens)
    assert_same_bits(run(tensors, device=device, text_lens=text_lens, function=compiled), expected)


@each_device
def test_opcheck(device):
    query, key, value, grad_out, grad_lse = (tensor.to(device) for tensor in make_inputs(key_heads=2))
    common = (torch.tensor([4, 30], device=device), ROW.code, 0.3, "cpp" if device == "cpu" else "triton")
    ops = torch.ops.dalle_fast
    out, lse = ops.attention(query, key, value, *common)
    inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    torch.library.opcheck(ops.attention, (*inputs, *common))
    torch.library.opcheck(ops.attention_backward, (query, key, value, out, lse, grad_out, grad_lse, *common))
    qkv = torch.randn(2, SEQ_LEN, 3, 4, 16, device=device)
    torch.library.opcheck(ops.attention_qkvpacked, (qkv.clone().requires_grad_(), *common))
    out, lse = ops.attention_qkvpacked(qkv, *common)
    torch.library.opcheck(ops.attention_qkvpacked_backward, (qkv, out, lse, torch.randn_like(out), *common))


@each_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(device, dtype):
    *tensors, grad_lse = (tensor.to(device) for tensor in make_inputs())
    rounded = run([*(tensor.to(dtype) for tensor in tensors), grad_lse])
    with torch.autocast(device, dtype):
        results = run([*tensors[:3], tensors[3].to(dtype), grad_lse])
    assert results[0].dtype == dtype and results[2].dtype == torch.float32
    assert_same_bits(results, [*rounded[:2], *(grad.float() for grad in rounded[2:])])
