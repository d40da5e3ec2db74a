"""Gradient scaling and the AdamW16 update on each kind of device, in C++, against the reference on a CPU.

Every test that can runs on both, so that it is known to work where there is no GPU. Those of a GPU alone come first.
Results are the same bits, but for sums of squares, whose order is each device's own.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import needs_extension, no_cuda_synchronisation, random_captions, random_image_tokens, tiny_dalle
from precision_cases import (
    DTYPES,
    RULES,
    SCALES,
    assert_same_bits,
    bits,
    copied,
    copy_of,
    placed,
    scaled_gradients,
    steps_of,
    tensors_of,
    updated_tensors,
    values,
)
from torch import Tensor

from dalle_fast import AdamW16, ResblockGradScaler, reference, scaled_resblock
from dalle_fast.models.dvae import DVAE, DVAEConfig
from dalle_fast.ops import backends
from dalle_fast.ops.adamw16 import UpdatedTensors, adamw16_
from dalle_fast.ops.grad_scale import unscale_
from dalle_fast.ops.tensor_table import CHUNK, TensorTable, make_table

OPS = torch.ops.dalle_fast
has_gpu = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not has_gpu, reason="needs a GPU")
needs_cuda_extension = pytest.mark.skipif(
    has_gpu and not backends.has_cuda_extension, reason="dalle_fast._C has no CUDA half"
)
cuda_alone = [needs_gpu, needs_cuda_extension]
each_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=needs_extension), pytest.param("cuda", marks=cuda_alone)]
)
HUGE = 2**31 + 5 * CHUNK + 13  # elements, whose bytes are numbered beyond 32 bits in 16-bit types


def on_gpu(test):
    """Marks of a test of the GPU alone."""
    for mark in cuda_alone:
        test = mark(test)
    return test


def table_of(rows: list[UpdatedTensors]) -> TensorTable:
    names = ("param", "grad", "exp_avg", "exp_avg_sq", "master", "group", "block", "index")
    return make_table([[getattr(row, name) for row in rows] for name in names])


def update(rows, *, device="cpu", backend="cpp", skip=None, total=None, **options) -> list[Tensor]:
    """The rows' tensors after an update of copies on the device."""
    rows = copied(rows, device)
    state = (steps_of(rows).to(device), torch.tensor(SCALES, device=device))
    flags = {name: None if x is None else x.to(device) for name, x in (("skip", skip), ("sum_of_squares", total))}
    adamw16_(rows, RULES, *state, **flags, backend=backend, **options)
    return tensors_of(rows)


def unscale(grads, blocks, *, device="cpu", backend="cpp", write=True) -> tuple[list[Tensor], Tensor, Tensor]:
    """Copies on the device after it, nonfinite and the sum of squares."""
    grads = [copy_of(grad, device) for grad in grads]
    return grads, *unscale_(grads, torch.tensor(SCALES, device=device), blocks, write=write, backend=backend)


def exact_sum_of_squares(grads, blocks) -> float:
    """Of the finite quotients, rounded once."""
    squares = []
    for grad, block in zip(grads, blocks, strict=True):
        finite = torch.isfinite(grad.float() / SCALES[block])
        squares += (grad.double()[finite] / torch.tensor(SCALES[block]).double()).square().tolist()
    return math.fsum(squares)


@on_gpu
@pytest.mark.parametrize("name", ["grad", "grad_identity", "scale", "scales", "nonfinite", "steps", "skip"])
def test_cuda_tensors_and_others_are_refused(name):
    """The raw ops, which take no other tensor's address for one of the GPU."""
    grad, scales = torch.randn(8, device="cuda"), torch.ones(1, device="cuda")
    total = torch.zeros((), dtype=torch.float64, device="cuda")
    arguments = {"scale": scales, "scales": scales, "nonfinite": scales > 2, "steps": torch.ones(1).long().cuda()}
    arguments |= {"skip": arguments["nonfinite"], "grad": grad, "grad_identity": grad}
    arguments[name] = arguments[name].cpu()
    row = UpdatedTensors(grad, grad, torch.zeros_like(grad), torch.zeros_like(grad), None, 0, 0, 0)
    table, rules = table_of([row]), torch.tensor(RULES, dtype=torch.float64, device="cuda")
    with pytest.raises(RuntimeError, match=f"{name} must be on CUDA device 0, got a CPU"):
        if name in ("grad", "scale"):
            OPS.resblock_scale(arguments["grad"], arguments["scale"], torch.empty_like(grad))
        elif name == "grad_identity":
            OPS.resblock_unscale_add(grad, scales, arguments["grad_identity"], torch.empty_like(grad))
        elif name == "nonfinite":
            unscaled = make_table([[grad], [0]])
            OPS.multi_tensor_unscale(unscaled.rows, 1, CHUNK, scales, True, arguments["nonfinite"], total)
        else:
            state = (arguments["steps"], arguments["scales"], arguments["skip"], None, math.inf, 0, False)
            OPS.multi_tensor_adamw16(table.rows, 1, CHUNK, rules, *state)


@on_gpu
def test_cuda_graph():
    """Captured once; replayed with other gradients, scales, steps and flags, which are all read on the device."""
    rows = copied(updated_tensors(CHUNK), "cuda")
    start = [tensor.clone() for tensor in tensors_of(rows)]
    grads, blocks = [row.grad for row in rows], [row.block for row in rows]
    scales, steps = torch.tensor(SCALES, device="cuda"), steps_of(rows).cuda()
    nonfinite = torch.zeros(len(SCALES), dtype=torch.bool, device="cuda")
    total, skip = torch.zeros((), dtype=torch.float64, device="cuda"), torch.zeros((), dtype=torch.bool, device="cuda")
    unscaled, updated = make_table([grads, blocks]), table_of(rows)
    rules = torch.tensor(RULES, dtype=torch.float64, device="cuda")

    def step() -> None:
        nonfinite.zero_()
        total.zero_()
        OPS.multi_tensor_unscale(unscaled.rows, unscaled.num_chunks, CHUNK, scales, False, nonfinite, total)
        state = (rules, steps, scales, skip, total, 4.0, 3, True)
        OPS.multi_tensor_adamw16(updated.rows, updated.num_chunks, CHUNK, *state)

    def results() -> list[Tensor]:
        return [tensor.clone() for tensor in (*tensors_of(rows), nonfinite, total)]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for skipped in (False, True, False):
        for grad in grads:
            grad.copy_(values(grad.numel(), grad.dtype, special=()))
        scales.mul_(1.3)
        steps.add_(1)
        skip.fill_(skipped)
        inputs = [grad.clone() for grad in grads]
        found = []
        for run in (graph.replay, step):
            for tensor, old in zip(tensors_of(rows), start, strict=True):
                tensor.copy_(old)
            for grad, new in zip(grads, inputs, strict=True):
                grad.copy_(new)
            run()
            found.append(results())
        assert_same_bits(*found)
        assert found[0][-1] > 0


@on_gpu
def test_cuda_side_stream():
    """Behind what another stream has still to do: nothing starts before the gradients are there."""
    count = 3 * CHUNK + 5
    grad, stream = torch.zeros(count, device="cuda"), torch.cuda.Stream()
    new, scale = torch.randn(count, device="cuda"), torch.tensor([3.0], device="cuda")
    out, both = torch.empty_like(grad), torch.empty_like(grad)
    row = UpdatedTensors(torch.ones_like(grad), grad, torch.zeros_like(grad), torch.zeros_like(grad), None, 0, 0, 0)
    (expected,) = copied([row], "cuda")
    expected.grad.copy_(new)
    steps = torch.ones(1, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # clocks
        grad.copy_(new)
        OPS.resblock_scale(grad, scale, out)
        OPS.resblock_unscale_add(grad, scale, grad, both)
        found = unscale_([grad], scale, write=False, backend="cpp")
        adamw16_([row], RULES, steps, scale, backend="cpp")
    stream.synchronize()
    adamw16_([expected], RULES, steps, scale, backend="cpp")
    assert_same_bits([out, both], [new * scale, new + new / scale])
    assert found.sum_of_squares > 0
    assert_same_bits([row.param, row.exp_avg], [expected.param, expected.exp_avg])


@on_gpu
def test_no_cuda_synchronisation():
    rows = copied(updated_tensors(1000), "cuda")
    grads, blocks = [row.grad for row in rows], [row.block for row in rows]
    scales, steps = torch.tensor(SCALES, device="cuda"), steps_of(rows).cuda()
    x, weight = torch.randn(1000, device="cuda", requires_grad=True), torch.randn(1000, device="cuda").half()

    def step() -> None:
        y = scaled_resblock(x, lambda h: h.half() * weight, scales[0], backend="cpp")
        torch.autograd.grad(y, x, torch.ones_like(y))
        found = unscale_(grads, scales, blocks, write=False, backend="cpp")
        flags = {"skip": found.nonfinite.any(), "sum_of_squares": found.sum_of_squares}
        adamw16_(rows, RULES, steps, scales, **flags, grad_clip=4.0, seed=3, backend="cpp")

    step()
    with no_cuda_synchronisation():
        step()


def training_update(kind: str, precision: str, device: str) -> Callable[[], Tensor]:
    """An update of a small model as the training commands make it, a function of nothing."""
    if kind == "dvae":
        config = DVAEConfig(image_size=16, vocab_size=32, hidden=8, codebook_dim=8, groups=2, blocks_per_group=1)
        model = DVAE(config).to(device)
        images = torch.rand(2, 3, 16, 16, device=device)
        compute_loss = partial(model.loss, images, 0.5, 1.0)
    else:
        model = tiny_dalle().to(device)
        text, tokens = random_captions(model.config, [3, 2]), random_image_tokens(model.config, 2)
        compute_loss = partial(model.loss, text.to(device), tokens.to(device))
    scaler = None
    if precision == "fp16":
        model.cast_blocks(torch.float16)
        scaler = ResblockGradScaler(model.branches())
        model.set_grad_scales(scaler.block_scales)
        optimizer = AdamW16(model.parameters(), lr=1e-3, grad_clip=4.0, seed=0)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def update() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=scaler is None):
            loss = compute_loss().total
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if scaler is None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 4.0)
            optimizer.step()
        else:
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return loss.detach()

    return update


each_kind = pytest.mark.parametrize("kind", ["dalle", "dvae"])
each_precision = pytest.mark.parametrize("precision", ["bf16", "fp16"])


@each_device
@each_precision
@each_kind
def test_training_updates_learn(device, kind, precision):
    update = training_update(kind, precision, device)
    first = update()
    for _ in range(30):
        last = update()
    assert last.isfinite() and last < first


@on_gpu
@each_precision
@each_kind
def test_no_cuda_synchronisation_in_a_training_update(kind, precision):
    update = training_update(kind, precision, "cuda")
    for _ in range(3):
        update()
    with no_cuda_synchronisation():
        update()


@on_gpu
def test_another_cuda_device_than_the_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("one device alone")
    rows = updated_tensors(1000)
    grads, blocks = [row.grad for row in rows], [row.block for row in rows]
    with torch.cuda.device(0):
        assert_same_bits(update(rows, device="cuda:1", seed=3), update(rows, seed=3))
        assert_same_bits(unscale(grads, blocks, device="cuda:1")[0], unscale(grads, blocks)[0])


@on_gpu
def test_cuda_elements_beyond_32_bits():
    """The end of a huge tensor is treated as a small one's: every tensor in turn, then all its kernels."""
    if torch.cuda.mem_get_info()[0] < 10 * 2 * HUGE:
        pytest.skip(f"{torch.cuda.mem_get_info()[0]} bytes of memory are free")
    small = values(CHUNK, torch.float16, special=())
    row = UpdatedTensors(*(torch.zeros(HUGE, dtype=torch.int16, device="cuda") for _ in range(4)), None, 0, 0, 0)
    row = dataclasses.replace(row, param=row.param.view(torch.float16), grad=row.grad.view(torch.float16))
    begin = (HUGE - CHUNK) // 8 * 8
    count = HUGE - begin
    for tensor in (row.param, row.grad):
        tensor[begin:] = small[:1].cuda()
        tensor[begin : begin + CHUNK] = small.cuda()
    tail = UpdatedTensors(*(x[begin:] for x in (row.param, row.grad, row.exp_avg, row.exp_avg_sq)), None, 0, 0, 0)
    (expected,) = copied([tail])
    assert expected.param.numel() == count
    steps, scales = torch.ones(1, dtype=torch.int64), torch.tensor(SCALES)

    found = unscale_([row.grad], scales.cuda(), write=False, backend="cpp")
    total = unscale_([expected.grad], scales, write=False, backend="cpp").sum_of_squares
    assert found.sum_of_squares.item() == pytest.approx(total.item(), rel=2 * count * 2**-53, abs=0)
    adamw16_([row], RULES, steps.cuda(), scales.cuda(), backend="cpp")
    adamw16_([expected], RULES, steps, scales, backend="cpp")
    assert_same_bits(tensors_of([tail]), tensors_of([expected]))
    row.grad[-1] = math.inf
    found = unscale_([row.grad], scales.cuda(), backend="cpp")
    unscale_([expected.grad], scales, backend="cpp")
    assert found.nonfinite.tolist() == [True, False, False]
    assert row.grad[-1] == 0
    assert_same_bits([tail.grad[:-1]], [expected.grad[:-1]])

    out = row.exp_avg.view(torch.float16)
    del row, tail
    grad = torch.zeros(HUGE, device="cuda")
    grad[begin : begin + CHUNK] = small.cuda()
    OPS.resblock_scale(grad, scales[1:2].cuda(), out)
    assert torch.equal(out[begin : begin + CHUNK], (small.float() * SCALES[1]).half().cuda())
    OPS.resblock_unscale_add(grad, scales[1:2].cuda(), grad, grad)
    assert torch.equal(grad[begin : begin + CHUNK].cpu(), small.float() + small.float() / SCALES[1])
    assert not grad[:begin].any()


@each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 8, 1003, 3 * CHUNK + 5])
def test_passes_of_a_residual_block(device, count, dtype):
    """The raw ops, aligned and not."""
    for offset in (0, 1):
        grad, identity, scale = values(count), values(count), torch.tensor(37.5)
        here = [placed(x.to(device), offset) for x in (grad, identity, grad.to(dtype))]
        OPS.resblock_scale(here[0], scale.to(device), here[2])
        assert_same_bits([here[2]], [reference.filter_nonfinite(grad * scale).to(dtype)])
        both = torch.empty_like(here[0])
        OPS.resblock_unscale_add(here[0], scale.to(device), here[1], both)
        expected = identity + reference.filter_nonfinite(grad / scale)
        assert_same_bits([both.nan_to_num(nan=0.5)], [expected.nan_to_num(nan=0.5)])


@each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded"])
def test_scaled_resblock(device, dtype, layout):
    shape = (2, 3, 5, 7)
    x, upstream, weight = torch.randn(shape), values(210).view(shape), torch.randn(shape).to(dtype)
    if layout == "channels_last":
        x, upstream = (tensor.to(memory_format=torch.channels_last) for tensor in (x, upstream))
    elif layout == "expanded":
        upstream = torch.tensor(1e-4).expand(shape)
    grads = []
    for where, backend in (("cpu", "reference"), (device, "cpp")):
        inputs = [tensor.to(where).detach().requires_grad_() for tensor in (x, weight)]
        y = scaled_resblock(inputs[0], lambda h, w=inputs[1]: h.to(dtype) * w, 2.0**13, backend=backend)
        grads.append([grad.nan_to_num(nan=0.5) for grad in torch.autograd.grad(y, inputs, upstream.to(where))])
    assert_same_bits(*grads)


@each_device
@pytest.mark.parametrize("write", [False, True])
def test_unscale(device, write):
    grads, blocks = scaled_gradients(CHUNK)
    found, nonfinite, total = unscale(grads, blocks, device=device, write=write)
    expected, flags, _ = unscale(grads, blocks, backend="reference", write=write)
    assert_same_bits([*found, nonfinite], [*expected, flags])
    assert flags.tolist() == [True, False, True]
    assert any(not torch.equal(bits(one), bits(other)) for one, other in zip(found, grads, strict=True)) == write
    # Rounding of a square's factors aside, that of a sum of positive float64 numbers, one a term.
    bound = (sum(grad.numel() for grad in grads) + 4) * 2**-53
    assert total.item() == pytest.approx(exact_sum_of_squares(grads, blocks), rel=bound, abs=0)


@each_device
@pytest.mark.parametrize("write", [False, True])
def test_unscale_gives_the_same_bits_again(device, write):
    grads = [values(size, dtype, special=()) for dtype in DTYPES for size in (100 * CHUNK + 5, 7, CHUNK)]
    blocks = [number % len(SCALES) for number in range(len(grads))]
    first, *others = (unscale(grads, blocks, device=device, write=write) for _ in range(10 if device == "cuda" else 2))
    for other in others:
        assert_same_bits([*other[0], *other[1:]], [*first[0], *first[1:]])


@each_device
def test_unscale_of_nothing(device):
    for grads in ([], [torch.empty(0)], [torch.empty(0), torch.ones(3), torch.empty(0, dtype=torch.float16)]):
        found, nonfinite, total = unscale(grads, [1] * len(grads), device=device)
        assert not nonfinite.any()
        assert total.item() == pytest.approx(sum(grad.numel() for grad in grads) / SCALES[1] ** 2)
        assert [len(grad) for grad in found] == [len(grad) for grad in grads]


@each_device
@pytest.mark.parametrize("seed", [None, 3, 2**64 - 1], ids=str)
@pytest.mark.parametrize("clip", [None, 4.0], ids=str)
def test_adamw16(device, clip, seed):
    rows = updated_tensors(CHUNK if device == "cuda" else 1000)
    options = {"grad_clip": clip, "seed": seed}
    if clip is not None:
        options |= {"total": torch.tensor(1e4, dtype=torch.float64), "skip": torch.tensor(False)}
    found = update(rows, device=device, **options)
    assert_same_bits(found, update(rows, **options))
    assert_same_bits(update(rows, device=device, **options), found)
    changed = [not torch.equal(bits(one), bits(other)) for one, other in zip(found, tensors_of(rows), strict=True)]
    assert sum(changed) > len(rows)


@each_device
@pytest.mark.parametrize("seed", [None, 3], ids=str)
def test_adamw16_is_the_reference(device, seed):
    """Of what plain PyTorch does with the same words, numbers that are NaN aside, whose bits are PyTorch's own."""
    rows = [row for row in updated_tensors(1000) if row.param.numel()]
    for one, other in zip(
        update(rows, device=device, seed=seed), update(rows, backend="reference", seed=seed), strict=True
    ):
        if one.is_floating_point():
            one, other = (tensor.cpu().nan_to_num(nan=0.5) for tensor in (one, other))
        assert_same_bits([one], [other])


@each_device
def test_skipped_adamw16(device):
    rows = updated_tensors(1000)
    assert_same_bits(update(rows, device=device, seed=3, skip=torch.tensor(True)), tensors_of(rows))


@each_device
def test_adamw16_of_nothing(device):
    rows = [row for row in updated_tensors(1000) if row.param.numel() == 0]
    assert len(rows) == 5
    assert all(tensor.numel() == 0 for tensor in update(rows, device=device, seed=3))
