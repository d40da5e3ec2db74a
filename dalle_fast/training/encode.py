"""Encode captioned images to token shards, so that stage two never runs the dVAE (``dalle-fast data encode``).

Images are read in the order on disk and encoded in batches that do not depend on where an earlier process stopped, so
that a set which was made in parts is, on a CPU, bit for bit the one made at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dalle_fast.config import to_dict
from dalle_fast.data.images import augment_for_transformer, center_crop, decode_image, to_tensor
from dalle_fast.data.sources import TOKEN_MANIFEST, FolderSource, Loader, Sample, open_source
from dalle_fast.data.token_shards import (
    TokenManifest,
    TokenShardError,
    TokenSource,
    read_manifest,
    write_manifest,
    write_shard,
)
from dalle_fast.models.dvae import DVAE
from dalle_fast.pipeline import load_dvae
from dalle_fast.training.loop import choose_device

__all__ = ["EncodeConfig", "check_encoded_by", "dvae_sha256", "encode"]

_PROGRESS = ("shards", "skipped", "place", "finished")  # fields of a manifest that change while it is made


@dataclass(frozen=True)
class EncodeConfig:
    """How to encode."""

    augment: Literal["transformer", "none"] = field(
        default="transformer", metadata={"help": "random crops, as training on images draws them, or the centre crop"}
    )
    copies: int = field(default=1, metadata={"help": "differently augmented encodings of each image"})
    seed: int = field(default=0, metadata={"help": "of the augmentation"})
    batch_size: int = field(default=64, metadata={"help": "images encoded together"})
    shard_size: int = field(default=4096, metadata={"help": "images in a shard, rounded up to whole batches"})
    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", metadata={"help": "auto takes a GPU if there is one"}
    )
    num_workers: int = field(default=2, metadata={"help": "threads that read and augment ahead"})
    max_bad_share: float = field(default=0.05, metadata={"help": "share of unusable samples above which it stops"})

    def __post_init__(self) -> None:
        for name in ("copies", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.augment == "none" and self.copies > 1:
            raise ValueError(f"copies must be 1 with augment none, which makes all copies equal, got {self.copies}")


def encode(
    dvae_path: str | Path,
    data: str | Path,
    out: str | Path,
    config: EncodeConfig,
    *,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> TokenManifest:
    """Encode the images at ``data`` into token shards, and return the manifest of the finished set.

    A set that an earlier process left unfinished is continued after its last shard; with the same arguments, a
    finished one is left as it is. The augmentation of a copy is a function of (seed, place of the image in the data,
    number of the copy). Bad samples are skipped and counted, as in training.

    Args:
        dvae_path: run or checkpoint of the dVAE; averaged weights are used if there are any.
        data: see :func:`dalle_fast.data.sources.open_source`.
        out: new or empty folder, or one that this function has begun.
        on_progress: called with the usable samples so far and, where it is known, the number of all.

    Raises:
        ValueError: an argument out of range, no data, or ``out`` holds something else, or a set that was made from
            other data, by another dVAE or with other options.
        TokenShardError: a file cannot be read or written.
        TooManyBadSamples: as the loader raises it.
    """
    out = Path(out)
    source, dvae, device = open_source(data), load_dvae(dvae_path), choose_device(config.device)
    size = dvae.config.image_size
    fresh = TokenManifest(
        dvae_sha256=dvae_sha256(dvae),
        data_sha256=source.fingerprint(),
        image_size=size,
        vocab_size=dvae.config.vocab_size,
        grid=[dvae.config.grid, dvae.config.grid],
        augment=config.augment,
        copies=config.copies,
        seed=config.seed,
        batch_size=config.batch_size,
        shard_size=config.shard_size,
        device=device.type,
    )

    def transform(sample: Sample, rng: np.random.Generator) -> tuple[Tensor, str, str]:
        image = decode_image(sample.image)
        if config.augment == "none":
            crops = [center_crop(image, size)]
        else:
            # One after the other from one generator: a copy does not depend on how many follow.
            crops = [augment_for_transformer(image, size, rng) for _ in range(config.copies)]
        return torch.stack([to_tensor(crop) for crop in crops]), sample.caption, sample.key

    loader = Loader(
        source,
        transform,
        config.batch_size,
        seed=config.seed,
        shuffle=False,
        num_workers=config.num_workers,
        max_bad_share=config.max_bad_share,
        drop_last=False,
    )
    manifest = _begin_or_continue(out, fresh, f"dVAE {dvae_path}", data)
    if manifest.place is not None:
        loader.load_state_dict(manifest.place)
    total = len(source) if isinstance(source, FolderSource) else None
    report = on_progress or (lambda done, total: None)
    report(manifest.samples, total)
    if manifest.finished:
        return manifest

    dvae = dvae.to(device, memory_format=torch.channels_last)

    def tokens_of(images: Tensor) -> np.ndarray:
        images = images.to(device).contiguous(memory_format=torch.channels_last)
        return dvae.encode(images).cpu().numpy()

    shard = _OpenShard()
    for images, captions, keys in loader.rest_of_epoch():
        shard.add(np.stack([tokens_of(copy) for copy in images.unbind(1)], axis=1), captions, keys)
        report(manifest.samples + len(shard), total)
        if len(shard) >= config.shard_size:
            manifest = shard.close(out, manifest, skipped=dict(loader.bad), place=loader.state_dict())
            write_manifest(out, manifest)
            shard = _OpenShard()
    manifest = shard.close(out, manifest, skipped=dict(loader.bad), place=None)
    manifest = dataclasses.replace(manifest, finished=True)
    write_manifest(out, manifest)
    return manifest


class _OpenShard:
    """Samples that are not on disk yet."""

    def __init__(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._captions: list[str] = []
        self._keys: list[str] = []

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, tokens: np.ndarray, captions: tuple[str, ...], keys: tuple[str, ...]) -> None:
        self._tokens.append(tokens)
        self._captions += captions
        self._keys += keys

    def close(self, out: Path, manifest: TokenManifest, **progress: object) -> TokenManifest:
        """Write the shard, if it holds anything, and return the manifest that counts it."""
        shards = manifest.shards
        if self._keys:
            tokens = np.concatenate(self._tokens)
            write_shard(out, len(shards), tokens, self._captions, self._keys, manifest.vocab_size)
            shards = [*shards, len(self._keys)]
        return dataclasses.replace(manifest, shards=shards, **progress)


def dvae_sha256(dvae: DVAE) -> str:
    """Hash of a dVAE's configuration and weights; equal hashes mean equal tokens, up to the machine's rounding."""
    # Only what departs from the defaults: a field that a later version adds does not change the hash.
    defaults = to_dict(type(dvae.config)())
    config = {name: value for name, value in to_dict(dvae.config).items() if value != defaults[name]}
    digest = hashlib.sha256(repr(sorted(config.items())).encode())
    for name, tensor in sorted(dvae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()


def check_encoded_by(source: TokenSource, dvae: DVAE, name: str) -> None:
    """Raise ValueError unless ``dvae``, called ``name`` in the message, is the one that encoded the token shards."""
    manifest, config = source.manifest, dvae.config
    for field_name, own, other in (
        ("grid", tuple(manifest.grid), (config.grid, config.grid)),
        ("vocab_size", manifest.vocab_size, config.vocab_size),
    ):
        if own != other:
            raise ValueError(f"{field_name} of the token shards at {source.path} is {own}, that of {name} is {other}")
    sha256 = dvae_sha256(dvae)
    if manifest.dvae_sha256 != sha256:
        raise ValueError(
            f"token shards at {source.path} were encoded by another dVAE than {name}: "
            f"sha256 {manifest.dvae_sha256[:12]} and {sha256[:12]}"
        )


def _begin_or_continue(out: Path, fresh: TokenManifest, dvae_name: str, data: str | Path) -> TokenManifest:
    """The manifest to go on from, on disk."""
    if not (out / TOKEN_MANIFEST).exists():
        if out.exists() and (not out.is_dir() or any(path for path in out.iterdir() if not _is_left_over(path))):
            raise ValueError(f"out must be a new or empty folder, or token shards that were begun, got {out}")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TokenShardError(f"cannot make {out}: {error.strerror}") from error
        write_manifest(out, fresh)
        return fresh
    manifest = read_manifest(out)
    if manifest.dvae_sha256 != fresh.dvae_sha256:
        raise ValueError(
            f"token shards at {out} were begun with another dVAE than {dvae_name}: "
            f"sha256 {manifest.dvae_sha256[:12]} and {fresh.dvae_sha256[:12]}"
        )
    if manifest.data_sha256 != fresh.data_sha256:
        raise ValueError(
            f"token shards at {out} were begun with other data than {data}: names or sizes of its files differ"
        )
    for name, own in dataclasses.asdict(manifest).items():
        if name not in _PROGRESS and own != getattr(fresh, name):
            raise ValueError(f"token shards at {out} were begun with {name} {own}, got {getattr(fresh, name)}")
    for path in filter(_is_left_over, out.iterdir()):
        path.unlink()
    return manifest


def _is_left_over(path: Path) -> bool:
    """Whether a write that was killed left this file."""
    return path.name.startswith(f".{TOKEN_MANIFEST}") or (path.name.startswith(".tokens-") and path.suffix == ".tmp")
