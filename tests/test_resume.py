"""Stopping and resuming both training runs: bit-identical on the CPU, and the last good checkpoint always survives."""

import dataclasses
import errno
import json
import re
import signal
import threading

import pytest
from safetensors.torch import load_file, save_file
from training_runs import DVAE_CONFIG, PRIOR_CONFIG, Run, assert_same, assert_same_checkpoint, call_at, losses

from dalle_fast import checkpoint
from dalle_fast.checkpoint import CheckpointError, latest_checkpoint, load_config, load_training_state
from dalle_fast.data.tokenizer import Tokenizer
from dalle_fast.models.transformer import Dalle
from dalle_fast.pipeline import Pipeline, load_dvae
from dalle_fast.training.dvae import train_dvae
from dalle_fast.training.log import read_log
from dalle_fast.training.prior import train_prior


def interrupt_within():
    raise KeyboardInterrupt


def test_looking_at_images_changes_nothing(start, tmp_path):
    plain = start(tmp_path / "plain", steps=4)
    looked = start(tmp_path / "looked", steps=4, images_every=1)
    assert_same_checkpoint(plain, looked)


def test_number_of_workers_changes_nothing(start, tmp_path):
    runs = [start(tmp_path / str(workers), steps=4, num_workers=workers) for workers in (0, 2)]
    assert_same_checkpoint(*runs)


@pytest.mark.parametrize("stop", [1, 4])
def test_resumed_run_is_bit_identical(start, tmp_path, stop):
    whole = start(tmp_path / "whole", steps=8)
    start(tmp_path / "parts", steps=stop)
    resumed = start(tmp_path / "parts", steps=8, resume=True)
    assert_same_checkpoint(whole, resumed)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert [step for step, _ in losses(tmp_path / "parts")] == list(range(8))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_on_token_shards_is_bit_identical(dvae_run, token_shards, tmp_path, workers):
    """Through several epochs, which read different copies."""
    start = Run("dalle", token_shards, dvae_run)
    whole = start(tmp_path / "whole", steps=8)
    start(tmp_path / "parts", steps=5, num_workers=workers)
    resumed = start(tmp_path / "parts", steps=8, num_workers=workers, resume=True)
    assert_same_checkpoint(whole, resumed)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_resumed_run_that_drops_captions_is_bit_identical(token_shards, dvae_run, tmp_path):
    start = Run("dalle", token_shards, dvae_run)
    whole = start(tmp_path / "whole", steps=8, caption_drop=0.4)
    start(tmp_path / "parts", steps=3, caption_drop=0.4)
    resumed = start(tmp_path / "parts", steps=8, caption_drop=0.4, resume=True)
    assert_same_checkpoint(whole, resumed)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    start(tmp_path / "kept", steps=8)
    assert losses(tmp_path / "kept") != losses(tmp_path / "whole")


def test_run_stopped_by_control_c_is_bit_identical(start, tmp_path, monkeypatch):
    """The signal comes within update 3, which is finished and saved."""
    whole = start(tmp_path / "whole", steps=8)
    with monkeypatch.context() as patch:
        call_at(patch, start.model, 3, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "parts", steps=8)
    assert latest_checkpoint(tmp_path / "parts").name == "step-0000003"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = start(tmp_path / "parts", steps=8, resume=True)
    assert_same_checkpoint(whole, resumed)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_run_broken_off_within_an_update_is_bit_identical(start, tmp_path, monkeypatch):
    """Half an update must not reach a checkpoint: the run goes on from the one before, and logs no step twice."""
    whole = start(tmp_path / "whole", steps=8, checkpoint_every=3)
    with monkeypatch.context() as patch:
        call_at(patch, start.model, 5, interrupt_within)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "parts", steps=8, checkpoint_every=3)
    assert latest_checkpoint(tmp_path / "parts").name == "step-0000003"
    assert [step for step, _ in losses(tmp_path / "parts")] == [0, 1, 2, 3]
    resumed = start(tmp_path / "parts", steps=8, checkpoint_every=3, resume=True)
    assert_same_checkpoint(whole, resumed)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_second_control_c_breaks_off_at_once(start, tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    call_at(monkeypatch, start.model, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, steps=8)
    assert not list(tmp_path.glob("step-*"))


def test_control_c_within_the_last_update_is_not_lost(start, tmp_path, monkeypatch):
    call_at(monkeypatch, start.model, 2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, steps=2)
    assert latest_checkpoint(tmp_path).name == "step-0000002"


def test_training_outside_the_main_thread(start, tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(start(tmp_path, steps=1)))
    thread.start()
    thread.join()
    assert done == [tmp_path / "step-0000001"]


def test_resuming_a_finished_run_changes_nothing(start, tmp_path):
    last = start(tmp_path, steps=2)
    before = read_log(tmp_path / "log.jsonl")
    assert start(tmp_path, steps=2, resume=True) == last
    assert read_log(tmp_path / "log.jsonl") == before


def test_existing_run_is_refused(start, tmp_path):
    start(tmp_path, steps=1)
    message = f"{tmp_path} already holds checkpoints; pass --resume to go on, or name another folder"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        start(tmp_path, steps=2)
    assert latest_checkpoint(tmp_path).name == "step-0000001"


def test_nothing_to_resume(drawings, dvae_run, tmp_path):
    for train in (
        lambda: train_dvae(drawings, tmp_path, DVAE_CONFIG, resume=True),
        lambda: train_prior(drawings, tmp_path, dvae_run, PRIOR_CONFIG, resume=True),
    ):
        with pytest.raises(CheckpointError, match=re.escape(f"no checkpoint at {tmp_path}")):
            train()


def test_resuming_with_another_model(start, tmp_path):
    start(tmp_path, steps=1)
    if start.kind == "dvae":
        change, words = {"hidden": 12}, ("hidden", 8, 12)
        model = dataclasses.replace(DVAE_CONFIG.model, **change)
    else:
        change, words = {"depth": 3}, ("depth", 2, 3)
        model = dataclasses.replace(PRIOR_CONFIG.model, **change)
    field, saved, asked = words
    message = f"{field} of checkpoint {tmp_path / 'step-0000001'} is {saved}, expected {asked}"
    with pytest.raises(ValueError, match=re.escape(message)):
        start(tmp_path, steps=2, resume=True, model=model)


@pytest.mark.parametrize("fails", ["save_file", "_fsync_tree"])
def test_full_disk_leaves_the_old_checkpoint(start, tmp_path, monkeypatch, fails):
    first = start(tmp_path, steps=2)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        # On resuming, the transformer's run writes its dVAE again; only the checkpoint itself shall fail.
        call_at(patch, start.model, 1, lambda: patch.setattr(checkpoint, fails, full))
        message = f"cannot write checkpoint {tmp_path / 'step-0000004'}: No space left on device; earlier checkpoints"
        with pytest.raises(CheckpointError, match=re.escape(message)):
            start(tmp_path, steps=4, resume=True)
    assert latest_checkpoint(tmp_path) == first
    assert start(tmp_path, steps=4, resume=True) == tmp_path / "step-0000004"


def test_a_run_that_never_saved_leaves_nothing_behind(drawings, dvae_run, tmp_path, monkeypatch):
    """A run with one dVAE is killed early; a new one in its folder, with another dVAE, must not mix them."""
    with monkeypatch.context() as patch:
        call_at(patch, Dalle, 1, interrupt_within)
        with pytest.raises(KeyboardInterrupt):
            train_prior(drawings, tmp_path / "prior", dvae_run, PRIOR_CONFIG)
    other = train_dvae(drawings, tmp_path / "dvae", dataclasses.replace(DVAE_CONFIG, steps=1, seed=7))
    train_prior(drawings, tmp_path / "prior", other, dataclasses.replace(PRIOR_CONFIG, steps=1))
    assert_same(
        dict(Pipeline.from_pretrained(tmp_path / "prior").dvae.state_dict()), dict(load_dvae(other).state_dict())
    )


def test_a_kill_while_resuming_leaves_the_checkpoint_whole(drawings, dvae_run, tmp_path, monkeypatch):
    """Checkpoints share files with the run directory, which must not be written in place."""
    last = train_prior(drawings, tmp_path, dvae_run, dataclasses.replace(PRIOR_CONFIG, steps=1))
    vocabulary = load_config(last, "dalle")["model"]["text_vocab_size"]
    config = dataclasses.replace(
        PRIOR_CONFIG, steps=2, model=dataclasses.replace(PRIOR_CONFIG.model, text_vocab_size=vocabulary)
    )

    def half_written(self, path):
        path.write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save", half_written)
        with pytest.raises(KeyboardInterrupt):
            train_prior(drawings, tmp_path, dvae_run, config, resume=True)
    Pipeline.from_pretrained(tmp_path)
    train_prior(drawings, tmp_path, dvae_run, config, resume=True)


def test_resuming_needs_no_dvae_but_the_checkpoint(drawings, dvae_run, tmp_path):
    last = train_prior(drawings, tmp_path, dvae_run, dataclasses.replace(PRIOR_CONFIG, steps=1))
    vocabulary = load_config(last, "dalle")["model"]["text_vocab_size"]
    model = dataclasses.replace(PRIOR_CONFIG.model, text_vocab_size=vocabulary)
    config = dataclasses.replace(PRIOR_CONFIG, steps=2, model=model)
    assert train_prior(drawings, tmp_path, None, config, resume=True).name == "step-0000002"


def test_flags_given_on_resume_go_over_the_optimiser(start, tmp_path):
    start(tmp_path, steps=2)
    last = start(tmp_path, resume=True, steps=3, weight_decay=0.5, beta2=0.6)
    groups = load_training_state(last)["optimizer"]["param_groups"]
    assert groups[0]["weight_decay"] == 0.5
    assert all(group["betas"][1] == 0.6 for group in groups)


def test_resuming_with_other_decayed_parameters(drawings, dvae_run, tmp_path):
    start = Run("dalle", drawings, dvae_run)
    start(tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"^decayed of checkpoint .* is 'matrices', expected 'all'$"):
        start(tmp_path, resume=True, steps=3, decayed="all")


@pytest.mark.parametrize("resume", [False, True])
def test_a_checkpoint_is_no_run_directory(start, tmp_path, resume):
    last = start(tmp_path, steps=2)
    with pytest.raises(CheckpointError, match=re.escape(f"{last} is a checkpoint; name the folder of its run")):
        start(last, resume=resume, steps=3)


@pytest.mark.parametrize("field", ["step", "optimizer", "loader", "rng"])
def test_training_state_without_a_field(start, tmp_path, field):
    path = start(tmp_path, steps=2) / "training.json"
    state = json.loads(path.read_text())
    del state[field]
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=f"the training state lacks the field {field}$"):
        start(tmp_path, resume=True, steps=3)


@pytest.mark.parametrize("file", ["training.safetensors", "ema.safetensors"])
def test_a_state_without_one_of_its_tensors(start, tmp_path, file):
    path = start(tmp_path, steps=2) / file
    tensors = load_file(path)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"{file} lacks tensor {re.escape(name)}"):
        start(tmp_path, resume=True, steps=3)
