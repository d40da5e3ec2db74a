"""What all benchmarks share: the machine, fixed random numbers, preset sizes, and no timing of a wrong result.

    pytest benchmarks --benchmark-only
    OMP_NUM_THREADS=1 pytest benchmarks --benchmark-only --benchmark-json=run.json

The number of threads is the caller's; it is recorded with the rest of the machine. ``report.py`` turns the JSON file
into Markdown.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import dalle_fast
from dalle_fast.ops.backends import available
from dalle_fast.training.dvae import TrainDVAEConfig
from dalle_fast.training.presets import DVAE_PRESETS, PRIOR_PRESETS
from dalle_fast.training.prior import TrainConfig, fit_to_dvae

PRESET = "shapes"

Checked = Callable[..., None]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add to the JSON what the numbers depend on besides the CPU."""
    machine_info["dalle_fast"] = dalle_fast.__version__
    machine_info["torch_cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    machine_info |= available()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def checked(benchmark: BenchmarkFixture) -> Checked:
    """Call ``checked(call, check, samples=32, ...)`` to time ``call``, once ``check`` has found its result right.

    ``check`` takes what ``call`` returns and raises AssertionError where it is wrong; then nothing is timed. The
    numbers are the work of one call, and go into the benchmark's extra info as a rate: samples_per_s.
    """

    def run(call: Callable[[], Any], check: Callable[[Any], None], **work: float) -> None:
        check(call())
        benchmark(call)
        if benchmark.stats is not None:  # None with --benchmark-disable
            for unit, amount in work.items():
                benchmark.extra_info[f"{unit}_per_s"] = amount / benchmark.stats.stats.median

    return run


@pytest.fixture
def dvae_preset() -> TrainDVAEConfig:
    """The preset of the dVAE."""
    return DVAE_PRESETS[PRESET]


@pytest.fixture
def prior_preset(dvae_preset: TrainDVAEConfig) -> TrainConfig:
    """The preset of the transformer, its image side as the dVAE has it."""
    return fit_to_dvae(PRIOR_PRESETS[PRESET], dvae_preset.model)


@pytest.fixture
def captions(prior_preset: TrainConfig) -> Callable[[int], torch.Tensor]:
    """Call ``captions(count)`` for random captions of random lengths, (count, caption_len) int64, padded."""
    vocab_size, length = prior_preset.model.text_vocab_size, prior_preset.model.caption_len

    def draw(count: int) -> torch.Tensor:
        tokens = torch.randint(1, vocab_size, (count, length))
        return tokens * (torch.arange(length) < torch.randint(1, length + 1, (count, 1)))

    return draw
