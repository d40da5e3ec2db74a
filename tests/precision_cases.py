"""Inputs of the mixed-precision ops that are awkward for a kernel: odd sizes, unaligned starts, values of all sizes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from dalle_fast import formats
from dalle_fast.ops.adamw16 import UpdatedTensors, UpdateRule

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 65504.0, -65520.0, 2.0**-24, -3e-39, 3e38)
RULES = (UpdateRule(4.5e-4, 0.9, 0.96, 1e-8, 0.045, 5.0), UpdateRule(1e-2, 0.5, 0.999, 1e-6, 0.0, 1e-3))
SCALES = (2.0**13, 1.5, 0.37)


def bits(tensor: Tensor) -> Tensor:
    """The tensor's words as integers, so that NaN equals itself and -0 is not 0."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().cpu().contiguous().view(words)


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Both of the same dtypes, shapes and bits."""
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.dtype == other.dtype, number
        assert torch.equal(bits(one), bits(other)), number


def values(count: int, dtype: torch.dtype = torch.float32, *, special: Sequence[float] = SPECIAL) -> Tensor:
    """Numbers of both signs and all magnitudes of float16, some of ``special`` among them."""
    x = torch.randn(count) * 10.0 ** (8 * torch.rand(count) - 6)
    if special and count:
        places = torch.randint(count, (count // 16 + 1,))
        x[places] = torch.tensor(special)[torch.randint(len(special), places.shape)]
    return x.to(dtype)


def placed(tensor: Tensor, offset: int) -> Tensor:
    """A copy of a flat tensor that begins ``offset`` elements after a multiple of 16 bytes."""
    memory = tensor.new_empty(len(tensor) + 16)
    memory[offset : offset + len(tensor)] = tensor
    return memory[offset : offset + len(tensor)]


def scaled_gradients(chunk: int, *, special: Sequence[float] = SPECIAL) -> tuple[list[Tensor], list[int]]:
    """Gradients of all dtypes, some empty, some that begin off a multiple of 16 bytes; and their blocks.

    Block 1 has finite gradients alone.
    """
    grads, blocks = [], []
    sizes = (0, 1, 7, 8, 9, chunk - 1, chunk, chunk + 1, 3 * chunk + 13, 0, 0, 100)
    for number, (size, dtype, offset) in enumerate(itertools.product(sizes, DTYPES, (0, 3))):
        block = number % len(SCALES)
        grads.append(placed(values(size, dtype, special=() if block == 1 else special), offset))
        blocks.append(block)
    return grads, blocks


def updated_tensors(chunk: int) -> list[UpdatedTensors]:
    """Parameters of every dtype, with and without masters; in each but the first of them one tensor is unaligned."""
    rows = []
    kinds = [(torch.float32, False), *itertools.product((torch.float16, torch.bfloat16), (False, True))]
    layouts = [
        (chunk + 9, None),
        (5, None),
        (0, None),
        (2 * chunk, 0),
        (chunk // 2 + 3, 1),
        (77, 2),
        (1000, 3),
        (91, 4),
    ]
    for (dtype, has_master), (size, unaligned) in itertools.product(kinds, layouts):
        offsets = [3 if place == unaligned else 0 for place in range(5)]
        mean, variance = values(size, special=()) * 1e-3, values(size, special=(0.0,)).square()
        if dtype != torch.float32:
            mean, variance = formats.encode_169(mean), formats.encode_0610(variance)
        # Parameters of float16's smallest magnitudes too, which are rounded by another rule.
        param = values(size, special=(0.0, -0.0, 1e-7, -3e-5, 65504.0, float("nan")))
        tensors = [param.to(dtype), values(size, dtype), mean, variance]
        tensors = [placed(tensor, offset) for tensor, offset in zip(tensors, offsets, strict=False)]
        master = placed(param, offsets[4]) if has_master else None
        number = len(rows)
        rows.append(UpdatedTensors(*tensors, master, number % len(RULES), number % len(SCALES), number))
    return rows


def tensors_of(rows: Sequence[UpdatedTensors]) -> list[Tensor]:
    """All that an update may change, or must not."""
    names = ("param", "grad", "exp_avg", "exp_avg_sq", "master")
    return [getattr(row, name) for row in rows for name in names if getattr(row, name) is not None]


def copied(rows: Sequence[UpdatedTensors], device: str = "cpu") -> list[UpdatedTensors]:
    """Copies on a device, which begin as far off a multiple of 16 bytes as the originals."""
    return [
        UpdatedTensors(
            *(
                None if tensor is None else copy_of(tensor, device)
                for tensor in (row.param, row.grad, row.exp_avg, row.exp_avg_sq, row.master)
            ),
            row.group,
            row.block,
            row.index,
        )
        for row in rows
    ]


def copy_of(tensor: Tensor, device: str = "cpu") -> Tensor:
    """A copy on a device that begins as far off a multiple of 16 bytes."""
    return placed(tensor.to(device), tensor.data_ptr() % 16 // tensor.element_size())


def steps_of(rows: Sequence[UpdatedTensors]) -> Tensor:
    """Updates of different numbers, the first among them, and one beyond int32."""
    return torch.tensor([(1, 2, 1000, 3_000_000_000)[index % 4] for index in range(max(row.index for row in rows) + 1)])
