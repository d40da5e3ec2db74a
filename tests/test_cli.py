"""The command line: each command end to end, every configuration field a flag, one line for every error."""

import argparse
import dataclasses
import json
import re
import shutil
import typing

import numpy as np
import pytest
from PIL import Image

import dalle_fast
from dalle_fast.checkpoint import latest_checkpoint, load_config
from dalle_fast.cli import _make_parser, main
from dalle_fast.config import from_dict
from dalle_fast.pipeline import Pipeline
from dalle_fast.training.dvae import TrainDVAEConfig
from dalle_fast.training.log import read_log
from dalle_fast.training.presets import DVAE_PRESETS, PRIOR_PRESETS
from dalle_fast.training.prior import TrainConfig

CAPTION = "a small red circle at the top left on a white background"


def flags(**values):
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


COMMON = ["--no-tensorboard", *flags(steps=2, batch_size=4, log_every=1, images_every=0, device="cpu", num_workers=0)]
TINY_DVAE = flags(
    model_image_size=16,
    model_vocab_size=12,
    model_hidden=8,
    model_codebook_dim=6,
    model_groups=3,
    model_blocks_per_group=1,
)
TINY_DALLE = flags(model_text_vocab_size=280, model_text_len=24, model_depth=2, model_width=16, model_heads=2)
COMMANDS = {
    "demo": [],
    "data shapes": ["OUT"],
    "data emoji": ["OUT"],
    "data encode": ["DVAE", "DATA", "OUT"],
    "train-dvae": ["DATA", "OUT"],
    "train": ["DATA", "OUT"],
    "sample": ["CKPT", "CAPTION"],
    "info": [],
}


def run(*words):
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set, a dVAE and a transformer, each made by its command."""
    folder = tmp_path_factory.mktemp("cli")
    assert run("data", "shapes", folder / "data", "--train", 8, "--heldout", 2, "--size", 16) == 0
    assert run("train-dvae", folder / "data" / "train", folder / "dvae", *COMMON, *TINY_DVAE) == 0
    assert (
        run("train", folder / "data" / "train", folder / "dalle", "--dvae", folder / "dvae", *COMMON, *TINY_DALLE) == 0
    )
    return folder


def error_of(capsys, *words):
    """The line on stderr of a command that fails."""
    capsys.readouterr()
    assert run(*words) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("dalle-fast: error: ")
    return lines[0].removeprefix("dalle-fast: error: ")


def test_data_shapes(folder):
    assert len(list((folder / "data" / "train").glob("*.png"))) == 8
    assert len(list((folder / "data" / "heldout").glob("*.png"))) == 2
    assert Image.open(folder / "data" / "train" / "000000.png").size == (16, 16)


def test_train_dvae(folder):
    config = load_config(latest_checkpoint(folder / "dvae"), "dvae")
    assert config["step"] == 2
    assert config["model"]["hidden"] == 8
    assert config["train"]["batch_size"] == 4
    assert len(read_log(folder / "dvae" / "log.jsonl")) == 2
    assert not (folder / "dvae" / "tensorboard").exists()


def test_train(folder):
    """The image side of the model follows from the dVAE without a word."""
    config = load_config(latest_checkpoint(folder / "dalle"), "dalle")
    assert (config["model"]["grid"], config["model"]["image_vocab_size"]) == ([4, 4], 12)
    assert Pipeline.from_pretrained(folder / "dalle").dalle.config.depth == 2


def test_sample(folder, tmp_path, capsys):
    out = tmp_path / "new" / "grid.png"
    options = ["--seed", 3, "--temperature", 0.9, "--top-k", 8, "--top-p", 0.9, "--device", "cpu"]
    assert run("sample", folder / "dalle", CAPTION, "-n", 4, "-o", out, *options) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert Image.open(out).size == (2 * 18 + 2, 2 * 18 + 2)
    again = tmp_path / "again.png"
    assert run("sample", folder / "dalle", CAPTION, "-n", 4, "-o", again, *options) == 0
    assert out.read_bytes() == again.read_bytes()
    assert run("sample", folder / "dalle", CAPTION, "-n", 4, "-o", again, "--seed", 4) == 0
    assert not np.array_equal(np.asarray(Image.open(out)), np.asarray(Image.open(again)))


def test_data_encode_and_train(folder, tmp_path, capsys):
    """Encode, train on the shards, sample; the same command again has nothing left to do."""
    words = ["data", "encode", folder / "dvae", folder / "data" / "train", tmp_path / "tokens", "--device", "cpu"]
    for _ in range(2):
        assert run(*words, "--copies", 2, "--shard-size", 5, "--batch-size", 2) == 0
        captured = capsys.readouterr()
        assert captured.out == f"{tmp_path / 'tokens'}: 8 images in 2 shards, 0 skipped\n"
        assert captured.err == ""  # no progress bar where there is no terminal
    assert run("train", tmp_path / "tokens", tmp_path / "dalle", "--dvae", folder / "dvae", *COMMON, *TINY_DALLE) == 0
    assert run("train", tmp_path / "tokens", tmp_path / "dalle", "--resume", "--steps", 3) == 0
    assert run("sample", tmp_path / "dalle", CAPTION, "-n", 1, "-o", tmp_path / "out.png") == 0
    assert Image.open(tmp_path / "out.png").size == (20, 20)


def test_data_encode_says_what_it_skipped(folder, tmp_path, capsys):
    data = shutil.copytree(folder / "data" / "train", tmp_path / "data")
    (data / "000003.txt").write_text(" ")
    words = ["data", "encode", folder / "dvae", data, tmp_path / "tokens", "--device", "cpu"]
    assert error_of(capsys, *words).startswith("at most 5% of samples may be bad, got 1 of 8")
    message = error_of(capsys, "train", tmp_path / "tokens", tmp_path / "out", "--dvae", folder / "dvae", *TINY_DALLE)
    assert message.startswith(f"token shards at {tmp_path / 'tokens'} are not finished, 0 samples so far")
    assert run(*words, "--max-bad-share", 0.5) == 0
    assert capsys.readouterr().out.endswith(": 7 images in 1 shards, 1 skipped (empty caption 1)\n")
    message = error_of(capsys, *words, "--seed", 1)
    assert message == f"token shards at {tmp_path / 'tokens'} were begun with seed 0, got 1"
    message = error_of(capsys, "train-dvae", tmp_path / "tokens", tmp_path / "out", *TINY_DVAE)
    assert (
        message
        == f"path must hold images or .tar shards, got token shards, which only train reads: {tmp_path / 'tokens'}"
    )


def test_info(capsys):
    assert run("info") == 0
    out = capsys.readouterr().out
    assert out.startswith("torch ")
    assert "_C " in out


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"dalle_fast {dalle_fast.__version__}\n"


@pytest.mark.parametrize("command", ["", "data", *COMMANDS])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*command.split(), "--help")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: dalle-fast {command}".rstrip())
    for argument in COMMANDS.get(command, []):
        assert argument in out


def test_no_command(capsys):
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def parser_of(command):
    parsers = next(a for a in _make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return parsers.choices[command]


def flags_of(config_class, prefix="--"):
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            yield from flags_of(hints[field.name], f"{name}-")
        else:
            yield name, field


@pytest.mark.parametrize(("command", "config_class"), [("train-dvae", TrainDVAEConfig), ("train", TrainConfig)])
def test_every_field_is_a_flag_with_help(command, config_class):
    flags = dict(flags_of(config_class))
    options = {option: action for action in parser_of(command)._actions for option in action.option_strings}
    assert len(flags) > 20
    for flag, field in flags.items():
        assert flag in options
        assert len(field.metadata["help"]) > 10
        assert field.metadata["help"] in options[flag].help.replace("%%", "%")


@pytest.mark.parametrize("presets", [DVAE_PRESETS, PRIOR_PRESETS])
def test_the_paper_is_the_first_preset(presets):
    assert next(iter(presets)) == "paper"
    assert presets["paper"] == type(presets["paper"])()


@pytest.mark.parametrize("preset", DVAE_PRESETS)
def test_presets(preset, folder, tmp_path):
    """Flags lie over the preset's values."""
    out = tmp_path / "out"
    assert run("train-dvae", folder / "data" / "train", out, "--preset", preset, *COMMON, *TINY_DVAE) == 0
    saved = load_config(latest_checkpoint(out), "dvae")["train"]
    expected = DVAE_PRESETS[preset]
    assert saved["kl_weight"] == expected.kl_weight
    assert saved["final_learning_rate"] == expected.final_learning_rate
    assert saved["steps"] == 2


def test_resume_takes_the_saved_configuration_and_flags_override_it(folder, tmp_path):
    data, out = folder / "data" / "train", tmp_path / "dvae"
    assert run("train-dvae", data, out, *COMMON, *TINY_DVAE, "--kl-weight", 1.5, "--learning-rate", "1e-3") == 0
    assert run("train-dvae", data, out, "--resume", "--steps", 3, "--learning-rate", "2e-3") == 0
    config = load_config(latest_checkpoint(out), "dvae")
    saved = from_dict(TrainDVAEConfig, config["train"] | {"model": config["model"]})
    assert (saved.steps, saved.learning_rate, saved.kl_weight, saved.batch_size) == (3, 2e-3, 1.5, 4)
    assert saved.model.hidden == 8
    assert [record["step"] for record in read_log(out / "log.jsonl")] == [0, 1, 2]


def test_resume_of_the_transformer_needs_no_dvae(folder, tmp_path):
    data, out = folder / "data" / "train", tmp_path / "dalle"
    assert run("train", data, out, "--dvae", folder / "dvae", *COMMON, *TINY_DALLE) == 0
    assert run("train", data, out, "--resume", "--steps", 3) == 0
    config = load_config(latest_checkpoint(out), "dalle")
    assert (config["step"], config["train"]["batch_size"], config["model"]["depth"]) == (3, 4, 2)


def test_train_without_dvae(folder, tmp_path, capsys):
    message = error_of(capsys, "train", folder / "data" / "train", tmp_path / "out")
    assert message == "--dvae must name the run or checkpoint of a dVAE, got none"


def test_flags_that_contradict_the_dvae(folder, tmp_path, capsys):
    words = ["train", folder / "data" / "train", tmp_path / "out", "--dvae", folder / "dvae", *COMMON, *TINY_DALLE]
    message = error_of(capsys, *words, "--model-grid", "8x8")
    assert message == "grid must equal the dVAE's grid, got (8, 8) and (4, 4)"
    message = error_of(capsys, *words, "--model-image-vocab-size", 99)
    assert message == "image_vocab_size must equal the dVAE's vocab_size, got 99 and 12"


def test_resume_errors(folder, tmp_path, capsys):
    data = folder / "data" / "train"
    for command in ("train-dvae", "train"):
        assert error_of(capsys, command, data, tmp_path, "--resume").startswith(f"no checkpoint at {tmp_path}")
    message = error_of(capsys, "train-dvae", data, folder / "dvae")
    assert message == f"{folder / 'dvae'} already holds checkpoints; pass --resume to go on, or name another folder"
    message = error_of(capsys, "train-dvae", data, folder / "dvae", "--resume", "--steps", 9, "--model-hidden", 12)
    assert message.startswith("hidden of checkpoint")
    assert message.endswith("is 8, expected 12")
    message = error_of(capsys, "train", data, folder / "dvae", "--resume")
    assert message.endswith("is of kind dvae, expected dalle")


def test_a_saved_pipeline_cannot_be_resumed(folder, tmp_path, capsys):
    Pipeline.from_pretrained(folder / "dalle").save_pretrained(tmp_path / "saved")
    message = error_of(capsys, "train", folder / "data" / "train", tmp_path / "saved", "--resume")
    assert message == f"checkpoint {tmp_path / 'saved'} cannot be resumed: config.json lacks the field train"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-p", "0"], "top_p must be in (0, 1], got 0.0"),
        (["--top-k", "0"], "top_k must be >= 1, got 0"),
        (["--temperature", "-1"], "temperature must be finite and >= 0, got -1.0"),
        (["-n", "0"], "num_images must be >= 1, got 0"),
    ],
)
def test_sampling_errors(folder, tmp_path, capsys, options, message):
    assert error_of(capsys, "sample", folder / "dalle", "a circle", "-o", tmp_path / "out.png", *options) == message
    assert not (tmp_path / "out.png").exists()


def test_empty_prompt(folder, tmp_path, capsys):
    assert (
        error_of(capsys, "sample", folder / "dalle", " ", "-o", tmp_path / "o.png")
        == "prompt must not be empty, got ' '"
    )


def test_checkpoint_errors(folder, tmp_path, capsys):
    assert error_of(capsys, "sample", tmp_path / "none", CAPTION).startswith(f"no checkpoint at {tmp_path / 'none'}")
    assert error_of(capsys, "sample", folder / "dvae", CAPTION).endswith("is of kind dvae, expected dalle")
    Pipeline.from_pretrained(folder / "dalle").save_pretrained(tmp_path / "saved")
    config = tmp_path / "saved" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"format_version": 7}))
    assert "has format version 7, this dalle_fast reads up to 1" in error_of(
        capsys, "sample", tmp_path / "saved", CAPTION
    )


def test_image_format_that_is_not_there(folder, tmp_path, capsys):
    message = error_of(capsys, "sample", folder / "dalle", CAPTION, "-n", 1, "-o", tmp_path / "out.nonsense")
    assert "nonsense" in message


def test_data_errors(folder, tmp_path, capsys):
    assert (
        error_of(capsys, "data", "shapes", tmp_path / "out", "--size", 15)
        == "size must be an even number >= 16, got 15"
    )
    message = error_of(capsys, "data", "shapes", folder / "data", "--train", 1, "--heldout", 0)
    assert message == f"out must be a new or empty folder, got {folder / 'data'}"
    (tmp_path / "empty").mkdir()
    message = error_of(capsys, "train-dvae", tmp_path / "empty", tmp_path / "out", *COMMON, *TINY_DVAE)
    assert "got a folder with neither" in message
    message = error_of(capsys, "train-dvae", folder / "data" / "train", tmp_path / "out", *TINY_DVAE, "--batch-size", 9)
    assert message == "batch_size must be at most the number of usable samples, got batch_size 9 with 8 samples"


def test_configuration_errors(folder, tmp_path, capsys):
    words = ["train-dvae", folder / "data" / "train", tmp_path / "out"]
    assert error_of(capsys, *words, "--tau", 0) == "tau must be > 0, got 0.0"
    assert error_of(capsys, *words, "--steps", 0) == "steps must be >= 1, got 0"
    assert error_of(capsys, *words, "--model-hidden", 6) == "hidden must be a multiple of 4, got 6"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train-dvae", "DATA", "OUT", "--steps", "many"], "argument --steps: must be int, got 'many'"),
        (["train", "DATA", "OUT", "--model-layout", "dense"], "argument --model-layout: must be {dalle,dalle-pytorch,"),
        (["data", "emoji", "OUT"], "the following arguments are required: --font"),
        (["sample", "CKPT"], "the following arguments are required: CAPTION"),
        (["train-dvae", "DATA", "OUT", "--learningrate", "1"], "unrecognized arguments: --learningrate 1"),
    ],
)
def test_usage_errors(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_traceback_on_request(tmp_path):
    with pytest.raises(ValueError, match="size must be an even number"):
        run("--traceback", "data", "shapes", tmp_path / "out", "--size", 15)


def test_control_c(folder, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("dalle_fast.data.shapes.write_shapes", interrupt)
    assert run("data", "shapes", tmp_path / "out") == 130
    assert capsys.readouterr().err == "dalle-fast: interrupted\n"


def test_only_what_can_be_expected_is_caught(tmp_path, monkeypatch):
    """A fault of the program itself keeps its traceback."""

    def fault(*args, **options):
        raise AssertionError("a bug")

    monkeypatch.setattr("dalle_fast.data.shapes.write_shapes", fault)
    with pytest.raises(AssertionError, match=re.escape("a bug")):
        run("data", "shapes", tmp_path / "out")


def test_a_caption_that_is_too_long(folder, tmp_path, capsys):
    words = ["sample", folder / "dalle", CAPTION * 9, "-n", 1, "-o", tmp_path / "out.png"]
    assert re.fullmatch(r"the caption has \d+ tokens, and this model reads \d+", error_of(capsys, *words, "--strict"))
    assert run(*words) == 0
    assert re.search(r"^warning: the caption has \d+ tokens.*; the rest is cut$", capsys.readouterr().err, re.M)


def test_an_image_format_that_cannot_be_written(folder, tmp_path, capsys):
    message = error_of(capsys, "sample", folder / "dalle", CAPTION, "-o", tmp_path / "out.xyz")
    assert message == f"--out must end in the suffix of an image format, got {tmp_path / 'out.xyz'}"
