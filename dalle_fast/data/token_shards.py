"""Token shards: captioned images that the dVAE has encoded already, so that training on them never runs it.

A folder of

    tokens.json                   the manifest: how the set was made, and how far it has got (`TokenManifest`)
    tokens-00000.safetensors      a shard of N samples:
        tokens                    (N, copies, h, w) in the smallest unsigned type that holds the vocabulary
        captions, keys            uint8: the UTF-8 bytes of all samples, one after the other
        caption_ends, key_ends    (N,) int64: where each sample's bytes end

Copy c of a sample holds the tokens of another augmentation of its image; epoch e of training reads copy
e mod copies. The order of an epoch is one permutation of the whole set, a pure function of (seed, epoch).

Files are written under a hidden name, flushed to disk and renamed, a shard before the manifest that counts it. A
process that is killed therefore leaves whole shards and a manifest that tells how many are good. Shards are mapped
into memory and read sample by sample, so a set may be larger than memory; an epoch's order takes 8 bytes a sample.

Limits: one writer a folder; local files.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dalle_fast.data.sources import TOKEN_MANIFEST, Source, order_rng

FORMAT_VERSION = 1
_DTYPES = (np.uint8, np.uint16, np.uint32)
_DTYPE_NAMES = {np.uint8: "U8", np.uint16: "U16", np.uint32: "U32"}  # as safetensors spells them

_TEXT_ERRORS = {"caption": "strict", "key": "surrogateescape"}  # file names may be no UTF-8


class TokenShardError(RuntimeError):
    """Token shards cannot be written or read; the message is one sentence with the path and the cause."""


@dataclass(frozen=True)
class TokenSample:
    """An encoded captioned image.

    Attributes:
        key: that of the image it was made from.
        tokens: (h, w) int64.
        caption: as of a `Sample`.
    """

    key: str
    tokens: np.ndarray
    caption: str


@dataclass(frozen=True)
class TokenManifest:
    """What tokens.json says.

    Attributes:
        dvae_sha256: of the dVAE that encoded.
        data_sha256: fingerprint of the images' files.
        image_size: side of the encoded crops in pixels.
        vocab_size: number of codes; tokens lie below it.
        grid: (h, w) of an image's tokens.
        augment: "transformer", random crops, or "none", the centre crop.
        copies: augmentations of each image.
        seed: of the augmentations.
        batch_size: images that were encoded together, on which the last bits of a sum may depend.
        shard_size: samples that close a shard, rounded up to whole batches.
        device: "cpu" or "cuda", on which they may depend too.
        shards: samples of each shard.
        skipped: bad samples by reason.
        place: state of the loader after the last shard; None once the set is finished.
        finished: whether all of the data is in.
    """

    dvae_sha256: str
    data_sha256: str
    image_size: int
    vocab_size: int
    grid: list[int]
    augment: str
    copies: int
    seed: int
    batch_size: int
    shard_size: int
    device: str
    shards: list[int] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    place: dict[str, Any] | None = None
    finished: bool = False

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return sum(self.shards)


def holds_tokens(path: str | Path) -> bool:
    """Whether `path` is a folder of token shards, be it one whose manifest is lost."""
    folder = Path(path)
    return folder.is_dir() and ((folder / TOKEN_MANIFEST).exists() or any(folder.glob("tokens-*.safetensors")))


def read_manifest(folder: str | Path) -> TokenManifest:
    """The manifest of a set, finished or not.

    Raises:
        TokenShardError: it is missing, damaged, or of a later version.
    """
    path = Path(folder) / TOKEN_MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TokenShardError(f"token shards at {folder} lack their manifest, {TOKEN_MANIFEST}") from None
    except OSError as error:
        raise TokenShardError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise TokenShardError(f"cannot read {path}: not JSON ({error})") from error
    version = values.pop("format_version", None) if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise TokenShardError(f"cannot read {path}: it lacks the field format_version")
    # Before the other fields: a later version may have renamed them.
    if version > FORMAT_VERSION:
        raise TokenShardError(
            f"{path} has format version {version}, this dalle_fast reads up to {FORMAT_VERSION}; upgrade dalle_fast"
        )
    names = [field.name for field in dataclasses.fields(TokenManifest)]
    for name in names:
        if name not in values:
            raise TokenShardError(f"cannot read {path}: it lacks the field {name}")
    return TokenManifest(**{name: values[name] for name in names})


def write_manifest(folder: Path, manifest: TokenManifest) -> None:
    """Replace the manifest, atomically.

    Raises:
        TokenShardError: the disk is full, the folder is not writable, ...; the old manifest survives.
    """
    values = {"format_version": FORMAT_VERSION} | dataclasses.asdict(manifest)
    _write(folder / TOKEN_MANIFEST, (json.dumps(values, indent=1) + "\n").encode())


def write_shard(
    folder: Path, number: int, tokens: np.ndarray, captions: Sequence[str], keys: Sequence[str], vocab_size: int
) -> None:
    """Write shard `number` atomically; it counts once a manifest names it.

    Args:
        tokens: (N, copies, h, w) integers in [0, vocab_size).
        captions, keys: N each.

    Raises:
        TokenShardError: as `write_manifest`.
    """
    arrays = {"tokens": tokens.astype(_dtype_of(vocab_size))}
    for name, texts in (("caption", captions), ("key", keys)):
        parts = [text.encode(errors=_TEXT_ERRORS[name]) for text in texts]
        arrays[f"{name}s"] = np.frombuffer(b"".join(parts), np.uint8)
        arrays[f"{name}_ends"] = np.cumsum([len(part) for part in parts], dtype=np.int64)
    _write(_shard_path(folder, number), save(arrays))


class TokenSource(Source):
    """A finished set of token shards, as `training.encode` writes it.

    Attributes:
        path: its folder.
        manifest: how it was made.

    Raises:
        TokenShardError: the manifest is missing or damaged, the set is unfinished or empty, or a shard is missing,
            damaged or contradicts the manifest. Damage to a sample is only found where it is read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.manifest = manifest = read_manifest(path)
        if not manifest.finished:
            raise TokenShardError(
                f"token shards at {path} are not finished, {manifest.samples} samples so far; "
                "run the dalle-fast data encode that makes them again"
            )
        if not manifest.samples:
            raise TokenShardError(f"token shards at {path} must hold at least one sample, got none")
        self._shards = [
            _Shard(_shard_path(Path(path), number), count, manifest) for number, count in enumerate(manifest.shards)
        ]
        self._ends = np.cumsum(manifest.shards)

    def __len__(self) -> int:
        return self.manifest.samples

    def items(self, seed: int | None, epoch: int) -> Iterator[tuple[int, int]]:
        order = range(len(self)) if seed is None else order_rng(seed, epoch).permutation(len(self))
        return ((int(index), epoch % self.manifest.copies) for index in order)

    def load(self, item: tuple[int, int]) -> TokenSample:
        index, copy = item
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        return shard.sample(index - int(self._ends[number]) + shard.count, copy)

    def captions(self) -> Iterator[str]:
        return (caption for shard in self._shards for caption in shard.captions())


class _Shard:
    """One mapped file."""

    def __init__(self, path: Path, count: int, manifest: TokenManifest) -> None:
        self.path, self.count, self._vocab_size = path, count, manifest.vocab_size
        shapes = {
            "tokens": [count, manifest.copies, *manifest.grid],
            "caption_ends": [count],
            "key_ends": [count],
        }
        try:
            file = safe_open(path, framework="np")
            slices = {name: file.get_slice(name) for name in (*shapes, "captions", "keys")}
        except FileNotFoundError:
            raise TokenShardError(f"token shard {path} is missing; encode the data into a new folder") from None
        except (OSError, SafetensorError) as error:
            raise self._damaged(error) from error
        for name, shape in shapes.items():
            if slices[name].get_shape() != shape:
                raise self._damaged(f"{name} has shape {slices[name].get_shape()}, the manifest says {shape}")
        dtype = _DTYPE_NAMES[_dtype_of(manifest.vocab_size)]
        if slices["tokens"].get_dtype() != dtype:
            raise self._damaged(f"tokens are {slices['tokens'].get_dtype()}, the manifest says {dtype}")
        self._file, self._slices = file, slices

    def sample(self, index: int, copy: int) -> TokenSample:
        key = self._text("key", index)
        tokens = self._slices["tokens"][index, copy].astype(np.int64)
        if tokens.max() >= self._vocab_size:
            raise TokenShardError(
                f"tokens must lie in [0, {self._vocab_size}), got {tokens.max()} in sample {key} of {self.path}"
            )
        return TokenSample(key, tokens, self._text("caption", index))

    def captions(self) -> Iterator[str]:
        ends = self._file.get_tensor("caption_ends")
        data = self._file.get_tensor("captions").tobytes()
        begin = 0
        for end in ends:
            yield self._decode("caption", data[begin:end])
            begin = end

    def _text(self, name: str, index: int) -> str:
        ends = self._slices[f"{name}_ends"][max(index - 1, 0) : index + 1]
        begin, end = (int(ends[0]) if index else 0), int(ends[-1])
        if not 0 <= begin <= end <= self._slices[f"{name}s"].get_shape()[0]:
            raise self._damaged(f"{name} {index} lies at bytes {begin} to {end}")
        return self._decode(name, self._slices[f"{name}s"][begin:end].tobytes())

    def _decode(self, name: str, data: bytes) -> str:
        try:
            return data.decode(errors=_TEXT_ERRORS[name])
        except UnicodeDecodeError as error:
            raise self._damaged(error) from error

    def _damaged(self, cause: Exception | str) -> TokenShardError:
        return TokenShardError(f"token shard {self.path} is damaged: {cause}; encode the data into a new folder")


def _dtype_of(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest unsigned type that holds the codes below `vocab_size`."""
    return next(dtype for dtype in _DTYPES if vocab_size - 1 <= np.iinfo(dtype).max)


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"tokens-{number:05d}.safetensors"


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TokenShardError(f"cannot write {path}: {error.strerror}; what was written before it is kept") from error
