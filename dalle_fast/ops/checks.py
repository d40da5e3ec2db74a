"""Argument checks that several ops share: each names the argument, the rule and the value it got."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "cpp", "reference")


def check_backend(op: str, backend: str, has: tuple[str, ...] = ()) -> None:
    """Raise unless ``op``, which has kernels for the backends ``has``, can run on ``backend``.

    Raises:
        ValueError: not the name of a backend.
        RuntimeError: a backend that this version has no code for.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend in ("triton", "cpp") and backend not in has:
        raise RuntimeError(f'backend "{backend}" of {op} is not part of this version; use backend="auto"')


def check_floating(**tensors: Tensor) -> None:
    """Raise unless all are floating-point tensors of one dtype on one device."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        dtypes = ", ".join(str(tensor.dtype) for tensor in tensors.values())
        raise TypeError(f"{', '.join(tensors)} must have one dtype, got {dtypes}")
    if len({tensor.device for tensor in tensors.values()}) > 1:
        devices = ", ".join(str(tensor.device) for tensor in tensors.values())
        raise ValueError(f"{', '.join(tensors)} must be on one device, got {devices}")


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape as it prints in a message."""
    return tuple(tensor.shape)


def is_autocast(device: torch.device) -> bool:
    """Whether autocast is on for tensors of ``device``."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def cast_under_autocast(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """The 16- and 32-bit floating-point ones among the tensors in ``dtype``, if autocast is on for the first.

    Everything else passes as it is. ``dtype`` None is the autocast dtype.
    """
    if not isinstance(tensors[0], Tensor) or not is_autocast(tensors[0].device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(tensors[0].device.type) if dtype is None else dtype
    casts = (torch.float32, torch.float16, torch.bfloat16)
    return [x.to(dtype) if isinstance(x, Tensor) and x.dtype in casts else x for x in tensors]


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which ops run in the dtypes they are given."""
    return torch.autocast(device.type, enabled=False) if is_autocast(device) else nullcontext()
