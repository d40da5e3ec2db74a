"""Both training runs end to end: what they write and log, that they learn, and each way in which they refuse."""

import dataclasses
import itertools
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import DRAWINGS, DVAE_CONFIG, PRIOR_CONFIG, Run, assert_same, losses

from dalle_fast.checkpoint import latest_checkpoint, load_config, load_training_state, load_weights
from dalle_fast.data.images import image_grid, to_image
from dalle_fast.data.sources import TooManyBadSamples, open_source
from dalle_fast.models.transformer import PAD_ID, Dalle
from dalle_fast.pipeline import Pipeline, load_dvae
from dalle_fast.training.dvae import TrainDVAEConfig, train_dvae
from dalle_fast.training.log import read_log
from dalle_fast.training.loop import choose_device
from dalle_fast.training.prior import TrainConfig, train_prior


def test_run_directory(start, tmp_path):
    last = start(tmp_path, steps=5, checkpoint_every=2, images_every=4, log_every=2)
    assert last == tmp_path / "step-0000005"
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-0000004", "step-0000005"]
    config = load_config(last, start.kind)
    assert config["step"] == 5
    assert config["train"]["steps"] == 5
    assert "model" not in config["train"]
    records = read_log(tmp_path / "log.jsonl")
    assert [record["step"] for record in records] == [1, 3, 4]
    assert all(math.isfinite(value) for record in records for value in record.values())
    assert {"loss", "learning_rate", "samples_per_s"} <= records[0].keys()
    images = sorted(path.name for path in (tmp_path / "images").iterdir())
    name = "reconstructions" if start.kind == "dvae" else "samples"
    assert images == [f"{name}-0000003.png", f"{name}-0000004.png"]
    assert Image.open(tmp_path / "images" / images[0]).mode == "RGB"
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_logs(start, tmp_path):
    pytest.importorskip("tensorboard")
    start(tmp_path, steps=1, tensorboard=True)
    assert list((tmp_path / "tensorboard").iterdir())


def test_logged_numbers(drawings, dvae_run, tmp_path):
    train_dvae(drawings, tmp_path / "dvae", dataclasses.replace(DVAE_CONFIG, steps=1))
    (record,) = read_log(tmp_path / "dvae" / "log.jsonl")
    assert {"reconstruction", "kl", "mse", "hard_mse", "gap", "token_mse"} <= record.keys()
    assert {"perplexity", "codes_in_use", "tau", "kl_weight"} <= record.keys()
    assert (record["tau"], record["kl_weight"], record["learning_rate"]) == (1.0, 0.0, 5e-3)
    train_prior(drawings, tmp_path / "prior", dvae_run, dataclasses.replace(PRIOR_CONFIG, steps=1))
    (record,) = read_log(tmp_path / "prior" / "log.jsonl")
    assert record["loss"] == pytest.approx(record["text_loss"] / 8 + record["image_loss"] * 7 / 8)
    assert record["image_loss"] == pytest.approx(math.log(12))


def test_schedules_of_the_dvae(drawings, tmp_path):
    """Half cosines: temperature 1 to 1/16 in four updates, weight of the KL 0 to 6.6 in two."""
    train_dvae(drawings, tmp_path, dataclasses.replace(DVAE_CONFIG, steps=6, tau_steps=4, kl_steps=2))
    records = read_log(tmp_path / "log.jsonl")
    middle = (1 + 1 / 16) / 2
    assert [record["tau"] for record in records[::2]] == pytest.approx([1, middle, 1 / 16])
    assert records[5]["tau"] == 1 / 16
    assert [record["kl_weight"] for record in records] == pytest.approx([0, 3.3, 6.6, 6.6, 6.6, 6.6])
    # The KL's share of the loss: 16 positions and 768 pixel values an image.
    for record in records:
        assert record["loss"] == pytest.approx(record["reconstruction"] + record["kl_weight"] * record["kl"] / 48)


def test_bpe_dropout(drawings, dvae_run, tmp_path):
    for dropout in (0.0, 0.5):
        config = dataclasses.replace(PRIOR_CONFIG, steps=2, bpe_dropout=dropout)
        train_prior(drawings, tmp_path / str(dropout), dvae_run, config)
    assert losses(tmp_path / "0.0") != losses(tmp_path / "0.5")


def test_training_learns(start, tmp_path):
    start(tmp_path, steps=25)
    values = [loss for _, loss in losses(tmp_path)]
    assert sum(values[-5:]) < sum(values[:5])


def test_moving_average(start, tmp_path):
    """ema_every counts updates; the average lags behind the weights and starts from the initial ones."""
    every = {"ema_every": 1} if start.kind == "dalle" else {}
    states = []
    for steps in (1, 2):
        out = start(tmp_path / str(steps), steps=steps, **every)
        states.append((load_weights(out, ema=False), load_weights(out, ema=True)))
    (_, before), (weights, after) = states
    for name, value in after.items():
        torch.testing.assert_close(value, torch.lerp(before[name], weights[name], 1 - 0.9))
    assert any(not torch.equal(weights[name], after[name]) for name in after)


def test_moving_average_counts_updates(drawings, dvae_run, tmp_path):
    averages = []
    for steps in (1, 2, 3):
        out = train_prior(drawings, tmp_path / str(steps), dvae_run, dataclasses.replace(PRIOR_CONFIG, steps=steps))
        averages.append(load_weights(out, ema=True))
    assert_same(averages[0], averages[1])
    assert any(not torch.equal(averages[1][name], averages[2][name]) for name in averages[2])


def test_no_moving_average(start, tmp_path):
    last = start(tmp_path, steps=1, ema_decay=0.0)
    assert not (last / "ema.safetensors").exists()
    assert start(tmp_path, steps=2, ema_decay=0.0, resume=True).name == "step-0000002"


def test_images_are_those_of_the_averaged_weights(drawings, dvae_run, tmp_path):
    train_prior(drawings, tmp_path, dvae_run, dataclasses.replace(PRIOR_CONFIG, steps=3, images_every=3))
    captions = list(itertools.islice(open_source(drawings).captions(), 4))
    images = Pipeline.from_pretrained(tmp_path).generate(captions, num_images=4, seed=PRIOR_CONFIG.seed).images
    drawn = np.asarray(Image.open(tmp_path / "images" / "samples-0000002.png"))
    assert np.array_equal(drawn, np.asarray(to_image(image_grid(images))))


def test_gradients_are_clipped(start, tmp_path):
    """After one update Adam's mean is a tenth of the gradient, whose norm the clip bounds over all parameters."""
    norms = []
    for clip in (1e-3, None):
        state = load_training_state(start(tmp_path / str(clip), steps=1, grad_clip=clip))["optimizer"]["state"]
        norms.append(math.sqrt(sum(moments["exp_avg"].square().sum().item() for moments in state.values())))
    assert norms[0] == pytest.approx(1e-4, rel=1e-2)
    assert norms[1] > 2e-4


def test_seed(start, tmp_path):
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        start(tmp_path / name, steps=2, seed=seed)
        runs[name] = losses(tmp_path / name)
    assert runs["a"] == runs["b"]
    assert runs["a"] != runs["c"]


def poison(monkeypatch, model, call):
    """Make the loss of the call-th update and of all after it NaN, with gradients of NaN."""
    original, calls = model.loss, []

    def loss(self, *args, **options):
        calls.append(None)
        result = original(self, *args, **options)
        return result._replace(total=result.total * math.nan) if len(calls) >= call else result

    monkeypatch.setattr(model, "loss", loss)


def test_nan_stops_the_run(start, tmp_path, monkeypatch):
    poison(monkeypatch, start.model, 3)
    message = f"the loss became nan by update 3; go on from {tmp_path / 'step-0000002'} with a smaller learning_rate"
    with pytest.raises(FloatingPointError, match=re.escape(message)):
        start(tmp_path, steps=8, checkpoint_every=2)
    assert [step for step, _ in losses(tmp_path)] == [0, 1]


def test_nan_never_reaches_a_checkpoint(start, tmp_path, monkeypatch):
    """Also where the log is written less often than checkpoints are."""
    poison(monkeypatch, start.model, 3)
    with pytest.raises(FloatingPointError, match="the loss became nan by update 4"):
        start(tmp_path, steps=8, checkpoint_every=2, log_every=8)
    last = latest_checkpoint(tmp_path)
    assert last.name == "step-0000002"
    assert all(tensor.isfinite().all() for tensor in load_weights(last, ema=False).values())


def test_nan_gradients_behind_a_finite_loss_never_reach_a_checkpoint(start, tmp_path, monkeypatch):
    original = start.model.loss

    def loss(self, *args, **options):
        result = original(self, *args, **options)
        result.total.register_hook(lambda grad: grad * math.nan)
        return result

    monkeypatch.setattr(start.model, "loss", loss)
    message = "a weight became NaN or infinite by update 1; go on from the start with a smaller learning_rate"
    with pytest.raises(FloatingPointError, match=message):
        start(tmp_path, steps=8, checkpoint_every=1, log_every=8)
    assert not list(tmp_path.glob("step-*"))


def test_nan_before_any_checkpoint(start, tmp_path, monkeypatch):
    poison(monkeypatch, start.model, 1)
    with pytest.raises(FloatingPointError, match="by update 1; go on from the start with a smaller learning_rate"):
        start(tmp_path, steps=8)


def test_no_usable_caption(tmp_path, drawings, dvae_run):
    shutil.copytree(drawings, tmp_path / "data")
    for caption in (tmp_path / "data").glob("*.txt"):
        caption.write_text(" ")
    message = f"data must hold at least one usable caption, got none in {tmp_path / 'data'}"
    with pytest.raises(ValueError, match=re.escape(message)):
        train_prior(tmp_path / "data", tmp_path / "out", dvae_run, PRIOR_CONFIG)


def test_empty_data_set(tmp_path, dvae_run):
    (tmp_path / "data").mkdir()
    for train in (
        lambda: train_dvae(tmp_path / "data", tmp_path / "out", DVAE_CONFIG),
        lambda: train_prior(tmp_path / "data", tmp_path / "out", dvae_run, PRIOR_CONFIG),
    ):
        with pytest.raises(ValueError, match="got a folder with neither"):
            train()
    assert not (tmp_path / "out").exists()


def test_batch_larger_than_the_data_set(start, tmp_path):
    message = f"batch_size must be at most the number of usable samples, got batch_size 15 with {DRAWINGS} samples"
    with pytest.raises(ValueError, match=re.escape(message)):
        start(tmp_path, batch_size=15)


def copy_with_faults(drawings, out, faults):
    """The data set with its first images cut short."""
    out.mkdir()
    for path in sorted(drawings.iterdir()):
        (out / path.name).write_bytes(path.read_bytes())
    for path in sorted(out.glob("*.png"))[:faults]:
        path.write_bytes(path.read_bytes()[:40])
    return out


@pytest.mark.parametrize("faults", [2, DRAWINGS])
def test_too_many_bad_samples(drawings, dvae_run, tmp_path, faults):
    bad = copy_with_faults(drawings, tmp_path / "bad", faults)
    message = f"at most 5% of samples may be bad, got {faults} of {DRAWINGS}; most often corrupt image"
    with pytest.raises(TooManyBadSamples, match=re.escape(message)):
        train_dvae(bad, tmp_path / "dvae", dataclasses.replace(DVAE_CONFIG, steps=20, images_every=1))
    with pytest.raises(TooManyBadSamples, match=re.escape(message)):
        train_prior(bad, tmp_path / "prior", dvae_run, dataclasses.replace(PRIOR_CONFIG, steps=20))


def test_a_few_bad_samples_are_counted(drawings, tmp_path):
    bad = copy_with_faults(drawings, tmp_path / "bad", 1)
    train_dvae(bad, tmp_path / "out", dataclasses.replace(DVAE_CONFIG, steps=8, max_bad_share=0.5, images_every=8))
    # Two epochs of three batches are over and a third has begun.
    assert read_log(tmp_path / "out" / "log.jsonl")[-1]["skipped_samples"] in (2, 3)


def test_images_that_are_too_small(drawings, tmp_path):
    model = dataclasses.replace(DVAE_CONFIG.model, image_size=32)
    with pytest.raises(TooManyBadSamples, match="most often small image"):
        train_dvae(drawings, tmp_path, dataclasses.replace(DVAE_CONFIG, model=model))


def test_long_captions_are_cut_and_counted(drawings, dvae_run, tmp_path):
    model = dataclasses.replace(PRIOR_CONFIG.model, text_len=8)
    train_prior(drawings, tmp_path / "cut", dvae_run, dataclasses.replace(PRIOR_CONFIG, model=model, steps=1))
    assert read_log(tmp_path / "cut" / "log.jsonl")[0]["cut_captions"] == 4
    config = dataclasses.replace(PRIOR_CONFIG, model=model, strict=True)
    with pytest.raises(ValueError, match=r"caption must have at most 7 tokens, got \d+: "):
        train_prior(drawings, tmp_path / "strict", dvae_run, config)


def texts_and_images(start, out, monkeypatch, **changes):
    """What the model is trained on."""
    seen = []
    loss = Dalle.loss

    def watch(self, text, image_tokens):
        seen.append((text, image_tokens))
        return loss(self, text, image_tokens)

    with monkeypatch.context() as patch:
        patch.setattr(Dalle, "loss", watch)
        start(out, **changes)
    return [torch.cat(parts) for parts in zip(*seen, strict=True)]


def test_dropping_captions_changes_no_other_draw(drawings, dvae_run, tmp_path, monkeypatch):
    start = Run("dalle", drawings, dvae_run)
    whole, images = texts_and_images(start, tmp_path / "whole", monkeypatch, steps=5)
    some, same_images = texts_and_images(start, tmp_path / "some", monkeypatch, steps=5, caption_drop=0.5)
    empty = (some == PAD_ID).all(dim=1)
    assert 0 < empty.sum() < len(some)
    assert not (whole == PAD_ID).all(dim=1).any()
    assert torch.equal(some[~empty], whole[~empty])
    assert torch.equal(images, same_images)


def test_about_that_share_of_captions_is_dropped(token_shards, dvae_run, tmp_path, monkeypatch):
    start = Run("dalle", token_shards, dvae_run)
    texts, _ = texts_and_images(start, tmp_path, monkeypatch, steps=100, caption_drop=0.3)
    dropped = (texts == PAD_ID).all(dim=1).sum()
    assert abs(dropped - 0.3 * 400) < 4 * math.sqrt(0.3 * 0.7 * 400)


def test_a_batch_without_any_caption(token_shards, dvae_run, tmp_path):
    Run("dalle", token_shards, dvae_run)(tmp_path, steps=2, caption_drop=1.0)
    records = read_log(tmp_path / "log.jsonl")
    assert [record["text_loss"] for record in records] == [0, 0]
    assert all(record["image_loss"] > 0 for record in records)


def test_every_checkpoint_of_the_transformer_is_a_pipeline(drawings, dvae_run, tmp_path):
    last = train_prior(drawings, tmp_path, dvae_run, dataclasses.replace(PRIOR_CONFIG, steps=4, checkpoint_every=2))
    caption = "a small red circle at the top left on a white background"
    for path in (tmp_path, last, tmp_path / "step-0000002"):
        pipeline = Pipeline.from_pretrained(path)
        assert pipeline.generate(caption, num_images=2).images.shape == (2, 3, 16, 16)
    assert pipeline.dalle.config.text_vocab_size == pipeline.tokenizer.vocab_size <= 280


def test_averaged_weights_are_the_ones_to_sample_from(drawings, dvae_run, tmp_path):
    last = train_prior(drawings, tmp_path, dvae_run, dataclasses.replace(PRIOR_CONFIG, steps=3))
    averaged, weights = load_weights(last, ema=True), load_weights(last, ema=False)
    state = Pipeline.from_pretrained(tmp_path).dalle.state_dict()
    assert_same(dict(state), averaged)
    assert not torch.equal(averaged["text_head.weight"], weights["text_head.weight"])
    assert_same(dict(load_dvae(dvae_run).state_dict()), load_weights(latest_checkpoint(dvae_run), ema=True))


def test_dvae_that_does_not_fit(drawings, dvae_run, tmp_path):
    model = dataclasses.replace(PRIOR_CONFIG.model, grid=(8, 8))
    with pytest.raises(ValueError, match=re.escape("grid must equal the dVAE's grid, got (8, 8) and (4, 4)")):
        train_prior(drawings, tmp_path, dvae_run, dataclasses.replace(PRIOR_CONFIG, model=model))


@pytest.mark.parametrize("decayed", ["matrices", "all"])
def test_weight_decay_groups(drawings, dvae_run, tmp_path, decayed):
    last = train_prior(drawings, tmp_path, dvae_run, dataclasses.replace(PRIOR_CONFIG, steps=1, decayed=decayed))
    groups = load_training_state(last)["optimizer"]["param_groups"]
    counts = {group["weight_decay"]: len(group["params"]) for group in groups}
    total = len(list(Dalle(PRIOR_CONFIG.model).parameters()))
    matrices = 4 * PRIOR_CONFIG.model.depth
    assert counts == ({4.5e-2: matrices, 0.0: total - matrices} if decayed == "matrices" else {4.5e-2: total})


def test_step_sizes_of_the_transformer(drawings, dvae_run, tmp_path):
    """Linear warm-up over two updates, then the chosen decay."""
    rates = {}
    for decay in ("plateau", "cosine", "none"):
        config = dataclasses.replace(PRIOR_CONFIG, steps=10, decay=decay, plateau_window=1, final_learning_rate=0.0)
        train_prior(drawings, tmp_path / decay, dvae_run, config)
        rates[decay] = [record["learning_rate"] for record in read_log(tmp_path / decay / "log.jsonl")]
    assert all(values[:2] == [5e-3, 1e-2] for values in rates.values())
    assert rates["none"][2:] == [1e-2] * 8
    assert rates["cosine"][2] == pytest.approx(1e-2)
    assert rates["cosine"][6] == pytest.approx(5e-3)
    assert rates["cosine"] == sorted(rates["cosine"][:2]) + sorted(rates["cosine"][2:], reverse=True)
    assert set(rates["plateau"][2:]) <= {1e-2 / 2**halvings for halvings in range(6)}


def test_bf16(start, tmp_path):
    start(tmp_path / "half", steps=2, precision="bf16")
    start(tmp_path / "full", steps=2)
    for (_, half), (_, full) in zip(losses(tmp_path / "half"), losses(tmp_path / "full"), strict=True):
        assert half == pytest.approx(full, rel=0.1)
    weights = load_weights(latest_checkpoint(tmp_path / "half"), ema=False)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize("config", [TrainDVAEConfig, TrainConfig])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"log_every": 0}, "log_every must be >= 1, got 0"),
        ({"checkpoint_every": 0}, "checkpoint_every must be >= 1, got 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be >= 1, got 0"),
        ({"images_every": -1}, "images_every must be >= 0, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be > 0, got nan"),
        ({"ema_decay": 1.0}, "ema_decay must be in [0, 1), got 1.0"),
        ({"ema_decay": -0.1}, "ema_decay must be in [0, 1), got -0.1"),
        ({"grad_clip": 0.0}, "grad_clip must be > 0 or none, got 0.0"),
    ],
)
def test_config_errors(config, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**changes)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (TrainDVAEConfig, {"tau": 0.0}, "tau must be > 0, got 0.0"),
        (TrainDVAEConfig, {"final_tau": -1.0}, "final_tau must be > 0, got -1.0"),
        (TrainDVAEConfig, {"tau_steps": 0}, "tau_steps must be >= 1, got 0"),
        (TrainDVAEConfig, {"kl_steps": 0}, "kl_steps must be >= 1, got 0"),
        (TrainDVAEConfig, {"learning_rate_steps": 0}, "learning_rate_steps must be >= 1, got 0"),
        (TrainConfig, {"bpe_dropout": 1.5}, "bpe_dropout must be in [0, 1], got 1.5"),
        (TrainConfig, {"caption_drop": -0.1}, "caption_drop must be in [0, 1], got -0.1"),
        (TrainConfig, {"caption_drop": math.nan}, "caption_drop must be in [0, 1], got nan"),
        (TrainConfig, {"ema_every": 0}, "ema_every must be >= 1, got 0"),
    ],
)
def test_config_errors_of_each(config, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu():
    with pytest.raises(RuntimeError, match="device cuda was asked for, but PyTorch sees no GPU here; use --device cpu"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"


def test_the_first_skipped_sample_of_each_kind_is_shown(start, tmp_path, drawings, capsys):
    shutil.copytree(drawings, tmp_path / "data")
    start._data = tmp_path / "data"
    (tmp_path / "data" / "000003.txt").unlink()
    start(tmp_path / "out", steps=6, max_bad_share=0.5)
    shown = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert shown == ["warning: samples are skipped: missing caption, for example 000003"]
