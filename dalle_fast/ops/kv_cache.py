"""Decoding with cached keys and values: the public cache and the op that makes one step.

What they compute is defined by ``dalle_fast.reference.kv_cache``; this module checks the arguments and picks the
implementation: one kernel that appends and attends, in Triton on a GPU and in C++ on a CPU. A step costs 4 * H * D
floating-point operations a sample for each key that its position sees, text and image, and reads the text's keys and
values once a prompt.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dalle_fast import reference
from dalle_fast.ops import backends
from dalle_fast.ops.attention import check_head_dim, check_pattern, check_scale, check_text_lens
from dalle_fast.ops.checks import (
    cast_under_autocast,
    check_backend,
    check_floating,
    shape_of,
    without_autocast,
)
from dalle_fast.ops.registration import define_op
from dalle_fast.patterns import Pattern

if backends.extension is not None:
    torch.library.register_fake("dalle_fast::attention_with_kvcache_cpu", lambda *args: None)


class KVCache(reference.KVCache):
    """Preallocated keys and values of one attention layer while an image is decoded.

    Text is stored once a prompt. Of the image a sample keeps what the pattern lets later positions see: a ring of
    width + 1 positions for row attention, of pattern.reach + 1 in general, all of it in column-major order for column
    attention. With ``slots`` for that number, nbytes is
    2 * num_heads * head_dim * itemsize * (num_prompts * text_len + batch * slots).

    Args:
        pattern: the layer's pattern; it fixes how many positions fit.
        batch: samples decoded together.
        num_heads, head_dim: of keys and values; head_dim in 1..256.
        num_prompts: number of different texts; batch is a multiple of it and sample i belongs to prompt
            i // (batch // num_prompts). None is one a sample.
        dtype, device: of the stored keys and values.

    Attributes:
        position: sequence position of the next token, which is also the number of positions held. It lives on the
            device (``held``): reading it there waits for what was launched before.
        nbytes: bytes of keys and values held.

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
        # Where asking the device would wait for it: the positions that Python knows of. Replays of a captured graph
        # come on top; past the end the kernel does nothing.
        self._known_held = 0

    def reset(self) -> None:
        """Forget every position; the storage stays."""
        super().reset()
        self._known_held = 0

    def prefill(self, key: Tensor, value: Tensor, text_lens: Tensor | None = None) -> None:
        """Store the first S0 positions of an empty cache.

        Args:
            key, value: (num_prompts, H, S0, D), S0 in text_len..seq_len, in the cache's dtype, or in float32 for a
                16-bit cache, which rounds. Positions past text_len are an image prefix that all samples of a prompt
                share. Under autocast they are cast to the cache's dtype.
            text_lens: (num_prompts,) integers in 0..text_len, or None. Text keys at or past it are hidden.

        Raises:
            RuntimeError: the cache is not empty.
            ValueError: a shape, length or device that does not fit.
            TypeError: another dtype.
        """
        held = self._held_by_now()
        if held != 0:
            raise RuntimeError(f"prefill needs an empty cache, got one with {held} positions: call reset()")
        key, value = cast_under_autocast(key, value, dtype=self.dtype)
        self._check(self.num_prompts, key=key, value=value)
        text_len, seq_len = self.pattern.text_len, self.pattern.seq_len
        if not text_len <= key.shape[2] <= seq_len:
            raise ValueError(f"key must have {text_len}..{seq_len} positions, got {key.shape[2]}")
        if text_lens is not None:
            check_text_lens(text_lens, self.num_prompts, self.pattern, self.device)
        super().prefill(key, value, text_lens)
        self._known_held = key.shape[2]

    def _held_by_now(self) -> int:
        return self.position if self.device.type == "cpu" else self._known_held

    def _check(self, batch: int, **tensors: Tensor) -> None:
        check_floating(**tensors)
        expected = (batch, self.num_heads, self.head_dim)
        for name, tensor in tensors.items():
            rounds = tensor.dtype == torch.float32 and self.dtype.itemsize == 2
            if tensor.dtype != self.dtype and not rounds:
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
        query, key, value: (B, H, 1, D) of sequence position ``cache.position``, in the cache's dtype, or in float32
            for a 16-bit cache, which rounds keys and values; under autocast they are cast to the cache's dtype. Any
            strides with the last dimension contiguous.
        cache: holds the text and every earlier image position; it is advanced by one.
        scale: factor of the scores, finite; None is 1 / sqrt(D).
        backend: "auto", the fastest there is for these tensors; "triton", CUDA tensors; "cpp", CPU tensors;
            "reference", any. Triton and C++ take float32, float16 and bfloat16.

    Returns:
        (B, H, 1, D) in query's dtype: the row that :func:`dalle_fast.attention` gives this position.

    Raises:
        RuntimeError: the text is not in the cache yet, or the cache is full; a backend that is not there.
        ValueError: a shape or device that does not fit.
        TypeError: another dtype, or not a cache.
    """
    check_backend("attention_with_kvcache", backend, ("triton", "cpp"))
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a KVCache, got {type(cache).__name__}")
    check_scale(scale)
    query, key, value = cast_under_autocast(query, key, value, dtype=cache.dtype)
    cache._check(cache.batch, query=query, key=key, value=value)
    if query.shape[2] != 1:
        raise ValueError(f"query, key, value must have 1 position, got {query.shape[2]}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.stride(3) != 1 and tensor.shape[3] != 1:
            raise ValueError(f"{name} must have a contiguous last dimension, got strides {tensor.stride()}")
    if not torch.compiler.is_compiling():
        _check_room(cache)
    kernel = choose_kernel(backend, cache)
    if kernel is None:
        with without_autocast(cache.device):
            out = reference.attention_with_kvcache(query, key, value, cache, scale=scale)
    else:
        out = query.new_empty(query.shape)
        bind_attention(query.detach(), key.detach(), value.detach(), cache, out, scale=scale, kernel=kernel)()
    if not torch.compiler.is_compiling():
        cache._known_held += 1
    return out


def bind_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: KVCache,
    out: Tensor,
    *,
    scale: float | None = None,
    kernel: str,
) -> partial:
    """A call that does :func:`attention_with_kvcache` into ``out`` with the kernel that :func:`choose_kernel` named.

    Nothing is checked, no tensor may need a gradient, and Python keeps no count of the call, so that it can be captured
    in a graph and replayed.
    """
    factor = cache.head_dim**-0.5 if scale is None else float(scale)
    return partial(
        _OPS[kernel],
        query,
        key,
        value,
        cache.text_key,
        cache.text_value,
        cache.image_key,
        cache.image_value,
        cache.held,
        cache.text_lens,
        cache.pattern.code,
        factor,
        out,
    )


def choose_kernel(backend: str, cache: KVCache) -> str | None:
    """See :func:`dalle_fast.ops.backends.choose_kernel`."""
    return backends.choose_kernel("attention_with_kvcache", backend, cache.device, cache.dtype)


def _check_room(cache: KVCache) -> None:
    held, text_len, seq_len = cache._held_by_now(), cache.pattern.text_len, cache.pattern.seq_len
    if held < text_len:
        raise RuntimeError(f"the cache must hold the {text_len} text positions first: call prefill()")
    if held >= seq_len:
        raise RuntimeError(f"the cache is full, it holds all {seq_len} positions: call reset()")


@define_op(
    "attention_with_kvcache_triton(Tensor query, Tensor key, Tensor value, Tensor text_key, Tensor text_value, "
    "Tensor(a!) image_key, Tensor(b!) image_value, Tensor(c!) held, Tensor text_lens, int[] pattern, float scale, "
    "Tensor(d!) out) -> ()"
)
def _triton_op(
    query, key, value, text_key, text_value, image_key, image_value, held, text_lens, pattern, scale, out
) -> None:
    from dalle_fast.kernels.kv_cache import attend_step

    attend_step(
        query,
        key,
        value,
        text_key,
        text_value,
        image_key,
        image_value,
        held,
        text_lens,
        out,
        pattern=tuple(pattern),
        scale=scale,
    )


torch.library.register_fake(_triton_op, lambda *args: None)

_OPS = {"triton": _triton_op}
if backends.extension is not None:
    _OPS["cpp"] = torch.ops.dalle_fast.attention_with_kvcache_cpu.default
