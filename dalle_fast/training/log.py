"""The log of a training run: OUT/log.jsonl, OUT/tensorboard, OUT/images and a progress bar on stderr.

Rows of numbers, such as one a residual block, go to files of their own, OUT/<name>.jsonl, and not to TensorBoard.

log.jsonl has one JSON object a line, `{"step": 12, "loss": 6.93, ...}`, each step once, also in a run that
was killed and resumed. JSON has no NaN and no infinities: they are written as the strings "NaN", "Infinity"
and "-Infinity", which `read_log` and `float` turn back into numbers.

Steps count updates from 0: the first update is step 0, the last `total_steps - 1`, and a run resumed after
500 updates goes on with step 500.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from torch import Tensor

from dalle_fast.data.images import image_grid, to_image

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunLog:
    """Writes what a training run has to say; use it as a context manager.

    Args:
        out: run directory, made if missing.
        total_steps: updates of the whole run, for the progress bar.
        resume_step: first step this process will log. Lines of the log from this step on, which a killed run
            wrote after its last checkpoint, are dropped; 0 starts the log anew.
        tensorboard: write OUT/tensorboard too; without the package a warning says so and the run goes on.
        progress: None shows a bar on a terminal and a plain line every tenth of the run elsewhere, True
            always a bar, False nothing.
        description: what stands before the bar.

    Raises:
        ValueError: `total_steps` < 1, or an earlier log that is to be continued is damaged.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        total_steps: int,
        resume_step: int = 0,
        tensorboard: bool = True,
        progress: bool | None = None,
        description: str = "",
    ) -> None:
        from tqdm import tqdm

        if total_steps < 1:
            raise ValueError(f"total_steps must be >= 1, got {total_steps}")
        self.out = Path(out)
        self.total_steps = total_steps
        self.description = description
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / "log.jsonl"
        _drop_steps_from(path, resume_step)
        self._resume_step = resume_step
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 closed by close()
        self._row_files: dict[str, TextIO] = {}
        self._bar = tqdm(
            total=total_steps,
            initial=resume_step,
            desc=description or None,
            disable=None if progress is None else not progress,
            file=sys.stderr,
        )
        self._plain_lines = progress is None and self._bar.disable
        self._tenths_shown = 10 * resume_step // total_steps
        self._writer = self._open_tensorboard(resume_step) if tensorboard else None

    def _open_tensorboard(self, resume_step: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.warn("tensorboard is not installed, scalars go to log.jsonl only (pip install tensorboard)")
            return None
        return SummaryWriter(str(self.out / "tensorboard"), purge_step=resume_step or None)

    def log(self, step: int, **scalars: float | Tensor) -> None:
        """Record numbers of one update; `loss` and names ending in `_per_s` also appear beside the bar."""
        values = {name: _number(value) for name, value in scalars.items()}
        self._file.write(_line({"step": step} | values))
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        self._show_progress(step + 1, values)

    def rows(self, step: int, name: str, **rows: Sequence[float]) -> Path:
        """Record rows of numbers of one update, as a line of OUT/<name>.jsonl, whose path is returned."""
        path = self.out / f"{name}.jsonl"
        if name not in self._row_files:
            _drop_steps_from(path, self._resume_step)
            self._row_files[name] = open(path, "a", encoding="utf-8")  # noqa: SIM115 closed by close()
        file = self._row_files[name]
        file.write(_line({"step": step} | {key: [_number(value) for value in row] for key, row in rows.items()}))
        file.flush()
        return path

    def images(self, step: int, name: str, images: Tensor) -> None:
        """Write `images` (N, 3, height, width) in [0, 1] as one grid, OUT/images/<name>-<step>.png."""
        grid = image_grid(images)
        path = self.out / "images" / f"{name}-{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        to_image(grid).save(path)
        if self._writer is not None:
            self._writer.add_image(name, grid.clamp(0, 1), step)

    def warn(self, message: str) -> None:
        """Print a warning to stderr without tearing the progress bar."""
        self._bar.write(f"warning: {message}", file=sys.stderr)

    def close(self) -> None:
        """Finish the bar and the files."""
        self._bar.close()
        for file in (self._file, *self._row_files.values()):
            file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _show_progress(self, done: int, values: dict[str, float]) -> None:
        shown = {
            name.replace("_per_s", "/s"): f"{value:.4g}"
            for name, value in values.items()
            if name == "loss" or name.endswith("_per_s")
        }
        if self._plain_lines:
            tenths = 10 * done // self.total_steps
            if tenths > self._tenths_shown:
                self._tenths_shown = tenths
                words = [self.description, f"{done}/{self.total_steps}", *map(" ".join, shown.items())]
                print("  ".join(filter(None, words)), file=sys.stderr, flush=True)
            return
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(done - self._bar.n)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl, in order. A last line cut short by a kill is left out.

    Raises:
        ValueError: another line is not JSON.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise ValueError(f"{path} line {number} is not JSON: {line[:80]!r}") from None
        records.append({name: _from_json(value) for name, value in record.items()})
    return records


def _from_json(value: float | str | list[float | str]) -> float | list[float]:
    return [_from_json(entry) for entry in value] if isinstance(value, list) else _NOT_FINITE.get(value, value)


def _drop_steps_from(path: Path, step: int) -> None:
    """Keep only the lines of an earlier log before `step`; the file is replaced as a whole."""
    if not path.exists():
        return
    kept = [record for record in read_log(path) if record["step"] < step] if step > 0 else []
    replacement = path.with_name(f".{path.name}.tmp")
    with open(replacement, "w", encoding="utf-8") as file:
        for record in kept:
            file.write(_line(record))
    os.replace(replacement, path)


def _number(value: float | Tensor) -> float:
    # Tensors and NumPy scalars alike.
    return value.item() if hasattr(value, "item") else value


def _line(record: dict[str, float | list[float]]) -> str:
    return json.dumps({name: _to_json(value) for name, value in record.items()}, allow_nan=False) + "\n"


def _to_json(value: float | list[float]) -> float | str | list[float | str]:
    if isinstance(value, list):
        return [_to_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
