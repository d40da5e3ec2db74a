"""The proof that per-resblock gradient scaling is needed and works, timed as a whole: see precision_proof.py.

    pytest benchmarks/bench_precision.py --benchmark-only

``DALLE_FAST_PRECISION_OUT`` names a folder for the JSON file and the plot, which are not written otherwise.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import precision_proof
import pytest
import torch

OURS_WITHIN = 0.01  # of float32's final loss
GLOBAL_WORSE = 0.1


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The tensors are too small to be shared out, and a busy machine's second thread is waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.benchmark(group="training of 48 residual blocks in each precision")
def test_precision(benchmark, one_thread):
    problem = precision_proof.Problem()
    results = benchmark.pedantic(precision_proof.prove, (problem,), rounds=1, iterations=1)

    out = os.environ.get("DALLE_FAST_PRECISION_OUT")
    if out is not None:
        precision_proof.write(results, Path(out))
    for name, way in results["ways"].items():
        benchmark.extra_info[f"loss, {name}"] = way["final_loss"]["second"]
    relative = {name: way["relative_to_fp32"] for name, way in results["ways"].items()}
    assert abs(relative["fp16 resblock"]) <= OURS_WITHIN
    assert relative["fp16 global"] >= GLOBAL_WORSE
    swept = results["sweep"]
    fits = [
        exponent
        for exponent, flushed, overflow in zip(
            swept["exponent"], swept["second_flushed"], swept["first_overflow"], strict=True
        )
        if flushed < 0.5 and not overflow
    ]
    assert fits == []
