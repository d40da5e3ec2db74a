"""DTensors, whose class is not imported for them: that takes a quarter of the time of importing torch."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the tensor is spread or repeated over a mesh of processes."""
    return type(tensor) is not Tensor and hasattr(tensor, "device_mesh")


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor; any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def sharding_groups(tensor: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which a DTensor is split; its replicas are equal and need no talk."""
    if not is_dtensor(tensor):
        return ()
    mesh = tensor.device_mesh
    groups = (mesh.get_group(axis) for axis, placed in enumerate(tensor.placements) if not placed.is_replicate())
    return tuple(group for group in groups if dist.get_world_size(group) > 1)
