"""What all benchmarks share: the machine, fixed random numbers, preset sizes, and no timing of a wrong result.

    pytest --benchmark-only
    OMP_NUM_THREADS=1 pytest benchmarks --benchmark-only --benchmark-json=run.json

The number of threads is the caller's; it is recorded with the rest of the machine. ``report.py`` turns the JSON file
into Markdown. Plain ``pytest`` leaves this folder alone; whoever names it or a file in it gets the benchmarks.

``DALLE_FAST_BENCH_SECONDS`` limits the run: past it, benchmarks are skipped, and the JSON file has those before.
``DALLE_FAST_COMMIT`` names the commit where the folder is not a git repository.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import dalle_fast
from dalle_fast.ops.backends import available

# The benchmarks of ops run where training's requirements are missing, so those are imported with the fixtures.
if TYPE_CHECKING:
    from dalle_fast.training.dvae import TrainDVAEConfig
    from dalle_fast.training.prior import TrainConfig

PRESET = "shapes"

Checked = Callable[..., None]


DENSE_CAUSAL = ("sdpa_causal", "flash_attn")  # ops that compute the pattern "full" and are rivals within any

_start = time.monotonic()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the benchmarks out where pytest comes here by its ``testpaths`` alone and was not asked for them."""
    by_default = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    return True if by_default and not config.getoption("benchmark_only") else None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add to the JSON what the numbers depend on besides the CPU."""
    machine_info["dalle_fast"] = dalle_fast.__version__
    machine_info["torch_cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    machine_info["cuda_runtime"] = torch.version.cuda
    machine_info["driver"] = _gpu_driver()
    machine_info |= available()


def _gpu_driver() -> str | None:
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """Take the commit from the environment where git does not know it."""
    if commit_info["id"] == "unversioned":
        commit_info["id"] = os.environ.get("DALLE_FAST_COMMIT", "unversioned")


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Give each row that names its op ``slower``: by op, how many times as long the case's other ops take."""
    cases: dict[tuple[str, ...], dict[str, float]] = {}
    rows = [row for row in output_json["benchmarks"] if "op" in row["extra_info"]]
    for row in rows:
        info = row["extra_info"]
        cases.setdefault((row["group"], info["shape"], info["pattern"]), {})[info["op"]] = row["stats"]["median"]
    for row in rows:
        info = row["extra_info"]
        dense = cases.get((row["group"], info["shape"], "full"), {})
        rivals = {op: median for op, median in dense.items() if op in DENSE_CAUSAL}
        rivals |= cases[row["group"], info["shape"], info["pattern"]]
        own = rivals.pop(info["op"])
        info["slower"] = {op: median / own for op, median in rivals.items()}


@pytest.fixture(autouse=True)
def _time_limit() -> None:
    limit = os.environ.get("DALLE_FAST_BENCH_SECONDS")
    if limit is not None and time.monotonic() - _start > float(limit):
        pytest.skip(f"the time limit of {limit} s is over")


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
def dvae_preset() -> "TrainDVAEConfig":
    """The preset of the dVAE."""
    from dalle_fast.training.presets import DVAE_PRESETS

    return DVAE_PRESETS[PRESET]


@pytest.fixture
def prior_preset(dvae_preset: "TrainDVAEConfig") -> "TrainConfig":
    """The preset of the transformer, its image side as the dVAE has it."""
    from dalle_fast.training.presets import PRIOR_PRESETS
    from dalle_fast.training.prior import fit_to_dvae

    return fit_to_dvae(PRIOR_PRESETS[PRESET], dvae_preset.model)


@pytest.fixture
def captions(prior_preset: "TrainConfig") -> Callable[[int], torch.Tensor]:
    """Call ``captions(count)`` for random captions of random lengths, (count, caption_len) int64, padded."""
    vocab_size, length = prior_preset.model.text_vocab_size, prior_preset.model.caption_len

    def draw(count: int) -> torch.Tensor:
        tokens = torch.randint(1, vocab_size, (count, length))
        return tokens * (torch.arange(length) < torch.randint(1, length + 1, (count, 1)))

    return draw
