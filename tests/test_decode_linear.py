"""The linear layer of decoding: C++ against float64, bits that no neighbour changes, and messages."""

import re

import pytest
import torch
from helpers import assert_within_budget, needs_extension
from torch import Tensor

from dalle_fast import reference
from dalle_fast.ops.decode_linear import ACTIVATIONS, bind_decode_linear, has_decode_kernel

SIZES = [(512, 96), (8, 5), (33, 70), (130, 17), (1, 1), (16, 300)]  # columns, width
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_case(rows: int, columns: int, width: int, dtype=torch.float32) -> tuple[list[Tensor], dict]:
    """x, weight, bias, and a LayerNorm and a residual as keyword arguments."""
    x, weight = 3 * torch.randn(rows, columns) + 1, (torch.randn(width, columns) / columns**0.5).to(dtype)
    norm = (torch.randn(columns), torch.randn(columns), 1e-5)
    return [x, weight, torch.randn(width)], {"norm": norm, "residual": torch.randn(rows, width)}


def in_double(tensors: list[Tensor], options: dict) -> tuple[list[Tensor], dict]:
    gain, shift, eps = options["norm"]
    wide = options | {"norm": (gain.double(), shift.double(), eps), "residual": options["residual"].double()}
    return [tensor.double() for tensor in tensors], wide


def run(tensors: list[Tensor], **options) -> Tensor:
    """In C++."""
    out = torch.full((tensors[0].shape[0], tensors[1].shape[0]), torch.nan)
    bind_decode_linear(*tensors, out=out, **options)()
    return out


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_against_float64(level, activation, dtype):
    for columns, width in SIZES:
        for rows in (1, 2, 3, 4, 5, 9):
            tensors, options = make_case(rows, columns, width, dtype)
            wide, wide_options = in_double(tensors, options)
            truth = reference.decode_linear(*wide, activation=activation, **wide_options)
            # The weights are what they are; everything else is float32.
            peer_tensors = [tensors[0], tensors[1].float(), tensors[2]]
            peer = reference.decode_linear(*peer_tensors, activation=activation, **options)
            assert_within_budget(run(tensors, activation=activation, **options), peer, truth)


@needs_extension
def test_each_part_is_optional():
    (x, weight, bias), options = make_case(3, 33, 20)
    torch.testing.assert_close(run([x, weight]), x @ weight.T)
    torch.testing.assert_close(run([x, weight, bias]), x @ weight.T + bias)
    torch.testing.assert_close(run([x, weight], residual=options["residual"]), options["residual"] + x @ weight.T)
    gain, shift, eps = options["norm"]
    normalised = torch.nn.functional.layer_norm(x, (33,), gain, shift, eps)
    torch.testing.assert_close(run([x, weight], norm=options["norm"]), normalised @ weight.T)


@needs_extension
def test_the_residual_may_be_the_result():
    (x, weight, bias), options = make_case(4, 33, 20)
    expected = run([x, weight, bias], **options)
    out = options["residual"].clone()
    bind_decode_linear(x, weight, bias, norm=options["norm"], residual=out, out=out)()
    assert torch.equal(out, expected)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_whatever_is_beside_it(level, dtype):
    tensors, options = make_case(9, 135, 700, dtype)
    x, residual = tensors[0], options["residual"]
    expected = run(tensors, activation="fast_gelu", **options)
    for rows in (1, 2, 3, 5):
        for first in (0, 9 - rows):
            part = slice(first, first + rows)
            some = {"norm": options["norm"], "residual": residual[part].contiguous()}
            out = run([x[part].contiguous(), *tensors[1:]], activation="fast_gelu", **some)
            assert torch.equal(out, expected[part])


@needs_extension
def test_threads_change_no_bit():
    tensors, options = make_case(5, 512, 1000)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(tensors, activation="gelu", **options))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_extension
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_nan_and_infinity_stay_in_their_rows(activation):
    (x, weight, bias), _ = make_case(3, 33, 20)
    x[1, 5] = torch.nan
    out = run([x, weight, bias], activation=activation)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()
    weight[:, 7] = weight[:, 7].abs() + 0.1
    x[2, 7] = torch.inf
    out = run([x, weight, bias], activation=activation)
    assert (out[2] == torch.inf).all()


@needs_extension
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_far_from_zero(level, activation):
    x = torch.cat([torch.linspace(-120, 120, 4801), torch.tensor([-1e30, 1e30, 0.0, -0.0])])[:, None]
    truth = ACTIVATIONS[activation](x.double())
    out = run([x, torch.ones(1, 1)], activation=activation)
    near = x.abs() < 8
    error = (out.double() - truth).abs()
    assert error[near].max() <= 2e-6, "the polynomial's 1.5e-7 times 8, and rounding"
    assert (error <= 4 * torch.finfo(torch.float32).eps * truth.abs() + 2e-6).all()


def test_dtypes_of_the_reference():
    (x, weight, bias), options = make_case(3, 33, 20)
    half = reference.decode_linear(x, weight.bfloat16(), bias)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, torch.nn.functional.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))
    assert reference.decode_linear(x, weight.bfloat16(), bias, residual=options["residual"]).dtype == torch.float32


@needs_extension
def test_which_weights_have_a_kernel():
    assert all(has_decode_kernel(torch.empty(2, 2, dtype=dtype)) for dtype in DTYPES)
    assert not has_decode_kernel(torch.empty(2, 2, dtype=torch.float64))
    assert not has_decode_kernel(torch.empty(2, 2, device="meta"))


@needs_extension
@pytest.mark.parametrize("rows", [1, 3])
def test_no_rows_beyond_the_weights_are_read(rows):
    """The last row of weights ends where its memory does; what lies behind must not matter."""
    storage = torch.full((5 * 33 + 64,), torch.nan)
    weight = storage[: 5 * 33].view(5, 33)
    weight.copy_(torch.randn(5, 33))
    x = torch.randn(rows, 33)
    torch.testing.assert_close(run([x, weight]), x @ weight.T)


@needs_extension
def test_opcheck_and_compile():
    tensors, options = make_case(3, 33, 20)
    gain, shift, eps = options["norm"]
    arguments = (*tensors, gain, shift, eps, 1, options["residual"], torch.empty(3, 20))
    torch.library.opcheck(torch.ops.dalle_fast.decode_linear_cpu, arguments)

    def twice(x: Tensor) -> Tensor:
        hidden, out = torch.empty(3, 20), torch.empty(3, 2)
        bind_decode_linear(x, *tensors[1:], activation="fast_gelu", out=hidden, **options)()
        bind_decode_linear(hidden, torch.ones(2, 20), out=out)()
        return out * 2

    torch.testing.assert_close(torch.compile(twice, fullgraph=True)(tensors[0]), twice(tensors[0]))


X, WEIGHT, OUT = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, 4)


@needs_extension
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 5)}, "x must have 6 elements, got 10"),
        ({"x": torch.zeros(3)}, "x and weight must have 2 dimensions"),
        ({"x": X.double()}, "x must have dtype Float, got Double"),
        ({"weight": WEIGHT.double()}, "weight must be float32, float16 or bfloat16, got Double"),
        ({"weight": torch.zeros(3, 4).T}, "weight must be contiguous"),
        ({"bias": torch.zeros(3)}, "bias must have 4 elements, got 3"),
        ({"gain": torch.ones(3)}, "gain and shift must be given together"),
        ({"residual": torch.zeros(2, 3)}, "residual must have 8 elements, got 6"),
        ({"activation": 4}, "activation must be in 0..3, got 4"),
        ({"out": torch.zeros(2, 5)}, "out must have 8 elements, got 10"),
    ],
)
def test_errors(changes, message):
    arguments = {
        "x": X,
        "weight": WEIGHT,
        "bias": None,
        "gain": None,
        "shift": None,
        "eps": 1e-5,
        "activation": 0,
        "residual": None,
        "out": OUT,
    }
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.dalle_fast.decode_linear_cpu(*(arguments | changes).values())
