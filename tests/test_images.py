"""Decoding, augmentation and the tensor round trip of dalle_fast.data.images."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dalle_fast.data.images import (
    BadSample,
    augment_for_dvae,
    augment_for_transformer,
    center_crop,
    decode_image,
    to_image,
    to_tensor,
)


def encode(image, fmt="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def coordinates(width, height):
    """An image whose red and green channels are its own x and y, so that a crop tells where it was cut."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=2).astype(np.uint8))


@pytest.mark.parametrize("fmt, options", [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})])
def test_decode_is_exact_for_lossless_formats(fmt, options):
    image = noise(7, 5)
    decoded = decode_image(encode(image, fmt, **options))
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), np.asarray(image))


def test_decode_jpeg():
    decoded = decode_image(encode(Image.new("RGB", (16, 8), (200, 30, 30)), "JPEG", quality=95))
    assert decoded.size == (16, 8)
    assert np.abs(np.asarray(decoded).astype(int) - (200, 30, 30)).max() <= 3


def test_decode_cmyk_and_grey_give_rgb():
    assert np.asarray(decode_image(encode(Image.new("L", (3, 3), 77))))[1, 1].tolist() == [77, 77, 77]
    decoded = decode_image(encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"))
    assert decoded.mode == "RGB"
    assert np.asarray(decoded).min() >= 253


def test_decode_scales_16_bit_grey():
    levels = np.array([[0, 257 * 10, 257 * 128, 65535]], dtype=np.uint16)
    decoded = np.asarray(decode_image(encode(Image.fromarray(levels))))
    assert decoded[0, :, 0].tolist() == [0, 10, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_decode_puts_transparency_on_white(mode):
    if mode == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.putpixel((1, 0), 1)
        data = encode(image, transparency=0)
    else:
        image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
        image.putpixel((1, 0), (40, 40, 40, 255))
        data = encode(image.convert(mode))
    pixels = np.asarray(decode_image(data))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1].tolist() == ([40, 50, 60] if mode == "P" else [40, 40, 40])


def test_decode_blends_half_transparent_pixels():
    pixels = np.asarray(decode_image(encode(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))))
    assert pixels[0, 0].tolist() == [127, 127, 127]


def test_decode_reads_the_transparent_colour_of_an_rgb_png():
    data = encode(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))
    assert np.asarray(decode_image(data))[0, 0].tolist() == [255, 255, 255]


def test_decode_applies_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right to view
    image = coordinates(6, 4)
    decoded = decode_image(encode(image, "PNG", exif=exif.tobytes()))
    assert np.array_equal(np.asarray(decoded), np.rot90(np.asarray(image), k=-1))


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "BMP"])
def test_truncated_image_is_a_bad_sample(fmt):
    data = encode(noise(64, 64), fmt)
    with pytest.raises(BadSample, match="image must be a whole PNG, JPEG, WebP or BMP file, got") as caught:
        decode_image(data[: len(data) // 2])
    assert caught.value.reason == "corrupt image"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_bytes_that_are_no_image_are_a_bad_sample(data):
    with pytest.raises(BadSample, match=f"got {len(data)} bytes that do not decode"):
        decode_image(data)


def test_other_formats_are_not_opened():
    with pytest.raises(BadSample, match="image must be a whole PNG, JPEG, WebP or BMP file"):
        decode_image(encode(noise(4, 4), "GIF"))


@pytest.mark.parametrize("limit", [10, 60])  # Pillow itself refuses twice its limit, and only warns before that
def test_decompression_bomb_is_a_bad_sample(monkeypatch, recwarn, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(BadSample, match=f"image must have at most {limit} pixels") as caught:
        decode_image(encode(noise(10, 10)))
    assert caught.value.reason == "decompression bomb"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP"]), st.integers(0, 10**6), st.integers(0, 255))
def test_a_flipped_byte_never_escapes_as_another_error(fmt, position, value):
    data = bytearray(encode(noise(9, 9), fmt))
    data[position % len(data)] = value
    try:
        decoded = decode_image(bytes(data))
    except BadSample as error:
        assert error.reason in ("corrupt image", "decompression bomb")
    else:
        assert decoded.mode == "RGB"


@pytest.mark.parametrize("augment", [augment_for_dvae, augment_for_transformer])
@pytest.mark.parametrize("width, height, size", [(32, 32, 32), (33, 47, 32), (100, 40, 16), (300, 256, 256)])
def test_augment_shape_and_repeatability(augment, width, height, size):
    image = noise(width, height)
    first = augment(image, size, np.random.default_rng(3))
    assert first.shape == (size, size, 3)
    assert first.dtype == np.uint8
    assert first.flags.c_contiguous
    assert np.array_equal(first, augment(image, size, np.random.default_rng(3)))


def test_dvae_augment_reaches_every_corner_and_flips():
    image = coordinates(80, 40)  # s = 40 and 32 * 9 // 8 = 36: scales from 36 to 40
    results = [augment_for_dvae(image, 32, np.random.default_rng(seed)) for seed in range(400)]
    red = np.array([[r[0, 0, 0], r[0, -1, 0]] for r in results]).astype(int)
    flipped = red[:, 0] > red[:, 1]
    assert 0.4 < flipped.mean() < 0.6
    assert red.min() <= 2 and red.max() >= 77
    shown = np.abs(red[:, 1] - red[:, 0])
    # 31 steps between the centres of 32 pixels, each step s/t input pixels, to a pixel's rounding
    assert shown.min() >= 30 and shown.max() <= 31 * 40 / 36 + 1
    assert len(np.unique(shown)) > 2


def test_dvae_scale_law_at_the_papers_size():
    """With s = 512 the resized side t lies in [288, 384], so 256 pixels show between 341 and 455 of 512."""
    y = np.linspace(0, 255, 512)[:, None].repeat(512, axis=1)
    image = Image.fromarray(np.stack([y, y, y], axis=2).round().astype(np.uint8))
    spans = []
    for seed in range(60):
        column = augment_for_dvae(image, 256, np.random.default_rng(seed))[:, 0, 0].astype(float)
        spans.append((column[-1] - column[0]) / 255 * 511 / 255 * 256)
    assert 338 <= min(spans) < 352
    assert 440 < max(spans) <= 458


def test_transformer_augment_stays_near_the_centre_and_never_flips():
    image = coordinates(200, 40)  # slack 160: the crop starts in [60, 100)
    results = [augment_for_transformer(image, 40, np.random.default_rng(seed)) for seed in range(300)]
    starts = np.array([r[0, 0, 0] for r in results])
    assert starts.min() == 60 and starts.max() == 99
    assert all(r[0, -1, 0] > r[0, 0, 0] for r in results)
    tall = [augment_for_transformer(coordinates(40, 200), 40, np.random.default_rng(seed)) for seed in range(300)]
    assert {int(r[0, 0, 1]) for r in tall} == set(range(60, 100))


def test_transformer_scale_law_at_the_papers_size():
    """t lies in [256, 288], so 256 of 512 input rows at least 455 and at most all 512 are shown."""
    y = np.linspace(0, 255, 512)[:, None].repeat(512, axis=1)
    image = Image.fromarray(np.stack([y, y, y], axis=2).round().astype(np.uint8))
    spans = []
    for seed in range(60):
        column = augment_for_transformer(image, 256, np.random.default_rng(seed))[:, 0, 0].astype(float)
        spans.append((column[-1] - column[0]) / 255 * 511 / 255 * 256)
    assert 452 <= min(spans) < 462
    assert 505 < max(spans) <= 514


def test_resize_by_a_whole_ratio_is_the_exact_area_mean():
    """From 24 pixels to size 8, t lies in [9, 12]; at t = 12 every output is the mean of a 2x2 block."""
    image = noise(24, 24)
    blocks = np.asarray(image).astype(float).reshape(12, 2, 12, 2, 3).mean(axis=(1, 3))
    expected = {tuple(np.round(blocks[y, x] + 1e-9).astype(int)) for y in range(12) for x in range(12)}
    matches = 0
    for seed in range(40):
        pixels = augment_for_dvae(image, 8, np.random.default_rng(seed)).reshape(-1, 3).astype(int)
        matches += all(any(abs(np.subtract(p, e)).max() <= 1 for e in expected) for p in pixels)
    assert matches >= 4  # one draw in four has t = 12


@pytest.mark.parametrize("operation", [augment_for_dvae, augment_for_transformer])
def test_small_image_is_a_bad_sample(operation):
    with pytest.raises(BadSample, match="image must be at least 32 pixels on its shorter side, got 100x31") as caught:
        operation(noise(100, 31), 32, np.random.default_rng(0))
    assert caught.value.reason == "small image"


def test_center_crop_refuses_a_small_image():
    with pytest.raises(BadSample, match="image must be at least 8 pixels on its shorter side, got 7x9"):
        center_crop(noise(7, 9), 8)


def test_size_must_be_positive():
    with pytest.raises(ValueError, match="size must be >= 1, got 0"):
        center_crop(noise(4, 4), 0)


def test_center_crop_takes_the_centre():
    pixels = center_crop(coordinates(100, 40), 40)
    assert pixels.shape == (40, 40, 3)
    assert pixels[0, 0, 0] == 30 and pixels[-1, -1, 0] == 69
    assert center_crop(noise(37, 91), 16).shape == (16, 16, 3)


def test_tensor_round_trip_is_exact():
    pixels = np.asarray(noise(5, 3))
    tensor = to_tensor(pixels)
    assert tensor.shape == (3, 3, 5) and tensor.dtype == torch.float32
    assert tensor.min() >= 0 and tensor.max() <= 1
    assert tensor[1, 2, 4] == pixels[2, 4, 1] / np.float32(255)
    assert np.array_equal(np.asarray(to_image(tensor)), pixels)


def test_to_image_clips_and_takes_half_precision():
    image = to_image(torch.tensor([-1.0, 0.5, 2.0], dtype=torch.bfloat16).view(3, 1, 1))
    assert image.getpixel((0, 0)) == (0, 128, 255)


def test_tensor_conversions_name_what_is_wrong():
    with pytest.raises(TypeError, match="array must be uint8, got float64"):
        to_tensor(np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match=r"array must have shape \(H, W, 3\), got \(2, 2\)"):
        to_tensor(np.zeros((2, 2), dtype=np.uint8))
    with pytest.raises(TypeError, match=r"tensor must be floating point, got torch.int64"):
        to_image(torch.zeros(3, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tensor must have shape \(3, H, W\), got \(1, 3, 2, 2\)"):
        to_image(torch.zeros(1, 3, 2, 2))


def test_to_image_rounds_clips_and_survives_nan():
    pixels = torch.tensor([0.0, 0.5, 1.0, -3.0, 7.0, math.nan]).reshape(1, 1, 6).expand(3, 1, 6)
    image = to_image(pixels)
    assert [image.getpixel((x, 0))[0] for x in range(6)] == [0, 128, 255, 0, 255, 0]
