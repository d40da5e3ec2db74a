"""Stage one: train the discrete VAE on images alone (``dalle-fast train-dvae``)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dalle_fast import __version__
from dalle_fast.checkpoint import check_match, load_config
from dalle_fast.config import to_dict
from dalle_fast.data.images import augment_for_dvae, center_crop, decode_image, to_tensor
from dalle_fast.data.sources import Loader, Sample, open_source
from dalle_fast.models.dvae import DVAE, DVAEConfig, DVAELoss
from dalle_fast.training.code_usage import CodeUsage
from dalle_fast.training.loop import Outcome, RunConfig, Task, check_update_rule, choose_device, resume_point, train
from dalle_fast.training.precision import check_same_precision, make_optimizer
from dalle_fast.training.schedules import half_cosine, warmup_cosine

__all__ = ["TrainDVAEConfig", "train_dvae"]

_PREVIEWS = 8  # images in the periodic grid, each above its reconstruction


@dataclass(frozen=True)
class TrainDVAEConfig(RunConfig):
    """How to train a dVAE; the defaults are the paper's (appendix A.2), but for the batch of 512 on 64 GPUs."""

    steps: int = field(default=3_000_000, metadata={"help": "updates in all"})
    model: DVAEConfig = field(default_factory=DVAEConfig)
    learning_rate: float = field(default=1e-4, metadata={"help": "step size, before its half cosine"})
    final_learning_rate: float = field(default=1.25e-6, metadata={"help": "step size after it"})
    learning_rate_steps: int = field(default=1_200_000, metadata={"help": "updates from one to the other"})
    warmup_steps: int = field(default=0, metadata={"help": "updates of linear warm-up before that"})
    tau: float = field(default=1.0, metadata={"help": "temperature of the relaxation, before its half cosine"})
    final_tau: float = field(default=1 / 16, metadata={"help": "temperature after it"})
    tau_steps: int = field(default=150_000, metadata={"help": "updates from one to the other"})
    kl_weight: float = field(default=6.6, metadata={"help": "weight of the KL term after its rise from 0"})
    kl_steps: int = field(default=5_000, metadata={"help": "updates of that rise"})
    beta1: float = field(default=0.9, metadata={"help": "AdamW: decay of the running mean"})
    beta2: float = field(default=0.999, metadata={"help": "AdamW: decay of the running variance"})
    weight_decay: float = field(default=1e-4, metadata={"help": "AdamW: decoupled weight decay"})
    grad_clip: float | None = field(default=None, metadata={"help": "largest norm of the gradients, or none"})
    ema_decay: float = field(default=0.999, metadata={"help": "moving average of the weights; 0 for none"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tau", "final_tau"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("learning_rate_steps", "tau_steps", "kl_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        check_update_rule(self)


def train_dvae(data: str | Path, out: Path, config: TrainDVAEConfig, *, resume: bool = False) -> Path:
    """Train on the images at ``data`` (captions are needed but not read) and return the last checkpoint.

    Args:
        data: see :func:`dalle_fast.data.sources.open_source`.
        out: run directory.
        resume: go on from the run directory's last checkpoint.

    Raises:
        ValueError, RuntimeError, FloatingPointError: with one sentence that says what is wrong.
    """
    resume_from = resume_point(out, resume)
    if resume_from is not None:
        saved = load_config(resume_from, "dvae")
        for name, value in to_dict(config.model).items():
            check_match(name, saved["model"].get(name), value, resume_from)
        check_same_precision(saved.get("train", {}).get("precision"), config.precision, resume_from)
    torch.manual_seed(config.seed)
    device = choose_device(config.device)
    model = DVAE(config.model).to(device, memory_format=torch.channels_last)
    size = config.model.image_size
    usage = CodeUsage(config.model.vocab_size, device)

    def transform(sample: Sample, rng: np.random.Generator) -> tuple[Tensor]:
        return (to_tensor(augment_for_dvae(decode_image(sample.image), size, rng)),)

    def forward(batch: tuple[Tensor, ...], step: int) -> Outcome:
        images = batch[0].contiguous(memory_format=torch.channels_last)
        tau = half_cosine(step, config.tau, config.final_tau, config.tau_steps)
        kl_weight = half_cosine(step, 0.0, config.kl_weight, config.kl_steps)
        loss = model.loss(images, tau, kl_weight)
        scalars = {
            "reconstruction": loss.reconstruction,
            "kl": loss.kl,
            "tau": tau,
            "kl_weight": kl_weight,
        }
        usage.update(step, loss.indices)
        if config.logs(step):
            scalars |= _errors(model, images, loss)
            scalars |= usage.scalars()
        return Outcome(loss.total, scalars)

    loader = Loader(
        open_source(data),
        transform,
        config.batch_size,
        seed=config.seed,
        num_workers=config.num_workers,
        max_bad_share=config.max_bad_share,
    )

    @functools.cache
    def shown() -> Tensor:
        return _first_images(data, size).to(device)

    def preview() -> dict[str, Tensor]:
        pairs = torch.stack([shown(), model.decode(model.encode(shown()))], dim=1)
        return {"reconstructions": pairs.flatten(0, 1)}

    optimizer, scaler = make_optimizer(model, [{"params": list(model.parameters())}], config)
    task = Task(
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        loader=loader,
        forward=forward,
        learning_rate=lambda step: warmup_cosine(
            step,
            config.learning_rate,
            config.final_learning_rate,
            config.warmup_steps,
            config.warmup_steps + config.learning_rate_steps,
        ),
        config={
            "kind": "dvae",
            "dalle_fast": __version__,
            "model": to_dict(config.model),
            "train": {name: value for name, value in to_dict(config).items() if name != "model"},
        },
        counters={"code_usage": usage.counts},
        grad_clip=config.grad_clip,
        ema_decay=config.ema_decay,
        preview=preview,
    )
    return train(task, config, Path(out), resume_from=resume_from, description="dVAE")


def _errors(model: DVAE, images: Tensor, loss: DVAELoss) -> dict[str, Tensor]:
    """Squared errors of a batch's reconstructions, from the weights and the noise of its loss; no gradients.

    Returns:
        ``mse`` of the relaxed codes, ``hard_mse`` of the codes drawn by the same noise, ``gap``, the second minus the
        first, and ``token_mse`` of the likeliest codes, which stage two reads.
    """
    relaxed, hard, tokens = (
        (reconstruction - images).square().mean()
        for reconstruction in (loss.images, model.decode(loss.indices), model.decode(model.encode(images)))
    )
    return {"mse": relaxed, "hard_mse": hard, "gap": hard - relaxed, "token_mse": tokens}


def _first_images(data: str | Path, size: int) -> Tensor:
    """A few images of the data, (N, 3, size, size): always the same ones, to see them get better."""

    def transform(sample: Sample, rng: np.random.Generator) -> tuple[Tensor]:
        return (to_tensor(center_crop(decode_image(sample.image), size)),)

    loader = Loader(open_source(data), transform, _PREVIEWS, seed=0, shuffle=False, max_bad_share=1, drop_last=False)
    return next(iter(loader))[0]
