"""The noise against an independent Philox and its distribution; the relaxation, its gradients, messages."""

import math
import re

import numpy as np
import pytest
import torch
from helpers import assert_within_budget, needs_extension
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from dalle_fast import reference
from dalle_fast.ops import backends
from dalle_fast.ops.gumbel import gumbel_quantize, gumbel_softmax
from dalle_fast.reference.philox import philox

BACKENDS = ("auto", "reference", pytest.param("cpp", marks=needs_extension))
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def philox_by_hand(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 in Python integers, after the published definition."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * x0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x2, 2**32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [x0, x1, x2, x3]


def noise_by_hand(seed: int, row: int, code: int) -> float:
    """The documented formula for one element, in float64."""
    counter = [row % 2**32, row // 2**32, code // 128 * 32 + code % 32, 0]
    word = philox_by_hand(counter, [seed % 2**32, seed // 2**32])[code % 128 // 32]
    return -math.log(-math.log(((word >> 9) + 0.5) * 2**-23))


# counter, key, result: the known answers published with Random123.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    words = philox([torch.tensor([word]) for word in counter], key)
    assert [int(word) for word in words] == expected
    assert philox_by_hand(counter, key) == expected


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 + 5, 2**64 - 1])
def test_noise_by_hand(seed):
    rows, codes = 3, 300
    noise = reference.gumbel_noise(seed, (rows, codes), dtype=torch.float64).numpy()
    expected = [[noise_by_hand(seed, row, code) for code in range(codes)] for row in range(rows)]
    np.testing.assert_allclose(noise, expected, rtol=1e-12)


def test_noise_does_not_depend_on_shape():
    noise = reference.gumbel_noise(7, (12, 200))
    assert torch.equal(reference.gumbel_noise(7, (3, 4, 200)), noise.reshape(3, 4, 200))
    assert torch.equal(reference.gumbel_noise(7, (5, 90)), noise[:5, :90])
    assert torch.equal(reference.gumbel_noise(torch.tensor(7), (12, 200)), noise)
    assert reference.gumbel_noise(7, (200,)).shape == (200,)
    assert torch.equal(reference.gumbel_noise(7, (200,)), noise[0])
    assert reference.gumbel_noise(7, (0, 200)).shape == (0, 200)


def test_noise_is_the_same_in_both_precisions():
    single = reference.gumbel_noise(7, (50, 256))
    double = reference.gumbel_noise(7, (50, 256), dtype=torch.float64)
    torch.testing.assert_close(single.double(), double, rtol=1e-6, atol=1e-6)


def test_largest_and_smallest_noise_are_finite():
    for word, limit in ((0, -2.8115), (2**32 - 1, 16.6355)):
        u = (torch.tensor([word >> 9]).float() + 0.5) * 2.0**-23
        assert 0 < u < 1
        assert -torch.log(-torch.log(u)).item() == pytest.approx(limit, abs=1e-3)


def test_noise_follows_the_gumbel_distribution():
    noise = np.sort(reference.gumbel_noise(1, (500, 256), dtype=torch.float64).numpy().ravel())
    count = noise.size
    cdf = np.exp(-np.exp(-noise))
    steps = np.arange(count + 1) / count
    distance = max(np.abs(cdf - steps[:-1]).max(), np.abs(cdf - steps[1:]).max())
    # Kolmogorov-Smirnov at the 1% level.
    assert distance < 1.628 / math.sqrt(count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("upper", [False, True])
def test_tails_of_the_noise(upper, dtype):
    """The thousandth of the draws at either end, against the distribution within that end."""
    share = 1e-3
    noise = reference.gumbel_noise(9, (4096, 1024), dtype=dtype).double()
    cdf = torch.exp(-torch.exp(-noise)).flatten()
    beyond = 1 - cdf if upper else cdf
    tail = np.sort((beyond[beyond < share] / share).numpy())
    count, expected = tail.size, share * noise.numel()
    assert abs(count - expected) < 4 * math.sqrt(expected)
    steps = np.arange(count + 1) / count
    distance = max(np.abs(tail - steps[:-1]).max(), np.abs(tail - steps[1:]).max())
    # Kolmogorov-Smirnov at the 1% level; u has steps of 2^-23, a ten-thousandth of this share.
    assert distance < 1.628 / math.sqrt(count) + 2.0**-23 / share


def test_rows_codes_and_seeds_are_uncorrelated():
    noise = reference.gumbel_noise(3, (400, 256), dtype=torch.float64) - 0.5772
    other = reference.gumbel_noise(4, (400, 256), dtype=torch.float64) - 0.5772
    limit = 4 * (math.pi**2 / 6) / math.sqrt(noise.numel())
    pairs = [(noise[1:], noise[:-1]), (noise, other)]
    pairs += [(noise[:, lag:], noise[:, :-lag]) for lag in (1, 32, 128)]
    for left, right in pairs:
        assert (left * right).mean().abs() < limit


@each_backend
def test_codes_follow_the_softmax(backend):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0, -math.inf])
    draws = 20_000
    codes = gumbel_softmax(logits.expand(draws, -1), hard=True, seed=11, backend=backend).argmax(-1)
    counts = torch.bincount(codes, minlength=len(logits)).double()
    expected = torch.softmax(logits.double(), 0) * draws
    assert counts[-1] == 0
    chi_square = ((counts - expected)[:-1].square() / expected[:-1]).sum()
    # The 99.9% point of chi-square with 5 degrees of freedom.
    assert chi_square < 20.52


def widest(backend) -> torch.dtype:
    """The widest dtype that ``backend`` takes."""
    return torch.float32 if backend == "cpp" else torch.float64


@each_backend
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax_of_perturbed_logits(backend, dim):
    logits = torch.randn(5, 140, 3, dtype=widest(backend))
    noise = reference.gumbel_noise(5, logits.movedim(dim, -1).shape, dtype=torch.float64)
    perturbed = logits.double() + noise.movedim(-1, dim)
    soft = gumbel_softmax(logits, 0.4, dim=dim, seed=5, backend=backend)
    torch.testing.assert_close(soft, torch.softmax(perturbed / 0.4, dim).to(logits.dtype))
    hard = gumbel_softmax(logits, 0.4, True, dim, seed=5, backend=backend)
    one_hot = F.one_hot(perturbed.argmax(dim), logits.shape[dim]).movedim(-1, dim)
    assert torch.equal(hard, one_hot.to(logits.dtype))


@each_backend
def test_quantize(backend):
    logits, codebook = (
        torch.randn(2, 150, 3, 4, dtype=widest(backend)),
        torch.randn(150, 7, dtype=widest(backend)),
    )
    soft = gumbel_softmax(logits, 0.7, dim=1, seed=9, backend=backend)
    out = gumbel_quantize(logits, codebook, 0.7, seed=9, backend=backend)
    torch.testing.assert_close(out.quantized, torch.einsum("bkhw,kd->bdhw", soft, codebook))
    assert torch.equal(out.indices, soft.argmax(1))
    q = torch.softmax(logits, 1)
    torch.testing.assert_close(out.kl, (q * (q * 150).log()).sum(1))
    hard = gumbel_quantize(logits, codebook, 0.7, hard=True, seed=9, backend=backend)
    assert torch.equal(hard.quantized, codebook[out.indices].movedim(-1, 1))
    assert torch.equal(hard.indices, out.indices) and torch.equal(hard.kl, out.kl)


@each_backend
def test_codes_last_and_channels_first_agree(backend):
    logits, codebook = torch.randn(2, 150, 3, 4), torch.randn(150, 7)
    first = gumbel_quantize(logits, codebook, 0.7, seed=9, backend=backend)
    last = gumbel_quantize(logits.movedim(1, -1), codebook, 0.7, dim=-1, seed=9, backend=backend)
    torch.testing.assert_close(last.quantized.movedim(-1, 1), first.quantized)
    assert torch.equal(last.indices, first.indices)
    torch.testing.assert_close(last.kl, first.kl)


def test_seed_on_another_device():
    with FakeTensorMode():
        logits, seed = torch.empty(3, 5, dtype=torch.float64), torch.empty((), dtype=torch.int64, device="cuda")
        assert gumbel_softmax(logits, seed=seed).shape == logits.shape


def plain_quantize(logits, codebook, noise):
    weights = torch.softmax((logits + noise) / 0.5, dim=-1)
    log_q = torch.log_softmax(logits, dim=-1)
    return weights @ codebook, (log_q.exp() * log_q).sum(-1) + math.log(logits.shape[-1])


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_budget(backend, dtype):
    wide = [torch.randn(1000, 200, dtype=torch.float64) * 4, torch.randn(200, 16, dtype=torch.float64)]
    narrow = [tensor.to(dtype).requires_grad_() for tensor in wide]
    wide = [tensor.detach().double().requires_grad_() for tensor in narrow]
    noise = reference.gumbel_noise(2, (1000, 200), dtype=torch.float64)
    out = gumbel_quantize(*narrow, 0.5, dim=-1, seed=2, backend=backend)
    peer, truth = plain_quantize(*narrow, noise.to(dtype)), plain_quantize(*wide, noise)
    assert out.quantized.dtype == dtype and out.kl.dtype == torch.float32
    for actual, expected_peer, expected in zip((out.quantized, out.kl), peer, truth, strict=True):
        assert_within_budget(actual.to(dtype), expected_peer, expected)
        upstream = torch.randn_like(expected_peer)
        grads, peer_grads, true_grads = (
            torch.autograd.grad(value, inputs, upstream.to(value.dtype), retain_graph=True, allow_unused=True)
            for value, inputs in ((actual, narrow), (expected_peer, narrow), (expected, wide))
        )
        for grad, peer_grad, true_grad in zip(grads, peer_grads, true_grads, strict=True):
            if true_grad is not None:
                assert_within_budget(grad, peer_grad, true_grad)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients(backend):
    logits = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def run(logits, codebook):
        out = gumbel_quantize(logits, codebook, 0.8, seed=1, backend=backend)
        return out.quantized, out.kl

    assert torch.autograd.gradcheck(run, (logits, codebook))
    assert torch.autograd.gradcheck(lambda x: gumbel_softmax(x, 0.8, dim=1, seed=1, backend=backend), logits)


@each_backend
def test_hard_has_the_gradient_of_soft(backend):
    logits = torch.randn(6, 5, dtype=widest(backend), requires_grad=True)
    upstream = torch.randn(6, 5, dtype=widest(backend))
    soft, hard = (
        torch.autograd.grad(gumbel_softmax(logits, 0.8, hard, seed=1, backend=backend), logits, upstream)[0]
        for hard in (False, True)
    )
    assert torch.equal(soft, hard)


@each_backend
def test_hard_quantisation_has_both_gradients_of_soft(backend):
    logits = torch.randn(2, 9, 5, dtype=widest(backend), requires_grad=True)
    codebook = torch.randn(9, 4, dtype=widest(backend), requires_grad=True)
    upstream = torch.randn(2, 4, 5, dtype=widest(backend))
    outs = [gumbel_quantize(logits, codebook, 0.8, hard=hard, seed=1, backend=backend) for hard in (False, True)]
    assert torch.equal(outs[1].quantized, codebook[outs[1].indices].movedim(-1, 1))
    soft, hard = (torch.autograd.grad(out.quantized, (logits, codebook), upstream) for out in outs)
    for one, other in zip(soft, hard, strict=True):
        assert torch.equal(one, other)


@each_backend
def test_stride_0_gradient(backend):
    logits = torch.randn(2, 5, 3, requires_grad=True)
    out = gumbel_quantize(logits, torch.randn(5, 4), seed=1, backend=backend).quantized
    (from_sum,) = torch.autograd.grad(out.sum(), logits, retain_graph=True)
    (from_ones,) = torch.autograd.grad(out, logits, torch.ones_like(out))
    torch.testing.assert_close(from_sum, from_ones)


@each_backend
def test_impossible_codes(backend):
    logits = torch.randn(50, 6, dtype=widest(backend))
    logits[:, 2] = -math.inf
    logits.requires_grad_()
    out = gumbel_quantize(logits, torch.randn(6, 3, dtype=logits.dtype), dim=-1, seed=1, backend=backend)
    assert not (out.indices == 2).any()
    possible = torch.cat([logits[:, :2], logits[:, 3:]], dim=1)
    q = torch.softmax(possible, -1)
    torch.testing.assert_close(out.kl, (q * (q * 6).log()).sum(-1))
    (out.quantized.sum() + out.kl.sum()).backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[:, 2] == 0).all()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_logits_and_small_tau(backend, dtype):
    logits = torch.full((4, 8192), -65504.0, dtype=dtype)
    logits[:2, 5] = 65504.0
    logits.requires_grad_()
    for tau in (1.0, 1 / 16, 1e-3):
        out = gumbel_quantize(logits, torch.randn(8192, 3, dtype=dtype), tau, dim=-1, seed=1, backend=backend)
        assert torch.isfinite(out.quantized).all() and torch.isfinite(out.kl).all()
        assert (out.indices[:2] == 5).all()
        torch.testing.assert_close(out.kl, torch.tensor([math.log(8192)] * 2 + [0.0] * 2), atol=1e-5, rtol=1e-5)
        (grad,) = torch.autograd.grad(out.quantized.sum() + out.kl.sum(), logits)
        assert torch.isfinite(grad).all()


def test_default_seed_follows_manual_seed():
    logits, codebook = torch.zeros(4, 50), torch.randn(50, 3)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append([gumbel_quantize(logits, codebook, dim=-1).quantized for _ in range(2)])
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[0][1])
    assert not torch.equal(runs[0][0], runs[2][0])


def test_compiles_without_a_break():
    logits, codebook = torch.randn(4, 50), torch.randn(50, 3)
    compiled = torch.compile(gumbel_quantize, fullgraph=True, backend="aot_eager")
    for seed in (None, 5, torch.tensor(5)):
        torch.manual_seed(0)
        out = compiled(logits, codebook, dim=-1, seed=seed)
        torch.manual_seed(0)
        torch.testing.assert_close(out, gumbel_quantize(logits, codebook, dim=-1, seed=seed))


def test_autocast_keeps_float32():
    logits, codebook = torch.randn(4, 50), torch.randn(50, 3)
    expected = gumbel_quantize(logits, codebook, dim=-1, seed=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gumbel_quantize(logits, codebook, dim=-1, seed=5)
        mixed = gumbel_quantize(logits.bfloat16(), codebook, dim=-1, seed=5)
        soft = gumbel_softmax(logits, seed=5)
    assert soft.dtype == torch.float32
    torch.testing.assert_close(soft, torch.softmax(logits + reference.gumbel_noise(5, (4, 50)), -1))
    assert torch.equal(out.quantized, expected.quantized)
    assert mixed.quantized.dtype == torch.float32


LOGITS = torch.zeros(2, 5, 3)
CODEBOOK = torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tau": 0.0}, ValueError, "tau must be finite and > 0, got 0.0"),
        ({"tau": -1}, ValueError, "tau must be finite and > 0, got -1"),
        ({"tau": math.nan}, ValueError, "tau must be finite and > 0, got nan"),
        ({"tau": math.inf}, ValueError, "tau must be finite and > 0, got inf"),
        ({"dim": 3}, ValueError, "dim must be a dimension of logits, got 3 for shape (2, 5, 3)"),
        ({"dim": -4}, ValueError, "dim must be a dimension of logits, got -4 for shape (2, 5, 3)"),
        ({"seed": -1}, ValueError, "seed must be in [0, 2^64), got -1"),
        ({"seed": 2**64}, ValueError, f"seed must be in [0, 2^64), got {2**64}"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, an int64 tensor or None, got float"),
        (
            {"seed": torch.zeros(1)},
            TypeError,
            "a seed tensor must be int64 of no dimensions, got torch.float32 (1,)",
        ),
        (
            {"logits": LOGITS[:, :0]},
            ValueError,
            "logits must have at least one code in dimension 1, got shape (2, 0, 3)",
        ),
        ({"logits": LOGITS.long()}, TypeError, "logits must be floating point, got torch.int64"),
        ({"logits": [0.0]}, TypeError, "logits must be a tensor, got list"),
        (
            {"logits": LOGITS.index_fill(2, torch.tensor([1]), -math.inf)},
            ValueError,
            "logits must have a code above -inf at each position, got 2 without",
        ),
        ({"backend": "gpu"}, ValueError, "backend must be one of auto, triton, cpp, reference, got 'gpu'"),
    ],
)
def test_errors(options, error, message):
    options = {"logits": LOGITS, "dim": 1} | options
    with pytest.raises(error, match=re.escape(message)):
        gumbel_softmax(**options)
    with pytest.raises(error, match=re.escape(message)):
        gumbel_quantize(codebook=CODEBOOK, **options)


@pytest.mark.parametrize(
    ("codebook", "error", "message"),
    [
        (torch.zeros(4, 4), ValueError, "codebook must have shape (5, D), got (4, 4)"),
        (torch.zeros(5), ValueError, "codebook must have shape (5, D), got (5,)"),
        (
            CODEBOOK.double(),
            TypeError,
            "logits, codebook must have one dtype, got torch.float32, torch.float64",
        ),
        (CODEBOOK.to("meta"), ValueError, "logits, codebook must be on one device, got cpu, meta"),
    ],
)
def test_codebook_errors(codebook, error, message):
    with pytest.raises(error, match=re.escape(message)):
        gumbel_quantize(LOGITS, codebook)


def test_missing_backends(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match='backend="triton" is not available: '):
        gumbel_softmax(LOGITS, backend="triton")
    with pytest.raises(RuntimeError, match='backend="triton" is not available: '):
        gumbel_quantize(LOGITS, CODEBOOK, backend="triton")
    with pytest.raises(
        TypeError, match=r'"triton" of gumbel_quantize takes float32, float16 and bfloat16, got torch\.f'
    ):
        gumbel_quantize(LOGITS.double(), CODEBOOK.double(), backend="triton")
    with pytest.raises(TypeError, match=r'"cpp" of gumbel_softmax takes float32, float16 and bfloat16, got torch\.f'):
        gumbel_softmax(LOGITS.double(), backend="cpp")
    monkeypatch.setattr(backends, "extension", None)
    monkeypatch.setattr(backends, "extension_error", ImportError("undefined symbol: torch_x"))
    with pytest.raises(RuntimeError, match=r"undefined symbol: torch_x.*pip install --no-build-isolation \."):
        gumbel_quantize(LOGITS, CODEBOOK, backend="cpp")
    assert gumbel_softmax(LOGITS, dim=1).shape == LOGITS.shape


@needs_extension
def test_cpp_on_another_device():
    with pytest.raises(RuntimeError, match='backend="cpp" runs on cpu and cuda tensors, got a tensor on meta'):
        gumbel_quantize(LOGITS.to("meta"), CODEBOOK.to("meta"), backend="cpp")
