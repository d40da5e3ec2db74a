"""dalle_fast.formats against a model in numpy that searches the values of all words."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dalle_fast import formats
from dalle_fast.ops import backends


@dataclass(frozen=True)
class Format:
    """A format of dalle_fast.formats: the names under test, and its values by the formula."""

    name: str
    mantissa_bits: int
    signed: bool

    def encode(self, values: torch.Tensor, **options: str) -> torch.Tensor:
        return getattr(formats, f"encode_{self.name}")(values, **options)

    def decode(self, words: torch.Tensor, **options: str) -> torch.Tensor:
        return getattr(formats, f"decode_{self.name}")(words, **options)

    @property
    def magnitudes(self) -> np.ndarray:
        """The magnitude of every word without its sign bit, in fp64: ascending, the first is 2^-60, not 0."""
        words = np.arange(2 ** (6 + self.mantissa_bits))
        exponent, fraction = np.divmod(words, 2**self.mantissa_bits)
        return np.ldexp(1.0 + fraction / 2**self.mantissa_bits, exponent - 60)

    def true_values(self) -> np.ndarray:
        """What each of the 65,536 words stands for, in fp64."""
        values = self.magnitudes
        if self.signed:
            values = np.concatenate([values, -values])
        values[0] = 0.0  # the word 0 alone: the sign bit without a magnitude is -2^-60
        return values

    def true_words(self, values: np.ndarray) -> np.ndarray:
        """The word of each fp32 value: the nearest one, ties away from zero, by search."""
        magnitudes = self.magnitudes
        with np.errstate(invalid="ignore"):  # signalling NaNs
            exact = np.abs(values.astype(np.float64))
        clipped = np.clip(np.nan_to_num(exact), magnitudes[0], magnitudes[-1])
        below = np.searchsorted(magnitudes, clipped, side="right") - 1
        above = np.minimum(below + 1, len(magnitudes) - 1)
        words = np.where(clipped - magnitudes[below] >= magnitudes[above] - clipped, above, below)
        words = words + 2**15 * np.signbit(values) if self.signed else np.where(np.signbit(values), 0, words)
        words = np.where(np.isnan(values) | (exact < magnitudes[1]), 0, words)
        return words.astype(np.uint16).view(np.int16)


FORMATS = [Format("169", 9, True), Format("0610", 10, False)]
BACKENDS = ["reference", "cpp-scalar", "cpp-avx2", "cpp-avx512", "cuda"]

pytestmark = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)


@pytest.fixture(params=BACKENDS)
def run(request):
    """Calls formats' functions with one backend, every CPU level of the extension counting as one."""
    name = request.param
    if name == "reference":
        yield lambda function, tensor: function(tensor, backend="reference")
        return
    if backends.extension is None:
        pytest.skip(f"dalle_fast._C is not built: {backends.extension_error}")
    if name == "cuda":
        if not (torch.cuda.is_available() and backends.has_cuda_extension):
            pytest.skip("no CUDA device, or dalle_fast._C without its CUDA half")
        yield lambda function, tensor: function(tensor.cuda(), backend="cpp").cpu()
        return
    level = backends.extension.build_info()["cpu_level"]
    try:
        backends.extension.set_cpu_level(name.removeprefix("cpp-"))
    except ValueError as error:
        pytest.skip(str(error))
    yield lambda function, tensor: function(tensor, backend="cpp")
    backends.extension.set_cpu_level(level)


def all_words() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


def neighbours(values: np.ndarray) -> np.ndarray:
    """Each fp32 value with the floats directly below and above it, in both signs."""
    values = values.astype(np.float32)
    below, above = np.nextafter(values, np.float32(-np.inf)), np.nextafter(values, np.float32(np.inf))
    values = np.concatenate([below, values, above])
    return np.concatenate([values, -values])


def check_encode(fmt: Format, run, values: np.ndarray) -> None:
    words = run(fmt.encode, torch.from_numpy(values)).numpy()
    wrong = np.flatnonzero(words != fmt.true_words(values))
    assert wrong.size == 0, f"{wrong.size} wrong, first: {values[wrong[0]]!r} gave {words[wrong[0]]:#06x}"


def test_decode_every_word(fmt, run):
    words = all_words()
    expected = torch.from_numpy(fmt.true_values()[words.numpy().view(np.uint16)])
    decoded = run(fmt.decode, words)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded.double(), expected)
    assert torch.equal(decoded.signbit(), expected.signbit())


def test_every_word_survives_a_round_trip(fmt, run):
    words = all_words()
    again = run(fmt.encode, run(fmt.decode, words))
    # In 1-6-9 the sign bit alone stands for -2^-60, which is below the smallest value that is written.
    expected = torch.where(words == -(2**15), 0, words) if fmt.signed else words
    assert torch.equal(again, expected)


def test_encode_at_every_rounding_boundary(fmt, run):
    magnitudes = fmt.magnitudes
    midpoints = (magnitudes[:-1] + magnitudes[1:]) / 2
    check_encode(fmt, run, neighbours(np.concatenate([magnitudes, midpoints])))


def test_encode_random_bit_patterns(fmt, run):
    bits = np.random.default_rng(0).integers(0, 2**32, 300_001, dtype=np.uint32)
    check_encode(fmt, run, bits.view(np.float32))


def test_encode_special_values(fmt, run):
    largest, smallest = fmt.magnitudes[-1], fmt.magnitudes[1]
    bits = np.array([0x7F800001, 0x7FC00000, 0xFFC00000, 0xFF800001], dtype=np.uint32)
    assert not run(fmt.encode, torch.from_numpy(bits.view(np.float32))).any()  # every kind of NaN
    top = 0x7FFF if fmt.signed else -1
    for value, word in [
        (float("inf"), top),
        (float("-inf"), -1 if fmt.signed else 0),
        (3.4e38, top),
        (16.0, top),
        (largest, top),
        (smallest, 1),
        (np.nextafter(np.float32(smallest), np.float32(0)), 0),
        (2.0**-60, 0),
        (1.4e-45, 0),
        (-1.4e-45, 0),
        (-smallest, -(2**15) + 1 if fmt.signed else 0),
        (-1.0, -(2**15) + (60 << 9) if fmt.signed else 0),
        (1.0, (60 << 9) if fmt.signed else (60 << 10) - 2**16),
        (0.0, 0),
        (-0.0, 0),
    ]:
        assert run(fmt.encode, torch.tensor([value], dtype=torch.float32)).item() == word, value


def test_limits_are_those_of_the_paper(fmt):
    limits = {"169": (15.984375, 8.690558e-19), "0610": (15.9921875, 8.682088e-19)}
    largest, smallest = limits[fmt.name]
    decoded = fmt.decode(all_words())
    assert decoded.max().item() == largest
    assert fmt.decode(torch.ones(1, dtype=torch.int16)).item() == pytest.approx(smallest, rel=1e-6)


def test_every_length_and_offset(fmt, run):
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(fmt.true_words(values.numpy()))
    decoded = torch.from_numpy(fmt.true_values()[expected.numpy().view(np.uint16)]).float()
    for length in [*range(70), 127, 128, 129, 255, 256, 257]:
        for offset in (0, 1, 3):
            part = slice(offset, offset + length)
            assert torch.equal(run(fmt.encode, values[part]), expected[part])
            assert torch.equal(run(fmt.decode, expected[part]), decoded[part])


def test_any_shape_and_strides(fmt, run):
    values = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(1))
    for view in [
        values.permute(2, 0, 1),
        values[::2, 1:, ::3],
        values[0, 0, 0],
        values[:0],
        values[:1].expand(3, 5, 4),
    ]:
        words = run(fmt.encode, view)
        assert words.shape == view.shape and words.is_contiguous() and words.dtype == torch.int16
        assert torch.equal(words.flatten(), run(fmt.encode, view.flatten()))
        turned = words.transpose(0, -1) if words.dim() else words
        assert torch.equal(run(fmt.decode, turned).flatten(), run(fmt.decode, turned.flatten()))


def test_result_does_not_depend_on_the_number_of_threads(fmt, run):
    values = torch.randn(200_003, generator=torch.Generator().manual_seed(2))
    expected = torch.from_numpy(fmt.true_words(values.numpy()))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(fmt.encode, values), expected)
    finally:
        torch.set_num_threads(threads)


def test_encode_leaves_autograd(fmt, run):
    values = torch.ones(3, requires_grad=True)
    assert not run(fmt.encode, values).requires_grad


@pytest.mark.skipif(backends.extension is None, reason=f"dalle_fast._C is not built: {backends.extension_error}")
class TestCompiledOps:
    def ops(self, fmt):
        library = torch.ops.dalle_fast
        return getattr(library, f"encode_{fmt.name}").default, getattr(library, f"decode_{fmt.name}").default

    def test_opcheck(self, fmt):
        encode, decode = self.ops(fmt)
        for shape in [(3, 5), (0,), ()]:
            torch.library.opcheck(encode, (torch.randn(shape),))
            torch.library.opcheck(decode, (torch.ones(shape, dtype=torch.int16),))

    def test_refuses_other_dtypes(self, fmt):
        encode, decode = self.ops(fmt)
        with pytest.raises(RuntimeError, match="values must have dtype Float, got Double"):
            encode(torch.ones(2, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="words must have dtype Short, got Int"):
            decode(torch.ones(2, dtype=torch.int32))

    def test_refuses_strided_tensors_instead_of_copying(self, fmt):
        encode, decode = self.ops(fmt)
        rule = r"must be contiguous, got shape \(3, 2\) with strides \(1, 3\)"
        with pytest.raises(RuntimeError, match=f"values {rule}"):
            encode(torch.ones(2, 3).t())
        with pytest.raises(RuntimeError, match=f"words {rule}"):
            decode(torch.ones(2, 3, dtype=torch.int16).t())


def test_compiles_without_graph_breaks(fmt):
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def there_and_back(values):
        return fmt.decode(fmt.encode(values)) * 2

    for shape in [(3, 4), (5, 2)]:
        values = torch.randn(shape).t()
        expected = fmt.decode(fmt.encode(values, backend="reference"), backend="reference") * 2
        assert torch.equal(there_and_back(values), expected)


def test_meta_tensors_keep_their_shape(fmt):
    words = fmt.encode(torch.empty(2, 3, device="meta"))
    assert words.shape == (2, 3) and words.dtype == torch.int16
    assert fmt.decode(words).dtype == torch.float32


def test_refuses_what_is_no_tensor(fmt):
    with pytest.raises(TypeError, match=r"values must be a torch\.Tensor, got list"):
        fmt.encode([1.0])
    with pytest.raises(TypeError, match=r"words must be a torch\.Tensor, got int"):
        fmt.decode(1)


def test_refuses_other_dtypes(fmt):
    with pytest.raises(TypeError, match=r"values must have dtype torch\.float32, got torch\.float16"):
        fmt.encode(torch.ones(1, dtype=torch.float16))
    with pytest.raises(TypeError, match=r"words must have dtype torch\.int16, got torch\.int32"):
        fmt.decode(torch.ones(1, dtype=torch.int32))


def test_refuses_unknown_backends(fmt):
    with pytest.raises(ValueError, match='backend must be "auto", "cpp" or "reference", got \'triton\''):
        fmt.encode(torch.ones(1), backend="triton")


def test_auto_without_the_extension_is_the_reference(fmt, monkeypatch):
    values = torch.randn(100, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(backends, "extension", None)
    words = fmt.encode(values)
    assert torch.equal(words, torch.from_numpy(fmt.true_words(values.numpy())))
    assert torch.equal(fmt.decode(words), fmt.decode(words, backend="reference"))
    with pytest.raises(RuntimeError, match=r'backend="cpp" needs the compiled extension dalle_fast\._C'):
        fmt.encode(values, backend="cpp")
