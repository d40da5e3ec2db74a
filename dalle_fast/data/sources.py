"""Captioned images from disk: a folder or WebDataset shards, read in a repeatable order, in batches.

Formats, told apart by `open_source` (token shards, of images that are encoded already, have a module of their own):
    folder  images (.png .jpg .jpeg .webp .bmp) at any depth, each with a .txt caption of the same stem
    shards  one .tar, a folder of .tar files, or a brace pattern such as "train-{000..099}.tar", in the
            layout of the webdataset package: files that share a stem form one sample

Order: a pure function of (seed, epoch). A folder is permuted as a whole; shards are permuted and then mixed
in a shuffle buffer. The augmentations of a sample are a pure function of (seed, epoch, index), so the state
of a `Loader` is a position and nothing else, and a run that resumes there sees the same batches, bit for bit.

A sample without a usable image or caption is a `BadSample`: skipped, counted under its reason, and the run
stops once too large a share of the samples is bad.

Source of the shard layout: the webdataset package (tested with 1.0.2), whose tar reader is used. Its URL
opener is not, since that runs "pipe:" commands, and neither are its decoders, since they unpickle.
Limits: local files only; resuming inside an epoch of shards reads the skipped samples again.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle_fast.data.images import BadSample

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SHUFFLE_BUFFER_SIZE = 1000
MIN_SEEN_FOR_BAD_SHARE = 100
TOKEN_MANIFEST = "tokens.json"  # tells a folder of token shards
_BLOCK_BYTES = 512  # of a tar archive, which ends with blocks of zeros

Transform = Callable[[Any, np.random.Generator], tuple[Any, ...]]


@dataclass(frozen=True)
class Sample:
    """An undecoded captioned image.

    Attributes:
        key: the path below the data set's root without its suffix, for messages.
        image: the bytes of an image file.
        caption: not empty, stripped of surrounding white space.
    """

    key: str
    image: bytes
    caption: str


class TooManyBadSamples(RuntimeError):
    """More than the allowed share of the samples is bad."""


class Source(ABC):
    """A data set of captioned images, as files or encoded. `open_source` and `token_shards.TokenSource` make one.

    Attributes:
        path: where it was opened, for messages.
    """

    path: str

    @abstractmethod
    def items(self, seed: int | None, epoch: int) -> Iterator[Any]:
        """What `load` turns into the samples of one epoch, in order; seed None keeps the order on disk."""

    @abstractmethod
    def load(self, item: Any) -> Any:
        """Reads one item: a `Sample` (of token shards a `TokenSample`) or a `BadSample`. Safe for several threads."""

    @abstractmethod
    def captions(self) -> Iterator[str]:
        """All usable captions in the order on disk, to train a tokenizer; bad ones are left out in silence.

        Images are not looked at, so the caption of a sample whose image is bad is here too.
        """

    def read(self, seed: int | None, epoch: int, start: int = 0) -> Iterator[tuple[int, Any]]:
        """The samples of one epoch, bad ones in their places, with their positions.

        Args:
            seed: with `epoch` fixes the order; None keeps the order on disk.
            epoch: 0, 1, ...
            start: number of items, good or bad, to skip.
        """
        for index, item in self.positions(seed, epoch, start):
            yield index, self.load(item)

    def positions(self, seed: int | None, epoch: int, start: int) -> Iterator[tuple[int, Any]]:
        """`items` from position `start` on, each with its position, not loaded yet."""
        for index, item in enumerate(self.items(seed, epoch)):
            if index >= start:
                yield index, item


class FolderSource(Source):
    """Images at any depth of a folder, each with a .txt caption of the same stem."""

    def __init__(self, path: str | Path, images: list[str]) -> None:
        self.path = str(path)
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def items(self, seed: int | None, epoch: int) -> Iterator[str]:
        if seed is None:
            return iter(self._images)
        return (self._images[i] for i in order_rng(seed, epoch).permutation(len(self._images)))

    def load(self, item: str) -> Sample | BadSample:
        key = os.path.splitext(item)[0]
        caption = self._caption(key)
        if isinstance(caption, BadSample):
            return caption
        try:
            return Sample(key, _read_bytes(os.path.join(self.path, item)), caption)
        except OSError as error:
            return _unreadable(key, error)

    def captions(self) -> Iterator[str]:
        captions = (self._caption(os.path.splitext(image)[0]) for image in self._images)
        return (caption for caption in captions if isinstance(caption, str))

    def fingerprint(self) -> str:
        """Hash of the names and sizes of all files; it stays when the data set is moved as a whole."""
        names = (name for image in self._images for name in (image, f"{os.path.splitext(image)[0]}.txt"))
        return _fingerprint((name, os.path.join(self.path, name)) for name in names)

    def _caption(self, key: str) -> str | BadSample:
        try:
            return _parse_caption(_read_bytes(os.path.join(self.path, f"{key}.txt")), key)
        except FileNotFoundError:
            return BadSample(f"{key} must have a caption, got no {key}.txt", reason="missing caption", key=key)
        except OSError as error:
            return _unreadable(key, error)


class TarSource(Source):
    """WebDataset shards: tar files in which the files of one sample share a stem and follow each other.

    A shard that breaks off or is damaged gives the samples before the damage and one `BadSample`.
    """

    def __init__(self, path: str | Path, shards: list[str], shuffle_buffer: int = SHUFFLE_BUFFER_SIZE) -> None:
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be >= 1, got {shuffle_buffer}")
        self.path = str(path)
        self._shards = shards
        self._shuffle_buffer = shuffle_buffer

    def items(self, seed: int | None, epoch: int) -> Iterator[Sample | BadSample]:
        if seed is None:
            return self._samples(self._shards)
        rng = order_rng(seed, epoch)
        shards = [self._shards[i] for i in rng.permutation(len(self._shards))]
        return _shuffle(self._samples(shards), self._shuffle_buffer, rng)

    def load(self, item: Sample | BadSample) -> Sample | BadSample:
        return item

    def captions(self) -> Iterator[str]:
        for shard in self._shards:
            for fields in _read_shard(shard, (".txt",)):
                if isinstance(fields, dict) and "txt" in fields:
                    caption = _parse_caption(fields["txt"], fields["__key__"])
                    if isinstance(caption, str):
                        yield caption

    def fingerprint(self) -> str:
        """As of a folder."""
        return _fingerprint((os.path.basename(shard), shard) for shard in self._shards)

    def _samples(self, shards: list[str]) -> Iterator[Sample | BadSample]:
        for shard in shards:
            for fields in _read_shard(shard, (".txt", *IMAGE_SUFFIXES)):
                yield fields if isinstance(fields, BadSample) else _assemble(fields)


def open_source(path: str | Path) -> FolderSource | TarSource:
    """Opens a data set and tells its format.

    Args:
        path: a folder of images, one .tar shard, a folder of shards, or a brace pattern of shards.

    Raises:
        ValueError: there is nothing to read, or a folder holds both images and shards, or token shards.
    """
    path = str(path)
    if os.path.isdir(path):
        if os.path.exists(os.path.join(path, TOKEN_MANIFEST)):
            raise ValueError(f"path must hold images or .tar shards, got token shards, which only train reads: {path}")
        images, shards = _scan(path)
        if images and shards:
            raise ValueError(
                f"path must hold images or .tar shards and not both, got {len(images)} images and "
                f"{len(shards)} shards in {path}"
            )
        if not images and not shards:
            raise ValueError(
                f"path must hold images ({' '.join(IMAGE_SUFFIXES)}) with .txt captions, or .tar shards, "
                f"got a folder with neither: {path}"
            )
        return (
            TarSource(path, [os.path.join(path, shard) for shard in shards]) if shards else FolderSource(path, images)
        )
    if "{" in path and not os.path.exists(path):
        from braceexpand import UnbalancedBracesError, braceexpand

        try:
            shards = list(braceexpand(path))
        except UnbalancedBracesError as error:
            raise ValueError(f"path must be a brace pattern with balanced braces, got {path}") from error
    else:
        shards = [path]
    for shard in shards:
        if not shard.lower().endswith(".tar"):
            raise ValueError(f"path must be a folder or a .tar file, got {shard}")
        if not os.path.isfile(shard):
            raise ValueError(f"path must exist, got {shard}")
    return TarSource(path, shards)


def _scan(root: str) -> tuple[list[str], list[str]]:
    """Images and shards below root as sorted relative paths; hidden files and folders are left out."""
    images, shards = [], []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        below = "" if folder == root else os.path.relpath(folder, root)
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                continue
            if suffix in IMAGE_SUFFIXES:
                images.append(os.path.join(below, name))
            elif suffix == ".tar":
                shards.append(os.path.join(below, name))
    return sorted(images), sorted(shards)


def order_rng(seed: int, epoch: int) -> np.random.Generator:
    """What the order of an epoch is drawn from."""
    # numpy pads short seeds with zeros, so (seed, epoch) alone would equal the stream of sample 0.
    return np.random.default_rng((seed, epoch, 0, 1))


def _shuffle(items: Iterable[Any], size: int, rng: np.random.Generator) -> Iterator[Any]:
    """Mixes a stream through a buffer: each arrival replaces, and sends out, a random one of `size`."""
    buffer: list[Any] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        slot = rng.integers(size)
        leaving, buffer[slot] = buffer[slot], item
        yield leaving
    for slot in rng.permutation(len(buffer)):
        yield buffer[slot]


def _fingerprint(files: Iterable[tuple[str, str]]) -> str:
    """SHA-256 of (name, size) of each file, given as (name, path); one that is not there counts too."""
    digest = hashlib.sha256()
    for name, path in files:
        try:
            size = os.path.getsize(path)
        except OSError:
            size = None
        digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _read_bytes(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def _unreadable(key: str, error: OSError) -> BadSample:
    return BadSample(f"{key} must be readable, got {error}", reason="unreadable file", key=key)


def _parse_caption(data: bytes, key: str) -> str | BadSample:
    try:
        caption = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return BadSample(
            f"caption of {key} must be UTF-8, got byte 0x{error.object[error.start]:02x} at {error.start}",
            reason="caption not UTF-8",
            key=key,
        )
    if not caption:
        return BadSample(f"caption of {key} must not be empty", reason="empty caption", key=key)
    return caption


def _read_shard(shard: str, suffixes: tuple[str, ...]) -> Iterator[dict[str, Any] | BadSample]:
    """The samples of a shard as dictionaries of suffix to bytes, then a BadSample if the shard is damaged."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    faults: list[Exception] = []

    def note(error: Exception) -> bool:
        faults.append(error)
        return True

    try:
        with open(shard, "rb") as stream:
            files = tar_file_expander(
                [{"url": shard, "stream": stream}],
                handler=note,
                select_files=lambda name: name.lower().endswith(suffixes),
            )
            yield from group_by_keys(files, handler=note)
            whole = _ends_like_a_tar(stream)
    except OSError as error:
        yield _unreadable(shard, error)
        return
    if faults or not whole:
        fault = faults[0].args[0] if faults else "it ends without the mark of the end"
        yield BadSample(f"{shard} must be a whole tar file, got a broken one: {fault}", reason="broken tar", key=shard)


def _ends_like_a_tar(stream: Any) -> bool:
    """Whether only zeros were left unread and the last block is zeros.

    The tar reader takes a damaged header, and a file cut between two members, for the end of the archive.
    """
    if any(chunk.strip(b"\0") for chunk in iter(lambda: stream.read(1 << 20), b"")):
        return False
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _BLOCK_BYTES))
    return stream.read() == bytes(_BLOCK_BYTES)


def _assemble(fields: dict[str, Any]) -> Sample | BadSample:
    key = fields["__key__"]
    image = next((fields[suffix[1:]] for suffix in IMAGE_SUFFIXES if suffix[1:] in fields), None)
    if image is None:
        return BadSample(f"{key} must have an image, got none in {fields['__url__']}", reason="missing image", key=key)
    if "txt" not in fields:
        return BadSample(f"{key} must have a caption, got no {key}.txt", reason="missing caption", key=key)
    caption = _parse_caption(fields["txt"], key)
    return caption if isinstance(caption, BadSample) else Sample(key, image, caption)


class Loader:
    """Batches of transformed samples, epoch after epoch without end; one iterator at a time.

    Args:
        source: where samples come from.
        transform: turns (sample, rng) into a tuple of tensors, the same shapes for every sample; may raise
            `BadSample`. It runs in several threads at once when num_workers > 0. What is no tensor comes as a
            tuple of the samples' values.
        batch_size: samples in a batch; of this process, where several train together.
        seed: fixes order and augmentations.
        shuffle: permute the samples anew in each epoch.
        num_workers: threads that load and transform ahead, of use where that takes long; 0 does both in the
            caller. The batches are the same.
        max_bad_share: share of bad samples, of all seen so far, above which iteration stops.
        drop_last: leave out what is left of an epoch when it no longer fills a batch. A batch never spans
            two epochs.

    Attributes:
        bad: number of bad samples by reason, so far.
        bad_examples: key of the first bad sample of each reason.

    Raises:
        ValueError: an argument out of range; while iterating, a data set without a single batch.
        TooManyBadSamples: while iterating, from the 100th sample on and at the end of each epoch.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        num_workers: int = 0,
        max_bad_share: float = 0.05,
        drop_last: bool = True,
    ) -> None:
        self.source = source
        self.transform = transform
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.max_bad_share = max_bad_share
        self.drop_last = drop_last
        for name, least in (("batch_size", 1), ("seed", 0), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share must be in [0, 1], got {max_bad_share}")
        self.bad: dict[str, int] = {}
        self.bad_examples: dict[str, str] = {}
        self._epoch = self._index = self._seen = 0
        self._state = self._snapshot()

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was handed out, as plain JSON values."""
        return {**self._state, "bad": dict(self._state["bad"]), "examples": dict(self._state["examples"])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state`: the next iterator's first batch is the one that would have come next.

        Raises:
            ValueError: a field is missing.
        """
        missing = self._state.keys() - state.keys()
        if missing:
            raise ValueError(f"state must have the field {min(missing)}, got {', '.join(sorted(state))}")
        self._epoch, self._index, self._seen = state["epoch"], state["index"], state["seen"]
        self.bad, self.bad_examples = dict(state["bad"]), dict(state["examples"])
        self._state = self._snapshot()

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Batches from the current position on: each slot of the tuples stacked along a new first dim."""
        self.load_state_dict(self._state)
        while True:
            yield from self._epoch_batches()
            self._epoch, self._index = self._epoch + 1, 0

    def rest_of_epoch(self) -> Iterator[tuple[Any, ...]]:
        """The batches of the current epoch from the current position on."""
        self.load_state_dict(self._state)
        yield from self._epoch_batches()

    def _epoch_batches(self) -> Iterator[tuple[Any, ...]]:
        first = self._index
        usable = 0
        batch: list[tuple[Any, ...]] = []
        for index, result in self._results():
            self._index = index + 1
            self._seen += 1
            if isinstance(result, BadSample):
                self.bad[result.reason] = self.bad.get(result.reason, 0) + 1
                self.bad_examples.setdefault(result.reason, result.key)
            else:
                batch.append(result)
                usable += 1
            if self._seen >= MIN_SEEN_FOR_BAD_SHARE:
                self._check_bad_share()
            if len(batch) == self.batch_size:
                self._state = self._snapshot()
                yield _stack(batch)
                batch = []
        self._check_bad_share()
        if first == 0 and self._index == 0:
            raise ValueError(f"data set must hold at least one captioned image, got none in {self.source.path}")
        if first == 0 and usable < (self.batch_size if self.drop_last else 1):
            raise ValueError(
                f"batch_size must be at most the number of usable samples, got batch_size {self.batch_size} "
                f"with {usable} samples"
            )
        if batch and not self.drop_last:
            self._state = self._snapshot()
            yield _stack(batch)

    def _results(self) -> Iterator[tuple[int, tuple[Any, ...] | BadSample]]:
        """Transformed samples of the current epoch from the current position on, in order."""
        epoch = self._epoch
        positions = self.source.positions(self.seed if self.shuffle else None, epoch, self._index)
        if self.num_workers == 0:
            for index, item in positions:
                yield index, self._prepare(item, epoch, index)
            return
        with ThreadPoolExecutor(self.num_workers, thread_name_prefix="loader") as pool:
            pending: deque[tuple[int, Any]] = deque()
            try:
                for index, item in positions:
                    pending.append((index, pool.submit(self._prepare, item, epoch, index)))
                    if len(pending) >= 2 * self.batch_size + self.num_workers:
                        done, future = pending.popleft()
                        yield done, future.result()
                while pending:
                    done, future = pending.popleft()
                    yield done, future.result()
            finally:
                for _, future in pending:
                    future.cancel()

    def _prepare(self, item: Any, epoch: int, index: int) -> tuple[Any, ...] | BadSample:
        sample = self.source.load(item)
        if isinstance(sample, BadSample):
            return sample
        try:
            return self.transform(sample, np.random.default_rng((self.seed, epoch, index)))
        except BadSample as error:
            return BadSample(str(error), reason=error.reason, key=sample.key)

    def _check_bad_share(self) -> None:
        count = sum(self.bad.values())
        if count > self.max_bad_share * self._seen:
            reason = max(self.bad, key=self.bad.__getitem__)
            raise TooManyBadSamples(
                f"at most {100 * self.max_bad_share:g}% of samples may be bad, got {count} of {self._seen}; "
                f"most often {reason} ({self.bad[reason]}, for example {self.bad_examples[reason]})"
            )

    def _snapshot(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "index": self._index,
            "seen": self._seen,
            "bad": dict(self.bad),
            "examples": dict(self.bad_examples),
        }


def _stack(batch: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    slots = zip(*batch, strict=True)
    return tuple(torch.stack(slot) if isinstance(slot[0], torch.Tensor) else slot for slot in slots)
