"""Sampling: cached steps against the whole forward pass, the filters, the draw, seeds, scores and messages."""

import math
import re

import pytest
import torch
from helpers import random_captions, tiny_dalle
from hypothesis import given
from hypothesis import strategies as st

from dalle_fast.sampling import check_sampling, draw_token, filter_logits, sample_tokens


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("grid", [(3, 3), (4, 2), (1, 5)])
@pytest.mark.parametrize("start", ["inside", "before"])
@pytest.mark.parametrize("layout", ["dalle", "dalle-pytorch", "ru-dalle"])
def test_cached_steps_equal_the_forward_pass(layout, start, grid):
    """Two prompts, one of them padded, and three samples of each."""
    model = tiny_dalle(layout=layout, start_of_text=start, grid=grid)
    text = random_captions(model.config, [model.config.caption_len, 2])
    tokens, scores = sample_tokens(model, text, 3, generator=seeded())
    expected = model(text.repeat_interleave(3, dim=0), tokens).image

    caches = model.make_caches(6, num_prompts=2)
    model.prefill(text, caches)
    for position in range(model.config.image_len):
        logits = model.step(tokens[:, position - 1] if position else None, position, caches)
        torch.testing.assert_close(logits, expected[:, position])

    likelihoods = expected.log_softmax(dim=-1).gather(-1, tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(scores, likelihoods.sum(dim=1))
    assert tokens.shape == (6, model.config.image_len)
    assert tokens.unique(dim=0).shape[0] > 2


def test_temperature_0_takes_the_likeliest_token():
    model = tiny_dalle()
    text = random_captions(model.config, [3, 2])
    tokens, _ = sample_tokens(model, text, 2, temperature=0)
    greedy = torch.empty(2, 0, dtype=torch.int64)
    for _ in range(model.config.image_len):
        greedy = torch.cat([greedy, model(text, greedy).image[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(tokens, greedy.repeat_interleave(2, dim=0))
    assert torch.equal(sample_tokens(model, text, 1, temperature=2.0, top_k=1)[0], greedy)
    assert torch.equal(sample_tokens(model, text, 1, temperature=2.0, top_p=1e-6)[0], greedy)


def test_the_generator_decides_the_draws():
    model = tiny_dalle()
    text = random_captions(model.config, [3])
    first, again, other = (sample_tokens(model, text, 4, generator=seeded(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(1)
    assert torch.equal(sample_tokens(model, text, 4)[0], first)


def test_scores_are_those_of_the_unfiltered_model():
    model = tiny_dalle()
    text = random_captions(model.config, [3])
    tokens, scores = sample_tokens(model, text, 3, temperature=0.5, top_k=4, top_p=0.9, generator=seeded())
    likelihoods = model(text.expand(3, -1), tokens).image.log_softmax(dim=-1)
    torch.testing.assert_close(scores, likelihoods.gather(-1, tokens[..., None]).sum(dim=(1, 2)))
    assert scores.dtype == torch.float32


def test_progress_and_no_gradients():
    model = tiny_dalle()
    seen = []
    _, scores = sample_tokens(model, random_captions(model.config, [3]), 2, on_token=seen.append)
    assert seen == list(range(1, model.config.image_len + 1))
    assert not scores.requires_grad


rows_of_logits = st.lists(st.lists(st.floats(-20, 20, width=32), min_size=6, max_size=6), min_size=1, max_size=4).map(
    torch.tensor
)


@given(logits=rows_of_logits, top_k=st.integers(1, 9))
def test_top_k_keeps_the_k_highest(logits, top_k):
    kept = filter_logits(logits, top_k=top_k)
    for row, filtered in zip(logits, kept, strict=True):
        floor = row.sort(descending=True).values[min(top_k, 6) - 1]
        assert torch.equal(filtered, torch.where(row >= floor, row, -math.inf))


@given(logits=rows_of_logits, top_p=st.floats(1e-3, 1, exclude_max=True))
def test_top_p_keeps_the_smallest_set_that_suffices(logits, top_p):
    kept = filter_logits(logits, top_p=top_p)
    rounding = 1e-5
    for row, filtered in zip(logits, kept, strict=True):
        inside = filtered > -math.inf
        assert torch.equal(filtered[inside], row[inside])
        probabilities = row.double().softmax(dim=-1)
        mass = probabilities[inside].sum()
        assert mass >= top_p - rounding
        assert mass - probabilities[inside].min() < top_p + rounding
        if not inside.all():
            assert row[inside].min() >= row[~inside].max()


@given(logits=rows_of_logits)
def test_filters_that_keep_all(logits):
    assert torch.equal(filter_logits(logits), logits)
    assert torch.equal(filter_logits(logits, top_k=6, top_p=1.0), logits)


def test_top_p_comes_after_top_k():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    kept = filter_logits(logits, top_k=2, top_p=0.5) > -math.inf
    assert kept.tolist() == [[True, False, False, False]], "0.4 of the 0.7 that are left"
    assert (filter_logits(logits, top_p=0.5) > -math.inf).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, [0.30, 0.25, 0.20, 0.15, 0.07, 0.03]),
        ({"temperature": 0.5}, [0.30**2, 0.25**2, 0.20**2, 0.15**2, 0.07**2, 0.03**2]),
        ({"temperature": 2.0}, [0.30**0.5, 0.25**0.5, 0.20**0.5, 0.15**0.5, 0.07**0.5, 0.03**0.5]),
        ({"top_k": 3}, [0.30, 0.25, 0.20, 0, 0, 0]),
        ({"top_p": 0.6}, [0.30, 0.25, 0.20, 0, 0, 0]),
        ({"temperature": 0.5, "top_k": 4, "top_p": 0.7}, [0.30**2, 0.25**2, 0, 0, 0, 0]),
    ],
)
def test_frequencies_of_the_draw(options, weights):
    """A chi-square test: with up to 5 degrees of freedom, 30 is exceeded once in 70,000 seeds."""
    count = 20_000
    logits = torch.tensor([0.30, 0.25, 0.20, 0.15, 0.07, 0.03]).log().expand(count, -1) + 3
    drawn = draw_token(logits, generator=seeded(), **options).bincount(minlength=6).double()
    expected = torch.tensor(weights, dtype=torch.float64)
    expected *= count / expected.sum()
    possible = expected > 0
    assert not drawn[~possible].any()
    assert ((drawn - expected)[possible].square() / expected[possible]).sum() < 30


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-0.1, None, None), "temperature must be finite and >= 0, got -0.1"),
        ((math.nan, None, None), "temperature must be finite and >= 0, got nan"),
        ((math.inf, None, None), "temperature must be finite and >= 0, got inf"),
        ((1.0, 0, None), "top_k must be >= 1, got 0"),
        ((1.0, None, 0.0), "top_p must be in (0, 1], got 0.0"),
        ((1.0, None, 1.5), "top_p must be in (0, 1], got 1.5"),
        ((1.0, None, math.nan), "top_p must be in (0, 1], got nan"),
    ],
)
def test_settings_out_of_range(settings, message):
    temperature, top_k, top_p = settings
    with pytest.raises(ValueError, match=re.escape(message)):
        check_sampling(*settings)
    model = tiny_dalle()
    text = random_captions(model.config, [3])
    with pytest.raises(ValueError, match=re.escape(message)):
        sample_tokens(model, text, temperature=temperature, top_k=top_k, top_p=top_p)


def test_settings_at_the_ends_of_their_ranges():
    check_sampling(0, 1, 1)
    check_sampling(5.0, None, 1e-9)


def test_num_images_out_of_range():
    model = tiny_dalle()
    with pytest.raises(ValueError, match="num_images must be >= 1, got 0"):
        sample_tokens(model, random_captions(model.config, [3]), 0)


def test_a_tiny_temperature_is_arg_max():
    logits = torch.randn(64, 9)
    for temperature in (1e-30, 1e-38, 1e-60):
        assert torch.equal(draw_token(logits, temperature=temperature), logits.argmax(dim=-1))
