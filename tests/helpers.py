"""What several tests share: the patterns to run over, and the error budget of an op against float64."""

import torch
from torch import Tensor

from dalle_fast.patterns import Column, Conv, Full, Pattern, Row


def every_pattern(text_len: int, grid: int | tuple[int, int]) -> list[Pattern]:
    """One pattern of each kind and variant."""
    return [
        Full(text_len, grid),
        Row(text_len, grid),
        Row(text_len, grid, variant="same_row"),
        Column(text_len, grid),
        Conv(text_len, grid, kernel_size=3),
        Conv(text_len, grid, kernel_size=3, variant="clip"),
        Conv(text_len, grid, kernel_size=3, variant="torus"),
        Conv(text_len, grid, kernel_size=2, variant="corner"),
        Conv(text_len, grid, kernel_size=3, variant="clip", dilation=2),
    ]


def pattern_id(pattern: Pattern) -> str:
    """The pattern's name and variant, for test ids."""
    return "-".join(str(value) for key, value in pattern.to_dict().items() if key not in ("text_len", "grid"))


def assert_within_budget(actual: Tensor, same_dtype: Tensor, truth: Tensor) -> None:
    """err(actual) <= 2 (err(same_dtype) + eps max|truth|), and NaN and infinities in the same places.

    Args:
        actual: the op's result.
        same_dtype: what plain PyTorch gives in the inputs' dtype.
        truth: float64.
    """
    assert actual.shape == truth.shape
    finite = torch.isfinite(truth)
    assert torch.equal(torch.isfinite(actual), finite)
    assert torch.equal(actual[~finite].double(), truth[~finite])
    if not finite.any():
        return
    eps = torch.finfo(actual.dtype).eps
    error = (actual.double() - truth)[finite].abs().max()
    peer_error = (same_dtype.double() - truth)[finite].abs().max()
    assert error <= 2 * (peer_error + eps * truth[finite].abs().max())
