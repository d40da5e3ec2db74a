"""The autoregressive transformer over text and image tokens.

    states   start, text_0 .. text_{L-1}, start-of-image, image_0 .. image_{n-2}
    predict  text_0 .. text_{L-1}, (nothing), image_0, ............. image_{n-1}

State i is what the network reads at position i, and predicts what the next state will read. The first text_len states
are text, the next height * width are image, so image state p sits at grid position p and predicts image token p; the
last text state has no target. Where a caption has ended a learned vector of that position stands in, which is attended
like any other. Each attention layer sees what its pattern of ``schedule(layout, ...)`` lets it see.

    loss = text_loss_weight * mean CE over text + (1 - text_loss_weight) * mean CE over image

with text positions scored against the text vocabulary alone and image positions against the image vocabulary alone.
LayerNorms, the residual stream and the logits are fp32, also under autocast and where the blocks' matrices are 16-bit.

Source: arXiv 2102.12092 sections 2.2 and B.1, figures 10 and 11. What the paper leaves open is a field of
:class:`DalleConfig` whose default follows Sparse Transformers (arXiv 1904.10509).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_fast.models.half import Resblock, cast_weights, in_weight_dtype, set_grad_scales
from dalle_fast.ops.attention import attention_qkvpacked
from dalle_fast.ops.checks import without_autocast
from dalle_fast.ops.cross_entropy import linear_cross_entropy
from dalle_fast.ops.decode_linear import ACTIVATIONS
from dalle_fast.patterns import Pattern, schedule

__all__ = ["PAD_ID", "Dalle", "DalleConfig", "DalleLogits", "DalleLoss"]

_LAYOUTS = ("dalle", "dalle-pytorch", "ru-dalle")
PAD_ID = 0  # text token that means "no token here"


@dataclass(frozen=True)
class DalleConfig:
    """Sizes and open choices of the transformer; the defaults are the paper's where it names one."""

    text_vocab_size: int = field(default=16384, metadata={"help": "text tokens, the padding token 0 included"})
    image_vocab_size: int = field(default=8192, metadata={"help": "image tokens: the dVAE's codes"})
    text_len: int = field(default=256, metadata={"help": "text tokens of a sequence"})
    grid: tuple[int, int] = field(default=(32, 32), metadata={"help": "rows and columns of image tokens"})
    depth: int = field(default=64, metadata={"help": "attention layers, each followed by an MLP"})
    width: int = field(default=3968, metadata={"help": "size of a state"})
    heads: int = field(default=62, metadata={"help": "attention heads; divides width"})
    mlp_ratio: int = field(default=4, metadata={"help": "hidden size of the MLP over width"})
    layout: Literal["dalle", "dalle-pytorch", "ru-dalle"] = field(
        default="dalle", metadata={"help": "which attention pattern each layer has"}
    )
    activation: Literal["fast_gelu", "gelu", "gelu_tanh"] = field(
        default="fast_gelu", metadata={"help": "of the MLP; fast_gelu is x * sigmoid(1.702 x)"}
    )
    start_of_text: Literal["inside", "before"] = field(
        default="inside",
        metadata={"help": "whether the start vector takes the first text position or comes before them all"},
    )
    predict_pads: bool = field(default=False, metadata={"help": "count padding among the text targets"})
    dropout: float = field(default=0.0, metadata={"help": "at the end of each residual branch"})
    linear_bias: bool = field(default=True, metadata={"help": "give the layers' matrices biases"})
    layer_norm_eps: float = field(default=1e-5, metadata={"help": "added to the variance in every LayerNorm"})
    final_layer_norm: bool = field(default=True, metadata={"help": "LayerNorm before the logits"})
    tie_embeddings: bool = field(default=False, metadata={"help": "share token embeddings with the logit matrices"})
    init_scale: float = field(default=0.125, metadata={"help": "matrices start at N(0, init_scale / sqrt(fan_in))"})
    text_loss_weight: float = field(default=1 / 8, metadata={"help": "share of the text in the loss"})

    def __post_init__(self) -> None:
        for name in ("image_vocab_size", "text_len", "depth", "width", "heads", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.text_vocab_size < 2:
            raise ValueError(f"text_vocab_size must be >= 2, got {self.text_vocab_size}")
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"grid must be two sides >= 1, got {self.grid}")
        if self.width % self.heads:
            raise ValueError(f"heads must divide width {self.width}, got {self.heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0 <= self.text_loss_weight <= 1:
            raise ValueError(f"text_loss_weight must be in [0, 1], got {self.text_loss_weight}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.start_of_text not in ("inside", "before"):
            raise ValueError(f"start_of_text must be inside or before, got {self.start_of_text!r}")
        if self.caption_len < 1:
            raise ValueError(f"text_len must be >= 2 where the start vector is inside, got {self.text_len}")
        if self.layout not in _LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(_LAYOUTS)}, got {self.layout!r}")

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.width // self.heads

    @property
    def text_states(self) -> int:
        """Text positions of the sequence, the start vector's included."""
        return self.text_len + (self.start_of_text == "before")

    @property
    def caption_len(self) -> int:
        """Text tokens a caption may have."""
        return self.text_states - 1

    @property
    def image_len(self) -> int:
        """Image tokens of an image."""
        return self.grid[0] * self.grid[1]

    def patterns(self) -> list[Pattern]:
        """The attention pattern of each layer."""
        return schedule(self.layout, self.depth, self.text_states, self.grid)


class DalleLogits(NamedTuple):
    """fp32 scores of the next token, kind by kind."""

    text: Tensor  # (B, caption_len, text_vocab_size): position i scores caption token i
    image: Tensor  # (B, n, image_vocab_size): position p scores image token p


class DalleLoss(NamedTuple):
    """Cross-entropies in nats a token, fp32 scalars."""

    total: Tensor  # the weighted sum of the two
    text: Tensor
    image: Tensor


class LayerNorm(nn.LayerNorm):
    """LayerNorm in fp32, whatever the input's dtype and autocast say."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps)


class Linear(nn.Linear):
    """A linear map in its weight's dtype, fp32 or 16-bit, or in autocast's."""

    def forward(self, x: Tensor) -> Tensor:
        return in_weight_dtype(F.linear, x, self.weight, self.bias)


class AttentionBlock(Resblock):
    """x + projection(attention(LayerNorm(x))), within one pattern."""

    def __init__(self, config: DalleConfig, pattern: Pattern) -> None:
        super().__init__()
        self.pattern = pattern
        self.heads, self.head_dim = config.heads, config.head_dim
        self.norm = LayerNorm(config.width, eps=config.layer_norm_eps)
        self.qkv = Linear(config.width, 3 * config.width, bias=config.linear_bias)
        self.projection = Linear(config.width, config.width, bias=config.linear_bias)
        self.dropout = nn.Dropout(config.dropout)

    def project_qkv(self, x: Tensor) -> Tensor:
        """Queries, keys and values (B, S, 3, H, D) of states (B, S, width)."""
        return self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, self.head_dim))

    def project(self, attended: Tensor) -> Tensor:
        """What (B, S, H, D) that attention gave adds to the states."""
        return self.dropout(self.projection(attended.flatten(-2)))

    def branch(self, x: Tensor) -> Tensor:
        """What is added to x."""
        return self.project(attention_qkvpacked(self.project_qkv(x), self.pattern))


class MLPBlock(Resblock):
    """x + W2 act(W1 LayerNorm(x))."""

    def __init__(self, config: DalleConfig) -> None:
        super().__init__()
        hidden = config.mlp_ratio * config.width
        self.norm = LayerNorm(config.width, eps=config.layer_norm_eps)
        self.expand = Linear(config.width, hidden, bias=config.linear_bias)
        self.contract = Linear(hidden, config.width, bias=config.linear_bias)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def branch(self, x: Tensor) -> Tensor:
        """What is added to x."""
        return self.dropout(self.contract(self.activation(self.expand(self.norm(x)))))


class Dalle(nn.Module):
    """The transformer. Text tokens are (B, caption_len) int64 padded with PAD_ID, image tokens (B, n) int64."""

    def __init__(self, config: DalleConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.text_embedding = nn.Embedding(config.text_vocab_size, width)
        self.text_position = nn.Embedding(config.text_states, width)
        self.pad_embedding = nn.Embedding(config.text_states, width)
        self.image_embedding = nn.Embedding(config.image_vocab_size, width)
        self.row_embedding = nn.Embedding(config.grid[0], width)
        self.column_embedding = nn.Embedding(config.grid[1], width)
        self.start_of_text = nn.Parameter(torch.empty(width))
        self.start_of_image = nn.Parameter(torch.empty(width))
        self.layers = nn.ModuleList()
        for pattern in config.patterns():
            self.layers.append(nn.ModuleDict({"attention": AttentionBlock(config, pattern), "mlp": MLPBlock(config)}))
        self.norm = LayerNorm(width, eps=config.layer_norm_eps) if config.final_layer_norm else nn.Identity()
        self.text_head = nn.Linear(width, config.text_vocab_size, bias=False)
        self.image_head = nn.Linear(width, config.image_vocab_size, bias=False)
        if config.tie_embeddings:
            self.text_head.weight = self.text_embedding.weight
            self.image_head.weight = self.image_embedding.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values after Sparse Transformers, section 6: small matrices, smaller ones at the branches' ends."""
        config = self.config
        kinds_added = {  # how many embeddings make up a state of this kind
            self.text_embedding: 1,
            self.pad_embedding: 1,
            self.image_embedding: 1,
            self.text_position: 1,
            self.row_embedding: 2,
            self.column_embedding: 2,
        }
        for embedding, added in kinds_added.items():
            nn.init.normal_(embedding.weight, std=config.init_scale / math.sqrt(config.width * added))
        for vector in (self.start_of_text, self.start_of_image):
            nn.init.normal_(vector, std=config.init_scale / math.sqrt(config.width))
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.init_scale / math.sqrt(module.in_features))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        with torch.no_grad():
            for layer in self.layers:
                layer["attention"].projection.weight /= math.sqrt(2 * config.depth)
                layer["mlp"].contract.weight /= math.sqrt(2 * config.depth)
        if not config.tie_embeddings:
            nn.init.zeros_(self.text_head.weight)
            nn.init.zeros_(self.image_head.weight)

    def resblocks(self) -> list[Resblock]:
        """The residual blocks in order, two a layer; all else of the model has no gradient scale."""
        return [block for layer in self.layers for block in (layer["attention"], layer["mlp"])]

    def branches(self) -> list[nn.Module]:
        """What a gradient scale each is for, in order: the blocks, LayerNorms included."""
        return list(self.resblocks())

    def set_grad_scales(self, scales: Sequence[Tensor] | None) -> None:
        """Run each block as :func:`dalle_fast.scaled_resblock` with a scale of its own, or, with None, without.

        Args:
            scales: one a block, of no dimensions, as :attr:`dalle_fast.ResblockGradScaler.block_scales`.

        Raises:
            ValueError: another number of scales than of blocks.
        """
        set_grad_scales(self.resblocks(), scales)

    def cast_blocks(self, dtype: torch.dtype) -> Dalle:
        """Hold the blocks' matrices in ``dtype``; gains, biases, embeddings and unembeddings stay fp32.

        Do it before an optimiser is made. Source: arXiv 2102.12092, appendix D, guideline 2.
        """
        cast_weights((module for module in self.layers.modules() if isinstance(module, Linear)), "weight", dtype)
        return self

    def embed_text(self, text: Tensor) -> Tensor:
        """The text states (B, text_states, width) of captions (B, caption_len)."""
        config = self.config
        if text.ndim != 2 or text.shape[1] != config.caption_len or text.is_floating_point():
            raise ValueError(
                f"text must be integers of shape (B, {config.caption_len}), got {text.dtype} {tuple(text.shape)}"
            )
        positions = self.text_position.weight
        tokens = self.text_embedding(text) + positions[1:]
        states = torch.where((text == PAD_ID)[..., None], self.pad_embedding.weight[1:], tokens)
        start = (self.start_of_text + positions[0]).expand(text.shape[0], 1, -1)
        return torch.cat([start, states], dim=1)

    def embed_image(self, image_tokens: Tensor) -> Tensor:
        """The image states (B, m, width) that read the start vector and then tokens (B, n); m = min(n + 1, all)."""
        config = self.config
        if image_tokens.ndim != 2 or image_tokens.shape[1] > config.image_len or image_tokens.is_floating_point():
            raise ValueError(
                f"image_tokens must be integers of shape (B, at most {config.image_len}), "
                f"got {image_tokens.dtype} {tuple(image_tokens.shape)}"
            )
        start = self.start_of_image.expand(image_tokens.shape[0], 1, -1)
        read = torch.cat([start, self.image_embedding(image_tokens[:, : config.image_len - 1])], dim=1)
        return read + self.image_positions()[: read.shape[1]]

    def image_positions(self) -> Tensor:
        """What a state's place in the grid adds to it: (image_len, width), in raster order."""
        return (self.row_embedding.weight[:, None] + self.column_embedding.weight[None, :]).flatten(0, 1)

    def _hidden(self, text: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the two heads read: (B, caption_len, width) for text and (B, m, width) for image."""
        x = torch.cat([self.embed_text(text), self.embed_image(image_tokens)], dim=1)
        for layer in self.layers:
            x = layer["mlp"](layer["attention"](x))
        # Split, not sliced twice: the gradients are then put together in one copy.
        text_hidden, _, image_hidden = self.norm(x).split(
            [self.config.caption_len, 1, x.shape[1] - self.config.text_states], dim=1
        )
        return text_hidden, image_hidden

    def image_logits(self, hidden: Tensor) -> Tensor:
        """fp32 scores (..., image_vocab_size) of normalised image states (..., width)."""
        with without_autocast(hidden.device):
            return F.linear(hidden.float(), self.image_head.weight.float())

    def forward(self, text: Tensor, image_tokens: Tensor) -> DalleLogits:
        """Scores of every next token.

        Args:
            text: (B, caption_len) int64, padded with PAD_ID.
            image_tokens: (B, n) int64, the first n tokens in raster order, 0 <= n <= image_len.

        Returns:
            Scores of all text tokens, and of image tokens 0 .. n (0 .. n - 1 where n is the whole image).

        Raises:
            ValueError: a shape or dtype other than these.
        """
        text_hidden, image_hidden = self._hidden(text, image_tokens)
        with without_autocast(text_hidden.device):
            text_logits = F.linear(text_hidden.float(), self.text_head.weight.float())
        return DalleLogits(text_logits, self.image_logits(image_hidden))

    def loss(self, text: Tensor, image_tokens: Tensor) -> DalleLoss:
        """Weighted cross-entropy of captions (B, caption_len) and their whole images (B, image_len)."""
        if image_tokens.ndim != 2 or image_tokens.shape[1] != self.config.image_len:
            raise ValueError(
                f"image_tokens must have shape (B, {self.config.image_len}), got {tuple(image_tokens.shape)}"
            )
        text_hidden, image_hidden = self._hidden(text, image_tokens)
        ignore = -100 if self.config.predict_pads else PAD_ID
        text_loss = token_cross_entropy(text_hidden, self.text_head.weight, text, ignore_index=ignore)
        image_loss = token_cross_entropy(image_hidden, self.image_head.weight, image_tokens)
        weight = self.config.text_loss_weight
        return DalleLoss(weight * text_loss + (1 - weight) * image_loss, text_loss.detach(), image_loss.detach())


def token_cross_entropy(
    hidden: Tensor, weight: Tensor, tokens: Tensor, reduction: str = "mean", ignore_index: int = -100
) -> Tensor:
    """Cross-entropy of ``tokens`` under normalised states (..., width) and an unembedding, in float32 or wider."""
    if hidden.dtype != weight.dtype:
        hidden, weight = hidden.float(), weight.float()
    return linear_cross_entropy(hidden, weight, tokens, ignore_index=ignore_index, reduction=reduction)
