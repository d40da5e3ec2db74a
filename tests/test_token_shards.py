"""The files of token shards: what is written comes back, in a repeatable order, and damage is named."""

import dataclasses
import errno
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dalle_fast.data.sources import open_source
from dalle_fast.data.token_shards import (
    TokenManifest,
    TokenShardError,
    TokenSource,
    holds_tokens,
    read_manifest,
    write_manifest,
    write_shard,
)

MANIFEST = TokenManifest(
    dvae_sha256="d" * 64,
    data_sha256="e" * 64,
    image_size=16,
    vocab_size=12,
    grid=[2, 3],
    augment="transformer",
    copies=2,
    seed=0,
    batch_size=4,
    shard_size=4,
    device="cpu",
)
CAPTIONS = ["a circle", "été", "一", "two words", "x", "b" * 300, "a\nline"]
KEYS = [f"part/{number}" for number in range(6)] + ["no \udcff UTF-8"]


def write_set(folder, vocab_size=12, **changes):
    """Seven samples in two shards; returns their tokens (7, copies, 2, 3)."""
    folder.mkdir(exist_ok=True)
    tokens = np.random.default_rng(0).integers(0, vocab_size, (7, 2, 2, 3))
    tokens[0] = vocab_size - 1
    write_shard(folder, 0, tokens[:4], CAPTIONS[:4], KEYS[:4], vocab_size)
    write_shard(folder, 1, tokens[4:], CAPTIONS[4:], KEYS[4:], vocab_size)
    values = {"vocab_size": vocab_size, "shards": [4, 3], "finished": True} | changes
    write_manifest(folder, dataclasses.replace(MANIFEST, **values))
    return tokens


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, "u4")]
)
def test_what_is_written_comes_back(tmp_path, vocab_size, dtype):
    tokens = write_set(tmp_path, vocab_size)
    assert load_file(tmp_path / "tokens-00000.safetensors")["tokens"].dtype == dtype
    source = TokenSource(tmp_path)
    assert len(source) == 7 and source.path == str(tmp_path)
    assert list(source.captions()) == CAPTIONS
    for epoch in range(3):
        for index, sample in source.read(None, epoch):
            assert (sample.key, sample.caption) == (KEYS[index], CAPTIONS[index])
            assert sample.tokens.dtype == np.int64
            assert np.array_equal(sample.tokens, tokens[index, epoch % 2])


def test_order_is_a_permutation_by_seed_and_epoch(tmp_path):
    write_set(tmp_path)
    source = TokenSource(tmp_path)
    orders = {
        (seed, epoch): tuple(sample.key for _, sample in source.read(seed, epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert all(sorted(order) == sorted(KEYS) for order in orders.values())
    assert orders[0, 1] == tuple(sample.key for _, sample in TokenSource(tmp_path).read(0, 1))
    assert orders[0, 1][3:] == tuple(sample.key for _, sample in source.read(0, 1, start=3))


def test_several_threads_may_load(tmp_path):
    tokens = write_set(tmp_path)
    source = TokenSource(tmp_path)
    items = list(source.items(0, 1)) * 200
    with ThreadPoolExecutor(4) as pool:
        for (index, copy), sample in zip(items, pool.map(source.load, items), strict=True):
            assert sample.caption == CAPTIONS[index]
            assert np.array_equal(sample.tokens, tokens[index, copy])


def test_the_manifest_comes_back(tmp_path):
    manifest = dataclasses.replace(MANIFEST, shards=[4], skipped={"corrupt image": 2}, place={"epoch": 0, "bad": {}})
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.json"]


def test_which_folders_hold_tokens(tmp_path):
    assert not holds_tokens(tmp_path)
    assert not holds_tokens(tmp_path / "none")
    write_set(tmp_path)
    assert holds_tokens(tmp_path) and holds_tokens(str(tmp_path))
    (tmp_path / "tokens.json").unlink()
    assert holds_tokens(tmp_path)


def test_images_are_not_read_from_token_shards(tmp_path):
    write_set(tmp_path)
    message = f"path must hold images or .tar shards, got token shards, which only train reads: {tmp_path}"
    with pytest.raises(ValueError, match=re.escape(message)):
        open_source(tmp_path)


def change_manifest(folder, **changes):
    path = folder / "tokens.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_field(folder):
    values = json.loads((folder / "tokens.json").read_text())
    del values["grid"]
    (folder / "tokens.json").write_text(json.dumps(values))


def cut_shard(folder):
    path = folder / "tokens-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


FAULTS = {
    "no manifest": (
        lambda folder: (folder / "tokens.json").unlink(),
        "token shards at OUT lack their manifest, tokens.json",
    ),
    "no JSON": (lambda folder: (folder / "tokens.json").write_text("{"), "cannot read OUT/tokens.json: not JSON ("),
    "no version": (
        lambda folder: (folder / "tokens.json").write_text("[]"),
        "cannot read OUT/tokens.json: it lacks the field format_version",
    ),
    "later version": (
        lambda folder: change_manifest(folder, format_version=2),
        "OUT/tokens.json has format version 2, this dalle_fast reads up to 1; upgrade dalle_fast",
    ),
    "no field": (drop_field, "cannot read OUT/tokens.json: it lacks the field grid"),
    "unfinished": (
        lambda folder: change_manifest(folder, finished=False),
        "token shards at OUT are not finished, 7 samples so far; run the dalle-fast data encode that makes them again",
    ),
    "empty": (
        lambda folder: change_manifest(folder, shards=[]),
        "token shards at OUT must hold at least one sample, got none",
    ),
    "no shard": (
        lambda folder: (folder / "tokens-00001.safetensors").unlink(),
        "token shard OUT/tokens-00001.safetensors is missing",
    ),
    "cut shard": (cut_shard, "token shard OUT/tokens-00001.safetensors is damaged: "),
    "another count": (
        lambda folder: change_manifest(folder, shards=[4, 2]),
        "token shard OUT/tokens-00001.safetensors is damaged: tokens has shape [3, 2, 2, 3], "
        "the manifest says [2, 2, 2, 3]",
    ),
    "another grid": (
        lambda folder: change_manifest(folder, grid=[3, 2]),
        "token shard OUT/tokens-00000.safetensors is damaged: tokens has shape [4, 2, 2, 3], "
        "the manifest says [4, 2, 3, 2]",
    ),
    "another type": (
        lambda folder: change_manifest(folder, vocab_size=300),
        "token shard OUT/tokens-00000.safetensors is damaged: tokens are U8, the manifest says U16",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found_when_a_set_is_opened(tmp_path, fault):
    write_set(tmp_path)
    damage, message = FAULTS[fault]
    damage(tmp_path)
    with pytest.raises(TokenShardError, match="^" + re.escape(message.replace("OUT", str(tmp_path)))) as raised:
        TokenSource(tmp_path)
    assert "\n" not in str(raised.value)


def replace_in_shard(folder, name, value):
    path = folder / "tokens-00000.safetensors"
    save_file(load_file(path) | {name: value}, path)


def test_tokens_out_of_range(tmp_path):
    write_set(tmp_path)
    change_manifest(tmp_path, vocab_size=11)
    path = tmp_path / "tokens-00000.safetensors"
    with pytest.raises(
        TokenShardError, match=re.escape(f"tokens must lie in [0, 11), got 11 in sample part/0 of {path}")
    ):
        TokenSource(tmp_path).load((0, 0))


def test_captions_out_of_range_or_no_text(tmp_path):
    write_set(tmp_path)
    path = tmp_path / "tokens-00000.safetensors"
    arrays = load_file(path)
    replace_in_shard(tmp_path, "caption_ends", np.array([8, 9000, 9001, 9002]))
    with pytest.raises(
        TokenShardError, match=re.escape(f"token shard {path} is damaged: caption 1 lies at bytes 8 to 9000")
    ):
        TokenSource(tmp_path).load((1, 0))
    save_file(arrays | {"captions": arrays["captions"] | 0x80}, path)
    source = TokenSource(tmp_path)
    for read in (lambda: source.load((0, 0)), lambda: list(source.captions())):
        with pytest.raises(TokenShardError, match=re.escape(f"token shard {path} is damaged: 'utf-8' codec")):
            read()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_keeps_what_was_written(tmp_path, monkeypatch, call):
    write_manifest(tmp_path, MANIFEST)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        message = (
            f"cannot write {tmp_path / 'tokens.json'}: No space left on device; what was written before it is kept"
        )
        with pytest.raises(TokenShardError, match=re.escape(message)):
            write_manifest(tmp_path, dataclasses.replace(MANIFEST, finished=True))
    assert read_manifest(tmp_path) == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.json"]
