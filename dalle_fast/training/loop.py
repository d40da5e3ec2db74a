"""The training loop that both models share: batches in, checkpoints and logs out.

A run directory OUT holds step-*/ (checkpoints), log.jsonl, tensorboard/ and images/. A run that is killed goes on
from its last checkpoint with ``resume``: weights, optimiser, moving average, random numbers and the place in the data
are restored, so that on a CPU it takes the same steps, bit for bit, as one that was never stopped. Ctrl-C waits for
the current update to end and writes a checkpoint; a second one breaks off at once, as a kill does.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dalle_fast.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_model_state,
    load_training_state,
    load_weights,
    save_checkpoint,
)
from dalle_fast.data.sources import Loader
from dalle_fast.grad_scaler import ResblockGradScaler
from dalle_fast.training.grad_scale_log import GradScaleLog
from dalle_fast.training.log import RunLog
from dalle_fast.training.schedules import PlateauHalving

__all__ = ["Outcome", "RunConfig", "Task", "check_update_rule", "choose_device", "resume_point", "train"]


@dataclass(frozen=True)
class RunConfig:
    """What every training run can be told, whatever it trains."""

    steps: int = field(default=1000, metadata={"help": "updates in all"})
    batch_size: int = field(default=8, metadata={"help": "samples an update"})
    seed: int = field(default=0, metadata={"help": "of weights, order, augmentation and noise"})
    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", metadata={"help": "auto takes a GPU if there is one"}
    )
    precision: Literal["fp32", "bf16", "fp16"] = field(
        default="fp32",
        metadata={
            "help": "bf16 runs matrix products in bfloat16, weights stay fp32; fp16 holds the blocks' matrices and the "
            "optimiser's moments in 16 bits, with a gradient scale for each residual block"
        },
    )
    num_workers: int = field(default=2, metadata={"help": "threads that read and augment ahead"})
    max_bad_share: float = field(default=0.05, metadata={"help": "share of unusable samples above which the run stops"})
    log_every: int = field(default=50, metadata={"help": "updates between lines of the log"})
    images_every: int = field(default=1000, metadata={"help": "updates between image grids; 0 for none"})
    checkpoint_every: int = field(default=1000, metadata={"help": "updates between checkpoints"})
    keep_checkpoints: int = field(default=2, metadata={"help": "checkpoints to keep"})
    tensorboard: bool = field(default=True, metadata={"help": "write TensorBoard logs"})

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.images_every < 0:
            raise ValueError(f"images_every must be >= 0, got {self.images_every}")

    def logs(self, step: int) -> bool:
        """Whether update ``step``, counted from 0, gets a line of the log."""
        return (step + 1) % self.log_every == 0 or step + 1 == self.steps


def check_update_rule(config: Any) -> None:
    """Raise ValueError for what the updates of both models are told, where it is out of range."""
    if not config.learning_rate > 0:
        raise ValueError(f"learning_rate must be > 0, got {config.learning_rate}")
    for name in ("final_learning_rate", "warmup_steps", "weight_decay"):
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} must be >= 0, got {getattr(config, name)}")
    if config.grad_clip is not None and not config.grad_clip > 0:
        raise ValueError(f"grad_clip must be > 0 or none, got {config.grad_clip}")
    if not 0 <= config.ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {config.ema_decay}")


class Outcome(NamedTuple):
    """Of one update's forward pass: the loss to descend, and numbers for the log."""

    loss: Tensor
    scalars: dict[str, Tensor | float]


@dataclass
class Task:
    """What is trained, on what and how.

    Args:
        model: on its device.
        optimizer: over the model's parameters; its step size is set before each update.
        scaler: of the gradients that the model's blocks scale, or None; the optimiser then clips them itself.
        loader: batches, as tuples of CPU tensors.
        forward: (batch on the model's device, update number from 0) to the outcome.
        learning_rate: step size by update number, before the plateau's factor.
        config: config.json of the checkpoints, see :func:`dalle_fast.checkpoint.save_checkpoint`.
        files: further files and folders for the checkpoints.
        counters: tensors by name that ``forward`` counts in; checkpoints keep them.
        plateau: halves the step size where the loss stops falling; sees each update's loss from ``plateau_from`` on.
        grad_clip: largest global norm of the gradients, or None; of use without a scaler.
        ema_decay: of the moving average of the weights, 0 for none; taken every ``ema_every`` updates.
        preview: the model, averaged weights in place, to named image batches for the log.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Loader
    forward: Callable[[tuple[Tensor, ...], int], Outcome]
    learning_rate: Callable[[int], float]
    config: dict[str, Any]
    files: dict[str, Path] | None = None
    counters: dict[str, Tensor] = field(default_factory=dict)
    plateau: PlateauHalving | None = None
    plateau_from: int = 0
    scaler: ResblockGradScaler | None = None
    grad_clip: float | None = None
    ema_decay: float = 0.0
    ema_every: int = 1
    preview: Callable[[], dict[str, Tensor]] | None = None


def choose_device(name: str) -> torch.device:
    """The device that ``RunConfig.device`` names.

    Raises:
        RuntimeError: a GPU was asked for by name and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device cuda was asked for, but PyTorch sees no GPU here; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def resume_point(out: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, or None to start.

    Raises:
        CheckpointError: ``resume`` is set and there is no checkpoint, or it is not and there is one, or ``out`` is
            itself a checkpoint.
    """
    if (Path(out) / "config.json").exists():
        raise CheckpointError(f"{out} is a checkpoint; name the folder of its run")
    if resume:
        return latest_checkpoint(out)
    if any(Path(out).glob("step-*")):
        raise CheckpointError(f"{out} already holds checkpoints; pass --resume to go on, or name another folder")
    return None


def train(
    task: Task,
    run: RunConfig,
    out: Path,
    *,
    resume_from: Path | None = None,
    description: str = "",
    progress: bool | None = None,
) -> Path:
    """Train and return the last checkpoint.

    Args:
        out: run directory.
        resume_from: checkpoint to go on from.
        description: stands before the progress bar.
        progress: see :class:`dalle_fast.training.log.RunLog`.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
        KeyboardInterrupt: on Ctrl-C, after a checkpoint.
        ValueError, RuntimeError: as the loader and the checkpoints raise them.
    """
    state = _State(task, run, Path(out))
    if resume_from is not None:
        state.restore(resume_from)
    start, clock = state.step, _Clock(state.step)
    log = RunLog(
        out,
        total_steps=run.steps,
        resume_step=start,
        tensorboard=run.tensorboard,
        progress=progress,
        description=description,
    )
    with log, _interrupt_held() as interrupted:
        batches, warned = iter(task.loader), set()
        scale_log = GradScaleLog(task.scaler, log) if task.scaler is not None else None
        while state.step < run.steps:
            outcome = state.update(next(batches))
            step, last, stop = state.step, state.step == run.steps, interrupted.is_set()
            if run.logs(step - 1):
                scaling = scale_log.scalars(step - 1) if scale_log else {}
                # A loss that is not finite in an update that was skipped does no harm, unless it goes on like that.
                if scale_log is None or scale_log.is_hopeless:
                    state.check_finite(outcome.loss)
                speed = clock.steps_per_s(step) * run.batch_size
                log.log(step - 1, **state.scalars(outcome), **scaling, samples_per_s=speed)
                for reason in task.loader.bad.keys() - warned:
                    log.warn(f"samples are skipped: {reason}, for example {task.loader.bad_examples[reason]}")
                    warned.add(reason)
            with clock.paused():
                if task.preview and run.images_every and (step % run.images_every == 0 or last):
                    for name, images in state.preview().items():
                        log.images(step - 1, name, images)
                if scale_log and (last or stop or (run.images_every and step % run.images_every == 0)):
                    scale_log.draw()
                if step % run.checkpoint_every == 0 or last or stop:
                    state.check_finite(outcome.loss if scale_log is None else None, weights=True)
                    state.save()
            if stop:
                break
        if interrupted.is_set():
            log.warn(f"stopped after {state.step} updates; go on with --resume")
            raise KeyboardInterrupt
    return state.checkpoint


@contextmanager
def _interrupt_held() -> Iterator[threading.Event]:
    """Inside the block the first Ctrl-C only sets the event, so that no update is cut in two.

    Where Ctrl-C does not raise KeyboardInterrupt in this thread anyway, all stays as it is.
    """
    seen = threading.Event()
    raising = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not raising:
        yield seen
        return

    def note(number: int, frame: FrameType | None) -> None:
        seen.set()
        signal.signal(signal.SIGINT, raising)

    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, raising)


class _State:
    """All that changes while a run goes on."""

    def __init__(self, task: Task, run: RunConfig, out: Path) -> None:
        self.task, self.run, self.out = task, run, out
        self.device = next(task.model.parameters()).device
        self.step = 0
        self.learning_rate = 0.0
        self.checkpoint: Path | None = None
        weights = task.model.state_dict()
        self.average = {name: _wide_copy(tensor) for name, tensor in weights.items()} if task.ema_decay else None

    def update(self, batch: tuple[Tensor, ...]) -> Outcome:
        task = self.task
        batch = tuple(part.to(self.device, non_blocking=True) for part in batch)
        self.learning_rate = task.learning_rate(self.step) * (task.plateau.factor if task.plateau else 1.0)
        for group in task.optimizer.param_groups:
            group["lr"] = self.learning_rate
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.precision == "bf16"):
            outcome = task.forward(batch, self.step)
        task.optimizer.zero_grad(set_to_none=True)
        outcome.loss.backward()
        if task.scaler is not None:
            task.scaler.unscale_(task.optimizer)
            task.scaler.step(task.optimizer)
            task.scaler.update()
        else:
            if task.grad_clip is not None:
                nn.utils.clip_grad_norm_(task.model.parameters(), task.grad_clip)
            task.optimizer.step()
        if task.plateau is not None and self.step >= task.plateau_from:
            task.plateau.update(outcome.loss.item())
        self.step += 1
        if self.average is not None and self.step % task.ema_every == 0:
            weights = task.model.state_dict()
            wide = [weights[name].to(average.dtype) for name, average in self.average.items()]
            torch._foreach_lerp_(list(self.average.values()), wide, 1 - task.ema_decay)
        return outcome

    def check_finite(self, loss: Tensor | None, *, weights: bool = False) -> None:
        fault = None if loss is None or math.isfinite(loss.item()) else f"the loss became {loss.item()}"
        if weights and not all(bool(weight.isfinite().all()) for weight in self.task.model.parameters()):
            fault = fault or "a weight became NaN or infinite"
        if fault:
            raise FloatingPointError(
                f"{fault} by update {self.step}; go on from {self.checkpoint or 'the start'} "
                "with a smaller learning_rate"
            )

    def scalars(self, outcome: Outcome) -> dict[str, float]:
        values = {"loss": outcome.loss.item(), "learning_rate": self.learning_rate}
        values |= {name: float(value) for name, value in outcome.scalars.items()}
        if self.task.loader.bad:
            values["skipped_samples"] = sum(self.task.loader.bad.values())
        return values

    def preview(self) -> dict[str, Tensor]:
        model, preview = self.task.model, self.task.preview
        model.eval()
        try:
            with _weights_swapped(model, self.average), torch.no_grad():
                return preview()
        finally:
            model.train()

    def save(self) -> None:
        task = self.task
        self.checkpoint = save_checkpoint(
            self.out,
            self.step,
            config=task.config,
            model=task.model.state_dict(),
            ema=self.average,
            training={
                "step": self.step,
                "optimizer": task.optimizer.state_dict(),
                "loader": task.loader.state_dict(),
                "plateau": task.plateau.state_dict() if task.plateau else None,
                "counters": task.counters,
                "scaler": task.scaler.state_dict() if task.scaler else None,
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
            files=task.files,
            keep=self.run.keep_checkpoints,
        )

    def restore(self, path: Path) -> None:
        task = self.task
        load_model_state(task.model, load_weights(path, ema=False), path)
        if self.average is not None:
            average = load_weights(path, ema=True)
            for name, own in self.average.items():
                if name not in average or average[name].shape != own.shape:
                    raise CheckpointError(
                        f"checkpoint {path}: ema.safetensors lacks tensor {name} in the model's shape"
                    )
                own.copy_(average[name])
        saved = load_training_state(path)
        for name in ("step", "optimizer", "loader", "plateau", "rng", "cuda_rng"):
            if name not in saved:
                raise CheckpointError(f"checkpoint {path}: the training state lacks the field {name}")
        _load_moments(task.optimizer, saved["optimizer"])
        task.loader.load_state_dict(saved["loader"])
        if task.plateau is not None and saved["plateau"] is not None:
            task.plateau.load_state_dict(saved["plateau"])
        if task.scaler is not None:
            task.scaler.load_state_dict(saved["scaler"])
        for name, counter in task.counters.items():
            # Of an earlier version's checkpoint, which lacks it, a count starts anew.
            count = saved.get("counters", {}).get(name)
            if count is not None and count.shape == counter.shape:
                counter.copy_(count)
        torch.set_rng_state(saved["rng"])
        if saved["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda_rng"], self.device)
        self.step, self.checkpoint = saved["step"], path


def _wide_copy(weight: Tensor) -> Tensor:
    """A copy in fp32: a slow moving average does not move in 16 bits."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)


def _load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimiser's moments, but keep the rules of its update (decay rates, ...), which may be new ones.

    Each moment gets its parameter's memory layout, which files do not keep and fused updates rely on.
    """
    rules = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rule in zip(optimizer.param_groups, rules, strict=True):
        group.update(rule)
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


@contextmanager
def _weights_swapped(model: nn.Module, weights: dict[str, Tensor] | None) -> Iterator[None]:
    """The model with other weights inside the block, and with its own ones again after it."""
    if weights is None:
        yield
        return
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights)
    try:
        yield
    finally:
        model.load_state_dict(own)


class _Clock:
    """Updates a second since it was last asked, without the time spent paused."""

    def __init__(self, step: int) -> None:
        self._step, self._since = step, time.perf_counter()

    def steps_per_s(self, step: int) -> float:
        now = time.perf_counter()
        speed = (step - self._step) / max(now - self._since, 1e-9)
        self._step, self._since = step, now
        return speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin
