"""From captions to images: a dVAE, a transformer and a tokenizer that belong together.

    pipeline = Pipeline.from_pretrained("runs/shapes")
    images = pipeline.generate(["a small red circle at the top left on a grey background"], num_images=4).images

A pipeline's directory is also a checkpoint of ``dalle-fast train``:

    config.json  model.safetensors  tokenizer.json  dvae/config.json  dvae/model.safetensors
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dalle_fast import __version__
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
from dalle_fast.models.transformer import Dalle, DalleConfig
from dalle_fast.sampling import check_sampling, sample_tokens

__all__ = [
    "GenerateOutput",
    "Pipeline",
    "check_parts_match",
    "dalle_checkpoint_config",
    "load_dvae",
    "load_dvae_config",
    "save_dvae",
]

ModelConfig = TypeVar("ModelConfig", DVAEConfig, DalleConfig)

DEFAULT_BATCH_SIZE = 64  # images decoded together


class GenerateOutput(NamedTuple):
    """What :meth:`Pipeline.generate` drew, prompt after prompt."""

    images: Tensor  # (N, 3, height, width) in [0, 1]
    tokens: Tensor  # (N, rows, columns) int64
    scores: Tensor  # (N,) fp32: log-likelihood in nats, or what the pipeline's ``clip`` says; higher is better


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
        return cls(load_dvae(path / "dvae"), dalle.eval(), tokenizer).to(device)

    @torch.no_grad()
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        num_images: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        on_tokens: Callable[[int, int], None] | None = None,
    ) -> GenerateOutput:
        """Draw images for captions.

        Args:
            prompts: one caption or several; longer than the model's text length they are cut.
            num_images: images a prompt.
            temperature, top_k, top_p, generator: see :func:`dalle_fast.sampling.sample_tokens`.
            batch_size: images drawn together, 64 by default; only memory and speed depend on it, and which random
                numbers each image gets.
            on_tokens: called after each step with the tokens drawn so far and the tokens to draw, all images
                counted.

        Returns:
            Images, tokens and scores of the first prompt's images, then the second's, and so on.

        Raises:
            ValueError: no prompt, an empty one, or a setting out of range.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("prompts must hold at least one caption, got none")
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError(f"prompt must not be empty, got {prompt!r}")
        batch_size = DEFAULT_BATCH_SIZE if batch_size is None else batch_size
        for name, value in (("num_images", num_images), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        check_sampling(temperature, top_k, top_p)
        length = self.dalle.config.caption_len
        text = torch.stack([self.tokenizer.encode_padded(prompt, length)[0] for prompt in prompts]).to(self.device)

        total = len(prompts) * num_images * self.dalle.config.image_len
        pieces, done = [], 0
        for chunk, count in _chunks(len(prompts), num_images, batch_size):

            def report(position: int, images: int = len(chunk) * count, before: int = done) -> None:
                if on_tokens is not None:
                    on_tokens(before + position * images, total)

            pieces.append(
                sample_tokens(
                    self.dalle,
                    text[chunk.start : chunk.stop],
                    count,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    generator=generator,
                    on_token=report,
                )
            )
            done += len(chunk) * count * self.dalle.config.image_len
        tokens = torch.cat([piece[0] for piece in pieces]).unflatten(1, self.dalle.config.grid)
        scores = torch.cat([piece[1] for piece in pieces])
        images = torch.cat([self.dvae.decode(part) for part in tokens.split(batch_size)])
        if self.clip is not None:
            scores = self.clip(images, [prompt for prompt in prompts for _ in range(num_images)])
        return GenerateOutput(images, tokens, scores)


def _chunks(prompts: int, num_images: int, batch_size: int) -> list[tuple[range, int]]:
    """Which prompts are drawn together, and how many images of each: whole prompts while they fit a batch."""
    if num_images <= batch_size:
        step = batch_size // num_images
        return [(range(first, min(first + step, prompts)), num_images) for first in range(0, prompts, step)]
    parts = [min(batch_size, num_images - first) for first in range(0, num_images, batch_size)]
    return [(range(prompt, prompt + 1), part) for prompt in range(prompts) for part in parts]


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
