"""Keys and values of positions already decoded, and attention of the next position to them, in plain PyTorch.

Text keys are the same for all samples of a prompt and are stored once a prompt; image keys are stored once a
sample, in raster order, at the place their position has in the grid. A step reads the text keys of each
prompt once, and of the image keys only those that the pattern shows the new position.

    nbytes = 2 * H * D * itemsize * (num_prompts * text_len + batch * image_len)
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_fast.patterns import Pattern
from dalle_fast.reference.attention import masked_softmax


class KVCache:
    """Preallocated keys and values of one attention layer.

    Args:
        pattern: the layer's pattern; it fixes how many positions fit.
        batch: samples decoded together.
        num_heads, head_dim: of keys and values.
        num_prompts: number of different texts; batch is a multiple of it and sample i belongs to prompt
            i // (batch // num_prompts). None is one a sample.
        dtype, device: of the stored keys and values.

    Attributes:
        position: sequence position of the next token, which is also the number of positions held.
    """

    def __init__(
        self,
        pattern: Pattern,
        batch: int,
        num_heads: int,
        head_dim: int,
        *,
        num_prompts: int | None = None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.pattern = pattern
        self.batch, self.num_prompts = batch, batch if num_prompts is None else num_prompts
        self.num_heads, self.head_dim = num_heads, head_dim
        self.position = 0
        self.text_lens: Tensor | None = None
        text_shape = (self.num_prompts, num_heads, pattern.text_len, head_dim)
        image_shape = (batch, num_heads, pattern.image_len, head_dim)
        # Outside inference mode, or a cache made in it could not be written to outside it.
        with torch.inference_mode(False):
            self.text_key = torch.zeros(text_shape, dtype=dtype, device=device)
            self.text_value = torch.zeros_like(self.text_key)
            self.image_key = torch.zeros(image_shape, dtype=dtype, device=device)
            self.image_value = torch.zeros_like(self.image_key)

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored keys and values."""
        return self.image_key.dtype

    @property
    def device(self) -> torch.device:
        """Of the stored keys and values."""
        return self.image_key.device

    @property
    def nbytes(self) -> int:
        """Bytes of storage held."""
        return sum(t.nbytes for t in (self.text_key, self.text_value, self.image_key, self.image_value))

    def reset(self) -> None:
        """Forget every position; the storage stays."""
        self.position = 0
        self.text_lens = None

    @torch.no_grad()
    def prefill(self, key: Tensor, value: Tensor, text_lens: Tensor | None = None) -> None:
        """Store the first S0 positions of an empty cache.

        Args:
            key, value: (num_prompts, H, S0, D), S0 in text_len..seq_len. Positions past text_len are an image
                prefix that all samples of a prompt share.
            text_lens: (num_prompts,) integers in 0..text_len, or None. Text keys at or past it are hidden.
        """
        text_len, samples = self.pattern.text_len, self.batch // self.num_prompts
        self.position = key.shape[2]
        self.text_lens = None if text_lens is None else text_lens.clone()
        for text, image, new in (
            (self.text_key, self.image_key, key),
            (self.text_value, self.image_value, value),
        ):
            text.copy_(new[:, :, :text_len])
            prefix = new[:, :, text_len:].repeat_interleave(samples, dim=0)
            image[:, :, : self.position - text_len].copy_(prefix)

    @torch.no_grad()
    def _append(self, key: Tensor, value: Tensor) -> None:
        """Store the image position ``position`` of every sample: key and value (B, H, 1, D)."""
        index = self.position - self.pattern.text_len
        self.image_key[:, :, index] = key[:, :, 0]
        self.image_value[:, :, index] = value[:, :, 0]
        self.position += 1


@torch.no_grad()
def attention_with_kvcache(
    query: Tensor, key: Tensor, value: Tensor, cache: KVCache, *, scale: float | None = None
) -> Tensor:
    """Append one position to the cache and attend from it: one step of decoding, without gradients.

    Args:
        query, key, value: (B, H, 1, D) of the position ``cache.position``.
        cache: holds the earlier positions; it is advanced by one.
        scale: factor of the scores; None is 1 / sqrt(D).

    Returns:
        (B, H, 1, D) in query's dtype: the row that :func:`dalle_fast.reference.attention` gives this
        position.
    """
    cache._append(key, value)
    batch, num_heads, _, head_dim = query.shape
    num_prompts, samples = cache.num_prompts, batch // cache.num_prompts
    text_len, newest = cache.pattern.text_len, cache.position - 1
    wide = torch.promote_types(query.dtype, torch.float32)
    q = query.to(wide) * (head_dim**-0.5 if scale is None else scale)

    # Samples of one prompt are the rows of one product with its text. [P, H, samples, D]
    q_text = q.reshape(num_prompts, samples, num_heads, head_dim).transpose(1, 2)
    text_scores = (q_text @ cache.text_key.to(wide).mT).transpose(1, 2).reshape(batch, num_heads, 1, text_len)

    image_position = torch.arange(text_len, cache.position)
    seen = cache.pattern.visible(torch.tensor(newest), image_position).nonzero().squeeze(1).to(cache.device)
    image_scores = q @ cache.image_key[:, :, seen].to(wide).mT

    visible = torch.ones(batch, 1, 1, text_len + len(seen), dtype=torch.bool, device=cache.device)
    if cache.text_lens is not None:
        hidden = torch.arange(text_len, device=cache.device) >= cache.text_lens[:, None]
        visible[..., :text_len] = ~hidden.repeat_interleave(samples, dim=0)[:, None, None]
    weights, _ = masked_softmax(torch.cat([text_scores, image_scores], dim=-1), visible)

    text_weights, image_weights = weights.split([text_len, len(seen)], dim=-1)
    w_text = text_weights.reshape(num_prompts, samples, num_heads, text_len).transpose(1, 2)
    from_text = (w_text @ cache.text_value.to(wide)).transpose(1, 2).reshape(batch, num_heads, 1, head_dim)
    return (from_text + image_weights @ cache.image_value[:, :, seen].to(wide)).to(query.dtype)
