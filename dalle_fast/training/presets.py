"""Sizes and schedules to start from: the paper's, and two that two CPU cores train in minutes."""

from __future__ import annotations

from dalle_fast.models.dvae import DVAEConfig
from dalle_fast.models.transformer import DalleConfig
from dalle_fast.training.dvae import TrainDVAEConfig
from dalle_fast.training.prior import TrainConfig

__all__ = ["DVAE_PRESETS", "PRIOR_PRESETS"]

DVAE_PRESETS = {
    "paper": TrainDVAEConfig(),
    "shapes": TrainDVAEConfig(
        steps=400,
        batch_size=8,
        model=DVAEConfig(image_size=32, vocab_size=256, hidden=32, codebook_dim=32, groups=3, blocks_per_group=1),
        learning_rate=3e-3,
        final_learning_rate=1e-4,
        learning_rate_steps=400,
        warmup_steps=20,
        tau_steps=300,
        kl_weight=0.5,
        kl_steps=50,
        grad_clip=1.0,
        ema_decay=0.99,
        num_workers=0,
    ),
}
PRIOR_PRESETS = {
    "paper": TrainConfig(),
    "shapes": TrainConfig(
        steps=200,
        batch_size=32,
        model=DalleConfig(text_vocab_size=300, text_len=32, depth=4, width=128, heads=4),
        learning_rate=1e-3,
        warmup_steps=50,
        decay="cosine",
        ema_every=1,
        num_workers=0,
    ),
}
