"""The least time an H200 could take for each Triton kernel, from its machine code, its tiles and its traffic.

    python tests/roofline.py    tables in Markdown, of the newest version of Triton in sass.json

Attention at the published size, B 8, H 62, D 64; a step of decoding of 512 samples of one prompt at that size; Gumbel
quantisation of 64 images, 65,536 positions with 8192 codes of 128 values; all in bfloat16. Four parts of the device
could each be what takes longest:

    issue    instructions of the loops, one a clock for each of the four schedulers of a multiprocessor
    tensor   multiplications of all pairs the tiles compute, masked ones too
    ex2      16 exponentials or logarithms a clock and multiprocessor
    memory   every input read once and every result written once

and for a step of decoding, where each program reads the text anew,

    L2       what all programs read, between L2 and the multiprocessors

The bound is the longest of them. Latency, the code outside the loops, traffic between L2 and the multiprocessors where
it is not in the table, and the last programs of a launch, which leave some multiprocessors idle, come on top.
"""

import sys

import sass
from dalle_fast.kernels import attention_backward, attention_forward, kv_cache
from dalle_fast.kernels.common import (
    COLUMN,
    ROW_RASTER,
    SHIPPED_PATTERNS,
    Geometry,
    Tiles,
    num_image_tiles,
    text_keys,
    text_queries,
    tile_geometry,
    tile_window,
)

from dalle_fast.patterns import Column, Conv, Row

ARCHITECTURE, BATCH, HEADS, HEAD_DIM, ITEMSIZE = 90, 8, 62, 64, 2
# What a large matrix product and a large copy reach on an H200, and its clock under load: the usual measurements, none
# of them this project's.
MACS_PER_SECOND = 790e12 / 2
BYTES_PER_SECOND = 4.3e12
L2_BYTES_PER_SECOND = 5.5e12
CLOCK = 1.85e9

PATTERNS = {"row": Row, "column": Column, "conv": Conv}
TABLES = {
    "fwd": attention_forward.TILES,
    "dq": attention_backward.DQ_TILES,
    "dkdv": attention_backward.DKDV_TILES,
}
PRODUCTS = {"fwd": 2, "dq": 3, "dkdv": 4}
TENSORS = {"fwd": 4, "dq": 6, "dkdv": 6}  # of the size of q: read and written


def steps_of_loops(kernel: str, geometry: Geometry, tiles: Tiles) -> list[int]:
    """Steps that all programs of one head take in each loop of the kernel, in the order of its code."""
    later = kernel == "dkdv"
    num_image = geometry.height * geometry.width
    length = geometry.text_len + num_image
    text = [0, 0]
    starts = list(range(0, geometry.text_len, tiles.block))
    image_tiles = num_image_tiles(num_image, tiles.block, geometry)
    if later:
        for start in starts:
            first, causal_stop, last = text_queries.fn(
                start, length, geometry.text_len, 0, 1, tiles.block, tiles.step
            )  # fmt: skip
            text[0] += causal_stop - first
            text[1] += last - causal_stop
    else:
        for start in [*starts, *[geometry.text_len] * image_tiles]:
            dense_stop, stop = text_keys.fn(start, length, geometry.text_len, tiles.block, tiles.step)
            text[0] += dense_stop // tiles.step
            text[1] += -(-(stop - dense_stop) // tiles.window_step) if stop > dense_stop else 0
    window = [0, 0, 0]  # before the steps without a mask, those, after them
    for tile in range(image_tiles):
        _, begin, end, steps = tile_window.fn(tile, num_image, tiles.block, tiles.window_step, geometry, later)
        for place, number in enumerate((begin, end - begin, steps - end)):
            window[place] += number
    if not geometry.dense:
        return [*text, window[2]]
    if geometry.rule == ROW_RASTER.value:
        return [*text, *window]
    assert geometry.rule == COLUMN.value
    # A column's first query sees its first key, and its last key is seen by the last query.
    return [*text, window[0], window[1]] if later else [*text, window[1], window[2]]


def least_seconds(kernel: str, name: str, figures: sass.Figures) -> dict[str, float]:
    """Each part's time for ``kernel`` on the pattern of SHIPPED_PATTERNS with this name."""
    tiles, _ = TABLES[kernel][ARCHITECTURE // 10, ITEMSIZE, HEAD_DIM]
    geometry = tile_geometry(SHIPPED_PATTERNS[name], tiles.block, tiles.window_step)
    steps = steps_of_loops(kernel, geometry, tiles)
    if len(steps) != len(figures.loops):
        raise ValueError(f"{kernel} of {name} has {len(figures.loops)} loops in its machine code, not {len(steps)}")
    chip, heads = sass.CHIPS[ARCHITECTURE], BATCH * HEADS
    clocks = [sass.clocks(loop, figures, ARCHITECTURE) for loop in figures.loops]
    issue, tensor, ex2 = (sum(n * clock[kind] for n, clock in zip(steps, clocks, strict=True)) for kind in range(3))
    per_clock = heads / (chip.device.num_sms * CLOCK)
    length = geometry.text_len + geometry.height * geometry.width
    return {
        "issue": issue * per_clock,
        "tensor": tensor * chip.macs * heads / MACS_PER_SECOND,
        "ex2": ex2 * per_clock,
        "memory": TENSORS[kernel] * heads * length * HEAD_DIM * ITEMSIZE / BYTES_PER_SECOND,
    }


def table(record: dict[str, dict[str, sass.Figures]]) -> str:
    """All kernels that sass.json has at this size, as Markdown; microseconds."""
    version = max(record, key=lambda version: [int(n) for n in version.split(".")])
    parts = ["issue", "tensor", "ex2", "memory"]
    rows = [["kernel", "pattern", "useful", *parts, "bound", "by"], ["---", "---", *["--:"] * 6, "---"]]
    for kernel in TABLES:
        for name in SHIPPED_PATTERNS:
            kind, _, side = name.partition("-")
            figures = record[version].get(f"attention_{kernel}-{name}-{HEAD_DIM}-bfloat16-sm_{ARCHITECTURE}")
            if kind not in PATTERNS or figures is None:
                continue
            seconds = least_seconds(kernel, name, figures)
            pattern = PATTERNS[kind](SHIPPED_PATTERNS[name][1], int(side))
            useful = pattern.nnz() * HEAD_DIM * PRODUCTS[kernel] * BATCH * HEADS / MACS_PER_SECOND
            slowest = max(seconds, key=seconds.get)
            numbers = [useful, *(seconds[part] for part in parts), seconds[slowest]]
            micro = [f"{number * 1e6:,.0f}" for number in numbers]
            rows.append([kernel, f"{kind}, {side} x {side}", *micro, slowest])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


SAMPLES = 512  # of one prompt


def least_step_seconds(name: str, figures: sass.Figures) -> dict[str, float]:
    """Each part's time for a step of decoding, as a mean over the positions of an image."""
    if len(figures.loops) != 3:
        raise ValueError(f"attend_step of {name} has {len(figures.loops)} loops in its machine code, not 3")
    pattern = SHIPPED_PATTERNS[name]
    near, image_len, text_len = kv_cache.neighbours(pattern, 0), pattern[2] * pattern[3], pattern[1]
    block, step, window_step = figures.tiles
    blocks = sum(-(-kv_cache.num_earlier.fn(n, near) // window_step) for n in range(image_len)) / image_len
    programs = SAMPLES // block * HEADS
    steps = text_len // step, 0, block * blocks
    chip = sass.CHIPS[ARCHITECTURE]
    clocks = [sass.clocks(loop, figures, ARCHITECTURE) for loop in figures.loops]
    issue, tensor, ex2 = (sum(n * clock[kind] for n, clock in zip(steps, clocks, strict=True)) for kind in range(3))
    per_clock = programs / (chip.device.num_sms * CLOCK)
    vector = HEADS * HEAD_DIM * ITEMSIZE
    # Keys and values of the image; query, key and value of the position, its slot, and the result.
    image = SAMPLES * vector * (2 * earlier_keys(name) + 6)
    return {
        "issue": issue * per_clock,
        "tensor": tensor * chip.macs * programs / MACS_PER_SECOND,
        "ex2": ex2 * per_clock,
        "L2": (image + SAMPLES // block * 2 * text_len * vector) / L2_BYTES_PER_SECOND,
        "memory": (image + 2 * text_len * vector) / BYTES_PER_SECOND,
    }


def earlier_keys(name: str) -> float:
    """Image keys that a position sees before itself, as a mean over an image."""
    kind, _, side = name.partition("-")
    text_len = SHIPPED_PATTERNS[name][1]
    pattern = PATTERNS[kind](text_len, int(side))
    text = text_len * (text_len + 1) // 2 + text_len * pattern.image_len
    return (pattern.nnz() - text) / pattern.image_len - 1


def dense_step_seconds(name: str) -> float:
    """Of reading a cache that holds every position of every sample, as a mean over the positions of an image."""
    _, text_len, height, width, *_ = SHIPPED_PATTERNS[name]
    keys = text_len + (height * width + 1) / 2
    return SAMPLES * HEADS * HEAD_DIM * ITEMSIZE * 2 * keys / BYTES_PER_SECOND


def step_table(record: dict[str, dict[str, sass.Figures]]) -> str:
    """Steps of decoding that sass.json has at this size, as Markdown; microseconds."""
    version = max(record, key=lambda version: [int(n) for n in version.split(".")])
    parts = ["issue", "tensor", "ex2", "L2", "memory"]
    rows = [["pattern", "image keys", *parts, "bound", "by", "dense cache"], ["---", *["--:"] * 7, "---", "--:"]]
    for name in SHIPPED_PATTERNS:
        kind, _, side = name.partition("-")
        figures = record[version].get(f"attend_step-{name}-{HEAD_DIM}-bfloat16-sm_{ARCHITECTURE}")
        if kind not in PATTERNS or figures is None:
            continue
        seconds = least_step_seconds(name, figures)
        slowest = max(seconds, key=seconds.get)
        numbers = [*(seconds[part] for part in parts), seconds[slowest]]
        micro = [f"{number * 1e6:,.0f}" for number in numbers]
        dense = f"{dense_step_seconds(name) * 1e6:,.0f}"
        rows.append([f"{kind}, {side} x {side}", f"{earlier_keys(name):.1f}", *micro, slowest, dense])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


ROWS, CODES, WIDTH = 65536, 8192, 128
GUMBEL_PASSES = {"fwd": 1, "dl": 2, "dcodebook": 1}  # over the logits or their gradient


def least_gumbel_seconds(kernel: str, figures: sass.Figures) -> dict[str, float]:
    """Each part's time for a kernel of Gumbel quantisation."""
    if len(figures.loops) != 1:
        raise ValueError(f"{kernel} has {len(figures.loops)} loops in its machine code, not one")
    chip, elements = sass.CHIPS[ARCHITECTURE], figures.tiles[0] * 4 * figures.tiles[1]
    issue, _, ex2 = sass.clocks(figures.loops[0], figures, ARCHITECTURE)
    per_clock = ROWS * CODES / elements / (chip.device.num_sms * CLOCK)
    return {
        "issue": issue * per_clock,
        "tensor": ROWS * CODES * WIDTH / MACS_PER_SECOND,
        "ex2": ex2 * per_clock,
        "memory": GUMBEL_PASSES[kernel] * ROWS * CODES * ITEMSIZE / BYTES_PER_SECOND,
    }


def gumbel_table(record: dict[str, dict[str, sass.Figures]]) -> str:
    """The kernels of Gumbel quantisation that sass.json has at this size, as Markdown; microseconds."""
    version = max(record, key=lambda version: [int(n) for n in version.split(".")])
    parts = ["issue", "tensor", "ex2", "memory"]
    titles = ["kernel", "channels", "registers", "instructions an element", *parts, "bound", "by"]
    rows = [titles, ["---", "---", *["--:"] * 7, "---"]]
    for kernel in GUMBEL_PASSES:
        for layout in ("first", "last"):
            figures = record[version][f"gumbel_{kernel}-{layout}-{WIDTH}-bfloat16-sm_{ARCHITECTURE}"]
            seconds = least_gumbel_seconds(kernel, figures)
            slowest = max(seconds, key=seconds.get)
            elements = figures.tiles[0] * 4 * figures.tiles[1] / (32 * figures.warps)
            numbers = [*(seconds[part] for part in parts), seconds[slowest]]
            micro = [f"{number * 1e6:,.0f}" for number in numbers]
            cost = f"{figures.loops[0]['instructions'] / elements:.0f}"
            rows.append([kernel, layout, str(figures.registers), cost, *micro, slowest])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    record = sass.read_record()
    print(table(record), step_table(record), gumbel_table(record), sep="\n\n")
    sys.exit(0)
