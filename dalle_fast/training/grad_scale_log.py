"""What a run with gradient scales logs about them, and the picture of them over training.

OUT/grad_scales.jsonl has one line a logged update: ``scales``, one a block in order, and ``skips``, for each block and
then for the parameters outside all blocks how many updates so far had a gradient there that was not finite.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

from dalle_fast.grad_scaler import ResblockGradScaler
from dalle_fast.training.log import RunLog, read_log

__all__ = ["GradScaleLog", "draw_grad_scales"]

_NAME = "grad_scales"
_HOPELESS_UPDATES = 20


class GradScaleLog:
    """Puts the state of a scaler into the log of its run."""

    def __init__(self, scaler: ResblockGradScaler, log: RunLog) -> None:
        self._scaler, self._log = scaler, log
        self._path: Path | None = None
        self._warned = False
        self._draws = True
        report = scaler.report()
        self._updates, self._skipped = report.updates, report.skipped
        self._skipped_in_a_row = 0  # updates up to the last line of the log

    def scalars(self, step: int) -> dict[str, float]:
        """Numbers of the log's line for update ``step``; the blocks' own go to their file, and warnings to stderr."""
        report = self._scaler.report()
        self._path = self._log.rows(step, _NAME, scales=report.scales, skips=[*report.skips, report.rest_skips])
        updates, skipped = report.updates - self._updates, report.skipped - self._skipped
        self._updates, self._skipped = report.updates, report.skipped
        self._skipped_in_a_row = self._skipped_in_a_row + skipped if skipped == updates else 0
        if report.warning is not None and not self._warned:
            self._log.warn(report.warning)
        self._warned = report.warning is not None
        return {
            "grad_norm": float(self._scaler.grad_norm),
            "grad_scale_min": min(report.scales),
            "grad_scale_max": max(report.scales),
            "skipped_updates": report.skipped,
            "skipped_share": skipped / max(updates, 1),
        }

    @property
    def is_hopeless(self) -> bool:
        """Whether so many updates in a row were skipped that a loss which is not finite will stay so."""
        return self._skipped_in_a_row >= _HOPELESS_UPDATES

    def draw(self) -> None:
        """Write OUT/images/grad_scales.png; without matplotlib a warning says so once."""
        if self._path is None or not self._draws:
            return
        try:
            draw_grad_scales(self._path, self._log.out / "images" / f"{_NAME}.png")
        except ImportError:
            self._log.warn("matplotlib is not installed, the gradient scales are in grad_scales.jsonl only")
            self._draws = False


def draw_grad_scales(path: str | Path, picture: str | Path) -> None:
    """Draw grad_scales.jsonl: each block's scale over training, and the share of updates that each one had skipped.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the file has no line.
    """
    from matplotlib.figure import Figure

    records = read_log(path)
    if not records:
        raise ValueError(f"{path} holds no gradient scales")
    steps = [record["step"] for record in records]
    exponents = [[math.log2(scale) for scale in record["scales"]] for record in records]
    blocks = len(exponents[0])
    figure = Figure(figsize=(12, 4), layout="constrained")
    scales, skips = figure.subplots(1, 2, width_ratios=(3, 1))
    image = scales.pcolormesh(_edges(steps), range(blocks + 1), list(zip(*exponents, strict=True)), rasterized=True)
    figure.colorbar(image, ax=scales, label="log2 of the scale")
    scales.set(title="gradient scale of each residual block", xlabel="updates", ylabel="block")
    shares = [count / (steps[-1] + 1) for count in records[-1]["skips"]]
    skips.barh(range(len(shares)), shares)
    skips.set(title="updates each one skipped", xlabel="share; top row: outside all blocks")
    skips.set(xlim=(0, 1.1 * max(shares) or 1), ylim=(-0.5, len(shares) - 0.5))
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def _edges(steps: list[int]) -> list[float]:
    """Where the cells of a picture begin and end whose middles are ``steps``."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    return [0.0 if steps[0] else -0.5, *middles, steps[-1] + 0.5]
