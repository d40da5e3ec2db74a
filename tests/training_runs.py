"""Tiny runs of both models that several tests share: configurations, and comparisons of what a run wrote."""

import dataclasses

import torch

from dalle_fast.checkpoint import latest_checkpoint, load_config, load_training_state, load_weights
from dalle_fast.models.dvae import DVAE, DVAEConfig
from dalle_fast.models.transformer import Dalle, DalleConfig
from dalle_fast.training.dvae import TrainDVAEConfig, train_dvae
from dalle_fast.training.log import read_log
from dalle_fast.training.prior import TrainConfig, train_prior

DRAWINGS = 14  # with batches of 4, an epoch ends within each run
COMMON = {
    "batch_size": 4,
    "device": "cpu",
    "log_every": 1,
    "images_every": 0,
    "checkpoint_every": 100,
    "tensorboard": False,
    "ema_decay": 0.9,
}
DVAE_CONFIG = TrainDVAEConfig(
    **COMMON,
    model=DVAEConfig(image_size=16, vocab_size=12, hidden=8, codebook_dim=6, groups=3, blocks_per_group=1),
    learning_rate=1e-2,
    learning_rate_steps=20,
    warmup_steps=2,
    tau_steps=10,
    kl_steps=5,
    grad_clip=1.0,
)
PRIOR_CONFIG = TrainConfig(
    **COMMON,
    model=DalleConfig(
        text_vocab_size=280, image_vocab_size=12, text_len=24, grid=(4, 4), depth=2, width=16, heads=2, dropout=0.1
    ),
    learning_rate=1e-2,
    warmup_steps=2,
    plateau_window=2,
    ema_every=3,
)


class Run:
    """Trains either model: Run("dvae", ...)(out, resume=False, **changes of the configuration)."""

    def __init__(self, kind, data, dvae_run):
        self.kind, self.model = kind, DVAE if kind == "dvae" else Dalle
        self._data, self._dvae_run = data, dvae_run

    def __call__(self, out, *, resume=False, **changes):
        if self.kind == "dvae":
            return train_dvae(self._data, out, dataclasses.replace(DVAE_CONFIG, **changes), resume=resume)
        config = dataclasses.replace(PRIOR_CONFIG, **changes)
        if resume:
            # As the command line does: the tokenizer has fixed the size of the vocabulary.
            saved = load_config(latest_checkpoint(out), "dalle")["model"]
            model = dataclasses.replace(config.model, text_vocab_size=saved["text_vocab_size"])
            config = dataclasses.replace(config, model=model)
        return train_prior(self._data, out, self._dvae_run, config, resume=resume)


def assert_same(left, right, path="state"):
    """Equal structure, types and bits."""
    assert type(left) is type(right), path
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, path
        assert torch.equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for name in left:
            assert_same(left[name], right[name], f"{path}.{name}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{path}[{index}]")
    else:
        assert left == right, path


def assert_same_checkpoint(left, right):
    """Weights, average, and the whole training state: optimiser, place in the data, random numbers, plateau."""
    for ema in (False, True):
        assert_same(load_weights(left, ema=ema), load_weights(right, ema=ema), f"ema={ema}")
    assert_same(load_training_state(left), load_training_state(right))


def losses(out):
    return [(record["step"], record["loss"]) for record in read_log(out / "log.jsonl")]


def call_at(monkeypatch, model, call, action):
    """Run action within the loss of the call-th update from now on."""
    original, calls = model.loss, []

    def loss(self, *args, **options):
        calls.append(None)
        if len(calls) == call:
            action()
        return original(self, *args, **options)

    monkeypatch.setattr(model, "loss", loss)
