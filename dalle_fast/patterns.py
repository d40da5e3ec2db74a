"""Who sees whom: the sparse attention patterns of DALL-E and of its public reimplementations.

A sequence is ``text_len`` text positions followed by ``height * width`` image positions in raster order. Every
pattern is causal, text is dense (every text key is visible to every later query), and what differs is which image
keys an image query sees. That depends only on how many rows and columns the key lies before the query, so each
pattern is one small function ``_reach(dr, dc)`` of the row offset ``dr = row_q - row_k`` and the column offset
``dc = col_q - col_k``; everything else here (dense mask, mask_mod, counts) is derived from it.

Source: Zero-Shot Text-to-Image Generation (arXiv 2102.12092), Figure 11 and appendix B.1, for Row, Column and the
raster Conv; DALLE-pytorch 1.6.6 and ru-dalle for the other variants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

__all__ = ["Column", "Conv", "Full", "Pattern", "Row", "from_dict", "schedule"]


@dataclass(frozen=True)
class Pattern:
    """What all patterns share: the sequence layout and everything derived from ``_reach``.

    Args:
        text_len: number of text positions, >= 0.
        grid: side of a square image grid, or (height, width); sides >= 1. Stored as a pair.
    """

    text_len: int
    grid: int | tuple[int, int]

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        grid = (self.grid, self.grid) if isinstance(self.grid, int) else tuple(self.grid)
        if len(grid) != 2 or not all(isinstance(side, int) and side >= 1 for side in grid):
            raise ValueError(f"grid must be a side >= 1 or a pair (height, width) of sides >= 1, got {self.grid}")
        if not isinstance(self.text_len, int) or self.text_len < 0:
            raise ValueError(f"text_len must be an integer >= 0, got {self.text_len}")
        object.__setattr__(self, "grid", grid)

    @property
    def height(self) -> int:
        """Rows of the image grid."""
        return self.grid[0]

    @property
    def width(self) -> int:
        """Columns of the image grid."""
        return self.grid[1]

    @property
    def image_len(self) -> int:
        """Number of image positions."""
        return self.height * self.width

    @property
    def seq_len(self) -> int:
        """Number of positions, text and image."""
        return self.text_len + self.image_len

    def _reach(self, dr: Tensor, dc: Tensor) -> Tensor:
        """True where an image query sees the image key ``dr`` rows and ``dc`` columns before it, causality aside."""
        raise NotImplementedError

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether the query at sequence position ``query`` may attend to the key at position ``key`` (broadcast)."""
        query_image, key_image = query - self.text_len, key - self.text_len
        dr = query_image // self.width - key_image // self.width
        dc = query_image % self.width - key_image % self.width
        return (key <= query) & ((key < self.text_len) | self._reach(dr, dc))

    def dense(self, device: torch.device | str | None = None) -> Tensor:
        """The (seq_len, seq_len) boolean mask, queries by keys; True = may attend."""
        position = torch.arange(self.seq_len, device=device)
        return self.visible(position[:, None], position[None, :])

    @property
    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The mask as a function (batch, head, q_idx, kv_idx), for torch's ``create_block_mask``."""

        def mask_mod(batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return self.visible(q_idx, kv_idx)

        return mask_mod

    def nnz(self) -> int:
        """Number of (query, key) pairs that may attend, one head."""
        text = self.text_len * (self.text_len + 1) // 2 + self.text_len * self.image_len
        return text + _image_pairs(self)

    def flops(self, batch: int, heads: int, head_dim: int) -> int:
        """Useful floating-point operations of one forward pass: two products of 2 * head_dim a visible pair."""
        return 4 * head_dim * self.nnz() * batch * heads

    @property
    def reach(self) -> int:
        """How many positions before an image query the farthest image key lies that any of them sees."""
        return _farthest(self)

    @property
    def code(self) -> tuple[int, int, int, int, int, int]:
        """What compiled code gets: (rule, text_len, height, width, kernel_size, dilation), the last two 0 without use.

        The rule says which ``_reach`` applies: 0 Full; Row 1 raster, 2 same_row; 3 Column; Conv 4 raster, 5 clip,
        6 torus, 7 corner.
        """
        rule = _RULES[self.name, getattr(self, "variant", None)]
        return (rule, self.text_len, *self.grid, getattr(self, "kernel_size", 0), getattr(self, "dilation", 0))

    def to_dict(self) -> dict[str, Any]:
        """Plain values from which :func:`from_dict` makes an equal pattern."""
        return {"name": self.name, "text_len": self.text_len, "grid": list(self.grid)}


@lru_cache(maxsize=256)
def _image_pairs(pattern: Pattern) -> int:
    """Visible image-image pairs: each (dr, dc) within reach occurs (height - dr) * (width - |dc|) times."""
    dr, dc, seen = _offsets(pattern)
    return int((seen * (pattern.height - dr) * (pattern.width - dc.abs())).sum())


@lru_cache(maxsize=256)
def _farthest(pattern: Pattern) -> int:
    dr, dc, seen = _offsets(pattern)
    return int(((dr * pattern.width + dc) * seen).max())


def _offsets(pattern: Pattern) -> tuple[Tensor, Tensor, Tensor]:
    """Every (dr, dc) from an image query back to an image key, and which of them the pattern shows it."""
    dr = torch.arange(pattern.height)[:, None]
    dc = torch.arange(1 - pattern.width, pattern.width)[None, :]
    return dr, dc, pattern._reach(dr, dc) & ((dr > 0) | (dc >= 0))


@dataclass(frozen=True)
class Full(Pattern):
    """Dense causal attention."""

    name: ClassVar[str] = "full"

    def _reach(self, dr: Tensor, dc: Tensor) -> Tensor:
        return dr * self.width + dc >= 0


@dataclass(frozen=True)
class Row(Pattern):
    """Row attention.

    Args:
        variant: "raster", the last ``width + 1`` image positions in raster order, self included, crossing row
            boundaries (the paper's Figure 11(a), ru-dalle); "same_row", earlier positions of the query's own row
            (DALLE-pytorch's axial_row).
    """

    variant: Literal["raster", "same_row"] = "raster"

    name: ClassVar[str] = "row"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_variant(self.variant, ("raster", "same_row"))

    def _reach(self, dr: Tensor, dc: Tensor) -> Tensor:
        if self.variant == "same_row":
            return dr == 0
        return dr * self.width + dc <= self.width

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"variant": self.variant}


@dataclass(frozen=True)
class Column(Pattern):
    """Column attention: earlier positions of the query's own column (the paper's Figure 11(b) and (c))."""

    name: ClassVar[str] = "column"

    def _reach(self, dr: Tensor, dc: Tensor) -> Tensor:
        return dc == 0


@dataclass(frozen=True)
class Conv(Pattern):
    """Convolutional attention over a ``kernel_size`` x ``kernel_size`` neighbourhood; h = (kernel_size - 1) / 2.

    Args:
        kernel_size: side of the neighbourhood; odd, except for "corner", where any size >= 1 goes. It may exceed the
            grid.
        variant: "raster", offsets d = q - k with d < (h + 1) * width and (d + h) mod width <= 2h, wrapping in raster
            order (the paper's Figure 11(d)); "clip", at most h rows and h columns away, no wrapping (ru-dalle v3);
            "torus", the same with rows and columns taken modulo the grid (ru-dalle v2); "corner", the kernel_size
            rows and columns that end at the query, nothing to the right (DALLE-pytorch's conv_like).
        dilation: spacing of the neighbourhood's taps, >= 1. For "raster", d must be a multiple of it and d / dilation
            follows the rule above.
    """

    kernel_size: int = 11
    variant: Literal["raster", "clip", "torus", "corner"] = "raster"
    dilation: int = 1

    name: ClassVar[str] = "conv"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_variant(self.variant, ("raster", "clip", "torus", "corner"))
        if self.kernel_size < 1 or (self.variant != "corner" and self.kernel_size % 2 == 0):
            rule = "a positive integer" if self.variant == "corner" else "a positive odd integer"
            raise ValueError(f"kernel_size must be {rule}, got {self.kernel_size}")
        if self.dilation < 1:
            raise ValueError(f"dilation must be >= 1, got {self.dilation}")

    def _reach(self, dr: Tensor, dc: Tensor) -> Tensor:
        half, step = (self.kernel_size - 1) // 2, self.dilation
        if self.variant == "raster":
            offset = dr * self.width + dc
            taps = offset // step
            near = (taps < (half + 1) * self.width) & ((taps + half) % self.width <= 2 * half)
            return near & (offset % step == 0)
        if self.variant == "clip":
            return _is_tap(dr, -half, half, step) & _is_tap(dc, -half, half, step)
        if self.variant == "corner":
            return _is_tap(dr, 0, self.kernel_size - 1, step) & _is_tap(dc, 0, self.kernel_size - 1, step)
        return _is_wrapped_tap(dr, half, step, self.height) & _is_wrapped_tap(dc, half, step, self.width)

    def to_dict(self) -> dict[str, Any]:
        own = {"kernel_size": self.kernel_size, "variant": self.variant, "dilation": self.dilation}
        return super().to_dict() | own


def _is_tap(offset: Tensor, first: int, last: int, step: int) -> Tensor:
    """Whether ``offset`` is one of first * step, ..., last * step."""
    return (offset % step == 0) & (offset >= first * step) & (offset <= last * step)


def _is_wrapped_tap(offset: Tensor, half: int, step: int, side: int) -> Tensor:
    """Whether ``offset`` is, modulo ``side``, one of -half * step, ..., half * step."""
    residues = sorted({tap * step % side for tap in range(-half, half + 1)})
    wrapped = offset % side
    found = wrapped == residues[0]
    for residue in residues[1:]:
        found = found | (wrapped == residue)
    return found


def _check_variant(variant: str, known: tuple[str, ...]) -> None:
    if variant not in known:
        raise ValueError(f"variant must be one of {', '.join(known)}, got {variant!r}")


_RULES = {
    ("full", None): 0,
    ("row", "raster"): 1,
    ("row", "same_row"): 2,
    ("column", None): 3,
    ("conv", "raster"): 4,
    ("conv", "clip"): 5,
    ("conv", "torus"): 6,
    ("conv", "corner"): 7,
}
_PATTERNS: dict[str, type[Pattern]] = {cls.name: cls for cls in (Full, Row, Column, Conv)}


def from_dict(description: dict[str, Any]) -> Pattern:
    """The pattern that ``to_dict`` described.

    Raises:
        ValueError: the name is not a pattern's, or a field is unknown or out of range.
    """
    fields = dict(description)
    name = fields.pop("name", None)
    if name not in _PATTERNS:
        raise ValueError(f"pattern name must be one of {', '.join(_PATTERNS)}, got {name!r}")
    grid = fields.get("grid")
    if isinstance(grid, list):
        fields["grid"] = tuple(grid)
    try:
        return _PATTERNS[name](**fields)
    except TypeError as error:
        raise ValueError(f"pattern {name!r} cannot be made from {fields}: {error}") from error


def schedule(name: str, depth: int, text_len: int, grid: int | tuple[int, int]) -> list[Pattern]:
    """The pattern of each attention layer, first to last.

    Args:
        name: "dalle", row attention with a column layer second of every four and a convolutional layer last
            (arXiv 2102.12092, appendix B.1); "dalle-pytorch", full, axial row, axial column and conv_like in turn
            (the sparse example of its documentation, kernel size 5); "ru-dalle", as "dalle" except that the last
            layer stays a column layer where its turn comes, and the convolution is clipped at the border.
        depth: number of attention layers, >= 1.
        text_len: text positions.
        grid: side of the image grid, or (height, width).

    Raises:
        ValueError: unknown name, or depth below 1.
    """
    if depth < 1:
        raise ValueError(f"depth must be >= 1, got {depth}")
    row, column = Row(text_len, grid), Column(text_len, grid)
    if name == "dalle":
        layers: list[Pattern] = [column if layer % 4 == 1 else row for layer in range(depth)]
        layers[-1] = Conv(text_len, grid)
        return layers
    if name == "dalle-pytorch":
        cycle = [
            Full(text_len, grid),
            Row(text_len, grid, variant="same_row"),
            column,
            Conv(text_len, grid, kernel_size=5, variant="corner"),
        ]
        return [cycle[layer % len(cycle)] for layer in range(depth)]
    if name == "ru-dalle":
        layers = [column if layer % 4 == 1 else row for layer in range(depth)]
        if (depth - 1) % 4 != 1:
            layers[-1] = Conv(text_len, grid, variant="clip")
        return layers
    raise ValueError(f"schedule must be one of dalle, dalle-pytorch, ru-dalle, got {name!r}")
