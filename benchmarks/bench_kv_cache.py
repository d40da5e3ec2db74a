"""One step of decoding through the pattern's cache, beside a dense cache and PyTorch's attention.

The dense cache is what most decoders keep: keys and values of text and image, contiguous and preallocated, of every
sample. A step writes its position there by index and calls ``scaled_dot_product_attention``: over all positions so
far, which is dense causal attention ("full"), or under the pattern's mask. 8 heads of 64 in float32 on a CPU, 16 in
bfloat16 on a GPU, 256 text positions and 32 x 32 of the image, at the middle and the last position of the image.

Groups: kv-cache, one layer; kv-cache-layers, one step of 12 layers of the schedule "dalle", which have a cache each,
so that no layer finds its own in the CPU's caches because it was there a moment ago.

Each row's extra info holds its sizes and

- ``cache_bytes``: of keys and values held, and ``read_bytes``: of those that this step has to read;
- ``gigabytes_per_s``: of the latter;
- ``error``: largest error against float64, over the largest value;
- ``slower``: by op, how many times as long the others of the same case take (``conftest.py``).

    pytest benchmarks/bench_kv_cache.py --benchmark-only --benchmark-json=run.json
    python benchmarks/report.py run.json
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import measure
import oracle
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_fast.ops.kv_cache import KVCache, bind_attention, choose_kernel
from dalle_fast.patterns import Column, Conv, Full, Pattern, Row, schedule

HEADS, HEAD_DIM, TEXT_LEN, GRID, DEPTH = 16 if measure.DEVICE == "cuda" else 8, 64, 256, 32, 12
DTYPE = torch.bfloat16 if measure.DEVICE == "cuda" else torch.float32
SECONDS_A_ROW, FEWEST_ROUNDS, MOST_ROUNDS = 0.5, 7, 500

pytestmark = pytest.mark.benchmark(timer=measure.clock)


@dataclass(frozen=True)
class Batch:
    """Samples decoded together and the texts that they are of. ``key`` names it in test ids, ``title`` in tables."""

    key: str
    title: str
    samples: int
    prompts: int


BATCHES = [
    Batch("one", "1 sample", 1, 1),
    Batch("shared", "64 samples of 1 text", 64, 1),
    Batch("apart", "64 samples of 64 texts", 64, 64),
]
if measure.DEVICE == "cuda":  # as many as the paper draws for a caption
    BATCHES.insert(2, Batch("many", "512 samples of 1 text", 512, 1))
PLACES = (512, 1023)  # in the image
PATTERNS = [Row(TEXT_LEN, GRID), Column(TEXT_LEN, GRID), Conv(TEXT_LEN, GRID)]
FULL = Full(TEXT_LEN, GRID)

Case = tuple[Batch, int, Pattern]


def sequences(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The query of a step, (B, H, 1, D), and keys and values of whole sequences, (B, H, S, D); the same every time."""
    generator = torch.Generator(measure.DEVICE).manual_seed(0)
    sizes = {"generator": generator, "device": measure.DEVICE}
    query = oracle.QUERY_SCALE * torch.randn(batch.samples, HEADS, 1, HEAD_DIM, **sizes)
    key, value = (torch.randn(batch.samples, HEADS, FULL.seq_len, HEAD_DIM, **sizes) for _ in range(2))
    each = batch.samples // batch.prompts
    for tensor in (key, value):
        tensor[:, :, :TEXT_LEN] = tensor[::each, :, :TEXT_LEN].repeat_interleave(each, dim=0)
    return query.to(DTYPE), key.to(DTYPE), value.to(DTYPE)


def seen(pattern: Pattern, place: int) -> Tensor:
    """The sequence positions that an image position sees, itself among them."""
    position = torch.arange(TEXT_LEN + place + 1, device=measure.DEVICE)
    return pattern.visible(position[-1], position).nonzero().squeeze(1)


def formulas(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention to some positions, computed in ``dtype``, sample by sample."""
    rows = []
    for q, k, v in zip(query, key, value, strict=True):
        scores = q.to(dtype) @ k[:, positions].to(dtype).mT * HEAD_DIM**-0.5
        rows.append((torch.softmax(scores, dim=-1) @ v[:, positions].to(dtype)).to(dtype))
    return torch.stack(rows)


class Cached:
    """A step of this library."""

    def __init__(self, batch: Batch, place: int, pattern: Pattern, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
        self.query, key, value = tensors
        each = batch.samples // batch.prompts
        self.cache = KVCache(
            pattern, batch.samples, HEADS, HEAD_DIM, num_prompts=batch.prompts, dtype=DTYPE, device=measure.DEVICE
        )
        self.cache.prefill(*(tensor[::each, :, :TEXT_LEN] for tensor in (key, value)))
        kept = torch.arange(max(0, place - self.cache.slots), place, device=measure.DEVICE)
        for image, tensor in ((self.cache.image_key, key), (self.cache.image_value, value)):
            image[:, :, self.cache.slot(kept)] = tensor[:, :, TEXT_LEN + kept]
        self.position = TEXT_LEN + place
        self.new = [tensor[:, :, self.position : self.position + 1].contiguous() for tensor in (key, value)]
        kernel = choose_kernel("auto", self.cache)
        if kernel is None:
            pytest.skip("attention_with_kvcache has no kernel for this device; dalle-fast info says why")
        self.out = torch.empty_like(self.query)
        self.step = bind_attention(self.query, *self.new, self.cache, self.out, kernel=kernel)
        self.rewind()

    def rewind(self) -> None:
        """Go back to before the step."""
        self.cache.held.fill_(self.position)

    def __call__(self) -> Tensor:
        self.step()
        return self.out

    @property
    def cache_bytes(self) -> int:
        """Of keys and values held."""
        return self.cache.nbytes


class Dense:
    """A step over the dense cache, causal or under a pattern's mask."""

    def __init__(
        self, batch: Batch, place: int, pattern: Pattern | None, tensors: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        self.query, key, value = tensors
        self.key, self.value = key.clone(), value.clone()
        self.position, self.mask = TEXT_LEN + place, None
        self.new_key, self.new_value = (tensor[:, :, self.position].contiguous() for tensor in (key, value))
        if pattern is not None:
            self.mask = torch.full((1, self.position + 1), -torch.inf, dtype=DTYPE, device=measure.DEVICE)
            self.mask[0, seen(pattern, place)] = 0

    def rewind(self) -> None:
        """A step can be made again as it is."""

    def __call__(self) -> Tensor:
        self.key[:, :, self.position] = self.new_key
        self.value[:, :, self.position] = self.new_value
        so_far = slice(0, self.position + 1)
        return F.scaled_dot_product_attention(
            self.query, self.key[:, :, so_far], self.value[:, :, so_far], attn_mask=self.mask
        )

    @property
    def cache_bytes(self) -> int:
        """Of keys and values held."""
        return self.key.nbytes + self.value.nbytes


MAKERS: dict[str, Callable[..., Any]] = {
    "attention_with_kvcache": Cached,
    "sdpa_mask": Dense,
    "sdpa_causal": lambda batch, place, pattern, tensors: Dense(batch, place, None, tensors),
}


def read_bytes(op: str, batch: Batch, place: int, pattern: Pattern) -> int:
    """Keys and values that a step has to read: this library text once a prompt, the others all that they hold."""
    if op != "attention_with_kvcache":
        positions = batch.samples * (TEXT_LEN + place + 1)
    else:
        positions = batch.prompts * TEXT_LEN + batch.samples * (len(seen(pattern, place)) - TEXT_LEN)
    return 2 * HEADS * HEAD_DIM * DTYPE.itemsize * positions


def time_steps(benchmark, op: str, batch: Batch, place: int, layers: list[Pattern], name: str) -> None:
    """Check the step of each layer, time one of all, and record what the module's docstring says."""
    tensors, errors, answers = sequences(batch), [], {}
    steps = [MAKERS[op](batch, place, pattern, tensors) for pattern in layers]
    for step, pattern in zip(steps, layers, strict=True):
        if pattern not in answers:
            positions = seen(pattern, place)
            wide, same = (formulas(*tensors, positions, dtype) for dtype in (torch.float64, torch.float32))
            answers[pattern] = {"out": wide}, [{"out": same.to(DTYPE)}]
        errors.append(oracle.worst_error({"out": step()}, *answers[pattern]))
    del tensors, answers

    def rewind() -> None:
        for step in steps:
            step.rewind()

    def one_step() -> None:
        for step in steps:
            step()

    rewind()
    once = measure.seconds_of(one_step)
    rounds = 1 if benchmark.disabled else int(min(MOST_ROUNDS, max(FEWEST_ROUNDS, SECONDS_A_ROW / once)))
    benchmark.pedantic(measure.timed(one_step), setup=rewind, rounds=rounds, warmup_rounds=1)
    traffic = sum(read_bytes(op, batch, place, pattern) for pattern in layers)
    benchmark.extra_info |= {
        "shape": f"{batch.title}, image position {place}",
        "pattern": name,
        "op": op,
        "batch": batch.samples,
        "prompts": batch.prompts,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "text_len": TEXT_LEN,
        "grid": GRID,
        "place": place,
        "dtype": str(DTYPE).removeprefix("torch."),
        "device": measure.DEVICE,
        "threads": torch.get_num_threads(),
        "cache_bytes": sum(step.cache_bytes for step in steps),
        "read_bytes": traffic,
        "error": max(errors),
    }
    if benchmark.stats is not None:
        benchmark.extra_info["gigabytes_per_s"] = traffic / benchmark.stats.stats.median / 1e9


CASES: list[tuple[Case, str]] = [
    ((batch, place, pattern), op)
    for batch in BATCHES
    for place in PLACES
    for pattern, ops in [(FULL, ["sdpa_causal"]), *((p, ["attention_with_kvcache", "sdpa_mask"]) for p in PATTERNS)]
    for op in ops
]


def case_id(case: Case, op: str) -> str:
    batch, place, pattern = case
    return f"{batch.key}-{place}-{pattern.name}-{op}"


@pytest.mark.parametrize(("case", "op"), CASES, ids=[case_id(*row) for row in CASES])
def test_step(benchmark, case, op):
    benchmark.group = "kv-cache"
    batch, place, pattern = case
    time_steps(benchmark, op, batch, place, [pattern], pattern.name)


@pytest.mark.parametrize("op", ["attention_with_kvcache", "sdpa_causal"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: batch.key)
def test_layers(benchmark, batch, place, op):
    benchmark.group = "kv-cache-layers"
    ours = op == "attention_with_kvcache"
    layers = schedule("dalle", DEPTH, TEXT_LEN, GRID) if ours else [FULL] * DEPTH
    time_steps(benchmark, op, batch, place, layers, "dalle" if ours else FULL.name)
