"""What the tests of AdamW16 share: its numbers, parameters, one update, and everything that an update may change."""

import pytest
import torch
from helpers import needs_extension
from torch import Tensor, nn

from dalle_fast import AdamW16

BACKENDS = ["reference", pytest.param("cpp", marks=needs_extension)]
RULE = {"lr": 1e-2, "betas": (0.9, 0.96), "eps": 1e-8, "weight_decay": 0.045, "variance_clip": 5.0}


def make_params(*dtypes: torch.dtype, shape: tuple[int, ...] = (5, 7)) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape).to(dtype)) for dtype in dtypes]


def update(optimizer: AdamW16, grads: list[Tensor | None], **options) -> None:
    """One update by these gradients of the optimiser's parameters, in order."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()
    optimizer.step(**options)


def snapshot(optimizer: AdamW16) -> list[Tensor]:
    """Copies of all parameters and all of their state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = [value for param in params for _, value in sorted(optimizer.state[param].items())]
    return [tensor.detach().clone() for tensor in (*params, *state)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
