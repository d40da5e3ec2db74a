"""The C++ kernels of Gumbel-softmax quantisation at every CPU level: noise, error budget, layouts, ops, threads."""

import math
import shutil

import pytest
import torch
from helpers import assert_within_budget, needs_extension
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

from dalle_fast import reference
from dalle_fast.ops.gumbel import gumbel_quantize, gumbel_softmax

pytestmark = needs_extension

OPS = torch.ops.dalle_fast
HALF = torch.tensor(0.5, dtype=torch.float64)  # a temperature, as the ops take it
SEED = torch.tensor(3)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def differences(logits: Tensor, seed: int) -> Tensor:
    """Of the perturbed logits in the last dimension, from their mean."""
    weights = gumbel_softmax(logits, seed=seed, backend="cpp").double().log()
    return weights - weights.mean(-1, keepdim=True)


@pytest.mark.parametrize("seed", [0, 3, 2**32 - 1, 2**32, 2**63 + 5, 2**64 - 1])
def test_noise_is_the_documented_one(level, seed):
    noise = reference.gumbel_noise(seed, (37, 300), dtype=torch.float64)
    expected = noise - noise.mean(-1, keepdim=True)
    torch.testing.assert_close(differences(torch.zeros(37, 300), seed), expected, rtol=0, atol=4e-6)


def test_extremes_of_the_noise(level):
    """The smallest and largest of many draws, where ln(-ln u) loses digits first."""
    noise = reference.gumbel_noise(5, (2000, 1000), dtype=torch.float64)
    assert noise.max() > 13 and noise.min() < -2.5
    found = differences(torch.zeros(2000, 1000), 5)
    torch.testing.assert_close(found, noise - noise.mean(-1, keepdim=True), rtol=0, atol=4e-6)


def test_equal_logits_draw_all_codes_alike():
    codes, draws = 8192, 40_000
    logits, codebook = torch.zeros(codes).expand(draws, codes), torch.zeros(codes, 1)
    indices = gumbel_quantize(logits, codebook, dim=-1, seed=8, backend="cpp").indices
    expected = draws / codes
    chi_square = (torch.bincount(indices, minlength=codes) - expected).square().sum().item() / expected
    freedom = codes - 1
    # Three standard deviations of chi-square.
    assert abs(chi_square - freedom) < 3 * math.sqrt(2 * freedom)


def make(shape, dim, width, dtype=torch.float32, size=2.0) -> tuple[Tensor, Tensor]:
    logits, codebook = size * torch.randn(shape), torch.randn(shape[dim], width)
    return logits.to(dtype).requires_grad_(), codebook.to(dtype).requires_grad_()


def run(logits, codebook, upstream, **options) -> list[Tensor]:
    """quantized, indices, kl and the gradients of logits and codebook."""
    out = gumbel_quantize(logits, codebook, **options)
    upstream = [one.to(value.dtype) for one, value in zip(upstream, (out.quantized, out.kl), strict=True)]
    return [*out, *torch.autograd.grad((out.quantized, out.kl), (logits, codebook), upstream)]


def by_formulas(logits, codebook, upstream, tau, dim, seed) -> list[Tensor]:
    """The best that plain PyTorch gives in float32 without keeping the weights: delta from the quantised vectors."""
    rows, c = logits.detach().float().movedim(dim, -1), codebook.detach().float()
    dz, dkl = upstream[0].float().movedim(dim, -1), upstream[1].float()[..., None]
    y = torch.softmax((rows + reference.gumbel_noise(seed, rows.shape)) / tau, -1)
    z, log_q = y @ c, torch.log_softmax(rows, -1)
    q = log_q.exp()
    kl = (q * log_q).sum(-1)
    grad = y * (dz @ c.T - (z * dz).sum(-1, keepdim=True)) / tau + dkl * q * (log_q - kl[..., None])
    grad_codebook = y.flatten(0, -2).T @ dz.flatten(0, -2)
    return [z.movedim(-1, dim), None, kl + math.log(rows.shape[-1]), grad.movedim(-1, dim), grad_codebook]


def check(logits, codebook, *, tau, dim, seed) -> None:
    """All results against float64, within the error budget of by_formulas; of three draws together, for one may be near
    its truth by luck."""
    wide = [tensor.detach().double().requires_grad_() for tensor in (logits, codebook)]
    results = []
    for draw in range(seed, seed + 3):
        options = {"tau": tau, "dim": dim, "seed": draw}
        expected = gumbel_quantize(*wide, **options, backend="reference")
        dtypes = logits.dtype, torch.float32
        upstream = [torch.randn_like(expected[2 * i]).to(dtype).double() for i, dtype in enumerate(dtypes)]
        truth, peer = run(*wide, upstream, **options, backend="reference"), by_formulas(*wide, upstream, **options)
        found = run(logits, codebook, upstream, **options, backend="cpp")
        assert (found[1] != truth[1]).sum() <= 0.001 * truth[1].numel()  # ties within rounding
        results.append((found, peer, truth))
    for number in (0, 2, 3, 4):
        found, peer, truth = (torch.stack([each[kind][number] for each in results]) for kind in range(3))
        assert found.dtype == (torch.float32 if number == 2 else logits.dtype)
        assert_within_budget(found, peer.to(found.dtype), truth)


@each_dtype
@pytest.mark.parametrize("codes", [1, 2, 31, 127, 128, 129, 700])
def test_numbers_of_codes(level, dtype, codes):
    check(*make((3, codes, 40), 1, 24, dtype), tau=0.7, dim=1, seed=4)


@pytest.mark.parametrize("width", [1, 3, 16, 30, 128, 300])
def test_widths_of_the_codebook(level, width):
    check(*make((600, 150), -1, width), tau=0.5, dim=-1, seed=4)


@pytest.mark.parametrize("shape", [(1, 90, 1), (1, 90, 15), (5, 90, 1), (1, 90, 17), (17, 90), (2, 90, 5, 7), (64, 90)])
def test_numbers_of_positions(level, shape):
    check(*make(shape, 1, 8, size=1.0), tau=1.0, dim=1, seed=4)


@pytest.mark.parametrize("tau", [1 / 16, 1e-3, 3.0])
def test_temperatures(level, tau):
    check(*make((4, 200, 100), 1, 8), tau=tau, dim=1, seed=4)


@pytest.mark.parametrize("tau", [1e-45, 1e-300])
def test_the_smallest_temperatures(tau):
    logits, codebook = make((50, 20), -1, 4)
    out = gumbel_quantize(logits, codebook, tau, dim=-1, seed=1, backend="cpp")
    assert torch.equal(out.quantized, codebook[out.indices])
    for hard in (False, True):
        y = gumbel_softmax(logits, tau, hard, seed=1, backend="cpp")
        assert torch.equal(y.argmax(-1), out.indices)
        assert not torch.autograd.grad(y, logits, torch.randn_like(y))[0].any()


@pytest.mark.parametrize("tau", [1e38, 1e46, 1e300])
def test_the_largest_temperatures(level, tau):
    logits, codebook = make((5, 20), -1, 4)
    logits = logits.detach()
    logits[:, 3] = -math.inf
    y = gumbel_softmax(logits, tau, seed=1, backend="cpp")
    assert (y[:, 3] == 0).all()
    torch.testing.assert_close(y[:, 4:], torch.full((5, 16), 1 / 19))
    mean = codebook[torch.arange(20) != 3].mean(0).expand(5, -1)
    torch.testing.assert_close(gumbel_quantize(logits, codebook, tau, dim=-1, seed=1, backend="cpp").quantized, mean)


@each_dtype
def test_a_block_of_the_least_number(level, dtype):
    """As which some mask codes: the sum of their distances to the maximum is infinite."""
    logits, codebook = make((40, 300), -1, 4, dtype)
    logits = logits.detach()
    logits[:, :128] = torch.finfo(dtype).min
    check(logits.requires_grad_(), codebook, tau=1.0, dim=-1, seed=4)


def channels_last(logits: Tensor) -> Tensor:
    return logits.contiguous(memory_format=torch.channels_last)


def every_other(logits: Tensor) -> Tensor:
    """Between others, in each dimension."""
    buffer = torch.full([2 * size for size in logits.shape], math.nan, dtype=logits.dtype)
    view = buffer[::2, ::2, ::2, ::2]
    return view.copy_(logits)


@each_dtype
@pytest.mark.parametrize("layout", [channels_last, every_other])
def test_layouts(level, dtype, layout):
    logits, codebook = make((2, 150, 5, 7), 1, 12, dtype)
    upstream = torch.randn(2, 12, 5, 7), torch.randn(2, 5, 7)
    expected = run(logits, codebook, upstream, seed=2, backend="cpp")
    moved = layout(logits.detach()).requires_grad_()
    found = run(moved, codebook, upstream, seed=2, backend="cpp")
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    if layout is channels_last:
        assert found[3].is_contiguous(memory_format=torch.channels_last)


PARTS = {
    "codes": (lambda x: torch.cat([x, x], 1)[:, : x.shape[1]], (3, 150, 37)),
    "positions": (lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]], (3, 150, 37)),
    "rows": (lambda x: torch.cat([x, x], 1)[:, : x.shape[1]], (50, 150)),
    "every other position": (lambda x: torch.stack([x, x], 3)[..., 0], (3, 150, 37)),
    "expanded batch": (lambda x: x[:1].expand_as(x), (3, 150, 37)),
    "expanded positions": (lambda x: x[..., :1].expand_as(x), (3, 150, 37)),
    "turned": (lambda x: x.transpose(2, 3), (2, 150, 5, 7)),
}


@each_dtype
@pytest.mark.parametrize("part", PARTS)
def test_logits_that_do_not_fill_their_memory(level, dtype, part):
    """Their gradient has other strides than they have."""
    view, shape = PARTS[part]
    logits, codebook = make(shape, 1, 12, dtype)
    logits = view(logits.detach())
    spatial = (shape[0], *logits.shape[2:])
    upstream = torch.randn(spatial[0], 12, *spatial[1:]), torch.randn(spatial)
    results = []
    for one in (logits, logits.contiguous()):
        results.append(run(one.detach().requires_grad_(), codebook, upstream, seed=2, backend="cpp"))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_hard_is_the_codes_row_with_the_gradient_of_soft(level):
    logits, codebook = make((3, 140, 40), 1, 6)
    upstream = torch.randn(3, 6, 40), torch.randn(3, 40)
    soft, hard = (run(logits, codebook, upstream, hard=hard, seed=2, backend="cpp") for hard in (False, True))
    assert torch.equal(hard[0], codebook[hard[1]].movedim(-1, 1))
    for one, other in zip(soft[1:], hard[1:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
@pytest.mark.parametrize("used", [0, 2])
def test_some_gradients(needed, used):
    inputs = make((3, 140, 40), 1, 6)
    some = [tensor.detach().requires_grad_(need) for tensor, need in zip(inputs, needed, strict=True)]
    results = []
    for logits, codebook in (inputs, some):
        out = gumbel_quantize(logits, codebook, seed=3, backend="cpp")
        wanted = [tensor for tensor, need in zip((logits, codebook), needed, strict=True) if need]
        results.append(torch.autograd.grad(out[used].square().sum(), wanted, allow_unused=True))
    assert len(results[0]) == 1
    (full,), (alone,) = results
    if used == 2 and needed[1]:
        assert full is None or (full == 0).all()
    else:
        assert torch.equal(full, alone)


@each_dtype
def test_the_same_bits_for_any_number_of_threads(dtype):
    before = torch.get_num_threads()
    logits, codebook = make((3, 300, 50), 1, 20, dtype)
    upstream, results = (torch.randn(3, 20, 50), torch.randn(3, 50)), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(logits, codebook, upstream, seed=1, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize(
    ("dtype", "shape", "dim", "first"),
    [
        (torch.float32, (1030, 4096), -1, 20),
        (torch.bfloat16, (2070, 4100), -1, 33),  # rows that are no whole lines of the cache
        (torch.float16, (2, 4096, 1030), 1, 1),
        (torch.float32, (2, 2050, 1040), 1, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("shift", [0, 1])
def test_gradients_that_pass_by_the_cache(level, dtype, shape, dim, first, shift):
    """Those of large logits are written in another way than those of a part of them, and have the same bits."""
    logits, codebook = make(shape, dim, 4, dtype)
    assert logits.nbytes >= 2**24
    shifted = torch.empty(logits.numel() + shift, dtype=dtype)[shift:].view(shape).copy_(logits.detach())
    grads = []
    for x in (shifted, logits[:first]):
        x = x.detach().requires_grad_()
        out = gumbel_quantize(x, codebook, dim=dim, seed=2, backend="cpp")
        rows = out.quantized.movedim(dim, -1).square().sum() + out.kl.sum()
        grads.append(torch.autograd.grad(rows, x)[0])
    assert torch.equal(grads[0][:first], grads[1])


def test_a_longer_batch_begins_with_the_shorter_one(level):
    logits, codebook = make((37, 200), -1, 8)
    whole, part = (gumbel_quantize(x, codebook, dim=-1, seed=6, backend="cpp") for x in (logits, logits[:20]))
    for one, other in zip(whole, part, strict=True):
        assert torch.equal(one[:20], other)


def test_nan_and_infinite_logits(level):
    logits, codebook = torch.randn(5, 200), torch.randn(200, 3)
    logits[1, 7] = math.nan
    logits[2] = math.nan
    logits[3, 50:] = -math.inf
    out = gumbel_quantize(logits, codebook, dim=-1, seed=1, backend="cpp")
    nan = torch.tensor([False, True, True, False, False])
    assert torch.equal(out.quantized.isnan().all(-1), nan) and torch.equal(out.kl.isnan(), nan)
    assert out.indices[3] < 50
    hard = gumbel_quantize(logits, codebook, hard=True, dim=-1, seed=1, backend="cpp").quantized
    y = gumbel_softmax(logits, hard=True, seed=1, backend="cpp")
    for found in (hard, y):
        assert torch.equal(found.isnan().all(-1), nan) and torch.equal(found.isnan().any(-1), nan)
    logits[4] = -math.inf
    with pytest.raises(ValueError, match="a code above -inf at each position, got 1 without"):
        gumbel_quantize(logits, codebook, dim=-1, seed=1, backend="cpp")


@pytest.mark.parametrize("hard", [False, True])
def test_a_position_without_a_code_is_nan_where_it_is_not_looked_for(hard):
    torch._dynamo.reset()
    logits, codebook = torch.randn(4, 40), torch.randn(40, 3)
    logits[2] = -math.inf
    compiled = torch.compile(
        lambda: (
            gumbel_quantize(logits, codebook, hard=hard, dim=-1, seed=1).quantized,
            gumbel_softmax(logits, hard=hard, seed=1),
        ),
        backend="aot_eager",
    )
    for found in compiled():
        assert found.isnan().all(-1).tolist() == found.isnan().any(-1).tolist() == [False, False, True, False]
    torch._dynamo.reset()


def test_no_positions():
    logits, codebook = make((0, 9, 4), 1, 5)
    found = run(logits, codebook, (torch.zeros(0, 5, 4), torch.zeros(0, 4)), seed=1, backend="cpp")
    assert [tuple(one.shape) for one in found] == [(0, 5, 4), (0, 4), (0, 4), (0, 9, 4), (9, 5)]
    assert (found[4] == 0).all()


LAYOUTS = [((2, 40, 3, 5), 1), ((6, 40), -1), ((4, 3, 40), -1), ((40, 6), 0)]


@each_dtype
@pytest.mark.parametrize(("shape", "dim"), LAYOUTS)
def test_opcheck(dtype, shape, dim):
    logits, codebook = make(shape, dim, 5, dtype)
    seed, common = torch.tensor(3), (HALF, False, dim, "cpp")
    torch.library.opcheck(OPS.gumbel_quantize, (logits, codebook, seed, *common))
    torch.library.opcheck(OPS.gumbel_softmax, (logits, seed, *common))
    quantized, _, kl, stats, relaxed = OPS.gumbel_quantize(logits.detach(), codebook.detach(), seed, *common)
    saved = (logits.detach(), codebook.detach(), seed, stats, relaxed, torch.randn_like(quantized), kl)
    for needed in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(OPS.gumbel_quantize_backward, (*saved, HALF, dim, *needed, "cpp"))
    torch.library.opcheck(OPS.gumbel_softmax_weights, (logits.detach(), seed, stats, HALF, dim, "cpp"))


def turned(logits: Tensor) -> Tensor:
    """With the last dimension outside of the one before in memory, which no three dimensions describe."""
    return logits.mT.contiguous().mT


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last, every_other, turned])
def test_fake_tensors_are_like_real_ones(layout):
    logits, codebook = (tensor.detach() for tensor in make((2, 40, 3, 5), 1, 6))
    logits, seed, common = layout(logits), torch.tensor(1), (HALF, False, 1, "cpp")
    quantized, _, kl, stats, relaxed = OPS.gumbel_quantize(logits, codebook, seed, *common)
    saved = logits, codebook, seed, stats, relaxed, quantized, kl
    calls = [
        (OPS.gumbel_quantize, logits, codebook, seed, *common),
        (OPS.gumbel_softmax, logits, seed, *common),
        (OPS.gumbel_softmax_weights, logits, seed, stats, HALF, 1, "cpp"),
        (OPS.gumbel_quantize_backward, *saved, HALF, 1, True, True, "cpp"),
    ]
    for op, *args in calls:
        real = op(*args)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args))
        for one, other in zip(*([x] if isinstance(x, Tensor) else x for x in (real, fake)), strict=True):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_compiled_equals_eager():
    torch._dynamo.reset()
    backend = "inductor" if shutil.which("g++") else "aot_eager"
    compiled = torch.compile(gumbel_quantize, fullgraph=True, backend=backend)
    logits, codebook = make((2, 40, 3, 5), 1, 6)
    for seed in (torch.tensor(4), torch.tensor(5)):
        results = []
        for function in (compiled, gumbel_quantize):
            out = function(logits, codebook, 0.5, seed=seed)
            loss = out.quantized.square().sum() + out.kl.sum()
            results.append([*out, *torch.autograd.grad(loss, (logits, codebook))])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
    torch._dynamo.reset()


def test_a_schedule_of_temperatures_compiles_twice_at_most():
    torch._dynamo.reset()
    counter = CompileCounter()

    def quantize(logits, codebook, tau):
        out = gumbel_quantize(logits, codebook, tau, seed=SEED)
        return out.quantized, gumbel_softmax(logits, tau, dim=1, seed=SEED)

    compiled = torch.compile(quantize, fullgraph=True, backend=counter)
    inputs = make((2, 40, 7), 1, 6)
    for tau in (1.0, 0.9, 0.5, 0.25, 1 / 16):
        for one, other in zip(compiled(*inputs, tau), quantize(*inputs, tau), strict=True):
            assert torch.equal(one, other)
    assert counter.frame_count <= 2  # for a constant, and for any number


def test_compilers_capture_no_temperature():
    """In a CUDA graph, which would keep the first: the ops read it from the CPU's memory."""
    names = "gumbel_quantize", "gumbel_quantize_backward", "gumbel_softmax", "gumbel_softmax_weights"
    assert all(torch.Tag.cudagraph_unsafe in getattr(OPS, name).default.tags for name in names)


def test_second_derivative_is_refused():
    logits, codebook = make((6, 40), -1, 5)
    out = gumbel_quantize(logits, codebook, dim=-1, seed=1)
    (grad,) = torch.autograd.grad(out.quantized.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="gumbel_quantize has no second derivative; use backend="):
        grad.sum().backward()


@pytest.mark.parametrize("hard", [False, True])
def test_second_derivative_of_softmax(hard):
    logits, results = torch.randn(5, 9, requires_grad=True), []
    for backend in ("cpp", "reference"):
        y = gumbel_softmax(logits, 0.7, hard, seed=1, backend=backend)
        (grad,) = torch.autograd.grad((y * logits).sum(), logits, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), logits)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("seed", [5, None, SEED])
def test_default_device_is_not_asked(seed):
    logits, codebook = torch.randn(4, 30), torch.randn(30, 3)
    results = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        with torch.device(device):
            out = gumbel_quantize(logits, codebook, 0.5, dim=-1, seed=seed, backend="cpp")
            results.append([*out, gumbel_softmax(logits, 0.5, seed=seed, backend="cpp")])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_what_is_saved_for_the_backward():
    """Next to logits, codebook, seed and temperature: six numbers and the quantised vector of each position."""
    logits, codebook = make((2, 300, 8, 8), 1, 16)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        gumbel_quantize(logits, codebook, seed=1)
    sizes = sorted(tensor.numel() for tensor in saved)
    assert sizes == sorted([1, 1, logits.numel(), codebook.numel(), 6 * 128, 16 * 128])
