"""Which optimiser a training run has, and what else its precision asks for.

fp32, bf16   torch's fused AdamW over fp32 weights; bf16 is autocast around the forward pass
fp16         the blocks' matrices in float16, AdamW16 over them, and a gradient scale for each residual block
"""

from __future__ import annotations

from typing import Any

import torch

from dalle_fast.checkpoint import check_match
from dalle_fast.grad_scaler import ResblockGradScaler
from dalle_fast.models.dvae import DVAE
from dalle_fast.models.transformer import Dalle
from dalle_fast.optim import AdamW16

__all__ = ["check_same_precision", "make_optimizer"]


def make_optimizer(
    model: Dalle | DVAE, groups: list[dict[str, Any]], config: Any
) -> tuple[torch.optim.Optimizer, ResblockGradScaler | None]:
    """The optimiser of a model that is on its device, whose weights and blocks are made ready for the precision.

    Args:
        groups: the model's parameters, as torch's optimisers take them.
        config: of either training command: precision, learning_rate, beta1, beta2, weight_decay, grad_clip, seed.

    Returns:
        The optimiser, and the scaler of the gradients it reads, or None.
    """
    rule = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "weight_decay": config.weight_decay,
    }
    if config.precision != "fp16":
        return torch.optim.AdamW(groups, **rule, fused=True), None
    model.cast_blocks(torch.float16)
    scaler = ResblockGradScaler(model.branches())
    model.set_grad_scales(scaler.block_scales)
    return AdamW16(groups, **rule, grad_clip=config.grad_clip, seed=config.seed), scaler


def check_same_precision(saved: str, precision: str, path: Any) -> None:
    """Raise ValueError where a run with fp16's optimiser is to go on from a checkpoint of another's, or the reverse."""
    if "fp16" in (saved, precision):
        check_match("precision", saved, precision, path)
