"""Cross-entropy of a linear classifier in plain PyTorch.

    loss_i = logsumexp_v(h_i . w_v + b_v) - (h_i . w_t + b_t),   t = target_i

Logits are float32 or wider (arXiv 2102.12092, appendix D) and materialised: (N, V).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of softmax(hidden @ weight^T + bias) at ``target``.

    Args:
        hidden: (..., D).
        weight: (V, D).
        target: (...) int64 in [0, V), or ignore_index: such positions have loss 0 and are not counted.
        bias: (V,), or None.
        reduction: "mean" over the positions counted, 0 if there is none; "sum"; "none".

    Returns:
        A scalar, or with "none" target's shape; float32 or wider.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    flat = target.reshape(-1)
    logits = logits.reshape(-1, weight.shape[0])
    losses = F.cross_entropy(logits, flat, ignore_index=ignore_index, reduction="none")
    if reduction == "none":
        return losses.reshape(target.shape)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (flat != ignore_index).sum().clamp(min=1)
