"""The generator with the seven rounds that stochastic rounding uses; those with ten are in test_gumbel.py."""

import pytest
import torch

from dalle_fast.reference.philox import philox

# counter, key, result: the known answers published with Random123.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    words = philox([torch.tensor([word]) for word in counter], key, rounds=7)
    assert [int(word) for word in words] == expected
