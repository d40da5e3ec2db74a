"""The discrete VAE: an image becomes a grid of codes, and a grid of codes an image.

    z = argmax encoder(x)                             tokens, as the transformer sees them
    z ~ gumbel_softmax(encoder(x), tau)               relaxed, while the dVAE itself is trained
    loss = mean_pixels(-ln f(x | decoder(z))) + kl_weight * positions / values * mean_positions(KL)

f is the logit-Laplace density over pixels mapped into [0.1, 0.9], and KL runs from the categorical of the raw logits
(whatever tau is) to the uniform one, in nats. At 256 x 256 pixels and 32 x 32 positions the factor is kl_weight / 192.
Another likelihood, and other initial values than the published ones, are fields of :class:`DVAEConfig`.

Parameters carry the names and shapes of the published encoder and decoder, whose state dicts load as they are. The
encoder's last and the decoder's first convolution always run in fp32. The decoder's first convolution is the codebook:
on a one-hot input it is a table look-up, on relaxed codes a matrix product, and neither needs the one-hot tensor.

Source: arXiv 2102.12092 sections 2.1 and A.2, A.3; layer sizes from the published dVAE.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_fast.models.half import Resblock, cast_weights, in_weight_dtype, set_grad_scales
from dalle_fast.models.openai import load_part, read_parts, sizes_of
from dalle_fast.ops.checks import check_floating, shape_of, without_autocast
from dalle_fast.ops.gumbel import gumbel_quantize
from dalle_fast.ops.likelihood import logit_laplace_nll

__all__ = [
    "DVAE",
    "DVAEConfig",
    "DVAELoss",
    "Decoder",
    "Encoder",
    "logit_laplace_nll",
    "map_pixels",
    "unmap_pixels",
]

PIXEL_MARGIN = 0.1  # epsilon of the pixel map: pixels live in [0.1, 0.9], away from the logit's poles


@dataclass(frozen=True)
class DVAEConfig:
    """Sizes of a dVAE; the defaults are the paper's.

    The encoder halves each side ``groups - 1`` times and doubles its width as often.
    """

    image_size: int = field(default=256, metadata={"help": "side of the square training images, in pixels"})
    vocab_size: int = field(default=8192, metadata={"help": "number of codes"})
    hidden: int = field(default=256, metadata={"help": "channels of the first encoder group and last decoder group"})
    codebook_dim: int = field(default=128, metadata={"help": "channels a code is embedded in"})
    groups: int = field(default=4, metadata={"help": "groups of residual blocks; each but one halves the resolution"})
    blocks_per_group: int = field(default=2, metadata={"help": "residual blocks in a group"})
    channels: int = field(default=3, metadata={"help": "channels of an image"})
    likelihood: Literal["logit_laplace", "normal"] = field(
        default="logit_laplace",
        metadata={"help": "of a pixel; normal is squared error, which learns edges in far fewer updates"},
    )
    log_scale: float | None = field(
        default=None, metadata={"help": "ln of every pixel's scale; none lets the decoder predict it (the paper)"}
    )
    residual_gain: float | None = field(
        default=None, metadata={"help": "factor on each residual branch; none is 1 / blocks ** 2 (the paper)"}
    )
    codebook_std: float | None = field(
        default=None, metadata={"help": "of the initial codebook; none is 1 / sqrt(vocab_size), as published"}
    )
    logit_gain: float = field(default=1.0, metadata={"help": "factor on the encoder's initial logits"})

    def __post_init__(self) -> None:
        for name in ("image_size", "hidden", "codebook_dim", "groups", "blocks_per_group", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size must be >= 2, got {self.vocab_size}")
        if self.image_size % self.downsampling:
            raise ValueError(
                f"image_size must be a multiple of {self.downsampling} (2 ** (groups - 1)), got {self.image_size}"
            )
        if self.hidden % 4:
            raise ValueError(f"hidden must be a multiple of 4, got {self.hidden}")
        if self.likelihood not in _LIKELIHOODS:
            raise ValueError(f"likelihood must be one of {', '.join(_LIKELIHOODS)}, got {self.likelihood!r}")
        for name in ("residual_gain", "codebook_std", "logit_gain"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}")

    @property
    def branch_gain(self) -> float:
        """Factor on each residual branch: residual_gain, or the paper's 1 / blocks ** 2."""
        return self.residual_gain or 1 / (self.groups * self.blocks_per_group) ** 2

    @property
    def downsampling(self) -> int:
        """Pixels to a token, along each side."""
        return 2 ** (self.groups - 1)

    @property
    def grid(self) -> int:
        """Tokens along each side of an image of image_size."""
        return self.image_size // self.downsampling


class DVAELoss(NamedTuple):
    """What one training step of the dVAE is made of; fp32 scalars, and the codes drawn."""

    total: Tensor  # reconstruction + kl_weight * positions / values * kl
    reconstruction: Tensor  # mean over pixel values of -ln f, nats
    kl: Tensor  # mean over positions, nats; at most ln(vocab_size)
    indices: Tensor  # (B, h, w) int64: the code most likely after the noise
    images: Tensor  # (B, 3, H, W) in [0, 1]: the reconstruction from the relaxed codes, detached


def map_pixels(images: Tensor) -> Tensor:
    """Map [0, 1] affinely to [0.1, 0.9]."""
    return (1 - 2 * PIXEL_MARGIN) * images + PIXEL_MARGIN


def unmap_pixels(mapped: Tensor) -> Tensor:
    """Map [0.1, 0.9] back to [0, 1]; what lies outside is clamped."""
    return ((mapped - PIXEL_MARGIN) / (1 - 2 * PIXEL_MARGIN)).clamp(0, 1)


def normal_nll(target: Tensor, mu: Tensor, log_scale: Tensor | float) -> Tensor:
    """-ln of a normal density with mean sigmoid(mu), in nats, elementwise.

    -ln f(x | mu, b) = (x - sigmoid mu)^2 / (2 b^2) + ln b + ln(2 pi) / 2

    Args: as :func:`dalle_fast.ops.likelihood.logit_laplace_nll`.
    """
    log_scale = torch.as_tensor(log_scale, dtype=mu.dtype, device=mu.device)
    error = target - torch.sigmoid(mu)
    return 0.5 * error.square() * torch.exp(-2 * log_scale) + log_scale + 0.5 * math.log(2 * math.pi)


_LIKELIHOODS = {"logit_laplace": logit_laplace_nll, "normal": normal_nll}


class Conv2d(nn.Module):
    """A "same" convolution of stride 1 with the published parameter names ``w`` and ``b``."""

    def __init__(self, n_in: int, n_out: int, kernel_size: int, *, always_fp32: bool = False) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.always_fp32 = always_fp32
        self.w = nn.Parameter(torch.randn(n_out, n_in, kernel_size, kernel_size) / math.sqrt(n_in * kernel_size**2))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        if self.always_fp32:
            with without_autocast(x.device):
                return F.conv2d(x.float(), self.w.float(), self.b.float(), padding=self.kernel_size // 2)
        return in_weight_dtype(F.conv2d, x, self.w, self.b, padding=self.kernel_size // 2)

    def extra_repr(self) -> str:
        n_out, n_in = self.w.shape[:2]
        return f"{n_in}, {n_out}, kernel_size={self.kernel_size}"


class ResidualBlock(Resblock):
    """id_path(x) + gain * res_path(x), with a bottleneck of a quarter of the output channels.

    Args:
        kernel_sizes: of the four convolutions; (3, 3, 3, 1) in the encoder, (1, 3, 3, 3) in the decoder.
        gain: the paper's small constant on the branch; not a parameter.
    """

    def __init__(self, n_in: int, n_out: int, kernel_sizes: tuple[int, int, int, int], gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = (n_in, n_out // 4, n_out // 4, n_out // 4, n_out)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, kernel_size in enumerate(kernel_sizes, start=1):
            layers[f"relu_{number}"] = nn.ReLU()
            layers[f"conv_{number}"] = Conv2d(widths[number - 1], widths[number], kernel_size)
        self.res_path = nn.Sequential(layers)

    def branch(self, x: Tensor) -> Tensor:
        """What is added."""
        return self.gain * self.res_path(x)

    def identity(self) -> nn.Module | None:
        """The 1 x 1 convolution, where the number of channels changes."""
        return None if isinstance(self.id_path, nn.Identity) else self.id_path


def _group(
    n_in: int,
    n_out: int,
    config: DVAEConfig,
    kernel_sizes: tuple[int, int, int, int],
    resample: nn.Module | None,
) -> nn.Sequential:
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    for number in range(1, config.blocks_per_group + 1):
        blocks[f"block_{number}"] = ResidualBlock(
            n_in if number == 1 else n_out, n_out, kernel_sizes, config.branch_gain
        )
    if resample is not None:
        blocks["pool" if isinstance(resample, nn.MaxPool2d) else "upsample"] = resample
    return nn.Sequential(blocks)


class Encoder(nn.Module):
    """Mapped images (B, 3, H, W) to logits (B, vocab_size, H / downsampling, W / downsampling), fp32."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.channels = config.channels
        widths = [config.hidden * 2**number for number in range(config.groups)]
        blocks: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(config.channels, config.hidden, 7))
        for number, width in enumerate(widths, start=1):
            pool = nn.MaxPool2d(2) if number < config.groups else None
            n_in = widths[max(number - 2, 0)]
            blocks[f"group_{number}"] = _group(n_in, width, config, (3, 3, 3, 1), pool)
        head = Conv2d(widths[-1], config.vocab_size, 1, always_fp32=True)
        blocks["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=head))
        self.blocks = nn.Sequential(blocks)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"images must have shape (B, {self.channels}, height, width), got {tuple(x.shape)}")
        return self.blocks(x)


class Decoder(nn.Module):
    """Codes (B, vocab_size, h, w), one-hot or relaxed, to pixel statistics (B, 6, H, W): mu, then ln b."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        widths = [config.hidden * 2**number for number in reversed(range(config.groups))]
        codebook = Conv2d(config.vocab_size, config.codebook_dim, 1, always_fp32=True)
        blocks: OrderedDict[str, nn.Module] = OrderedDict(input=codebook)
        for number, width in enumerate(widths, start=1):
            upsample = nn.Upsample(scale_factor=2, mode="nearest") if number < config.groups else None
            n_in = config.codebook_dim if number == 1 else widths[number - 2]
            blocks[f"group_{number}"] = _group(n_in, width, config, (1, 3, 3, 3), upsample)
        head = Conv2d(config.hidden, 2 * config.channels, 1)
        blocks["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=head))
        self.blocks = nn.Sequential(blocks)

    @property
    def codebook(self) -> Tensor:
        """(vocab_size, codebook_dim): the first convolution's weight, one row a code."""
        return self.blocks.input.w[:, :, 0, 0].t()

    def forward(self, z: Tensor) -> Tensor:
        if z.ndim != 4 or z.shape[1] != self.vocab_size:
            raise ValueError(f"codes must have shape (B, {self.vocab_size}, h, w), got {tuple(z.shape)}")
        return self.blocks(z).float()

    def from_quantized(self, quantized: Tensor) -> Tensor:
        """The same from codebook vectors (B, codebook_dim, h, w), without the first convolution's bias."""
        x = quantized + self.blocks.input.b[:, None, None]
        for block in self.blocks[1:]:
            x = block(x)
        return x.float()


class DVAE(nn.Module):
    """Encoder, decoder and the loss that trains both. Images are floats in [0, 1], tokens int64."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        with torch.no_grad():
            self.encoder.blocks.output.conv.w.mul_(config.logit_gain)
            if config.codebook_std is not None:
                self.decoder.blocks.input.w.normal_(std=config.codebook_std)

    @classmethod
    def from_openai(cls, encoder_path: str | Path, decoder_path: str | Path, *, image_size: int = 256) -> DVAE:
        """The published dVAE, or one with other sizes and the same names, in evaluation mode.

        Args:
            encoder_path, decoder_path: the published ``encoder.pkl`` and ``decoder.pkl``, or state dicts of the two
                parts by torch.save or safetensors. Tensors are read, and nothing in the files is run.
            image_size: side of the images, in pixels, which no tensor tells.

        Raises:
            ValueError: a file is missing, damaged, swapped with the other, or holds anything but the tensors of one
                encoder and the decoder that belongs to it; the message names the file and the tensor.

        Source: https://cdn.openai.com/dall-e/encoder.pkl and decoder.pkl.
        """
        encoder, decoder = read_parts(encoder_path, decoder_path)
        config = DVAEConfig(image_size=image_size, **sizes_of(encoder, decoder, encoder_path))
        with torch.device("meta"):
            dvae = cls(config)
        load_part(dvae.encoder, encoder, encoder_path)
        load_part(dvae.decoder, decoder, decoder_path)
        return dvae.eval()

    def resblocks(self) -> list[ResidualBlock]:
        """The residual blocks in order, the encoder's before the decoder's."""
        return [module for module in self.modules() if isinstance(module, ResidualBlock)]

    def branches(self) -> list[nn.Module]:
        """What a gradient scale each is for, in order: the residual paths, without the 1 x 1 identity paths."""
        return [block.res_path for block in self.resblocks()]

    def set_grad_scales(self, scales: Sequence[Tensor] | None) -> None:
        """As :meth:`dalle_fast.Dalle.set_grad_scales`."""
        set_grad_scales(self.resblocks(), scales)

    def cast_blocks(self, dtype: torch.dtype) -> DVAE:
        """Hold the residual paths' convolutions in ``dtype``, biases and all other weights in fp32.

        Do it before an optimiser is made.
        """
        convolutions = (module for path in self.branches() for module in path.modules() if isinstance(module, Conv2d))
        cast_weights(convolutions, "w", dtype)
        return self

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, vocab_size, H / downsampling, W / downsampling), fp32.

        Raises:
            TypeError: images are not floating point.
            ValueError: wrong rank, channel count or a side that is no multiple of the downsampling; values outside
                [0, 1] or NaN (looked for on a CPU; on an accelerator that would synchronise, and under torch.compile
                it would break the graph).
        """
        self._check_images(images)
        return self.encoder(map_pixels(images))

    def _check_images(self, images: Tensor) -> None:
        check_floating(images=images)
        channels, step = self.config.channels, self.config.downsampling
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images must have shape (B, {channels}, height, width), got {shape_of(images)}")
        sides = shape_of(images)[2:]
        if any(side % step or side == 0 for side in sides):
            raise ValueError(f"image sides must be multiples of {step}, got {sides}")
        if _has_values(images):
            low, high = (bound.item() for bound in images.detach().aminmax())
            if not 0 <= low <= high <= 1:
                raise ValueError(f"images must lie in [0, 1], got {low} to {high}")

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokens (B, h, w) of images (B, 3, H, W): the arg-max of the logits, no noise.

        At the published sizes the logits are 32 MiB an image, half of one activation of the first group, so that they
        are made whole: the largest memory is needed before them.

        Raises:
            As :meth:`logits`.
        """
        return self.logits(images).argmax(dim=1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of tokens (B, h, w): the median of each pixel's distribution.

        Raises:
            ValueError: not integers of three dimensions; tokens out of range (looked for on a CPU; elsewhere and under
                torch.compile PyTorch's own assertion stands).
        """
        if tokens.ndim != 3 or tokens.is_floating_point():
            raise ValueError(f"tokens must be integers of shape (B, h, w), got {tokens.dtype} {tuple(tokens.shape)}")
        if _has_values(tokens):
            low, high = (bound.item() for bound in tokens.aminmax())
            if not 0 <= low <= high < self.config.vocab_size:
                raise ValueError(f"tokens must lie in [0, {self.config.vocab_size}), got {low} to {high}")
        quantized = F.embedding(tokens, self.decoder.codebook).permute(0, 3, 1, 2)
        return self._pixels(self.decoder.from_quantized(quantized))

    def loss(self, images: Tensor, tau: float, kl_weight: float, *, seed: int | None = None) -> DVAELoss:
        """The training loss of a batch of images.

        Args:
            images: (B, 3, H, W) in [0, 1], B >= 1.
            tau: temperature of the relaxation, finite and > 0.
            kl_weight: the paper's beta, finite and >= 0, on the KL as summed over positions and divided by the pixel
                values.
            seed: of the Gumbel noise; None draws one from torch's generator.

        Raises:
            As :meth:`logits`; also ValueError for tau, kl_weight, seed or B out of range.
        """
        if not 0 < tau < math.inf:
            raise ValueError(f"tau must be finite and > 0, got {tau}")
        if not 0 <= kl_weight < math.inf:
            raise ValueError(f"kl_weight must be finite and >= 0, got {kl_weight}")
        logits = self.logits(images)
        if images.shape[0] == 0:
            raise ValueError(f"images must hold at least one image, got shape {shape_of(images)}")
        code = gumbel_quantize(logits, self.decoder.codebook, tau, seed=seed)
        # The decoder goes on in the encoder's layout; the quantiser's results are contiguous.
        quantized = code.quantized.contiguous(memory_format=_memory_format(logits))
        statistics = self.decoder.from_quantized(quantized)
        target = map_pixels(images)
        mu, log_scale = statistics.chunk(2, dim=1)
        if self.config.log_scale is not None:
            log_scale = self.config.log_scale
        reconstruction = _LIKELIHOODS[self.config.likelihood](target, mu, log_scale).mean()
        kl = code.kl.mean()
        positions_per_value = code.kl[0].numel() / target[0].numel()
        total = reconstruction + kl_weight * positions_per_value * kl
        return DVAELoss(total, reconstruction.detach(), kl.detach(), code.indices, self._pixels(statistics.detach()))

    def _pixels(self, statistics: Tensor) -> Tensor:
        return unmap_pixels(torch.sigmoid(statistics[:, : self.config.channels]))


def _has_values(tensor: Tensor) -> bool:
    """Whether the values can be looked at without waiting for a device, breaking a graph or ending torch.vmap."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.numel() > 0


def _memory_format(tensor: Tensor) -> torch.memory_format:
    is_channels_last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if is_channels_last else torch.contiguous_format
