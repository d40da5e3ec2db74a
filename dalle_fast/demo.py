"""The demo: make a data set, train both models on it, sample captions they never saw and judge the pictures.

    OUT/data/  OUT/dvae/  OUT/tokens/  OUT/dalle/        the data set, the two training runs, and what is between them
    OUT/reconstructions.png, samples.png, curves.png     what they learned, to look at
    OUT/metrics.json                                     and in numbers

Shapes: every held-out caption asks for a colour, form and position that no training drawing shows together. What a
sample shows is read from its pixels (:func:`dalle_fast.data.shapes.read_drawing`), and compared with the caption only
then.
Emoji: a sample is right if, of all emoji of the font, the drawing nearest to it is the one its held-out caption names.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle_fast.data.images import center_crop, decode_image, image_grid, to_image, to_tensor
from dalle_fast.data.shapes import ATTRIBUTES, Drawing, read_drawing, score, write_shapes
from dalle_fast.data.sources import open_source
from dalle_fast.pipeline import Pipeline
from dalle_fast.training.dvae import train_dvae
from dalle_fast.training.encode import EncodeConfig, encode
from dalle_fast.training.log import read_log
from dalle_fast.training.presets import DVAE_PRESETS, PRIOR_PRESETS
from dalle_fast.training.prior import fit_to_dvae, train_prior

__all__ = ["run_demo"]

SHAPES_TRAIN, SHAPES_HELDOUT = 20_000, 512
SHOWN_CAPTIONS, SHOWN_SAMPLES = 12, 4
EMOJI_SAMPLES = 4  # a held-out caption
TEMPERATURE = 0.7  # of all samples the demo shows and judges
SEED = 0
SHOWN_SEED = 10_000  # of pictures to look at: others than those that are judged
_MARK = ".dalle-fast-demo"  # tells a folder that the demo may replace


def run_demo(data: str, out: Path, *, font: Path | None = None, echo: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the whole demo and return what OUT/metrics.json holds.

    Args:
        data: "shapes" or "emoji".
        out: folder to write; one that an earlier demo wrote is replaced.
        font: colour emoji font, for "emoji".
        echo: takes each line for the reader.

    Raises:
        ValueError: ``out`` holds something else, the emoji font is missing, or ``data`` is unknown.
        RuntimeError: matplotlib is not installed.
    """
    if data not in ("shapes", "emoji"):
        raise ValueError(f"data must be shapes or emoji, got {data!r}")
    if data == "emoji" and font is None:
        raise ValueError(
            "the emoji demo needs a colour emoji font, for example from Debian's fonts-noto-color-emoji: --font PATH"
        )
    _require_matplotlib()
    if data == "emoji":
        from dalle_fast.data.emoji import emoji_names, load_font

        load_font(font), emoji_names()  # before an earlier demo is deleted
    _empty_folder(out)
    began = time.perf_counter()

    echo(f"1/4  drawing the data set into {out / 'data'}")
    if data == "shapes":
        write_shapes(out / "data", train=SHAPES_TRAIN, heldout=SHAPES_HELDOUT, seed=SEED)
    else:
        from dalle_fast.data.emoji import write_emoji

        write_emoji(out / "data", font, size=DVAE_PRESETS["emoji"].model.image_size, seed=SEED)

    training_began = time.perf_counter()
    echo("2/4  training the dVAE: pixels to tokens and back")
    train_dvae(out / "data" / "train", out / "dvae", DVAE_PRESETS[data])
    dvae_done = time.perf_counter()
    echo("3/4  training the transformer: captions to tokens")
    prior = fit_to_dvae(PRIOR_PRESETS[data], DVAE_PRESETS[data].model)
    source = out / "data" / "train"
    if data == "shapes":
        # Drawings of the models' own size, of which a crop is the whole: encoded once, and not in every update.
        source = out / "tokens"
        encode(out / "dvae", out / "data" / "train", source, EncodeConfig(augment="none"))
    train_prior(source, out / "dalle", out / "dvae", prior)
    training_done = time.perf_counter()

    echo("4/4  sampling captions that were never trained on")
    pipeline = Pipeline.from_pretrained(out / "dalle")
    captions, images = _read_folder(out / "data" / "heldout", pipeline.dvae.config.image_size)
    reconstructions, codes = _reconstruct(pipeline, images)
    metrics: dict[str, Any] = {
        "data": data,
        "heldout_captions": len(captions),
        "temperature": TEMPERATURE,
        "dvae_mse": float((reconstructions - images).square().mean()),
        "dvae_codes_in_use": codes,
    }
    if data == "shapes":
        metrics |= _judge_shapes(pipeline, captions, images, reconstructions)
    else:
        metrics |= _judge_emoji(pipeline, captions, images, reconstructions, out / "data" / "train")
    metrics |= {
        "dvae_seconds": dvae_done - training_began,
        "transformer_seconds": training_done - dvae_done,
        "train_seconds": training_done - training_began,
    }
    _draw_reconstructions(out / "reconstructions.png", images, reconstructions)
    _draw_samples(out / "samples.png", pipeline, captions)
    _draw_curves(out / "curves.png", read_log(out / "dvae" / "log.jsonl"), read_log(out / "dalle" / "log.jsonl"))
    metrics["total_seconds"] = time.perf_counter() - began
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    for line in _table(metrics):
        echo(line)
    echo(f"pictures: {out}/reconstructions.png  {out}/samples.png  {out}/curves.png")
    # As it was called, so that the line can be copied whether or not the environment is active.
    program = sys.argv[0] if Path(sys.argv[0]).name == "dalle-fast" else "dalle-fast"
    own = f'{program} sample {out}/dalle "{captions[0]}" --temperature {TEMPERATURE} -o {out}/mine.png'
    echo(f"your own: {own}")
    return metrics


def _require_matplotlib() -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError("the demo draws with matplotlib, which is not installed: pip install matplotlib") from error
    matplotlib.use("Agg")


def _empty_folder(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / _MARK).exists():
            raise ValueError(f"out must be new, empty or an earlier demo's folder, got {out}")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()


def _read_folder(folder: Path, size: int) -> tuple[list[str], Tensor]:
    """Captions and images (N, 3, size, size) of a data set, in the order on disk."""
    samples = [sample for _, sample in open_source(folder).read(None, 0)]
    images = [to_tensor(center_crop(decode_image(sample.image), size)) for sample in samples]
    return [sample.caption for sample in samples], torch.stack(images)


def _reconstruct(pipeline: Pipeline, images: Tensor) -> tuple[Tensor, int]:
    """Images through the dVAE and back, and how many codes they use."""
    tokens = torch.cat([pipeline.dvae.encode(part) for part in images.split(64)])
    pixels = torch.cat([pipeline.dvae.decode(part) for part in tokens.split(64)])
    return pixels, tokens.unique().numel()


def _judge_shapes(pipeline: Pipeline, captions: list[str], images: Tensor, reconstructions: Tensor) -> dict[str, Any]:
    asked = [Drawing.from_caption(caption) for caption in captions]
    samples = pipeline.generate(captions, temperature=TEMPERATURE, seed=SEED, batch_size=128).images
    seen = [_read(image) for image in samples]
    marks = [score(*pair) for pair in zip(asked, seen, strict=True)]
    return {
        "heldout_exact": _share(marks, "exact"),
        "heldout_attributes": {name: _share(marks, name) for name in ATTRIBUTES},
        "exact_by_chance": _share([score(*pair) for pair in zip(asked, seen[1:] + seen[:1], strict=True)], "exact"),
        "exact_of_drawings": _share([score(a, _read(i)) for a, i in zip(asked, images, strict=True)], "exact"),
        "exact_of_reconstructions": _share(
            [score(a, _read(i)) for a, i in zip(asked, reconstructions, strict=True)], "exact"
        ),
    }


def _read(image: Tensor) -> Drawing:
    return read_drawing(np.asarray(to_image(image)))


def _share(marks: list[dict[str, bool]], name: str) -> float:
    return sum(mark[name] for mark in marks) / len(marks)


def _judge_emoji(
    pipeline: Pipeline, captions: list[str], images: Tensor, reconstructions: Tensor, train: Path
) -> dict[str, Any]:
    _, others = _read_folder(train, pipeline.dvae.config.image_size)
    gallery = torch.cat([images, others]).flatten(1)
    own = torch.arange(len(captions))
    samples = pipeline.generate(captions, num_images=EMOJI_SAMPLES, temperature=TEMPERATURE, seed=SEED).images
    rank = _rank(samples.flatten(1), gallery, own.repeat_interleave(EMOJI_SAMPLES))
    ceiling = _rank(reconstructions.flatten(1), gallery, own)
    return {
        "gallery": len(gallery),
        "retrieval_top1": float((rank < 1).float().mean()),
        "retrieval_top5": float((rank < 5).float().mean()),
        "retrieval_median_rank": int(rank.median()) + 1,
        "retrieval_by_chance": 1 / len(gallery),
        "retrieval_top1_of_reconstructions": float((ceiling < 1).float().mean()),
    }


def _rank(pictures: Tensor, gallery: Tensor, own: Tensor) -> Tensor:
    """How many of the gallery (G, values) lie nearer to each picture (N, values) than its own entry; NaN is far."""
    distances = torch.cdist(pictures, gallery)
    return (~(distances >= distances.gather(1, own[:, None]))).sum(1)


def _table(metrics: dict[str, Any]) -> list[str]:
    rows = []
    for name, value in metrics.items():
        if isinstance(value, dict):
            rows += [(f"  {inner}", number) for inner, number in value.items()]
        else:
            rows.append((name, value))
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {f'{value:.4g}' if isinstance(value, float) else value}" for name, value in rows]


def _draw_reconstructions(path: Path, images: Tensor, reconstructions: Tensor) -> None:
    import matplotlib.pyplot as plt

    columns = min(SHOWN_CAPTIONS, len(images))
    figure, axes = plt.subplots(2, columns, figsize=(columns, 2.4), squeeze=False)
    for row, (title, pictures) in enumerate((("held out", images), ("through the dVAE", reconstructions))):
        for axis, picture in zip(axes[row], pictures, strict=False):
            _show(axis, picture)
        axes[row, 0].set_title(title, fontsize=8, loc="left")
    _save(figure, path)


def _draw_samples(path: Path, pipeline: Pipeline, captions: list[str]) -> None:
    import matplotlib.pyplot as plt

    shown = captions[:SHOWN_CAPTIONS]
    images = pipeline.generate(shown, num_images=SHOWN_SAMPLES, temperature=TEMPERATURE, seed=SHOWN_SEED).images
    columns = 3  # captions side by side
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 1.55 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, caption, samples in zip(axes.flat, shown, images.split(SHOWN_SAMPLES), strict=False):
        _show(axis, image_grid(samples, columns=SHOWN_SAMPLES, padding=1))
        axis.set_title(textwrap.fill(caption, 60), fontsize=7, loc="left")
    _save(figure, path)


def _draw_curves(path: Path, dvae: list[dict[str, Any]], dalle: list[dict[str, Any]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 3))
    for axis, log, names, title in (
        (axes[0], dvae, ("mse", "hard_mse", "token_mse"), "dVAE: squared error of relaxed and of hard codes"),
        (axes[1], dvae, ("kl", "tau", "kl_weight"), "dVAE: KL from uniform (nats), temperature, weight"),
        (axes[2], dvae, ("codes_in_use", "perplexity"), "dVAE: codes in use in 100 updates, perplexity"),
        (axes[3], dalle, ("image_loss", "text_loss"), "transformer: cross-entropy (nats a token)"),
    ):
        for name in names:
            axis.plot([line["step"] for line in log], [line[name] for line in log], label=name)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("updates", fontsize=8)
        axis.set_yscale("log")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    _save(figure, path)


def _show(axis: Any, image: Tensor) -> None:
    axis.imshow(np.asarray(to_image(image)), interpolation="nearest")
    axis.axis("off")


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
