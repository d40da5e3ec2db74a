"""Schedules of step size, temperature and KL weight, as functions of the update's number (from 0).

    half_cosine     v(t) = end + (start - end) * (1 + cos(pi * min(t / T, 1))) / 2
    linear_warmup   v(t) = peak * min((t + 1) / T, 1)
    warmup_cosine   the first, after the second
    PlateauHalving  a factor, halved whenever the training loss stops falling

Source: DALL-E (arXiv 2102.12092). Appendix A.2 for the dVAE: KL weight 0 -> 6.6 over 5,000 updates,
temperature 1 -> 1/16 over 150,000, step size 1e-4 -> 1.25e-6 over 1,200,000, each constant afterwards.
Appendix B.2 for the transformer: warm-up to 4.5e-4 over 5,000 updates, then five halvings on plateaus of the
training loss. The paper does not say how a plateau is found; `PlateauHalving` documents this project's rule.
"""

from __future__ import annotations

import math


def half_cosine(step: int, start: float, end: float, steps: int) -> float:
    """`start` at update 0, `end` from update `steps` on, half a cosine between; no restarts.

    Raises:
        ValueError: `step` is negative or `steps` is not positive.
    """
    _check_step(step)
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def linear_warmup(step: int, peak: float, warmup: int) -> float:
    """`peak / warmup` at update 0, so that it already learns, up to `peak` from update `warmup - 1` on.

    Raises:
        ValueError: `step` or `warmup` is negative.
    """
    _check_step(step)
    if warmup < 0:
        raise ValueError(f"warmup must be >= 0, got {warmup}")
    return peak * min((step + 1) / warmup, 1.0) if warmup else peak


def warmup_cosine(step: int, peak: float, final: float, warmup: int, total: int) -> float:
    """`linear_warmup` to `peak` over `warmup` updates, then `half_cosine` to `final` at update `total`.

    Raises:
        ValueError: `step` or `warmup` is negative, or `total` does not exceed `warmup`.
    """
    if total <= warmup:
        raise ValueError(f"total must be > warmup, got total {total} and warmup {warmup}")
    if step < warmup:
        return linear_warmup(step, peak, warmup)
    return half_cosine(step - warmup, peak, final, total - warmup)


class PlateauHalving:
    """Factor on the step size: 1, halved on each plateau of the training loss, at most `max_halvings` times.

    The losses are cut into consecutive windows of `window` updates. A plateau is a window whose mean is not
    below the mean of the window before it by more than `threshold` times that mean's magnitude. After a
    halving the comparison starts afresh, so two windows are always of the same step size. Losses that are not
    finite belong to skipped updates and are ignored. Feed it from the end of the warm-up on.

    Args:
        window: updates a window; longer windows see through more noise and react later.
        threshold: smallest relative fall that counts as progress.
        max_halvings: five in the paper, 4.5e-4 -> 1.40625e-5.

    Raises:
        ValueError: `window` < 1, `threshold` < 0 or `max_halvings` < 0.
    """

    def __init__(self, window: int = 2000, threshold: float = 1e-3, max_halvings: int = 5) -> None:
        if window < 1:
            raise ValueError(f"window must be >= 1, got {window}")
        if threshold < 0:
            raise ValueError(f"threshold must be >= 0, got {threshold}")
        if max_halvings < 0:
            raise ValueError(f"max_halvings must be >= 0, got {max_halvings}")
        self.window = window
        self.threshold = threshold
        self.max_halvings = max_halvings
        self.halvings = 0
        self._previous_mean: float | None = None
        self._sum = 0.0
        self._count = 0

    @property
    def factor(self) -> float:
        """What to multiply the step size by: 0.5 ** halvings."""
        return 0.5**self.halvings

    def update(self, loss: float) -> float:
        """Take the training loss of one update and return the factor for the next."""
        if math.isfinite(loss) and self.halvings < self.max_halvings:
            self._sum += loss
            self._count += 1
            if self._count == self.window:
                self._close_window()
        return self.factor

    def _close_window(self) -> None:
        mean = self._sum / self._count
        self._sum, self._count = 0.0, 0
        previous = self._previous_mean
        if previous is not None and mean >= previous - self.threshold * abs(previous):
            self.halvings += 1
            self._previous_mean = None
        else:
            self._previous_mean = mean

    def state_dict(self) -> dict[str, float | int | None]:
        """Counters of the detector; with the same arguments, `load_state_dict` continues exactly."""
        return {
            "halvings": self.halvings,
            "previous_mean": self._previous_mean,
            "sum": self._sum,
            "count": self._count,
        }

    def load_state_dict(self, state: dict[str, float | int | None]) -> None:
        """Restore what `state_dict` gave."""
        self.halvings = state["halvings"]
        self._previous_mean = state["previous_mean"]
        self._sum = state["sum"]
        self._count = state["count"]


def _check_step(step: int) -> None:
    if step < 0:
        raise ValueError(f"step must be >= 0, got {step}")
