"""Decoding with cached keys and values: the public cache and the op that makes one step.

What they compute is defined by ``dalle_fast.reference.kv_cache``; this module checks the arguments. A step
costs 4 * H * D floating-point operations a sample for each key that its position sees, text and image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle_fast import reference
from dalle_fast.ops.attention import check_head_dim, check_pattern, check_scale, check_text_lens
from dalle_fast.ops.checks import (
    cast_under_autocast,
    check_backend,
    check_floating,
    shape_of,
    without_autocast,
)
from dalle_fast.patterns import Pattern


class KVCache(reference.KVCache):
    """Preallocated keys and values of one attention layer while an image is decoded.

    Text is stored once a prompt, image positions once a sample: nbytes is
    2 * num_heads * head_dim * itemsize * (num_prompts * text_len + batch * image_len).

    Args:
        pattern: the layer's pattern; it fixes how many positions fit.
        batch: samples decoded together.
        num_heads, head_dim: of keys and values; head_dim in 1..256.
        num_prompts: number of different texts; batch is a multiple of it and sample i belongs to prompt
            i // (batch // num_prompts). None is one a sample.
        dtype, device: of the stored keys and values.

    Attributes:
        position: sequence position of the next token, which is also the number of positions held.
        nbytes: bytes of storage held.

    Raises:
        TypeError: pattern is not a pattern, or dtype is not floating point.
        ValueError: a size below 1, or batch is not a multiple of num_prompts.
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
        check_pattern(pattern)
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating point, got {dtype}")
        check_head_dim(head_dim)
        prompts = batch if num_prompts is None else num_prompts
        for name, size in (("batch", batch), ("num_heads", num_heads), ("num_prompts", prompts)):
            if size < 1:
                raise ValueError(f"{name} must be >= 1, got {size}")
        if batch % prompts != 0:
            raise ValueError(f"batch must be a multiple of num_prompts, got {batch} and {prompts}")
        super().__init__(pattern, batch, num_heads, head_dim, num_prompts=prompts, dtype=dtype, device=device)

    def prefill(self, key: Tensor, value: Tensor, text_lens: Tensor | None = None) -> None:
        """Store the first S0 positions of an empty cache.

        Args:
            key, value: (num_prompts, H, S0, D), S0 in text_len..seq_len. Positions past text_len are an image
                prefix that all samples of a prompt share. Under autocast they are cast to the cache's dtype.
            text_lens: (num_prompts,) integers in 0..text_len, or None. Text keys at or past it are hidden.

        Raises:
            RuntimeError: the cache is not empty.
            ValueError: a shape, length or device that does not fit.
            TypeError: another dtype.
        """
        if self.position != 0:
            raise RuntimeError(f"prefill needs an empty cache, got one with {self.position} positions: call reset()")
        key, value = cast_under_autocast(key, value, dtype=self.dtype)
        self._check(self.num_prompts, key=key, value=value)
        text_len, seq_len = self.pattern.text_len, self.pattern.seq_len
        if not text_len <= key.shape[2] <= seq_len:
            raise ValueError(f"key must have {text_len}..{seq_len} positions, got {key.shape[2]}")
        if text_lens is not None:
            check_text_lens(text_lens, self.num_prompts, self.pattern, self.device)
        super().prefill(key, value, text_lens)

    def _check(self, batch: int, **tensors: Tensor) -> None:
        check_floating(**tensors)
        expected = (batch, self.num_heads, self.head_dim)
        for name, tensor in tensors.items():
            if tensor.dtype != self.dtype:
                raise TypeError(f"{name} must be {self.dtype} as the cache, got {tensor.dtype}")
            if tensor.device != self.device:
                raise ValueError(f"{name} must be on {self.device} as the cache, got {tensor.device}")
            if tensor.dim() != 4 or (*tensor.shape[:2], tensor.shape[3]) != expected:
                rule = f"({batch}, {self.num_heads}, S, {self.head_dim})"
                raise ValueError(f"{name} must have shape {rule} as the cache, got {shape_of(tensor)}")
        if len({tensor.shape for tensor in tensors.values()}) > 1:
            shapes = ", ".join(str(shape_of(tensor)) for tensor in tensors.values())
            raise ValueError(f"{', '.join(tensors)} must have one shape, got {shapes}")


def attention_with_kvcache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: KVCache,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Append one image position to the cache and attend from it: one step of decoding, without gradients.

    Args:
        query, key, value: (B, H, 1, D) of sequence position ``cache.position``, in the cache's dtype; under
            autocast they are cast to it.
        cache: holds the text and every earlier image position; it is advanced by one.
        scale: factor of the scores, finite; None is 1 / sqrt(D).
        backend: "auto" or "reference".

    Returns:
        (B, H, 1, D) in the cache's dtype: the row that :func:`dalle_fast.attention` gives this position.

    Raises:
        RuntimeError: the text is not in the cache yet, or the cache is full; a backend that is not there.
        ValueError: a shape or device that does not fit.
        TypeError: another dtype, or not a cache.
    """
    check_backend("attention_with_kvcache", backend)
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a KVCache, got {type(cache).__name__}")
    check_scale(scale)
    query, key, value = cast_under_autocast(query, key, value, dtype=cache.dtype)
    cache._check(cache.batch, query=query, key=key, value=value)
    if query.shape[2] != 1:
        raise ValueError(f"query, key, value must have 1 position, got {query.shape[2]}")
    text_len, seq_len = cache.pattern.text_len, cache.pattern.seq_len
    if cache.position < text_len:
        raise RuntimeError(f"the cache must hold the {text_len} text positions first: call prefill()")
    if cache.position == seq_len:
        raise RuntimeError(f"the cache is full, it holds all {seq_len} positions: call reset()")
    with without_autocast(cache.device):
        return reference.attention_with_kvcache(query, key, value, cache, scale=scale)
