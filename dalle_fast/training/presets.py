"""Sizes and schedules to start from: the paper's, and two that two CPU cores train in minutes."""

from __future__ import annotations

import dataclasses
import math

from dalle_fast.models.dvae import DVAEConfig
from dalle_fast.models.transformer import DalleConfig
from dalle_fast.training.dvae import TrainDVAEConfig
from dalle_fast.training.prior import TrainConfig

__all__ = ["DVAE_PRESETS", "PRIOR_PRESETS"]

# A dVAE this small has few updates to learn in: squared error and larger initial codes and logits let it find edges
# and use many codes within minutes, where the paper's choices take hundreds of thousands of updates.
_SHAPES_DVAE = TrainDVAEConfig(
    model=DVAEConfig(
        image_size=32,
        vocab_size=256,
        hidden=32,
        codebook_dim=32,
        groups=3,
        likelihood="normal",
        log_scale=math.log(0.1),
        residual_gain=0.3,
        codebook_std=1.0,
        logit_gain=2.0,
    ),
    steps=3300,
    batch_size=8,
    learning_rate=6e-3,
    final_learning_rate=1e-4,
    learning_rate_steps=3280,
    warmup_steps=20,
    tau_steps=2900,
    kl_weight=1.0,
    kl_steps=400,
    beta2=0.99,
    grad_clip=1.0,
    ema_decay=0.99,
    num_workers=0,
)

_SHAPES_PRIOR = TrainConfig(
    # Each word is one token, 21 a caption at most. BPE dropout would split words in more ways than so short a run can
    # learn to read.
    model=DalleConfig(text_vocab_size=400, text_len=22, depth=4, width=128, heads=4, init_scale=0.5),
    bpe_dropout=0.0,
    # Where two shapes are of two colours is learned last, and when is luck: after 4000 updates some runs have not.
    steps=6000,
    batch_size=8,
    learning_rate=2e-3,
    warmup_steps=100,
    decay="cosine",
    final_learning_rate=2e-5,
    grad_clip=1.0,
    ema_every=1,
    num_workers=0,
)

DVAE_PRESETS = {
    "paper": TrainDVAEConfig(),
    "shapes": _SHAPES_DVAE,
    "emoji": dataclasses.replace(
        _SHAPES_DVAE,
        model=dataclasses.replace(_SHAPES_DVAE.model, vocab_size=512, codebook_dim=64),
        kl_weight=0.5,
    ),
}

PRIOR_PRESETS = {
    "paper": TrainConfig(),
    "shapes": _SHAPES_PRIOR,
    "emoji": dataclasses.replace(
        _SHAPES_PRIOR, steps=4000, model=dataclasses.replace(_SHAPES_PRIOR.model, text_vocab_size=1500, text_len=24)
    ),
}
