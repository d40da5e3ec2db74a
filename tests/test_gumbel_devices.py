"""gumbel_quantize and gumbel_softmax on each kind of device: the C++ kernels on a CPU, Triton's on a GPU.

Every test that can runs on both, so that it is known to work where there is no GPU. Those of a GPU alone come first.
"""

import math
import shutil

import pytest
import torch
from helpers import assert_within_budget, needs_extension, no_cuda_synchronisation
from torch import Tensor

from dalle_fast import reference
from dalle_fast.ops import backends
from dalle_fast.ops.gumbel import _seed_tensor, gumbel_quantize, gumbel_softmax
from dalle_fast.reference.gumbel import kl_from_uniform

OPS = torch.ops.dalle_fast
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
each_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=needs_extension), pytest.param("cuda", marks=needs_gpu)]
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
BACKENDS = {"cpu": "cpp", "cuda": "triton"}
HALF = torch.tensor(0.5, dtype=torch.float64)  # a temperature, as the ops take it


def make(shape=(2, 300, 9, 7), width=40, dtype=torch.float32, dim=1) -> list[Tensor]:
    """Logits, codebook and the gradients of quantized and kl, on the CPU."""
    spatial = [size for axis, size in enumerate(shape) if axis != dim % len(shape)]
    dz = torch.randn(*spatial, width).movedim(-1, dim)
    logits, codebook = 2 * torch.randn(shape), torch.randn(shape[dim], width)
    return [*(tensor.to(dtype) for tensor in (logits, codebook, dz)), torch.randn(spatial)]


def run(tensors, *, device=None, function=gumbel_quantize, seed=3, **options) -> list[Tensor]:
    """quantized, indices, kl and the gradients of logits and codebook; computed on ``device`` and left there."""
    logits, codebook, *upstream = (tensor.to(device) for tensor in tensors)
    inputs = [tensor.detach().requires_grad_() for tensor in (logits, codebook)]
    out = function(*inputs, seed=seed, **options)
    return [*(one.detach() for one in out), *torch.autograd.grad((out.quantized, out.kl), inputs, upstream)]


def by_formulas(tensors, dtype, *, tau, dim, seed, hard=False) -> list[Tensor]:
    """The same in plain PyTorch on the CPU in ``dtype``, from quantized and without keeping the weights."""
    logits, c, dz, dkl = (tensor.cpu().to(dtype) for tensor in tensors)
    rows, dz, dkl = logits.movedim(dim, -1), dz.movedim(dim, -1), dkl[..., None]
    x = rows + reference.gumbel_noise(seed, rows.shape, dtype=dtype)
    y, log_q, indices = torch.softmax(x / tau, -1), torch.log_softmax(rows, -1), x.argmax(-1)
    z, q = y @ c, log_q.exp()
    dl = y * (dz @ c.T - (z * dz).sum(-1, keepdim=True)) / tau
    dl = dl + dkl * q * (log_q - (q * log_q).sum(-1, keepdim=True))
    dc = y.flatten(0, -2).T @ dz.flatten(0, -2)
    quantized = c[indices] if hard else z
    return [quantized.movedim(-1, dim), indices, kl_from_uniform(rows), dl.movedim(-1, dim), dc]


def check(tensors, *, device, tau=1.0, dim=1, hard=False) -> None:
    """Three draws together against float64, within the budget of plain PyTorch, and each the same bits again."""
    results = []
    for seed in (3, 2**40 + 1, 2**64 - 1):
        options = {"tau": tau, "dim": dim, "seed": seed, "hard": hard}
        found = run(tensors, device=device, **options)
        assert_same_bits(run(tensors, device=device, **options), found)
        assert all(one.device.type == device for one in found)
        truth = by_formulas(tensors, torch.float64, **options)
        peer = by_formulas(tensors, torch.float32, **options)
        # The codes are those of the noise in float64, up to ties within its rounding.
        assert (found[1].cpu() != truth[1]).sum() <= max(1, 0.001 * truth[1].numel())
        if hard:
            same = (found[1].cpu() == truth[1]).unsqueeze(dim)
            found[0] = torch.where(same, found[0].cpu(), truth[0].to(found[0].dtype))
        results.append(([one.cpu() for one in found], peer, truth))
    for number in (0, 2, 3, 4):
        found, peer, truth = (torch.stack([each[kind][number] for each in results]) for kind in range(3))
        assert_within_budget(found, peer.to(found.dtype), truth)


def assert_same_bits(actual, expected) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@needs_gpu
@each_dtype
def test_cuda_tensors_take_triton(dtype):
    logits = torch.empty(2, 8, device="cuda", dtype=dtype)
    assert backends.choose_kernel("gumbel_softmax", "auto", logits.device, logits.dtype) == "triton"
    assert backends.choose_kernel("gumbel_softmax", "auto", logits.device, torch.float64) is None


@needs_gpu
@needs_extension
def test_cuda_tensors_are_refused_by_cpp():
    with pytest.raises(RuntimeError, match='"cpp"'):
        run(make(), device="cuda", backend="cpp")


@needs_gpu
@pytest.mark.parametrize("seed", [0, 7, 2**33 + 1, 2**64 - 1])
def test_cuda_draws_what_the_cpu_draws(seed):
    tensors = make(shape=(4, 1000, 16, 16))
    here, there = (run(tensors, device=device, seed=seed) for device in ("cpu", "cuda"))
    assert (here[1] != there[1].cpu()).sum() <= 1
    for one, other in zip(here, there, strict=True):
        if one.dtype != torch.int64:
            torch.testing.assert_close(other.cpu(), one, rtol=1e-4, atol=1e-4)


@needs_gpu
@each_dtype
def test_cuda_noise(dtype):
    """Its quantiles and tails; in 16 bits, whose logarithms are approximate, from soft samples of float32 precision."""
    logits, seed, tau = torch.zeros(1 << 15, 1024, device="cuda", dtype=dtype), torch.tensor(5, device="cuda"), 4.0
    weights, stats = OPS.gumbel_softmax(logits, seed, torch.tensor(tau, dtype=torch.float64), False, -1, "triton")
    found = tau * (weights.double() / stats[1, :, None].double()).log() + stats[0, :, None].double()
    expected = reference.gumbel_noise(5, logits.shape, dtype=torch.float64, device="cuda")
    # Rounding of the weights to the dtype, times tau; the largest of a row also shows the noise itself.
    eps = torch.finfo(dtype).eps
    normal = weights > torch.finfo(dtype).tiny
    assert (found - expected)[normal].abs().max() < tau * eps + 1e-5
    assert (stats[0].double() - expected.amax(1)).abs().max() < 1.5e-5


@needs_gpu
@each_dtype
def test_cuda_codes_follow_the_softmax(dtype):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0, -math.inf], device="cuda", dtype=dtype)
    draws = 1_000_000
    out = gumbel_quantize(logits.expand(draws, -1), torch.zeros(7, 1, device="cuda", dtype=dtype), dim=-1, seed=11)
    counts, expected = torch.bincount(out.indices, minlength=7).double(), torch.softmax(logits.double(), 0) * draws
    assert counts[-1] == 0
    # The 99.9% point of chi-square with 5 degrees of freedom.
    assert ((counts - expected)[:-1].square() / expected[:-1]).sum() < 20.52


@needs_gpu
def test_cuda_graph_with_a_seed_on_the_device():
    """Captured after one call, replayed on other logits and other seeds."""
    logits, codebook, *upstream = (tensor.cuda() for tensor in make(dtype=torch.bfloat16))
    seed = torch.tensor(1, device="cuda")
    static = [logits, codebook, *upstream]
    run(static, seed=seed)
    gumbel_softmax(logits, 0.5, dim=1, seed=seed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [*run(static, seed=seed), gumbel_softmax(logits, 0.5, dim=1, seed=seed)]
    for number in (2, 2**40):
        logits.copy_(torch.randn_like(logits))
        seed.fill_(number)
        graph.replay()
        assert_same_bits(captured, [*run(static, seed=number), gumbel_softmax(logits, 0.5, dim=1, seed=number)])


@needs_gpu
@pytest.mark.parametrize("seed", [5, None, "cpu", "cuda"])
def test_no_cuda_synchronisation(seed):
    """Of the ops and of the seed's way to the device; the public function's look for positions without a code waits."""
    logits, codebook, dz, _ = (tensor.cuda() for tensor in make())
    inputs = [logits.requires_grad_(), codebook.requires_grad_()]
    seed = torch.tensor(5, device=seed) if isinstance(seed, str) else seed
    torch.cuda.synchronize()

    def step() -> None:
        key = _seed_tensor(seed, "triton", logits)
        quantized, _, kl, *_ = OPS.gumbel_quantize(*inputs, key, HALF, False, 1, "triton")
        weights, _ = OPS.gumbel_softmax(logits, key, HALF, True, 1, "triton")
        torch.autograd.grad((quantized, kl, weights), inputs, (dz, torch.ones_like(kl), torch.ones_like(weights)))

    step()
    with no_cuda_synchronisation():
        step()


@needs_gpu
def test_another_cuda_device_than_the_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("one device alone")
    tensors = make()
    with torch.cuda.device(0):
        results = run(tensors, device="cuda:1")
    assert_same_bits((x.cpu() for x in results), (x.cpu() for x in run(tensors, device="cuda:0")))


@needs_gpu
@each_dtype
def test_cuda_memory(dtype):
    """No more than the results, z in float32, and sums of runs: neither noise nor weights."""
    tensors = [tensor.cuda() for tensor in make((16, 8192, 16, 16), 128, dtype)]
    run(tensors)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run(tensors)
    torch.cuda.synchronize()
    held = sum(result.nbytes for result in results)
    z, runs = 4 * 4096 * 128, 64 * 4 * 8192 * 128
    assert torch.cuda.max_memory_allocated() - before <= held + 2 * z + runs + 2**20
    assert runs < tensors[0].nbytes * 4


@each_device
@each_dtype
@pytest.mark.parametrize("codes", [1, 31, 128, 700])
def test_numbers_of_codes(device, dtype, codes):
    check(make((3, codes, 40), 24, dtype), device=device, tau=0.7)


@each_device
@each_dtype
@pytest.mark.parametrize("width", [1, 16, 30, 64, 128, 300])
def test_widths_of_the_codebook(device, dtype, width):
    check(make((2, 256, 64), width, dtype), device=device, tau=0.5)


@each_device
@each_dtype
@pytest.mark.parametrize("shape", [(1, 90, 1), (5, 90, 1), (1, 90, 65), (64, 90, 1), (3, 90, 64)])
def test_numbers_of_positions(device, dtype, shape):
    check(make(shape, 8, dtype), device=device)


@each_device
@each_dtype
@pytest.mark.parametrize("tau", [1 / 16, 1 / 1024, 3.0])
def test_temperatures(device, dtype, tau):
    check(make((4, 200, 100), 8, dtype), device=device, tau=tau)


@each_device
@each_dtype
def test_hard(device, dtype):
    tensors = make((4, 200, 100), 8, dtype)
    check(tensors, device=device, tau=0.5, hard=True)
    soft, hard = (run(tensors, device=device, hard=hard) for hard in (False, True))
    assert torch.equal(hard[0], tensors[1].to(device)[hard[1]].movedim(-1, 1))
    assert_same_bits(soft[1:], hard[1:])


@each_device
@each_dtype
def test_published_size_of_a_codebook(device, dtype):
    check(make((1, 8192, 16, 16), 128, dtype), device=device)


def channels_last(logits: Tensor) -> Tensor:
    return logits.contiguous(memory_format=torch.channels_last)


def among_nan(logits: Tensor) -> Tensor:
    buffer = torch.full([size + 6 for size in logits.shape], math.nan, dtype=logits.dtype, device=logits.device)
    return buffer[(slice(3, -3),) * logits.dim()].copy_(logits)


def every_other(logits: Tensor) -> Tensor:
    buffer = torch.full([2 * size for size in logits.shape], math.nan, dtype=logits.dtype, device=logits.device)
    return buffer[::2, ::2, ::2, ::2].copy_(logits)


@each_device
@each_dtype
@pytest.mark.parametrize("layout", [channels_last, among_nan, every_other])
def test_layouts(device, dtype, layout):
    """Products of the same tiles, summed in the same order: the same bits but for how a row is added up."""
    logits, *others = (tensor.to(device) for tensor in make(dtype=dtype))
    expected, found = run([logits, *others]), run([layout(logits), *others])
    assert torch.equal(found[1], expected[1])
    eps = torch.finfo(dtype).eps
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=8 * eps + 1e-5, atol=8 * eps + 1e-5)
    if layout is channels_last:
        assert found[3].is_contiguous(memory_format=torch.channels_last)


@each_device
@each_dtype
def test_codes_last(device, dtype):
    check(make((6, 9, 300), 24, dtype, dim=-1), device=device, dim=-1)


@each_device
def test_every_result_is_written(device):
    # Fresh memory is NaN then.
    torch.use_deterministic_algorithms(True)
    try:
        for hard in (False, True):
            for result in run(make(), device=device, hard=hard):
                assert not result.isnan().any()
            assert not gumbel_softmax(torch.zeros(5, 33, device=device), 0.3, hard, seed=2).isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


@each_device
@each_dtype
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dim", [1, -1])
def test_softmax(device, dtype, hard, dim):
    logits = torch.randn(5, 300, 17).movedim(1, dim).to(dtype)
    upstream, results = torch.randn_like(logits), []
    for where, kind, backend in ((device, dtype, "auto"), ("cpu", torch.float32, "reference")):
        inputs = logits.to(where, kind).requires_grad_()
        y = gumbel_softmax(inputs, 0.4, hard, dim, seed=5, backend=backend)
        results.append([y.detach().cpu(), torch.autograd.grad(y, inputs, upstream.to(where, kind))[0].cpu()])
    eps = torch.finfo(dtype).eps
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=8 * eps, atol=32 * eps)


@each_device
@each_dtype
def test_large_and_equal_logits(device, dtype):
    logits = torch.full((4, 8192), -65504.0, dtype=dtype, device=device)
    logits[:2, 5] = 65504.0
    logits.requires_grad_()
    codebook = torch.randn(8192, 3, dtype=dtype, device=device)
    for tau in (1.0, 1 / 16, 1e-3):
        out = gumbel_quantize(logits, codebook, tau, dim=-1, seed=1)
        assert (out.indices[:2] == 5).all()
        truth = torch.tensor([math.log(8192)] * 2 + [0.0] * 2, device=device)
        torch.testing.assert_close(out.kl, truth, atol=1e-5, rtol=1e-5)
        (grad,) = torch.autograd.grad(out.quantized.sum() + out.kl.sum(), logits)
        assert out.quantized.isfinite().all() and grad.isfinite().all()


@each_device
def test_impossible_codes(device):
    logits, codebook = torch.randn(50, 300, device=device), torch.randn(300, 3, device=device)
    logits[:, 20:200] = -math.inf
    logits.requires_grad_()
    out = gumbel_quantize(logits, codebook, dim=-1, seed=1)
    assert not ((out.indices >= 20) & (out.indices < 200)).any()
    (grad,) = torch.autograd.grad(out.quantized.sum() + out.kl.sum(), logits)
    assert grad.isfinite().all() and (grad[:, 20:200] == 0).all()
    with pytest.raises(ValueError, match="a code above -inf at each position, got 1 without"):
        gumbel_softmax(logits.detach().index_fill(0, torch.tensor([4], device=device), -math.inf), seed=1)


@each_device
def test_no_positions(device):
    tensors = [torch.zeros(0, 9, 4), torch.randn(9, 5), torch.zeros(0, 5, 4), torch.zeros(0, 4)]
    found = run(tensors, device=device)
    assert [tuple(one.shape) for one in found] == [(0, 5, 4), (0, 4), (0, 4), (0, 9, 4), (9, 5)]
    assert (found[4] == 0).all()


@each_device
def test_stride_0_gradient(device):
    logits, codebook = (tensor.to(device) for tensor in make()[:2])
    logits.requires_grad_()
    out = gumbel_quantize(logits, codebook, seed=1).quantized
    (from_sum,) = torch.autograd.grad(out.sum(), logits, retain_graph=True)
    (from_ones,) = torch.autograd.grad(out, logits, torch.ones_like(out))
    torch.testing.assert_close(from_sum, from_ones)


@each_device
@each_dtype
def test_opcheck(device, dtype):
    logits, codebook, dz, _ = (tensor.to(device) for tensor in make((2, 40, 3, 5), 6, dtype))
    seed, common = torch.tensor(3, device=device), (HALF, False, 1, BACKENDS[device])
    inputs = [tensor.clone().requires_grad_() for tensor in (logits, codebook)]
    torch.library.opcheck(OPS.gumbel_quantize, (*inputs, seed, *common))
    torch.library.opcheck(OPS.gumbel_softmax, (inputs[0], seed, *common))
    _, _, kl, stats, relaxed = OPS.gumbel_quantize(logits, codebook, seed, *common)
    for needed in ((True, True), (True, False), (False, True)):
        saved = (logits, codebook, seed, stats, relaxed, dz, kl)
        torch.library.opcheck(OPS.gumbel_quantize_backward, (*saved, HALF, 1, *needed, BACKENDS[device]))
    torch.library.opcheck(OPS.gumbel_softmax_weights, (logits, seed, stats, HALF, 1, BACKENDS[device]))


@each_device
@pytest.mark.parametrize("seed", [5, 2**64 - 1, "cpu", "device"])
def test_compiled_equals_eager(device, seed):
    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" and shutil.which("gcc") else "aot_eager"
    compiled = torch.compile(gumbel_quantize, fullgraph=True, backend=backend)
    seed = torch.tensor(5, device=device if seed == "device" else "cpu") if isinstance(seed, str) else seed
    tensors = make()
    assert_same_bits(run(tensors, device=device, seed=seed, function=compiled), run(tensors, device=device, seed=seed))


@each_device
def test_one_seed_however_it_is_given(device):
    tensors = make()
    expected = run(tensors, device=device, seed=9)
    for where in {"cpu", device}:
        assert_same_bits(run(tensors, device=device, seed=torch.tensor(9, device=where)), expected)


@each_device
def test_autocast_keeps_float32(device):
    tensors = make()
    expected = run(tensors, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert_same_bits(run(tensors, device=device), expected)


@needs_gpu
def test_compiled_cuda_graphs_follow_the_temperature():
    torch._dynamo.reset()
    seed = torch.tensor(3, device="cuda")
    logits, codebook, _, _ = (tensor.cuda() for tensor in make((2, 40, 3, 5), 6))

    def quantize(tau: float) -> Tensor:
        return gumbel_quantize(logits, codebook, tau, seed=seed).quantized

    compiled = torch.compile(quantize, mode="reduce-overhead")
    for tau in (1.0, 0.9, 0.5, 0.25, 0.9):
        assert torch.equal(compiled(tau), quantize(tau))
