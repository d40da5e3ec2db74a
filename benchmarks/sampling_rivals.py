"""DALLE-pytorch 1.6.6 drawing image tokens, at the sizes at which this library's sampling is timed.

The model has random weights; they take as long as trained ones. Its VAE only says how many tokens there are, so that no
image is decoded. Its feed-forward layers are gated and hold 3 d h weights for 2 d h of a plain MLP of hidden size h:
``HIDDEN`` is the hidden size at which both have as many, ``OWN_HIDDEN`` the one it comes with.

A whole image takes minutes without a cache, so tokens are timed at ``PREFIXES``, lengths of the image so far that halve
eight equal parts of it, ``TOKENS`` at each. Their mean times the tokens of an image is the time of an image, as far as
it grows linearly within each part.

- :func:`time_as_called`: ``generate_images(text, use_cache=True, cond_scale=1)``. In this release
  ``forward_with_cond_scale`` returns ``self(*args, **kwargs)`` where cond_scale is 1, without the cache it was given,
  so each token runs the whole prefix.
- :func:`time_cached`: the same with the cache handed on, which nothing else in the package does at cond_scale 1. With
  attention of the types "axial_row" and "axial_col" it needs ``optimize_for_inference``, dense attention under a mask.
  A cache that grew token by token from the caption gives the scores of the whole pass (:func:`cache_error`). One that
  is filled with the first tokens of an image does not, because the package keeps them for its token shift when they
  are shifted already; that takes no more or less time, so it is how the prefixes get in here.
- :func:`cache_bytes`: what the cache holds when an image is complete.

    pip install .[rivals] && pip install --no-deps dalle-pytorch==1.6.6
    python benchmarks/sampling_rivals.py
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from types import ModuleType

import peers
import torch
from torch import Tensor, nn

from dalle_fast.models.transformer import DalleConfig

DEPTH, WIDTH, HEADS, HEAD_DIM = 12, 512, 8, 64
TEXT_LEN, GRID = 256, 32
TEXT_CODES, IMAGE_CODES = 8192, 8192
IMAGE_LEN = GRID**2
CONFIG = DalleConfig(
    text_vocab_size=TEXT_CODES,
    image_vocab_size=IMAGE_CODES,
    text_len=TEXT_LEN,
    grid=(GRID, GRID),
    depth=DEPTH,
    width=WIDTH,
    heads=HEADS,
)

OWN_HIDDEN = 4 * WIDTH
HIDDEN = round(4 * WIDTH * 2 / 3)  # 3 d h as large as 2 d (4 d)
FULL, STATIC = ("full",), ("axial_row", "axial_col", "axial_row", "axial_row")  # types of attention, taken in turn

TOKENS = 4
CHECKED = GRID + 6
PREFIXES = [part * IMAGE_LEN // 8 + IMAGE_LEN // 16 - TOKENS // 2 for part in range(8)]

_NEEDS = ("dalle_pytorch", "axial_positional_embedding", "einops", "rotary_embedding_torch")


def why_missing() -> str | None:
    """Why the package cannot be timed here, or None where it can."""
    missing = [name for name in _NEEDS if name not in sys.modules and importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} is not installed: {peers.INSTALL}" if missing else None


def make_rival(attention: tuple[str, ...] = FULL, hidden: int = HIDDEN) -> nn.Module:
    """DALLE-pytorch's model in evaluation mode, the same weights at every call.

    Args:
        attention: the layers' types of attention, taken in turn; the sparse ones as dense ones under a mask.
        hidden: size of the feed-forward layers between their matrices.

    Raises:
        ImportError: the package is not installed.
    """
    model = make_package_model(CONFIG, attention)
    feed_forward = sys.modules["dalle_pytorch.transformer"].FeedForward
    for layer in model.modules():
        if isinstance(layer, feed_forward):  # takes whole multiples of the width only
            layer.net[0], layer.net[3] = nn.Linear(WIDTH, 2 * hidden), nn.Linear(hidden, WIDTH)
    return model.eval()


def make_package_model(config: DalleConfig, attention: tuple[str, ...] = FULL) -> nn.Module:
    """DALLE-pytorch's model of a configuration's sizes, as the package makes it, the same weights at every call.

    Args:
        config: with a square grid.
        attention: see :func:`make_rival`.

    Raises:
        ImportError: the package is not installed.
    """
    package = _import_package()
    torch.manual_seed(0)
    return package.DALLE(
        dim=config.width,
        vae=_make_vae(package, config),
        num_text_tokens=config.text_vocab_size,
        text_seq_len=config.text_len,
        depth=config.depth,
        heads=config.heads,
        dim_head=config.head_dim,
        attn_types=attention,
        optimize_for_inference=attention != FULL,
    )


def num_parameters(model: nn.Module) -> int:
    """How many weights a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def random_inputs(batch: int) -> tuple[Tensor, Tensor]:
    """Captions (B, TEXT_LEN) and images (B, IMAGE_LEN), as tokens."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, TEXT_CODES, (batch, TEXT_LEN), generator=generator)
    return text, torch.randint(IMAGE_CODES, (batch, IMAGE_LEN), generator=generator)


def time_as_called(model: nn.Module, batch: int = 1) -> float:
    """Seconds a token of ``generate_images(text, use_cache=True, cond_scale=1)``, the mean over PREFIXES."""
    seconds = [_time_tokens(model, batch, prefix, hands_cache_on=False) for prefix in PREFIXES]
    return sum(seconds) / len(seconds)


def time_cached(model: nn.Module, batch: int = 1) -> float:
    """Seconds a token where the cache is handed on, the mean over PREFIXES; one forward pass each.

    The pass that fills the cache with the prefix is not counted.
    """
    seconds = [_time_tokens(model, batch, prefix, hands_cache_on=True) for prefix in PREFIXES]
    return sum(seconds) / len(seconds)


@torch.no_grad()
def cache_bytes(model: nn.Module, batch: int = 1) -> int:
    """Bytes that the cache holds once all of an image has been read, but its last token, which is not."""
    text, image = random_inputs(batch)
    cache: dict = {}
    model(text, image[:, : IMAGE_LEN - 1], cache=cache)
    tensors: list[Tensor] = []
    for name, held in cache.items():
        if name != "offset":
            tensors += [part for parts in held for part in (parts if isinstance(parts, tuple) else (parts,))]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@torch.no_grad()
def cache_error(model: nn.Module, length: int, *, primed: int = 0) -> float:
    """How far cached scores after ``length`` image tokens are from those of a whole pass, relative to the largest.

    Args:
        primed: tokens that are read at once with the caption, and not one by one.
    """
    text, image = random_inputs(1)
    cache: dict = {}
    for count in range(primed, length + 1):
        found = model(text, image[:, :count], cache=cache)[:, -1, -IMAGE_CODES:]
    expected = model(text, image[:, :length])[:, -1, -IMAGE_CODES:]
    return ((found - expected).abs().max() / expected.abs().max()).item()


class _Enough(Exception):
    """Ends ``generate_images`` before its image is complete."""


def _time_tokens(model: nn.Module, batch: int, prefix: int, *, hands_cache_on: bool) -> float:
    """Seconds a token, the mean of TOKENS after an image of ``prefix`` and the token that fills the cache."""
    text, model.vae.primer = random_inputs(batch)
    original = model.forward_with_cond_scale
    starts: list[float] = []

    def counted(*args, cond_scale, cache):
        starts.append(time.perf_counter())
        if len(starts) == TOKENS + 2:
            raise _Enough
        if hands_cache_on:
            return model(*args, cache=cache)
        return original(*args, cond_scale=cond_scale, cache=cache)

    model.forward_with_cond_scale = counted
    placeholder = torch.zeros(batch, 3, model.vae.image_size, model.vae.image_size)
    try:
        model.generate_images(text, use_cache=True, cond_scale=1, img=placeholder, num_init_img_tokens=prefix - 1)
    except _Enough:
        return (starts[-1] - starts[1]) / TOKENS
    finally:
        del model.forward_with_cond_scale
    raise AssertionError("an image was complete before its tokens were timed")


def _import_package() -> ModuleType:
    reason = why_missing()
    if reason is not None:
        raise ImportError(reason)
    name = "dalle_pytorch.vae"
    if name not in sys.modules:
        # The model asks whether its VAE is one of these. The module they stand in for imports a dozen packages.
        module = ModuleType(name)
        module.OpenAIDiscreteVAE = module.VQGanVAE = type("VAE", (nn.Module,), {})
        sys.modules[name] = module
    return peers.import_past_packages("dalle_pytorch", "dalle_pytorch")


def _make_vae(package: ModuleType, config: DalleConfig) -> nn.Module:
    class SizesOnly(package.OpenAIDiscreteVAE):
        image_size, num_tokens, num_layers = 8 * config.grid[0], config.image_vocab_size, 3
        primer: Tensor  # what images encode to

        def get_codebook_indices(self, images: Tensor) -> Tensor:
            return self.primer

    return SizesOnly()


def main() -> None:
    """Print what there is to say."""
    parser = argparse.ArgumentParser(description="Time DALLE-pytorch's sampling.")
    parser.add_argument("--batch", type=int, default=1, help="default: %(default)s")
    arguments = parser.parse_args()
    reason = why_missing()
    if reason is not None:
        parser.exit(1, f"{reason}\n")
    timed = f"{TOKENS} tokens at each of {PREFIXES}"
    print(f"batch {arguments.batch}, {torch.get_num_threads()} threads, {timed}, extrapolated to {IMAGE_LEN}")
    for label, hidden in (("as many weights", HIDDEN), ("its own hidden size", OWN_HIDDEN)):
        for kind, attention in (("full", FULL), ("static masks", STATIC)):
            model = make_rival(attention, hidden)
            ways = {"as called": time_as_called} if attention == FULL else {}
            for name, measure in (ways | {"cached": time_cached}).items():
                seconds = measure(model, arguments.batch)
                print(
                    f"{label} ({num_parameters(model):,}), {kind}, {name}: {seconds * 1e3:.1f} ms a token, "
                    f"{seconds * IMAGE_LEN:.1f} s an image",
                    flush=True,
                )
            print(
                f"  cache {cache_bytes(model, arguments.batch):,} bytes, "
                f"off after {CHECKED} tokens by {cache_error(model, CHECKED):.1e}, "
                f"primed with all but one by {cache_error(model, CHECKED, primed=CHECKED - 1):.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
