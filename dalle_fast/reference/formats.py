"""Two 16-bit storage formats, float32 to int16 words and back, in plain PyTorch integer arithmetic.

                 word                                       value                        largest
    1-6-9    sign, 6 bits exponent e, 9 bits mantissa m    (-1)^s 2^(e - 60) (1 + m / 512)     15.984375
    0-6-10   6 bits exponent e, 10 bits mantissa m          2^(e - 60) (1 + m / 1024)           15.9921875

No infinities, no NaN, no denormals; the word 0 is 0, so the smallest magnitude is 2^-60 (1 + one mantissa
step).

Encoding works on the bits of |x|: magnitudes below that smallest one, compared before rounding, become 0; the
others are rounded half away from zero, by adding half a mantissa step of their own binade and truncating,
which may carry into the exponent; what would pass the largest value, infinities included, becomes the largest
value with x's sign. NaN becomes 0. In 0-6-10 everything negative becomes 0.

Source: arXiv 2102.12092, appendix B.2 (which formats), E.2.4 (largest value); the exponent bias of 60 is the
one of openai/blocksparse's 16-bit optimiser state.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLOAT32_MANTISSA_BITS, _FLOAT32_BIAS = 23, 127
_FLOAT32_INFINITY = 0x7F800000
_BIAS = 60
_LARGEST_EXPONENT = 63


def encode_169(x: Tensor) -> Tensor:
    """float32 to 1-6-9 words (int16), same shape."""
    word = _encode_magnitude(x, mantissa_bits=9)
    return torch.where((x < 0) & (word > 0), word - 0x8000, word).to(torch.int16)


def decode_169(word: Tensor) -> Tensor:
    """1-6-9 words (int16) to float32, exactly."""
    magnitude = _decode_magnitude(word.to(torch.int32) & 0x7FFF, mantissa_bits=9)
    return torch.where(word < 0, -magnitude, magnitude).masked_fill(word == 0, 0.0)


def encode_0610(x: Tensor) -> Tensor:
    """float32 to 0-6-10 words (int16 holding 16 unsigned bits), same shape; negative values become 0."""
    return _encode_magnitude(x.clamp(min=0.0), mantissa_bits=10).to(torch.int16)


def decode_0610(word: Tensor) -> Tensor:
    """0-6-10 words (int16 holding 16 unsigned bits) to float32, exactly."""
    magnitude = _decode_magnitude(word.to(torch.int32) & 0xFFFF, mantissa_bits=10)
    return magnitude.masked_fill(word == 0, 0.0)


def _encode_magnitude(x: Tensor, mantissa_bits: int) -> Tensor:
    """Exponent and mantissa of |x| as one int32 word."""
    dropped = _FLOAT32_MANTISSA_BITS - mantissa_bits
    zero_exponent = (_FLOAT32_BIAS - _BIAS) << _FLOAT32_MANTISSA_BITS
    smallest = zero_exponent + (1 << dropped)
    largest_word = (_LARGEST_EXPONENT << mantissa_bits) | ((1 << mantissa_bits) - 1)

    bits = x.to(torch.float32).abs().contiguous().view(torch.int32)
    word = (bits - zero_exponent + (1 << (dropped - 1))) >> dropped
    return word.clamp(max=largest_word).masked_fill((bits < smallest) | (bits > _FLOAT32_INFINITY), 0)


def _decode_magnitude(word: Tensor, mantissa_bits: int) -> Tensor:
    dropped = _FLOAT32_MANTISSA_BITS - mantissa_bits
    bits = (word << dropped) + ((_FLOAT32_BIAS - _BIAS) << _FLOAT32_MANTISSA_BITS)
    return bits.view(torch.float32)
