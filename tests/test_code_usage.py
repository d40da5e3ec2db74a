"""Perplexity and counts of drawn codes, and what a dVAE's run logs of them and of its reconstructions."""

import dataclasses
import statistics

import pytest
import torch
from training_runs import DVAE_CONFIG, assert_same_checkpoint

from dalle_fast.data.shapes import write_shapes
from dalle_fast.training.code_usage import CodeUsage, perplexity
from dalle_fast.training.dvae import train_dvae
from dalle_fast.training.log import read_log


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([2, 1, 1], 2**1.5),  # entropy ln 2 / 2 + 2 * ln 4 / 4
        ([5, 0, 0], 1),
        ([3, 3, 3, 3], 4),
        ([0, 7, 7, 0], 2),
    ],
)
def test_perplexity(counts, expected):
    assert perplexity(torch.tensor(counts)).item() == pytest.approx(expected)


def test_counts_are_those_of_the_last_updates():
    usage = CodeUsage(5, window=2)
    usage.update(0, torch.tensor([[0, 1], [1, 1]]))
    assert usage.counts.sum(0).tolist() == [1, 3, 0, 0, 0]
    usage.update(1, torch.tensor([[2, 2]]))
    assert usage.counts.sum(0).tolist() == [1, 3, 2, 0, 0]
    usage.update(2, torch.tensor([[4, 2]]))
    assert usage.counts.sum(0).tolist() == [0, 0, 3, 0, 1]
    scalars = usage.scalars()
    assert scalars["codes_in_use"].item() == 2
    assert scalars["perplexity"].item() == pytest.approx(4 / 27**0.25)  # shares 3/4 and 1/4


def test_logged_numbers_are_those_of_the_models_weights(drawings, tmp_path, monkeypatch):
    """The one update's errors, from the initial weights, worked out again from what its loss returned."""
    from dalle_fast.models.dvae import DVAE

    seen, original = {}, DVAE.loss

    def loss(self, images, *args, **options):
        result = original(self, images, *args, **options)
        with torch.no_grad():
            seen.update(
                mse=(result.images - images).square().mean().item(),
                hard_mse=(self.decode(result.indices) - images).square().mean().item(),
                token_mse=(self.decode(self.logits(images).argmax(1)) - images).square().mean().item(),
                codes_in_use=result.indices.unique().numel(),
                perplexity=perplexity(result.indices.flatten().bincount()).item(),
            )
        return result

    monkeypatch.setattr(DVAE, "loss", loss)
    train_dvae(drawings, tmp_path, dataclasses.replace(DVAE_CONFIG, steps=1))
    (record,) = read_log(tmp_path / "log.jsonl")
    for name, value in seen.items():
        assert record[name] == pytest.approx(value), name
    assert record["gap"] == pytest.approx(record["hard_mse"] - record["mse"], abs=1e-6)


def test_looking_changes_nothing(drawings, tmp_path):
    """How often the errors are measured has no part in the training."""
    often = train_dvae(drawings, tmp_path / "often", dataclasses.replace(DVAE_CONFIG, steps=4, log_every=1))
    rarely = train_dvae(drawings, tmp_path / "rarely", dataclasses.replace(DVAE_CONFIG, steps=4, log_every=100))
    assert_same_checkpoint(often, rarely)
    assert read_log(tmp_path / "often" / "log.jsonl")[-1]["perplexity"] == pytest.approx(
        read_log(tmp_path / "rarely" / "log.jsonl")[-1]["perplexity"]
    )


def test_usage_goes_on_after_a_resume(drawings, tmp_path):
    config = dataclasses.replace(DVAE_CONFIG, steps=6)
    train_dvae(drawings, tmp_path / "whole", config)
    train_dvae(drawings, tmp_path / "parts", dataclasses.replace(config, steps=4))
    train_dvae(drawings, tmp_path / "parts", config, resume=True)
    whole, parts = (
        [{name: record[name] for name in ("perplexity", "codes_in_use", "gap")} for record in read_log(path)]
        for path in (tmp_path / "whole" / "log.jsonl", tmp_path / "parts" / "log.jsonl")
    )
    assert whole == parts


def test_the_gap_closes_as_the_temperature_falls(tmp_path):
    """Without the KL term the temperature is all that changes, and learning goes on meanwhile."""
    write_shapes(tmp_path / "data", train=40, heldout=0, size=16)
    model = dataclasses.replace(
        DVAE_CONFIG.model, likelihood="normal", log_scale=-2.3, residual_gain=0.3, codebook_std=1.0, logit_gain=2.0
    )
    schedule = {"steps": 100, "tau_steps": 75, "learning_rate": 3e-3, "learning_rate_steps": 1000, "kl_weight": 0.0}
    config = dataclasses.replace(DVAE_CONFIG, model=model, batch_size=8, **schedule)
    train_dvae(tmp_path / "data" / "train", tmp_path / "run", config)
    records = read_log(tmp_path / "run" / "log.jsonl")
    first, last = (
        statistics.mean(record["gap"] / record["mse"] for record in part) for part in (records[:25], records[75:])
    )
    assert records[0]["tau"] == 1 and records[75]["tau"] == 1 / 16
    assert first > 0.05
    assert abs(last) < first / 4
