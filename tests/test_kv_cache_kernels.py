"""The Triton kernel of cached decoding in Triton's interpreter, against float64; on a machine without a GPU too.

As for attention, this module runs itself once more in a process of its own, for the interpreter is chosen when triton
is imported. What the interpreter cannot show (registers, bfloat16, programs that run at the same time) is not tested
here.
"""

import math
import mmap

import pytest
import torch
from helpers import assert_within_budget, every_pattern, pattern_id
from interpreter import INTERPRETED, interpreted, run_interpreted
from torch import Tensor

from dalle_fast import reference
from dalle_fast.ops.kv_cache import KVCache, attention_with_kvcache
from dalle_fast.patterns import Column, Conv, Full, Pattern, Row

pytest.importorskip("triton")

from dalle_fast.kernels.common import H200, Tiles
from dalle_fast.kernels.kv_cache import (
    attend_step,
    earlier_key,
    neighbours,
    num_earlier,
    plan_step,
    slot_of,
)


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_in_the_interpreter():
    run_interpreted(__file__)


# Who is visible, and where it is kept


GRIDS = [(1, 1), (1, 9), (9, 1), (2, 2), (5, 7), (7, 5), (8, 8), (3, 24)]


def patterns_of(grid: tuple[int, int]) -> list[Pattern]:
    convolutions = [
        Conv(3, grid, kernel_size=size, variant=variant, dilation=dilation)
        for variant in ("raster", "clip", "torus", "corner")
        for size in (1, 3, 5, 11, 25)
        for dilation in (1, 2, 3, 100)
    ]
    corners = [Conv(3, grid, kernel_size=size, variant="corner", dilation=2) for size in (2, 4)]
    return [Full(3, grid), Row(3, grid), Row(3, grid, variant="same_row"), Column(3, grid), *convolutions, *corners]


@pytest.mark.skipif(INTERPRETED, reason="plain Python")
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_earlier_keys_are_those_of_the_pattern(grid):
    """Each once, none but those, and few questions in vain."""
    for pattern in patterns_of(grid):
        slots = KVCache.slots_of(pattern)
        near, seen_by = neighbours(pattern.code, slots), pattern.dense()[pattern.text_len :, pattern.text_len :]
        for n in range(pattern.image_len):
            t = torch.arange(num_earlier.fn(n, near))
            n_k, seen = earlier_key.fn(t, n, near)
            found = n_k[seen.expand_as(t)] if isinstance(seen, Tensor) else n_k
            expected = seen_by[n, :n].nonzero().squeeze(1)
            assert torch.equal(found.sort().values, expected), (pattern, n)
            if pattern.name != "conv":
                assert len(t) == len(expected), (pattern, n)
            assert len(t) <= max(pattern.kernel_size**2 if pattern.name == "conv" else n, n)


@pytest.mark.skipif(INTERPRETED, reason="plain Python")
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_slots_are_those_of_the_cache(grid):
    for pattern in patterns_of(grid)[:12]:
        cache = KVCache(pattern, 1, 1, 1, dtype=torch.float32, device="cpu")
        n = torch.arange(pattern.image_len)
        assert torch.equal(slot_of.fn(n, neighbours(pattern.code, cache.slots)), cache.slot(n))


# The kernel


def poisoned(values: Tensor) -> Tensor:
    """``values`` (B, H, 1, D) in the middle of a buffer of NaN, with room before and after every axis."""
    batch, heads, _, head_dim = values.shape
    buffer = torch.full((batch + 2, heads + 2, 3, head_dim + 9), math.nan, dtype=values.dtype)
    view = buffer[1:-1, 1:-1, 1:-1, 3 : 3 + head_dim]
    view.copy_(values)
    return view


def among_nan(tensor: Tensor) -> Tensor:
    """The same values, contiguous, between NaN before and after."""
    buffer = torch.full((tensor.numel() + 128,), math.nan, dtype=tensor.dtype)
    view = buffer[64:-64].view(tensor.shape)
    view.copy_(tensor)
    return view


def surroundings_untouched(view: Tensor) -> bool:
    """Whether the buffer around such a view still holds nothing but NaN."""
    buffer = view._base.clone()
    torch.as_strided(buffer, view.shape, view.stride(), view.storage_offset()).fill_(math.nan)
    return bool(buffer.isnan().all())


def make_cache(
    pattern: Pattern, key: Tensor, value: Tensor, text_lens: Tensor, samples: int, dtype: torch.dtype, held: int
) -> KVCache:
    """A cache with the first positions of keys and values of prompts (P, H, S, D), and NaN wherever there are none."""
    prompts, heads, _, head_dim = key.shape
    cache = KVCache(pattern, prompts * samples, heads, head_dim, num_prompts=prompts, dtype=dtype, device="cpu")
    for name in ("image_key", "image_value"):
        getattr(cache, name).fill_(math.nan)
    cache.prefill(key[:, :, :held].to(dtype), value[:, :, :held].to(dtype), text_lens)
    for p, text_len in enumerate(text_lens):
        cache.text_key[p, :, :, text_len:] = math.nan
        cache.text_value[p, :, text_len:] = math.nan
    for name in ("text_key", "text_value", "image_key", "image_value"):
        setattr(cache, name, among_nan(getattr(cache, name)))
    return cache


def step(cache: KVCache, query: Tensor, key: Tensor, value: Tensor, *, scale=None, tiles=None) -> Tensor:
    """One step of the kernel, from and into poisoned memory."""
    out = poisoned(torch.full(query.shape, math.nan, dtype=query.dtype))
    attend_step(
        poisoned(query), poisoned(key), poisoned(value),
        cache.text_key, cache.text_value, cache.image_key, cache.image_value, cache.held, cache.text_lens, out,
        pattern=cache.pattern.code, scale=query.shape[-1] ** -0.5 if scale is None else scale, tiles=tiles,
    )  # fmt: skip
    assert surroundings_untouched(out)
    assert surroundings_untouched(cache.image_key) and surroundings_untouched(cache.image_value)
    return out


def make_inputs(pattern: Pattern, prompts: int, samples: int, heads: int, head_dim: int, held: int) -> list[Tensor]:
    """Query, key and value of all positions, float32; the first ``held`` are those of a prompt."""
    query, key, value = 2 * torch.randn(3, prompts * samples, heads, pattern.seq_len, head_dim)
    for tensor in (key, value):
        tensor[:, :, :held] = tensor[::samples, :, :held].repeat_interleave(samples, dim=0)
    return [query, key, value]


def check(
    pattern: Pattern, *, text_lens: list[int], samples=1, heads=1, head_dim=16, dtype=torch.float16, query_dtype=None,
    prefix=0, stop=None, scale=None, tiles=None,
) -> None:  # fmt: skip
    """An image decoded by the kernel against float64, within the budget of the reference in the cache's dtype."""
    lens, prompts, held = torch.tensor(text_lens), len(text_lens), pattern.text_len + prefix
    query, key, value = make_inputs(pattern, prompts, samples, heads, head_dim, held)
    query, key, value = (tensor.to(dtype).to(query_dtype or dtype) for tensor in (query, key, value))
    prompt_key, prompt_value = key[::samples], value[::samples]
    cache = make_cache(pattern, prompt_key, prompt_value, lens, samples, dtype, held)
    peers = reference.KVCache(
        pattern, prompts * samples, heads, head_dim, num_prompts=prompts, dtype=dtype, device="cpu"
    )
    peers.prefill(prompt_key[:, :, :held].to(dtype), prompt_value[:, :, :held].to(dtype), lens)
    found, peer = [], []
    for position in range(held, stop or pattern.seq_len):
        now = [tensor[:, :, position : position + 1] for tensor in (query, key, value)]
        found.append(step(cache, *now, scale=scale, tiles=tiles))
        assert cache.held == position + 1
        peer.append(reference.attention_with_kvcache(*now, peers, scale=scale))
    found, peer = torch.cat(found, dim=2).to(dtype), torch.cat(peer, dim=2).to(dtype)
    truth = reference.attention(
        query.double(), key.double(), value.double(), pattern,
        text_lens=lens.repeat_interleave(samples), scale=scale,
    )  # fmt: skip
    assert_within_budget(found, peer, truth[:, :, held : stop or pattern.seq_len])
    # The ring holds what the reference's holds, and NaN where that holds nothing.
    for one, other in ((cache.image_key, peers.image_key), (cache.image_value, peers.image_value)):
        assert torch.equal(one.nan_to_num(0.0), other)


T16, WIDE = Tiles(16, 16, 16, 4, 1), Tiles(16, 32, 64, 4, 1)
each_pattern = pytest.mark.parametrize("pattern", every_pattern(19, (3, 4)), ids=pattern_id)


@pytest.mark.skipif(INTERPRETED, reason="the compiled kernels")
def test_no_cpu_tensors_outside_the_interpreter():
    cache = KVCache(Row(4, 2), 1, 1, 16, dtype=torch.float32, device="cpu")
    x = torch.zeros(1, 1, 1, 16)
    with pytest.raises(RuntimeError, match="run on CUDA devices, got a tensor on cpu; move it to one, or set"):
        step(cache, x, x, x)


@interpreted
def test_bfloat16_is_refused():
    cache = KVCache(Row(4, 2), 1, 1, 16, dtype=torch.bfloat16, device="cpu")
    x = torch.zeros(1, 1, 1, 16, dtype=torch.bfloat16)
    message = r"interpreter computes bfloat16 on its bit patterns.*unset TRITON_INTERPRET"
    with pytest.raises(RuntimeError, match=message):
        step(cache, x, x, x)
    cache.held.fill_(4)
    with pytest.raises(RuntimeError, match=message):
        attention_with_kvcache(x, x, x, cache, backend="triton")


@interpreted
@each_pattern
def test_float32(pattern):
    """A whole image; of two prompts one has part of its text hidden."""
    check(pattern, text_lens=[19, 4], samples=2, head_dim=12, dtype=torch.float32, tiles=T16)


@interpreted
@each_pattern
def test_float16_after_a_prefix(pattern):
    """Of a prompt without text too, with the shipped tiles."""
    check(pattern, text_lens=[0, 17], samples=3, heads=2, head_dim=40, prefix=7)


@interpreted
def test_without_text():
    check(Row(0, (2, 3)), text_lens=[0], samples=3, tiles=T16)


@interpreted
@pytest.mark.parametrize("samples", [1, 16, 17, 35])
def test_tiles_end_with_a_prompt(samples):
    check(Row(5, (3, 4)), text_lens=[5, 2], samples=samples, prefix=9, tiles=WIDE)


@interpreted
@pytest.mark.parametrize(
    "pattern",
    [Full(33, (6, 12)), Column(64, (20, 2)), Conv(70, (12, 14)), Conv(2, (8, 8), variant="torus", kernel_size=5)],
    ids=pattern_id,
)
def test_several_steps_of_each_loop(pattern):
    prefix = pattern.image_len - 3
    check(pattern, text_lens=[pattern.text_len], samples=2, head_dim=32, prefix=prefix, tiles=T16)


@interpreted
@pytest.mark.parametrize("head_dim", [1, 8, 64, 80, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_head_dims(head_dim, dtype):
    check(Row(20, (2, 3)), text_lens=[20], samples=2, head_dim=head_dim, dtype=dtype, prefix=3)


@interpreted
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-40, 1.5])
def test_scales(scale):
    for dtype in (torch.float32, torch.float16):
        check(Row(20, (2, 4)), text_lens=[20, 3], samples=16, scale=scale, dtype=dtype, prefix=5, tiles=T16)


@interpreted
def test_float32_over_a_16_bit_cache():
    """Keys and values are rounded as they are stored, and so is what the own position takes of them."""
    check(Row(20, (2, 4)), text_lens=[20, 3], samples=2, query_dtype=torch.float32, tiles=T16)
    pattern = Row(0, (1, 2))
    query, key, value = torch.randn(3, 1, 1, 1, 16)
    cache = make_cache(pattern, key[:, :, :0], value[:, :, :0], torch.tensor([0]), 1, torch.float16, 0)
    out = step(cache, query, key, value)
    assert out.dtype == torch.float32
    assert torch.equal(out, value.half().float()) and not torch.equal(out, value)
    assert torch.equal(cache.image_key[:, :, :1], key.half())


@interpreted
@pytest.mark.parametrize("held", [0, 3, 10, 12])
def test_a_position_that_is_none_leaves_all_as_it_is(held):
    """Before the text is there, and past the end."""
    pattern = Row(4, (2, 3))
    query, key, value = torch.randn(3, 40, 1, 1, 16).half()
    cache = make_cache(pattern, *torch.randn(2, 2, 1, 10, 16).half(), torch.tensor([4, 4]), 20, torch.float16, 10)
    before = cache.image_key.clone(), cache.image_value.clone()
    cache.held.fill_(held)
    out = step(cache, query, key, value, tiles=T16)
    assert cache.held == held
    assert out.isnan().all()
    assert torch.equal(cache.image_key, before[0]) and torch.equal(cache.image_value, before[1])


@interpreted
def test_order_of_programs(monkeypatch):
    """Run twice, and with the programs of every grid in reverse: the same bits, so no program needs another."""
    from triton.runtime.interpreter import InterpreterBuilder

    pattern = Conv(11, (4, 5), kernel_size=3)
    query, key, value = (x.half() for x in make_inputs(pattern, 1, 17, 2, 16, 11))

    def run():
        cache = make_cache(pattern, key[:1], value[:1], torch.tensor([6]), 17, torch.float16, 11)
        steps = [[x[:, :, s : s + 1] for x in (query, key, value)] for s in range(11, 14)]
        found = [step(cache, *now, tiles=T16) for now in steps]
        return [*found, cache.image_key.nan_to_num(9.0), cache.image_value.nan_to_num(9.0), cache.held]

    first, second = run(), run()
    set_grid_idx, seen = InterpreterBuilder.set_grid_idx, []

    def reversed_grid_idx(self, x, y, z):
        seen.append(x)
        set_grid_idx(self, self.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", reversed_grid_idx)
    third = run()
    assert max(seen) == 3
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert first[-1] == 14


@interpreted
def test_other_samples_do_not_matter():
    """A sample's bits are the same alone, and beside others of its prompt."""
    pattern = Row(11, (2, 5))
    query, key, value = (x.half() for x in make_inputs(pattern, 1, 18, 1, 16, 11))
    found = []
    for chosen in (slice(None), slice(3, 4)):
        samples = [x[chosen] for x in (query, key, value)]
        cache = make_cache(pattern, key[:1], value[:1], torch.tensor([9]), len(samples[0]), torch.float16, 11)
        steps = [[x[:, :, s : s + 1] for x in samples] for s in range(11, 21)]
        found.append(torch.cat([step(cache, *now, tiles=T16) for now in steps], dim=2))
    assert torch.equal(found[0][3:4], found[1])


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_op(dtype):
    """A whole image of shared prompts from packed projections, through the public function."""
    pattern, samples = Column(6, (4, 3)), 2
    qkv = torch.randn(2 * samples, pattern.seq_len, 3, 2, 16).to(dtype)
    qkv[:, :6] = qkv[::samples, :6].repeat_interleave(samples, dim=0)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    outs = []
    for backend in ("triton", "reference"):
        cache = KVCache(pattern, 2 * samples, 2, 16, num_prompts=2, dtype=dtype, device="cpu")
        cache.prefill(key[::samples, :, :6], value[::samples, :, :6], torch.tensor([6, 1]))
        steps = [[x[:, :, s : s + 1] for x in (query, key, value)] for s in range(6, pattern.seq_len)]
        outs.append(torch.cat([attention_with_kvcache(*now, cache, backend=backend) for now in steps], dim=2))
        assert cache.position == pattern.seq_len
    truth = reference.attention(
        *(x.double() for x in (query, key, value)), pattern, text_lens=torch.tensor([6, 6, 1, 1])
    )
    assert_within_budget(outs[0], outs[1], truth[:, :, 6:])


MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # its name came with Python 3.13


@interpreted
@pytest.mark.parametrize("axis", ["sample", "head", "query"])
def test_offsets_beyond_32_bits(axis):
    """In memory of which next to nothing is touched."""
    head_dim = 16
    batch, heads = {"sample": (3, 1), "head": (1, 3), "query": (3, 1)}[axis]
    width = 4 if axis == "query" else 2**26
    pattern = Full(0, (1, width))
    far = 2**30 if axis == "query" else heads * head_dim
    # Six tensors behind each other, and room before them where an offset that wrapped around would lead.
    origin, image, apart = 2**31, batch * heads * width * head_dim, batch * far + 64
    if axis != "query":
        assert image > 2**31
    memory = mmap.mmap(
        -1, 2 * (origin + 2 * image + 4 * apart), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    )
    arena = torch.frombuffer(memory, dtype=torch.float16)

    def view(begin: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        return torch.as_strided(arena, shape, strides, origin + begin)

    shape = batch, heads, 1, head_dim
    rings = [
        view(i * image, (batch, heads, width, head_dim), (heads * width * head_dim, width * head_dim, head_dim, 1))
        for i in range(2)
    ]
    apart_views = [view(2 * image + i * apart, shape, (far, head_dim, head_dim, 1)) for i in range(4)]
    near_rings = [torch.zeros(batch, heads, 4, head_dim, dtype=torch.float16) for _ in range(2)]
    near_views = [torch.zeros(shape, dtype=torch.float16) for _ in range(4)]
    text = torch.zeros(batch, heads, head_dim, 0, dtype=torch.float16)
    lens, results = torch.zeros(batch, dtype=torch.int64), []
    values = torch.randn(3, 3, *shape).half()
    for (ring_key, ring_value), views, code in (
        (rings, apart_views, pattern.code),
        (near_rings, near_views, Full(0, (1, 4)).code),
    ):
        held, found = torch.tensor(0), []
        for now in values:
            for place, value in zip(views[:3], now, strict=True):
                place.copy_(value)
            attend_step(
                *views[:3],
                text,
                text.mT,
                ring_key,
                ring_value,
                held,
                lens,
                views[3],
                pattern=code,
                scale=0.3,
                tiles=T16,
            )
            found.append(views[3].clone())
        results.append([*found, ring_key[:, :, :3].clone(), ring_value[:, :, :3].clone(), held])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert results[0][-1] == 3 and results[0][0].abs().min() > 0


@pytest.mark.skipif(INTERPRETED, reason="plain Python")
def test_one_grid_axis_for_any_number_of_samples():
    """The second axis of a CUDA grid ends at 65535."""
    pattern = Row(256, 32)
    x = torch.empty(70_000, 62, 1, 64, dtype=torch.float16, device="meta")
    image = torch.empty(70_000, 62, 33, 64, dtype=torch.float16, device="meta")
    text = torch.empty(7, 62, 64, 256, dtype=torch.float16, device="meta")
    number = torch.empty((), dtype=torch.int64, device="meta")
    launch = plan_step(
        x, x, x, text, text.mT, image, image, number, number, x, pattern=pattern.code, scale=0.125, device=H200
    )
    assert 65535 < launch.grid < 2**31
