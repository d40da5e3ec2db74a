"""The Triton kernels of Gumbel quantisation in Triton's interpreter, against float64; on a machine without a GPU too.

As for attention, this module runs itself once more in a process of its own, for the interpreter is chosen when triton
is imported. What the interpreter cannot show (registers, bfloat16, races, approximate logarithms) is not tested here.
"""

import math
import mmap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_within_budget
from interpreter import INTERPRETED, interpreted, run_interpreted
from torch import Tensor

from dalle_fast import reference
from dalle_fast.reference.gumbel import kl_from_uniform

pytest.importorskip("triton")

from dalle_fast.kernels.common import H200
from dalle_fast.kernels.gumbel import gumbel_fwd, gumbel_weights, plan_fwd
from dalle_fast.kernels.gumbel_backward import gumbel_bwd, plan_bwd
from dalle_fast.kernels.gumbel_tiles import GumbelTiles

from dalle_fast.ops.gumbel import gumbel_quantize, gumbel_softmax

# By time: that of the other half is about the same.
HALF_OF_THE_TESTS = "float16 or large_and_equal or widths"


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_in_the_interpreter():
    """All tests below, half of them in each of two processes."""
    with ThreadPoolExecutor() as pool:
        halves = (HALF_OF_THE_TESTS, f"not ({HALF_OF_THE_TESTS})")
        list(pool.map(lambda half: run_interpreted(__file__, "-k", half), halves))


def refused(dtype: torch.dtype, message: str) -> None:
    """Each launcher raises RuntimeError for CPU tensors of the dtype."""
    logits, seed, stats = torch.zeros(1, 8, 3, dtype=dtype), torch.tensor(0), torch.zeros(6, 3)
    options = {"tau": 1.0}
    with pytest.raises(RuntimeError, match=message):
        gumbel_fwd(logits, None, seed, stats, stats[0].long(), None, None, None, hard=False, **options)
    with pytest.raises(RuntimeError, match=message):
        gumbel_weights(logits, seed, stats, logits, **options)
    with pytest.raises(RuntimeError, match=message):
        gumbel_bwd(logits, logits[0], seed, stats, stats[0], logits, None, logits, None, **options)


@pytest.mark.skipif(INTERPRETED, reason="the compiled kernels")
def test_no_cpu_tensors_outside_the_interpreter():
    refused(torch.float32, "run on CUDA devices, got a tensor on cpu; move it to one, or set")


@interpreted
def test_bfloat16_is_refused():
    message = r"interpreter computes bfloat16 on its bit patterns.*unset TRITON_INTERPRET"
    refused(torch.bfloat16, message)
    logits = torch.zeros(2, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=message):
        gumbel_softmax(logits, seed=1, backend="triton")


def poisoned(values: Tensor, order: tuple[int, int, int] = (0, 1, 2)) -> Tensor:
    """``values``, three dimensions, in the middle of a buffer of NaN; ``order`` is that of memory, slowest first."""
    moved = values.permute(order)
    buffer = torch.full([size + 2 * 35 for size in moved.shape], math.nan, dtype=values.dtype)
    view = buffer[35:-35, 35:-35, 35:-35]
    view.copy_(moved)
    return view.permute(*(order.index(axis) for axis in range(3)))


def surroundings_untouched(view: Tensor) -> bool:
    """Whether the buffer around a view of :func:`poisoned` still holds nothing but NaN."""
    buffer = view._base.clone()
    torch.as_strided(buffer, view.shape, view.stride(), view.storage_offset()).fill_(math.nan)
    return bool(buffer.isnan().all())


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


CHANNELS_FIRST, CHANNELS_LAST, CODES_FIRST = (0, 1, 2), (0, 2, 1), (1, 0, 2)
SMALL, WIDE = GumbelTiles(16, 16, 16, 4, 1), GumbelTiles(64, 32, 128, 4, 1)


def run(
    logits: Tensor, codebook: Tensor, dz: Tensor, dkl: Tensor | None, *, tau=1.0, seed=5, hard=False,
    tiles=SMALL, order=CHANNELS_FIRST, num_shares=None, num_runs=None,
) -> list[Tensor]:  # fmt: skip
    """quantized, indices, kl and the gradients of logits and codebook, from and into poisoned memory."""
    (batch, codes, positions), width = logits.shape, codebook.shape[1]
    rows = batch * positions
    read = poisoned(logits, order)
    quantized, dl = (poisoned(nan(batch, size, positions, dtype=logits.dtype), order) for size in (width, codes))
    codebook = poisoned(codebook[None])[0]
    stats, kl, relaxed = nan(6, rows), nan(rows), nan(rows, width)
    indices, dc = torch.full((rows,), -1), nan(codes, width, dtype=logits.dtype)
    key = torch.tensor(seed if seed < 2**63 else seed - 2**64)
    gumbel_fwd(read, codebook, key, stats, indices, kl, relaxed, quantized, tau=tau, hard=hard, tiles=tiles)
    gumbel_bwd(
        read, codebook, key, stats, relaxed, poisoned(dz, order), dkl, dl, dc,
        tau=tau, dl_tiles=tiles, dcodebook_tiles=tiles, num_shares=num_shares, num_runs=num_runs,
    )  # fmt: skip
    assert surroundings_untouched(quantized) and surroundings_untouched(dl)
    shape = batch, positions
    return [quantized.clone(), indices.view(shape), kl.view(shape), dl.clone(), dc]


def by_formulas(logits, codebook, dz, dkl, *, tau, seed, hard=False) -> list[Tensor]:
    """The same in plain PyTorch, from z and without keeping y; of 16-bit inputs as their own dtype rounds them."""
    dtype, wide = logits.dtype, torch.promote_types(logits.dtype, torch.float32)
    rows, c = logits.to(wide).mT, codebook.to(wide)
    dz, dkl = dz.to(wide).mT, 0.0 if dkl is None else dkl.to(wide).view(*rows.shape[:2], 1)
    x = rows + reference.gumbel_noise(seed, rows.shape, dtype=wide)
    y = torch.softmax(x / tau, -1)
    z, indices, log_q = y @ c, x.argmax(-1), torch.log_softmax(rows, -1)
    q, log_q = log_q.exp(), log_q.masked_fill(log_q == -math.inf, 0.0)
    dl = y * (dz @ c.T - (z * dz).sum(-1, keepdim=True)) / tau
    dl = dl + dkl * q * (log_q - (q * log_q).sum(-1, keepdim=True))
    dc = y.flatten(0, 1).T @ dz.flatten(0, 1)
    quantized = c[indices] if hard else z
    results = [quantized.mT, indices, kl_from_uniform(rows), dl.mT, dc]
    return [one if number in (1, 2) else one.to(dtype) for number, one in enumerate(results)]


def make(batch=2, codes=140, positions=19, width=12, dtype=torch.float32, size=2.0) -> tuple[Tensor, ...]:
    """Logits, codebook and the gradients of quantized and kl."""
    return (
        (size * torch.randn(batch, codes, positions)).to(dtype),
        torch.randn(codes, width).to(dtype),
        torch.randn(batch, width, positions).to(dtype),
        torch.randn(batch * positions),
    )


def check(*inputs: Tensor | None, seed=5, draws=1, **options) -> list[Tensor]:
    """All results against float64, within the budget of plain PyTorch in the inputs' dtype.

    Of several draws together, where one may be near its truth by luck. Returns the results of the first.
    """
    wide = [None if tensor is None else tensor.double() for tensor in inputs]
    sample = {"tau": options.get("tau", 1.0), "hard": options.get("hard", False)}
    results = []
    for draw in range(seed, seed + draws):
        truth = by_formulas(*wide, **sample, seed=draw)
        found, peer = run(*inputs, seed=draw, **options), by_formulas(*inputs, **sample, seed=draw)
        assert torch.equal(found[1], truth[1])
        results.append((found, peer, truth))
    for number in (0, 2, 3, 4):
        found, peer, truth = (torch.stack([each[kind][number] for each in results]) for kind in range(3))
        assert found.dtype == peer.dtype
        assert_within_budget(found, peer, truth)
    return results[0][0]


each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
each_order = pytest.mark.parametrize("order", [CHANNELS_FIRST, CHANNELS_LAST, CODES_FIRST], ids=str)


@interpreted
@each_dtype
@each_order
def test_layouts(dtype, order):
    """Positions that end within a tile and tiles that span samples; codes that end within a block of 128."""
    check(*make(dtype=dtype), tau=0.7, order=order, tiles=SMALL, num_runs=2, num_shares=3)
    check(*make(batch=1, codes=256, positions=64, dtype=dtype), tau=0.7, order=order, tiles=WIDE, num_runs=1)


@interpreted
@each_dtype
@pytest.mark.parametrize("codes", [1, 2, 16, 31, 33, 100, 128, 129, 300])
def test_numbers_of_codes(dtype, codes):
    check(*make(codes=codes, positions=9, dtype=dtype), tiles=SMALL)
    check(*make(codes=codes, positions=9, dtype=dtype), tiles=WIDE, num_shares=2)


@interpreted
def test_published_number_of_codes():
    check(*make(batch=1, codes=8192, positions=5, width=128, dtype=torch.float16), tiles=WIDE)


@interpreted
@pytest.mark.parametrize("width", [1, 16, 17, 40, 200])
def test_widths_of_the_codebook(width):
    """Also of several blocks of columns."""
    check(*make(positions=6, codes=40, width=width), tiles=SMALL, draws=3, num_runs=1)
    check(*make(positions=6, codes=40, width=width), tiles=WIDE, draws=3, num_runs=1)


@interpreted
@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (1, 33), (5, 1), (33, 1), (3, 16), (2, 32)])
def test_numbers_of_positions(shape):
    batch, positions = shape
    check(*make(batch=batch, positions=positions, codes=40, width=5), tiles=SMALL, num_runs=2)


@interpreted
@each_dtype
@pytest.mark.parametrize("tau", [1.0, 1 / 16, 1 / 1024, 3.0])
def test_temperatures(dtype, tau):
    check(*make(dtype=dtype), tau=tau, tiles=WIDE, draws=3)


@interpreted
@pytest.mark.parametrize("tau", [1e-30, 1e-45, 1e-300])
def test_the_smallest_temperatures(tau):
    inputs = make(batch=1, positions=20)
    quantized, indices, *_ = run(*inputs, tau=tau)
    assert torch.equal(quantized, inputs[1][indices].mT)


@interpreted
@pytest.mark.parametrize("tau", [1e38, 1e46, 1e300])
def test_the_largest_temperatures(tau):
    """Codes past the last one, in a block of 128, have no share."""
    inputs = make(codes=40, positions=9)
    results = run(*inputs, tau=tau)
    assert all(result.isfinite().all() for result in results)
    torch.testing.assert_close(results[0], inputs[1].mean(0)[:, None].expand(2, -1, 9))


@interpreted
@pytest.mark.parametrize("tiles", [SMALL, WIDE], ids=["small", "wide"])
def test_a_block_of_the_least_number(tiles):
    """As which some mask codes: the sum of their distances to the maximum is infinite."""
    logits, *others = make(codes=300, positions=9)
    logits[:, :128] = torch.finfo(torch.float32).min
    check(logits, *others, tiles=tiles)


@interpreted
@pytest.mark.parametrize("tiles", [SMALL, WIDE], ids=["small", "wide"])
def test_of_equal_codes_the_first(tiles):
    """Logits so large that the noise is rounded to one of a few numbers."""
    _, *others = make(batch=1, codes=300, positions=40)
    logits = torch.full((1, 300, 40), 3e7)
    perturbed = logits + reference.gumbel_noise(5, (1, 40, 300)).mT
    assert ((perturbed == perturbed.amax(1, keepdim=True)).sum(1) > 1).any()
    assert torch.equal(run(logits, *others, tiles=tiles)[1].view(1, 40), perturbed.argmax(1))


@interpreted
@each_dtype
def test_hard_is_the_codes_row_with_the_gradient_of_soft(dtype):
    inputs = make(dtype=dtype)
    soft, hard = (check(*inputs, tau=0.5, hard=hard) for hard in (False, True))
    assert torch.equal(hard[0], inputs[1][hard[1]].mT)
    for one, other in zip(soft[1:], hard[1:], strict=True):
        assert torch.equal(one, other)


@interpreted
@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32, 2**63 + 5, 2**64 - 1])
def test_seeds(seed):
    check(*make(positions=10), seed=seed)


@interpreted
@each_dtype
def test_without_a_gradient_of_kl(dtype):
    *inputs, _ = make(dtype=dtype)
    check(*inputs, None)


@interpreted
def test_some_gradients():
    logits, codebook, dz, dkl = make()
    expected = run(logits, codebook, dz, dkl)
    stats, relaxed, seed = nan(6, 38), nan(38, 12), torch.tensor(5)
    quantized, indices = nan(2, 12, 19), torch.zeros(38, dtype=torch.int64)
    gumbel_fwd(logits, codebook, seed, stats, indices, nan(38), relaxed, quantized, tau=1.0, hard=False, tiles=SMALL)
    for number, gradient in ((3, nan(2, 140, 19)), (4, nan(140, 12))):
        wanted = [gradient, None] if number == 3 else [None, gradient]
        gumbel_bwd(
            logits, codebook, seed, stats, relaxed, dz, dkl, *wanted,
            tau=1.0, dl_tiles=SMALL, dcodebook_tiles=SMALL,
        )  # fmt: skip
        assert torch.equal(gradient, expected[number])


@interpreted
@each_dtype
def test_impossible_codes(dtype):
    logits, *others = make(dtype=dtype)
    logits[:, 20:90] = -math.inf
    logits[:, :, 3:7] = -math.inf
    logits[:, 139, 3:7] = 1.0
    _, indices, _, dl, _ = check(logits, *others)
    assert not ((indices >= 20) & (indices < 90)).any()
    assert (indices[:, 3:7] == 139).all()
    assert (dl[:, 20:90] == 0).all()


@interpreted
def test_positions_without_a_code_and_nan():
    logits, *others = make(codes=140, positions=16)
    logits[0, :, 2] = -math.inf
    logits[0, 7, 3] = math.nan
    logits[1, 135, 4] = math.nan
    quantized, _, kl, dl, _ = run(logits, *others)
    bad = torch.zeros(2, 16, dtype=torch.bool)
    bad[0, 2] = bad[0, 3] = bad[1, 4] = True
    assert torch.equal(quantized.isnan().all(1), bad) and torch.equal(quantized.isnan().any(1), bad)
    assert torch.equal(kl.isnan(), bad)
    assert torch.equal(dl.isnan().any(1), bad)
    assert torch.equal(run(logits, *others, hard=True)[0].isnan().all(1), bad)


@interpreted
@pytest.mark.parametrize("tau", [1.0, 1 / 16, 1 / 1024])
def test_large_and_equal_logits(tau):
    logits, *others = make(batch=1, codes=8192, positions=4, width=3, dtype=torch.float16)
    logits.fill_(-65504.0)
    logits[:, 5, :2] = 65504.0
    quantized, indices, kl, dl, dc = run(logits, *others, tau=tau, tiles=WIDE)
    assert all(result.isfinite().all() for result in (quantized, dl, dc))
    assert (indices[0, :2] == 5).all()
    torch.testing.assert_close(kl, torch.tensor([[math.log(8192)] * 2 + [0.0] * 2]), atol=1e-5, rtol=1e-5)


@interpreted
def test_equal_logits_draw_what_the_noise_says():
    check(torch.zeros(1, 8192, 16), *make(batch=1, codes=8192, positions=16, width=3)[1:], tiles=WIDE)


@interpreted
@each_dtype
def test_tiles_do_not_matter(dtype):
    """The noise and the codes to the bit, the rest up to the order of sums."""
    inputs = make(dtype=dtype, positions=40)
    tiles = [SMALL, WIDE, GumbelTiles(32, 32, 32, 4, 1), GumbelTiles(128, 16, 64, 4, 1)]
    results = [run(*inputs, tau=0.5, tiles=each) for each in tiles]
    for others in results[1:]:
        assert torch.equal(others[1], results[0][1])
        for one, other in zip(others, results[0], strict=True):
            exact = dtype == torch.float32 or one.dtype == torch.int64
            torch.testing.assert_close(one, other, **({} if exact else {"rtol": 4e-3, "atol": 4e-3}))


def noise_of_the_kernel(seed: int, rows: int, codes: int, dtype=torch.float32, tiles=WIDE) -> Tensor:
    """(rows, codes) float64, from the weights of logits 0, which are e^g over their sum; tau keeps them apart."""
    logits, stats, tau = torch.zeros(rows, codes, 1, dtype=dtype), nan(6, rows), 4.0
    weights, indices = nan(rows, codes, 1, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    gumbel_fwd(logits, None, torch.tensor(seed), stats, indices, None, None, None, tau=tau, hard=False, tiles=tiles)
    gumbel_weights(logits, torch.tensor(seed), stats, weights, tau=tau, tiles=tiles)
    noise = tau * (weights[:, :, 0].double() / stats[1][:, None].double()).log() + stats[0][:, None].double()
    assert torch.equal(noise.argmax(1), indices)
    return noise


@interpreted
@pytest.mark.parametrize("tiles", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("seed", [0, 2**33 + 1])
def test_noise_is_the_documented_one(seed, tiles):
    found = noise_of_the_kernel(seed, 70, 300, tiles=tiles)
    expected = reference.gumbel_noise(seed, (70, 300), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-6)
    assert torch.equal(noise_of_the_kernel(seed, 20, 130, tiles=tiles), found[:20, :130]) or torch.allclose(
        noise_of_the_kernel(seed, 20, 130, tiles=tiles), found[:20, :130], rtol=0, atol=4e-6
    )


@interpreted
def test_noise_is_gumbel():
    """Kolmogorov-Smirnov at the 0.1% level: of all, and of the tails given that they are tails."""
    noise = noise_of_the_kernel(3, 400, 1000, tiles=GumbelTiles(512, 32, 16, 4, 1)).flatten().sort().values
    assert_follows(noise, torch.exp(-torch.exp(-noise)))
    for tail, below in ((noise[noise < -1.3], True), (noise[noise > 5.0], False)):
        # Distribution functions with the digits that a tail needs: exp(-e^-g), and 1 less it.
        exact = torch.exp(-torch.exp(-tail)) if below else -torch.expm1(-torch.exp(-tail))
        bound = math.exp(-math.exp(1.3)) if below else -math.expm1(-math.exp(-5.0))
        assert len(tail) > 2000
        part = exact / bound if below else 1.0 - exact / bound
        assert_follows(tail, part)
    expected = len(noise) * -math.expm1(-math.exp(-9.0))
    assert abs((noise > 9.0).sum() - expected) < 4 * math.sqrt(expected)


def assert_follows(sample: Tensor, distribution: Tensor) -> None:
    steps = torch.arange(len(sample) + 1, dtype=torch.float64) / len(sample)
    distance = torch.maximum((distribution - steps[:-1]).abs().max(), (distribution - steps[1:]).abs().max())
    assert distance < 1.95 / math.sqrt(len(sample))


@interpreted
def test_codes_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0, -math.inf])
    draws, stats, indices = 5000, nan(6, 5000), torch.zeros(5000, dtype=torch.int64)
    rows = logits.expand(draws, 7)[:, :, None]
    gumbel_fwd(rows, None, torch.tensor(11), stats, indices, None, None, None, tau=1.0, hard=False, tiles=WIDE)
    counts, expected = torch.bincount(indices, minlength=7).double(), torch.softmax(logits.double(), 0) * draws
    assert counts[-1] == 0
    chi_square = ((counts - expected)[:-1].square() / expected[:-1]).sum()
    # The 99.9% point of chi-square with 5 degrees of freedom.
    assert chi_square < 20.52


@interpreted
@each_dtype
def test_order_of_programs(dtype, monkeypatch):
    """Run twice, and with the programs of every grid in reverse: the same bits, so no program needs another."""
    from triton.runtime.interpreter import InterpreterBuilder

    inputs = make(dtype=dtype, width=20)
    options = {"tiles": SMALL, "num_shares": 2, "num_runs": 3}
    first, second = (run(*inputs, **options) for _ in range(2))
    set_grid_idx, seen = InterpreterBuilder.set_grid_idx, []

    def reversed_grid_idx(self, x, y, z):
        seen.append(x)
        set_grid_idx(self, self.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", reversed_grid_idx)
    third = run(*inputs, **options)
    assert max(seen) > 0
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # its name came with Python 3.13


@interpreted
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "code", "position"])
def test_offsets_beyond_32_bits(axis):
    """Strides that fit into 32 bits, and offsets that do not, in memory of which next to nothing is touched."""
    sizes, strides = [3, 3, 3], [1024, 16, 128]
    strides[axis] = 2**30
    span = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 64
    # Four tensors side by side, and room before them where an offset that wrapped around would lead.
    memory = mmap.mmap(-1, 2 * (2**31 + span), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    arena = torch.frombuffer(memory, dtype=torch.float16)
    far = [torch.as_strided(arena, sizes, strides, 2**31 + i) for i in range(4)]
    near = [torch.randn(sizes, dtype=torch.float16) for _ in range(2)] + [torch.empty(sizes).half() for _ in range(2)]
    codebook, seed, results = torch.randn(3, 3, dtype=torch.float16), torch.tensor(1), []
    for view, values in zip(far[:2], near[:2], strict=True):
        view.copy_(values)
    for logits, dz, quantized, dl in (far, near):
        stats, indices, kl, relaxed = nan(6, 9), torch.zeros(9, dtype=torch.int64), nan(9), nan(9, 3)
        dc = torch.empty_like(codebook)
        gumbel_fwd(logits, codebook, seed, stats, indices, kl, relaxed, quantized, tau=1.0, hard=False, tiles=SMALL)
        gumbel_bwd(
            logits, codebook, seed, stats, relaxed, dz, kl, dl, dc,
            tau=1.0, dl_tiles=SMALL, dcodebook_tiles=SMALL,
        )  # fmt: skip
        gumbel_weights(logits, seed, stats, dz, tau=1.0, tiles=SMALL)
        results.append([quantized.clone(), kl, dl.clone(), dc, dz.clone()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@interpreted
def test_a_row_of_the_codebook_beyond_32_bits():
    memory = mmap.mmap(-1, 2 * 2**33, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    far = torch.as_strided(torch.frombuffer(memory, dtype=torch.float16), [3, 3], [16, 2**30], 2**31)
    near = far.copy_(torch.randn(3, 3)).clone()
    logits, *_ = make(batch=1, codes=3, positions=9, width=3, dtype=torch.float16)
    quantized = nan(1, 3, 9, dtype=torch.float16)
    stats, indices, kl, relaxed = nan(6, 9), torch.zeros(9, dtype=torch.int64), nan(9), nan(9, 3)
    seed = torch.tensor(1)
    gumbel_fwd(logits, far, seed, stats, indices, kl, relaxed, quantized, tau=1.0, hard=True, tiles=SMALL)
    assert torch.equal(quantized[0], near[indices].mT)


def test_grids_of_many_positions():
    """The second axis of a CUDA grid ends at 65535; rows are counted beyond 32 bits."""
    rows, meta = 2**33, {"device": "meta"}
    logits = torch.empty(2**13, 8192, 2**20, dtype=torch.float16, **meta)
    codebook, seed = torch.empty(8192, 128, dtype=torch.float16, **meta), torch.empty((), dtype=torch.int64, **meta)
    stats, indices, relaxed = torch.empty(6, rows, **meta), torch.empty(rows, **meta), torch.empty(rows, 128, **meta)
    columns = logits[:, :128]
    forward = plan_fwd(
        logits, codebook, seed, stats, indices, stats[0], relaxed, columns, tau=1.0, hard=False, device=H200
    )
    backward = plan_bwd(
        logits, codebook, seed, stats, relaxed, columns, stats[0], logits, codebook, tau=1.0, device=H200
    )
    for launch in (forward, *backward):
        assert 0 < launch.grid < 2**31


@interpreted
@pytest.mark.parametrize("dim", [1, -1])
@each_dtype
def test_ops(dim, dtype):
    """The public functions, in the interpreter by name: results and gradients are those of the reference."""
    shape = (2, 140, 2, 3) if dim == 1 else (2, 2, 3, 140)
    logits, codebook = (torch.randn(size).to(dtype).requires_grad_() for size in (shape, (140, 12)))
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for hard in (False, True):
        results = []
        for backend in ("triton", "reference"):
            out = gumbel_quantize(logits, codebook, 0.7, hard=hard, dim=dim, seed=2**63 + 9, backend=backend)
            soft = gumbel_softmax(logits, 0.7, hard, dim, seed=torch.tensor(9), backend=backend)
            upstream = torch.ones_like(out.quantized).expand_as(out.quantized)
            loss = (out.quantized * upstream).sum(dtype=torch.float32) + out.kl.sum() + (soft.float() ** 2).sum()
            results.append([*out, soft, *torch.autograd.grad(loss, (logits, codebook))])
        for one, other in zip(*results, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, **tolerance)


@interpreted
def test_no_positions():
    logits, codebook = torch.zeros(0, 9, 4, requires_grad=True), torch.randn(9, 5, requires_grad=True)
    out = gumbel_quantize(logits, codebook, seed=1, backend="triton")
    grads = torch.autograd.grad(out.quantized.sum() + out.kl.sum(), (logits, codebook))
    assert [tuple(one.shape) for one in (*out, *grads)] == [(0, 5, 4), (0, 4), (0, 4), (0, 9, 4), (9, 5)]
    assert (grads[1] == 0).all()
    assert gumbel_softmax(logits, dim=1, seed=1, backend="triton").shape == (0, 9, 4)


@interpreted
def test_a_position_without_a_code_is_an_error():
    logits = torch.randn(4, 40)
    logits[2] = -math.inf
    with pytest.raises(ValueError, match="a code above -inf at each position, got 1 without"):
        gumbel_quantize(logits, torch.randn(40, 3), dim=-1, seed=1, backend="triton")
