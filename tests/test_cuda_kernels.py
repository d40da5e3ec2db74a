"""The kernels of csrc/cuda/grad_scale.cu and adamw16.cu, run on a CPU thread by thread: tests/cuda_host.

What is proven is all but the GPU's own arithmetic: which thread reads and writes what, barriers, the order of sums, and
the rounding that the kernels do themselves. Expected is what the CPU's ops give. Needs a C++ compiler.
"""

import ctypes
import dataclasses
import math
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import needs_extension
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
from torch.utils import cpp_extension

from dalle_fast import reference
from dalle_fast.ops import tensor_table
from dalle_fast.ops.adamw16 import UpdatedTensors
from dalle_fast.ops.tensor_table import DTYPE_CODES, TensorTable, make_table
from dalle_fast.reference.philox import philox

COMPILER = shlex.split(os.environ.get("CXX") or "c++")
pytestmark = [
    needs_extension,
    pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"the C++ compiler {COMPILER[0]!r} is not there"),
]

OPS = torch.ops.dalle_fast
CHUNK = 20480  # two and a half steps of a block over 16-bit gradients
THREADS = 256


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    library = tmp_path_factory.mktemp("kernels") / "kernels.so"
    folder = Path(__file__).parent / "cuda_host"
    command = [*COMPILER, "-std=c++20", "-O2", "-shared", "-fPIC", "-pthread", "-ffp-contract=off", f"-I{folder}"]
    for path in cpp_extension.include_paths(device_type="cpu"):
        command += ["-isystem", path]
    subprocess.run([*command, str(folder / "kernels.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(tensor_table, "CHUNK", CHUNK)


def argument(value: Tensor | int | float | None):
    """A tensor as its address, numbers as the widest of their kind, in C."""
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_void_p(0 if value is None else value)


def call(function, *arguments: Tensor | int | float | None) -> None:
    function(*(argument(each) for each in arguments))


def table_of(rows: list[UpdatedTensors]) -> TensorTable:
    names = ("param", "grad", "exp_avg", "exp_avg_sq", "master", "group", "block", "index")
    return make_table([[getattr(row, name) for row in rows] for name in names])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("count", [0, 1, 8, 8 * THREADS + 5, 40 * THREADS + 3])
def test_resblock_scale(kernels, count, offset, dtype):
    grad, scale = placed(values(count), offset), torch.tensor(37.5)
    expected, found = torch.empty(count, dtype=dtype), placed(torch.empty(count, dtype=dtype), offset)
    OPS.resblock_scale(grad, scale, expected)
    call(kernels.resblock_scale, grad, scale, found, DTYPE_CODES[dtype], count, 2)
    assert_same_bits([found], [expected])


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("count", [0, 1, 8, 8 * THREADS + 5, 40 * THREADS + 3])
def test_resblock_unscale_add(kernels, count, offset):
    grad, identity, scale = placed(values(count), offset), values(count), torch.tensor(37.5)
    expected, found = torch.empty(count), torch.empty(count)
    OPS.resblock_unscale_add(grad, scale, identity, expected)
    call(kernels.resblock_unscale_add, grad, scale, identity, found, count, 2)
    assert_same_bits([found], [expected])


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("write", [False, True])
def test_multi_tensor_unscale(kernels, write, backwards):
    grads, blocks = scaled_gradients(CHUNK)
    scales = torch.tensor(SCALES)
    others = [copy_of(grad) for grad in grads]
    nonfinite, total = torch.zeros(len(SCALES), dtype=torch.bool), torch.zeros((), dtype=torch.float64)
    expected = make_table([others, blocks])
    OPS.multi_tensor_unscale(expected.rows, expected.num_chunks, CHUNK, scales, write, nonfinite, total)
    assert nonfinite.tolist() == [True, False, True]

    table = make_table([grads, blocks])
    found, found_total = torch.zeros_like(nonfinite), torch.zeros_like(total)
    workspace = torch.full((table.num_chunks,), math.nan, dtype=torch.float64)
    sizes = (table.rows, len(grads), table.num_chunks, CHUNK)
    call(kernels.multi_tensor_unscale, *sizes, scales, write, found, found_total, workspace, backwards)
    assert_same_bits([*grads, found], [*others, nonfinite])
    # Two sums of as many positive float64 numbers in different orders.
    assert abs(found_total - total) <= 2 * sum(grad.numel() for grad in grads) * 2**-53 * total


def test_sums_do_not_depend_on_the_order_of_blocks(kernels):
    grads, blocks = scaled_gradients(CHUNK, special=())
    table, scales = make_table([grads, blocks]), torch.tensor(SCALES)
    totals = []
    for backwards in (False, True, True):
        nonfinite, total = torch.zeros(len(SCALES), dtype=torch.bool), torch.zeros((), dtype=torch.float64)
        workspace = torch.full((table.num_chunks,), math.nan, dtype=torch.float64)
        sizes = (table.rows, len(grads), table.num_chunks, CHUNK)
        call(kernels.multi_tensor_unscale, *sizes, scales, False, nonfinite, total, workspace, backwards)
        totals.append(total)
    assert_same_bits(totals[1:], [totals[0]] * 2)


@pytest.mark.parametrize("scale", [0.0, math.nan, math.inf, 2.0**-149, 2.0**-100, 1.0, 2.0**100])
def test_scales_at_the_ends_of_their_range(kernels, scale):
    grads = [placed(values(999, dtype, special=(0.0, -0.0, 1e-45, 3e38)), 0) for dtype in DTYPES]
    scales = torch.tensor([scale])
    for write in (False, True):
        others, results = [copy_of(grad) for grad in grads], []
        for each, native in ((grads, False), (others, True)):
            table = make_table([each, [0, 0, 0]])
            nonfinite, total = torch.zeros(1, dtype=torch.bool), torch.zeros((), dtype=torch.float64)
            if native:
                OPS.multi_tensor_unscale(table.rows, table.num_chunks, CHUNK, scales, write, nonfinite, total)
            else:
                workspace = torch.empty(table.num_chunks, dtype=torch.float64)
                sizes = (table.rows, len(grads), table.num_chunks, CHUNK)
                call(kernels.multi_tensor_unscale, *sizes, scales, write, nonfinite, total, workspace, False)
            results.append((nonfinite, total))
        assert_same_bits([*grads, results[0][0]], [*others, results[1][0]])
        assert results[0][1].item() == pytest.approx(results[1][1].item(), rel=2 * 3 * 999 * 2**-53, abs=0)


def run_adamw16(function, rows, *, skip=None, total=None, grad_clip=math.inf, seed=3, stochastic=True) -> list[Tensor]:
    """Update copies of the rows; all tensors after it. function None is the CPU's op."""
    rows = copied(rows)
    table, rules, scales = table_of(rows), torch.tensor(RULES, dtype=torch.float64), torch.tensor(SCALES)
    state = (rules, steps_of(rows), scales, skip, total, grad_clip, seed, stochastic)
    if function is None:
        OPS.multi_tensor_adamw16(table.rows, table.num_chunks, CHUNK, *state)
    else:
        call(function, table.rows, len(rows), 0, table.num_chunks, CHUNK, *state)
    return tensors_of(rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seed": -5},
        {"stochastic": False},
        {"total": torch.tensor(1e4, dtype=torch.float64), "grad_clip": 4.0},
        {"total": torch.tensor(math.nan, dtype=torch.float64), "grad_clip": 4.0},
        {"total": torch.tensor(0.0, dtype=torch.float64), "grad_clip": 4.0, "skip": torch.tensor(False)},
    ],
    ids=str,
)
def test_multi_tensor_adamw16(kernels, options):
    rows = updated_tensors(CHUNK)
    before, expected = tensors_of(rows), run_adamw16(None, rows, **options)
    assert any(not torch.equal(bits(one), bits(other)) for one, other in zip(before, expected, strict=True))
    assert_same_bits(run_adamw16(kernels.multi_tensor_adamw16, rows, **options), expected)


def test_skipped_update(kernels):
    rows = updated_tensors(CHUNK)
    found = run_adamw16(kernels.multi_tensor_adamw16, rows, skip=torch.tensor(True))
    assert_same_bits(found, tensors_of(rows))


@pytest.mark.parametrize("begin", [-(-(2**power) // CHUNK) * CHUNK for power in (31, 32, 36)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_elements_beyond_32_bits(kernels, dtype, begin):
    """The last block of a tensor of which the end alone is there: addresses, and the noise of those elements."""
    count, index, step, seed = 1003, 7, 5, 11
    rows = [row for row in updated_tensors(count) if row.param.dtype == dtype and row.param.numel() == count + 9]
    assert [row.master is None for row in rows] == [True, False]
    steps, rules = torch.full((index + 1,), step), torch.tensor(RULES, dtype=torch.float64)
    for row in rows:
        before = dataclasses.replace(row, group=0, block=0, index=index)
        (after,) = copied([before])
        (cells,) = table_of([after]).rows
        for column, tensor in enumerate((after.param, after.grad, after.exp_avg, after.exp_avg_sq, after.master)):
            cells[column] -= 0 if tensor is None else begin * tensor.element_size()
        cells[-3] += begin  # numel
        state = (rules, steps, torch.tensor(SCALES), None, None, math.inf, seed, True)
        call(kernels.multi_tensor_adamw16, cells, 1, begin // CHUNK, 1, CHUNK, *state)

        # What is not rounded does not depend on where the elements are.
        master = before.param.float() if before.master is None else before.master
        (wide,) = copied([dataclasses.replace(before, master=master)])
        table = table_of([wide])
        OPS.multi_tensor_adamw16(table.rows, table.num_chunks, CHUNK, *state)
        assert_same_bits([after.exp_avg, after.exp_avg_sq], [wide.exp_avg, wide.exp_avg_sq])
        if before.master is not None:
            assert_same_bits([after.param, after.master], [wide.param, wide.master])
            continue
        group = torch.arange(begin // 8, begin // 8 + -(-(count + 9) // 8))
        words = torch.stack(philox((group & 0xFFFFFFFF, group >> 32, index, step), (seed, 0), rounds=7), 1)
        noise = torch.stack([words & 0xFFFF, words >> 16], dim=2).flatten()[: count + 9]
        expected = reference.round_stochastically(wide.master, noise, dtype)
        real = ~wide.master.isnan()
        assert_same_bits([after.param[real]], [expected[real]])
        assert after.param[~real].isnan().all()


@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 100, 1024, 1025, 3000])
def test_a_warp_finds_the_chunk(kernels, rows):
    """Every chunk's row, with empty tensors before, between and after the others."""
    sizes = torch.randint(0, 4 * CHUNK, (rows,)) * (torch.rand(rows) < 0.7)
    sizes[rows // 2] = CHUNK + 1
    chunks = -(-sizes // CHUNK)
    first = torch.cumsum(chunks, 0) - chunks
    table = torch.stack([torch.zeros_like(sizes), torch.zeros_like(sizes), sizes, torch.zeros_like(sizes), first], 1)
    count = int(chunks.sum())
    found, begins = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
    call(kernels.find_chunks, table, rows, table.shape[1], count, CHUNK, found, begins)
    assert found.tolist() == torch.repeat_interleave(torch.arange(rows), chunks).tolist()
    assert begins.tolist() == [CHUNK * number for size in chunks.tolist() for number in range(size)]
