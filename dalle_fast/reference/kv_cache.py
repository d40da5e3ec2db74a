"""Keys and values of positions already decoded, and attention of the next position to them, in plain PyTorch.

Text keys are the same for all samples of a prompt and are stored once a prompt, transposed. Of the image a sample
keeps what later positions can still see, in ``slots`` places:

    Column        slot = column * height + row     the whole image, so that a column is one stretch of memory
    all others    slot = n mod slots               a ring, slots = min(pattern.reach + 1, image_len)

n being the raster index. For row attention that is width + 1 slots, for an 11 x 11 convolution on a grid 32 wide 192.

    nbytes = 2 * H * D * itemsize * (num_prompts * text_len + batch * slots)
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_fast.patterns import Column, Pattern
from dalle_fast.reference.attention import masked_softmax


class KVCache:
    """Preallocated keys and values of one attention layer.

    Args:
        pattern: the layer's pattern; it fixes how many positions fit, and which of them are kept.
        batch: samples decoded together.
        num_heads, head_dim: of keys and values.
        num_prompts: number of different texts; batch is a multiple of it and sample i belongs to prompt
            i // (batch // num_prompts). None is one a sample.
        dtype, device: of the stored keys and values.

    Attributes:
        text_key: (num_prompts, H, D, text_len).
        text_value: (num_prompts, H, text_len, D).
        text_lens: (num_prompts,) int64; text keys at or past it are hidden.
        image_key, image_value: (batch, H, slots, D).
        held: int64 of no dimensions, on the device: positions held, and so the sequence position of the next token.
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
        image_shape = (batch, num_heads, self.slots_of(pattern), head_dim)
        # Outside inference mode, or a cache made in it could not be written to outside it.
        with torch.inference_mode(False):
            self.text_key = torch.zeros(
                (self.num_prompts, num_heads, head_dim, pattern.text_len), dtype=dtype, device=device
            )
            self.text_value = torch.zeros_like(self.text_key.mT, memory_format=torch.contiguous_format)
            self.image_key = torch.zeros(image_shape, dtype=dtype, device=device)
            self.image_value = torch.zeros_like(self.image_key)
            self.text_lens = torch.full((self.num_prompts,), pattern.text_len, device=device)
            self.held = torch.zeros((), dtype=torch.int64, device=device)

    @staticmethod
    def slots_of(pattern: Pattern) -> int:
        """Image positions that a sample keeps."""
        return pattern.image_len if isinstance(pattern, Column) else min(pattern.reach + 1, pattern.image_len)

    @staticmethod
    def nbytes_of(
        pattern: Pattern, batch: int, num_heads: int, head_dim: int, num_prompts: int, dtype: torch.dtype
    ) -> int:
        """What a cache of these sizes takes."""
        positions = num_prompts * pattern.text_len + batch * KVCache.slots_of(pattern)
        return 2 * num_heads * head_dim * dtype.itemsize * positions

    @property
    def slots(self) -> int:
        """Image positions that a sample keeps."""
        return self.image_key.shape[2]

    @property
    def position(self) -> int:
        """Sequence position of the next token, which is also the number of positions held; waits for the device."""
        return int(self.held)

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
        """Bytes of keys and values held."""
        return sum(t.nbytes for t in (self.text_key, self.text_value, self.image_key, self.image_value))

    def slot(self, n: Tensor) -> Tensor:
        """Where the image positions n (raster indices) are kept."""
        if isinstance(self.pattern, Column):
            return n % self.pattern.width * self.pattern.height + n // self.pattern.width
        return n % self.slots

    def reset(self) -> None:
        """Forget every position; the storage stays."""
        self.held.zero_()
        self.text_lens.fill_(self.pattern.text_len)

    @torch.no_grad()
    def prefill(self, key: Tensor, value: Tensor, text_lens: Tensor | None = None) -> None:
        """Store the first S0 positions of an empty cache.

        Args:
            key, value: (num_prompts, H, S0, D), S0 in text_len..seq_len. Positions past text_len are an image
                prefix that all samples of a prompt share.
            text_lens: (num_prompts,) integers in 0..text_len, or None. Text keys at or past it are hidden.
        """
        text_len, samples = self.pattern.text_len, self.batch // self.num_prompts
        self.held.fill_(key.shape[2])
        if text_lens is None:
            self.text_lens.fill_(text_len)
        else:
            self.text_lens.copy_(text_lens)
        num_image = key.shape[2] - text_len
        n = torch.arange(max(0, num_image - self.slots), num_image, device=self.device)
        self.text_key.copy_(key[:, :, :text_len].mT)
        self.text_value.copy_(value[:, :, :text_len])
        for image, new in ((self.image_key, key), (self.image_value, value)):
            prefix = new[:, :, text_len + n].repeat_interleave(samples, dim=0)
            image[:, :, self.slot(n)] = prefix.to(self.dtype)


@torch.no_grad()
def attention_with_kvcache(
    query: Tensor, key: Tensor, value: Tensor, cache: KVCache, *, scale: float | None = None
) -> Tensor:
    """Append one position to the cache and attend from it: one step of decoding, without gradients.

    Args:
        query, key, value: (B, H, 1, D) of the position ``cache.position``; keys and values are rounded to the
            cache's dtype.
        cache: holds the earlier positions; it is advanced by one.
        scale: factor of the scores; None is 1 / sqrt(D).

    Returns:
        (B, H, 1, D) in query's dtype: the row that :func:`dalle_fast.reference.attention` gives this
        position.
    """
    batch, num_heads, _, head_dim = query.shape
    num_prompts, samples = cache.num_prompts, batch // cache.num_prompts
    text_len, newest = cache.pattern.text_len, cache.position
    slot = cache.slot(torch.tensor(newest - text_len))
    cache.image_key[:, :, slot] = key[:, :, 0].to(cache.dtype)
    cache.image_value[:, :, slot] = value[:, :, 0].to(cache.dtype)
    cache.held += 1

    wide = torch.promote_types(query.dtype, torch.float32)
    q = query.to(wide) * (head_dim**-0.5 if scale is None else scale)

    # Samples of one prompt are the rows of one product with its text. [P, H, samples, D]
    q_text = q.reshape(num_prompts, samples, num_heads, head_dim).transpose(1, 2)
    text_scores = (q_text @ cache.text_key.to(wide)).transpose(1, 2).reshape(batch, num_heads, 1, text_len)

    image_position = torch.arange(text_len, newest + 1)
    seen = cache.pattern.visible(torch.tensor(newest), image_position).nonzero().squeeze(1)
    slots = cache.slot(seen).to(cache.device)
    image_scores = q @ cache.image_key[:, :, slots].to(wide).mT

    visible = torch.ones(batch, 1, 1, text_len + len(slots), dtype=torch.bool, device=cache.device)
    hidden = torch.arange(text_len, device=cache.device) >= cache.text_lens[:, None]
    visible[..., :text_len] = ~hidden.repeat_interleave(samples, dim=0)[:, None, None]
    weights, _ = masked_softmax(torch.cat([text_scores, image_scores], dim=-1), visible)

    text_weights, image_weights = weights.split([text_len, len(slots)], dim=-1)
    w_text = text_weights.reshape(num_prompts, samples, num_heads, text_len).transpose(1, 2)
    from_text = (w_text @ cache.text_value.to(wide)).transpose(1, 2).reshape(batch, num_heads, 1, head_dim)
    return (from_text + image_weights @ cache.image_value[:, :, slots].to(wide)).to(query.dtype)
