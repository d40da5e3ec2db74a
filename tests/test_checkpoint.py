"""Checkpoints: exact round trips, survival of kills and full disks, and one sentence for every mismatch."""

import errno
import json
import math
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dalle_fast import checkpoint
from dalle_fast.checkpoint import (
    CheckpointError,
    check_match,
    latest_checkpoint,
    load_config,
    load_foreign_state_dict,
    load_model_state,
    load_training_state,
    load_weights,
    save_checkpoint,
    sha256_of,
)

CONFIG = {"kind": "dvae", "model": {"width": 4}}


def weights(value):
    return {"weight": torch.full((3, 5), float(value)), "bias": torch.arange(5) + value}


def save(out, step, **options):
    return save_checkpoint(out, step, **({"config": CONFIG, "model": weights(step)} | options))


def names(out):
    return sorted(path.name for path in out.iterdir())


def assert_same(left, right):
    """Equal structure, types and bits."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for first, second in zip(left, right, strict=True):
            assert_same(first, second)
    else:
        assert left == right or (math.isnan(left) and math.isnan(right))


def test_round_trip_of_config_weights_and_average(tmp_path):
    model = {
        "half": torch.randn(4, 3).half(),
        "bfloat": torch.randn(2).bfloat16(),
        "transposed": torch.randn(3, 4).t(),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "parameter": nn.Parameter(torch.randn(3)),
    }
    model["tied"] = model["half"]
    model["view"] = model["half"][1:]
    path = save(tmp_path, 500, model=model, ema=weights(9), config=CONFIG | {"dvae_sha256": "ab"})
    assert path == tmp_path / "step-0000500"
    assert load_config(path, "dvae") == {"format_version": 1, "step": 500, **CONFIG, "dvae_sha256": "ab"}
    loaded = load_weights(path, ema=False)
    assert loaded.keys() == model.keys()
    for name, tensor in model.items():
        assert_same(loaded[name], tensor.detach())
    assert torch.equal(load_weights(path, ema=True)["bias"], weights(9)["bias"])


def test_checkpoint_files_are_as_readable_as_each_other(tmp_path):
    path = save(tmp_path, 1, training={"step": 1})
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


def test_training_state_round_trip_is_exact(tmp_path):
    shared = torch.randn(4, 4)
    state = {
        "int keys": {0: {"exp_avg": shared, "step": torch.tensor(3.0)}, -7: "x"},
        "mixed": {"a": 1, 2: None, True: False},
        "$tensor": "a name that is also a mark",
        "nested": [1, 2.5, [shared.t(), ()], (0.9, 0.999), "text", {}],
        "floats": [0.1, 1e-320, math.inf, -math.inf, math.nan],
        "long": 2**80,
        "rng": torch.get_rng_state(),
        "a.b": torch.tensor(1),
        "a": {"b": torch.tensor(2)},
    }
    assert_same(load_training_state(save(tmp_path, 1, training=state)), state)


def train(model, optimizer, updates):
    for _ in range(updates):
        optimizer.zero_grad()
        (model(torch.randn(8, 6)) ** 2).mean().backward()
        optimizer.step()


def test_training_resumes_bit_identically_with_adamw_and_rng(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, 3)
    state = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    path = save(tmp_path, 3, model=model.state_dict(), training=state)
    train(model, optimizer, 4)

    torch.manual_seed(1)
    resumed = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 2))
    load_model_state(resumed, load_weights(path, ema=False), path)
    other = torch.optim.AdamW(resumed.parameters(), lr=0.7)
    loaded = load_training_state(path)
    other.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["rng"])
    train(resumed, other, 4)
    assert_same(dict(resumed.state_dict()), dict(model.state_dict()))
    assert_same(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (
            {"a": [1, object()]},
            r"numbers, strings, None, dicts, lists and tuples, got object at training\.a\.1$",
        ),
        ({"a": {(1, 2): 3}}, r"^keys of the training state must be str or int, got \(1, 2\) at training\.a$"),
    ],
)
def test_training_state_type_messages(tmp_path, training, message):
    with pytest.raises(TypeError, match=message):
        save(tmp_path / "run", 1, training=training)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep must be >= 1, got 0"),
        ({"config": {"kind": "vae", "model": {}}}, "config['kind'] must be one of dvae, dalle, got 'vae'"),
        ({"config": {"kind": "dvae"}}, "config['model'] must be a dict, got None"),
        (
            {"files": {"config.json": Path("x")}},
            "files must have plain names other than the checkpoint's own, got 'config.json'",
        ),
        (
            {"files": {"../x": Path("x")}},
            "files must have plain names other than the checkpoint's own, got '../x'",
        ),
    ],
)
def test_argument_messages(tmp_path, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        save(tmp_path / "run", 1, **options)
    assert not (tmp_path / "run").exists()


def test_files_and_folders_of_the_caller_are_hard_linked(tmp_path):
    (tmp_path / "dvae" / "inner").mkdir(parents=True)
    (tmp_path / "dvae" / "inner" / "model").write_text("weights")
    (tmp_path / "tokens.json").write_text("{}")
    files = {"tokenizer.json": tmp_path / "tokens.json", "dvae": tmp_path / "dvae"}
    path = save(tmp_path / "run", 1, files=files)
    assert (path / "tokenizer.json").samefile(tmp_path / "tokens.json")
    assert (path / "dvae" / "inner" / "model").samefile(tmp_path / "dvae" / "inner" / "model")


def test_files_are_copied_where_links_are_not_possible(tmp_path, monkeypatch):
    def refuse(source, destination):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "tokens.json").write_text("{}")
    path = save(tmp_path / "run", 1, files={"tokenizer.json": tmp_path / "tokens.json"})
    assert (path / "tokenizer.json").read_text() == "{}"
    assert not (path / "tokenizer.json").samefile(tmp_path / "tokens.json")


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 10, 11):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-0000010", "step-0000011"]
    save(tmp_path, 12, keep=1)
    assert names(tmp_path) == ["step-0000012"]


def test_a_run_that_went_back_leaves_later_checkpoints_alone(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    save(tmp_path, 15, keep=1)
    assert names(tmp_path) == ["step-0000015", "step-0000020", "step-0000030"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 1, model=weights(5))
    assert names(tmp_path) == ["step-0000001"]
    assert torch.equal(load_weights(tmp_path / "step-0000001", ema=False)["weight"], weights(5)["weight"])


def test_saving_a_step_again_over_what_a_killed_save_of_it_left(tmp_path):
    save(tmp_path, 1).rename(tmp_path / "step-0000001.old")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-0000001.old"
    save(tmp_path / "new", 1).rename(tmp_path / "step-0000001")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-0000001"
    save(tmp_path, 1, model=weights(5))
    assert names(tmp_path) == ["new", "step-0000001"]
    assert torch.equal(load_weights(tmp_path / "step-0000001", ema=False)["weight"], weights(5)["weight"])


def test_latest_checkpoint_of_a_run_and_of_itself(tmp_path):
    for step in (9_999_999, 10_000_000):
        save(tmp_path, step)
    (tmp_path / "step-0000200").mkdir()
    (tmp_path / "step-notes").mkdir()
    newest = tmp_path / "step-10000000"
    assert latest_checkpoint(tmp_path) == newest
    assert latest_checkpoint(newest) == newest


def test_output_that_is_not_a_directory(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CheckpointError, match=r"^cannot write checkpoint .*/run/step-0000001: File exists \(.*/run\)"):
        save(tmp_path / "run", 1)


def test_missing_file_of_the_caller_is_named(tmp_path):
    save(tmp_path, 1)
    message = r"^cannot write checkpoint .*step-0000002: No such file or directory \(.*/absent\.json\)"
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, 2, files={"tokenizer.json": tmp_path / "absent.json"})
    assert names(tmp_path) == ["step-0000001"]


def test_old_checkpoint_that_cannot_be_deleted(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint.shutil, "rmtree", refuse)
    message = r"^checkpoint .*/step-0000002 is written, but an older one cannot be deleted: Permission denied \("
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, 2, keep=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-0000002"


def test_no_checkpoint_messages(tmp_path):
    with pytest.raises(CheckpointError, match=r"^no checkpoint at .*/absent: not a directory$"):
        latest_checkpoint(tmp_path / "absent")
    message = r"^no checkpoint at .*: neither config.json and model.safetensors nor step-\* folders in it$"
    with pytest.raises(CheckpointError, match=message):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format_version": 9},
            "checkpoint {path} has format version 9, this dalle_fast reads up to 1; upgrade dalle_fast",
        ),
        ({"format_version": None}, "checkpoint {path}: config.json lacks the field format_version"),
        ({"format_version": "1"}, "checkpoint {path}: format_version in config.json must be int, got '1'"),
        ({"kind": None}, "checkpoint {path}: config.json lacks the field kind"),
        ({"kind": "dalle"}, "checkpoint {path} is of kind dalle, expected dvae"),
        ({"model": None}, "checkpoint {path}: config.json lacks the field model"),
        ({"model": [1]}, "checkpoint {path}: model in config.json must be dict, got [1]"),
    ],
)
def test_config_messages(tmp_path, change, message):
    path = save(tmp_path, 1)
    config = load_config(path, "dvae") | change
    text = json.dumps({name: value for name, value in config.items() if value is not None})
    (path / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as raised:
        load_config(path, "dvae")
    assert str(raised.value) == message.format(path=path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"^cannot read .*config\.json: not JSON \(Expecting"),
        ("[]", r"^checkpoint .*: config\.json must hold an object, got list$"),
        (None, r"^cannot read .*config\.json: No such file or directory"),
    ],
)
def test_config_that_is_no_object(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_config(tmp_path, "dvae")


def test_missing_and_damaged_tensors(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"^cannot read .*/ema\.safetensors: no such file$"):
        load_weights(path, ema=True)
    with pytest.raises(CheckpointError, match=r"^checkpoint .* cannot be resumed: it has no training\.json$"):
        load_training_state(path)
    os.truncate(path / "model.safetensors", 20)
    with pytest.raises(CheckpointError, match=r"^cannot read .*/model\.safetensors: damaged \("):
        load_weights(path, ema=False)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_model_state_loads_also_on_the_meta_device(device):
    state = nn.Linear(3, 2).state_dict()
    module = nn.Linear(3, 2, device=device, dtype=torch.float64)
    load_model_state(module, state, "x")
    assert_same(module.weight.detach(), state["weight"].double())
    assert module.weight.requires_grad
    assert_same(module(torch.ones(1, 3).double()).shape, torch.Size([1, 2]))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(2, 4)}, "tensor weight has shape (2, 4) in ckpt, the model needs (2, 3)"),
        (
            {"weight": torch.zeros(4, 3), "bias": torch.zeros(4)},
            "tensor weight has shape (4, 3) in ckpt, the model needs (2, 3) (and 1 more)",
        ),
        ({"bias": None}, "ckpt lacks tensor bias"),
        ({"bias": None, "weight": None}, "ckpt lacks tensor weight (and 1 more)"),
        ({"scale": torch.zeros(1)}, "ckpt holds tensor scale unknown to the model"),
    ],
)
def test_model_state_messages(device, change, message):
    module = nn.Linear(3, 2, device=device)
    before = module.weight.detach().clone()
    state = {name: tensor for name, tensor in (nn.Linear(3, 2).state_dict() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_model_state(module, state, "ckpt")
    assert device == "meta" or torch.equal(module.weight, before)


def test_check_match():
    check_match("grid", [8, 8], (8, 8), "ckpt")
    check_match("model", {"grid": [8, 8]}, {"grid": (8, 8)}, "ckpt")
    with pytest.raises(ValueError, match=r"^grid of checkpoint ckpt is \[8, 8\], expected \(16, 16\)$"):
        check_match("grid", [8, 8], (16, 16), "ckpt")


@pytest.mark.parametrize("writer", [torch.save, save_file])
def test_foreign_state_dict(tmp_path, writer):
    path = tmp_path / ("model.pt" if writer is torch.save else "model.safetensors")
    writer({"weight": nn.Parameter(torch.ones(2)), "bias": torch.zeros(3)}, path)
    state = load_foreign_state_dict(path)
    assert_same(state["weight"], torch.ones(2))
    assert list(state) == ["weight", "bias"] or list(state) == ["bias", "weight"]
    assert not state["weight"].requires_grad


class Touch:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_foreign_pickle_is_refused_and_not_run(tmp_path, legacy):
    trap = tmp_path / "trap"
    torch.save({"weight": Touch(trap)}, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"model\.pt: it is damaged or pickles more than tensors, which is never"):
        load_foreign_state_dict(tmp_path / "model.pt")
    assert not trap.exists()


@pytest.mark.parametrize("content", [b"", b"rubbish", b"\x80\x02", b"PK\x03\x04 cut", pickle.dumps(3, protocol=2)[:-1]])
def test_foreign_file_that_is_damaged(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"^cannot read .*model\.pt: it is damaged or pickles more than tensors"):
        load_foreign_state_dict(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.ones(1)], r"model\.pt must hold a dict of tensors, got list$"),
        (
            {"state_dict": {}},
            r"model\.pt must hold a dict from names to tensors, got dict under 'state_dict'$",
        ),
        ({3: torch.ones(1)}, r"model\.pt must hold a dict from names to tensors, got Tensor under 3$"),
    ],
)
def test_foreign_file_without_a_plain_state_dict(tmp_path, value, message):
    torch.save(value, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message):
        load_foreign_state_dict(tmp_path / "model.pt")


def test_foreign_file_that_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"^cannot read .*absent\.pt: No such file or directory"):
        load_foreign_state_dict(tmp_path / "absent.pt")


def test_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
