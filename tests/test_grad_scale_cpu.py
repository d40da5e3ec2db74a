"""The C++ kernels of gradient scaling at every CPU level: bits of the reference, layouts, guards, threads, graphs."""

import copy
import math
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import assert_within_budget, needs_extension
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle_fast import reference
from dalle_fast.ops import backends
from dalle_fast.ops.grad_scale import scaled_resblock, unscale_
from dalle_fast.ops.tensor_table import CHUNK, is_dense, make_table

pytestmark = needs_extension

OPS = torch.ops.dalle_fast
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BAD = [math.nan, math.inf, -math.inf]
LENGTHS = [0, 1, 7, 8, 9, 15, 16, 17, 31, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]
SCALES = [1.0, 2.0**13, 2.0**-3, 3.7, 5432.1]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def spread(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Over and beyond the range of float16, both signs, zeros of both signs among them."""
    values = torch.randn(length) * torch.exp2(torch.empty(length).uniform_(-28, 15))  # some end as infinite float16
    values[3::50] = 0.0
    values[7::50] = -0.0
    return values.to(dtype)


def with_bad(values: Tensor) -> Tensor:
    """A non-finite element at the ends, around the ends of vectors, and among many finite ones."""
    flat = values.reshape(-1)
    for number, place in enumerate((0, 3, 4, 7, 8, 15, 16, 31, 32, 1000, len(flat) - 1)):
        if 0 <= place < len(flat):
            flat[place] = BAD[number % 3]
    return values


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(bits(actual), bits(expected))


def guarded(values: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """The values among sentinels, ``offset`` elements off the start of the whole; the view and the whole."""
    whole = torch.full((offset + values.numel() + 40,), 1234.0, dtype=values.dtype)
    view = whole[offset : offset + values.numel()]
    view.copy_(values)
    return view, whole


def compare_unscale(grads: list[Tensor], scales: Tensor, block_of: list[int]) -> None:
    """Both backends, writing and not: the same bits and flags; the sum against float64."""
    expected = [grad.clone() for grad in grads]
    flags, _ = reference.unscale_(expected, scales, block_of)
    truth, chunks = np.longdouble(0), 0
    for grad, block in zip(grads, block_of, strict=True):
        quotients = grad.double() / scales[block].double()
        squares = quotients[torch.isfinite(grad.float() / scales[block])].square()
        truth += squares.numpy().astype(np.longdouble).sum()
        chunks += -(-grad.numel() // CHUNK)
    # One rounding for each addition on the way of a square into the sum, and one each for the divisions and squares.
    roundings = CHUNK / 16 + 16 + chunks + 4
    for write in (False, True):
        found = [grad.clone() for grad in grads]
        nonfinite, sum_of_squares = unscale_(found, scales, block_of, write=write, backend="cpp")
        for actual, new, old in zip(found, expected, grads, strict=True):
            assert_same_bits(actual, new if write else old)
        assert torch.equal(nonfinite, flags)
        assert sum_of_squares.dtype == torch.float64
        assert abs(sum_of_squares.item() - truth) <= roundings * 2.0**-53 * truth


@each_dtype
@pytest.mark.parametrize("length", LENGTHS)
def test_unscale(level, dtype, length):
    for scale in SCALES:
        compare_unscale([spread(length, dtype)], torch.tensor([scale]), [0])
        compare_unscale([with_bad(spread(length, dtype))], torch.tensor([1.0, scale]), [1])


@each_dtype
@pytest.mark.parametrize("place", [*range(35), CHUNK - 1, CHUNK, CHUNK + 17])
def test_one_nonfinite_element_is_seen_wherever_it_is(level, dtype, place):
    for bad in BAD:
        grad = torch.full((CHUNK + 18,), 3.0, dtype=dtype)
        grad[place] = bad
        for write in (False, True):
            nonfinite, sum_of_squares = unscale_([grad], torch.tensor([2.0]), write=write, backend="cpp")
            assert nonfinite.item()
            assert sum_of_squares == (CHUNK + 17) * 2.25
        expected = torch.full_like(grad, 1.5)
        expected[place] = 0
        assert torch.equal(grad, expected)


@each_dtype
def test_quotients_that_leave_float32(level, dtype):
    """Whether a quotient is finite is decided as if it had been computed, to the last bit."""
    largest = torch.finfo(torch.float32).max
    for scale in (1e-3, 0.7, 0.1, 2.0**-30, 1 - 2.0**-24, 1e-40):
        edge = torch.tensor(largest) * torch.tensor(scale)
        grads = [edge]
        for toward in (0.0, math.inf):
            value = edge
            for _ in range(4):
                value = torch.nextafter(value, torch.tensor(toward))
                grads.append(value)
        around = torch.stack([*grads, *(-grad for grad in grads)])
        compare_unscale([around.to(dtype), spread(100, dtype)], torch.tensor([scale]), [0, 0])


def test_sums_that_leave_float32(level):
    """Squares beyond its largest value and below its smallest."""
    for value in (1e30, 1e-30):
        grad = torch.full((5000,), value)
        truth = grad.double().square().sum()
        found = unscale_([grad], torch.tensor([1.0]), backend="cpp").sum_of_squares
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [0.0, math.inf, math.nan, 1e-45, 3e38])
def test_scales_that_are_not_checked(level, scale):
    grads = [with_bad(spread(100)), torch.tensor([0.0, 1.0])]
    compare_unscale(grads, torch.tensor([scale, 1.0]), [0, 0])


def many(dtypes=DTYPES, bad: bool = False) -> tuple[list[Tensor], Tensor, list[int]]:
    """Tensors of every dtype, from none to several chunks, in no order of blocks; some blocks have none."""
    lengths = [0, 5, 0, CHUNK, 1, 2 * CHUNK + 3, 0, 31, 700, CHUNK + 1, 16, 0]
    grads = [spread(length, dtype) for length in lengths for dtype in dtypes]
    block_of = [(5 * index) % 9 for index in range(len(grads))]
    if bad:
        grads[4][2] = math.nan
        grads[17][-1] = math.inf
        grads[28][CHUNK - 1] = -math.inf
    return grads, torch.tensor([2.0**k + 0.3 for k in range(11)]), block_of


@pytest.mark.parametrize("bad", [False, True])
def test_many_tensors_and_blocks(level, bad):
    compare_unscale(*many(bad=bad))


def test_flags_of_blocks(level):
    grads, block_of = [torch.randn(100) for _ in range(30)], [(5 * index) % 9 for index in range(30)]
    for index in (4, 17, 28):
        grads[index][index] = math.nan
    nonfinite, _ = unscale_(grads, torch.ones(10), block_of, backend="cpp")
    assert nonfinite.nonzero().flatten().tolist() == sorted({block_of[index] for index in (4, 17, 28)})


def test_flags_and_sum_are_added_to(level):
    grad = torch.ones(8)
    table = make_table([[grad], [1]])
    nonfinite, total = torch.tensor([True, False]), torch.tensor(3.0, dtype=torch.float64)
    OPS.multi_tensor_unscale(table.rows, table.num_chunks, CHUNK, torch.ones(2), False, nonfinite, total)
    assert nonfinite.tolist() == [True, False] and total == 11


@each_dtype
@pytest.mark.parametrize("offset", [1, 3, 5, 8, 13])
@pytest.mark.parametrize("length", [1, 9, 31, 1000])
def test_unaligned_views_and_nothing_outside_of_them(level, dtype, offset, length):
    values = with_bad(spread(length, dtype))
    view, whole = guarded(values, offset)
    unscale_([view], torch.tensor([3.0]), backend="cpp")
    expected = values.clone()
    reference.unscale_([expected], torch.tensor([3.0]), [0])
    assert_same_bits(whole, guarded(expected, offset)[1])


@each_dtype
@pytest.mark.parametrize("offset", [0, 1, 7])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 31, 1000, 100_003])
def test_resblock_scale(level, dtype, offset, length):
    grad, _ = guarded(with_bad(spread(length)), offset)
    for scale in SCALES:
        out, whole = guarded(torch.empty(length, dtype=dtype), offset)
        OPS.resblock_scale(grad, torch.tensor(scale), out)
        expected = reference.filter_nonfinite(grad * scale).to(dtype)
        assert_same_bits(whole, guarded(expected, offset)[1])


def test_products_beyond_float16_become_infinite(level):
    """65520 is halfway between the largest float16 and what would come next; the tie goes to infinity."""
    grad = torch.tensor([65504.0, 65519.0, 65520.0, -65520.0, 1e30, 3e38, -math.inf]).repeat(5)
    out = torch.empty(35, dtype=torch.float16)
    OPS.resblock_scale(grad, torch.tensor(1.0), out)
    assert out[:7].tolist() == [65504.0, 65504.0, math.inf, -math.inf, math.inf, math.inf, 0.0]
    OPS.resblock_scale(grad, torch.tensor(2.0), out)
    assert out[28:].tolist() == [math.inf, math.inf, math.inf, -math.inf, math.inf, 0.0, 0.0]


@each_dtype
def test_every_rounding_boundary_of_the_16_bit_dtypes(level, dtype):
    """All words' values, the midpoints to their neighbours and the floats beside those, denormals included."""
    words = torch.arange(-(2**15), 2**15).to(torch.int16)
    for kind in (torch.float16, torch.bfloat16):
        exact = words.view(kind).double()
        exact = exact[torch.isfinite(exact)].sort().values
        middle = ((exact[1:] + exact[:-1]) / 2).float()
        values = torch.cat([exact.float(), middle, *(torch.nextafter(middle, torch.tensor(end)) for end in BAD[1:])])
        out = torch.empty_like(values, dtype=dtype)
        OPS.resblock_scale(values, torch.tensor(1.0), out)
        assert_same_bits(out, values.to(dtype))


@pytest.mark.parametrize("offset", [0, 1, 7])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 31, 1000, 100_003])
def test_resblock_unscale_add(level, offset, length):
    grad, _ = guarded(with_bad(spread(length)), offset)
    identity, _ = guarded(with_bad(spread(length)).flip(0), offset)
    for scale in SCALES:
        out, whole = guarded(torch.empty(length), offset)
        OPS.resblock_unscale_add(grad, torch.tensor(scale), identity, out)
        expected = identity + reference.filter_nonfinite(grad / scale)
        assert_same_bits(whole.nan_to_num(5.0), guarded(expected, offset)[1].nan_to_num(5.0))
        assert torch.equal(torch.isnan(whole), torch.isnan(guarded(expected, offset)[1]))


def test_levels_and_threads_give_the_same_bits():
    extension = backends.load_extension()
    before, threads, results = extension.build_info()["cpu_level"], torch.get_num_threads(), []
    original, scales, block_of = many(bad=True)
    grad = spread(200_001)
    try:
        for name in ("scalar", "avx2", "avx512"):
            try:
                extension.set_cpu_level(name)
            except ValueError:
                continue
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                grads = [one.clone() for one in original]
                nonfinite, sum_of_squares = unscale_(grads, scales, block_of, backend="cpp")
                out = torch.empty(200_001)
                OPS.resblock_unscale_add(grad, scales[3], grad.flip(0), out)
                results.append([nonfinite, sum_of_squares.view(torch.int64), *map(bits, grads), bits(out)])
    finally:
        extension.set_cpu_level(before)
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


LAYOUTS = {
    "transposed": lambda x: x.mT,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "every_other": lambda x: torch.stack([x, x], -1)[..., 0],
    "cut": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
    "no_dimensions": lambda x: x[0, 0, 0, 0],
    "empty": lambda x: x[:0],
}


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_gradients(level, dtype, layout):
    grads = [LAYOUTS[layout](spread(2 * 3 * 20 * 5, dtype).reshape(2, 3, 20, 5)), spread(40, dtype)]
    expected = [grad.clone() for grad in grads]
    found = unscale_(grads, torch.tensor([3.0, 4.0]), [0, 1], backend="cpp")
    peer = reference.unscale_(expected, torch.tensor([3.0, 4.0]), [0, 1])
    for grad, other in zip(grads, expected, strict=True):
        assert torch.equal(grad, other)
    assert torch.equal(found.nonfinite, peer[0])
    torch.testing.assert_close(found.sum_of_squares, peer[1], rtol=1e-6, atol=0)


def test_expanded_gradients(level):
    grad = torch.tensor([3.0]).expand(100)
    found = unscale_([grad], torch.tensor([2.0]), write=False, backend="cpp")
    assert found.sum_of_squares == 225 and torch.equal(grad, torch.full((100,), 3.0))


def test_strided_scales(level):
    grad = torch.full((9,), 6.0)
    unscale_([grad], torch.tensor([1.0, 9.0, 3.0, 9.0])[::2], [1], backend="cpp")
    assert torch.equal(grad, torch.full((9,), 2.0))


def test_is_dense():
    x = torch.zeros(2, 3, 4, 5)
    dense = [x, x.mT, x.permute(3, 0, 2, 1), x.to(memory_format=torch.channels_last), x[:1], x[0, 0, 0, 0], x[:0]]
    assert all(map(is_dense, dense))
    assert not any(map(is_dense, [x[..., ::2], x[:, 1:], x[:1].expand(2, 3, 4, 5), x.as_strided((2, 2), (1, 1))]))


def test_table():
    first, second, third = torch.zeros(2 * CHUNK + 1), torch.zeros(0, dtype=torch.half), torch.zeros(7).bfloat16()
    rows, num_chunks = make_table([[first, second, third], [5, None, 7]])
    assert num_chunks == 4
    assert rows.tolist() == [
        [first.data_ptr(), 5, 2 * CHUNK + 1, 0, 0],
        [second.data_ptr(), 0, 0, 1, 3],
        [third.data_ptr(), 7, 7, 2, 3],
    ]


UNSCALE = {
    "table": torch.zeros(1, 5, dtype=torch.int64),
    "num_chunks": 0,
    "chunk": CHUNK,
    "scales": torch.ones(2),
    "write": False,
    "nonfinite": torch.zeros(2, dtype=torch.bool),
    "sum_of_squares": torch.zeros((), dtype=torch.float64),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": torch.zeros(1, 5)}, "table must have dtype Long, got Float"),
        ({"table": torch.zeros(5, 1, dtype=torch.int64).T[:, ::2]}, "table must be contiguous, got shape (1, 3)"),
        (
            {"table": torch.zeros(1, 4, dtype=torch.int64)},
            "table must have two dimensions and 5 columns, got shape (1, 4)",
        ),
        ({"chunk": 0}, "chunk must be > 0, got 0"),
        ({"num_chunks": -1}, "num_chunks must be >= 0, and 0 of an empty table, got -1"),
        (
            {"table": torch.zeros(0, 5, dtype=torch.int64), "num_chunks": 1},
            "num_chunks must be >= 0, and 0 of an empty",
        ),
        ({"scales": torch.ones(2).double()}, "scales must have dtype Float, got Double"),
        ({"nonfinite": torch.zeros(3, dtype=torch.bool)}, "nonfinite must have 2 elements, got 3"),
        ({"nonfinite": torch.zeros(2)}, "nonfinite must have dtype Bool, got Float"),
        ({"sum_of_squares": torch.zeros(())}, "sum_of_squares must have dtype Double, got Float"),
    ],
)
def test_unscale_errors(changes, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        OPS.multi_tensor_unscale(*(UNSCALE | changes).values())


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("grad", "scale", "out", "message"),
    [
        (X.half(), torch.ones(()), X, "grad must have dtype Float, got Half"),
        (X, torch.ones((), dtype=torch.float64), X, "scale must have dtype Float, got Double"),
        (X, torch.ones(2), X, "scale must have 1 elements, got 2"),
        (X, torch.ones(()), X.double(), "out must be float32, float16 or bfloat16, got Double"),
        (
            X,
            torch.ones(()),
            torch.zeros(3, 2).T,
            "out must be laid out as grad, shape (2, 3) with strides (3, 1), got shape (2, 3) with strides (1, 2)",
        ),
        (X, torch.ones(()), X[0], "out must be laid out as grad, shape (2, 3) with strides (3, 1), got shape (3)"),
        (
            torch.zeros(2, 4)[:, :3],
            torch.ones(()),
            torch.zeros(2, 4)[:, :3],
            "out must fill its memory without gaps, got shape (2, 3) with strides (4, 1)",
        ),
        (
            torch.zeros(6).as_strided((2, 3), (5, 0)),
            torch.ones(()),
            torch.zeros(6).as_strided((2, 3), (5, 0)),
            "out must fill its memory without gaps, got shape (2, 3) with strides (5, 0)",
        ),
    ],
)
def test_resblock_errors(grad, scale, out, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        OPS.resblock_scale(grad, scale, out)


def test_double_gradients_are_refused_by_name():
    with pytest.raises(RuntimeError, match=r'backend "cpp" of unscale_ takes float32, .*, got torch\.float64'):
        unscale_([torch.zeros(2, dtype=torch.float64)], torch.ones(1), backend="cpp")
    with pytest.raises(RuntimeError, match=r'backend "cpp" of scaled_resblock takes float32, got torch\.float64'):
        scaled_resblock(torch.zeros(2, dtype=torch.float64), torch.sin, 1.0, backend="cpp")


class Branch(nn.Module):
    """LayerNorm in float32, an MLP in ``dtype``."""

    def __init__(self, width: int, dtype: torch.dtype, out_width: int | None = None) -> None:
        super().__init__()
        self.norm, self.dtype = nn.LayerNorm(width), dtype
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, out_width or width))
        self.mlp.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x).to(self.dtype))


def run_block(block, x: Tensor, parameters, upstream: Tensor) -> list[Tensor]:
    """The block's result and all gradients."""
    x = x.detach().requires_grad_()
    out = block(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *parameters], upstream)]


def assert_blocks_agree(one: list[Tensor], other: list[Tensor]) -> None:
    for actual, expected in zip(one, other, strict=True):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@each_dtype
@pytest.mark.parametrize("scale", [2.0**13, 3.3, torch.tensor(2.0**10)], ids=str)
def test_resblock_is_the_reference(level, dtype, scale):
    branch, x, upstream = Branch(24, dtype), torch.randn(7, 24), torch.randn(7, 24)
    upstream[2, 3], upstream[4, 0] = math.inf, math.nan
    results = [
        run_block(lambda h, b=backend: scaled_resblock(h, branch, scale, backend=b), x, branch.parameters(), upstream)
        for backend in ("cpp", "reference", "auto")
    ]
    expected = run_block(lambda h: reference.scaled_resblock(h, branch, scale), x, branch.parameters(), upstream)
    for found in results:
        for actual, other in zip(found, expected, strict=True):
            assert actual.dtype == other.dtype
            torch.testing.assert_close(actual, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "every_other", "cut", "expanded"])
def test_layouts_of_a_resblock_gradient(level, layout):
    make = LAYOUTS | {"expanded": lambda x: x[:1, :, :, :1].expand(x.shape)}
    upstream = make[layout](torch.randn(2, 3, 4, 6))
    x = torch.randn(upstream.shape)
    parameter = torch.randn(upstream.shape[-1], requires_grad=True)
    results = [
        run_block(
            lambda h, b=backend: scaled_resblock(
                h, lambda y: (y.mT.contiguous().mT * parameter).bfloat16(), 3.0, backend=b
            ),
            x,
            [parameter],
            upstream,
        )
        for backend in ("cpp", "reference")
    ]
    assert_blocks_agree(*results)


def test_resblock_with_another_residual_path(level):
    branch, identity = Branch(12, torch.bfloat16, out_width=20), nn.Linear(12, 20)
    x, upstream = torch.randn(5, 12), torch.randn(5, 20)
    parameters = [*branch.parameters(), *identity.parameters()]
    results = [
        run_block(
            lambda h, b=backend: scaled_resblock(h, branch, 2.0**13, identity=identity, backend=b),
            x,
            parameters,
            upstream,
        )
        for backend in ("cpp", "reference")
    ]
    assert_blocks_agree(*results)
    plain = run_block(lambda h: identity(h) + branch(h).float(), x, parameters, upstream)
    for actual, expected in zip(results[0][-2:], plain[-2:], strict=True):
        assert torch.equal(actual, expected)  # the path's own parameters' gradients have no scale


def test_frozen_parts():
    """A branch or an input without gradients costs no pass, and none is missing."""
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    (grad,) = torch.autograd.grad(scaled_resblock(x, lambda h: torch.ones_like(h), 8.0, backend="cpp").sum(), x)
    assert torch.equal(grad, torch.ones_like(x))
    (grad,) = torch.autograd.grad(scaled_resblock(x.detach(), lambda h: h * weight, 8.0, backend="cpp").sum(), weight)
    torch.testing.assert_close(grad, 8 * x.detach().sum(0))


@each_dtype
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_block(dtype, use_reentrant):
    branch, x, upstream = Branch(16, dtype), torch.randn(3, 16), torch.randn(3, 16)

    def block(h: Tensor) -> Tensor:
        return scaled_resblock(h, branch, 2.0**13, backend="cpp")

    results = [
        run_block_backward(one, x, branch, upstream)
        for one in (block, lambda h: checkpoint(block, h, use_reentrant=use_reentrant))
    ]
    assert_blocks_agree(*results)


def run_block_backward(block, x: Tensor, module: nn.Module, upstream: Tensor) -> list[Tensor]:
    """As run_block, through backward(), which is all that a reentrant checkpoint knows."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    block(x).backward(upstream)
    return [x.grad, *(parameter.grad.clone() for parameter in module.parameters())]


def test_autocast():
    branch, x, upstream = Branch(16, torch.float32), torch.randn(3, 16), torch.randn(3, 16)
    results = []
    for backend in ("cpp", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(
                run_block(
                    lambda h, b=backend: scaled_resblock(h, branch, 2.0**13, backend=b),
                    x,
                    branch.parameters(),
                    upstream,
                )
            )
    assert_blocks_agree(*results)
    assert results[0][0].dtype == torch.float32


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", ["auto", "cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled(compiler, backend, dtype):
    if compiler == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs g++")
    torch._dynamo.reset()
    branch, x, upstream = Branch(16, dtype), torch.randn(3, 16), torch.randn(3, 16)
    compiled = torch.compile(
        lambda h, scale: scaled_resblock(h, branch, scale, backend=backend), fullgraph=True, backend=compiler
    )
    for scale in (torch.tensor(2.0**13), torch.tensor(2.0**11)):
        found = run_block(lambda h, s=scale: compiled(h, s), x, branch.parameters(), upstream)
        peer = run_block(lambda h, s=scale: reference.scaled_resblock(h, branch, s), x, branch.parameters(), upstream)
        wide = copy.deepcopy(branch).double()
        wide.dtype = torch.float64
        truth = run_block(
            lambda h, s=scale, w=wide: reference.scaled_resblock(h, w, s),
            x.double(),
            wide.parameters(),
            upstream.double(),
        )
        for results in zip(found, peer, truth, strict=True):
            assert_within_budget(*results)
    torch._dynamo.reset()


@pytest.mark.parametrize("op", ["resblock_scale", "resblock_unscale_add"])
def test_opcheck(op):
    grad, scale, out = torch.randn(3, 4), torch.tensor(2.0), torch.zeros(3, 4)
    args = (grad, scale, out) if op == "resblock_scale" else (grad, scale, torch.randn(3, 4), out)
    torch.library.opcheck(getattr(OPS, op), args)
