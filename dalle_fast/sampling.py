"""Drawing image tokens, one after the other, from a prefilled cache.

    scores of token p -> / temperature -> top k -> top p -> softmax -> draw

All samples of one prompt share its text keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dalle_fast.models.transformer import Dalle

__all__ = ["check_sampling", "draw_token", "filter_logits", "sample_tokens"]


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for settings that mean nothing: temperature < 0 or infinite, top_k < 1, top_p outside (0, 1]."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be >= 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def filter_logits(logits: Tensor, *, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Scores with all but the likeliest codes at -inf.

    Args:
        logits: (B, K).
        top_k: keep the k highest (at most K); ties with the k-th stay.
        top_p: keep the smallest set of likeliest codes whose probabilities sum to at least top_p.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        floor = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        beyond = probabilities.cumsum(dim=-1) - probabilities >= top_p  # mass before a code already suffices
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits


def draw_token(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One code a row, (B,) int64, from scores (B, K); a temperature of 0, or below 1e-38, takes the arg-max."""
    if temperature < torch.finfo(torch.float32).tiny:
        return logits.argmax(dim=-1)
    scores = logits.float()
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature  # at most 0, so that none overflows
    kept = filter_logits(scores, top_k=top_k, top_p=top_p)
    return torch.multinomial(kept.softmax(dim=-1), 1, generator=generator).squeeze(-1)


@torch.no_grad()
def sample_tokens(
    model: Dalle,
    text: Tensor,
    num_images: int = 1,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    on_token: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw images, as tokens, for each caption.

    Args:
        text: (P, caption_len) int64, padded with PAD_ID, on the model's device.
        num_images: samples a caption.
        temperature: divides the scores, >= 0; 0 takes the likeliest token each time.
        top_k, top_p: see :func:`filter_logits`.
        generator: of the draws, on the model's device; None takes PyTorch's default.
        on_token: called with the number of tokens drawn so far, after each step.

    Returns:
        tokens (P * num_images, image_len) int64, the samples of a caption side by side, and their log-likelihoods
        under the model, unfiltered and at temperature 1, in nats, (P * num_images,) fp32.

    Raises:
        ValueError: a setting out of range, see :func:`check_sampling`, or num_images < 1.
    """
    check_sampling(temperature, top_k, top_p)
    if num_images < 1:
        raise ValueError(f"num_images must be >= 1, got {num_images}")
    batch = text.shape[0] * num_images
    caches = model.make_caches(batch, num_prompts=text.shape[0])
    model.prefill(text, caches)
    tokens = torch.empty(batch, model.config.image_len, dtype=torch.int64, device=text.device)
    scores = torch.zeros(batch, device=text.device)
    for position in range(model.config.image_len):
        logits = model.step(tokens[:, position - 1] if position else None, position, caches)
        drawn = draw_token(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        tokens[:, position] = drawn
        scores += logits.log_softmax(dim=-1).gather(-1, drawn[:, None]).squeeze(-1)
        if on_token is not None:
            on_token(position + 1)
    return tokens, scores
