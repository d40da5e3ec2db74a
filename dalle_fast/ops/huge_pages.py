"""Huge pages for tensors that are read from end to end again and again, on a CPU under Linux."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_fast.ops import backends

__all__ = ["use_huge_pages"]


def use_huge_pages(tensor: Tensor) -> bool:
    """Move the memory of a tensor to huge pages, once: ``csrc/cpu/huge_pages.cpp``.

    Contents and address stay. It takes a copy's time, some 2 ms per MB, and the same once more is free.

    Args:
        tensor: contiguous.

    Returns:
        Whether it lies in huge pages now, but for its ends. False where there are none (Linux before 6.1, other
        systems, ``never`` in ``/sys/kernel/mm/transparent_hugepage/enabled``), for tensors smaller than a page, on
        other devices, and without the C++ ops.
    """
    if backends.extension is None or tensor.device.type != "cpu":
        return False
    return torch.ops.dalle_fast.use_huge_pages_cpu(tensor.detach())
