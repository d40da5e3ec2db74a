"""Schedules of training: the paper's end points, continuity, and the plateau detector."""

import itertools
import math

import pytest

from dalle_fast.training.schedules import PlateauHalving, half_cosine, linear_warmup, warmup_cosine

# Appendix A.2 of the paper: start, end, updates.
PAPER_SCHEDULES = [(0.0, 6.6, 5_000), (1.0, 1 / 16, 150_000), (1e-4, 1.25e-6, 1_200_000)]


@pytest.mark.parametrize(("start", "end", "steps"), PAPER_SCHEDULES)
def test_half_cosine_end_points_and_middle(start, end, steps):
    assert half_cosine(0, start, end, steps) == pytest.approx(start, abs=1e-15)
    assert half_cosine(steps // 2, start, end, steps) == pytest.approx((start + end) / 2)
    assert half_cosine(steps, start, end, steps) == end
    assert half_cosine(2 * steps, start, end, steps) == end


def test_half_cosine_is_the_formula_and_monotone():
    values = [half_cosine(step, 1.0, 0.25, 40) for step in range(60)]
    expected = [0.25 + 0.75 * (1 + math.cos(math.pi * min(step / 40, 1))) / 2 for step in range(60)]
    assert values == pytest.approx(expected, abs=1e-15)
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))


def test_linear_warmup_moves_at_once_and_reaches_the_peak():
    assert [linear_warmup(step, 8.0, 4) for step in range(6)] == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]
    assert linear_warmup(0, 8.0, 0) == 8.0


def test_warmup_cosine_joins_both():
    values = [warmup_cosine(step, 4.0, 1.0, 4, 14) for step in range(20)]
    assert values[:5] == [1.0, 2.0, 3.0, 4.0, 4.0]
    assert values[9] == pytest.approx(2.5)
    assert values[14:] == [1.0] * 6
    assert warmup_cosine(0, 4.0, 1.0, 0, 10) == 4.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: half_cosine(-1, 0, 1, 5), "step must be >= 0, got -1"),
        (lambda: half_cosine(0, 0, 1, 0), "steps must be >= 1, got 0"),
        (lambda: linear_warmup(-1, 1.0, 5), "step must be >= 0, got -1"),
        (lambda: linear_warmup(0, 1.0, -5), "warmup must be >= 0, got -5"),
        (lambda: warmup_cosine(0, 1.0, 0.0, 5, 5), "total must be > warmup, got total 5 and warmup 5"),
        (lambda: PlateauHalving(window=0), "window must be >= 1, got 0"),
        (lambda: PlateauHalving(threshold=-1.0), "threshold must be >= 0, got -1.0"),
        (lambda: PlateauHalving(max_halvings=-1), "max_halvings must be >= 0, got -1"),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        call()


def test_plateau_keeps_the_rate_while_the_loss_falls():
    halving = PlateauHalving(window=10, threshold=1e-3)
    assert {halving.update(5.0 * 0.99**step) for step in range(200)} == {1.0}


def test_plateau_halves_at_most_five_times_down_to_the_papers_final_rate():
    halving = PlateauHalving(window=3)
    factors = [halving.update(2.0) for _ in range(60)]
    # Two windows for each halving: the first sets the mean, the second fails to beat it.
    assert factors[:13] == [1.0] * 5 + [0.5] * 6 + [0.25] * 2
    assert factors[-1] == 1 / 32
    assert 4.5e-4 * factors[-1] == pytest.approx(1.40625e-5)


def test_plateau_threshold_is_relative_to_the_magnitude_also_of_negative_losses():
    def factor_after(first, second):
        halving = PlateauHalving(window=2, threshold=0.1)
        return [halving.update(loss) for loss in (first, first, second, second)][-1]

    assert factor_after(10.0, 8.5) == 1.0
    assert factor_after(10.0, 9.5) == 0.5
    assert factor_after(-10.0, -11.5) == 1.0
    assert factor_after(-10.0, -10.5) == 0.5


def test_plateau_ignores_losses_that_are_not_finite():
    halving = PlateauHalving(window=2)
    for loss in (4.0, math.nan, 4.0, math.inf, 2.0, 2.0):
        assert halving.update(loss) == 1.0


@pytest.mark.parametrize("cut", [0, 5, 6, 17, 30])
def test_plateau_resumes_exactly(cut):
    losses = [3.0 + 0.1 * math.sin(7 * step) for step in range(60)]
    whole = PlateauHalving(window=6)
    expected = [whole.update(loss) for loss in losses]
    first, second = PlateauHalving(window=6), PlateauHalving(window=6)
    factors = [first.update(loss) for loss in losses[:cut]]
    second.load_state_dict(first.state_dict())
    factors += [second.update(loss) for loss in losses[cut:]]
    assert factors == expected
    assert second.state_dict() == whole.state_dict()
    assert min(expected) < 1.0
