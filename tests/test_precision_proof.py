"""The mechanism of benchmarks/precision_proof.py on a network that trains in seconds."""

import math
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the tests run without the source tree", allow_module_level=True)
sys.path.append(str(BENCHMARKS))

import precision_proof  # noqa: E402
from precision_proof import WAYS, Problem  # noqa: E402

SMALL = Problem(depth=4, width=16, side=4, batch=16, updates=60, warmup=10)


def halves(values):
    middle = len(values) // 2
    return values[:middle], values[middle:]


@pytest.fixture(scope="module")
def trained():
    return {name: precision_proof.train(SMALL, way) for name, way in WAYS.items() if not way.adamw16}


def test_a_global_scale_flushes_the_second_half_and_leaves_it_untrained(trained):
    found = trained["fp16 global"][1]
    first, second = halves(found["flushed"])
    assert max(first) < 0.05 and min(second) > 0.99
    first, second = halves(found["moved"])
    assert min(first) > 0.05 and max(second) < 1e-3


@pytest.mark.parametrize("name", ["fp32", "fp16 resblock", "bf16"])
def test_the_others_flush_nothing_and_train_every_block(trained, name):
    found = trained[name][1]
    assert max(found["flushed"]) < 0.05 and min(found["moved"]) > 0.05
    assert found["final_loss"]["second"] < trained["fp16 global"][1]["final_loss"]["second"]


def test_scales_settle_apart(trained):
    found = trained["fp16 resblock"][1]
    first, second = halves(found["log2_scales"][-1])
    assert max(first) < min(second)
    assert 0 < len(found["skipped"]) < SMALL.updates / 2


def test_no_global_scale_fits_both_halves(trained):
    found = precision_proof.sweep(SMALL, trained["fp32"][0], precision_proof.SWEEP)
    assert found["first_overflow"][-1] and not found["first_overflow"][0]
    assert found["second_flushed"][0] == 1.0 and found["second_flushed"][-1] < 0.5
    for flushed, overflow in zip(found["second_flushed"], found["first_overflow"], strict=True):
        assert overflow or flushed > 0.9


def test_runs_repeat(trained):
    again = precision_proof.train(SMALL, WAYS["fp16 resblock"])[1]
    first = trained["fp16 resblock"][1]
    assert {key: first[key] for key in first if key != "seconds"} == {
        key: again[key] for key in again if key != "seconds"
    }


def test_targets_are_the_table_and_the_chain_where_no_noise_is():
    quiet = Problem(noise=0.0)
    tokens, first, second = precision_proof.make_batch(quiet, 3, 0)
    current = tokens[:, quiet.text_len :]
    assert torch.equal(first, (5 * current + 3) % quiet.vocab) and torch.equal(first[:, :-1], current[:, 1:])
    entries = {}
    for token, position, target in zip(
        current.flatten().tolist(), list(range(quiet.image_len)) * 3, second.flatten().tolist(), strict=True
    ):
        entries.setdefault((token, position % quiet.side % quiet.columns), set()).add(target)
    assert all(len(targets) == 1 for targets in entries.values())


def test_files(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(precision_proof, "SWEEP", range(0, 2))
    results = precision_proof.prove(Problem(depth=1, width=8, side=4, batch=2, updates=40, warmup=2))
    precision_proof.write(results, tmp_path)
    assert (tmp_path / "precision_proof.png").read_bytes().startswith(b"\x89PNG")
    assert results["ways"].keys() == WAYS.keys()
    assert all(math.isfinite(way["final_loss"]["second"]) for way in results["ways"].values())
