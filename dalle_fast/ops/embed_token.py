"""The states that a step of decoding reads, without waiting for the device and into a buffer that is there.

out[row] = (position = 0 ? start : embedding[tokens[row mod samples, position - 1]]) + place[position]
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dalle_fast.ops import backends

if backends.extension is not None:
    torch.library.register_fake("dalle_fast::embed_token_cpu", lambda *args: None)


def embed_token(tokens: Tensor, position: Tensor, embedding: Tensor, start: Tensor, place: Tensor, out: Tensor) -> None:
    """Write the states of image token ``position`` into ``out``; unchecked but by the C++ op.

    Args:
        tokens: (samples, L) int64, contiguous; of them column ``position - 1`` is read.
        position: int64 of no dimensions on the device, in 0..L - 1.
        embedding: (codes, width), contiguous.
        start: (width,), read instead of a token at position 0.
        place: (L, width), contiguous.
        out: (rows, width), contiguous; rows a multiple of samples, all of which are repeated.
    """
    if backends.extension is not None and out.device.type == "cpu" and out.dtype == torch.float32:
        bind_embed_token(tokens, position, embedding, start, place, out)()
        return
    embedding, start = embedding.detach(), start.detach()
    # What stands before position 0 does not matter, but must be a token.
    before = tokens.index_select(1, (position - 1).clamp(min=0).view(1)).flatten().masked_fill(position == 0, 0)
    states = torch.where(position == 0, start, embedding.index_select(0, before))
    states = states + place.index_select(0, position.view(1))
    out.view(-1, *states.shape).copy_(states.expand(out.shape[0] // len(states), -1, -1))


def bind_embed_token(
    tokens: Tensor, position: Tensor, embedding: Tensor, start: Tensor, place: Tensor, out: Tensor
) -> partial:
    """A call that does :func:`embed_token` in C++, of float32 tensors on a CPU."""
    op = torch.ops.dalle_fast.embed_token_cpu.default
    return partial(op, tokens, position, embedding.detach(), start.detach(), place, out)
