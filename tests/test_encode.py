"""Encoding to token shards: the tokens, going on after a kill, what is refused, and training on them."""

import dataclasses
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import DRAWINGS, DVAE_CONFIG, PRIOR_CONFIG, Run, assert_same_checkpoint, losses

import dalle_fast
from dalle_fast.data.images import augment_for_transformer, center_crop, decode_image, to_tensor
from dalle_fast.data.sources import TooManyBadSamples, open_source
from dalle_fast.data.token_shards import TokenSource, read_manifest
from dalle_fast.models.dvae import DVAE
from dalle_fast.pipeline import Pipeline, load_dvae, save_dvae
from dalle_fast.training.dvae import train_dvae
from dalle_fast.training.encode import EncodeConfig, dvae_sha256, encode
from dalle_fast.training.prior import train_prior

PICTURES = 11
CONFIG = EncodeConfig(batch_size=2, shard_size=3, device="cpu", num_workers=0)  # shards of 4, 4 and 3 pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Images of coarse noise larger than the dVAE's, of several sizes, so that each crop has other tokens."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        pixels = rng.integers(0, 256, (6, 7, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels[number % 3 :]).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture {number}")
    return folder


@pytest.fixture(scope="module")
def dvae_path(tmp_path_factory):
    """A dVAE whose tokens differ from one crop to another, as a trained one's do."""
    out = tmp_path_factory.mktemp("sharp") / "dvae"
    torch.manual_seed(0)
    dvae = DVAE(dataclasses.replace(DVAE_CONFIG.model, residual_gain=0.5))
    images = torch.nn.functional.interpolate(torch.rand(16, 3, 4, 4), scale_factor=4)
    with torch.no_grad():
        dvae.encoder.blocks.output.conv.b -= dvae.logits(images).mean((0, 2, 3))  # or a few codes win everywhere
    save_dvae(dvae, out)
    return out


def samples(out):
    return [sample for _, sample in TokenSource(out).read(None, 0)]


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def images_of(folder, augment):
    return [to_tensor(augment(decode_image(sample.image))) for _, sample in open_source(folder).read(None, 0)]


def test_tokens_are_those_of_the_centre_crops(pictures, dvae_path, tmp_path):
    encode(dvae_path, pictures, tmp_path, dataclasses.replace(CONFIG, augment="none"))
    images = torch.stack(images_of(pictures, lambda image: center_crop(image, 16)))
    tokens = load_dvae(dvae_path).encode(images).numpy()
    assert len({sample.tobytes() for sample in tokens}) == PICTURES
    assert np.array_equal([sample.tokens for sample in samples(tmp_path)], tokens)
    assert [sample.caption for sample in samples(tmp_path)] == [f"picture {number}" for number in range(PICTURES)]
    assert [sample.key for sample in samples(tmp_path)] == [f"{number:02d}" for number in range(PICTURES)]


def test_copies_are_seeded_crops_of_the_same_image(pictures, dvae_path, tmp_path):
    """Copy c of image i is the c-th crop from the generator of (seed, 0, i), however many copies follow."""
    config = dataclasses.replace(CONFIG, copies=3, seed=5)
    manifest = encode(dvae_path, pictures, tmp_path / "three", config)
    assert (manifest.shards, manifest.grid, manifest.copies) == ([4, 4, 3], [4, 4], 3)
    source, dvae = TokenSource(tmp_path / "three"), load_dvae(dvae_path)
    for index, (_, sample) in enumerate(open_source(pictures).read(None, 0)):
        rng = np.random.default_rng((5, 0, index))
        crops = [to_tensor(augment_for_transformer(decode_image(sample.image), 16, rng)) for _ in range(3)]
        tokens = dvae.encode(torch.stack(crops)).numpy()
        assert len({copy.tobytes() for copy in tokens}) > 1
        assert np.array_equal([source.load((index, copy)).tokens for copy in range(3)], tokens)
    encode(dvae_path, pictures, tmp_path / "one", dataclasses.replace(CONFIG, seed=5))
    for one, three in zip(samples(tmp_path / "one"), samples(tmp_path / "three"), strict=True):
        assert np.array_equal(one.tokens, three.tokens)
    encode(dvae_path, pictures, tmp_path / "seed", CONFIG)
    assert contents(tmp_path / "seed") != contents(tmp_path / "one")


def test_progress_and_workers(pictures, dvae_path, tmp_path):
    calls = []
    encode(dvae_path, pictures, tmp_path / "a", CONFIG, on_progress=lambda *call: calls.append(call))
    assert calls == [(done, PICTURES) for done in (0, 2, 4, 6, 8, 10, 11)]
    encode(dvae_path, pictures, tmp_path / "b", dataclasses.replace(CONFIG, num_workers=3))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def test_broken_off_at_any_write_it_goes_on_to_the_same_files(pictures, dvae_path, tmp_path, monkeypatch):
    encode(dvae_path, pictures, tmp_path / "whole", CONFIG)
    expected, stage, dvae = contents(tmp_path / "whole"), 0, load_dvae(dvae_path)
    monkeypatch.setattr("dalle_fast.training.encode.load_dvae", lambda path: dvae)
    while True:
        stage, left, out = stage + 1, [stage + 1], tmp_path / str(stage)

        def counted(function, left):
            def call(*args):
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
                return function(*args)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", counted(os.fsync, left))
            patch.setattr(os, "replace", counted(os.replace, left))
            try:
                encode(dvae_path, pictures, out, CONFIG)
            except Killed:
                killed = True
            else:
                killed = False
        encode(dvae_path, pictures, out, CONFIG)
        assert contents(out) == expected, stage
        if not killed:
            break
    # Each of three shards and five manifests is flushed, renamed, and its folder flushed; the last time nothing is.
    assert stage - 1 == 3 * (3 + 5)


def test_killed_process_goes_on_to_the_same_files(pictures, dvae_path, tmp_path):
    """By a signal that no handler sees, in a process of its own, between two shards."""
    program = (
        "import os, signal, sys\n"
        "from test_encode import CONFIG, encode\n"
        "def show(done, total):\n"
        "    if done == 6:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "encode(*sys.argv[1:], CONFIG, on_progress=show)\n"
    )
    paths = [str(Path(dalle_fast.__file__).parents[1]), str(Path(__file__).parent)]
    result = subprocess.run(
        [sys.executable, "-c", program, str(dvae_path), str(pictures), str(tmp_path / "killed")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    assert result.returncode == -signal.SIGKILL
    assert read_manifest(tmp_path / "killed").shards == [4]
    first = (tmp_path / "killed" / "tokens-00000.safetensors").stat().st_mtime_ns
    calls = []
    encode(dvae_path, pictures, tmp_path / "killed", CONFIG, on_progress=lambda *call: calls.append(call))
    assert calls[0] == (4, PICTURES)
    assert (tmp_path / "killed" / "tokens-00000.safetensors").stat().st_mtime_ns == first
    encode(dvae_path, pictures, tmp_path / "whole", CONFIG)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_finished_set_is_left_as_it_is(pictures, dvae_path, tmp_path, monkeypatch):
    manifest = encode(dvae_path, pictures, tmp_path, CONFIG)
    monkeypatch.setattr(DVAE, "encode", None)
    assert encode(dvae_path, pictures, tmp_path, dataclasses.replace(CONFIG, num_workers=1)) == manifest


def test_another_set_is_refused(pictures, drawings, dvae_path, dvae_run, tmp_path):
    encode(dvae_path, pictures, tmp_path, CONFIG)
    before = contents(tmp_path)
    pattern = (
        rf"^token shards at {tmp_path} were begun with another dVAE than dVAE {dvae_run}: sha256 \w{{12}} and \w{{12}}$"
    )
    with pytest.raises(ValueError, match=pattern):
        encode(dvae_run, pictures, tmp_path, CONFIG)
    message = (
        f"token shards at {tmp_path} were begun with other data than {drawings}: names or sizes of its files differ"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        encode(dvae_path, drawings, tmp_path, CONFIG)
    for name, value in (("augment", "none"), ("copies", 2), ("seed", 1), ("batch_size", 3), ("shard_size", 4)):
        message = f"token shards at {tmp_path} were begun with {name} {getattr(CONFIG, name)}, got {value}"
        with pytest.raises(ValueError, match=re.escape(message)):
            encode(dvae_path, pictures, tmp_path, dataclasses.replace(CONFIG, **{name: value}))
    assert contents(tmp_path) == before


def test_the_data_may_be_moved_but_not_changed(pictures, dvae_path, tmp_path):
    encode(dvae_path, pictures, tmp_path / "tokens", CONFIG)
    moved = shutil.copytree(pictures, tmp_path / "moved")
    encode(dvae_path, moved, tmp_path / "tokens", CONFIG)
    (moved / "03.txt").write_text("another caption")
    with pytest.raises(ValueError, match="were begun with other data"):
        encode(dvae_path, moved, tmp_path / "tokens", CONFIG)


def test_a_foreign_folder_is_left_alone(pictures, dvae_path, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    message = f"out must be a new or empty folder, or token shards that were begun, got {tmp_path}"
    with pytest.raises(ValueError, match=re.escape(message)):
        encode(dvae_path, pictures, tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_bad_samples_are_skipped_and_counted(pictures, dvae_path, tmp_path):
    data = shutil.copytree(pictures, tmp_path / "data")
    (data / "03.txt").write_text(" ")
    (data / "10.png").write_bytes(b"no image")
    manifest = encode(dvae_path, data, tmp_path / "out", dataclasses.replace(CONFIG, max_bad_share=0.5))
    assert (manifest.shards, manifest.skipped) == ([4, 4, 1], {"empty caption": 1, "corrupt image": 1})
    assert [sample.key for sample in samples(tmp_path / "out")] == [
        "00",
        "01",
        "02",
        *(f"{n:02d}" for n in range(4, 10)),
    ]
    with pytest.raises(TooManyBadSamples, match="at most 5% of samples may be bad, got 2 of 11"):
        encode(dvae_path, data, tmp_path / "strict", CONFIG)
    assert not read_manifest(tmp_path / "strict").finished


def test_tar_shards_are_encoded_too(pictures, dvae_path, tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        for path in sorted(pictures.iterdir()):
            data = path.read_bytes()
            member = tarfile.TarInfo(path.name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    calls = []
    encode(dvae_path, tmp_path / "data.tar", tmp_path / "a", CONFIG, on_progress=lambda *call: calls.append(call))
    assert calls[-1] == (PICTURES, None)
    encode(dvae_path, pictures, tmp_path / "b", CONFIG)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    del a["tokens.json"], b["tokens.json"]
    assert a == b


def test_no_data(dvae_path, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="got a folder with neither"):
        encode(dvae_path, tmp_path / "empty", tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"copies": 0}, "copies must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"shard_size": 0}, "shard_size must be >= 1, got 0"),
        ({"augment": "none", "copies": 3}, "copies must be 1 with augment none, which makes all copies equal, got 3"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        EncodeConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"seed": -1}, "seed must be >= 0, got -1"), ({"num_workers": -1}, "num_workers must be >= 0")],
)
def test_options_are_checked_before_anything_is_written(pictures, dvae_path, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        encode(dvae_path, pictures, tmp_path / "out", dataclasses.replace(CONFIG, **changes))
    assert not (tmp_path / "out").exists()


def test_hash_of_a_dvae(dvae_run):
    dvae = load_dvae(dvae_run)
    before = dvae_sha256(dvae)
    assert dvae_sha256(load_dvae(dvae_run)) == before
    with torch.no_grad():
        dvae.encoder.blocks.output.conv.b[3] += 1e-3
    assert dvae_sha256(dvae) != before
    other = DVAE(dataclasses.replace(dvae.config, residual_gain=0.7))
    other.load_state_dict(load_dvae(dvae_run).state_dict())
    assert dvae_sha256(other) != before


# Training


@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_shards_is_training_on_images(drawings, dvae_path, tmp_path, monkeypatch, workers):
    """Bit for bit where the images have the model's size: same order, same tokens, same noise in the captions."""
    encode(dvae_path, drawings, tmp_path / "tokens", CONFIG)
    assert len({sample.tokens.tobytes() for sample in samples(tmp_path / "tokens")}) > DRAWINGS / 2
    config = dataclasses.replace(PRIOR_CONFIG, steps=5, bpe_dropout=0.3, num_workers=workers)
    images = train_prior(drawings, tmp_path / "images", dvae_path, config)
    monkeypatch.setattr(DVAE, "encode", None)  # is not called any more
    shards = train_prior(tmp_path / "tokens", tmp_path / "shards", dvae_path, config)
    assert_same_checkpoint(images, shards)
    assert losses(tmp_path / "images") == losses(tmp_path / "shards")


def test_the_run_is_a_pipeline(dvae_run, token_shards, tmp_path):
    train_prior(token_shards, tmp_path, dvae_run, dataclasses.replace(PRIOR_CONFIG, steps=2, images_every=2))
    assert (tmp_path / "images" / "samples-0000001.png").exists()
    pipeline = Pipeline.from_pretrained(tmp_path)
    assert pipeline.generate("a small red circle", num_images=2).images.shape == (2, 3, 16, 16)
    assert dvae_sha256(pipeline.dvae) == read_manifest(token_shards).dvae_sha256


def test_shards_of_another_dvae_are_refused(dvae_path, token_shards, tmp_path):
    message = f"token shards at {token_shards} were encoded by another dVAE than --dvae {dvae_path}"
    with pytest.raises(ValueError, match=rf"^{message}: sha256 \w{{12}} and \w{{12}}$"):
        train_prior(token_shards, tmp_path / "out", dvae_path, PRIOR_CONFIG)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": 2}, "grid of the token shards at {} is (4, 4), that of --dvae {} is (8, 8)"),
        ({"vocab_size": 20}, "vocab_size of the token shards at {} is 12, that of --dvae {} is 20"),
    ],
)
def test_shards_of_a_dvae_of_other_sizes_are_refused(drawings, token_shards, tmp_path, changes, message):
    model = dataclasses.replace(DVAE_CONFIG.model, **changes)
    train_dvae(drawings, tmp_path / "dvae", dataclasses.replace(DVAE_CONFIG, model=model, steps=1))
    with pytest.raises(ValueError, match=re.escape(message.format(token_shards, tmp_path / "dvae"))):
        train_prior(token_shards, tmp_path / "out", tmp_path / "dvae", PRIOR_CONFIG)


def test_a_model_of_another_grid_is_refused(dvae_run, token_shards, tmp_path):
    model = dataclasses.replace(PRIOR_CONFIG.model, grid=(8, 8))
    with pytest.raises(ValueError, match=re.escape("grid must equal the dVAE's grid, got (8, 8) and (4, 4)")):
        train_prior(token_shards, tmp_path, dvae_run, dataclasses.replace(PRIOR_CONFIG, model=model))


def test_resuming_on_shards_of_another_dvae_is_refused(drawings, dvae_path, dvae_run, token_shards, tmp_path):
    start = Run("dalle", token_shards, dvae_run)
    last = start(tmp_path / "run", steps=1)
    encode(dvae_path, drawings, tmp_path / "other", CONFIG)
    pattern = rf"^token shards at .*other were encoded by another dVAE than checkpoint {last}: sha256 "
    with pytest.raises(ValueError, match=pattern):
        Run("dalle", tmp_path / "other", None)(tmp_path / "run", steps=2, resume=True)


def test_more_samples_than_a_batch_are_needed(dvae_run, token_shards, tmp_path):
    message = f"batch_size must be at most the number of usable samples, got batch_size 99 with {DRAWINGS} samples"
    with pytest.raises(ValueError, match=re.escape(message)):
        train_prior(token_shards, tmp_path, dvae_run, dataclasses.replace(PRIOR_CONFIG, batch_size=99))
