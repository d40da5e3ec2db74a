"""What the pipeline draws: order, batches, seeds, guidance, completion, progress, memory, and messages."""

import gc
import inspect
import json
import math
import re
import warnings
import weakref

import pytest
import torch
from helpers import tiny_pipeline

from dalle_fast import pipeline as pipeline_module
from dalle_fast.batching import LARGEST_BATCH
from dalle_fast.models.decoder import decoder_bytes
from dalle_fast.pipeline import Pipeline, SamplingProgress
from dalle_fast.sampling import LARGEST_SEED, Sampler

CAPTIONS = ["a red square", "a blue circle on the left", "two green crosses"]


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    return tiny_pipeline(CAPTIONS)


@pytest.fixture
def image(pipeline):
    return pipeline.dvae.decode(torch.randint(12, (1, 4, 4)))[0]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def log_likelihoods(pipeline, captions, tokens):
    """Of images (N, rows, columns), given N captions, by the whole forward pass."""
    length = pipeline.dalle.config.caption_len
    text = torch.stack([pipeline.tokenizer.encode_padded(caption, length)[0] for caption in captions])
    with torch.no_grad():
        scores = pipeline.dalle(text, tokens.flatten(1)).image.log_softmax(dim=-1)
    return scores.gather(-1, tokens.flatten(1)[..., None]).sum(dim=(1, 2))


def assert_same_output(left, right):
    for name in ("tokens", "scores", "images"):
        torch.testing.assert_close(getattr(left, name), getattr(right, name))
    assert torch.equal(left.tokens, right.tokens)


def test_generate(pipeline):
    result = pipeline.generate(CAPTIONS[:2], num_images=3, seed=0)
    assert result._fields == ("images", "tokens", "scores")
    assert result.images.shape == (6, 3, 16, 16)
    assert result.tokens.shape == (6, 4, 4)
    assert result.scores.shape == (6,)
    assert result.tokens.dtype == torch.int64
    assert 0 <= result.images.min() <= result.images.max() <= 1
    torch.testing.assert_close(result.images, pipeline.dvae.decode(result.tokens))
    assert not result.images.requires_grad


def test_one_prompt(pipeline):
    alone = pipeline.generate(CAPTIONS[0], seed=0)
    in_a_list = pipeline.generate([CAPTIONS[0]], seed=0)
    assert torch.equal(alone.tokens, in_a_list.tokens)
    assert alone.images.shape == (1, 3, 16, 16)


def test_scores_are_log_likelihoods_of_the_caption(pipeline):
    result = pipeline.generate(CAPTIONS[:2], num_images=2, seed=0)
    expected = log_likelihoods(pipeline, [CAPTIONS[0]] * 2 + [CAPTIONS[1]] * 2, result.tokens)
    torch.testing.assert_close(result.scores, expected)


def test_long_captions_are_cut(pipeline):
    words = " ".join("abcdefghijklmnopqrstuvwxyz")
    first = pipeline.generate(words, temperature=0).tokens
    assert torch.equal(first, pipeline.generate(words + " and more", temperature=0).tokens)


def test_an_image_is_a_function_of_its_seed(pipeline):
    several = pipeline.generate(CAPTIONS[0], num_images=4, seed=7)
    assert several.tokens.unique(dim=0).shape[0] == 4
    assert torch.equal(several.tokens[2], pipeline.generate(CAPTIONS[0], seed=9).tokens[0])
    listed = pipeline.generate(CAPTIONS[0], num_images=3, seed=[10, 8, 7])
    assert torch.equal(listed.tokens, several.tokens[[3, 1, 0]])
    assert torch.equal(
        pipeline.generate(CAPTIONS[0], num_images=3, seed=torch.tensor([10, 8, 7])).tokens, listed.tokens
    )


def test_seeds_are_counted_over_all_prompts(pipeline):
    both = pipeline.generate(CAPTIONS[:2], num_images=2, seed=5).tokens
    assert torch.equal(both[:2], pipeline.generate(CAPTIONS[0], num_images=2, seed=5).tokens)
    assert torch.equal(both[2:], pipeline.generate(CAPTIONS[1], num_images=2, seed=7).tokens)


def test_the_generator_decides_the_seeds(pipeline):
    first, again, other = (
        pipeline.generate(CAPTIONS, num_images=2, generator=seeded(seed), batch_size=batch_size).tokens
        for seed, batch_size in ((1, 6), (1, 2), (2, 6))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(1)
    assert torch.equal(pipeline.generate(CAPTIONS, num_images=2).tokens, first)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 6, 64])
def test_batches_change_nothing_but_speed(pipeline, batch_size):
    options = {"num_images": 2, "seed": 3, "cond_scale": 2.0, "temperature": 0.9, "top_k": 9}
    expected = pipeline.generate(CAPTIONS, **options)
    assert expected.tokens.unique(dim=0).shape[0] == 6, "images that look alike would hide a wrong order"
    assert_same_output(pipeline.generate(CAPTIONS, **options, batch_size=batch_size), expected)


@pytest.mark.parametrize(
    ("batch_size", "built", "drawn"),
    [
        (1, [(1, 1)], [1] * 9),
        (2, [(1, 2), (1, 1)] * 3, [2, 1] * 3),
        (5, [(1, 3)], [3, 3, 3]),
        (7, [(2, 3), (1, 3)], [6, 3]),
        (64, [(3, 3)], [9]),
    ],
)
def test_a_sampler_serves_all_batches_of_its_size(pipeline, batch_size, built, drawn, monkeypatch):
    """Three prompts of three images; sizes as (prompts, images of each)."""
    sizes, batches = [], []

    class Watched(Sampler):
        def __init__(self, model, num_prompts, num_images, **settings):
            sizes.append((num_prompts, num_images))
            super().__init__(model, num_prompts, num_images, **settings)

        def run(self, text, seeds, **options):
            batches.append(len(seeds))
            assert self.decoder.samples == len(seeds) <= batch_size
            return super().run(text, seeds, **options)

    monkeypatch.setattr(pipeline_module, "Sampler", Watched)
    pipeline.generate(CAPTIONS, num_images=3, batch_size=batch_size)
    assert (sizes, batches) == (built, drawn)


def test_one_sampler_is_in_memory_at_a_time(pipeline, monkeypatch):
    """Without the help of the garbage collector, which does not know how much a sampler holds."""
    built = []

    class Watched(Sampler):
        def __init__(self, *args, **settings):
            assert not any(sampler() for sampler in built)
            super().__init__(*args, **settings)
            built.append(weakref.ref(self))

    monkeypatch.setattr(pipeline_module, "Sampler", Watched)
    gc.disable()
    try:
        pipeline.generate(CAPTIONS, num_images=3, batch_size=2, on_tokens=lambda progress: None)
        assert len(built) == 6
        assert not any(sampler() for sampler in built)
    finally:
        gc.enable()


def test_batches_come_as_they_are_finished(pipeline):
    options = {"num_images": 3, "seed": 4, "batch_size": 2}
    whole = pipeline.generate(CAPTIONS[:2], **options)
    starts = []
    for start, output in pipeline.generate_batches(CAPTIONS[:2], **options):
        starts.append(start)
        part = slice(start, start + len(output.tokens))
        assert torch.equal(output.tokens, whole.tokens[part])
        torch.testing.assert_close(output.images, whole.images[part])
        torch.testing.assert_close(output.scores, whole.scores[part])
        assert torch.is_grad_enabled(), "the caller's mode is the caller's"
    assert starts == [0, 2, 3, 5]


def test_arguments_are_checked_at_the_call(pipeline):
    with pytest.raises(ValueError, match="temperature"):
        pipeline.generate_batches(CAPTIONS, temperature=-1.0)


def test_both_take_the_same_arguments():
    one, other = (inspect.signature(method) for method in (Pipeline.generate, Pipeline.generate_batches))
    assert one.parameters == other.parameters


@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_progress(pipeline, batch_size):
    seen = []

    def watch(progress):
        done, total, *_ = progress
        assert isinstance(progress, SamplingProgress)
        assert progress.tokens.shape == (min(batch_size, 6) if batch_size != 3 else 2, 4, 4)
        seen.append((done, total, progress.start, progress.position, progress.tokens.clone()))

    result = pipeline.generate(CAPTIONS, num_images=2, batch_size=batch_size, on_tokens=watch)
    done, totals, starts, positions, tokens = zip(*seen, strict=True)
    assert set(totals) == {3 * 2 * 16}
    assert list(done) == sorted(set(done))
    assert done[-1] == 3 * 2 * 16
    for start, position, drawn in zip(starts, positions, tokens, strict=True):
        expected = result.tokens[start : start + len(drawn)].flatten(1)
        assert torch.equal(drawn.flatten(1)[:, :position], expected[:, :position])


def test_previews_are_complete_rows_and_grey(pipeline, image):
    previews = []

    def watch(progress):
        if progress.start == 1:
            previews.append((progress.position, progress.preview()))

    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0, :2] = True
    result = pipeline.generate(CAPTIONS[:2], seed=0, batch_size=1, image=image, keep_mask=mask, on_tokens=watch)
    assert [position for position, _ in previews] == list(range(2, 17))
    for position, preview in previews:
        rows = position // 4
        assert preview.shape == (1, 3, 16, 16)
        assert (preview[:, :, 4 * rows :] == 0.5).all()
        if rows:
            torch.testing.assert_close(preview[:, :, : 4 * rows], pipeline.dvae.decode(result.tokens[1:, :rows]))
    torch.testing.assert_close(previews[-1][1], result.images[1:])


def test_nobody_decodes_who_does_not_ask(pipeline, monkeypatch):
    decoded = []
    decode = pipeline.dvae.decode
    monkeypatch.setattr(pipeline.dvae, "decode", lambda tokens: decoded.append(len(tokens)) or decode(tokens))
    pipeline.generate(CAPTIONS, batch_size=2, on_tokens=lambda progress: None)
    assert decoded == [2, 1]


def test_the_dvae_decodes_in_parts(pipeline, monkeypatch):
    decoded = []
    decode = pipeline.dvae.decode
    expected = pipeline.generate(CAPTIONS, num_images=2, seed=0)
    monkeypatch.setattr(pipeline.dvae, "decode", lambda tokens: decoded.append(len(tokens)) or decode(tokens))
    monkeypatch.setattr(pipeline_module, "DECODE_BYTES", 4 * 4 * 6 * 8 * 16 * 16)
    assert_same_output(pipeline.generate(CAPTIONS, num_images=2, seed=0), expected)
    assert decoded == [4, 2]
    monkeypatch.setattr(pipeline_module, "DECODE_BYTES", 1)
    assert_same_output(pipeline.generate(CAPTIONS, num_images=2, seed=0), expected)
    assert decoded[2:] == [1] * 6


@pytest.mark.parametrize("batch_size", [3, 64])
def test_ranker_gives_the_scores(batch_size):
    calls = []

    def clip(images, prompts):
        calls.append((images.shape, prompts))
        return images.mean(dim=(1, 2, 3))

    result = tiny_pipeline(CAPTIONS, clip=clip).generate(CAPTIONS[:2], num_images=2, batch_size=batch_size)
    asked = [CAPTIONS[0], CAPTIONS[0], CAPTIONS[1], CAPTIONS[1]]
    if batch_size == 64:
        assert calls == [((4, 3, 16, 16), asked)]
    else:
        assert calls == [((2, 3, 16, 16), asked[:2]), ((2, 3, 16, 16), asked[2:])]
    torch.testing.assert_close(result.scores, result.images.mean(dim=(1, 2, 3)))


def test_guidance_changes_what_is_drawn_and_not_what_a_score_is(pipeline):
    plain, guided = (pipeline.generate(CAPTIONS, seed=0, cond_scale=scale) for scale in (1, 4.0))
    assert not torch.equal(plain.tokens, guided.tokens)
    torch.testing.assert_close(guided.scores, log_likelihoods(pipeline, CAPTIONS, guided.tokens))
    unconditional = pipeline.generate(CAPTIONS, seed=[1, 1, 1], cond_scale=0.0).tokens
    assert torch.equal(unconditional[0], unconditional[1]), "a scale of 0 draws without the caption"


@pytest.mark.parametrize(
    ("section", "warns"), [(None, False), ({}, True), ({"caption_drop": 0.0}, True), ({"caption_drop": 0.1}, False)]
)
def test_guidance_of_a_model_that_saw_no_empty_caption(pipeline, tmp_path, section, warns):
    """What is known of the training is in the checkpoint's configuration, in its own section or nowhere."""
    pipeline.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config if section is None else config | {"train": section}))
    loaded = Pipeline.from_pretrained(tmp_path / "saved")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded.generate("a")
        assert not caught
        loaded.generate("a", cond_scale=2.0)
        loaded.generate("a", cond_scale=3.0)
    messages = [str(warning.message) for warning in caught]
    assert messages == warns * [
        "this model was trained with caption_drop 0: it never saw the empty caption that cond_scale 2.0 compares with"
    ]


def test_kept_tokens_are_those_of_the_image(pipeline, image):
    tokens = pipeline.dvae.encode(image[None])[0]
    mask = torch.rand(4, 4, generator=seeded()) < 0.5
    result = pipeline.generate(CAPTIONS, num_images=2, seed=0, image=image, keep_mask=mask)
    assert torch.equal(result.tokens[:, mask], tokens[mask].expand(6, -1))
    assert result.tokens[:, ~mask].unique(dim=0).shape[0] == 6
    each = [caption for caption in CAPTIONS for _ in range(2)]
    torch.testing.assert_close(result.scores, log_likelihoods(pipeline, each, result.tokens))
    for shared in (image[None], image.expand(3, -1, -1, -1)):
        again = pipeline.generate(CAPTIONS, num_images=2, seed=0, image=shared, keep_mask=mask.expand(3, -1, -1))
        assert_same_output(again, result)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_each_prompt_has_its_image_and_mask(pipeline, batch_size):
    images = pipeline.dvae.decode(torch.randint(12, (3, 4, 4)))
    tokens = pipeline.dvae.encode(images)
    masks = torch.rand(3, 4, 4) < 0.5
    masks[0, :2] = True
    masks[2] = False
    options = {"num_images": 2, "cond_scale": 2.0}
    result = pipeline.generate(CAPTIONS, seed=0, image=images, keep_mask=masks, batch_size=batch_size, **options)
    for prompt, caption in enumerate(CAPTIONS):
        own = slice(2 * prompt, 2 * prompt + 2)
        kept = masks[prompt]
        assert torch.equal(result.tokens[own, kept], tokens[prompt, kept].expand(2, -1))
        alone = pipeline.generate(caption, seed=2 * prompt, image=images[prompt], keep_mask=kept, **options)
        assert torch.equal(result.tokens[own], alone.tokens)
    assert torch.equal(result.tokens[4:], pipeline.generate(CAPTIONS[2], seed=4, **options).tokens)


@pytest.mark.parametrize("cond_scale", [1.0, 3.0])
def test_an_image_that_is_kept_whole_is_scored(pipeline, image, cond_scale):
    seen = []
    mask = torch.ones(4, 4, dtype=torch.bool)
    result = pipeline.generate(
        CAPTIONS,
        image=image,
        keep_mask=mask,
        cond_scale=cond_scale,
        on_tokens=lambda progress: seen.append(progress[:2]),
    )
    assert torch.equal(result.tokens, pipeline.dvae.encode(image[None]).expand(3, -1, -1))
    torch.testing.assert_close(result.scores, log_likelihoods(pipeline, CAPTIONS, result.tokens))
    assert seen == [(48, 48)]


@pytest.mark.parametrize(("rows", "kept"), [(32, 15), (8, 3), (4, 1), (3, 1), (2, 1), (1, 0)])
def test_the_top_of_an_image_is_kept_where_nothing_else_is_said(pipeline, rows, kept, monkeypatch):
    """The paper keeps 15 of 32 rows. Only the mask is looked at, so that the grid can be any."""
    object.__setattr__(config := pipeline.dalle.config, "grid", (rows, 4))
    monkeypatch.setattr(pipeline.dvae, "encode", lambda images: torch.zeros(1, rows, 4, dtype=torch.int64))
    try:
        _, keep = pipeline._encode_image(torch.rand(3, 16, 16), None, 1)
    finally:
        object.__setattr__(config, "grid", (4, 4))
    assert keep.reshape(rows, 4).all(dim=1).tolist() == [True] * kept + [False] * (rows - kept)


def test_completion_as_the_paper_does_it(pipeline, image):
    result = pipeline.generate(CAPTIONS[0], num_images=2, seed=0, image=image)
    assert torch.equal(result.tokens[:, :1], pipeline.dvae.encode(image[None])[:, :1].expand(2, -1, -1))
    assert not torch.equal(result.tokens[0, 1:], result.tokens[1, 1:])


def one_image_bytes(pipeline, **options):
    return decoder_bytes(pipeline.dalle, 1, 1, **options)


def test_memory_budget_decides_the_batches(pipeline):
    def batches(**options):
        return [
            len(output.tokens) for _, output in pipeline.generate_batches(CAPTIONS, num_images=2, seed=0, **options)
        ]

    assert batches() == [6]
    assert batches(memory_budget=decoder_bytes(pipeline.dalle, 1, 2)) == [2, 2, 2]
    assert batches(memory_budget=decoder_bytes(pipeline.dalle, 1, 2) - 1) == [1] * 6
    guided = decoder_bytes(pipeline.dalle, 1, 2, guided=True)
    assert batches(memory_budget=guided, cond_scale=2.0) == [2, 2, 2]
    assert len(batches(memory_budget=guided)) < 3
    half = decoder_bytes(pipeline.dalle, 3, 2, cache_dtype=torch.bfloat16)
    assert batches(memory_budget=half, cache_dtype=torch.bfloat16) == [6]
    assert len(batches(memory_budget=half)) > 1


@pytest.mark.parametrize("cond_scale", [1.0, 2.0])
def test_memory_of_a_prefix_that_is_read_at_once(pipeline, image, cond_scale):
    """It takes what as many more text states take."""
    guided = cond_scale != 1
    keep = torch.zeros(2, 4, 4, dtype=torch.bool)
    keep[0].view(-1)[:3] = keep[1].view(-1)[:5] = keep[1, 3] = True
    budget = decoder_bytes(pipeline.dalle, 2, 1, guided=guided, prefix=5)
    assert budget > decoder_bytes(pipeline.dalle, 2, 1, guided=guided)

    def batches(**options):
        drawn = pipeline.generate_batches(
            CAPTIONS[:2], image=image, keep_mask=keep, cond_scale=cond_scale, seed=0, **options
        )
        return [len(output.tokens) for _, output in drawn]

    assert batches(memory_budget=budget) == [2]
    assert batches(memory_budget=budget - 1) == [1, 1]


def test_cache_dtype(pipeline):
    full, half = (pipeline.generate(CAPTIONS, temperature=0, cache_dtype=dtype) for dtype in (None, torch.bfloat16))
    torch.testing.assert_close(
        half.scores,
        log_likelihoods(pipeline, CAPTIONS, half.tokens),
        rtol=0.05,
        atol=16 * torch.finfo(torch.bfloat16).eps,
    )
    assert not torch.equal(half.scores, full.scores)


def test_no_more_at_once_than_is_worth_it(pipeline):
    starts = [start for start, _ in pipeline.generate_batches(CAPTIONS[0], num_images=LARGEST_BATCH["cpu"] + 1)]
    assert starts == [0, 33]


def test_model_without_numbers():
    broken = tiny_pipeline(CAPTIONS)
    with torch.no_grad():
        broken.dalle.image_head.weight.fill_(math.nan)
    with pytest.raises(
        FloatingPointError, match="the scores of the next token must be numbers, got NaN from the model"
    ):
        broken.generate(CAPTIONS)


def test_any_letter_is_a_caption(pipeline):
    """All 256 bytes are tokens, so no letter is unknown: what is refused is text of which nothing is left."""
    for caption in ("\u4e2d\u6587", "\U0001f600", "\u200b", "\x00"):
        assert pipeline.generate(caption).tokens.shape == (1, 4, 4)


def test_a_caption_without_tokens(pipeline, monkeypatch):
    """The tokenizer gives none for no text that is not blank; another one may."""
    monkeypatch.setattr(pipeline.tokenizer, "encode", lambda caption, **options: [])
    with pytest.raises(ValueError, match="prompt must have at least one token, got 'none'"):
        pipeline.generate(["none"])


IMAGE = torch.rand(3, 16, 16)
MASK = torch.ones(4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts must hold at least one caption, got none"),
        ("", {}, "prompt must not be empty, got ''"),
        (["a red square", " \n"], {}, r"prompt must not be empty, got ' \n'"),
        ("a", {"num_images": 0}, "num_images must be >= 1, got 0"),
        ("a", {"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ("a", {"temperature": -1.0}, "temperature must be finite and >= 0, got -1.0"),
        ("a", {"top_k": 0}, "top_k must be >= 1, got 0"),
        ("a", {"top_k": 13}, "top_k must be at most the 12 codes of the vocabulary, got 13"),
        ("a", {"top_p": 0.0}, "top_p must be in (0, 1], got 0.0"),
        ("a", {"cond_scale": math.nan}, "cond_scale must be finite, got nan"),
        ("a", {"cond_scale": math.inf}, "cond_scale must be finite, got inf"),
        ("a", {"seed": -1}, f"seed must be in 0..{LARGEST_SEED}, got -1"),
        ("a", {"seed": 2**63}, f"seed must be in 0..{LARGEST_SEED}, got {2**63}"),
        ("a", {"seed": 2**63 - 1, "num_images": 2}, f"seed must be in 0..{LARGEST_SEED}, got {2**63}"),
        ("a", {"seed": [3, -4], "num_images": 2}, f"seed must be in 0..{LARGEST_SEED}, got -4"),
        (["a", "b"], {"seed": [1, 2, 3]}, "seed must be one number, or one for each of the 2 images, got 3"),
        (["a", "b"], {"seed": [1]}, "seed must be one number, or one for each of the 2 images, got 1"),
        ("a", {"seed": 1, "generator": torch.Generator()}, "seed and generator must not both be given"),
        ("a", {"keep_mask": MASK}, "keep_mask needs an image whose tokens it keeps, got none"),
        (
            ["a", "b"],
            {"image": IMAGE, "keep_mask": MASK[:3]},
            "keep_mask must have shape (4, 4) or (2, 4, 4), got (3, 4)",
        ),
        (
            ["a", "b"],
            {"image": IMAGE, "keep_mask": MASK[None]},
            "keep_mask must have shape (4, 4) or (2, 4, 4), got (1, 4, 4)",
        ),
        ("a", {"image": IMAGE[:, :8]}, "image must have the dVAE's size, 16 x 16 pixels, got 8 x 16"),
        ("a", {"image": torch.rand(3, 32, 32)}, "image must have the dVAE's size, 16 x 16 pixels, got 32 x 32"),
        ("a", {"image": IMAGE[0]}, "image must have shape (3, H, W) or (1, 3, H, W), got (16, 16)"),
        ("a", {"image": IMAGE[:1]}, "image must have shape (3, H, W) or (1, 3, H, W), got (1, 16, 16)"),
        (
            ["a", "b"],
            {"image": IMAGE.expand(3, -1, -1, -1)},
            "image must have shape (3, H, W) or (1, 3, H, W) or (2, 3, H, W), got (3, 3, 16, 16)",
        ),
        ("a", {"image": torch.full((3, 16, 16), 1.5)}, "image must lie in [0, 1], got 1.5 to 1.5"),
        ("a", {"image": torch.full((3, 16, 16), math.nan)}, "image must lie in [0, 1], got nan to nan"),
    ],
)
def test_generate_errors(pipeline, prompts, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pipeline.generate(prompts, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": IMAGE.mul(255).byte()}, "image must be floating point, got torch.uint8"),
        ({"image": [[0.5]]}, "image must be a tensor, got list"),
        ({"image": IMAGE, "keep_mask": MASK.float()}, "keep_mask must be a bool tensor, got torch.float32"),
        ({"image": IMAGE, "keep_mask": [[True]]}, "keep_mask must be a bool tensor, got list"),
    ],
)
def test_type_errors(pipeline, options, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        pipeline.generate("a", **options)


def test_too_little_memory(pipeline, monkeypatch):
    size, guided = (one_image_bytes(pipeline, guided=guided) for guided in (False, True))
    pipeline.generate("a", memory_budget=size)
    message = f"memory_budget must be at least the {size} bytes that one image takes, got {size - 1}"
    with pytest.raises(ValueError, match=re.escape(message)):
        pipeline.generate("a", memory_budget=size - 1)
    message = f"memory_budget must be at least the {guided} bytes that one image takes, got {size}"
    with pytest.raises(ValueError, match=re.escape(message)):
        pipeline.generate("a", memory_budget=size, cond_scale=2.0)
    pair = decoder_bytes(pipeline.dalle, 1, 2)
    pipeline.generate("a", num_images=2, batch_size=9, memory_budget=pair)
    message = f"memory_budget must be at least the {pair} bytes that batch_size 2 takes, got {pair - 1}"
    with pytest.raises(ValueError, match=re.escape(message)):
        pipeline.generate("a", num_images=4, batch_size=2, memory_budget=pair - 1)
