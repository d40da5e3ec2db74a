"""The pipeline: its parts, round trips through a directory, and messages; what it draws is in test_generate.py."""

import json
import re

import pytest
import torch
from helpers import tiny_dalle, tiny_dvae, tiny_pipeline

import dalle_fast
from dalle_fast.checkpoint import CheckpointError
from dalle_fast.data.tokenizer import Tokenizer
from dalle_fast.pipeline import Pipeline, load_dvae, save_dvae

CAPTIONS = ["a red square", "a blue circle on the left", "two green crosses"]


@pytest.fixture
def pipeline():
    return tiny_pipeline(CAPTIONS)


@pytest.fixture
def tokenizer(pipeline):
    return pipeline.tokenizer


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_same_state(left, right):
    assert left.state_dict().keys() == right.state_dict().keys()
    for name, tensor in left.state_dict().items():
        assert tensor.dtype == right.state_dict()[name].dtype
        assert torch.equal(tensor, right.state_dict()[name]), name


def test_round_trip(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = Pipeline.from_pretrained(tmp_path / "saved")
    assert_same_state(loaded.dvae, pipeline.dvae)
    assert_same_state(loaded.dalle, pipeline.dalle)
    assert (loaded.dvae.config, loaded.dalle.config) == (pipeline.dvae.config, pipeline.dalle.config)
    assert loaded.tokenizer.sha256 == pipeline.tokenizer.sha256
    assert not loaded.dalle.training
    assert not loaded.dvae.training
    results = [part.generate(CAPTIONS, num_images=2, generator=seeded()) for part in (pipeline, loaded)]
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_saved_files(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "new" / "saved")
    names = {str(path.relative_to(tmp_path / "new")) for path in (tmp_path / "new").rglob("*") if path.is_file()}
    parts = ("config.json", "model.safetensors", "tokenizer.json", "dvae/config.json", "dvae/model.safetensors")
    assert names == {f"saved/{part}" for part in parts}


def test_existing_directory_is_refused(pipeline, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"directory must not exist yet, got {tmp_path}")):
        pipeline.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_dvae_alone(tmp_path):
    dvae = tiny_dvae()
    save_dvae(dvae, tmp_path / "dvae")
    loaded = load_dvae(tmp_path / "dvae")
    assert_same_state(loaded, dvae)
    assert loaded.config == dvae.config


def test_to_moves_both_models(pipeline):
    assert pipeline.to("meta") is pipeline
    assert pipeline.device.type == "meta"
    assert {parameter.device.type for parameter in pipeline.dvae.parameters()} == {"meta"}


def test_top_level_names():
    assert dalle_fast.Pipeline is Pipeline
    for name in dalle_fast.__all__:
        assert getattr(dalle_fast, name) is not None
    with pytest.raises(AttributeError, match="module 'dalle_fast' has no attribute 'Pipelines'"):
        _ = dalle_fast.Pipelines


@pytest.mark.parametrize(
    ("dvae", "dalle", "message"),
    [
        ({}, {"image_vocab_size": 13}, "image_vocab_size must equal the dVAE's vocab_size, got 13 and 12"),
        ({}, {"grid": (4, 5)}, "grid must equal the dVAE's grid, got (4, 5) and (4, 4)"),
        ({"image_size": 32}, {}, "grid must equal the dVAE's grid, got (4, 4) and (8, 8)"),
        ({}, {"text_vocab_size": 300}, "text_vocab_size must equal the tokenizer's vocab_size, got 300 and 270"),
    ],
)
def test_parts_that_do_not_match(tokenizer, dvae, dalle, message):
    sizes = {"text_vocab_size": tokenizer.vocab_size, "grid": (4, 4)} | dalle
    with pytest.raises(ValueError, match=re.escape(message)):
        Pipeline(tiny_dvae(**dvae), tiny_dalle(**sizes), tokenizer)


def edit_config(path, change):
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


@pytest.fixture
def saved(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=9), "has format version 9, this dalle_fast reads up to 1; upgrade"),
        (lambda c: c.pop("model"), "config.json lacks the field model"),
        (lambda c: c.pop("kind"), "config.json lacks the field kind"),
        (lambda c: c["model"].pop("activation"), "model in config.json lacks the field activation"),
        (lambda c: c.update(kind="dvae"), "is of kind dvae, expected dalle"),
        (lambda c: c["model"].update(colour=1), "DalleConfig has no field colour"),
        (lambda c: c["model"].update(depth="4"), "DalleConfig.depth must be int, got '4'"),
        (lambda c: c["model"].update(depth=5), "lacks tensor layers.4."),
        (lambda c: c["model"].update(width=32), "has shape (16,) in"),
        (lambda c: c.pop("tokenizer_sha256"), "tokenizer_sha256 of checkpoint"),
    ],
)
def test_config_that_does_not_fit(saved, change, message):
    edit_config(saved, change)
    with pytest.raises((CheckpointError, ValueError, TypeError), match=re.escape(message)) as error:
        Pipeline.from_pretrained(saved)
    assert "\n" not in str(error.value)


def test_another_tokenizer(saved, pipeline):
    other = Tokenizer.train(["something else"], 270)
    other.save(saved / "tokenizer.json")
    message = f"tokenizer_sha256 of checkpoint {saved} is '{pipeline.tokenizer.sha256}', expected '{other.sha256}'"
    with pytest.raises(ValueError, match=re.escape(message)):
        Pipeline.from_pretrained(saved)


def test_another_dvae(saved):
    edit_config(saved / "dvae", lambda config: config["model"].update(image_size=32))
    with pytest.raises(ValueError, match=re.escape("grid must equal the dVAE's grid, got (4, 4) and (8, 8)")):
        Pipeline.from_pretrained(saved)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "dvae/model.safetensors"])
def test_missing_file(saved, name):
    (saved / name).unlink()
    with pytest.raises((CheckpointError, OSError)) as error:
        Pipeline.from_pretrained(saved)
    assert "no" in str(error.value).lower()


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        Pipeline.from_pretrained(tmp_path)
