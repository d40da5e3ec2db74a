"""Attention layers of DALLE-pytorch 1.6.6 and ru-dalle 1.1.3, and this library's op between the same projections.

The packages offer attention as a layer: projection to q, k and v, attention, output projection. Each is compared with
:class:`AttentionLayer`, which holds the very same projections, on the same input and within the package's own patterns.
Both packages pin versions that current Python cannot install, so they are installed without their requirements:

    pip install .[rivals] && pip install --no-deps dalle-pytorch==1.6.6 rudalle==1.1.3
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor, nn

import dalle_fast
from dalle_fast import reference
from dalle_fast.patterns import Column, Conv, Full, Pattern, Row

DISTRIBUTIONS = {"dalle_pytorch": "dalle-pytorch", "rudalle": "rudalle"}
INSTALL = "pip install .[rivals] && pip install --no-deps dalle-pytorch==1.6.6 rudalle==1.1.3"

WEIGHT_SCALE = 3.0  # as they start, the weights make all scores alike, and a wrong mask would go unnoticed

Rotate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerCase:
    """One of a package's layers on one input, forward or forward and backward.

    Args:
        package: a key of ``DISTRIBUTIONS``.
        kind: a name from :func:`patterns_of`.
        mode: "forward" or "training".
        grid: side of the image grid.
    """

    package: str
    kind: str
    mode: str
    batch: int
    heads: int
    head_dim: int
    text_len: int
    grid: int
    dtype: torch.dtype
    device: str

    @property
    def width(self) -> int:
        """Of the model."""
        return self.heads * self.head_dim

    @property
    def pattern(self) -> Pattern:
        """What the layer computes."""
        return patterns_of(self.package, self.text_len, self.grid)[self.kind]

    @property
    def length(self) -> int:
        """Positions of the input. DALLE-pytorch leaves the last one of the image out."""
        return self.pattern.seq_len - (self.package == "dalle_pytorch")

    @property
    def rotary(self) -> bool:
        """Whether q, k and v are rotated. Without it, current PyTorch refuses DALLE-pytorch's layers under autograd."""
        return self.package == "dalle_pytorch" and self.mode == "training"

    @property
    def flops(self) -> float:
        """Useful operations of one call: attention, and four square projections; backward 2.5 and 2 times as many."""
        attention = self.pattern.flops(self.batch, self.heads, self.head_dim)
        projections = 8 * self.batch * self.length * self.width**2
        return attention + projections if self.mode == "forward" else 3.5 * attention + 3 * projections

    def small(self) -> LayerCase:
        """The same on an 8 x 8 grid."""
        return replace(self, text_len=4, grid=8, batch=1, heads=1)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """The layer's input and the gradient of its output, (B, S, width); the same at every call."""
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (2, self.batch, self.length, self.width)
        return torch.randn(shape, generator=generator, device=self.device).to(self.dtype).unbind()


def patterns_of(package: str, text_len: int, grid: int) -> dict[str, Pattern]:
    """The patterns that a package's layers compute for captions of ``text_len`` tokens."""
    if package == "rudalle":
        clipped = Conv(text_len, grid, variant="clip")
        return {"row": Row(text_len, grid), "column": Column(text_len, grid), "conv": clipped}
    text_len += 1  # its start token
    return {
        "full": Full(text_len, grid),
        "row": Row(text_len, grid, variant="same_row"),
        "column": Column(text_len, grid),
        "conv": Conv(text_len, grid, kernel_size=5, variant="corner"),
    }


class AttentionLayer(nn.Module):
    """Projection to q, k and v, attention, output projection.

    Args:
        to_qkv, to_out: the projections. What the first one returns holds q, k and v one after the other, head by head.
        rotate: applied to q, k and v, (B, H, S, D), where given.
        ops: ``dalle_fast``, or ``dalle_fast.reference``.
    """

    def __init__(
        self, to_qkv: nn.Module, to_out: nn.Module, heads: int, pattern: Pattern, rotate: Rotate | None, ops: ModuleType
    ) -> None:
        super().__init__()
        self.to_qkv, self.to_out = to_qkv, to_out
        self.heads, self.pattern, self.rotate, self.ops = heads, pattern, rotate, ops

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, width) to (B, S, width)."""
        qkv = self.to_qkv(x).unflatten(2, (3, self.heads, -1))
        if self.rotate is None:
            out = self.ops.attention_qkvpacked(qkv, self.pattern)
        else:
            query, key, value = (self.rotate(part.transpose(1, 2)) for part in qkv.unbind(2))
            out = self.ops.attention(query, key, value, self.pattern).transpose(1, 2)
        return self.to_out(out.flatten(2))


def make_layer(name: str, case: LayerCase) -> nn.Module:
    """A layer, (B, S, width) to (B, S, width); the weights are the same whatever its name.

    Args:
        name: ``case.package`` for the package's own, "attention" for this library's, "truth" for the reference in
            float64, "peer" for the reference in the case's dtype.
    """
    torch.manual_seed(0)
    make = _dalle_pytorch_layer if case.package == "dalle_pytorch" else _rudalle_layer
    layer, to_qkv, to_out, rotate = make(case)
    with torch.no_grad():
        to_qkv.weight.mul_(WEIGHT_SCALE)
    layer.to(case.device, case.dtype)  # before any copy, so that float64 weights are the case's as well
    if name == case.package:
        return layer
    ops = dalle_fast if name == "attention" else reference
    dtype = torch.float64 if name == "truth" else case.dtype
    return AttentionLayer(to_qkv.to(dtype), to_out.to(dtype), case.heads, case.pattern, rotate, ops)


def make_layer_call(name: str, case: LayerCase) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed: one call of a layer; :func:`read_result` names what it returns.

    For training that is the output and the gradients of the input and of every weight, of which the input's are kept.
    """
    layer = make_layer(name, case)
    x, upstream = (tensor.double() if name == "truth" else tensor for tensor in case.inputs())
    if case.mode == "forward":
        layer.requires_grad_(False)
        return lambda: (layer(x),)
    x.requires_grad_()
    wanted = (x, *layer.parameters())

    def forward_and_backward() -> tuple[Tensor, ...]:
        out = layer(x)
        return out.detach(), torch.autograd.grad(out, wanted, upstream)[0]

    return forward_and_backward


def read_result(result: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What :func:`make_layer_call`'s function returned, by name."""
    return dict(zip(("out", "dx"), result, strict=False))


@functools.lru_cache(maxsize=1)  # the benchmarks of one case follow each other
def truth_and_peers(case: LayerCase) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The answer in float64, and the reference's in the case's dtype."""
    truth, peer = (read_result(make_layer_call(name, case)()) for name in ("truth", "peer"))
    return truth, [peer]


class _Calls(nn.Module):
    """A layer that is called with more than its input."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor, Tensor], Tensor], constant: Tensor) -> None:
        super().__init__()
        self.layer, self.call = layer, call
        self.register_buffer("constant", constant)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x, self.constant)


def _dalle_pytorch_layer(case: LayerCase) -> tuple[nn.Module, nn.Module, nn.Module, Rotate | None]:
    attention = import_past_packages("dalle_pytorch", "attention")
    sizes = {"dim": case.width, "seq_len": case.length, "heads": case.heads, "dim_head": case.head_dim}
    if case.kind == "full":
        layer = attention.Attention(**sizes)
    elif case.kind == "conv":
        layer = attention.SparseConvCausalAttention(**sizes, image_size=case.grid, kernel_size=case.pattern.kernel_size)
    else:
        axis = 0 if case.kind == "row" else 1
        layer = attention.SparseAxialCausalAttention(**sizes, image_size=case.grid, axis=axis)
    if not case.rotary:
        return layer, layer.to_qkv, layer.to_out, None
    turned = 3 * (case.head_dim // 6 * 2)  # dimensions: one third each by text position, row and column
    angles = torch.randn(1, case.pattern.seq_len, turned)
    rotary = _Calls(layer, lambda layer, x, constant: layer(x, rotary_pos_emb=constant), angles)

    def rotate(x: Tensor) -> Tensor:
        return attention.apply_rotary_emb(rotary.constant[:, : x.shape[2]].to(x.dtype), x)

    return rotary, layer.to_qkv, layer.to_out, rotate


def _rudalle_layer(case: LayerCase) -> tuple[nn.Module, nn.Module, nn.Module, Rotate | None]:
    transformer = import_past_packages("rudalle", "dalle.transformer")
    layer = transformer.DalleSelfAttention(case.width, case.heads, 0.0, 0.0)
    mask = _rudalle_mask(case.kind, case.text_len, case.grid)
    masked = _Calls(layer, lambda layer, x, constant: layer(x, constant)[0], mask)
    return masked, layer.query_key_value, layer.dense, None


@functools.lru_cache(maxsize=1)  # the package takes seconds to draw one
def _rudalle_mask(kind: str, text_len: int, grid: int) -> Tensor:
    masks = import_past_packages("rudalle", "dalle.image_attention")
    make = {"row": masks.get_row_mask, "column": masks.get_col_mask, "conv": masks.get_conv_mask}[kind]
    return make(text_len, grid)[None, None]


def import_past_packages(package: str, module: str) -> ModuleType:
    """Import ``package.module`` without running the ``__init__`` of the packages on the way.

    Those of the two packages import all they have, and with it a dozen packages that attention does not need.

    Raises:
        ImportError: the package is not installed.
    """
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise ImportError(f"{package} is not installed: {INSTALL}")
        _stand_in(package, spec.submodule_search_locations)
    name = package
    for child in module.split(".")[:-1]:
        folders = [f"{folder}/{child}" for folder in sys.modules[name].__path__]
        name = f"{name}.{child}"
        if name not in sys.modules:
            _stand_in(name, folders)
    return importlib.import_module(f"{package}.{module}")


def _stand_in(package: str, folders: Iterable[str]) -> None:
    sys.modules[package] = ModuleType(package)
    sys.modules[package].__path__ = list(folders)


def version(package: str) -> str | None:
    """The installed version of a key of ``DISTRIBUTIONS``, or None."""
    try:
        return importlib.metadata.version(DISTRIBUTIONS[package])
    except importlib.metadata.PackageNotFoundError:
        return None
