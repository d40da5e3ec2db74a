"""Cached decoding on each kind of device through the public functions: C++ on a CPU, Triton on a GPU.

Every test that can runs on both, so that it is known to work where there is no GPU. Those of a GPU alone come first.
"""

import math

import pytest
import torch
from helpers import assert_within_budget, every_pattern, needs_extension, no_cuda_synchronisation, pattern_id
from torch import Tensor

from dalle_fast import reference
from dalle_fast.ops.kv_cache import KVCache, attention_with_kvcache, choose_kernel
from dalle_fast.patterns import Column, Conv, Full, Pattern, Row

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
each_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=needs_extension), pytest.param("cuda", marks=needs_gpu)]
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)

TEXT_LEN, GRID = 37, (3, 4)
ROW = Row(TEXT_LEN, GRID)


def make_inputs(pattern: Pattern, dtype=torch.float32, *, prompts=2, samples=3, heads=2, head_dim=16, held=None):
    """Query, key and value of all positions on the CPU; the first ``held`` are those of a prompt."""
    held = pattern.text_len if held is None else held
    query, key, value = 2 * torch.randn(3, prompts * samples, heads, pattern.seq_len, head_dim)
    for tensor in (key, value):
        tensor[:, :, :held] = tensor[::samples, :, :held].repeat_interleave(samples, dim=0)
    return [tensor.to(dtype) for tensor in (query, key, value)]


def make_cache(
    pattern: Pattern, key: Tensor, value: Tensor, *, samples: int, held: int, text_lens=None, dtype=None, kind=KVCache
) -> KVCache:
    """A cache with the first ``held`` positions, on keys' device; NaN where there is nothing."""
    batch, heads, _, head_dim = key.shape
    options = {"num_prompts": batch // samples, "dtype": dtype or key.dtype, "device": key.device}
    cache = kind(pattern, batch, heads, head_dim, **options)
    cache.image_key.fill_(math.nan)
    cache.image_value.fill_(math.nan)
    lens = None if text_lens is None else text_lens.to(key.device)
    prompt_key, prompt_value = (tensor[::samples, :, :held].to(cache.dtype) for tensor in (key, value))
    cache.prefill(prompt_key, prompt_value, lens)
    return cache


def decode(cache: KVCache, query: Tensor, key: Tensor, value: Tensor, stop=None, **options) -> Tensor:
    """Every remaining position up to ``stop``, one at a time."""
    positions = range(cache.position, stop or cache.pattern.seq_len)
    steps = [[x[:, :, s : s + 1] for x in (query, key, value)] for s in positions]
    return torch.cat([attention_with_kvcache(*step, cache, **options) for step in steps], dim=2)


def check(
    pattern: Pattern, dtype: torch.dtype, *, device: str, samples=3, prefix=0, text_lens=None, scale=None, **sizes
) -> None:
    """An image against the reference in float64, within the budget of that in the same dtype; each time the same."""
    held = pattern.text_len + prefix
    tensors = make_inputs(pattern, dtype, samples=samples, held=held, **sizes)
    query, key, value = (tensor.to(device) for tensor in tensors)
    options = {"samples": samples, "held": held, "text_lens": text_lens}
    found, again = (
        decode(make_cache(pattern, key, value, **options), query, key, value, scale=scale) for _ in range(2)
    )
    assert found.device.type == device and torch.equal(found, again)
    peer, truth = (by_reference(pattern, each, scale, **options) for each in (tensors, [x.double() for x in tensors]))
    assert_within_budget(found.cpu(), peer, truth)


def by_reference(pattern: Pattern, tensors: list[Tensor], scale: float | None = None, **options) -> Tensor:
    """The same image by the reference in the tensors' dtype."""
    cache = make_cache(pattern, *tensors[1:], **options, kind=reference.KVCache)
    steps = [[x[:, :, s : s + 1] for x in tensors] for s in range(options["held"], pattern.seq_len)]
    return torch.cat([reference.attention_with_kvcache(*step, cache, scale=scale) for step in steps], dim=2)


@needs_gpu
@each_dtype
def test_cuda_tensors_take_triton(dtype):
    assert choose_kernel("auto", KVCache(ROW, 1, 1, 16, dtype=dtype, device="cuda")) == "triton"


@needs_gpu
@pytest.mark.parametrize("pattern", [Row(64, 8), Column(64, 8), Conv(64, 8, kernel_size=5)], ids=pattern_id)
@pytest.mark.parametrize("samples", [1, 40])
def test_cuda_graph(pattern, samples):
    """Captured after one step, replayed on other values; the last replays find the cache full."""
    held = pattern.seq_len - 5
    query, key, value = (
        x.cuda() for x in make_inputs(pattern, torch.bfloat16, samples=samples, head_dim=64, held=held)
    )
    options = {"samples": samples, "held": held}
    expected = decode(make_cache(pattern, key, value, **options), query, key, value)
    cache = make_cache(pattern, key, value, **options)
    static = [x[:, :, held : held + 1].clone() for x in (query, key, value)]
    found = [attention_with_kvcache(*static, cache).clone()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_with_kvcache(*static, cache)
    for position in range(held + 1, pattern.seq_len):
        for place, values in zip(static, (query, key, value), strict=True):
            place.copy_(values[:, :, position : position + 1])
        graph.replay()
        found.append(out.clone())
    assert torch.equal(torch.cat(found, dim=2), expected)
    image = cache.image_key.clone()
    for place in static:
        place.fill_(9.0)
    graph.replay()
    assert cache.position == pattern.seq_len
    assert torch.equal(cache.image_key.nan_to_num(0.5), image.nan_to_num(0.5))
    cache.reset()
    graph.replay()
    assert cache.position == 0


@needs_gpu
def test_cuda_streams_of_the_caller():
    """Two caches that step at the same time on two streams, each late."""
    tensors = [x.cuda() for x in make_inputs(ROW, samples=40, head_dim=64)]
    options = {"samples": 40, "held": TEXT_LEN}
    expected = decode(make_cache(ROW, *tensors[1:], **options), *tensors)
    caches = [make_cache(ROW, *tensors[1:], **options) for _ in range(2)]
    late = [[torch.zeros_like(tensor) for tensor in tensors] for _ in caches]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in caches], []
    for stream, places, cache in zip(streams, late, caches, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # clocks; on another stream the op would read zeros
            for place, tensor in zip(places, tensors, strict=True):
                place.copy_(tensor)
            steps = [[x[:, :, s : s + 1] for x in places] for s in range(TEXT_LEN, ROW.seq_len)]
            results.append([attention_with_kvcache(*step, cache) for step in steps])
    torch.cuda.synchronize()
    for result in results:
        assert torch.equal(torch.cat(result, dim=2), expected)


@needs_gpu
def test_no_cuda_synchronisation():
    query, key, value = (x.cuda() for x in make_inputs(ROW))
    cache = make_cache(ROW, key, value, samples=3, held=TEXT_LEN)
    steps = [[x[:, :, s : s + 1] for x in (query, key, value)] for s in range(TEXT_LEN, TEXT_LEN + 4)]
    attention_with_kvcache(*steps[0], cache)
    with no_cuda_synchronisation():
        for step in steps[1:]:
            attention_with_kvcache(*step, cache)


@needs_gpu
def test_another_cuda_device_than_the_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("one device alone")
    tensors, found = make_inputs(ROW), []
    for device in ("cuda:1", "cuda:0"):
        query, key, value = (x.to(device) for x in tensors)
        with torch.cuda.device(0):
            found.append(decode(make_cache(ROW, key, value, samples=3, held=TEXT_LEN), query, key, value).cpu())
    assert torch.equal(*found)


@needs_gpu
def test_cuda_offsets_of_the_cache_beyond_32_bits():
    pattern, head_dim, batch = Row(2, (1, 64)), 256, 135_000
    elements = batch * 64 * head_dim
    assert elements > 2**31
    if torch.cuda.mem_get_info()[0] < 5 * elements:
        pytest.skip(f"takes {5 * elements / 2**30:.0f} GiB of free memory")
    one = [x.cuda() for x in make_inputs(pattern, torch.float16, prompts=1, samples=1, heads=1, head_dim=head_dim)]
    few = KVCache(pattern, 1, 1, head_dim, dtype=torch.float16, device="cuda")
    many = KVCache(pattern, batch, 1, head_dim, num_prompts=1, dtype=torch.float16, device="cuda")
    for cache in (few, many):
        cache.prefill(*(x[:, :, :2] for x in one[1:]))
    for position in range(2, 6):
        now = [x[:, :, position : position + 1] for x in one]
        expected = attention_with_kvcache(*now, few)
        found = attention_with_kvcache(*(x.expand(batch, -1, -1, -1) for x in now), many)
        assert (found == found[:1]).all()
        # Other tiles add in another order.
        torch.testing.assert_close(found[:1], expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(many.image_key[-1:, :, :4], few.image_key[:, :, :4])


@needs_gpu
def test_cuda_offsets_of_a_query_beyond_32_bits():
    far, head_dim = 2**30, 16
    if torch.cuda.mem_get_info()[0] < 6 * far:
        pytest.skip(f"takes {6 * far / 2**30:.0f} GiB of free memory")
    near = torch.randn(3, 3, 1, 1, head_dim, dtype=torch.float16, device="cuda")
    arena = torch.empty(2 * far + 3 * head_dim, dtype=torch.float16, device="cuda")
    views = [torch.as_strided(arena, (3, 1, 1, head_dim), (far, head_dim, head_dim, 1), i * head_dim) for i in range(3)]
    for view, values in zip(views, near, strict=True):
        view.copy_(values)
    found = []
    for tensors in (views, near):
        cache = KVCache(Row(0, (1, 3)), 3, 1, head_dim, dtype=torch.float16, device="cuda")
        found.append([attention_with_kvcache(*tensors, cache), cache.image_key, cache.image_value])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_gpu
def test_opcheck_of_the_triton_op():
    query, key, value = (x.cuda() for x in make_inputs(ROW))
    cache = make_cache(ROW, key, value, samples=3, held=TEXT_LEN)
    query, key, value = (x[:, :, TEXT_LEN : TEXT_LEN + 1] for x in (query, key, value))
    text = cache.text_key, cache.text_value
    # NaN is not equal to itself.
    image = torch.zeros_like(cache.image_key), torch.zeros_like(cache.image_value)
    arguments = query, key, value, *text, *image, cache.held, cache.text_lens, ROW.code, 0.3, torch.zeros_like(query)
    torch.library.opcheck(torch.ops.dalle_fast.attention_with_kvcache_triton, arguments)


@each_device
@each_dtype
@pytest.mark.parametrize("pattern", every_pattern(TEXT_LEN, GRID), ids=pattern_id)
def test_every_pattern(device, dtype, pattern):
    check(pattern, dtype, device=device, text_lens=torch.tensor([0, 30]))


@each_device
@each_dtype
@pytest.mark.parametrize("head_dim", [1, 16, 24, 32, 48, 64, 80, 128, 160, 256])
def test_head_dims(device, dtype, head_dim):
    check(ROW, dtype, device=device, head_dim=head_dim, prefix=ROW.image_len - 2)


@each_device
@each_dtype
@pytest.mark.parametrize("samples", [1, 17])
@pytest.mark.parametrize("pattern", [Full(256, 32), Row(256, 32), Column(256, 32), Conv(256, 32)], ids=pattern_id)
def test_real_sizes(device, dtype, samples, pattern):
    check(
        pattern, dtype, device=device, samples=samples, prompts=1, heads=1, head_dim=64, prefix=pattern.image_len - 2
    )  # fmt: skip


@each_device
@pytest.mark.parametrize("scale", [-0.4, 0.0, 1e-40, 1.5])
def test_scales(device, scale):
    check(ROW, torch.float32, device=device, samples=16, scale=scale)


@each_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_over_a_16_bit_cache(device, dtype):
    """Within the budget of the cache's dtype, and its keys and values are rounded as the reference rounds them."""
    tensors = make_inputs(ROW, dtype)
    there, wide = [x.to(device) for x in tensors], [x.to(device).float() for x in tensors]
    options = {"samples": 3, "held": TEXT_LEN, "dtype": dtype}
    cache, narrow = make_cache(ROW, *wide[1:], **options), make_cache(ROW, *there[1:], **options)
    found, peer = decode(cache, *wide), by_reference(ROW, tensors, samples=3, held=TEXT_LEN)
    decode(narrow, *there)
    assert found.dtype == torch.float32
    truth = by_reference(ROW, [x.double() for x in tensors], samples=3, held=TEXT_LEN)
    assert_within_budget(found.cpu().to(dtype), peer, truth)
    assert torch.equal(cache.image_key, narrow.image_key) and torch.equal(cache.image_value, narrow.image_value)


@each_device
def test_hidden_text_does_not_leak(device):
    text_lens, results = torch.tensor([0, 5]), []
    query, key, value = (x.to(device) for x in make_inputs(ROW, samples=2))
    for fill in (0.0, 100.0):
        for prompt, text_len in enumerate(text_lens):
            for tensor in (key, value):
                tensor[2 * prompt : 2 * prompt + 2, :, text_len:TEXT_LEN] = fill
        cache = make_cache(ROW, key, value, samples=2, held=TEXT_LEN, text_lens=text_lens)
        results.append(decode(cache, query, key, value))
    assert torch.equal(*results) and results[0].isfinite().all()


@each_device
def test_packed_is_the_same_as_apart(device):
    qkv = torch.randn(4, 3, 2, 1, 16).to(device)
    packed = qkv.unbind(1)
    results = []
    for tensors in (packed, [x.contiguous() for x in packed]):
        cache = KVCache(Row(0, 3), 4, 2, 16, dtype=torch.float32, device=device)
        results.append([attention_with_kvcache(*tensors, cache) for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_device
def test_more_samples_than_a_grid_has_rows(device):
    # The second and third axes of a CUDA grid end at 65535.
    pattern, batch = Row(2, (2, 2)), 70_000
    one = [x.to(device) for x in make_inputs(pattern, torch.float16, prompts=1, samples=1)]
    cache = KVCache(pattern, batch, 2, 16, dtype=torch.float16, device=device)
    cache.prefill(*(x[:, :, :2].expand(batch, -1, -1, -1) for x in one[1:]))
    out = decode(cache, *(x.expand(batch, -1, -1, -1) for x in one))
    assert (out == out[:1]).all() and out.isfinite().all()
