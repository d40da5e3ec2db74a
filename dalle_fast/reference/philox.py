"""Philox-4x32, the counter-based generator of every random number that a kernel draws, in plain PyTorch.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def philox(
    counter: Sequence[Tensor | int], key: Sequence[Tensor | int], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four counter words and two key words to four words, of 32 bits each, held in int64.

    Args:
        rounds: 10 leave a margin over the 7 that are the fewest to pass all tests of TestU01.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    m0, m1 = _MULTIPLIERS
    for _ in range(rounds):
        # The product of two 32-bit words wraps in int64: its low 64 bits are right, the mask drops the sign.
        left, right = c0 * m0, c2 * m1
        c0, c2 = ((right >> 32) & _MASK32) ^ c1 ^ k0, ((left >> 32) & _MASK32) ^ c3 ^ k1
        c1, c3 = right & _MASK32, left & _MASK32
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK32, (k1 + _KEY_STEPS[1]) & _MASK32
    return c0, c1, c2, c3
