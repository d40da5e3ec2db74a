"""What ``dalle-fast sample`` does: draw images for captions, and write them so that each can be drawn again.

OUT.png        all images in a grid; of several captions each has a row
OUT.json       version, checkpoint, settings, and file, caption, seed and score of each image
OUT/0000.png   ... the images by themselves, in the order of OUT.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from dalle_fast import __version__
from dalle_fast.data.images import center_crop, decode_image, image_grid, to_image, to_tensor
from dalle_fast.pipeline import GenerateOutput, Pipeline, SamplingProgress
from dalle_fast.training.loop import choose_device

__all__ = ["run_sample"]

STREAM_SECONDS = 0.3  # between previews at least
STREAM_SHARE = 0.1  # of the time at most that goes into previews
STEPS_AHEAD = 32  # that a GPU may be asked for before the progress bar waits for it


def run_sample(args: argparse.Namespace) -> None:
    """Run the command with the arguments that ``dalle-fast sample --help`` lists.

    Raises:
        ValueError, TypeError, RuntimeError, ArithmeticError, OSError: with one sentence that says what is wrong.
        KeyboardInterrupt: Ctrl-C; the batches that were finished are written, and the message says how many images.
    """
    out = _Out(args.out, singles=args.singles)
    captions = args.captions or _read_captions(args.prompts)
    if args.best is not None and not 1 <= args.best <= args.num_images:
        raise ValueError(f"--best must be in 1..{args.num_images}, the number of images, got {args.best}")
    device = choose_device(args.device)
    pipeline = Pipeline.from_pretrained(args.checkpoint, device=device)
    _check_lengths(pipeline, captions, args.strict)
    dtype = "bfloat16" if args.dtype == "auto" and device.type == "cuda" else args.dtype
    if dtype != "auto":
        pipeline.dalle.cast_blocks(getattr(torch, dtype))
    image, keep_mask = _read_completion(args, pipeline)

    total = len(captions) * args.num_images
    columns = args.num_images if len(captions) > 1 else None
    finished: list[GenerateOutput] = []
    tokens = total * pipeline.dalle.config.image_len
    with warnings.catch_warnings(), tqdm(total=tokens, unit="token", disable=None) as bar:
        warnings.showwarning = lambda message, *rest: print(f"warning: {message}", file=sys.stderr)
        display = _Display(bar, device, _Previews(out, total, columns) if args.stream else None)
        batches = pipeline.generate_batches(
            captions,
            num_images=args.num_images,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            cond_scale=args.cond_scale,
            image=image,
            keep_mask=keep_mask,
            seed=args.seed,
            batch_size=args.batch_size,
            memory_budget=args.memory_budget,
            cache_dtype=args.cache_dtype and getattr(torch, args.cache_dtype),
            on_tokens=display.show,
        )
        interrupted = False
        try:
            for start, output in batches:
                finished.append(output)
                display.finish(start, output.images)
        except KeyboardInterrupt:
            if not finished:
                display.discard()
                raise
            interrupted = True

    drawn = GenerateOutput(*(torch.cat(parts).cpu() for parts in zip(*finished, strict=True)))
    chosen = _choose(drawn.scores, args.num_images, args.best)
    numbers = [number for row in chosen for number in row]
    record = {
        "dalle_fast": __version__,
        "checkpoint": str(args.checkpoint),
        "settings": _settings(args, pipeline),
        "images": [
            {
                "file": out.single(place) if args.singles else None,
                "prompt": captions[number // args.num_images],
                "seed": args.seed + number,
                "score": float(drawn.scores[number]),
            }
            for place, number in enumerate(numbers)
        ],
    }
    out.write(record, drawn.images[numbers] if args.singles else None)
    out.write_grid(*_rows(drawn.images, chosen))
    if interrupted:
        raise KeyboardInterrupt(f"interrupted: {len(drawn.scores)} of {total} images are finished, in {args.out}")
    print(args.out)


class _Out:
    """The files that one call writes; those of an earlier call are replaced, and nothing else is touched.

    Raises:
        ValueError: no image format has the suffix, or other files are in the way.
    """

    def __init__(self, grid: Path, *, singles: bool) -> None:
        self.format = Image.registered_extensions().get(grid.suffix.lower())
        if self.format not in Image.SAVE:
            raise ValueError(f"--out must end in the suffix of an image format, got {grid}")
        self.grid, self.record, self.folder = grid, grid.with_suffix(".json"), grid.with_suffix("")
        if grid.is_dir():
            raise ValueError(f"{grid} is a folder; name another --out")
        self.earlier = self._read_earlier()
        if singles and self.folder.exists():
            others = sorted(self.folder.iterdir()) if self.folder.is_dir() else [self.folder]
            others = [path for path in others if path not in self.earlier]
            if others:
                raise ValueError(
                    f"{others[0]} is in the way and of no earlier sample; name another --out, or pass --no-singles"
                )

    def _read_earlier(self) -> list[Path]:
        """Single images that an earlier call wrote and that are still there."""
        if not self.record.exists():
            return []
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            _, entries = record["dalle_fast"], record["images"]
            names = [Path(entry["file"]).name for entry in entries if entry["file"] is not None]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.record} is in the way and of no earlier sample; name another --out") from error
        paths = [self.folder / name for name in names if re.fullmatch(r"\d{4,}\.png", name)]
        return [path for path in paths if path.exists()]

    def single(self, place: int) -> str:
        """The file of the image in this place of the order, as seen from the record."""
        return f"{self.folder.name}/{place:04}.png"

    def write(self, record: dict[str, Any], images: Tensor | None) -> None:
        """Write the record and, unless they are None, the single images in its order."""
        self.grid.parent.mkdir(parents=True, exist_ok=True)
        for path in self.earlier:
            path.unlink(missing_ok=True)
        if images is None and self.earlier and not any(self.folder.iterdir()):
            self.folder.rmdir()
        # First, so that a call that is killed within the images leaves no file of which it is not known whose it is.
        self.record.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if images is not None:
            self.folder.mkdir(exist_ok=True)
            for place, image in enumerate(images):
                to_image(image).save(self.record.parent / self.single(place))

    def write_grid(self, images: Tensor, columns: int | None) -> None:
        """Write the grid, whole or not at all."""
        self.grid.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.grid.with_name(f".{self.grid.name}.tmp")
        to_image(image_grid(images, columns)).save(temporary, format=self.format)
        os.replace(temporary, self.grid)


class _Previews:
    """Writes the grid while it is drawn: finished images, the drawn part of others, and grey."""

    def __init__(self, out: _Out, total: int, columns: int | None) -> None:
        self.out, self.total, self.columns = out, total, columns
        self.images: Tensor | None = None
        self._due = time.monotonic()

    def put(self, start: int, images: Tensor) -> None:
        """Show these in the places from ``start`` on."""
        if self.images is None:
            self.images = torch.full((self.total, *images.shape[1:]), 0.5)
        self.images[start : start + len(images)] = images.cpu()

    def show(self, progress: SamplingProgress) -> None:
        """Write the grid, unless the last time is too recent."""
        began = time.monotonic()
        if began < self._due:
            return
        self.put(progress.start, progress.preview())
        self.out.write_grid(self.images, self.columns)
        now = time.monotonic()
        self._due = now + max(STREAM_SECONDS, (now - began) / STREAM_SHARE)


class _Display:
    """Progress bar and previews."""

    def __init__(self, bar: tqdm, device: torch.device, previews: _Previews | None) -> None:
        self.bar, self.device, self.previews = bar, device, previews
        self._began = time.monotonic()

    def show(self, progress: SamplingProgress) -> None:
        """Called after each step."""
        if self.device.type == "cuda" and progress.position % STEPS_AHEAD == 0:
            torch.cuda.synchronize(self.device)
        if not self.bar.disable:
            images = progress.done / progress.tokens[0].numel()
            speed = images / max(time.monotonic() - self._began, 1e-9)
            self.bar.set_postfix_str(f"{speed:.3g} images/s", refresh=False)
            self.bar.update(progress.done - self.bar.n)
        if self.previews is not None:
            self.previews.show(progress)

    def finish(self, start: int, images: Tensor) -> None:
        """Called after each batch."""
        if self.previews is not None:
            self.previews.put(start, images)

    def discard(self) -> None:
        """Remove what previews wrote."""
        if self.previews is not None and self.previews.images is not None:
            self.previews.out.grid.unlink(missing_ok=True)


def _read_captions(path: Path) -> list[str]:
    captions = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not captions:
        raise ValueError(f"--prompts must hold at least one caption, got none in {path}")
    return captions


def _check_lengths(pipeline: Pipeline, captions: list[str], strict: bool) -> None:
    limit = pipeline.dalle.config.caption_len
    for number, caption in enumerate(captions, start=1):
        if caption.strip() and (length := len(pipeline.tokenizer.encode(caption))) > limit:
            name = "the caption" if len(captions) == 1 else f"caption {number}"
            message = f"{name} has {length} tokens, and this model reads {limit}"
            if strict:
                raise ValueError(message)
            print(f"warning: {message}; the rest is cut", file=sys.stderr)


def _read_completion(args: argparse.Namespace, pipeline: Pipeline) -> tuple[Tensor | None, Tensor | None]:
    """The image to complete and the mask of the tokens to keep, as :meth:`Pipeline.generate` takes them."""
    if args.image is None:
        return None, None
    picture = decode_image(args.image.read_bytes())
    image = to_tensor(center_crop(picture, pipeline.dvae.config.image_size))
    rows, columns = pipeline.dalle.config.grid
    if args.keep_rows is not None:
        if not 1 <= args.keep_rows <= rows:
            raise ValueError(f"--keep-rows must be in 1..{rows}, the rows of tokens, got {args.keep_rows}")
        return image, (torch.arange(rows) < args.keep_rows)[:, None].expand(rows, columns)
    if args.keep_mask is not None:
        mask = decode_image(args.keep_mask.read_bytes()).convert("L")
        fit = ImageOps.fit if mask.size == picture.size else Image.Image.resize
        return image, torch.from_numpy(np.asarray(fit(mask, (columns, rows), Image.Resampling.NEAREST)) >= 128)
    return image, None


def _choose(scores: Tensor, num_images: int, best: int | None) -> list[list[int]]:
    """Numbers of the images to keep, prompt by prompt: all, or those of highest score, in order."""
    rows = [list(range(first, min(first + num_images, len(scores)))) for first in range(0, len(scores), num_images)]
    if best is None:
        return rows
    values = scores.tolist()
    return [sorted(row, key=lambda number: -values[number])[:best] for row in rows]


def _rows(images: Tensor, chosen: list[list[int]]) -> tuple[Tensor, int | None]:
    """Images and columns of a grid with a row for each prompt, white where one has fewer; of one prompt a square."""
    if len(chosen) == 1:
        return images[chosen[0]], None
    columns = max(map(len, chosen))
    white = torch.ones_like(images[:1])
    return torch.cat([part for row in chosen for part in (images[row], *[white] * (columns - len(row)))]), columns


def _settings(args: argparse.Namespace, pipeline: Pipeline) -> dict[str, Any]:
    """What, beside a caption and a seed, an image depends on, and what was asked of the machine."""
    names = ("temperature", "top_k", "top_p", "cond_scale", "image", "keep_rows", "keep_mask", "cache_dtype")
    names += ("num_images", "best", "batch_size", "memory_budget")
    values = {name: getattr(args, name) for name in names}
    weight = pipeline.dalle.layers[0]["attention"].qkv.weight
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()} | {
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
    }
