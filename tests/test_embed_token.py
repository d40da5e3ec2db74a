"""The states that a step of decoding reads, in C++ and in PyTorch: values, repeated rows, and messages."""

import re

import pytest
import torch
from helpers import needs_extension
from torch import Tensor

from dalle_fast.ops import backends
from dalle_fast.ops.embed_token import embed_token

CODES, WIDTH, LENGTH = 7, 19, 6


def make_case(samples: int) -> list[Tensor]:
    """tokens, embedding, start, place."""
    tables = [torch.randn(CODES, WIDTH), torch.randn(WIDTH), torch.randn(LENGTH, WIDTH)]
    return [torch.randint(CODES, (samples, LENGTH)), *tables]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("position", range(LENGTH))
def test_values(samples, position, dtype):
    """float64 goes through PyTorch."""
    tokens, *tables = make_case(samples)
    embedding, start, place = (table.to(dtype) for table in tables)
    out = torch.full((2 * samples, WIDTH), torch.nan, dtype=dtype)
    embed_token(tokens, torch.tensor(position), embedding, start, place, out)
    read = embedding[tokens[:, position - 1]] if position else start.expand(samples, -1)
    assert torch.equal(out, (read + place[position]).repeat(2, 1))


@needs_extension
def test_both_have_the_same_bits(level, monkeypatch):
    tokens, *tables = make_case(4)
    fast, plain = torch.empty(4, WIDTH), torch.empty(4, WIDTH)
    embed_token(tokens, torch.tensor(3), *tables, fast)
    monkeypatch.setattr(backends, "extension", None)
    embed_token(tokens, torch.tensor(3), *tables, plain)
    assert torch.equal(fast, plain)


@needs_extension
def test_opcheck():
    tokens, *tables = make_case(2)
    torch.library.opcheck(
        torch.ops.dalle_fast.embed_token_cpu, (tokens, torch.tensor(2), *tables, torch.empty(4, WIDTH))
    )


@needs_extension
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": torch.tensor(6)}, "position must be in 0..5, got 6"),
        ({"position": torch.tensor(-1)}, "position must be in 0..5, got -1"),
        ({"tokens": torch.full((2, LENGTH), CODES)}, "tokens must be in 0..6, got 7"),
        ({"tokens": torch.zeros(2, LENGTH)}, "tokens must have dtype Long, got Float"),
        ({"out": torch.zeros(3, WIDTH)}, "out must have a multiple of the 2 samples as rows, got 3"),
        ({"out": torch.zeros(2, WIDTH + 1)}, "out must have 38 elements, got 40"),
        ({"place": torch.zeros(5, WIDTH)}, "place must have 114 elements, got 95"),
        ({"start": torch.zeros(3)}, "start must have 19 elements, got 3"),
        ({"embedding": torch.zeros(CODES)}, "tokens, embedding and out must have 2 dimensions"),
    ],
)
def test_errors(changes, message):
    tokens, embedding, start, place = make_case(2)
    arguments = {"tokens": tokens, "position": torch.tensor(2), "embedding": embedding, "start": start, "place": place}
    arguments |= {"out": torch.zeros(2, WIDTH)}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.dalle_fast.embed_token_cpu(*(arguments | changes).values())
