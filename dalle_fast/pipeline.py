"""From captions to images: a dVAE, a transformer and a tokenizer that belong together.

    pipeline = Pipeline.from_pretrained("runs/shapes")
    images = pipeline.generate(["a small red circle at the top left on a grey background"], num_images=4).images

A pipeline's directory is also a checkpoint of ``dalle-fast train``:

    config.json  model.safetensors  tokenizer.json  dvae/config.json  dvae/model.safetensors
"""

from __future__ import annotations

import dataclasses
import numbers
import operator
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dalle_fast import __version__
from dalle_fast.batching import choose_batch_size, plan_batches
from dalle_fast.checkpoint import (
    check_match,
    latest_checkpoint,
    load_config,
    load_model_state,
    load_weights,
    write_checkpoint,
)
from dalle_fast.config import from_dict, to_dict
from dalle_fast.data.tokenizer import Tokenizer
from dalle_fast.models.dvae import DVAE, DVAEConfig
from dalle_fast.models.transformer import PAD_ID, Dalle, DalleConfig
from dalle_fast.ops.checks import check_floating, shape_of
from dalle_fast.sampling import LARGEST_SEED, Sampler, check_sampling, draw_seeds

__all__ = [
    "GenerateOutput",
    "Pipeline",
    "SamplingProgress",
    "check_parts_match",
    "dalle_checkpoint_config",
    "load_dvae",
    "load_dvae_config",
    "save_dvae",
]

ModelConfig = TypeVar("ModelConfig", DVAEConfig, DalleConfig)

DECODE_BYTES = 2**30  # that the dVAE's activations may take; one image may take more


class GenerateOutput(NamedTuple):
    """What :meth:`Pipeline.generate` drew, prompt after prompt."""

    images: Tensor  # (N, 3, height, width) in [0, 1]
    tokens: Tensor  # (N, rows, columns) int64
    scores: Tensor  # (N,) fp32: log-likelihood in nats, or what the pipeline's ``clip`` says; higher is better


class SamplingProgress(NamedTuple):
    """How far :meth:`Pipeline.generate` has come: ``done, total, *_ = progress``."""

    done: int  # tokens, all images counted, finished batches' and kept ones too
    total: int  # tokens of all images
    start: int  # number of the first image of the batch that is being drawn
    position: int  # tokens that each image of the batch has, in raster order
    tokens: Tensor  # (n, rows, columns) int64, the batch's; later steps write into it, so clone what is to stay
    dvae: DVAE

    @torch.no_grad()
    def preview(self) -> Tensor:
        """The batch's images, (n, 3, height, width) in [0, 1]: complete rows of tokens decoded, the rest grey."""
        count, rows, columns = self.tokens.shape
        scale, complete = self.dvae.config.downsampling, self.position // columns
        images = torch.full((count, 3, rows * scale, columns * scale), 0.5, device=self.tokens.device)
        if complete:
            images[:, :, : complete * scale] = _decode(self.dvae, self.tokens[:, :complete])
        return images


class Pipeline:
    """Generates images from captions.

    Args:
        dvae, dalle, tokenizer: the parts; vocabularies and grid must agree.
        clip: optional ranker, (images (N, 3, H, W), prompts, one an image) to scores (N,), higher is better.

    Raises:
        ValueError: the parts do not belong together.
    """

    def __init__(
        self,
        dvae: DVAE,
        dalle: Dalle,
        tokenizer: Tokenizer,
        clip: Callable[[Tensor, list[str]], Tensor] | None = None,
    ) -> None:
        check_parts_match(dvae.config, dalle.config, tokenizer)
        self.dvae, self.dalle, self.tokenizer, self.clip = dvae, dalle, tokenizer, clip
        self._warns_of_guidance = False

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.dalle.parameters()).device

    def to(self, device: torch.device | str) -> Pipeline:
        """Move both models, and return the pipeline."""
        self.dvae.to(device)
        self.dalle.to(device)
        return self

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the pipeline, so that :meth:`from_pretrained` reads it; the directory must not exist yet."""
        directory = Path(directory)
        if directory.exists():
            raise ValueError(f"directory must not exist yet, got {directory}")
        parts = directory.with_name(f".{directory.name}.parts")
        try:
            parts.mkdir(parents=True)
            self.tokenizer.save(parts / "tokenizer.json")
            save_dvae(self.dvae, parts / "dvae")
            write_checkpoint(
                directory,
                config=dalle_checkpoint_config(self.dalle.config, self.tokenizer),
                model=self.dalle.state_dict(),
                files={name: parts / name for name in ("tokenizer.json", "dvae")},
            )
        finally:
            shutil.rmtree(parts, ignore_errors=True)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, device: torch.device | str = "cpu") -> Pipeline:
        """Read a pipeline, or the newest checkpoint of a ``dalle-fast train`` run, with averaged weights if any.

        Raises:
            CheckpointError, ValueError: something is missing, damaged, or does not belong together.
        """
        path = latest_checkpoint(directory)
        config = load_config(path, "dalle")
        tokenizer = Tokenizer.load(path / "tokenizer.json")
        check_match("tokenizer_sha256", config.get("tokenizer_sha256"), tokenizer.sha256, path)
        dalle = Dalle(model_config(DalleConfig, config, path))
        _load_best_weights(dalle, path)
        pipeline = cls(load_dvae(path / "dvae"), dalle.eval(), tokenizer)
        pipeline._warns_of_guidance = "train" in config and not config["train"].get("caption_drop", 0.0)
        return pipeline.to(device)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        num_images: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        cond_scale: float = 1.0,
        image: Tensor | None = None,
        keep_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        seed: int | Sequence[int] | None = None,
        memory_budget: int | None = None,
        cache_dtype: torch.dtype | None = None,
        on_tokens: Callable[[SamplingProgress], None] | None = None,
    ) -> GenerateOutput:
        """Draw images for captions, or complete images.

        Args:
            prompts: one caption or several; longer than the model's text length they are cut.
            num_images: images a prompt.
            temperature, top_k, top_p, cond_scale, cache_dtype: see :class:`dalle_fast.sampling.Sampler`.
            image: an image to complete, (3, H, W) or (1, 3, H, W) for all prompts or (P, 3, H, W), one each; in [0, 1]
                and of the dVAE's size.
            keep_mask: (rows, columns) or (P, rows, columns) bool, which tokens of ``image`` stay as they are. None
                keeps the top 15 of 32 rows, as the paper does: ``rows * 15 // 32``, at least one row of several.
            generator: draws the first of the images' consecutive seeds where ``seed`` is None; None takes PyTorch's
                default.
            batch_size: images drawn together at most; only memory and speed depend on it. None takes what fits
                ``memory_budget``, at most 64 on a CPU and 512 on a GPU.
            seed: >= 0, of the first image; the i-th of all images has ``seed + i``, so that image 2 of
                ``generate(p, seed=7, num_images=4)`` is that of ``generate(p, seed=9)``. Or one an image each.
            memory_budget: bytes that the transformer's caches and buffers may take; None is four fifths of what is free
                on a GPU, half of it on a CPU. The dVAE decodes in parts whose activations take up to 1 GiB, or one
                image at a time.
            on_tokens: called after each step with a :class:`SamplingProgress`.

        Returns:
            Images, tokens and scores of the first prompt's images, then the second's, and so on. Scores are
            log-likelihoods given the caption, of kept tokens too, unguided, unfiltered and at temperature 1.

        Raises:
            ValueError: no prompt, an empty one, a setting out of range, an image or a mask of another shape, or too
                little memory.
            TypeError: an image that is not floating point, or a mask that is not bool.
            FloatingPointError: the model's scores are NaN.
        """
        batches = self.generate_batches(
            prompts,
            num_images=num_images,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            cond_scale=cond_scale,
            image=image,
            keep_mask=keep_mask,
            generator=generator,
            batch_size=batch_size,
            seed=seed,
            memory_budget=memory_budget,
            cache_dtype=cache_dtype,
            on_tokens=on_tokens,
        )
        outputs = [output for _, output in batches]
        return GenerateOutput(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))

    def generate_batches(
        self,
        prompts: str | Sequence[str],
        *,
        num_images: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        cond_scale: float = 1.0,
        image: Tensor | None = None,
        keep_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        seed: int | Sequence[int] | None = None,
        memory_budget: int | None = None,
        cache_dtype: torch.dtype | None = None,
        on_tokens: Callable[[SamplingProgress], None] | None = None,
    ) -> Iterator[tuple[int, GenerateOutput]]:
        """:meth:`generate` batch by batch: whoever is interrupted keeps what is finished.

        Arguments are checked and seeds drawn at once, images are drawn as they are asked for.

        Returns:
            Iterator over (number of the batch's first image, its images, tokens and scores), in order.

        Raises:
            As :meth:`generate`; FloatingPointError while iterating.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("prompts must hold at least one caption, got none")
        for name, value in (("num_images", num_images), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        check_sampling(temperature, top_k, top_p, cond_scale, codes=self.dalle.config.image_vocab_size)
        text = self._encode_prompts(prompts)
        tokens, keep = self._encode_image(image, keep_mask, len(prompts))
        seeds = _image_seeds(seed, generator, len(prompts) * num_images)
        batch_size = choose_batch_size(
            self.dalle,
            len(prompts),
            num_images,
            guided=cond_scale != 1,
            cache_dtype=cache_dtype,
            prefix=0 if keep is None else int(keep.cumprod(dim=1).sum(dim=1).max()),
            batch_size=batch_size,
            memory_budget=memory_budget,
        )
        if cond_scale != 1 and self._warns_of_guidance:
            self._warns_of_guidance = False
            warnings.warn(
                "this model was trained with caption_drop 0: it never saw the empty caption that "
                f"cond_scale {cond_scale} compares with",
                stacklevel=2,
            )
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "cond_scale": cond_scale}
        return self._draw(
            prompts,
            text,
            seeds,
            plan_batches(len(prompts), num_images, batch_size),
            settings | {"cache_dtype": cache_dtype},
            tokens,
            keep,
            on_tokens,
        )

    @torch.no_grad()
    def _draw(
        self,
        prompts: list[str],
        text: Tensor,
        seeds: Tensor,
        batches: list[tuple[range, int]],
        settings: dict[str, Any],
        tokens: Tensor | None,
        keep: Tensor | None,
        on_tokens: Callable[[SamplingProgress], None] | None,
    ) -> Iterator[tuple[int, GenerateOutput]]:
        config = self.dalle.config
        sampler, report, sizes, start = None, None, None, 0
        for chunk, count in batches:
            images = len(chunk) * count
            if sizes != (len(chunk), count):
                sampler = report = None  # the memory is needed for the next one
                sizes = len(chunk), count
                sampler = Sampler(self.dalle, *sizes, **settings)

            def report(position: int, sampler: Sampler = sampler, start: int = start, images: int = images) -> None:
                on_tokens(
                    SamplingProgress(
                        done=start * config.image_len + position * images,
                        total=len(seeds) * config.image_len,
                        start=start,
                        position=position,
                        tokens=sampler.tokens.unflatten(1, config.grid),
                        dvae=self.dvae,
                    )
                )

            part = slice(chunk.start, chunk.stop)
            drawn, scores = sampler.run(
                text[part],
                seeds[start : start + images],
                tokens=None if tokens is None else tokens[part],
                keep=None if keep is None else keep[part],
                on_token=None if on_tokens is None else report,
            )
            drawn = drawn.unflatten(1, config.grid)
            pixels = _decode(self.dvae, drawn)
            if self.clip is not None:
                scores = self.clip(pixels, [prompts[prompt] for prompt in chunk for _ in range(count)])
            yield start, GenerateOutput(pixels, drawn, scores)
            start += images

    def _encode_prompts(self, prompts: list[str]) -> Tensor:
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError(f"prompt must not be empty, got {prompt!r}")
        length = self.dalle.config.caption_len
        text = torch.stack([self.tokenizer.encode_padded(prompt, length)[0] for prompt in prompts])
        for prompt, row in zip(prompts, text, strict=True):
            if (row == PAD_ID).all():
                raise ValueError(f"prompt must have at least one token, got {prompt!r}")
        return text.to(self.device)

    def _encode_image(
        self, image: Tensor | None, keep_mask: Tensor | None, num_prompts: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """The image's tokens and which of them to keep, each (num_prompts, image_len); None without an image."""
        if image is None:
            if keep_mask is not None:
                raise ValueError("keep_mask needs an image whose tokens it keeps, got none")
            return None, None
        check_floating(image=image)
        side, (rows, columns) = self.dvae.config.image_size, self.dalle.config.grid
        if image.ndim not in (3, 4) or image.shape[-3] != 3 or (image.ndim == 4 and len(image) not in (1, num_prompts)):
            rule = " or ".join(["(3, H, W)", *(f"({n}, 3, H, W)" for n in sorted({1, num_prompts}))])
            raise ValueError(f"image must have shape {rule}, got {shape_of(image)}")
        if image.shape[-2:] != (side, side):
            height, width = image.shape[-2:]
            raise ValueError(f"image must have the dVAE's size, {side} x {side} pixels, got {height} x {width}")
        low, high = (bound.item() for bound in image.detach().aminmax())
        if not 0 <= low <= high <= 1:
            raise ValueError(f"image must lie in [0, 1], got {low} to {high}")
        if keep_mask is None:
            kept_rows = max(rows * 15 // 32, min(1, rows - 1))
            keep_mask = (torch.arange(rows) < kept_rows)[:, None].expand(rows, columns)
        if not isinstance(keep_mask, Tensor) or keep_mask.dtype != torch.bool:
            kind = keep_mask.dtype if isinstance(keep_mask, Tensor) else type(keep_mask).__name__
            raise TypeError(f"keep_mask must be a bool tensor, got {kind}")
        if keep_mask.shape not in ((rows, columns), (num_prompts, rows, columns)):
            rule = f"({rows}, {columns}) or ({num_prompts}, {rows}, {columns})"
            raise ValueError(f"keep_mask must have shape {rule}, got {shape_of(keep_mask)}")
        images = image.reshape(-1, 3, side, side).to(self.device, torch.float32)
        tokens = self.dvae.encode(images).flatten(1).expand(num_prompts, -1)
        keep = keep_mask.reshape(-1, rows * columns).to(self.device).expand(num_prompts, -1)
        return tokens, keep


def _image_seeds(seed: int | Sequence[int] | None, generator: torch.Generator | None, count: int) -> Tensor:
    """The images' seeds, (count,) int64."""
    if seed is None:
        return draw_seeds(count, generator)
    if generator is not None:
        raise ValueError("seed and generator must not both be given")
    seeds = range(seed, seed + count) if isinstance(seed, numbers.Integral) else list(map(operator.index, seed))
    if len(seeds) != count:
        raise ValueError(f"seed must be one number, or one for each of the {count} images, got {len(seeds)}")
    for number in (min(seeds), max(seeds)):
        if not 0 <= number <= LARGEST_SEED:
            raise ValueError(f"seed must be in 0..{LARGEST_SEED}, got {number}")
    return torch.tensor(seeds)


def _decode(dvae: DVAE, tokens: Tensor) -> Tensor:
    """Images of tokens (N, rows, columns), as many at once as DECODE_BYTES allows."""
    pixels = tokens[0].numel() * dvae.config.downsampling**2
    # At the widest, six activations of ``hidden`` channels at full size; float32.
    part = max(1, DECODE_BYTES // (4 * 6 * dvae.config.hidden * pixels))
    return torch.cat([dvae.decode(few) for few in tokens.split(part)])


def check_parts_match(dvae: DVAEConfig, dalle: DalleConfig, tokenizer: Tokenizer) -> None:
    """Raise ValueError, naming the field and both values, unless the three belong together."""
    grid = (dvae.grid, dvae.grid)
    for field, own, name, other in (
        ("image_vocab_size", dalle.image_vocab_size, "the dVAE's vocab_size", dvae.vocab_size),
        ("grid", tuple(dalle.grid), "the dVAE's grid", grid),
        ("text_vocab_size", dalle.text_vocab_size, "the tokenizer's vocab_size", tokenizer.vocab_size),
    ):
        if own != other:
            raise ValueError(f"{field} must equal {name}, got {own} and {other}")


def dalle_checkpoint_config(config: DalleConfig, tokenizer: Tokenizer) -> dict[str, object]:
    """What config.json says of a transformer."""
    return {
        "kind": "dalle",
        "dalle_fast": __version__,
        "model": to_dict(config),
        "tokenizer_sha256": tokenizer.sha256,
    }


def save_dvae(dvae: DVAE, directory: Path) -> None:
    """Write a dVAE alone, without training state."""
    config = {"kind": "dvae", "dalle_fast": __version__, "model": to_dict(dvae.config)}
    write_checkpoint(directory, config=config, model=dvae.state_dict())


def model_config(config_class: type[ModelConfig], config: dict[str, Any], path: Path) -> ModelConfig:
    """The model's configuration in a checkpoint's config.json, which must name every field.

    Raises:
        ValueError: a field is missing or unknown.
        TypeError: a value has the wrong type.
    """
    for field in dataclasses.fields(config_class):
        if field.name not in config["model"]:
            raise ValueError(f"checkpoint {path}: model in config.json lacks the field {field.name}")
    return from_dict(config_class, config["model"])


def load_dvae_config(directory: str | Path) -> DVAEConfig:
    """Read the sizes of the dVAE that :func:`load_dvae` reads."""
    published = _published_files(directory)
    if published is not None:
        return DVAE.from_openai(*published).config
    path = latest_checkpoint(directory)
    return model_config(DVAEConfig, load_config(path, "dvae"), path)


def load_dvae(directory: str | Path) -> DVAE:
    """Read a dVAE, in evaluation mode.

    Args:
        directory: a checkpoint, or a run, of which the newest one is read, with averaged weights if any; or a folder
            with the published ``encoder.pkl`` and ``decoder.pkl``.

    Raises:
        CheckpointError, ValueError: something is missing, damaged, or does not belong together.
    """
    published = _published_files(directory)
    if published is not None:
        return DVAE.from_openai(*published)
    path = latest_checkpoint(directory)
    dvae = DVAE(load_dvae_config(path))
    _load_best_weights(dvae, path)
    return dvae.eval()


def _published_files(directory: str | Path) -> tuple[Path, Path] | None:
    """The two files of the published dVAE, if one of them is in the folder and no checkpoint is."""
    encoder, decoder = Path(directory) / "encoder.pkl", Path(directory) / "decoder.pkl"
    if (Path(directory) / "config.json").exists() or not (encoder.exists() or decoder.exists()):
        return None
    return encoder, decoder


def _load_best_weights(model: nn.Module, path: Path) -> None:
    load_model_state(model, load_weights(path, ema=(path / "ema.safetensors").exists()), path)
