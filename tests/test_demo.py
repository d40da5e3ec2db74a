"""The demo from data set to metrics, with models too small and runs too short to learn anything."""

import dataclasses
import json
import shlex

import pytest
import torch
from helpers import FONT_PATH
from PIL import Image

from dalle_fast import demo
from dalle_fast.cli import main
from dalle_fast.data import emoji
from dalle_fast.demo import run_demo
from dalle_fast.training.presets import DVAE_PRESETS, PRIOR_PRESETS


@pytest.fixture
def tiny_shapes(monkeypatch):
    dvae, prior = DVAE_PRESETS["shapes"], PRIOR_PRESETS["shapes"]
    short = {"steps": 3, "batch_size": 4, "log_every": 1, "images_every": 0, "tensorboard": False}
    tiny_dvae = dataclasses.replace(dvae.model, hidden=8, vocab_size=16, codebook_dim=4)
    tiny_dalle = dataclasses.replace(prior.model, depth=2, width=16, heads=2)
    monkeypatch.setitem(DVAE_PRESETS, "shapes", dataclasses.replace(dvae, model=tiny_dvae, **short))
    monkeypatch.setitem(PRIOR_PRESETS, "shapes", dataclasses.replace(prior, model=tiny_dalle, **short))
    monkeypatch.setattr(demo, "SHAPES_TRAIN", 24)
    monkeypatch.setattr(demo, "SHAPES_HELDOUT", 6)


def test_demo_writes_pictures_and_metrics_and_replaces_an_earlier_one(tmp_path, tiny_shapes):
    out, lines = tmp_path / "demo", []
    metrics = run_demo("shapes", out, echo=lines.append)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert set(metrics["heldout_attributes"]) == {"count", "position", "form", "colour", "size", "background"}
    assert 0 <= metrics["heldout_exact"] <= min(metrics["heldout_attributes"].values())
    assert metrics["exact_of_drawings"] == 1
    assert metrics["dvae_mse"] > 0 and metrics["dvae_codes_in_use"] >= 1
    assert 0 < metrics["train_seconds"] < metrics["total_seconds"]
    for picture in ("reconstructions.png", "samples.png", "curves.png"):
        with Image.open(out / picture) as image:
            assert min(image.size) > 50
    assert any(line.startswith("heldout_exact") for line in lines)

    command = next(line for line in lines if line.startswith("your own: ")).removeprefix("your own: ")
    assert main(shlex.split(command)[1:]) == 0
    assert (out / "mine.png").exists()

    again = run_demo("shapes", out, echo=lines.append)
    assert again["dvae_mse"] == metrics["dvae_mse"]


def test_demo_leaves_a_foreign_folder_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"^out must be new, empty or an earlier demo's folder, got "):
        run_demo("shapes", tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_demo_needs_a_font_for_emoji(tmp_path):
    with pytest.raises(ValueError, match=r"^the emoji demo needs a colour emoji font.*--font PATH"):
        run_demo("emoji", tmp_path / "demo")


def test_demo_refuses_unknown_data(tmp_path):
    with pytest.raises(ValueError, match=r"^data must be shapes or emoji, got 'birds'$"):
        run_demo("birds", tmp_path / "demo")


def test_rank_counts_nearer_entries():
    gallery = torch.tensor([[0.0], [1.0], [2.0]])
    assert demo._rank(torch.tensor([[0.1], [0.1], [1.9]]), gallery, torch.tensor([0, 1, 0])).tolist() == [0, 1, 2]
    assert demo._rank(torch.full((1, 1), torch.nan), gallery, torch.tensor([0])).tolist() == [3]


def test_demo_refuses_a_file(tmp_path):
    (tmp_path / "demo").write_text("mine")
    with pytest.raises(ValueError, match=r"^out must be new, empty or an earlier demo's folder, got "):
        run_demo("shapes", tmp_path / "demo")


def test_demo_of_emoji_without_the_font_keeps_an_earlier_demo(tmp_path):
    (tmp_path / ".dalle-fast-demo").touch()
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="fonts-noto-color-emoji"):
        run_demo("emoji", tmp_path, font=tmp_path / "none.ttf")
    assert (tmp_path / "metrics.json").exists()


@pytest.mark.skipif(FONT_PATH is None, reason="Noto Color Emoji is not installed here")
def test_demo_of_emoji(tmp_path, tiny_shapes, monkeypatch):
    monkeypatch.setitem(DVAE_PRESETS, "emoji", DVAE_PRESETS["shapes"])
    prior = PRIOR_PRESETS["shapes"]
    monkeypatch.setitem(PRIOR_PRESETS, "emoji", prior)
    names = emoji.emoji_names()
    few = dict(list(names.items())[::40])
    people = {text: name for text, name in names.items() if "firefighter" in name or "artist" in name}
    monkeypatch.setattr(emoji, "emoji_names", lambda: few | people)
    metrics = run_demo("emoji", tmp_path / "demo", font=FONT_PATH, echo=lambda line: None)
    assert metrics["gallery"] > metrics["heldout_captions"] >= 1
    assert 0 <= metrics["retrieval_top1"] <= metrics["retrieval_top5"] <= 1
    assert 1 <= metrics["retrieval_median_rank"] <= metrics["gallery"]
    assert metrics["retrieval_by_chance"] == 1 / metrics["gallery"]
