"""How many of the dVAE's codes are in use: counts of the codes drawn in the last updates."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CodeUsage", "perplexity"]

WINDOW = 100  # updates that are looked back on


class CodeUsage:
    """Counts of drawn codes over the last ``window`` updates, without waiting for the device.

    Args:
        vocab_size: K, number of codes.
        device: where the drawn codes are.
        window: updates that are looked back on; fewer at the start of a run.

    Attributes:
        counts: (window, K) int32, one row an update; all of the state.
    """

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu", window: int = WINDOW) -> None:
        self.counts = torch.zeros(window, vocab_size, dtype=torch.int32, device=device)

    def update(self, step: int, indices: Tensor) -> None:
        """Take the codes drawn in update ``step``, int64 of any shape; they replace those of ``window`` updates ago."""
        row = self.counts[step % len(self.counts)].zero_()
        indices = indices.flatten()
        # Not bincount, which waits for a GPU to learn the largest index. Sums of integers do not depend on their order.
        row.scatter_add_(0, indices, torch.ones_like(indices, dtype=row.dtype))

    def scalars(self) -> dict[str, Tensor]:
        """``perplexity`` of the distribution of the counted codes, and ``codes_in_use``, how many there are."""
        totals = self.counts.sum(0)
        return {"perplexity": perplexity(totals), "codes_in_use": totals.count_nonzero()}


def perplexity(counts: Tensor) -> Tensor:
    """exp(-sum_k p_k ln p_k) with p = counts / sum(counts): between 1 and K, K where all codes are drawn alike.

    Args:
        counts: (K,), >= 0, not all 0.
    """
    shares = counts / counts.sum()
    return torch.special.entr(shares).sum().exp()
