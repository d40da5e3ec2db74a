"""The table by which one kernel launch reaches many tensors.

A row a tensor, int64: what the kernel asks for (addresses first), then for all kernels alike

    numel        elements
    dtype        0 float32, 1 float16, 2 bfloat16
    first_chunk  number of chunks in the rows before: the work is cut into chunks of CHUNK elements, none of which
                 spans two tensors, numbered from 0 over the whole table

Kernels walk through the memory of a tensor and not through its strides, so that all tensors of a row have to be laid
out alike, without gaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 16  # elements; a multiple of 8, those that share a counter of the generator
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class TensorTable(NamedTuple):
    """rows: (number of tensors, columns) int64 on the tensors' device."""

    rows: Tensor
    num_chunks: int


def make_table(columns: Sequence[Sequence[Tensor | int | None]], sized_by: int = 0) -> TensorTable:
    """A table of tensors that all lie on one device.

    Args:
        columns: of one length, 1 at least, one entry a row each; a tensor stands for its address, None for 0. They come
            first.
        sized_by: the column of tensors whose numel and dtype the last columns give.

    The caller keeps the tensors until the kernel has been launched.
    """
    sized = columns[sized_by]
    cells = np.empty((len(sized), len(columns) + 3), dtype=np.int64)
    for index, column in enumerate(columns):
        cells[:, index] = [_cell(entry) for entry in column]
    cells[:, -3] = [tensor.numel() for tensor in sized]
    cells[:, -2] = [DTYPE_CODES[tensor.dtype] for tensor in sized]
    chunks = -(-cells[:, -3] // CHUNK)
    ends = np.cumsum(chunks)
    cells[:, -1] = ends - chunks
    return TensorTable(to_device(torch.from_numpy(cells), sized[0].device), int(ends[-1]))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small CPU tensor on ``device``, without waiting for it."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills its memory without gaps or overlaps, in whatever order of its dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _cell(entry: Tensor | int | None) -> int:
    if isinstance(entry, Tensor):
        return entry.data_ptr()
    return 0 if entry is None else int(entry)
