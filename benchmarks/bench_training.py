"""One update of each model at the preset's sizes: forward, backward, clipping, AdamW.

Data loading, the moving average of the weights and, for the transformer, the dVAE that makes its tokens are left out.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dalle_fast.models.dvae import DVAE
from dalle_fast.models.transformer import Dalle, DalleConfig
from dalle_fast.ops import backends
from dalle_fast.training.dvae import TrainDVAEConfig
from dalle_fast.training.prior import TrainConfig

UPDATES_TO_LEARN = 20


def make_update(
    model: nn.Module, compute_loss: Callable[[], Tensor], preset: TrainDVAEConfig | TrainConfig
) -> Callable[[], Tensor]:
    """A function that makes one update by the preset's rule and returns the loss before it."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=preset.learning_rate,
        betas=(preset.beta1, preset.beta2),
        weight_decay=preset.weight_decay,
        fused=True,
    )

    def update() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = compute_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), preset.grad_clip)
        optimizer.step()
        return loss.detach()

    return update


def must_learn(update: Callable[[], Tensor]) -> Callable[[Tensor], None]:
    """The check that updates on one and the same batch bring its loss down."""

    def check(first_loss: Tensor) -> None:
        for _ in range(UPDATES_TO_LEARN):
            loss = update()
        assert math.isfinite(loss) and loss < first_loss

    return check


@pytest.mark.benchmark(group="update of the dVAE", min_rounds=20)
def test_dvae(checked, dvae_preset):
    config, batch = dvae_preset.model, dvae_preset.batch_size
    model = DVAE(config).to(memory_format=torch.channels_last)
    images = torch.rand(batch, config.channels, config.image_size, config.image_size)
    images = images.contiguous(memory_format=torch.channels_last)
    update = make_update(model, lambda: model.loss(images, dvae_preset.tau, dvae_preset.kl_weight).total, dvae_preset)

    checked(update, must_learn(update), samples=batch, tokens=batch * config.grid**2)


def attention_share(update: Callable[[], Tensor]) -> float:
    """The part of one update's time that is spent in attention, forward and backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        update()
    seconds = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return sum(time for name, time in seconds.items() if "attention" in name) / sum(seconds.values())


ATTENTION = pytest.mark.parametrize("attention", ["sdpa_mask", "attention"])


@pytest.fixture
def chosen_attention(attention, monkeypatch):
    """Either this library's kernels, or what takes their place where they are not built: SDPA with dense masks."""
    if attention == "sdpa_mask":
        monkeypatch.setattr(backends, "extension", None)
    elif backends.extension is None:
        pytest.skip(f"dalle_fast._C is not built: {backends.extension_error}")


def time_transformer(benchmark, checked, config: DalleConfig, preset: TrainConfig, text: Tensor) -> None:
    model, batch = Dalle(config), len(text)
    image_tokens = torch.randint(config.image_vocab_size, (batch, config.image_len))
    update = make_update(model, lambda: model.loss(text, image_tokens).total, preset)

    checked(update, must_learn(update), samples=batch, tokens=batch * (config.text_states + config.image_len))
    benchmark.extra_info["attention_share"] = round(attention_share(update), 3)


@ATTENTION
@pytest.mark.benchmark(group="update of the demo's transformer", min_rounds=20)
def test_transformer(benchmark, checked, chosen_attention, prior_preset, captions):
    time_transformer(benchmark, checked, prior_preset.model, prior_preset, captions(prior_preset.batch_size))


@ATTENTION
@pytest.mark.benchmark(group="update of 4 layers, width 512, 256 + 32 x 32 positions", min_rounds=5)
def test_long_sequence(benchmark, checked, chosen_attention, prior_preset):
    config = DalleConfig(text_vocab_size=1024, image_vocab_size=1024, depth=4, width=512, heads=8)
    time_transformer(benchmark, checked, config, prior_preset, torch.randint(1, 1024, (1, config.caption_len)))
