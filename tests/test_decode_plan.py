"""Ops of a decoding step worked off in one go: the bits of the calls one by one, however many threads there are."""

import gc
import re
import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from helpers import needs_extension
from torch import Tensor

from dalle_fast.ops.decode_linear import bind_decode_linear
from dalle_fast.ops.decode_plan import bind_together
from dalle_fast.ops.draw_token import bind_draw_token
from dalle_fast.ops.embed_token import bind_embed_token
from dalle_fast.ops.kv_cache import KVCache, bind_attention
from dalle_fast.patterns import Column, Conv, Pattern, Row

pytestmark = needs_extension

TEXT_LEN, GRID, HEADS, HEAD_DIM, CODES = 5, (3, 4), 4, 24, 37
WIDTH, IMAGE_LEN = HEADS * HEAD_DIM, GRID[0] * GRID[1]
PATTERNS = [Row(TEXT_LEN, GRID), Column(TEXT_LEN, GRID), Conv(TEXT_LEN, GRID, kernel_size=3)]


@pytest.fixture(params=[1, 2, 5])
def threads(request) -> Iterator[int]:
    """torch's, also more of them than there are cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Step:
    """Layers of random weights as bound calls, and all that they write."""

    def __init__(self, samples: int, dtype: torch.dtype = torch.float32, patterns: list[Pattern] = PATTERNS):
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) / 4

        generator = torch.Generator().manual_seed(samples)
        self.tokens = torch.randint(CODES, (samples, IMAGE_LEN), generator=generator)
        self.position = torch.tensor(1)
        self.scores, logits = torch.zeros(samples), torch.zeros(samples, CODES)
        x, qkv, attended = torch.zeros(samples, WIDTH), torch.zeros(samples, 3 * WIDTH), torch.zeros(samples, WIDTH)
        query, key, value = qkv.view(samples, 3, HEADS, 1, HEAD_DIM).unbind(1)
        tables = [random(CODES, WIDTH), random(WIDTH), random(IMAGE_LEN, WIDTH)]
        self.calls: list[partial] = [bind_embed_token(self.tokens, self.position, *tables, x)]
        kind = {"dtype": torch.float32, "device": "cpu", "num_prompts": 1}
        self.caches = [KVCache(pattern, samples, HEADS, HEAD_DIM, **kind) for pattern in patterns]
        for cache in self.caches:
            cache.prefill(*random(2, 1, HEADS, TEXT_LEN + 1, HEAD_DIM))
            norm = (random(WIDTH), random(WIDTH), 1e-5)
            heads = attended.view(samples, HEADS, 1, HEAD_DIM)
            weights = [random(3 * WIDTH, WIDTH).to(dtype), random(WIDTH, WIDTH).to(dtype)]
            self.calls += [
                bind_decode_linear(x, weights[0], random(3 * WIDTH), norm=norm, activation="gelu", out=qkv),
                bind_attention(query, key, value, cache, heads, kernel="cpp"),
                bind_decode_linear(attended, weights[1], residual=x, out=x),
            ]
        self.calls.append(bind_decode_linear(x, random(CODES, WIDTH).to(dtype), out=logits))
        settings = {"keep": None, "temperature": 1.0, "top_k": 30, "top_p": 0.9, "cond_scale": None}
        seeds = torch.arange(samples)
        draw = bind_draw_token(logits, seeds, self.position, self.tokens, self.scores, **settings, kernel="cpp")
        self.calls.append(draw)
        self.written = [self.tokens, self.position, self.scores, logits, x, qkv, attended]
        self.written += [tensor for c in self.caches for tensor in (c.image_key, c.image_value, c.held)]

    def one_by_one(self) -> None:
        for call in self.calls:
            call()
        self.position += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 9, 40])
def test_the_bits_of_the_calls_one_by_one(level, threads, samples, dtype):
    patterns = PATTERNS * 4  # enough to do for several threads
    expected, step = Step(samples, dtype, patterns), Step(samples, dtype, patterns)
    call = bind_together(step.calls, step.position)
    for _ in range(6):
        expected.one_by_one()
        call()
        assert all(map(torch.equal, step.written, expected.written))
    assert step.position == 7
    assert expected.scores.isfinite().all()
    assert (expected.scores != 0).all()


def test_many_layers_on_many_threads(threads):
    """Some thousand parts: a thread that missed one, or went on too early, would show."""
    patterns = PATTERNS * 40
    expected, step = Step(3, patterns=patterns), Step(3, patterns=patterns)
    call = bind_together(step.calls, step.position)
    for _ in range(8):
        expected.one_by_one()
        call()
    assert all(map(torch.equal, step.written, expected.written))


def test_steps_of_several_python_threads_at_once(threads):
    steps = [Step(samples, patterns=PATTERNS * 4) for samples in (1, 2, 3)]
    expected = [Step(samples, patterns=PATTERNS * 4) for samples in (1, 2, 3)]

    def run(step: Step) -> None:
        call = bind_together(step.calls, step.position)
        for _ in range(10):
            call()

    workers = [threading.Thread(target=run, args=(step,)) for step in steps]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for step, other in zip(steps, expected, strict=True):
        for _ in range(10):
            other.one_by_one()
        assert all(map(torch.equal, step.written, other.written))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda step: step.caches[-1].held.fill_(TEXT_LEN + IMAGE_LEN), "the cache is full, it holds all 17 positions"),
        (lambda step: step.caches[0].held.fill_(0), "the cache must hold the 5 text positions first: call prefill()"),
        (lambda step: step.position.fill_(IMAGE_LEN), "position must be in 0..11, got 12"),
        (lambda step: step.tokens[0, 0].fill_(CODES), "tokens must be in 0..36, got 37"),
    ],
    ids=["full", "empty", "position", "token"],
)
def test_an_error_comes_before_anything_is_computed(spoil, message):
    step = Step(2)
    call = bind_together(step.calls, step.position)
    spoil(step)
    before = [tensor.clone() for tensor in step.written]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call()
    assert all(map(torch.equal, step.written, before))


def test_the_call_keeps_the_memory_of_its_tensors():
    expected, step = Step(2), Step(2)
    call, tokens = bind_together(step.calls, step.position), step.tokens
    del step
    gc.collect()
    rubbish = [torch.full((size,), torch.nan) for size in range(64, 20000, 64)]
    call()
    expected.one_by_one()
    assert torch.equal(tokens, expected.tokens)
    assert rubbish[0].isnan().all()


def test_a_compiled_function_may_make_the_call():
    expected, step = Step(2), Step(2)
    call = bind_together(step.calls, step.position)

    def two_steps(x: Tensor) -> Tensor:
        call()
        call()
        return x + step.scores

    found = torch.compile(two_steps)(torch.ones(2))
    expected.one_by_one()
    expected.one_by_one()
    assert torch.equal(found, 1 + expected.scores)
    assert all(map(torch.equal, step.written, expected.written))


def test_calls_with_nothing_to_do():
    nothing = bind_decode_linear(torch.zeros(0, 3), torch.zeros(4, 3), out=torch.zeros(0, 4))
    out = torch.zeros(1, 4)
    bind_together([nothing, bind_decode_linear(torch.ones(1, 3), torch.ones(4, 3), out=out), nothing])()
    assert (out == 3).all()
    bind_together([nothing])()


def test_arguments_are_checked_when_calls_are_bound():
    wrong = bind_decode_linear(torch.zeros(2, 3), torch.zeros(4, 3), out=torch.zeros(2, 5))
    with pytest.raises(RuntimeError, match="out must have 8 elements, got 10"):
        bind_together([wrong])


@pytest.mark.parametrize(
    ("plan", "advance", "message"),
    [
        (torch.zeros(7, dtype=torch.uint8), None, "plan must be plans of ops, one behind the other, got 7 bytes"),
        (torch.zeros(8), None, "plan must have dtype Byte, got Float"),
        (torch.zeros(0, dtype=torch.uint8), torch.zeros(()), "advance must have dtype Long, got Float"),
        (torch.zeros(0, dtype=torch.uint8), torch.zeros(2).long(), "advance must have 1 elements, got 2"),
    ],
)
def test_bare_op_errors(plan, advance, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.dalle_fast.run_decode_plan_cpu(plan, advance)
