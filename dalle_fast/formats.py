"""The 16-bit storage formats of the Adam moments: 1-6-9 for the mean, 0-6-10 for the variance.

A word with exponent field e and an m-bit mantissa field f stands for ``2^(e - 60) * (1 + f / 2^m)``, times
the sign in 1-6-9; the word 0 stands for 0. There are no denormals, infinities or NaNs.

==========  ====  =======  =============================  ===========================
format      sign  m        smallest positive value        largest value
==========  ====  =======  =============================  ===========================
1-6-9       yes   9        2^-60 * (1 + 2^-9), 8.69e-19   15.984375
0-6-10      no    10       2^-60 * (1 + 2^-10), 8.68e-19  15.9921875
==========  ====  =======  =============================  ===========================

Encoding rounds to nearest, ties away from zero. Values below the smallest positive one give 0, values above
the largest give the largest, infinities too; negative values give 0 in 0-6-10. NaN gives 0: that is what a
moment starts from, and later gradients repair it. A decoded word encodes to itself, except the word
0x8000 of 1-6-9, which stands for -2^-60 and is never written.

Every backend gives the same bits. Words are the 16 bits as int16. Source: DALL-E (arXiv 2102.12092), appendix
B.2 and E.2; bit layout of openai/blocksparse.
"""

import torch

from dalle_fast import reference
from dalle_fast.ops import backends


def _uses_cpp(device: torch.device, backend: str) -> bool:
    if backend == "auto":
        return backends.has_cpp_backend(device)
    if backend == "cpp":
        backends.require_cpp_backend(device)
        return True
    if backend == "reference":
        return False
    raise ValueError(f'backend must be "auto", "cpp" or "reference", got {backend!r}')


def _check(tensor: torch.Tensor, name: str, dtype: torch.dtype) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {tensor.dtype}")


def encode_169(values: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Encode to 1-6-9: sign, 6 exponent bits, 9 mantissa bits.

    Args:
        values: float32, any shape, strides and device. Not differentiable.
        backend: ``"auto"``, ``"cpp"`` or ``"reference"``.

    Returns:
        int16 words of the same shape, contiguous.

    Raises:
        TypeError: ``values`` is no float32 tensor.
        ValueError: unknown ``backend``.
        RuntimeError: ``backend="cpp"`` where it is not built.
    """
    _check(values, "values", torch.float32)
    values = values.detach().contiguous()
    if _uses_cpp(values.device, backend):
        return torch.ops.dalle_fast.encode_169(values)
    return reference.encode_169(values)


def decode_169(words: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Decode 1-6-9 words, exactly.

    Args:
        words: int16, any shape, strides and device.
        backend: ``"auto"``, ``"cpp"`` or ``"reference"``.

    Returns:
        float32 values of the same shape, contiguous.

    Raises:
        TypeError: ``words`` is no int16 tensor.
        ValueError: unknown ``backend``.
        RuntimeError: ``backend="cpp"`` where it is not built.
    """
    _check(words, "words", torch.int16)
    words = words.contiguous()
    if _uses_cpp(words.device, backend):
        return torch.ops.dalle_fast.decode_169(words)
    return reference.decode_169(words)


def encode_0610(values: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Encode to 0-6-10: no sign, 6 exponent bits, 10 mantissa bits. Negative values give 0.

    Arguments, result and errors as in :func:`encode_169`.
    """
    _check(values, "values", torch.float32)
    values = values.detach().contiguous()
    if _uses_cpp(values.device, backend):
        return torch.ops.dalle_fast.encode_0610(values)
    return reference.encode_0610(values)


def decode_0610(words: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Decode 0-6-10 words, exactly: the 16 bits of the int16 are read as unsigned.

    Arguments, result and errors as in :func:`decode_169`.
    """
    _check(words, "words", torch.int16)
    words = words.contiguous()
    if _uses_cpp(words.device, backend):
        return torch.ops.dalle_fast.decode_0610(words)
    return reference.decode_0610(words)


def _fake_words(values: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(values, dtype=torch.int16, memory_format=torch.contiguous_format)


def _fake_values(words: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(words, dtype=torch.float32, memory_format=torch.contiguous_format)


if backends.extension is not None:
    for _name in ("169", "0610"):
        torch.library.register_fake(f"dalle_fast::encode_{_name}")(_fake_words)
        torch.library.register_fake(f"dalle_fast::decode_{_name}")(_fake_values)
