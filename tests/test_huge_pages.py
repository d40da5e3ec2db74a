"""Moving tensors to huge pages: what is in them and where they are stays, and the answer is true."""

import re
from pathlib import Path

import pytest
import torch
from helpers import needs_extension
from torch import Tensor

from dalle_fast.ops import backends
from dalle_fast.ops.huge_pages import use_huge_pages

SIZES = [1, 1000, (1 << 19) + 3, (5 << 20) + 1]  # elements


def huge_bytes(tensor: Tensor) -> int:
    """Of the mapping that the tensor's middle lies in, as the kernel counts them."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds is not None:
            is_there = int(bounds[1], 16) <= middle < int(bounds[2], 16)
        elif is_there and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    raise LookupError("the tensor's memory is not mapped")


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_contents_and_address_stay(size, dtype):
    tensor = torch.arange(size).remainder(251).to(dtype)
    before, address = tensor.clone(), tensor.data_ptr()
    is_huge = use_huge_pages(tensor)
    assert torch.equal(tensor, before)
    assert tensor.data_ptr() == address
    assert use_huge_pages(tensor) == is_huge
    if is_huge:
        assert huge_bytes(tensor) > 0


@needs_extension
def test_neighbours_stay():
    tensors = [torch.full((1 << 18,), float(index)) for index in range(20)]
    for tensor in tensors[::3]:
        use_huge_pages(tensor)
    assert all((tensor == index).all() for index, tensor in enumerate(tensors))


@needs_extension
def test_parameters_and_parts_of_tensors():
    whole = torch.rand(3 << 20)
    before = whole.clone()
    use_huge_pages(torch.nn.Parameter(whole[1 << 20 : 2 << 20]))
    assert torch.equal(whole, before)


def test_where_there_are_none(monkeypatch):
    assert not use_huge_pages(torch.empty(1 << 20, device="meta"))
    monkeypatch.setattr(backends, "extension", None)
    assert not use_huge_pages(torch.empty(1 << 20))


@needs_extension
def test_errors():
    assert not use_huge_pages(torch.empty(0))
    with pytest.raises(
        RuntimeError, match=re.escape("tensor must be contiguous, got shape (4, 3) with strides (1, 4)")
    ):
        use_huge_pages(torch.empty(3, 4).T)
