"""Cached decoding against the training attention, prompt sharing, storage and messages."""

import re

import pytest
import torch
from helpers import every_pattern, needs_extension, pattern_id
from torch import Tensor

from dalle_fast import reference
from dalle_fast.ops.attention import attention
from dalle_fast.ops.kv_cache import KVCache, attention_with_kvcache
from dalle_fast.patterns import Column, Conv, Full, Pattern, Row

TEXT_LEN, GRID, HEADS, HEAD_DIM = 4, (3, 4), 2, 8
SEQ_LEN = 16


def make_cache(pattern: Pattern, batch: int = 2, dtype=torch.float64, **options) -> KVCache:
    return KVCache(pattern, batch, HEADS, HEAD_DIM, dtype=dtype, device="cpu", **options)


def make_inputs(batch: int, length: int = SEQ_LEN, dtype=torch.float64) -> list[Tensor]:
    return [3 * torch.randn(batch, HEADS, length, HEAD_DIM, dtype=dtype) for _ in range(3)]


def decode(cache: KVCache, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    """Every remaining position, one at a time."""
    steps = [
        attention_with_kvcache(*(x[:, :, s : s + 1] for x in (query, key, value)), cache, **options)
        for s in range(cache.position, query.shape[2])
    ]
    return torch.cat(steps, dim=2)


each_backend = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("auto", torch.float64),
        ("reference", torch.float64),
        ("auto", torch.float32),
        pytest.param("cpp", torch.float32, marks=needs_extension),
    ],
    ids=str,
)


@each_backend
@pytest.mark.parametrize("prefix", [TEXT_LEN, TEXT_LEN + 1, TEXT_LEN + 6, SEQ_LEN - 1])
@pytest.mark.parametrize("pattern", every_pattern(TEXT_LEN, GRID), ids=pattern_id)
def test_cached_equals_uncached(pattern, prefix, backend, dtype):
    query, key, value = make_inputs(2, dtype=dtype)
    for text_lens in (None, torch.tensor([0, 3])):
        cache = make_cache(pattern, dtype=dtype)
        cache.prefill(key[:, :, :prefix], value[:, :, :prefix], text_lens)
        out = decode(cache, query, key, value, backend=backend)
        expected = attention(query, key, value, pattern, text_lens=text_lens)[:, :, prefix:]
        torch.testing.assert_close(out, expected)
        assert cache.position == SEQ_LEN


@each_backend
@pytest.mark.parametrize("pattern", every_pattern(0, GRID), ids=pattern_id)
def test_without_text(pattern, backend, dtype):
    query, key, value = make_inputs(2, pattern.seq_len, dtype)
    out = decode(make_cache(pattern, dtype=dtype), query, key, value, backend=backend)
    torch.testing.assert_close(out, attention(query, key, value, pattern))


@each_backend
@pytest.mark.parametrize("prefix", [TEXT_LEN, TEXT_LEN + 3])
def test_shared_prompts(prefix, backend, dtype):
    pattern, samples = Row(TEXT_LEN, GRID), 3
    query, key, value = make_inputs(2 * samples, dtype=dtype)
    for tensor in (key, value):
        tensor[:, :, :prefix] = tensor[::samples, :, :prefix].repeat_interleave(samples, dim=0)
    text_lens = torch.tensor([1, 4])
    cache = make_cache(pattern, batch=2 * samples, num_prompts=2, dtype=dtype)
    cache.prefill(key[::samples, :, :prefix], value[::samples, :, :prefix], text_lens)
    out = decode(cache, query, key, value, backend=backend)
    lens = text_lens.repeat_interleave(samples)
    torch.testing.assert_close(out, attention(query, key, value, pattern, text_lens=lens)[:, :, prefix:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_16_and_32_bit(dtype):
    pattern = Row(TEXT_LEN, GRID)
    query, key, value = make_inputs(2, dtype=dtype)
    cache = make_cache(pattern, dtype=dtype)
    cache.prefill(key[:, :, :TEXT_LEN], value[:, :, :TEXT_LEN])
    out = decode(cache, query, key, value)
    truth = attention(query.double(), key.double(), value.double(), pattern)[:, :, TEXT_LEN:]
    whole = reference.attention(query, key, value, pattern)[:, :, TEXT_LEN:]
    eps = torch.finfo(dtype).eps
    assert out.dtype == dtype
    assert (out - truth).abs().max() <= 2 * ((whole - truth).abs().max() + eps * truth.abs().max())


@each_backend
def test_scale(backend, dtype):
    pattern = Row(TEXT_LEN, GRID)
    query, key, value = make_inputs(2, dtype=dtype)
    cache = make_cache(pattern, dtype=dtype)
    cache.prefill(key[:, :, :TEXT_LEN], value[:, :, :TEXT_LEN])
    out = decode(cache, query, key, value, scale=0.2, backend=backend)
    torch.testing.assert_close(out, attention(query, key, value, pattern, scale=0.2)[:, :, TEXT_LEN:])


def test_reset():
    pattern = Row(TEXT_LEN, GRID)
    query, key, value = make_inputs(2)
    cache = make_cache(pattern)
    cache.prefill(key, value, torch.tensor([0, 1]))
    assert cache.position == SEQ_LEN
    cache.reset()
    assert cache.position == 0
    cache.prefill(key[:, :, :TEXT_LEN], value[:, :, :TEXT_LEN])
    expected = attention(query, key, value, pattern)[:, :, TEXT_LEN:]
    torch.testing.assert_close(decode(cache, query, key, value), expected)


@pytest.mark.parametrize(("num_prompts", "texts"), [(None, 6), (6, 6), (2, 2), (1, 1)])
def test_nbytes(num_prompts, texts):
    cache = make_cache(Row(TEXT_LEN, GRID), batch=6, dtype=torch.bfloat16, num_prompts=num_prompts)
    assert cache.nbytes == 2 * HEADS * HEAD_DIM * 2 * (texts * TEXT_LEN + 6 * 5)


@pytest.mark.parametrize(
    ("pattern", "slots"),
    [
        (Full(256, 32), 1024),
        (Row(256, 32), 33),
        (Row(256, 32, variant="same_row"), 32),
        (Row(256, (1, 32)), 32),
        (Column(256, 32), 1024),
        (Conv(256, 32), 192),
        (Conv(256, 32, variant="clip"), 166),
        (Conv(256, 32, variant="torus"), 1024),
        (Conv(256, 32, variant="corner"), 331),
        (Conv(256, 32, kernel_size=63, variant="clip"), 1024),
    ],
    ids=lambda value: pattern_id(value) if isinstance(value, Pattern) else str(value),
)
def test_nbytes_of_the_papers_grid(pattern, slots):
    sizes = (pattern, 3, HEADS, HEAD_DIM)
    cache = KVCache(*sizes, num_prompts=1, dtype=torch.float16, device="cpu")
    assert cache.slots == slots
    assert cache.nbytes == 2 * HEADS * HEAD_DIM * 2 * (256 + 3 * slots)
    assert cache.nbytes == KVCache.nbytes_of(*sizes, 1, torch.float16)


def test_callers_tensors_are_copied():
    pattern = Row(TEXT_LEN, GRID)
    query, key, value = make_inputs(2)
    text_lens = torch.tensor([1, 2])
    cache = make_cache(pattern)
    prompt = [x[:, :, :TEXT_LEN].clone() for x in (key, value)]
    cache.prefill(*prompt, text_lens)
    expected = attention(query, key, value, pattern, text_lens=text_lens)[:, :, TEXT_LEN:]
    for tensor in (*prompt, text_lens):
        tensor.zero_()
    torch.testing.assert_close(decode(cache, query, key, value), expected)


def test_no_gradients_and_inference_mode():
    pattern = Row(TEXT_LEN, GRID)
    query, key, value = (x.requires_grad_() for x in make_inputs(2))
    with torch.inference_mode():
        cache = make_cache(pattern)
        cache.prefill(key[:, :, :TEXT_LEN], value[:, :, :TEXT_LEN])
    out = decode(cache, query, key, value)
    assert not out.requires_grad
    torch.testing.assert_close(out, attention(query, key, value, pattern).detach()[:, :, TEXT_LEN:])


def test_autocast_uses_the_caches_dtype():
    pattern = Row(TEXT_LEN, GRID)
    query, key, value = make_inputs(2, dtype=torch.float32)
    outs = []
    for enabled in (False, True):
        cache = make_cache(pattern, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            cache.prefill(key[:, :, :TEXT_LEN], value[:, :, :TEXT_LEN])
            outs.append(decode(cache, query, key, value))
    assert torch.equal(*outs)


CACHE_OPTIONS = {"dtype": torch.float32, "device": "cpu"}


@pytest.mark.parametrize(
    ("sizes", "options", "error", "message"),
    [
        (("row", 2, 2, 8), {}, TypeError, "pattern must be a Pattern, got str"),
        (
            (Row(4, 2), 2, 2, 8),
            {"dtype": torch.int32},
            TypeError,
            "dtype must be floating point, got torch.int32",
        ),
        ((Row(4, 2), 0, 2, 8), {}, ValueError, "batch must be >= 1, got 0"),
        ((Row(4, 2), 2, 0, 8), {}, ValueError, "num_heads must be >= 1, got 0"),
        ((Row(4, 2), 2, 2, 257), {}, ValueError, "head_dim must be in 1..256, got 257"),
        ((Row(4, 2), 2, 2, 8), {"num_prompts": 0}, ValueError, "num_prompts must be >= 1, got 0"),
        (
            (Row(4, 2), 6, 2, 8),
            {"num_prompts": 4},
            ValueError,
            "batch must be a multiple of num_prompts, got 6 and 4",
        ),
    ],
)
def test_cache_errors(sizes, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        KVCache(*sizes, **(CACHE_OPTIONS | options))


PROMPT = torch.zeros(2, HEADS, TEXT_LEN, HEAD_DIM)
STEP = torch.zeros(2, HEADS, 1, HEAD_DIM)


@pytest.mark.parametrize(
    ("key", "value", "text_lens", "error", "message"),
    [
        (PROMPT[:, :, :3], PROMPT[:, :, :3], None, ValueError, "key must have 4..16 positions, got 3"),
        (
            torch.zeros(2, HEADS, 17, HEAD_DIM),
            torch.zeros(2, HEADS, 17, HEAD_DIM),
            None,
            ValueError,
            "key must have 4..16 positions, got 17",
        ),
        (
            PROMPT,
            torch.zeros(2, HEADS, 5, HEAD_DIM),
            None,
            ValueError,
            "key, value must have one shape, got (2, 2, 4, 8), (2, 2, 5, 8)",
        ),
        (
            PROMPT[:1],
            PROMPT[:1],
            None,
            ValueError,
            "key must have shape (2, 2, S, 8) as the cache, got (1, 2, 4, 8)",
        ),
        (
            PROMPT[:, :1],
            PROMPT[:, :1],
            None,
            ValueError,
            "key must have shape (2, 2, S, 8) as the cache, got (2, 1, 4, 8)",
        ),
        (
            PROMPT.half(),
            PROMPT.half(),
            None,
            TypeError,
            "key must be torch.float32 as the cache, got torch.float16",
        ),
        (PROMPT.to("meta"), PROMPT.to("meta"), None, ValueError, "key must be on cpu as the cache, got meta"),
        (PROMPT, PROMPT, torch.tensor([1]), ValueError, "text_lens must have shape (2,), got (1,)"),
        (PROMPT, PROMPT, torch.tensor([1, 5]), ValueError, "text_lens must lie in 0..4, got 1..5"),
    ],
)
def test_prefill_errors(key, value, text_lens, error, message):
    cache = make_cache(Row(TEXT_LEN, GRID), dtype=torch.float32)
    with pytest.raises(error, match=re.escape(message)):
        cache.prefill(key, value, text_lens)
    assert cache.position == 0


def test_prefill_of_a_filled_cache():
    cache = make_cache(Row(TEXT_LEN, GRID), dtype=torch.float32)
    cache.prefill(PROMPT, PROMPT)
    message = "prefill needs an empty cache, got one with 4 positions: call reset()"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        cache.prefill(PROMPT, PROMPT)


def test_step_before_prefill():
    cache = make_cache(Row(TEXT_LEN, GRID), dtype=torch.float32)
    message = "the cache must hold the 4 text positions first: call prefill()"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        attention_with_kvcache(STEP, STEP, STEP, cache)


def test_more_tokens_than_the_cache_holds():
    cache = make_cache(Row(TEXT_LEN, GRID), dtype=torch.float32)
    whole = torch.zeros(2, HEADS, SEQ_LEN, HEAD_DIM)
    cache.prefill(whole, whole)
    message = "the cache is full, it holds all 16 positions: call reset()"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        attention_with_kvcache(STEP, STEP, STEP, cache)


@pytest.mark.parametrize(
    ("tensors", "options", "error", "message"),
    [
        (
            (STEP[:1],) * 3,
            {},
            ValueError,
            "query must have shape (2, 2, S, 8) as the cache, got (1, 2, 1, 8)",
        ),
        (
            (STEP[:, :1],) * 3,
            {},
            ValueError,
            "query must have shape (2, 2, S, 8) as the cache, got (2, 1, 1, 8)",
        ),
        (
            (STEP[..., :4],) * 3,
            {},
            ValueError,
            "query must have shape (2, 2, S, 8) as the cache, got (2, 2, 1, 4)",
        ),
        (
            (STEP.double(),) * 3,
            {},
            TypeError,
            "query must be torch.float32 as the cache, got torch.float64",
        ),
        ((STEP.long(),) * 3, {}, TypeError, "query must be floating point, got torch.int64"),
        (
            (STEP, STEP, STEP.double()),
            {},
            TypeError,
            "query, key, value must have one dtype, got torch.float32, torch.float32, torch.float64",
        ),
        ((PROMPT,) * 3, {}, ValueError, "query, key, value must have 1 position, got 4"),
        (
            (STEP, STEP, PROMPT),
            {},
            ValueError,
            "query, key, value must have one shape, got (2, 2, 1, 8), (2, 2, 1, 8), (2, 2, 4, 8)",
        ),
        ((STEP,) * 3, {"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        (
            (STEP, STEP, STEP.new_zeros(2, HEADS, 1, 2 * HEAD_DIM)[..., ::2]),
            {},
            ValueError,
            "value must have a contiguous last dimension, got strides (32, 16, 16, 2)",
        ),
        (
            (STEP,) * 3,
            {"backend": "triton"},
            RuntimeError,
            'backend="triton" is not available: ',
        ),
    ],
)
def test_step_errors(tensors, options, error, message):
    cache = make_cache(Row(TEXT_LEN, GRID), dtype=torch.float32)
    cache.prefill(PROMPT, PROMPT)
    with pytest.raises(error, match=re.escape(message)):
        attention_with_kvcache(*tensors, cache, **options)
    assert cache.position == TEXT_LEN


@needs_extension
def test_dtypes_of_the_kernels():
    cache = make_cache(Row(TEXT_LEN, GRID))
    cache.prefill(*(PROMPT.double(),) * 2)
    message = (
        'backend "cpp" of attention_with_kvcache takes float32, float16 and bfloat16, got torch.float64; '
        'use backend="reference"'
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        attention_with_kvcache(*(STEP.double(),) * 3, cache, backend="cpp")
    assert cache.position == TEXT_LEN


def test_step_with_something_else():
    with pytest.raises(TypeError, match="cache must be a KVCache, got dict"):
        attention_with_kvcache(STEP, STEP, STEP, {})
