"""Image bytes to RGB pixels, the two training augmentations, and the way back to an image file.

Decoding: PNG, JPEG, WebP and BMP only, EXIF orientation applied, transparency composited on white,
16-bit greyscale scaled to 8 bits. Whatever cannot be decoded is a `BadSample`, never a crash.

Augmentation, with s = min(height, width) and target `size` (the paper uses 256):

    for the dVAE         random s x s crop, resize to t x t with t in [min(s, 9/8 size), min(s, 12/8 size)],
                         random size x size crop, random left-right flip
    for the transformer  s x s crop from the middle quarter of the slack, t in [size, min(s, 9/8 size)],
                         random size x size crop, no flip, since images may hold text

Resizing: the paper asks for TensorFlow's AREA method with align_corners=True. Here it is Pillow's BOX filter
without a reducing gap: every output pixel is the plain mean of the input pixels whose centres lie in its
window. That is the exact area mean when s/t is whole; otherwise a pixel cut by a window's edge counts
wholly for one side instead of in proportion. The t windows tile the crop evenly, while align_corners
stretches their spacing from s/t to (s-1)/(t-1), so that windows drift apart by at most s/t - 1 input
pixels at the far edge, less than one output pixel and less than the random crop that follows.

Source: Ramesh et al., "Zero-Shot Text-to-Image Generation" (2021), listings 1 and 2.
Limits: an image whose shorter side is below `size` is refused, never enlarged.
"""

import io
import math
import struct
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")

# What Pillow's decoders raise on damaged files; UnidentifiedImageError is an OSError.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class BadSample(ValueError):
    """A sample that cannot be used: it is skipped and counted.

    Attributes:
        reason: the kind of fault in two or three words, under which samples are counted.
        key: which sample, when it is known.
    """

    def __init__(self, message: str, *, reason: str = "other", key: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.key = key


def decode_image(data: bytes) -> Image.Image:
    """Decodes an image file held in memory.

    Args:
        data: the bytes of a PNG, JPEG, WebP or BMP file.

    Returns:
        An upright RGB image; transparent parts are white.

    Raises:
        BadSample: the bytes are corrupt, truncated or of another format, or the image has more pixels
            than `PIL.Image.MAX_IMAGE_PIXELS` (a decompression bomb).
    """
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        width, height = image.size
        if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
            raise BadSample(
                f"image must have at most {Image.MAX_IMAGE_PIXELS} pixels, got {width}x{height}",
                reason="decompression bomb",
            )
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample(
            f"image must have at most {Image.MAX_IMAGE_PIXELS} pixels: {error}", reason="decompression bomb"
        ) from error
    except _DECODE_ERRORS as error:
        raise BadSample(
            f"image must be a whole PNG, JPEG, WebP or BMP file, got {len(data)} bytes that do not decode: {error}",
            reason="corrupt image",
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        # convert("RGB") clips 16-bit greys at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image, dtype=np.uint32) // 257).astype(np.uint8))
    if image.has_transparency_data:
        overlay = image.convert("RGBA")
        image = Image.new("RGBA", overlay.size, "white")
        image.alpha_composite(overlay)
    return image.convert("RGB")


def augment_for_dvae(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """Random crop, scale and flip for training the dVAE: the paper's Listing 1 for any target size.

    Args:
        image: RGB, shorter side at least `size`.
        size: side of the result in pixels.
        rng: the only source of randomness.

    Returns:
        uint8 array (size, size, 3).

    Raises:
        BadSample: the image is smaller than `size`.
    """
    side = _shorter_side(image, size)
    width, height = image.size
    top = int(rng.integers(0, height - side, endpoint=True))
    left = int(rng.integers(0, width - side, endpoint=True))
    target = int(rng.integers(min(side, size * 9 // 8), min(side, size * 12 // 8), endpoint=True))
    pixels = _random_crop(_area_resize(image, left, top, side, target), size, rng)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def augment_for_transformer(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """Near-centre crop and slight scaling for training the transformer: the paper's Listing 2.

    Args, returns and raises as `augment_for_dvae`; the result is never flipped.
    """
    side = _shorter_side(image, size)
    width, height = image.size
    top, left = (
        int(rng.integers(3 * slack // 8, max(3 * slack // 8 + 1, 5 * slack // 8)))
        for slack in (height - side, width - side)
    )
    target = int(rng.integers(size, min(side, size * 9 // 8), endpoint=True))
    return np.ascontiguousarray(_random_crop(_area_resize(image, left, top, side, target), size, rng))


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The preprocessing of inference: shorter side to `size` with LANCZOS, then the centre square.

    Args:
        image: RGB, shorter side at least `size`.
        size: side of the result in pixels.

    Returns:
        uint8 array (size, size, 3).

    Raises:
        BadSample: the image is smaller than `size`.
    """
    side = _shorter_side(image, size)
    width, height = (max(size, round(length * size / side)) for length in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    top, left = round((height - size) / 2), round((width - size) / 2)
    return np.ascontiguousarray(pixels[top : top + size, left : left + size])


def _shorter_side(image: Image.Image, size: int) -> int:
    if size < 1:
        raise ValueError(f"size must be >= 1, got {size}")
    width, height = image.size
    if min(width, height) < size:
        raise BadSample(
            f"image must be at least {size} pixels on its shorter side, got {width}x{height}",
            reason="small image",
        )
    return min(width, height)


def _area_resize(image: Image.Image, left: int, top: int, side: int, target: int) -> np.ndarray:
    box = (left, top, left + side, top + side)
    if target == side:
        return np.asarray(image.crop(box))
    return np.asarray(image.resize((target, target), Image.Resampling.BOX, box=box))


def _random_crop(pixels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    top, left = rng.integers(0, len(pixels) - size, size=2, endpoint=True)
    return pixels[top : top + size, left : left + size]


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """Pixels to the layout of the models.

    Args:
        array: uint8 (H, W, 3).

    Returns:
        float32 tensor (3, H, W) in [0, 1].

    Raises:
        TypeError: another dtype. ValueError: another shape.
    """
    if array.dtype != np.uint8:
        raise TypeError(f"array must be uint8, got {array.dtype}")
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"array must have shape (H, W, 3), got {array.shape}")
    return torch.from_numpy(array.transpose(2, 0, 1).astype(np.float32)).div_(255)


def to_image(tensor: torch.Tensor) -> Image.Image:
    """The inverse of `to_tensor`: clips to [0, 1] and rounds to 8 bits; NaN becomes black.

    Args:
        tensor: floating point (3, H, W), any device.

    Returns:
        An RGB image.

    Raises:
        TypeError: an integer tensor. ValueError: another shape.
    """
    if not tensor.is_floating_point():
        raise TypeError(f"tensor must be floating point, got {tensor.dtype}")
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ValueError(f"tensor must have shape (3, H, W), got {tuple(tensor.shape)}")
    pixels = tensor.detach().to("cpu", torch.float32).nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def image_grid(images: torch.Tensor, columns: int | None = None, padding: int = 2) -> torch.Tensor:
    """Lay images out row by row on white, `padding` pixels around each.

    Args:
        images: (N, 3, height, width) floats, N >= 1.
        columns: images a row; without it the grid is as square as it can be.

    Returns:
        (3, rows * (height + padding) + padding, columns * (width + padding) + padding), on the CPU, float32.

    Raises:
        ValueError: the shape is another, or `columns` < 1.
    """
    if images.dim() != 4 or images.shape[0] == 0 or images.shape[1] != 3:
        raise ValueError(f"images must have shape (N, 3, height, width) with N >= 1, got {tuple(images.shape)}")
    count, _, height, width = images.shape
    if columns is None:
        columns = math.ceil(math.sqrt(count))
    if columns < 1:
        raise ValueError(f"columns must be >= 1, got {columns}")
    rows = math.ceil(count / columns)
    grid = torch.ones(3, rows * (height + padding) + padding, columns * (width + padding) + padding)
    for index, image in enumerate(images.detach().to("cpu", torch.float32)):
        top = (index // columns) * (height + padding) + padding
        left = (index % columns) * (width + padding) + padding
        grid[:, top : top + height, left : left + width] = image
    return grid
