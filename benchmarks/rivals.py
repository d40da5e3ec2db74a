"""The ops that the attention benchmarks time against each other: this library's, PyTorch's and flash-attn's.

Every op here computes what its case asks for, and is given what it needs in the form it likes best, made outside the
timing: SDPA an additive mask in the inputs' dtype (it would convert a boolean one anew at every call), FlexAttention a
block mask and a ``mask_mod`` in as few operations as the pattern allows (``Pattern.mask_mod`` goes through rows and
columns, and costs it up to 1.8 times the run time), flash-attn its own order of dimensions.

- ``attention``, ``attention_qkvpacked``: this library, backend "auto".
- ``sdpa_causal``: ``scaled_dot_product_attention(is_causal=True)``, in cases of the pattern ``Full``.
- ``sdpa_mask``: the same function under the pattern's dense mask.
- ``flex``: ``torch.compile(flex_attention)``; forward only on a CPU, where it has no backward.
- ``flex_permuted``: ``flex`` for Column with the image in column-major order, where a column is one stretch of keys.
  The copies there and back are compiled and counted with it.
- ``flex_autotuned``: ``flex`` compiled with "max-autotune-no-cudagraphs"; GPU.
- ``flash_attn``: flash-attn's dense causal attention, in cases of ``Full``; GPU, where the package is installed.

Packages that offer attention only as a layer with its projections are in ``peers.py``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from oracle import NAMES, Case, additive_mask
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import dalle_fast
from dalle_fast.patterns import Column, Conv, Full, Pattern, Row

BLOCK = 128  # FlexAttention's own default

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Attend = Callable[..., Tensor]


class HeadsFirst:
    """How an op takes q, k and v and returns o: (B, H, S, D). Other layouts translate from and to this one."""

    def pack(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """What the op is called with."""
        return query, key, value

    def out(self, tensor: Tensor) -> Tensor:
        """Between (B, H, S, D) and the op's output, either way."""
        return tensor

    def unpack(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """The inverse of ``pack``."""
        return tensors


class PositionsFirst(HeadsFirst):
    """(B, S, H, D)."""

    def pack(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.out(tensor).contiguous() for tensor in (query, key, value))

    def out(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2)

    def unpack(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(self.out(tensor) for tensor in tensors)


class Packed(PositionsFirst):
    """One tensor (B, S, 3, H, D)."""

    def pack(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return (torch.stack(super().pack(query, key, value), dim=2),)

    def unpack(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        return super().unpack(tensors[0].unbind(2))


@dataclass(frozen=True)
class Op:
    """One row of a table.

    Args:
        make: given the case, what to call with the inputs.
        compiles: the first call compiles code.
    """

    make: Callable[[Case], Attend]
    layout: type[HeadsFirst] = HeadsFirst
    compiles: bool = False


def _attention(case: Case) -> Attend:
    return lambda q, k, v: dalle_fast.attention(q, k, v, case.pattern)


def _attention_qkvpacked(case: Case) -> Attend:
    return lambda qkv: dalle_fast.attention_qkvpacked(qkv, case.pattern)


def _sdpa_causal(case: Case) -> Attend:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _sdpa_mask(case: Case) -> Attend:
    mask = additive_mask(case.pattern, case.dtype, case.device)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _flex(case: Case) -> Attend:
    return _compiled_flex(case, mode=None)


def _flex_autotuned(case: Case) -> Attend:
    return _compiled_flex(case, mode="max-autotune-no-cudagraphs")


def _compiled_flex(case: Case, mode: str | None) -> Attend:
    mask = block_mask(mask_mod(case.pattern), case.pattern.seq_len, case.device)
    compiled = _compile(flex_attention, mode)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def _flex_permuted(case: Case) -> Attend:
    pattern = case.pattern
    mask = block_mask(column_major_mask_mod(pattern), pattern.seq_len, case.device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        moved = (_transpose_image(x, pattern.text_len, pattern.height, pattern.width) for x in (query, key, value))
        out = flex_attention(*moved, block_mask=mask)
        return _transpose_image(out, pattern.text_len, pattern.width, pattern.height)

    return _compile(attend, None)


def _transpose_image(x: Tensor, text_len: int, height: int, width: int) -> Tensor:
    """(B, H, S, D) with its image positions, height by width, in column-major order."""
    text, image = x.split([text_len, height * width], dim=2)
    return torch.cat([text, image.unflatten(2, (height, width)).transpose(2, 3).flatten(2, 3)], dim=2)


def _compile(function: Attend, mode: str | None) -> Attend:
    torch._dynamo.reset()  # or its limit of recompilations is used up after eight cases
    # Donated buffers forbid the second backward pass over one graph that timing backward alone takes.
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False, mode=mode)


def _flash_attn(case: Case) -> Attend:
    flash_attn = importlib.import_module("flash_attn")
    return lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=True)


OPS = {
    "attention": Op(_attention),
    "attention_qkvpacked": Op(_attention_qkvpacked, Packed),
    "sdpa_causal": Op(_sdpa_causal),
    "sdpa_mask": Op(_sdpa_mask),
    "flex": Op(_flex, compiles=True),
    "flex_permuted": Op(_flex_permuted, compiles=True),
    "flex_autotuned": Op(_flex_autotuned, compiles=True),
    "flash_attn": Op(_flash_attn, PositionsFirst),
}


def make_call(name: str, case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed: one call of an op on the case's inputs; :func:`read_result` names what it returns."""
    attend, layout = OPS[name].make(case), OPS[name].layout()
    query, key, value, upstream = case.inputs()
    leaves = tuple(x.requires_grad_(case.mode != "forward") for x in layout.pack(query, key, value))
    upstream = layout.out(upstream).contiguous()
    if case.mode == "forward":
        return lambda: (attend(*leaves),)
    if case.mode == "backward":
        out = attend(*leaves)
        return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)

    def forward_and_backward() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, upstream)

    return forward_and_backward


def read_result(name: str, case: Case, result: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What :func:`make_call`'s function returned, by name and as (B, H, S, D)."""
    layout = OPS[name].layout()
    if case.mode == "forward":
        return {"out": layout.out(result[0])}
    if case.mode == "backward":
        return dict(zip(NAMES[1:], layout.unpack(result), strict=True))
    return dict(zip(NAMES, (layout.out(result[0]), *layout.unpack(result[1:])), strict=True))


def mask_mod(pattern: Pattern) -> MaskMod:
    """``pattern.mask_mod`` for the paper's variants, from the offset of the positions alone."""
    text_len, width = pattern.text_len, pattern.width
    if isinstance(pattern, Full):
        return lambda batch, head, q, k: k <= q
    if isinstance(pattern, Row) and pattern.variant == "raster":
        return lambda batch, head, q, k: (k <= q) & ((k < text_len) | (q - k <= width))
    if isinstance(pattern, Column):
        return lambda batch, head, q, k: (k <= q) & ((k < text_len) | ((q - k) % width == 0))
    if isinstance(pattern, Conv) and pattern.variant == "raster" and pattern.dilation == 1:
        half = (pattern.kernel_size - 1) // 2
        reach = (half + 1) * width
        return lambda batch, head, q, k: (
            (k <= q) & ((k < text_len) | ((q - k < reach) & ((q - k + half) % width <= 2 * half)))
        )
    raise ValueError(f"pattern must be Full or a variant of the paper's, got {pattern}")


def column_major_mask_mod(pattern: Column) -> MaskMod:
    """:func:`mask_mod` where image position column * height + row stands for (row, column)."""
    text_len, height = pattern.text_len, pattern.height
    return lambda batch, head, q, k: (
        (k <= q) & ((k < text_len) | ((q - text_len) // height == (k - text_len) // height))
    )


def block_mask(mask: MaskMod, length: int, device: str) -> BlockMask:
    """What ``create_block_mask`` makes, a row of blocks at a time."""
    blocks = -(-length // BLOCK)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    key = torch.arange(blocks * BLOCK, device=device)
    partial, full = (torch.zeros(blocks, blocks, dtype=torch.bool, device=device) for _ in range(2))
    for block in range(blocks):
        query = torch.arange(block * BLOCK, (block + 1) * BLOCK, device=device)[:, None]
        seen = mask(zero, zero, query, key) & (query < length) & (key < length)
        seen = seen.view(BLOCK, blocks, BLOCK)
        full[block] = seen.all(2).all(0)
        partial[block] = seen.any(2).any(0) & ~full[block]
    return BlockMask.from_kv_blocks(
        *_block_lists(partial), *_block_lists(full), BLOCK, mask_mod=mask, seq_lengths=(length, length)
    )


def _block_lists(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which, in FlexAttention's shapes (1, 1, ...)."""
    order = wanted.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return wanted.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None].contiguous()
