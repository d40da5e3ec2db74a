"""How many images are drawn together: what the memory allows, and which prompts' images make a batch."""

from __future__ import annotations

import bisect
import math
import os
from pathlib import Path

import torch

from dalle_fast.models.decoder import decoder_bytes
from dalle_fast.models.transformer import Dalle

__all__ = ["available_bytes", "choose_batch_size", "plan_batches"]

LARGEST_BATCH = {"cpu": 64, "cuda": 512}  # more brings next to nothing
MEMINFO = Path("/proc/meminfo")


def choose_batch_size(
    model: Dalle,
    num_prompts: int,
    num_images: int,
    *,
    guided: bool = False,
    cache_dtype: torch.dtype | None = None,
    prefix: int = 0,
    batch_size: int | None = None,
    memory_budget: int | None = None,
) -> int:
    """Images to draw together: ``batch_size`` if it is given, else as many as fit, at most LARGEST_BATCH.

    Args:
        model: what draws them.
        num_prompts, num_images: captions, and images of each.
        guided, cache_dtype: see :class:`dalle_fast.models.decoder.Decoder`.
        prefix: image tokens that are prefilled at most.
        batch_size: images drawn together at most, or None.
        memory_budget: bytes that the decoder may take beside the model; None is :func:`available_bytes`, and no limit
            for a given batch_size.

    Raises:
        ValueError: the batch_size, or without one a single image, takes more than the budget.
    """

    def needed(images: int) -> int:
        prompts, samples = max(1, images // num_images), min(images, num_images)
        return decoder_bytes(model, prompts, samples, guided=guided, cache_dtype=cache_dtype, prefix=prefix)

    total = num_prompts * num_images
    if batch_size is not None:
        if memory_budget is not None and (size := needed(min(batch_size, total))) > memory_budget:
            rule = f"memory_budget must be at least the {size} bytes that batch_size {batch_size} takes"
            raise ValueError(f"{rule}, got {memory_budget}")
        return batch_size
    device = model.image_head.weight.device
    largest = min(total, LARGEST_BATCH.get(device.type, LARGEST_BATCH["cpu"]))
    budget = available_bytes(device) if memory_budget is None else memory_budget
    if budget is None:
        return largest
    fit = bisect.bisect_right(range(1, largest + 1), budget, key=needed)
    if fit == 0 and memory_budget is None:
        raise ValueError(
            f"one image takes {needed(1)} bytes, and {device} has {budget} to spare; memory_budget sets another limit"
        )
    if fit == 0:
        raise ValueError(
            f"memory_budget must be at least the {needed(1)} bytes that one image takes, got {memory_budget}"
        )
    return fit


def available_bytes(device: torch.device) -> int | None:
    """Memory to draw with: four fifths of what is free on a GPU, half of it on a CPU; None where that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # PyTorch holds on to memory that was freed, and hands it out again.
        return (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) * 4 // 5
    free = _free_host_bytes() if device.type == "cpu" else None
    return None if free is None else free // 2


def _free_host_bytes() -> int | None:
    if MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            return int(fields["MemAvailable"].split()[0]) * 1024
    names = getattr(os, "sysconf_names", {})  # none on Windows; macOS says only how much there is in all
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        if pages in names:
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    return None


def plan_batches(num_prompts: int, num_images: int, batch_size: int) -> list[tuple[range, int]]:
    """Which prompts are drawn together, and how many images of each: whole prompts where one fits a batch.

    In order, each image once, and of few different sizes, since a step is captured anew for each.
    """
    if num_images <= batch_size:
        step = _even_share(num_prompts, batch_size // num_images)
        return [(range(first, min(first + step, num_prompts)), num_images) for first in range(0, num_prompts, step)]
    part = _even_share(num_images, batch_size)
    parts = [min(part, num_images - first) for first in range(0, num_images, part)]
    return [(range(prompt, prompt + 1), count) for prompt in range(num_prompts) for count in parts]


def _even_share(total: int, most: int) -> int:
    """Size, at most ``most``, of the fewest parts of ``total`` that are as equal as can be."""
    return math.ceil(total / math.ceil(total / most))
