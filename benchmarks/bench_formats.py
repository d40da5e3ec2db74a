"""The 16-bit storage formats, 4 Mi values: C++ against the reference, and against PyTorch's own float16.

The float16 rows, ``x.half()`` and its inverse, move as many bytes: what a copy costs that only changes the dtype.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dalle_fast import formats
from dalle_fast.ops.backends import extension

VALUES = 1 << 22
BYTES_PER_VALUE = 6  # four of float32, two of the word

CODECS = {
    "1-6-9": (formats.encode_169, formats.decode_169),
    "0-6-10": (formats.encode_0610, formats.decode_0610),
}

each_format = pytest.mark.parametrize("name", CODECS)
each_backend = pytest.mark.parametrize("backend", ["reference", "cpp", "float16"])


@pytest.fixture
def values() -> Tensor:
    """float32 over the formats' range and beyond both its ends, both signs, zero, infinities and NaN."""
    spread = torch.randn(VALUES) * torch.exp2(torch.empty(VALUES).uniform_(-64, 6))
    spread[:4] = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])
    return spread


def need(backend: str) -> None:
    """Skip the C++ rows where there is no C++."""
    if backend == "cpp" and extension is None:
        pytest.skip("dalle_fast._C is not built; dalle-fast info says why")


def must_equal(expected: Tensor) -> Callable[[Tensor], None]:
    """The check that a result is this one, value for value."""
    return lambda actual: torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@each_backend
@each_format
@pytest.mark.benchmark(min_rounds=20)
def test_encode(benchmark, checked, values, name, backend):
    benchmark.group = f"encode {name}"
    need(backend)
    encode, _ = CODECS[name]
    if backend == "float16":
        call, expected = values.half, values.double().half()
    else:
        call, expected = lambda: encode(values, backend=backend), encode(values, backend="reference")
    checked(call, must_equal(expected), gigabytes=BYTES_PER_VALUE * VALUES / 1e9)


@each_backend
@each_format
@pytest.mark.benchmark(min_rounds=20)
def test_decode(benchmark, checked, values, name, backend):
    benchmark.group = f"decode {name}"
    need(backend)
    encode, decode = CODECS[name]
    if backend == "float16":
        words = values.half()
        call, expected = words.float, words.double().float()
    else:
        words = encode(values)
        call, expected = lambda: decode(words, backend=backend), decode(words, backend="reference")
    checked(call, must_equal(expected), gigabytes=BYTES_PER_VALUE * VALUES / 1e9)
