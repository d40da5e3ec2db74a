"""Sampling: cached steps against the whole forward pass, the filters, the draw, seeds, scores and messages."""

import math
import re
import subprocess
import sys

import pytest
import torch
from helpers import needs_extension, random_captions, random_image_tokens, tiny_dalle
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_fast.models import decoder as decoder_module
from dalle_fast.models.decoder import Decoder
from dalle_fast.ops import backends
from dalle_fast.reference import draw_token
from dalle_fast.sampling import Sampler, check_sampling, draw_seeds, sample_tokens


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("grid", [(3, 3), (4, 2), (1, 5)])
@pytest.mark.parametrize("start", ["inside", "before"])
@pytest.mark.parametrize("layout", ["dalle", "dalle-pytorch", "ru-dalle"])
def test_cached_steps_equal_the_forward_pass(layout, start, grid):
    """Two prompts, one of them padded, and three samples of each."""
    model = tiny_dalle(layout=layout, start_of_text=start, grid=grid)
    text = random_captions(model.config, [model.config.caption_len, 2])
    tokens, scores = sample_tokens(model, text, 3, generator=seeded())
    expected = model(text.repeat_interleave(3, dim=0), tokens).image

    decoder = Decoder(model, 2, 3)
    decoder.prefill(text)
    for position in range(model.config.image_len):
        torch.testing.assert_close(decoder.step(tokens), expected[:, position])
        decoder.position += 1

    likelihoods = expected.log_softmax(dim=-1).gather(-1, tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(scores, likelihoods.sum(dim=1))
    assert tokens.shape == (6, model.config.image_len)
    assert tokens.unique(dim=0).shape[0] > 2


def test_temperature_0_takes_the_likeliest_token():
    model = tiny_dalle()
    text = random_captions(model.config, [3, 2])
    tokens, _ = sample_tokens(model, text, 2, temperature=0)
    greedy = torch.empty(2, 0, dtype=torch.int64)
    for _ in range(model.config.image_len):
        greedy = torch.cat([greedy, model(text, greedy).image[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(tokens, greedy.repeat_interleave(2, dim=0))
    assert torch.equal(sample_tokens(model, text, 1, temperature=2.0, top_k=1)[0], greedy)
    assert torch.equal(sample_tokens(model, text, 1, temperature=2.0, top_p=1e-6)[0], greedy)


def test_the_generator_decides_the_draws():
    model = tiny_dalle()
    text = random_captions(model.config, [3])
    first, again, other = (sample_tokens(model, text, 4, generator=seeded(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(1)
    assert torch.equal(sample_tokens(model, text, 4)[0], first)


def test_scores_are_those_of_the_unfiltered_model():
    model = tiny_dalle()
    text = random_captions(model.config, [3])
    tokens, scores = sample_tokens(model, text, 3, temperature=0.5, top_k=4, top_p=0.9, generator=seeded())
    likelihoods = model(text.expand(3, -1), tokens).image.log_softmax(dim=-1)
    torch.testing.assert_close(scores, likelihoods.gather(-1, tokens[..., None]).sum(dim=(1, 2)))
    assert scores.dtype == torch.float32


def test_progress_and_no_gradients():
    model = tiny_dalle()
    seen = []
    _, scores = sample_tokens(model, random_captions(model.config, [3]), 2, on_token=seen.append)
    assert seen == list(range(1, model.config.image_len + 1))
    assert not scores.requires_grad


@pytest.mark.parametrize("cond_scale", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["dalle", "dalle-pytorch", "ru-dalle"])
@torch.no_grad()
def test_cached_steps_of_16_bit_models(layout, dtype, cond_scale):
    """As far from a float32 model of the same weights as the forward pass is, twice that at most."""
    model = tiny_dalle(layout=layout, text_len=7).cast_blocks(dtype)
    wide = tiny_dalle(layout=layout, text_len=7)
    wide.load_state_dict(model.state_dict())
    guided = cond_scale != 1
    text, image = random_captions(model.config, [6, 3]), random_image_tokens(model.config, 4)
    texts = text.repeat_interleave(2, dim=0)
    both = (torch.cat([texts, torch.zeros_like(texts)]), image.repeat(2, 1)) if guided else (texts, image)
    truth, peer = wide(*both).image.double(), model(*both).image
    decoder = Decoder(model, 2, 2, guided=guided)
    decoder.prefill(text)
    steps = []
    for _ in range(model.config.image_len):
        steps.append(decoder.step(image).clone())
        decoder.position += 1
    error, peer_error = ((logits.double() - truth).abs().max() for logits in (torch.stack(steps, 1), peer))
    assert error <= 2 * (peer_error + torch.finfo(dtype).eps * truth.abs().max())


@needs_extension
@pytest.mark.parametrize("cond_scale", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_allocate_nothing(dtype, cond_scale):
    model = tiny_dalle(layout="dalle-pytorch").cast_blocks(dtype)
    keep = torch.arange(model.config.image_len)[None] == 3
    sampler = Sampler(model, 1, 3, top_k=5, top_p=0.9, cond_scale=cond_scale)
    sampler.run(random_captions(model.config, [3]), torch.arange(3), tokens=0 * keep, keep=keep)
    sampler.decoder.prefill(random_captions(model.config, [3]))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        counted = torch.empty(7)
        for _ in range(4):
            sampler._advance()
    allocating = {event.key for event in profile.key_averages() if event.cpu_memory_usage != 0}
    assert counted.nbytes == 28
    assert allocating == {"aten::empty"}, "the one tensor that shows that memory is counted"


def test_a_compiled_step_draws_the_same():
    model = tiny_dalle(depth=2)
    text, seeds = random_captions(model.config, [4, 2]), torch.arange(4)
    options = {"top_k": 9, "cond_scale": 2.0}
    expected = Sampler(model, 2, 2, **options).run(text, seeds)
    tokens, scores = Sampler(model, 2, 2, **options, compile=True).run(text, seeds)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(scores, expected[1])


def draw_without_cache(model, text, seeds, *, cond_scale=None, tokens=None, keep=None, **options):
    """Tokens and log-likelihoods (B,), from the whole forward pass and the reference's draw, one caption an image."""
    drawn, scores = torch.empty(len(text), 0, dtype=torch.int64), torch.zeros(len(text))
    for position in range(model.config.image_len):
        logits = model(text, drawn).image[:, position]
        likelihoods = logits.log_softmax(dim=-1)
        if cond_scale is not None:
            logits = torch.cat([logits, model(torch.zeros_like(text), drawn).image[:, position]])
        token, _ = draw_token(logits, seeds, position, cond_scale=cond_scale, **options)
        if keep is not None:
            token = torch.where(keep[:, position], tokens[:, position], token)
        scores += likelihoods.gather(-1, token[:, None]).squeeze(-1)
        drawn = torch.cat([drawn, token[:, None]], dim=1)
    return drawn, scores


@pytest.mark.parametrize("cond_scale", [None, 0.0, 3.0])
@pytest.mark.parametrize("layout", ["dalle", "dalle-pytorch", "ru-dalle"])
@torch.no_grad()
def test_draws_equal_those_without_a_cache(layout, cond_scale):
    """Guided scores are two forward passes combined; a batch of two prompts, two images each."""
    model = tiny_dalle(layout=layout)
    text, seeds = random_captions(model.config, [4, 2]), torch.tensor([5, 6, 1000, 2**40])
    options = {"temperature": 0.8, "top_k": 9, "top_p": 0.95}
    options |= {} if cond_scale is None else {"cond_scale": cond_scale}
    tokens, scores = sample_tokens(model, text, 2, seeds=seeds, **options)
    expected = draw_without_cache(model, text.repeat_interleave(2, dim=0), seeds, **options)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(scores, expected[1])


@pytest.mark.parametrize("known", [1, 5, 11, 12])
@pytest.mark.parametrize("layout", ["dalle", "dalle-pytorch", "ru-dalle"])
def test_a_prefix_read_at_once_is_one_forced_step_by_step(layout, known):
    """Beside a prompt that keeps nothing, no position is known to all."""
    model = tiny_dalle(layout=layout)
    text, seeds = random_captions(model.config, [4, 2]), torch.arange(4)
    tokens = random_image_tokens(model.config, 2)
    keep = (torch.arange(model.config.image_len) < known).expand(2, -1).clone()
    at_once, steps = [], []
    sampler = Sampler(model, 1, 2, cond_scale=2.0)
    expected = sampler.run(text[:1], seeds[:2], tokens=tokens[:1], keep=keep[:1], on_token=at_once.append)
    keep[1] = False
    sampler = Sampler(model, 2, 2, cond_scale=2.0)
    actual = sampler.run(text, seeds, tokens=tokens, keep=keep, on_token=steps.append)
    assert torch.equal(actual[0][:2], expected[0])
    torch.testing.assert_close(actual[1][:2], expected[1])
    assert torch.equal(expected[0][:, :known], tokens[:1, :known].expand(2, -1))
    assert at_once == list(range(known, model.config.image_len + 1))
    assert steps == list(range(1, model.config.image_len + 1))


KEEPING = {"model": tiny_dalle(grid=(2, 3), depth=2, layout="dalle-pytorch")}
masks = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=2, max_size=2).map(torch.tensor)


@settings(deadline=None, max_examples=30)
@given(keep=masks, seed=st.integers(0, 2**40), cond_scale=st.sampled_from([1.0, 2.5]))
@torch.no_grad()
def test_any_mask_is_honoured(keep, seed, cond_scale):
    model = KEEPING["model"]
    generator = seeded(seed)
    tokens = torch.randint(model.config.image_vocab_size, (2, 6), generator=generator)
    text = torch.randint(1, model.config.text_vocab_size, (2, model.config.caption_len), generator=generator)
    seeds = torch.arange(4) + seed
    drawn, scores = sample_tokens(model, text, 2, seeds=seeds, tokens=tokens, keep=keep, cond_scale=cond_scale)
    each = [part.repeat_interleave(2, dim=0) for part in (text, tokens, keep)]
    assert torch.equal(drawn[each[2]], each[1][each[2]])
    guided = None if cond_scale == 1 else cond_scale
    expected = draw_without_cache(model, each[0], seeds, tokens=each[1], keep=each[2], cond_scale=guided)
    assert torch.equal(drawn, expected[0])
    torch.testing.assert_close(scores, expected[1])


@pytest.mark.parametrize("cond_scale", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_image_does_not_depend_on_what_is_drawn_beside_it(dtype, cond_scale):
    """In C++ not in its last bit, at a width where a product of more rows sums in another order."""
    model = tiny_dalle(width=96, grid=(3, 5), text_len=33).cast_blocks(dtype)
    text, seeds = random_captions(model.config, [4, 1, 3]), torch.tensor([9, 4, 7, 1, 0, 2])
    options = {"temperature": 3.0, "cond_scale": cond_scale}
    together, scores = sample_tokens(model, text, 2, seeds=seeds, **options)
    for image in range(6):
        prompt = slice(image // 2, image // 2 + 1)
        alone, score = sample_tokens(model, text[prompt], seeds=seeds[image : image + 1], **options)
        assert torch.equal(alone[0], together[image])
        if backends.extension is None:
            torch.testing.assert_close(score[0], scores[image])
        else:
            assert torch.equal(score[0], scores[image])
    order = torch.tensor([2, 0, 1])
    moved, _ = sample_tokens(model, text[order], 2, seeds=seeds.view(3, 2)[order].flatten(), **options)
    assert torch.equal(moved.view(3, 2, -1), together.view(3, 2, -1)[order])


def test_a_sampler_draws_batch_after_batch():
    """Nothing of a batch is left in the next one, neither scores nor kept tokens."""
    model = tiny_dalle()
    text, seeds = random_captions(model.config, [4]), torch.arange(3)
    sampler = Sampler(model, 1, 3)
    tokens, keep = random_image_tokens(model.config, 1), torch.ones(1, model.config.image_len, dtype=torch.bool)
    first = sampler.run(text, seeds)
    sampler.run(text, seeds, tokens=tokens, keep=keep)
    again = sampler.run(text, seeds)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], sampler.run(text, seeds + 3)[0])


def test_drawn_seeds():
    seeds = draw_seeds(5, seeded(3))
    assert seeds.tolist() == list(range(int(seeds[0]), int(seeds[0]) + 5))
    assert torch.equal(seeds, draw_seeds(5, seeded(3)))
    assert seeds.dtype == torch.int64
    assert seeds.min() >= 0 and not torch.equal(seeds, draw_seeds(5, seeded(4)))


def test_a_model_that_gives_no_numbers():
    model = tiny_dalle()
    text = random_captions(model.config, [3])
    with torch.no_grad():
        model.image_head.weight[3] = math.nan
    with pytest.raises(FloatingPointError, match="scores of the next token must be numbers, got NaN from the model"):
        sample_tokens(model, text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-0.1, None, None), "temperature must be finite and >= 0, got -0.1"),
        ((math.nan, None, None), "temperature must be finite and >= 0, got nan"),
        ((math.inf, None, None), "temperature must be finite and >= 0, got inf"),
        ((1.0, 0, None), "top_k must be >= 1, got 0"),
        ((1.0, None, 0.0), "top_p must be in (0, 1], got 0.0"),
        ((1.0, None, 1.5), "top_p must be in (0, 1], got 1.5"),
        ((1.0, None, math.nan), "top_p must be in (0, 1], got nan"),
    ],
)
def test_settings_out_of_range(values, message):
    temperature, top_k, top_p = values
    with pytest.raises(ValueError, match=re.escape(message)):
        check_sampling(*values)
    model = tiny_dalle()
    text = random_captions(model.config, [3])
    with pytest.raises(ValueError, match=re.escape(message)):
        sample_tokens(model, text, temperature=temperature, top_k=top_k, top_p=top_p)


def test_num_images_out_of_range():
    model = tiny_dalle()
    with pytest.raises(ValueError, match="num_images must be >= 1, got 0"):
        sample_tokens(model, random_captions(model.config, [3]), 0)


@pytest.mark.parametrize("cond_scale", [1.0, 2.0])
def test_a_sampler_of_inference_mode_serves_outside_it(cond_scale):
    model = tiny_dalle()
    text, seeds = random_captions(model.config, [4, 2]), torch.arange(4)
    with torch.inference_mode():
        sampler = Sampler(model, 2, 2, cond_scale=cond_scale)
        inside = sampler.run(text, seeds)
    outside = sampler.run(text, seeds)
    assert all(map(torch.equal, inside, outside))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_does_not_matter(dtype):
    model = tiny_dalle()
    text, seeds = random_captions(model.config, [4, 2]), torch.arange(4)
    expected = sample_tokens(model, text, 2, seeds=seeds)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = sample_tokens(model, text, 2, seeds=seeds)
    finally:
        torch.set_default_dtype(before)
    assert found[1].dtype == torch.float32
    assert all(map(torch.equal, found, expected))


def test_a_sampler_draws_with_the_weights_of_now():
    model = tiny_dalle()
    text, seeds = random_captions(model.config, [4, 2]), torch.arange(4)
    sampler = Sampler(model, 2, 2)
    sampler.run(text, seeds)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= -2
    found = sampler.run(text, seeds)
    assert all(map(torch.equal, found, sample_tokens(model, text, 2, seeds=seeds)))


@needs_extension
def test_large_matrices_of_a_step_move_to_huge_pages(monkeypatch):
    moved = []
    monkeypatch.setattr(decoder_module, "use_huge_pages", moved.append)
    model = tiny_dalle()
    expand, head = model.layers[0]["mlp"].expand.weight, model.image_head.weight
    monkeypatch.setattr(decoder_module, "LARGE_MATRIX", min(expand.nbytes, head.nbytes))
    Decoder(model, 1)
    assert any(weight is expand for weight in moved)
    assert any(weight is head for weight in moved)
    assert not any(weight is model.text_embedding.weight for weight in moved)
    moved.clear()
    monkeypatch.setattr(decoder_module, "LARGE_MATRIX", 1 << 30)
    Decoder(model, 1)
    assert not moved


def test_sampling_leaves_the_compiler_alone():
    """To import it takes as long as drawing the demo's images."""
    code = """
import sys, torch
from dalle_fast import Dalle, DalleConfig
from dalle_fast.sampling import sample_tokens
config = DalleConfig(text_vocab_size=20, image_vocab_size=16, text_len=4, grid=(2, 2), depth=4, width=16, heads=2)
sample_tokens(Dalle(config).eval(), torch.ones(1, config.caption_len, dtype=torch.int64))
raise SystemExit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
