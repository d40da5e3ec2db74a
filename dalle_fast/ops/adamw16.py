"""One AdamW update of many parameters, with 16-bit moments and scaled gradients: the op under ``dalle_fast.AdamW16``.

What it computes is defined by ``dalle_fast.reference.adamw16_step``, with g = grad / scale * clip,
clip = min(1, grad_clip / (sqrt(sum_of_squares) + 1e-6)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dalle_fast import reference
from dalle_fast.ops import backends
from dalle_fast.ops.checks import check_backend
from dalle_fast.ops.tensor_table import CHUNK, make_table, to_device


class UpdateRule(NamedTuple):
    """Numbers that the parameters of one group share; the order is that of the kernel's table."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    variance_clip: float


@dataclass
class UpdatedTensors:
    """One parameter and what belongs to it; all tensors are laid out alike, without gaps.

    Attributes:
        param: float32, float16 or bfloat16.
        grad: param's dtype.
        exp_avg, exp_avg_sq: words of 1-6-9 and 0-6-10 (int16) of a 16-bit param, float32 of a float32 one.
        master: float32 copy that is updated in place of a 16-bit param, which then is rounded from it; or None.
        group: index into the rules.
        block: index into the scales.
        index: which of the optimiser's parameters it is: into steps, and of its rounding noise.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None
    group: int
    block: int
    index: int


def adamw16_(
    tensors: Sequence[UpdatedTensors],
    rules: Sequence[UpdateRule],
    steps: Tensor,
    scales: Tensor,
    *,
    skip: Tensor | None = None,
    sum_of_squares: Tensor | None = None,
    grad_clip: float | None = None,
    seed: int | None = None,
    backend: str = "auto",
) -> None:
    """Update all parameters, their moments and masters in place; C++ in one pass, on a GPU in one launch.

    Args:
        tensors: on one device.
        rules: one a group.
        steps: int64, number of this update of each parameter, 1 for the first; read, not counted up.
        scales: (n,) float32: gradients are divided by their block's.
        skip: bool of no dimensions, read on its device: nothing changes where it is set.
        sum_of_squares: float64 of no dimensions, of all unscaled gradients; needed with grad_clip.
        grad_clip: largest norm; larger gradients are scaled down to it.
        seed: in [0, 2^64), of the stochastic rounding of 16-bit parameters that have no master; None rounds to nearest.
        backend: "auto", "cpp" or "reference".

    Raises:
        RuntimeError: a backend that is not there.

    Source: arXiv 2102.12092, appendix B.2.
    """
    check_backend("adamw16_", backend, ("cpp",))
    if not tensors:
        return
    device = tensors[0].param.device
    if backend == "cpp":
        backends.require_cpp_backend(device)
    with torch.no_grad():
        if backend == "reference" or not backends.has_cpp_backend(device):
            _reference_adamw16_(tensors, rules, steps, scales, skip, sum_of_squares, grad_clip, seed)
            return
        names = ("param", "grad", "exp_avg", "exp_avg_sq", "master", "group", "block", "index")
        table = make_table([[getattr(row, name) for row in tensors] for name in names])
        torch.ops.dalle_fast.multi_tensor_adamw16(
            table.rows,
            table.num_chunks,
            CHUNK,
            to_device(torch.tensor(rules, dtype=torch.float64), device),
            steps,
            scales,
            skip,
            sum_of_squares,
            float("inf") if grad_clip is None else grad_clip,
            0 if seed is None else _signed(seed),
            seed is not None,
        )


def _signed(seed: int) -> int:
    """The same 64 bits as an int64."""
    return seed - 2**64 if seed >= 2**63 else seed


def _reference_adamw16_(
    tensors: Sequence[UpdatedTensors],
    rules: Sequence[UpdateRule],
    steps: Tensor,
    scales: Tensor,
    skip: Tensor | None,
    sum_of_squares: Tensor | None,
    grad_clip: float | None,
    seed: int | None,
) -> None:
    if skip is not None and skip.item():
        return
    clip = 1.0
    if grad_clip is not None:
        clip = min(1.0, grad_clip / (sum_of_squares.sqrt().item() + 1e-6))
    for row in tensors:
        rule, step = rules[row.group], int(steps[row.index])
        param = row.param if row.master is None else row.master
        noise = None
        if seed is not None and row.master is None and param.dtype != torch.float32:
            flat = reference.rounding_noise(param.numel(), seed=seed, index=row.index, step=step, device=param.device)
            noise = torch.empty_like(param, dtype=torch.int64)
            noise.as_strided((param.numel(),), (1,)).copy_(flat)  # in the order of memory
        new = reference.adamw16_step(
            param,
            row.grad,
            row.exp_avg,
            row.exp_avg_sq,
            step,
            lr=rule.lr,
            betas=(rule.beta1, rule.beta2),
            eps=rule.eps,
            weight_decay=rule.weight_decay,
            variance_clip=rule.variance_clip,
            grad_factor=(clip / scales[row.block].double()).item(),
            noise=noise,
        )
        for old, value in zip((param, row.exp_avg, row.exp_avg_sq), new, strict=True):
            old.copy_(value)
        if row.master is not None:
            row.param.copy_(row.master)
