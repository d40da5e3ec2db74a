"""The Triton kernel that draws tokens in Triton's interpreter, against the reference; on a machine without a GPU too.

As for attention, this module runs itself once more in a process of its own, for the interpreter is chosen when triton
is imported.
"""

import math

import pytest
import torch
from helpers import assert_within_budget
from interpreter import INTERPRETED, interpreted, run_interpreted
from torch import Tensor

from dalle_fast import reference
from dalle_fast.ops.draw_token import choose_kernel, draw_token
from dalle_fast.reference import filter_logits
from dalle_fast.reference.philox import philox

pytest.importorskip("triton")

import triton
import triton.language as tl
from dalle_fast.kernels.draw_token import MOST_CODES, draw_step, noise_codes, noise_words


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_in_the_interpreter():
    run_interpreted(__file__)


LENGTH = 7
PLAIN = {"temperature": 1.0, "top_k": None, "top_p": None, "cond_scale": None}


def among(tensor: Tensor, fill: float) -> Tensor:
    """The same values, contiguous, with others before and after."""
    buffer = torch.full((tensor.numel() + 300,), fill, dtype=tensor.dtype)
    view = buffer[150:-150].view(tensor.shape)
    view.copy_(tensor)
    return view


def draw(
    logits: Tensor, seeds: Tensor, position=3, keep: Tensor | None = None, tokens: Tensor | None = None, **settings
) -> tuple[Tensor, Tensor]:
    """tokens (B, LENGTH) and scores of the kernel, from and into poisoned memory; scores begin at 1."""
    settings = PLAIN | settings
    batch, codes = len(seeds), logits.shape[1]
    tokens = among(torch.full((batch, LENGTH), -1) if tokens is None else tokens, -7)
    scores = among(torch.ones(batch), math.nan)
    settings["top_k"] = codes if settings["top_k"] is None else settings["top_k"]
    settings["top_p"] = 1.0 if settings["top_p"] is None else settings["top_p"]
    draw_step(among(logits, math.nan), seeds, torch.tensor(position), keep, tokens, scores, **settings)
    for view, fill in ((tokens, -7), (scores, math.nan)):
        outside = torch.cat([view._base[:150], view._base[-150:]])
        assert (outside.isnan() if math.isnan(fill) else outside == fill).all()
    return tokens.clone(), scores.clone()


def check(logits: Tensor, seeds: Tensor, position=3, **settings) -> Tensor:
    """The reference's tokens in their column and nothing beside it, and scores within the budget; the tokens."""
    tokens, scores = draw(logits, seeds, position, **settings)
    expected, peer = reference.draw_token(logits, seeds, position, **settings)
    conditional = logits.double()[: len(seeds)]
    truth = conditional.log_softmax(-1).gather(-1, expected[:, None]).squeeze(-1)
    assert torch.equal(tokens[:, position], expected)
    tokens[:, position] = -1
    assert (tokens == -1).all()
    # The sum is rounded once more.
    assert_within_budget(scores, peer + 1, truth + 1)
    return expected


def make(batch: int, codes: int, *, guided=False) -> tuple[Tensor, Tensor]:
    """Scores whose likeliest code has most of the mass now and then, and seeds that need all 64 bits."""
    logits = 3 * torch.randn(2 * batch if guided else batch, codes)
    return logits, torch.randint(2**63 - 1, (batch,))


@triton.jit
def _words_kernel(seed, row, words, BLOCK_K: tl.constexpr):
    found = noise_words(seed, tl.load(row), BLOCK_K)
    tl.store(words + noise_codes(BLOCK_K), found.to(tl.int64))


@interpreted
@pytest.mark.parametrize("codes", [128, 1024])
@pytest.mark.parametrize("seed", [0, 2**33 + 1, 2**63 - 1])
@pytest.mark.parametrize("row", [0, 1023, 2**35 + 5])
def test_noise_is_the_references_to_the_bit(seed, row, codes):
    words = torch.full((codes,), -1)
    _words_kernel[(1,)](torch.tensor(seed), torch.tensor(row), words, BLOCK_K=codes)
    code = torch.arange(codes)
    low, high = 2**32 - 1, 32
    counter = torch.tensor(row & low), torch.tensor(row >> high), code // 128 * 32 + code % 32, 0
    expected = torch.stack([w.expand(codes) for w in philox(counter, (seed & low, seed >> high))])
    assert torch.equal(words, expected.gather(0, (code % 128 // 32)[None])[0])


SETTINGS = [
    {},
    {"temperature": 0.37},
    {"temperature": 1e-30},
    {"temperature": 1e30},
    {"top_k": 1},
    {"top_k": 5},
    {"top_p": 0.6},
    {"top_p": 1e-9},
    {"top_p": 0.999999},
    {"cond_scale": 3.0},
    {"cond_scale": -0.5},
    {"temperature": 1.7, "top_k": 7, "top_p": 0.8, "cond_scale": 1.5},
    {"temperature": 0.0},
    {"temperature": 1e-39, "top_k": 3},
    {"temperature": 0.0, "cond_scale": 2.0},
]


@interpreted
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("codes", [12, 300])
def test_tokens_and_scores(settings, codes):
    logits, seeds = make(12, codes, guided="cond_scale" in settings)
    drawn = check(logits, seeds, **settings)
    assert settings.get("top_k") == 1 or len(drawn.unique()) > 2


@interpreted
@pytest.mark.parametrize("codes", [1, 2, 127, 128, 129, 1000])
@pytest.mark.parametrize("position", [0, LENGTH - 1])
def test_sizes(codes, position):
    check(*make(3, codes), position, top_k=max(1, codes // 2))


@interpreted
@pytest.mark.parametrize(
    "settings", [{"top_k": 3}, {"top_p": 0.5}, {"top_k": 4, "top_p": 0.7}, {"top_k": 4, "temperature": 1e20}], ids=str
)
def test_filters_with_equals(settings):
    """What equals the last that is kept is drawn as well, and nothing else; many seeds for one row of few values."""
    row = torch.tensor([2.0, 1.0, 1.0, 3.0, 1.0, -math.inf, 0.5, 2.0, -1.0, 1.0])
    drawn = check(row.expand(40, -1), torch.arange(40), **settings)
    kept = filter_logits(
        (row - 3)[None] / settings.get("temperature", 1.0), top_k=settings.get("top_k"), top_p=settings.get("top_p")
    )
    assert set(drawn.tolist()) == set((kept[0] > -math.inf).nonzero().squeeze(1).tolist())


@interpreted
def test_the_first_of_equals():
    logits = torch.zeros(4, 200)
    logits[1, [77, 150]] = logits[2, [199, 3]] = 1.0
    logits[3] = -math.inf
    logits[3, 130] = -1.0
    tokens, _ = draw(logits, torch.arange(4), temperature=0.0)
    assert tokens[:, 3].tolist() == [0, 77, 3, 130]


@interpreted
@pytest.mark.parametrize("settings", [{}, {"top_k": 9, "top_p": 0.5}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_numbers(bad, settings):
    """A token in range whatever happens, and a score that is NaN in that sample alone."""
    logits, seeds = make(4, 40)
    logits[1, 17] = bad
    logits[2] = bad
    tokens, scores = draw(logits, seeds, **settings)
    assert ((tokens[:, 3] >= 0) & (tokens[:, 3] < 40)).all()
    expected = [False, bad != -math.inf, True, False]
    assert scores.isnan().tolist() == expected
    assert torch.equal(reference.draw_token(logits, seeds, 3, **settings)[1].isnan(), torch.tensor(expected))


@interpreted
def test_kept_tokens_stay_and_count():
    logits, seeds = make(6, 30, guided=True)
    keep, tokens = torch.rand(6, LENGTH) < 0.5, torch.randint(30, (6, LENGTH))
    keep[:, 3] = torch.tensor([True, False, True, True, False, False])
    found, scores = draw(logits, seeds, keep=keep, tokens=tokens.clone(), cond_scale=2.0)
    drawn, _ = reference.draw_token(logits, seeds, 3, cond_scale=2.0)
    expected = torch.where(keep[:, 3], tokens[:, 3], drawn)
    assert torch.equal(found[:, 3], expected)
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(found[:, others], tokens[:, others])
    likelihoods = logits[:6].log_softmax(-1).gather(-1, expected[:, None]).squeeze(-1)
    torch.testing.assert_close(scores, 1 + likelihoods)


@interpreted
@pytest.mark.parametrize("position", [-1, LENGTH, 2**40])
def test_a_position_that_is_none_leaves_all_as_it_is(position):
    tokens, scores = draw(*make(3, 20), position, keep=torch.ones(3, LENGTH, dtype=torch.bool))
    assert (tokens == -1).all() and (scores == 1).all()


@interpreted
def test_order_of_programs(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    logits, seeds = make(5, 60)
    first = draw(logits, seeds, top_k=9)
    set_grid_idx, seen = InterpreterBuilder.set_grid_idx, []

    def reversed_grid_idx(self, x, y, z):
        seen.append(x)
        set_grid_idx(self, self.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", reversed_grid_idx)
    second = draw(logits, seeds, top_k=9)
    assert max(seen) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@interpreted
def test_the_op():
    logits, seeds = make(4, 50, guided=True)
    keep = torch.rand(4, LENGTH) < 0.4
    results = []
    for backend in ("triton", "reference"):
        tokens, scores = torch.arange(4 * LENGTH).view(4, LENGTH), torch.zeros(4)
        for position in range(LENGTH):
            draw_token(
                logits, seeds, torch.tensor(position), tokens, scores,
                keep=keep, temperature=0.8, top_k=20, top_p=0.9, cond_scale=1.5, backend=backend,
            )  # fmt: skip
        results.append((tokens, scores))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


@interpreted
def test_too_many_codes():
    logits, one = torch.zeros(1, MOST_CODES + 1), torch.zeros(1, dtype=torch.int64)
    message = f"logits must have at most {MOST_CODES} codes, got {MOST_CODES + 1}"
    with pytest.raises(ValueError, match=message):
        draw_token(logits, one, one[0], one[None], torch.zeros(1), backend="triton")


@pytest.mark.skipif(INTERPRETED, reason="the compiled kernels")
def test_no_cpu_tensors_outside_the_interpreter():
    with pytest.raises(RuntimeError, match="run on CUDA devices, got a tensor on cpu; move it to one, or set"):
        draw(*make(1, 8))


@pytest.mark.skipif(INTERPRETED, reason="plain Python")
def test_auto_leaves_too_many_codes_to_the_reference(monkeypatch):
    from dalle_fast.ops import draw_token as op

    monkeypatch.setattr(op.backends, "has_triton_backend", lambda device: True)
    monkeypatch.setattr(op.backends, "has_cpp_backend", lambda device: False)
    assert choose_kernel("auto", torch.empty(1, MOST_CODES, device="meta")) == "triton"
    assert choose_kernel("auto", torch.empty(1, MOST_CODES + 1, device="meta")) is None
