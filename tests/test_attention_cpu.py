"""The C++ attention kernels at every CPU level: the error budget over shapes, poisoned memory, strides, threads."""

import itertools
import math
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import (
    AttentionBudget,
    assert_attention_within_budget,
    attention_formulas,
    every_pattern,
    needs_extension,
    pattern_id,
)
from torch import Tensor

from dalle_fast.ops import backends
from dalle_fast.ops.attention import attention
from dalle_fast.patterns import Column, Conv, Full, Pattern, Row

pytestmark = [needs_extension, pytest.mark.usefixtures("one_thread")]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=["scalar", "avx2", "avx512", "avx512_bf16"])
def level(request):
    """Runs the test at each CPU level that this machine has."""
    extension = backends.load_extension()
    before = extension.build_info()["cpu_level"]
    if request.param not in extension.build_info()["cpu_levels"]:
        pytest.skip(f"cpu level {request.param} is not compiled for this kind of CPU")
    try:
        extension.set_cpu_level(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    extension.set_cpu_level(before)


@pytest.fixture
def two_threads(one_thread):
    """torch runs on two threads."""
    torch.set_num_threads(2)


def patterns(text_len: int, grid: int | tuple[int, int]) -> list[Pattern]:
    """Every kind and variant, and convolutions with kernels beyond the grid and with dilation."""
    wide = max(every_pattern(text_len, grid)[0].grid) * 2 + 1
    return [
        *every_pattern(text_len, grid),
        Conv(text_len, grid, kernel_size=wide),
        Conv(text_len, grid, kernel_size=wide, variant="clip"),
        Conv(text_len, grid, kernel_size=wide, variant="torus"),
        Conv(text_len, grid, kernel_size=wide, variant="corner"),
        Conv(text_len, grid, kernel_size=5, dilation=3),
        Conv(text_len, grid, kernel_size=3, variant="torus", dilation=2),
        Conv(text_len, grid, kernel_size=4, variant="corner", dilation=2),
    ]


def make_tensors(dtype, batch, heads, length, head_dim, *, key_heads=None, size=2.0) -> list[Tensor]:
    """Query, key, value and the gradients of out and lse; scores of about +-size^2 tell a wrong mask."""
    key_heads = heads if key_heads is None else key_heads
    tensors = [torch.randn(batch, h, length, head_dim) for h in (heads, key_heads, key_heads, heads)]
    for tensor in tensors[:2]:
        tensor *= size / head_dim**0.25
    return [*(tensor.to(dtype) for tensor in tensors), torch.randn(batch, heads, length)]


def nan_like(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, math.nan)


def run_kernels(tensors, pattern, text_lens=None, scale=None, *, like=nan_like) -> list[Tensor]:
    """out, lse, dq, dk, dv of the bare kernels, written over NaN; ``like`` makes what they write to."""
    query, key, value, grad_out, grad_lse = tensors
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, lse = like(query), torch.full(query.shape[:3], math.nan)
    grads = [like(query), like(key), like(value)]
    common = (text_lens, pattern.code, scale)
    torch.ops.dalle_fast.attention_forward_cpu(query, key, value, *common, out, lse)
    torch.ops.dalle_fast.attention_backward_cpu(query, key, value, out, lse, grad_out, grad_lse, *common, *grads)
    return [out, lse, *grads]


def run_and_check(tensors, pattern, **options) -> list[Tensor]:
    results = run_kernels(tensors, pattern, **options)
    assert_attention_within_budget(results, tensors, pattern, **options)
    return results


def assert_same_bits(actual, expected) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@cache
def kept_case(dtype, pattern, length, head_dim=16, batch=1, heads=1, text_lens=None, edit=None) -> tuple:
    """Inputs, text_lens as a tensor, what plain PyTorch gives, float64; made once for all levels."""
    with torch.random.fork_rng():
        tensors = make_tensors(dtype, batch, heads, length, head_dim)
    if edit is not None:
        edit(tensors)
    lens = None if text_lens is None else torch.tensor(text_lens)
    truth = attention_formulas(*(tensor.double() for tensor in tensors), pattern, lens)
    return tensors, lens, attention_formulas(*tensors, pattern, lens), truth


def check_kept_cases(dtype, *cases) -> None:
    """Hold the kernels to the budget over these cases together."""
    budget = AttentionBudget()
    for pattern, options in cases:
        tensors, text_lens, peer, truth = kept_case(dtype, pattern, **options)
        budget.add_results(run_kernels(tensors, pattern, text_lens), peer, truth)
    budget.check()


@each_dtype
@pytest.mark.parametrize(
    ("text_len", "grid"),
    [
        (0, (4, 4)),
        (1, (1, 1)),
        (15, (1, 5)),
        (16, (5, 1)),
        (17, (3, 7)),
        (40, (5, 3)),
        (0, (2, 20)),
        (1, (3, 33)),
        (15, (6, 17)),
        (16, (20, 2)),
        (0, (1, 35)),
        (17, (34, 1)),
        (40, (8, 8)),
        (0, (7, 16)),
    ],
)
def test_shapes_and_patterns(level, dtype, text_len, grid):
    cases = []
    for number, pattern in enumerate(patterns(text_len, grid)):
        options = {"length": pattern.seq_len, "batch": 2, "heads": 4, "head_dim": 20 if number % 2 else 16}
        options["text_lens"] = (text_len // 2, text_len) if number % 3 == 0 else None
        cases.append((pattern, options))
    check_kept_cases(dtype, *cases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", patterns(18, (3, 6)), ids=pattern_id)
def test_every_prefix(pattern, dtype):
    budget = AttentionBudget()
    for length in range(1, pattern.seq_len + 1):
        tensors = make_tensors(dtype, 4, 2, length, 9)
        for text_lens in (None, torch.tensor([length % 19, 0, 18, 17])):
            budget.add(run_kernels(tensors, pattern, text_lens), tensors, pattern, text_lens=text_lens)
    budget.check()


@each_dtype
@pytest.mark.parametrize("head_dim", [1, 2, 7, 8, 16, 20, 31, 33, 64, 80, 127, 128, 256])
def test_head_sizes(level, dtype, head_dim):
    budget = AttentionBudget()
    for pattern in (Row(17, (3, 5)), Full(3, (6, 6))):
        tensors = make_tensors(dtype, 2, 4, pattern.seq_len, head_dim)
        budget.add(run_kernels(tensors, pattern), tensors, pattern)
    budget.check()


def reaches_far(pattern: Pattern) -> Pattern:
    """``pattern``, of which some row must see more keys than the 512 of one step of the softmax."""
    assert int(pattern.dense().sum(-1).max()) > 512
    return pattern


@each_dtype
@pytest.mark.parametrize(
    ("pattern", "length"),
    [
        (Row(600, (2, 3)), 606),
        (Column(530, (3, 20)), 590),
        (Full(3, (23, 30)), 693),
        (Full(0, (23, 23)), 529),
        (Column(5, (520, 2)), 1045),
        (Conv(0, (24, 28), kernel_size=47, variant="clip"), 672),
        (Conv(7, (24, 28), kernel_size=40, variant="corner"), 679),
        (Conv(500, (5, 9), kernel_size=7), 545),
    ],
    ids=lambda value: pattern_id(value) if isinstance(value, Pattern) else str(value),
)
def test_rows_of_many_keys(level, dtype, pattern, length):
    check_kept_cases(dtype, (reaches_far(pattern), {"length": length}))
    if pattern.text_len:
        check_kept_cases(dtype, (pattern, {"length": length, "text_lens": (pattern.text_len * 3 // 4,)}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make_pattern", [Row, Column, Conv])
def test_shape_of_the_paper(dtype, make_pattern):
    # A text key is seen by up to 1280 queries: long sums, too, must be as exact as PyTorch's.
    pattern = make_pattern(256, 32)
    tensors = make_tensors(dtype, 1, 2, pattern.seq_len, 64)
    run_and_check(tensors, pattern)


def lower_the_second_row(tensors: list[Tensor]) -> None:
    """Put the scores of the second row of 600 far below those of the first."""
    query, key, *_ = tensors
    row = slice(query.shape[2] - 32, None)
    query[:, :, row] = 0.0
    query[:, :, row, 0] = -200.0  # alone: every order of summation gives the same scores
    key[:, :, row] = 30.0


@each_dtype
@pytest.mark.parametrize("text_len", [0, 3])
def test_first_keys_all_hidden_from_some_queries(level, dtype, text_len):
    # 600 = 37 * 16 + 8: 16 queries in a row share 608 keys, of which eight queries see the last eight alone.
    pattern = Row(text_len, (2, 600), variant="same_row")
    options = {"length": text_len + 632, "heads": 4}
    check_kept_cases(dtype, (pattern, options))
    if text_len:
        check_kept_cases(dtype, (pattern, options | {"text_lens": (0,)}))
    # What a query does not see must not count as its maximum.
    check_kept_cases(dtype, (pattern, options | {"edit": lower_the_second_row}))


PAIR_GRIDS = [(1, 1), (1, 6), (6, 1), (2, 3), (3, 2), (4, 4), (5, 3), (3, 8), (2, 18), (18, 2)]


@pytest.mark.parametrize("text_len", [0, 3, 17])
@pytest.mark.parametrize("grid", PAIR_GRIDS, ids=str)
def test_every_pair(text_len, grid):
    kinds = [Full(text_len, grid), Row(text_len, grid), Row(text_len, grid, variant="same_row"), Column(text_len, grid)]
    variants = ("raster", "clip", "torus", "corner")
    for variant, size, dilation in itertools.product(variants, (1, 2, 3, 4, 5, 9), (1, 2, 3)):
        if size % 2 or variant == "corner":
            kinds.append(Conv(text_len, grid, kernel_size=size, variant=variant, dilation=dilation))
    for pattern in kinds:
        length = pattern.seq_len
        # One-hot values and gradients show the weights themselves, one-hot queries and keys their gradients.
        one_hot, random = torch.eye(length), torch.randn(4, length, length)
        shows_weights = [random[0], random[1], one_hot, one_hot]
        shows_gradients = [one_hot, one_hot, random[2], random[3]]
        tensors = [torch.stack(pair)[:, None] for pair in zip(shows_weights, shows_gradients, strict=True)]
        tensors.append(torch.randn(2, 1, length))
        for text_lens in (None, torch.tensor([text_len // 2]), torch.tensor([0])):
            mask = pattern.dense()
            if text_lens is not None:
                mask[:, int(text_lens) : text_len] = False
                text_lens = text_lens.expand(2).contiguous()
            out, _, grad_query, grad_key, grad_value = run_kernels(tensors, pattern, text_lens, 0.1)
            assert torch.equal(out[0, 0] != 0, mask)
            assert torch.equal(grad_value[0, 0].T != 0, mask)
            assert torch.equal(grad_query[1, 0] != 0, mask)
            assert torch.equal(grad_key[1, 0].T != 0, mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_value_passes(level, dtype):
    # One position sees itself alone: the output is its value, the value's gradient is the output's.
    words = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(256, 1, 1, 256)
    everything = words.view(dtype)
    query, key = torch.randn(2, *everything.shape).to(dtype)
    tensors = [query, key, everything, torch.zeros_like(query), torch.zeros(256, 1, 1)]
    out = run_kernels(tensors, Full(0, 1))[0]
    expected = everything
    if dtype == torch.bfloat16 and level == "avx512_bf16":
        # The CPU's product of bfloat16 pairs takes denormal numbers as 0.
        expected = everything.masked_fill(everything.abs() < torch.finfo(dtype).tiny, 0.0)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    tensors = [query, key, torch.zeros_like(query), everything, torch.zeros(256, 1, 1)]
    grad_value = run_kernels(tensors, Full(0, 1))[4]
    torch.testing.assert_close(grad_value, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_value_as_a_key(level, dtype):
    # A query of one 1 meets a key of one value, and the other way round: lse is that value.
    words = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    everything = words.view(dtype)
    # Scores are to stay above the -1e30 of a key that is not seen, in units of log2.
    everything = everything[everything.abs() < 6e29].view(-1, 1, 1, 1)
    ones, zeros = torch.ones_like(everything), torch.zeros_like(everything)
    rows = torch.zeros(len(everything), 1, 1)
    truth = everything.double().flatten()
    for query, key in ((ones, everything), (everything, ones)):
        lse = run_kernels([query, key, zeros, zeros, rows], Full(0, 1), scale=1.0)[1].flatten()
        # Five roundings: of factor, product and logarithm, and of both constants.
        assert ((lse - truth).abs() <= 2.5 * torch.finfo(torch.float32).eps * truth.abs().clamp(min=1)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_are_rounded_to_nearest(level, dtype):
    # Two keys of equal weight: the output is their mean, here of every magnitude, with and without cancellation.
    pattern = Full(2, 1)
    size = torch.logspace(-7.6, 4.5, 256, dtype=torch.float64)
    value = (torch.randn(64, 1, 3, 256, dtype=torch.float64) * size).clamp(-6e4, 6e4).to(dtype)
    value[:, :, 2] = 0
    zeros = torch.zeros_like(value)
    out = run_kernels([zeros, zeros, value, zeros, torch.zeros(64, 1, 3)], pattern)[0][:, :, 1]
    truth = value[:, :, :2].double().mean(2)
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(truth.abs().clamp(min=info.tiny)))
    spacing = torch.exp2(exponent) * info.eps
    assert ((out - truth).abs() <= 0.5 * spacing + 5e-7 * value.double().abs().amax(2)).all()


@each_dtype
def test_overflow_becomes_infinite(level, dtype):
    # Each of 17 queries puts the largest number on the first value's gradient.
    largest = torch.finfo(dtype).max
    zeros = torch.zeros(1, 1, 17, 8, dtype=dtype)
    grad_out = torch.full_like(zeros, largest)
    tensors = [zeros, zeros, zeros, grad_out, torch.zeros(1, 1, 17)]
    grad_value = run_kernels(tensors, Full(17, 1))[4]
    # The n-th key is seen by 17 - n queries of weight 1/n, 1/(n + 1), ...
    sums = torch.tensor([sum(1 / n for n in range(first, 18)) for first in range(1, 18)], dtype=torch.float64)
    overflows = sums > 1 + torch.finfo(dtype).eps
    assert (grad_value[0, 0, overflows] == math.inf).all()
    assert grad_value[0, 0, ~overflows].isfinite().all()


class Padded:
    """Makes tensors in the middle of NaN, with NaN between rows, heads and samples."""

    def __init__(self, row_stride: int | None = None, permuted: bool = False):
        self.row_stride = row_stride
        self.permuted = permuted
        self.made: list[tuple[Tensor, Tensor]] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        """A tensor of NaN like ``tensor``, with other strides."""
        batch, heads, length, head_dim = tensor.shape
        row = head_dim + 3 if self.row_stride is None else self.row_stride
        if self.permuted:  # (B, S, H, D)
            strides = ((length + 1) * heads * row, row, heads * row, 1)
        else:
            strides = ((heads * (length + 2) + 1) * row, (length + 2) * row, row, 1)
        memory = torch.full((batch * strides[0] + 4 * row,), math.nan, dtype=tensor.dtype)
        made = memory[2 * row :].as_strided(tensor.shape, strides, 2 * row)
        self.made.append((memory, made))
        return made

    def hold(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor``."""
        made = self(tensor)
        made.copy_(tensor)
        return made

    def assert_untouched(self) -> None:
        """The NaN around is still there."""
        for memory, made in self.made:
            assert made.isfinite().all()
            made.fill_(math.nan)
            assert memory.isnan().all()


LAYOUTS = [
    (16, {}),
    (20, {"row_stride": 32}),
    (64, {"row_stride": 64}),
    (80, {"row_stride": 128}),
    (33, {"permuted": True}),
]


@each_dtype
@pytest.mark.parametrize(("head_dim", "layout"), LAYOUTS, ids=str)
def test_nothing_around_is_read_or_written(level, dtype, head_dim, layout):
    conv = Conv(33, (6, 6), kernel_size=3, variant="clip")
    for pattern in (Full(19, (5, 7)), Row(19, (5, 7)), Column(0, (17, 3)), conv):
        for length in (pattern.seq_len, 21):
            *tensors, grad_lse = make_tensors(dtype, 2, 4, length, head_dim, key_heads=2)
            for text_lens in (None, torch.tensor([pattern.text_len, pattern.text_len // 2])):
                expected = run_kernels([*tensors, grad_lse], pattern, text_lens)
                padded = Padded(**layout)
                held = [padded.hold(tensor) for tensor in tensors]
                assert_same_bits(run_kernels([*held, grad_lse], pattern, text_lens, like=padded), expected)
                padded.assert_untouched()


@each_dtype
def test_lse_is_written_and_read_in_place(level, dtype):
    pattern = Row(5, (3, 7))
    tensors = make_tensors(dtype, 2, 3, pattern.seq_len, 8)
    query, key, value, grad_out, grad_lse = tensors
    out, expected_lse, *expected = run_kernels(tensors, pattern)
    memories = torch.full((2, 2, *expected_lse.shape[1:]), math.nan).flatten().repeat(2).view(2, -1)
    lse, held = (memory[7 : 7 + expected_lse.numel()].view_as(expected_lse) for memory in memories)
    held.copy_(grad_lse)
    scale = query.shape[-1] ** -0.5
    torch.ops.dalle_fast.attention_forward_cpu(query, key, value, None, pattern.code, scale, nan_like(out), lse)
    assert torch.equal(lse, expected_lse)
    grads = [nan_like(query), nan_like(key), nan_like(value)]
    torch.ops.dalle_fast.attention_backward_cpu(
        query, key, value, out, lse, grad_out, held, None, pattern.code, scale, *grads
    )
    assert_same_bits(grads, expected)
    lse.fill_(math.nan)
    held.fill_(math.nan)
    assert memories.isnan().all()
    # lse may be left out.
    again = nan_like(out)
    torch.ops.dalle_fast.attention_forward_cpu(query, key, value, None, pattern.code, scale, again, None)
    assert torch.equal(again, out)


@each_dtype
@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("pattern", every_pattern(40, (4, 9)), ids=pattern_id)
def test_hidden_text_does_not_leak(level, dtype, head_dim, pattern):
    text_lens = torch.tensor([0, 1, 15, 16, 17, 32, 39, 40])
    tensors = make_tensors(dtype, 8, 1, pattern.seq_len, head_dim)
    clean = run_and_check(tensors, pattern, text_lens=text_lens)
    query, key, value, *grads = tensors
    position = torch.arange(pattern.seq_len)
    hidden = ((position >= text_lens[:, None]) & (position < 40))[:, None, :, None]
    for poison in (math.nan, math.inf, -math.inf):
        poisoned = [query, key.masked_fill(hidden, poison), value.masked_fill(hidden, poison), *grads]
        assert_same_bits(run_kernels(poisoned, pattern, text_lens), clean)
    for grad in clean[3:]:
        assert (grad.masked_select(hidden) == 0).all()


@each_dtype
def test_strides_beyond_32_bits(dtype):
    # Samples and rows reach beyond 2^31 elements, in files of which only the touched pages take memory.
    pattern = Column(5, (4, 5))
    strides = (2**31 + 192, 2**30 + 128, 2**27 + 64, 1)
    *tensors, grad_lse = make_tensors(dtype, 2, 2, pattern.seq_len, 64)
    size = sum((extent - 1) * stride for extent, stride in zip(tensors[0].shape, strides, strict=True)) + 1
    expected = run_kernels([*tensors, grad_lse], pattern)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:

        def spread(tensor: Tensor) -> Tensor:
            path = f"{folder}/{len(os.listdir(folder))}"
            memory = torch.from_file(path, shared=True, size=size, dtype=dtype)
            return memory.as_strided(tensor.shape, strides).fill_(math.nan)

        far = [spread(tensor).copy_(tensor) for tensor in tensors]
        assert_same_bits(run_kernels([*far, grad_lse], pattern, like=spread), expected)


@each_dtype
def test_stride_0(level, dtype):
    pattern = Row(5, (3, 7))
    query, key, value, grad_out, grad_lse = make_tensors(dtype, 2, 4, pattern.seq_len, 16)
    views = [
        query[:1].expand(2, -1, -1, -1),
        key[:, :1].expand(-1, 4, -1, -1),
        value[:, :, :1].expand(-1, -1, pattern.seq_len, -1),
        grad_out[:1, :1, :1, :1].expand_as(query),
    ]
    expected = run_kernels([*(view.contiguous() for view in views), grad_lse], pattern)
    assert_same_bits(run_kernels([*views, grad_lse], pattern, like=lambda x: nan_like(x.contiguous())), expected)
    across = grad_out.mT.contiguous().mT
    expected = run_kernels([query, key, value, grad_out, grad_lse], pattern)
    assert_same_bits(run_kernels([query, key, value, across, grad_lse], pattern), expected)


@each_dtype
@pytest.mark.parametrize("head_dim", [16, 33, 64])
def test_packed_views(level, dtype, head_dim):
    pattern = Column(5, (3, 7))
    length = pattern.seq_len
    *tensors, grad_lse = make_tensors(dtype, 2, 3, length, head_dim)
    expected = run_kernels([*tensors, grad_lse], pattern)
    packed = torch.stack([tensor.transpose(1, 2) for tensor in tensors[:3]], 2)
    views = packed.permute(2, 0, 3, 1, 4).unbind(0)
    grad_packed = nan_like(packed)
    into = [torch.full((2, length, 3, head_dim), math.nan, dtype=dtype).transpose(1, 2)]
    into += grad_packed.permute(2, 0, 3, 1, 4).unbind(0)
    places = iter(into)
    results = run_kernels([*views, tensors[3], grad_lse], pattern, like=lambda _: next(places))
    assert_same_bits(results, expected)
    assert grad_packed.isfinite().all()


@each_dtype
@pytest.mark.parametrize(("heads", "key_heads"), [(6, 1), (6, 2), (6, 3), (6, 6), (1, 1), (5, 1)])
def test_grouped_heads(level, dtype, heads, key_heads):
    budget = AttentionBudget()
    for pattern, batch in itertools.product((Row(17, (3, 5)), Full(3, (6, 6)), Column(0, (17, 3))), (1, 2, 3)):
        tensors = make_tensors(dtype, batch, heads, pattern.seq_len, 12, key_heads=key_heads)
        budget.add(run_kernels(tensors, pattern), tensors, pattern)
    budget.check()


@each_dtype
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5])
def test_few_heads(dtype, heads, two_threads):
    # The backward pass cuts few heads into several runs of tiles, the forward pass into as many as keep threads busy.
    budget = AttentionBudget()
    for length in (1, 16, 17, 40, 64, 143, 245):
        for pattern in (Full(20, (15, 15)), Conv(20, (15, 15), kernel_size=5)):
            tensors = make_tensors(dtype, 1, heads, length, 16)
            results = run_kernels(tensors, pattern)
            budget.add(results, tensors, pattern)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                assert_same_bits(run_kernels(tensors, pattern), results)
    budget.check()


@pytest.mark.parametrize("scale", [0.0, -0.7, 1e-3, 5.0])
def test_scales(level, scale):
    pattern = Row(5, (3, 7))
    for dtype in DTYPES:
        run_and_check(make_tensors(dtype, 2, 4, pattern.seq_len, 16, size=1.0), pattern, scale=scale)


def test_no_scale_is_one_by_the_root_of_the_head_size():
    pattern = Row(5, (3, 7))
    for head_dim in (1, 7, 64, 80):
        query, key, value, *_ = make_tensors(torch.float32, 1, 2, pattern.seq_len, head_dim)
        out = attention(query, key, value, pattern, backend="cpp")
        assert torch.equal(out, attention(query, key, value, pattern, scale=1 / math.sqrt(head_dim), backend="cpp"))


def test_many_plans(two_threads):
    # More patterns and lengths than are remembered, met again and again, from several threads at once.
    work, budget = [], AttentionBudget()
    for pattern in (*patterns(3, (4, 6)), *every_pattern(20, (5, 3))):
        tensors = make_tensors(torch.float32, 1, 2, pattern.seq_len - 4, 8)
        work.append((tensors, pattern, run_kernels(tensors, pattern)))
        budget.add(work[-1][2], tensors, pattern)
    budget.check()

    def work_off(offset: int) -> None:
        for index in range(len(work)):
            tensors, pattern, expected = work[(index * 7 + offset) % len(work)]
            assert_same_bits(run_kernels(tensors, pattern), expected)

    work_off(0)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work_off, offset) for offset in (0, 0, 11, 17)]:
            done.result()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": [0, 1, 2]}, "pattern must have 6 numbers, got 3"),
        ({"text_lens": torch.zeros(2, dtype=torch.int32)}, "text_lens must have dtype Long, got Int"),
        ({"text_lens": torch.zeros(4, dtype=torch.int64)[::2]}, "text_lens must be contiguous, got shape"),
        ({"dtype": torch.float64}, "query must be float32, float16 or bfloat16, got Double"),
        ({"lse": torch.zeros(2, 1, 4, dtype=torch.float64)}, "lse must have dtype Float, got Double"),
        ({"lse": torch.zeros(2, 1, 8)[..., ::2]}, "lse must be contiguous, got shape"),
    ],
)
def test_bare_op_errors(change, message):
    x = torch.zeros(2, 1, 4, 8, dtype=change.get("dtype", torch.float32))
    lse = change.get("lse", torch.zeros(2, 1, 4))
    common = (change.get("text_lens"), change.get("pattern", Full(0, 2).code), 1.0)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dalle_fast.attention_forward_cpu(x, x, x, *common, x.clone(), lse)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dalle_fast.attention_backward_cpu(x, x, x, x, lse, x, None, *common, x.clone(), x.clone(), x.clone())


def nan_of(bits: int) -> Tensor:
    """A float32 NaN with these bits."""
    return torch.tensor(bits - (bits >> 31 << 32), dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, 0xFFD12345], ids=hex)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_nan_is_passed_on(level, dtype, bits):
    # GPUs make other NaN than CPUs do.
    pattern = Full(4, (3, 8))
    positions = range(pattern.seq_len)
    # Which rows of out, lse and dq, and of dk and dv: a query's own and those it sees, or those that see a key and all.
    for number, row, queries, keys in ((0, 20, [20], positions[:21]), (1, 9, positions[9:], positions)):
        tensors = make_tensors(torch.float32, 1, 2, pattern.seq_len, 16)
        tensors[number][0, 1, row, 3] = nan_of(bits)
        tensors = [*(tensor.to(dtype) for tensor in tensors[:4]), tensors[4]]
        assert tensors[number].isnan().sum() == 1
        out, lse, *grads = run_kernels(tensors, pattern)
        for one in (out, lse):
            expected = torch.zeros(one.shape, dtype=torch.bool)
            expected[0, 1, queries] = True
            assert torch.equal(one.isnan(), expected)
        for grad, rows in zip(grads, (queries, keys, keys), strict=True):
            assert grad[0, 1, rows].isnan().any(-1).all()
            assert not grad[0, 0].isnan().any()


@each_dtype
def test_scores_below_any_threshold(level, dtype):
    """Of 16 and more keys, all of the same very low score: the mean of those that are seen, and of no other."""
    pattern = Full(0, (2, 20))
    size = 2.0**7 if dtype == torch.float16 else 2.0**60
    query, key = torch.full((2, 1, 1, pattern.seq_len, 16), size, dtype=dtype).unbind()
    value, grad_out = torch.randn(2, 1, 1, pattern.seq_len, 16).to(dtype).unbind()
    out, _, *grads = run_kernels([-query, key, value, grad_out, torch.zeros(1, 1, pattern.seq_len)], pattern, scale=1.0)
    seen = torch.ones(pattern.seq_len, pattern.seq_len, dtype=torch.float64).tril()
    mean = seen / seen.sum(-1, keepdim=True) @ value.double()
    torch.testing.assert_close(out.double(), mean, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert all(torch.isfinite(grad).all() for grad in grads[2:])


def test_scores_of_minus_infinity(level):
    """A key whose score is -inf has no weight, also where it is the first of many."""
    pattern = Row(3, (4, 20))
    tensors = make_tensors(torch.float32, 1, 1, pattern.seq_len, 4)
    tensors[0][..., 0], tensors[1][..., 0] = -1.0, 0.0
    tensors[1][0, 0, :2, 0] = math.inf
    out, lse, _, _, grad_value = run_kernels(tensors, pattern)
    finite = [tensor.clone() for tensor in tensors]
    finite[1][0, 0, :2, 0] = 1e30  # its weight is 0, too
    expected = run_kernels(finite, pattern)
    for one, other in ((out, expected[0]), (lse, expected[1]), (grad_value[:, :, 2:], expected[4][:, :, 2:])):
        assert torch.equal(one[:, :, 2:], other[:, :, 2:])
        assert torch.isfinite(one[:, :, 2:]).all()


def test_dilation_beyond_every_grid():
    pattern = Conv(2, (3, 4), kernel_size=11, variant="clip", dilation=2**61)
    alike = Conv(2, (3, 4), kernel_size=11, variant="clip", dilation=100)
    tensors = make_tensors(torch.float32, 1, 1, pattern.seq_len, 8)
    assert_same_bits(run_kernels(tensors, pattern), run_kernels(tensors, alike))


def test_a_prefix_of_a_huge_grid():
    """What is planned follows the prefix, not the grid."""
    for make in (Row, Column, Conv):
        huge, small = make(2, (2**20, 2**11)), make(2, (1, 2**11))
        tensors = make_tensors(torch.float32, 1, 1, 7, 8)
        assert_same_bits(run_kernels(tensors, huge), run_kernels(tensors, small))
