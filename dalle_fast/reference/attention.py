"""Pattern attention in plain PyTorch: softmax over the keys that a pattern lets each query see.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j,   j over the keys visible to i,
    lse_i = ln sum_j exp(scale * q_i . k_j).

Scores, softmax and both products are computed in float32 or wider. All S x S scores are materialised, so
memory grows with B * H * S^2. Source: arXiv 2102.12092, section 2.2 and Figure 11: one softmax over text and
image keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dalle_fast.patterns import Pattern


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    text_lens: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query to the keys that ``pattern`` shows it.

    Args:
        query: (B, H, S, D), S any prefix of the pattern's sequence.
        key, value: (B, H, S, D), or (B, H / n, S, D) with ``enable_gqa``: n query heads share one key head.
        text_lens: (B,), or None. Text keys at or past text_lens[b] are hidden from every query of sample b.
        scale: factor of the scores; None is 1 / sqrt(D).
        return_lse: also return the natural logarithm of the softmax denominator.

    Returns:
        out (B, H, S, D) in query's dtype, and with ``return_lse`` lse (B, H, S) in float32 or wider. A query
        without a visible key has out 0 and lse -inf, and passes no gradient.
    """
    batch, num_heads, length, head_dim = query.shape
    num_groups = key.shape[1] if enable_gqa else num_heads
    wide = torch.promote_types(query.dtype, torch.float32)
    q = query.to(wide).reshape(batch, num_groups, num_heads // num_groups, length, head_dim)
    k, v = key.to(wide).unsqueeze(2), value.to(wide).unsqueeze(2)

    scores = (q @ k.mT) * (head_dim**-0.5 if scale is None else scale)
    weights, lse = masked_softmax(scores, visible_keys(pattern, length, text_lens, query.device))
    out = (weights @ v).reshape(batch, num_heads, length, head_dim).to(query.dtype)
    return (out, lse.reshape(batch, num_heads, length)) if return_lse else out


def attention_qkvpacked(
    qkv: Tensor, pattern: Pattern, *, text_lens: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """:func:`attention` of queries, keys and values packed as (B, S, 3, H, D); returns (B, S, H, D)."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    return attention(query, key, value, pattern, text_lens=text_lens, scale=scale).transpose(1, 2)


def visible_keys(pattern: Pattern, length: int, text_lens: Tensor | None, device: torch.device) -> Tensor:
    """What the first ``length`` queries see of as many keys: boolean, broadcasts to (B, 1, 1, S, S)."""
    position = torch.arange(length, device=device)
    visible = pattern.visible(position[:, None], position[None, :])
    if text_lens is None:
        return visible
    hidden = (position >= text_lens[:, None]) & (position < pattern.text_len)
    return visible & ~hidden[:, None, None, None, :]


def masked_softmax(scores: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the visible entries of the last dimension, and its log-denominator; 0 and -inf if none."""
    scores = scores.masked_fill(~visible, -math.inf)
    peak = scores.detach().amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == -math.inf, 0.0)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    # An empty row divides by 1 instead of 0, and its logarithm is replaced: its gradients are 0 and not NaN.
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (peak + total.log()).masked_fill(empty, -math.inf)
    return weights / total, lse.squeeze(-1)
