"""The C++ decoding step at every CPU level: the error budget over shapes, poisoned memory, strides, bits by batch."""

import math
import re
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import pytest
import torch
from helpers import assert_within_budget, every_pattern, needs_extension, pattern_id
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dalle_fast import reference
from dalle_fast.ops.kv_cache import KVCache, attention_with_kvcache, bind_attention
from dalle_fast.patterns import Column, Conv, Full, Pattern, Row

pytestmark = [needs_extension, pytest.mark.usefixtures("one_thread")]


class Kind(NamedTuple):
    """Dtype of the cache, and of queries, keys, values and results."""

    cache: torch.dtype
    step: torch.dtype


KINDS = (
    Kind(torch.float32, torch.float32),
    Kind(torch.float16, torch.float16),
    Kind(torch.bfloat16, torch.bfloat16),
    Kind(torch.float16, torch.float32),
    Kind(torch.bfloat16, torch.float32),
)


def kind_id(kind: Kind) -> str:
    return "-".join(str(dtype).removeprefix("torch.") for dtype in kind)


each_kind = pytest.mark.parametrize("kind", KINDS, ids=kind_id)


class Case(NamedTuple):
    """Images to decode.

    Args:
        samples: of a prompt.
        text_lens: a prompt each.
        prefix: image positions that are there before the first step, alike in all samples of a prompt.
    """

    pattern: Pattern
    head_dim: int
    heads: int = 2
    prompts: int = 1
    samples: int = 2
    text_lens: tuple[int, ...] | None = None
    prefix: int = 0
    size: float = 2.0

    @property
    def batch(self) -> int:
        return self.prompts * self.samples

    @property
    def start(self) -> int:
        """Position of the first step."""
        return self.pattern.text_len + self.prefix


def make_tensors(kind: Kind, case: Case) -> list[Tensor]:
    """Query, key and value of whole sequences; scores of about +-size^2 tell a wrong mask."""
    shape = (case.batch, case.heads, case.pattern.seq_len, case.head_dim)
    tensors = [torch.randn(shape) for _ in range(3)]
    for tensor in tensors[:2]:
        tensor *= case.size / case.head_dim**0.25
    for tensor in tensors[1:]:
        shared = tensor[:: case.samples, :, : case.start]
        tensor[:, :, : case.start] = shared.repeat_interleave(case.samples, dim=0)
    return [tensor.to(kind.step) for tensor in tensors]


def filled_cache(kind: Kind, case: Case, tensors: list[Tensor]) -> KVCache:
    """A cache that holds what comes before the first step, NaN wherever nothing was written."""
    sizes = (case.pattern, case.batch, case.heads, case.head_dim)
    made = KVCache(*sizes, num_prompts=case.prompts, dtype=kind.cache, device="cpu")
    for tensor in (made.text_key, made.text_value, made.image_key, made.image_value):
        tensor.fill_(math.nan)
    key, value = (tensor[:: case.samples, :, : case.start].to(kind.cache) for tensor in tensors[1:])
    lens = None if case.text_lens is None else torch.tensor(case.text_lens)
    made.prefill(key, value, lens)
    return made


def decode(kind: Kind, case: Case, tensors: list[Tensor], stop: int | None = None, backend: str = "cpp") -> Tensor:
    """The remaining positions up to ``stop``, one at a time."""
    made = filled_cache(kind, case, tensors)
    steps = range(case.start, case.pattern.seq_len if stop is None else stop)
    outs = [attention_with_kvcache(*(x[:, :, s : s + 1] for x in tensors), made, backend=backend) for s in steps]
    assert made.position == case.start + len(steps)
    return torch.cat(outs, dim=2)


def uncached(kind: Kind, case: Case, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What plain PyTorch gives from rounded keys and values without a cache, in the step's dtype and in float64."""
    query, *rest = tensors
    key, value = (tensor.to(kind.cache).to(kind.step) for tensor in rest)
    lens = None if case.text_lens is None else torch.tensor(case.text_lens).repeat_interleave(case.samples)
    same_dtype, truth = (
        reference.attention(query.to(dtype), key.to(dtype), value.to(dtype), case.pattern, text_lens=lens)
        for dtype in (kind.step, torch.float64)
    )
    return same_dtype[:, :, case.start :], truth[:, :, case.start :]


@cache
def kept_case(kind: Kind, case: Case) -> tuple[list[Tensor], Tensor, Tensor]:
    """Inputs, what plain PyTorch gives, float64; made once for all levels."""
    with torch.random.fork_rng():
        tensors = make_tensors(kind, case)
    return tensors, *uncached(kind, case, tensors)


def check_cases(kind: Kind, cases: Iterable[Case]) -> None:
    """Hold the op to the budget over these cases together; a single short one is near its truth by luck."""
    actual, same_dtype, truth = [], [], []
    for case in cases:
        tensors, peer, exact = kept_case(kind, case)
        out = decode(kind, case, tensors)
        assert (out.dtype, out.shape) == (kind.step, exact.shape)
        for parts, tensor in ((actual, out), (same_dtype, peer), (truth, exact)):
            parts.append(tensor.flatten())
    assert_within_budget(*(torch.cat(parts) for parts in (actual, same_dtype, truth)))


def patterns(text_len: int, grid: tuple[int, int]) -> list[Pattern]:
    """Every kind and variant, and convolutions with kernels beyond the grid and with dilation."""
    wide = 2 * max(grid) + 1
    return [
        *every_pattern(text_len, grid),
        Conv(text_len, grid, kernel_size=wide),
        Conv(text_len, grid, kernel_size=wide, variant="torus"),
        Conv(text_len, grid, kernel_size=5, dilation=3),
        Conv(text_len, grid, kernel_size=3, variant="torus", dilation=2),
        Conv(text_len, grid, kernel_size=4, variant="corner", dilation=2),
    ]


@each_kind
@pytest.mark.parametrize(
    ("text_len", "grid", "head_dim"),
    [
        (0, (3, 4), 8),
        (1, (1, 5), 64),
        (5, (7, 9), 40),
        (16, (5, 1), 1),
        (67, (3, 4), 80),
        (256, (2, 9), 256),
        (15, (4, 7), 16),
    ],
    ids=str,
)
def test_shapes_and_patterns(level, kind, text_len, grid, head_dim):
    cases = []
    for number, pattern in enumerate(patterns(text_len, grid)):
        lens = (text_len, text_len // 3) if number % 3 == 0 else (0, text_len) if number % 3 == 1 else None
        cases.append(Case(pattern, head_dim, heads=1, prompts=2, samples=2, text_lens=lens))
    check_cases(kind, cases)


@each_kind
def test_head_sizes(level, kind):
    sizes = (1, 2, 3, 4, 7, 8, 9, 12, 15, 16, 17, 31, 33, 40, 64, 65, 80, 96, 127, 128, 144, 255, 256)
    for head_dim in sizes:
        check_cases(kind, [Case(pattern, head_dim) for pattern in (Row(17, (3, 5)), Full(3, (3, 6)))])


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]], ids=kind_id)
def test_text_lengths(level, kind):
    for text_len in (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129):
        lens = tuple(sorted({0, 1, text_len // 2, text_len - 1, text_len}))
        check_cases(kind, [Case(Row(text_len, (2, 3)), 20, heads=1, prompts=len(lens), samples=1, text_lens=lens)])


@each_kind
def test_numbers_of_samples(level, kind):
    # Up to six at a time, and from eighteen on the text is copied.
    cases = [
        Case(Column(text_len, (2, 3)), head_dim, heads=1, samples=samples)
        for samples in (1, 2, 3, 4, 5, 6, 7, 11, 12, 17, 18, 19, 22, 23, 24, 25)
        for text_len, head_dim in ((5, 8), (40, 24), (70, 72))
    ]
    check_cases(kind, cases)


@each_kind
@pytest.mark.parametrize("samples", [1, 7, 20])
def test_prompts(level, kind, samples):
    lens = (0, 33, 12)
    cases = [
        Case(pattern, 16, heads=3, prompts=3, samples=samples, text_lens=lens, prefix=prefix)
        for pattern in (Row(33, (3, 4)), Conv(33, (3, 4), kernel_size=3))
        for prefix in (0, 3, 11)
    ]
    check_cases(kind, cases)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]], ids=kind_id)
@pytest.mark.parametrize("make_pattern", [Row, Column, Conv, Full])
def test_shape_of_the_paper(kind, make_pattern):
    check_cases(kind, [Case(make_pattern(256, 32), 64, heads=1, samples=1)])


@each_kind
def test_weights_of_all_sizes(level, kind):
    # At this size a row's weights go from 1 down to 0.
    cases = [Case(pattern, 64, samples=7, size=8.0) for pattern in (Row(67, (3, 7)), Column(16, (7, 3)))]
    check_cases(kind, cases)


@pytest.mark.parametrize("prefix", [0, 1, 4, 5, 6, 13, 14, 19], ids=str)
@pytest.mark.parametrize("pattern", patterns(3, (5, 4)), ids=pattern_id)
def test_image_prefix(pattern, prefix):
    # Of row attention the cache has 5 places: prefixes that fill them in part, and several times over.
    check_cases(KINDS[0], [Case(pattern, 8, prompts=2, samples=3, prefix=prefix)])


SIZES = st.integers(1, 6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 80),
    st.tuples(SIZES, SIZES),
    st.integers(1, 256),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 30),
    st.data(),
)
def test_any_sizes(kind, text_len, grid, head_dim, heads, prompts, samples, data):
    pattern = data.draw(st.sampled_from(patterns(text_len, grid)))
    lens = st.tuples(*[st.integers(0, text_len)] * prompts)
    prefix = data.draw(st.integers(0, pattern.image_len - 1))
    case = Case(pattern, head_dim, heads, prompts, samples, data.draw(st.none() | lens), prefix)
    tensors = make_tensors(kind, case)
    assert_within_budget(decode(kind, case, tensors), *uncached(kind, case, tensors))


def sample_alone(case: Case, tensors: list[Tensor], index: int) -> tuple[Case, list[Tensor]]:
    """One sample of a case, as a case of its own."""
    lens = None if case.text_lens is None else (case.text_lens[index // case.samples],)
    return case._replace(prompts=1, samples=1, text_lens=lens), [tensor[index : index + 1] for tensor in tensors]


@each_kind
@pytest.mark.parametrize("text_len", [5, 67])
@pytest.mark.parametrize("pattern", [Row, Column, Conv])
def test_bits_do_not_depend_on_what_is_beside(level, kind, pattern, text_len):
    case = Case(pattern(text_len, (3, 4)), 40, heads=3, prompts=2, samples=23, text_lens=(text_len, 3))
    tensors = make_tensors(kind, case)
    together = decode(kind, case, tensors)
    assert torch.equal(decode(kind, case, tensors), together)
    for index in (0, 5, 20, 22, 23, 40, 45):
        alone = decode(kind, *sample_alone(case, tensors, index))
        assert torch.equal(alone, together[index : index + 1])
    # Each sample a prompt of its own, in reverse.
    lens = tuple(case.text_lens[index // 23] for index in range(45, -1, -1))
    apart = case._replace(prompts=46, samples=1, text_lens=lens)
    assert torch.equal(decode(kind, apart, [tensor.flip(0) for tensor in tensors]).flip(0), together)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]], ids=kind_id)
@pytest.mark.parametrize(("heads", "samples"), [(8, 1), (1, 64), (3, 40), (2, 6)])
def test_bits_do_not_depend_on_threads(kind, heads, samples):
    case = Case(Row(256, (2, 32)), 64, heads=heads, samples=samples)
    tensors = make_tensors(kind, case)
    outs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outs.append(decode(kind, case, tensors, case.start + 4))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@each_kind
@pytest.mark.parametrize("samples", [1, 6, 20])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
def test_hidden_text_does_not_leak(level, kind, poison, samples):
    lens = (0, 1, 15, 16, 17, 32, 39, 40)
    for head_dim in (8, 24):
        case = Case(Row(40, (2, 3)), head_dim, heads=1, prompts=8, samples=samples, text_lens=lens)
        tensors = make_tensors(kind, case)
        position = torch.arange(case.pattern.seq_len)
        hidden = (position >= torch.tensor(lens)[:, None]) & (position < 40)
        hidden = hidden.repeat_interleave(samples, dim=0)[:, None, :, None]
        poisoned = [tensors[0], *(tensor.masked_fill(hidden, poison) for tensor in tensors[1:])]
        assert torch.equal(decode(kind, case, poisoned), decode(kind, case, tensors))


@each_kind
def test_nothing_but_the_new_place_is_written(level, kind):
    for pattern in every_pattern(5, (3, 4)):
        case = Case(pattern, 12, samples=3, prefix=4)
        query, key, value = tensors = make_tensors(kind, case)
        made, expected = (filled_cache(kind, case, tensors) for _ in range(2))
        for s in range(case.start, pattern.seq_len):
            step = [tensor[:, :, s : s + 1] for tensor in (query, key, value)]
            attention_with_kvcache(*step, made, backend="cpp")
            attention_with_kvcache(*step, expected, backend="reference")
            for name in ("text_key", "text_value", "image_key", "image_value", "held", "text_lens"):
                torch.testing.assert_close(getattr(made, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_is_rounded_as_by_torch(level, dtype):
    # Every 16-bit value, those half way between two, infinities, NaN, and what overflows.
    words = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    between = (words + words.roll(-1)) / 2
    numbers = torch.cat([words, between, torch.tensor([1e30, -1e30, 65520.0, 65519.0, 1e-8, -3e-41])])
    numbers = torch.cat([numbers, numbers.new_zeros(-len(numbers) % 256)]).view(-1, 1, 1, 256)
    made = KVCache(Full(0, 1), len(numbers), 1, 256, dtype=dtype, device="cpu")
    attention_with_kvcache(torch.zeros_like(numbers), numbers, numbers.neg(), made, backend="cpp")
    for stored, exact in ((made.image_key, numbers), (made.image_value, numbers.neg())):
        torch.testing.assert_close(stored, exact.to(dtype), rtol=0, atol=0, equal_nan=True)


@each_kind
@pytest.mark.parametrize("head_dim", [8, 40, 64])
def test_views(level, kind, head_dim):
    case = Case(Row(16, (2, 5)), head_dim, heads=3, samples=7)
    tensors = make_tensors(kind, case)
    expected = decode(kind, case, tensors)
    made = filled_cache(kind, case, tensors)
    for number, s in enumerate(range(case.start, case.pattern.seq_len)):
        packed = torch.stack([tensor[:, :, s] for tensor in tensors], dim=1)[:, None]  # [B, 1, 3, H, D]
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind()
        memory = torch.full((7, 1, 5, head_dim + 3), math.nan, dtype=kind.step)
        out = memory[:, :, 1:4, :head_dim].transpose(1, 2)
        bind_attention(query, key, value, made, out, kernel="cpp")()
        assert torch.equal(out, expected[:, :, number : number + 1])
        out.fill_(math.nan)
        assert memory.isnan().all()


def test_stride_0(level):
    case = Case(Row(16, (2, 5)), 24, samples=7)
    tensors = [tensor[:1, :1].expand(7, 2, -1, -1) for tensor in make_tensors(KINDS[0], case)]
    contiguous = [tensor.contiguous() for tensor in tensors]
    assert torch.equal(decode(KINDS[0], case, tensors), decode(KINDS[0], case, contiguous))


@each_kind
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("number", [0, 1, 2], ids=["query", "key", "value"])
def test_not_finite(level, kind, number, bad):
    # In sample 3's own step 2, or, of keys and values, in prompt 1's text.
    case = Case(Row(17, (3, 4)), 20, prompts=2, samples=3)
    clean = make_tensors(kind, case)
    before = decode(kind, case, clean)
    places = [(slice(3, 4), 1, 19, 5)]
    if number > 0:
        places.append((slice(3, 6), 1, 7, 19))
    for place in places:
        tensors = [tensor.clone() for tensor in clean]
        tensors[number][place] = bad
        out = decode(kind, case, tensors)
        # Without a cache a weight of 0 would meet values that a row does not see.
        wide = Kind(torch.float64, torch.float64)
        exact = [tensor.to(kind.cache if i else kind.step).double() for i, tensor in enumerate(tensors)]
        truth = decode(wide, case, exact, backend="reference")
        assert not truth.isfinite().all() or (number == 1 and bad != math.nan)
        assert torch.equal(out.isfinite(), truth.isfinite())
        assert torch.equal(out[~truth.isfinite()].double().nan_to_num(1.5), truth[~truth.isfinite()].nan_to_num(1.5))
        others = torch.ones(out.shape, dtype=torch.bool)
        others[place[0], 1] = False
        assert torch.equal(out[others], before[others])


def test_scores_of_minus_infinity(level):
    """A key whose score is -inf has no weight; a row of nothing else is 0, as of no key."""
    case = Case(Row(17, (1, 3)), 4, heads=1, samples=1)
    query, key, value = make_tensors(KINDS[0], case)
    query[..., 0], key[..., 0] = -1.0, 0.0
    key[:, :, [0, 9, 18], 0] = math.inf
    out = decode(KINDS[0], case, [query, key, value])
    key[:, :, [0, 9, 18], 0] = 1e30  # its weight is 0, too
    expected = decode(KINDS[0], case, [query, key, value])
    assert expected.isfinite().all() and torch.equal(out, expected)
    key[..., 0] = math.inf
    tensors = [query, key, value]
    assert torch.equal(decode(KINDS[0], case, tensors).double(), uncached(KINDS[0], case, tensors)[1])


@pytest.mark.parametrize("scale", [0.0, -0.7, 1e-3, 5.0])
def test_scales(level, scale):
    pattern = Row(5, (3, 7))
    for kind in KINDS:
        case = Case(pattern, 16)
        tensors = make_tensors(kind, case)
        made, wide = (filled_cache(k, case, tensors) for k in (kind, Kind(torch.float64, torch.float64)))
        plain = filled_cache(kind, case, tensors)
        outs = []
        for s in range(case.start, pattern.seq_len):
            step = [tensor[:, :, s : s + 1] for tensor in tensors]
            exact = [step[0].double(), *(tensor.to(kind.cache).double() for tensor in step[1:])]
            outs.append(
                [
                    attention_with_kvcache(*step, made, scale=scale, backend="cpp"),
                    attention_with_kvcache(*step, plain, scale=scale, backend="reference"),
                    attention_with_kvcache(*exact, wide, scale=scale, backend="reference"),
                ]
            )
        assert_within_budget(*(torch.cat(parts) for parts in zip(*outs, strict=True)))


def op_args(cache_dtype=torch.float32, step_dtype=torch.float32, pattern=None, held=None) -> dict[str, object]:
    """Arguments of the bare op, by name."""
    pattern = Row(3, (2, 2)) if pattern is None else pattern
    case = Case(pattern, 8)
    kind = Kind(cache_dtype, step_dtype)
    tensors = make_tensors(kind, case)
    made = filled_cache(kind, case, tensors)
    made.image_key.zero_()
    made.image_value.zero_()
    if held is not None:
        made.held.fill_(held)
    query, key, value = (tensor[:, :, case.start : case.start + 1] for tensor in tensors)
    return {
        "query": query,
        "key": key,
        "value": value,
        "text_key": made.text_key,
        "text_value": made.text_value,
        "image_key": made.image_key,
        "image_value": made.image_value,
        "held": made.held,
        "text_lens": made.text_lens,
        "pattern": pattern.code,
        "scale": 0.3,
        "out": torch.empty_like(query, memory_format=torch.contiguous_format),
    }


op = torch.ops.dalle_fast.attention_with_kvcache_cpu


@each_kind
@pytest.mark.parametrize("pattern", [Row(3, (2, 2)), Conv(0, (2, 2), kernel_size=3)], ids=pattern_id)
def test_opcheck(kind, pattern):
    torch.library.opcheck(op, tuple(op_args(*kind, pattern).values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": (0, 1, 2)}, "pattern must have 6 numbers, got 3"),
        ({"held": torch.tensor(2)}, "the cache must hold the 3 text positions first: call prefill()"),
        ({"held": torch.tensor(7)}, "the cache is full, it holds all 7 positions: call reset()"),
        ({"held": torch.tensor(3, dtype=torch.int32)}, "held must have dtype Long, got Int"),
        ({"held": torch.tensor([3, 3])}, "held must have 1 elements, got 2"),
        ({"text_lens": torch.tensor([3, 3])}, "text_lens must have 1 elements, got 2"),
        ({"text_lens": torch.tensor([3], dtype=torch.int32)}, "text_lens must have dtype Long, got Int"),
        ({"image_key": torch.zeros(2, 2, 3, 8).double()}, "image_key must be float32, float16 or bfloat16, got Double"),
        ({"image_value": torch.zeros(2, 2, 3, 8).half()}, "image_value must have dtype Float, got Half"),
        ({"image_value": torch.zeros(2, 2, 4, 8)}, "image_value must have 96 elements, got 128"),
        ({"image_key": torch.zeros(2, 2, 8, 3).mT}, "image_key must be contiguous, got shape (2, 2, 3, 8)"),
        ({"text_key": torch.zeros(1, 2, 8, 4)}, "text_key must have 48 elements, got 64"),
        ({"text_value": torch.zeros(1, 2, 8, 3).mT}, "text_value must be contiguous, got shape (1, 2, 3, 8)"),
        ({"query": torch.zeros(2, 2, 1, 8).double()}, "query must be float32, float16 or bfloat16, got Double"),
        ({"key": torch.zeros(2, 2, 1, 8).half()}, "key must have dtype Float, got Half"),
        ({"value": torch.zeros(2, 2, 1, 8).half()}, "value must have dtype Float, got Half"),
        ({"out": torch.zeros(2, 2, 1, 8).half()}, "out must have dtype Float, got Half"),
        ({"pattern": (8, 3, 2, 2, 0, 0)}, "pattern must be a pattern's code, got (8, 3, 2, 2, 0, 0)"),
        ({"pattern": (-1, 3, 2, 2, 0, 0)}, "pattern must be a pattern's code, got (-1, 3, 2, 2, 0, 0)"),
        ({"pattern": (1, -1, 2, 2, 0, 0)}, "pattern must be a pattern's code, got (1, -1, 2, 2, 0, 0)"),
        ({"pattern": (1, 3, 0, 2, 0, 0)}, "pattern must be a pattern's code, got (1, 3, 0, 2, 0, 0)"),
        ({"pattern": (1, 3, 2**62, 2, 0, 0)}, f"pattern must be a pattern's code, got (1, 3, {2**62}, 2, 0, 0)"),
        ({"pattern": (4, 3, 2, 2, 3, 0)}, "pattern must be a pattern's code, got (4, 3, 2, 2, 3, 0)"),
        ({"pattern": (4, 3, 2, 2, 0, 1)}, "pattern must be a pattern's code, got (4, 3, 2, 2, 0, 1)"),
        ({"pattern": (0, 3, 2, 2, 0, 0)}, "image_key must have 4 slots, got 3"),
        ({"pattern": (3, 3, 2, 2, 0, 0)}, "image_key must have 4 slots, got 3"),
        ({"pattern": (2, 3, 2, 2, 0, 0)}, "image_key must have 2 slots, got 3"),
        ({"pattern": (1, 3, 1, 5, 0, 0)}, "image_key must have 5 slots, got 3"),
        (
            {"pattern": (5, 3, 2, 2, 3, 1), "held": torch.tensor(6)},
            "image_key must have more than 3 slots, as many as the pattern sees back, got 3",
        ),
        (
            {
                "image_key": torch.zeros(2, 2, 0, 8),
                "image_value": torch.zeros(2, 2, 0, 8),
                "pattern": (5, 3, 2, 2, 3, 1),
            },
            "image_key must have 1 slots, got 0",
        ),
        ({"image_key": torch.zeros(12, 8)}, "image_key and text_value must have 4 dimensions, got shapes (12, 8) and"),
        (
            {"text_value": torch.zeros(48)},
            "image_key and text_value must have 4 dimensions, got shapes (2, 2, 3, 8) and",
        ),
        ({"text_value": torch.zeros(0, 2, 3, 8)}, "the batch must be a multiple of the number of prompts, got 2 and 0"),
        ({"text_value": torch.zeros(3, 2, 3, 8)}, "the batch must be a multiple of the number of prompts, got 2 and 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bare_op_errors(change, message):
    args = op_args() | change
    before = args["image_key"].clone()
    with pytest.raises(RuntimeError) as error:
        op(*args.values())
    assert message in str(error.value)
    assert torch.equal(args["image_key"], before)


@pytest.mark.parametrize("name", ["query", "key", "value", "out"])
def test_rows_of_another_shape(name):
    for shape in [(1, 2, 1, 8), (2, 1, 1, 8), (2, 2, 2, 8), (2, 2, 1, 4), (2, 8)]:
        with pytest.raises(RuntimeError, match=rf"{name} must have shape \(2, 2, 1, 8\), got {re.escape(str(shape))}"):
            op(*(op_args() | {name: torch.zeros(shape)}).values())
    with pytest.raises(
        RuntimeError, match=rf"{name} must have a contiguous last dimension, got strides \(32, 16, 16, 2\)"
    ):
        op(*(op_args() | {name: torch.zeros(2, 2, 1, 16)[..., ::2]}).values())


def test_no_samples():
    empty = torch.zeros(0, 2, 1, 8)
    rows = dict.fromkeys(("query", "key", "value", "out"), empty)
    images = dict.fromkeys(("image_key", "image_value"), torch.zeros(0, 2, 3, 8))
    with pytest.raises(RuntimeError, match="the batch must be a multiple of the number of prompts, got 0 and 1"):
        op(*(op_args() | rows | images).values())


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[4]], ids=kind_id)
def test_compiled(kind):
    case = Case(Column(5, (2, 3)), 8, samples=3)
    tensors = make_tensors(kind, case)
    expected = decode(kind, case, tensors)

    def whole_image(made: KVCache, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        steps = range(case.start, case.pattern.seq_len)
        outs = [attention_with_kvcache(*(x[:, :, s : s + 1] for x in (query, key, value)), made) for s in steps]
        return torch.cat(outs, dim=2)

    made = filled_cache(kind, case, tensors)
    out = torch.compile(whole_image, fullgraph=True, backend="aot_eager")(made, *tensors)
    assert torch.equal(out, expected)
    assert made.position == case.pattern.seq_len


def test_caches_of_many_patterns():
    # More convolutions than are remembered, met again and again.
    kinds = [
        Conv(2, (4, 5), kernel_size=size, variant=variant, dilation=dilation)
        for size in (1, 3, 5)
        for variant in ("raster", "clip", "torus", "corner")
        for dilation in (1, 2)
    ]
    check_cases(KINDS[0], [Case(pattern, 8, heads=1, samples=1) for _ in range(2) for pattern in kinds])
