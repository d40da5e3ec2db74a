"""From scores to a token, in plain PyTorch: guidance, temperature, filters, and a draw that a seed decides.

    z = (unconditional + cond_scale (conditional - unconditional)) / temperature
    z = -inf for all but the top_k highest, then for all but the likeliest codes of total probability top_p
    token = argmax_c z_c + g(seed, position, c)

with g the standard Gumbel noise of :func:`dalle_fast.reference.gumbel_noise`, its row the token's raster index: the
token is then a draw from softmax(z) (the Gumbel-max trick), and a function of the scores, the seed and the position
alone, whatever else is drawn beside it. At a temperature of 0 there is no noise: it is the arg-max.

Source: Gumbel, "Statistical theory of extreme values", 1954; classifier-free guidance: arXiv 2207.12598, equation 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_fast.reference.gumbel import noise_of_rows


def filter_logits(logits: Tensor, *, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Scores with all but the likeliest codes at -inf.

    Args:
        logits: (B, K).
        top_k: keep the k highest, at most K; ties with the k-th stay.
        top_p: then keep the smallest set of likeliest codes whose probabilities sum to at least top_p of what was
            left; ties with the last stay.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        floor = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered = logits.sort(dim=-1, descending=True).values
        probabilities = ordered.softmax(dim=-1)
        suffices = probabilities.cumsum(dim=-1) - probabilities >= top_p  # the mass before a code already does
        floor = ordered.masked_fill(suffices, torch.inf).amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < floor, -torch.inf)
    return logits


def draw_token(
    logits: Tensor,
    seeds: Tensor,
    position: int | Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    cond_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One code for each sample, and how likely the model held it.

    Args:
        logits: (B, K), or with ``cond_scale`` (2 B, K): those of all samples given the caption, then those without.
        seeds: (B,) int64, >= 0.
        position: raster index of the token, a number or an integer tensor of no dimensions.
        temperature: >= 0; below the smallest normal float32 it takes the arg-max, of equals the first.
        top_k, top_p: see :func:`filter_logits`; None keeps all.
        cond_scale: weight of the caption, see above; None is no guidance.

    Returns:
        tokens (B,) int64, and their log-likelihoods (B,) under softmax of the conditional scores, unfiltered and at
        temperature 1, in nats, float32 or wider. Where a score is NaN so is the log-likelihood, and the token is
        any.
    """
    conditional = logits.to(torch.promote_types(logits.dtype, torch.float32))
    guided = conditional
    if cond_scale is not None:
        conditional, unconditional = conditional.chunk(2)
        guided = unconditional + cond_scale * (conditional - unconditional)
    if temperature < torch.finfo(torch.float32).tiny:
        tokens = guided.argmax(dim=-1)
    else:
        # At most 0, so that none overflows.
        z = filter_logits((guided - guided.amax(dim=-1, keepdim=True)) / temperature, top_k=top_k, top_p=top_p)
        row = torch.as_tensor(position, device=z.device).expand(len(z))
        tokens = (z + noise_of_rows(seeds[:, None], row, z.shape[1], dtype=z.dtype)).argmax(dim=-1)
    return tokens, conditional.log_softmax(dim=-1).gather(-1, tokens[:, None]).squeeze(-1)
