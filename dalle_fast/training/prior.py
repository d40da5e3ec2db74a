"""Stage two: train the transformer on captions and the dVAE's tokens (``dalle-fast train``).

The tokens are those of images, augmented and encoded anew in each epoch, or come from token shards.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dalle_fast.checkpoint import check_match, load_config
from dalle_fast.config import to_dict
from dalle_fast.data.images import augment_for_transformer, decode_image, to_tensor
from dalle_fast.data.sources import Loader, Sample, open_source
from dalle_fast.data.token_shards import TokenSample, TokenSource, holds_tokens
from dalle_fast.data.tokenizer import MIN_VOCAB_SIZE, Tokenizer
from dalle_fast.models.dvae import DVAE, DVAEConfig
from dalle_fast.models.transformer import PAD_ID, Dalle, DalleConfig
from dalle_fast.pipeline import Pipeline, check_parts_match, dalle_checkpoint_config, load_dvae, save_dvae
from dalle_fast.training.encode import check_encoded_by
from dalle_fast.training.loop import Outcome, RunConfig, Task, check_update_rule, choose_device, resume_point, train
from dalle_fast.training.precision import check_same_precision, make_optimizer
from dalle_fast.training.schedules import PlateauHalving, linear_warmup, warmup_cosine

__all__ = ["TrainConfig", "fit_to_dvae", "train_prior"]

_PREVIEW_CAPTIONS, _PREVIEW_IMAGES = 4, 4


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """How to train the transformer; the defaults are the paper's (appendix B.2), but for the batch of 1024."""

    steps: int = field(default=430_000, metadata={"help": "updates in all"})
    model: DalleConfig = field(default_factory=DalleConfig)
    learning_rate: float = field(default=4.5e-4, metadata={"help": "step size after the warm-up"})
    warmup_steps: int = field(default=5000, metadata={"help": "updates of linear warm-up"})
    decay: Literal["plateau", "cosine", "none"] = field(
        default="plateau",
        metadata={"help": "plateau halves the step size where the loss stops falling (the paper)"},
    )
    plateau_window: int = field(default=2000, metadata={"help": "updates whose mean losses are compared"})
    final_learning_rate: float = field(default=1.40625e-5, metadata={"help": "where the cosine ends"})
    beta1: float = field(default=0.9, metadata={"help": "AdamW: decay of the running mean"})
    beta2: float = field(default=0.96, metadata={"help": "AdamW: decay of the running variance"})
    weight_decay: float = field(default=4.5e-2, metadata={"help": "AdamW: decoupled weight decay"})
    decayed: Literal["matrices", "all"] = field(
        default="matrices", metadata={"help": "what decays: the layers' matrices alone, or every parameter"}
    )
    grad_clip: float | None = field(default=4.0, metadata={"help": "largest norm of the gradients, or none"})
    ema_decay: float = field(default=0.99, metadata={"help": "moving average of the weights; 0 for none"})
    ema_every: int = field(default=25, metadata={"help": "updates between its steps"})
    bpe_dropout: float = field(default=0.1, metadata={"help": "share of merges left out of training captions"})
    caption_drop: float = field(
        default=0.0,
        metadata={
            "help": "share of training captions replaced by the empty one, so that guidance has an unconditional "
            "model; 0.1 is usual"
        },
    )
    strict: bool = field(default=False, metadata={"help": "refuse captions that are too long instead of cutting them"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_update_rule(self)
        if self.ema_every < 1:
            raise ValueError(f"ema_every must be >= 1, got {self.ema_every}")
        for name in ("bpe_dropout", "caption_drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


def fit_to_dvae(config: TrainConfig, dvae: DVAEConfig) -> TrainConfig:
    """The configuration with the image vocabulary and grid that follow from the dVAE's."""
    model = dataclasses.replace(config.model, image_vocab_size=dvae.vocab_size, grid=(dvae.grid, dvae.grid))
    return dataclasses.replace(config, model=model)


def train_prior(
    data: str | Path, out: Path, dvae_path: str | Path, config: TrainConfig, *, resume: bool = False
) -> Path:
    """Train on the captioned images or token shards at ``data`` and return the last checkpoint, a whole pipeline.

    A new run first trains its tokenizer on the captions; ``config.model.text_vocab_size`` is then the largest size it
    may have. A resumed run takes its dVAE and tokenizer from its checkpoint.

    Args:
        data: token shards of this dVAE, or see :func:`dalle_fast.data.sources.open_source`.
        out: run directory.
        dvae_path: run or checkpoint of the dVAE.
        resume: go on from the run directory's last checkpoint.

    Raises:
        ValueError, RuntimeError, FloatingPointError: with one sentence that says what is wrong.
    """
    out = Path(out)
    resume_from = resume_point(out, resume)
    source = TokenSource(data) if holds_tokens(data) else open_source(data)
    encoded = isinstance(source, TokenSource)
    if resume_from is None:
        dvae = load_dvae(dvae_path)
        if config.model.text_vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"text_vocab_size must be >= {MIN_VOCAB_SIZE} (256 bytes and the pad token), "
                f"got {config.model.text_vocab_size}"
            )
        captions = list(source.captions())
        if not captions:
            raise ValueError(f"data must hold at least one usable caption, got none in {source.path}")
        tokenizer = Tokenizer.train(captions, config.model.text_vocab_size)
        model_config = dataclasses.replace(config.model, text_vocab_size=tokenizer.vocab_size)
    else:
        dvae = load_dvae(resume_from / "dvae")
        tokenizer = Tokenizer.load(resume_from / "tokenizer.json")
        model_config = config.model
        saved = load_config(resume_from, "dalle")
        for name, value in to_dict(model_config).items():
            check_match(name, saved["model"].get(name), value, resume_from)
        check_match("decayed", saved.get("train", {}).get("decayed"), config.decayed, resume_from)
        check_same_precision(saved.get("train", {}).get("precision"), config.precision, resume_from)
        check_match("tokenizer_sha256", saved.get("tokenizer_sha256"), tokenizer.sha256, resume_from)
    if encoded:
        check_encoded_by(source, dvae, f"--dvae {dvae_path}" if resume_from is None else f"checkpoint {resume_from}")
    check_parts_match(dvae.config, model_config, tokenizer)

    torch.manual_seed(config.seed)
    device = choose_device(config.device)
    dvae = dvae.to(device, memory_format=torch.channels_last).requires_grad_(False)
    model = Dalle(model_config).to(device)
    size, caption_len = dvae.config.image_size, model_config.caption_len

    def transform(sample: Sample | TokenSample, rng: np.random.Generator) -> tuple[Tensor, ...]:
        if encoded:
            image = torch.from_numpy(sample.tokens)
        else:
            image = to_tensor(augment_for_transformer(decode_image(sample.image), size, rng))
        text, cut = tokenizer.encode_padded(
            sample.caption, caption_len, dropout=config.bpe_dropout, rng=rng, strict=config.strict
        )
        # The last draw, and none at all where nothing is dropped: what else is drawn for a sample stays the same.
        if config.caption_drop > 0 and rng.random() < config.caption_drop:
            text = torch.full_like(text, PAD_ID)
        return image, text, torch.tensor(cut)

    loader = Loader(
        source,
        transform,
        config.batch_size,
        seed=config.seed,
        num_workers=config.num_workers,
        max_bad_share=config.max_bad_share,
    )

    cut_captions = torch.zeros((), dtype=torch.int64, device=device)  # since this process began

    def forward(batch: tuple[Tensor, ...], step: int) -> Outcome:
        images, text, cut = batch
        cut_captions.add_(cut.sum())
        tokens = images if encoded else dvae.encode(images.contiguous(memory_format=torch.channels_last))
        loss = model.loss(text, tokens.flatten(1))
        return Outcome(loss.total, {"text_loss": loss.text, "image_loss": loss.image, "cut_captions": cut_captions})

    def learning_rate(step: int) -> float:
        if config.decay == "cosine":
            peak, final = config.learning_rate, config.final_learning_rate
            return warmup_cosine(step, peak, final, config.warmup_steps, max(config.steps, config.warmup_steps + 1))
        return linear_warmup(step, config.learning_rate, config.warmup_steps)

    optimizer, scaler = make_optimizer(model, _groups(model, config), config)
    task = Task(
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        loader=loader,
        forward=forward,
        learning_rate=learning_rate,
        config=dalle_checkpoint_config(model_config, tokenizer)
        | {"train": {name: value for name, value in to_dict(config).items() if name != "model"}},
        files=_write_parts(out, dvae, tokenizer),
        plateau=PlateauHalving(window=config.plateau_window) if config.decay == "plateau" else None,
        plateau_from=config.warmup_steps,
        grad_clip=config.grad_clip,
        ema_decay=config.ema_decay,
        ema_every=config.ema_every,
        preview=_make_preview(Pipeline(dvae, model, tokenizer), source.captions(), config.seed),
    )
    return train(task, config, out, resume_from=resume_from, description="transformer")


def _groups(model: Dalle, config: TrainConfig) -> list[dict[str, Any]]:
    matrices = {module.weight for module in model.layers.modules() if isinstance(module, nn.Linear)}
    decayed = [p for p in model.parameters() if config.decayed == "all" or p in matrices]
    others = [p for p in model.parameters() if config.decayed == "matrices" and p not in matrices]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _write_parts(out: Path, dvae: DVAE, tokenizer: Tokenizer) -> dict[str, Path]:
    """Put the dVAE and the tokenizer into the run directory, from where each checkpoint links them."""
    out.mkdir(parents=True, exist_ok=True)
    # Made anew: checkpoints share the old files, and a run that never got to its first checkpoint may have left others.
    (out / "tokenizer.json").unlink(missing_ok=True)
    tokenizer.save(out / "tokenizer.json")
    if (out / "dvae").exists():
        shutil.rmtree(out / "dvae")
    save_dvae(dvae, out / "dvae")
    return {"tokenizer.json": out / "tokenizer.json", "dvae": out / "dvae"}


def _make_preview(pipeline: Pipeline, captions: Iterator[str], seed: int) -> Callable[[], dict[str, Tensor]]:
    shown = list(itertools.islice(captions, _PREVIEW_CAPTIONS))

    def preview() -> dict[str, Tensor]:
        # With a seed, so that looking at samples does not change the training run.
        return {"samples": pipeline.generate(shown, num_images=_PREVIEW_IMAGES, seed=seed).images}

    return preview
