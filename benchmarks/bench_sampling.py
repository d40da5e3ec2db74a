"""Sampling: whole loops, single steps, and what they are up against.

- ``sampling``: the demo's transformer, a batch of images token by token, arg-max each time: with cached keys and
  values, and running ``Dalle.forward`` over the text and all image tokens so far for each token.
- ``sampling-image``: 12 layers of width 512 on 256 + 32 x 32 positions, whole loops, from the caption to the last
  token; and DALLE-pytorch's of the same size (``sampling_rivals.py``), of which a few tokens are timed and
  seconds_an_image is their mean times 1024.
- ``sampling-step``: of the same model one token step in the middle of an image. over_stream is its time over that of
  reading all its weights once from one tensor (an integer maximum), called in turn with it; over_huge_stream the same
  where that tensor is in huge pages, as the model's weights are.
- ``sampling-profile``: which part of a step's time the profiler finds in the op that is the step, and the times of the
  op's parts by themselves, over that of the step.
"""

import statistics
import time
from collections.abc import Callable

import pytest
import sampling_rivals
import torch
from sampling_rivals import CONFIG, IMAGE_CODES, IMAGE_LEN, TEXT_CODES
from torch import Tensor, nn

from dalle_fast.models.decoder import Decoder
from dalle_fast.models.transformer import Dalle, DalleConfig, Linear
from dalle_fast.ops.decode_plan import bind_together
from dalle_fast.ops.huge_pages import use_huge_pages
from dalle_fast.sampling import Sampler, sample_tokens

BATCH = 16
TURNS = 40  # of a step and the reading of its weights
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@torch.no_grad()
def recompute_prefix(model: Dalle, text: Tensor) -> Tensor:
    """Tokens (B, image_len) of captions (B, caption_len), the whole prefix computed anew for each."""
    tokens = torch.empty(len(text), 0, dtype=torch.int64)
    for position in range(model.config.image_len):
        drawn = model(text, tokens).image[:, position].argmax(dim=-1, keepdim=True)
        tokens = torch.cat([tokens, drawn], dim=1)
    return tokens


def cached(model: Dalle, text: Tensor) -> Tensor:
    """The same from the cache."""
    return sample_tokens(model, text, temperature=0)[0]


def make_model(config: DalleConfig) -> Dalle:
    """A transformer whose scores differ from token to token; as initialised, all are 0."""
    model = Dalle(config).eval()
    nn.init.normal_(model.image_head.weight)
    return model


@pytest.mark.skipif(DEVICE != "cpu", reason="the demo's size is for a CPU")
@pytest.mark.benchmark(group="sampling", min_rounds=5)
@pytest.mark.parametrize("decode", [recompute_prefix, cached], ids=["recompute", "cached"])
def test_sampling(checked, prior_preset, captions, decode):
    model, text = make_model(prior_preset.model), captions(BATCH)
    other = recompute_prefix if decode is cached else cached
    expected = other(model, text)
    assert len(expected.unique()) > model.config.image_len, "the tokens are too alike to tell right from wrong"

    def check(tokens: Tensor) -> None:
        assert torch.equal(tokens, expected)

    checked(lambda: decode(model, text), check, images=BATCH, tokens=BATCH * model.config.image_len)


def large_model(dtype: torch.dtype = torch.float32) -> Dalle:
    """The model of the other benchmarks, with the paper's schedule of layers."""
    model = make_model(CONFIG)
    nn.init.normal_(model.image_head.weight, std=0.1)
    return model.cast_blocks(dtype).to(DEVICE)


def caption(model: Dalle) -> Tensor:
    """One, (1, caption_len)."""
    return torch.randint(1, TEXT_CODES, (1, model.config.caption_len), device=DEVICE)


@pytest.mark.benchmark(group="sampling-image")
@pytest.mark.parametrize("count", [1, 16])
def test_image(benchmark, count):
    model = large_model()
    text = caption(model)
    sampler = Sampler(model, 1, count)
    seeds = torch.arange(count)
    tokens, _ = sampler.run(text, seeds)
    if DEVICE == "cpu":
        alone, _ = Sampler(model, 1, 1).run(text, seeds[-1:])
        assert torch.equal(alone[0], tokens[-1]), "a seed's image depends on its neighbours"
    assert len(tokens.unique()) > IMAGE_CODES // 16, "the tokens are too alike to tell right from wrong"
    benchmark.pedantic(lambda: sampler.run(text, seeds), rounds=3 if count == 1 else 2)
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info |= {"seconds_an_image": seconds / count, "ms_a_step": 1000 * seconds / IMAGE_LEN}


RIVALS = {
    "as-called": (sampling_rivals.FULL, sampling_rivals.time_as_called),
    "cached-full": (sampling_rivals.FULL, sampling_rivals.time_cached),
    "cached-static": (sampling_rivals.STATIC, sampling_rivals.time_cached),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="timed on a CPU alone")
@pytest.mark.benchmark(group="sampling-image")
@pytest.mark.parametrize("way", RIVALS)
def test_dalle_pytorch(benchmark, way):
    reason = sampling_rivals.why_missing()
    if reason is not None:
        pytest.skip(reason)
    attention, measure = RIVALS[way]
    model = sampling_rivals.make_rival(attention)
    if way == "cached-full":
        assert sampling_rivals.cache_error(model, sampling_rivals.CHECKED) < 1e-4, "its cache changes its scores"
    seconds = []
    benchmark.pedantic(lambda: seconds.append(measure(model)), rounds=1)
    benchmark.extra_info |= {"seconds_an_image": seconds[0] * IMAGE_LEN, "ms_a_step": 1000 * seconds[0]}


def rewind(decoder: Decoder) -> None:
    """To the middle of the image."""
    config = decoder.model.config
    for cache in decoder.caches:
        cache.held.fill_(config.text_states + config.image_len // 2)
    decoder.position.fill_(config.image_len // 2)


def middle_step(model: Dalle, count: int) -> tuple[Sampler, Callable[[], None]]:
    """A sampler whose image is half there, and one step of it, which can be repeated."""
    half = IMAGE_LEN // 2
    text, image = caption(model), torch.randint(IMAGE_CODES, (1, IMAGE_LEN), device=DEVICE)
    sampler = Sampler(model, 1, count)
    decoder = sampler.decoder
    sampler._prefill(text, image[:, :half])
    sampler.tokens.copy_(image)

    def step() -> None:
        rewind(decoder)
        sampler._advance()

    with torch.no_grad():
        expected = model(text, image[:, :half]).image[:, half]
        found = decoder.step(sampler.tokens)
        error = (found - expected).abs().max() / expected.abs().max()
        assert error < (1e-4 if model.layers[0]["mlp"].expand.weight.dtype == torch.float32 else 0.05)
    for _ in range(4):
        step()
    return sampler, step


def streamed_weights(model: Dalle) -> Tensor:
    """All that a step reads of the model's matrices, one behind the other, as integers."""
    matrices = [module.weight for module in model.layers.modules() if isinstance(module, Linear)]
    words = [matrix.detach().flatten().view(torch.int32) for matrix in (*matrices, model.image_head.weight)]
    return torch.cat(words)


def seconds_in_turn(*calls: Callable[[], object]) -> list[float]:
    """The medians of calls that take turns, since a machine's memory has better and worse seconds."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(TURNS):
        for call, taken in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the host's clock says nothing about a step")
@pytest.mark.benchmark(group="sampling-step")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("count", [1, 2, 4, 16, 64])
def test_step(benchmark, count, dtype):
    model = large_model(dtype)
    _, step = middle_step(model, count)
    weights = streamed_weights(model)
    huge = weights.clone()
    use_huge_pages(huge)
    stream_seconds, huge_seconds, step_seconds = seconds_in_turn(weights.max, huge.max, step)
    benchmark.pedantic(step, rounds=30)
    benchmark.extra_info |= {
        "over_stream": step_seconds / stream_seconds,
        "over_huge_stream": step_seconds / huge_seconds,
        "stream_gb_per_s": weights.nbytes / stream_seconds / 1e9,
        "ms_an_image": 1000 * step_seconds / count,
    }


PARTS = {"matrices": "decode_linear", "attention": "attention_with_kvcache"}


@pytest.mark.skipif(DEVICE != "cpu", reason="the ops of a CPU")
@pytest.mark.benchmark(group="sampling-profile")
@pytest.mark.parametrize("count", [1, 16, 64])
def test_profile(benchmark, count):
    sampler, step = middle_step(large_model(), count)
    benchmark.pedantic(step, rounds=30)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        for _ in range(TURNS):
            step()
        seconds = time.perf_counter() - start
    spent = {event.key: event.self_cpu_time_total / 1e6 for event in profile.key_averages()}
    benchmark.extra_info["op_share"] = spent["dalle_fast::run_decode_plan_cpu"] / seconds

    decoder = sampler.decoder
    calls = {part: [call for call in decoder._calls if op in str(call.func)] for part, op in PARTS.items()}
    calls["draw"] = [sampler._bind_draw(decoder._logits)]
    parts = {part: bind_together(some) for part, some in calls.items()}

    def attend() -> None:
        rewind(decoder)
        parts["attention"]()

    turns = seconds_in_turn(step, parts["matrices"], attend, parts["draw"])
    shares = [part_seconds / turns[0] for part_seconds in turns[1:]]
    benchmark.extra_info |= dict(zip(("matrices_share", "attention_share", "draw_share"), shares, strict=True))
