"""The transformer one image token at a time: what a step of sampling runs.

    prefill   text states, and those of known first image tokens, through the training kernels; fills the caches
    step      one state a sample through all layers, with cached attention; scores of the next token

A step works on buffers that are there from the start, waits for nothing, and finds its position on the device, so that
it can be captured in a CUDA graph and replayed. On a CPU each of its products is one pass over the weights, and a
sample's scores are the same bits whatever samples are decoded beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dalle_fast.models.transformer import PAD_ID, AttentionBlock, Dalle, LayerNorm, token_cross_entropy
from dalle_fast.ops.attention import attention_qkvpacked
from dalle_fast.ops.checks import without_autocast
from dalle_fast.ops.decode_linear import bind_decode_linear, has_decode_kernel
from dalle_fast.ops.decode_plan import bind_together
from dalle_fast.ops.embed_token import bind_embed_token, embed_token
from dalle_fast.ops.huge_pages import use_huge_pages
from dalle_fast.ops.kv_cache import KVCache, attention_with_kvcache, bind_attention, choose_kernel

__all__ = ["Decoder", "decoder_bytes"]

LARGE_MATRIX = 1 << 20  # bytes, from which on it may have all of a huge page; smaller models stay in the CPU's caches


class Decoder:
    """Decodes images of some prompts side by side: caches, buffers, and the step.

    Rows of the step are samples, those of a prompt side by side; with ``guided`` all of them once more, without their
    captions. Weights are read where the model has them, in their dtype, also under autocast.

    Args:
        model: what decodes, in evaluation mode; it must not change device or dtype while the decoder is in use.
        num_prompts: captions.
        num_images: samples of each.
        guided: decode each sample without its caption too, for classifier-free guidance.
        cache_dtype: of keys and values; None is the layers' own. A 16-bit one halves the memory of a float32 model's.

    Attributes:
        position: raster index of the token that the next step scores, int64 of no dimensions on the device.
        caches: one a layer.
        captures: whether a step can be captured in a CUDA graph; attention in plain PyTorch waits for the device.
    """

    @torch.inference_mode(False)  # or buffers made in inference mode could not be written to outside it
    @torch.no_grad()
    def __init__(
        self,
        model: Dalle,
        num_prompts: int,
        num_images: int = 1,
        *,
        guided: bool = False,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        config, weight = model.config, model.layers[0]["attention"].qkv.weight
        self.model, self.guided = model, guided
        self.num_prompts, self.samples = num_prompts, num_prompts * num_images
        copies = 2 if guided else 1
        self.rows = copies * self.samples
        self.caches = [
            KVCache(
                pattern,
                self.rows,
                config.heads,
                config.head_dim,
                num_prompts=copies * num_prompts,
                dtype=weight.dtype if cache_dtype is None else cache_dtype,
                device=weight.device,
            )
            for pattern in config.patterns()
        ]
        self.position = torch.zeros((), dtype=torch.int64, device=weight.device)
        self._kernel = choose_kernel("auto", self.caches[0])
        self.captures = self._kernel == "triton"
        self._place = model.image_positions()  # (image_len, width)
        wide = self._place.dtype
        self._x = torch.empty(self.rows, config.width, dtype=wide, device=weight.device)
        self._qkv = self._attended = self._hidden = self._logits = None
        self._calls: list[partial] = []
        if has_decode_kernel(weight) and wide == torch.float32:
            self._qkv = self._x.new_empty(self.rows, 3 * config.width)
            self._attended = self._x.new_empty(self.rows, config.heads, 1, config.head_dim)
            self._hidden = self._x.new_empty(self.rows, config.mlp_ratio * config.width)
            self._logits = self._x.new_empty(self.rows, config.image_vocab_size)
            for module in (*model.layers.modules(), model.image_head):
                if isinstance(module, nn.Linear) and module.weight.nbytes >= LARGE_MATRIX:
                    use_huge_pages(module.weight)

    @torch.no_grad()
    def prefill(self, text: Tensor, image_tokens: Tensor | None = None) -> Tensor:
        """Start anew from captions, and first image tokens that all samples of a prompt share.

        Args:
            text: (num_prompts, caption_len) int64, padded with PAD_ID.
            image_tokens: (num_prompts, m) int64, m in 0..image_len; None is none. The first step then scores token m.

        Returns:
            Log-likelihoods of those image tokens given the caption, summed, in nats, (num_prompts,) float32 or wider.
        """
        model, device, known = self.model, self.position.device, 0 if image_tokens is None else image_tokens.shape[1]
        for cache in self.caches:
            cache.reset()
        self.position.fill_(known)
        self._place.copy_(model.image_positions())
        if self._logits is not None:
            self._calls = self._bind_layers()
        groups = list(range(self.num_prompts))  # which of the texts that are run each prompt of the caches has
        if self.guided and known:
            groups += range(self.num_prompts, 2 * self.num_prompts)
            text, image_tokens = torch.cat([text, torch.full_like(text, PAD_ID)]), image_tokens.repeat(2, 1)
        elif self.guided:
            groups += [self.num_prompts] * self.num_prompts
            text = torch.cat([text, torch.full_like(text[:1], PAD_ID)])
        with without_autocast(device):
            x = model.embed_text(text)
            if known:
                # State m reads token m - 1: a step's own work, where there is one.
                x = torch.cat([x, model.embed_image(image_tokens[:, : known - 1])], dim=1)
            # On a CPU one text after the other, so that none changes how another's sums are rounded.
            states = list(x.split(1 if device.type == "cpu" else len(x)))
            for layer, cache in zip(model.layers, self.caches, strict=True):
                states = _prefill_layer(layer, states, cache, groups)
            if not known:
                return x.new_zeros(self.num_prompts)
            weight, first = model.image_head.weight, model.config.text_states
            losses = [
                token_cross_entropy(model.norm(part)[:, first:], weight, tokens, reduction="none")
                for part, tokens in zip(states, image_tokens.split(len(states[0])), strict=True)
            ]
        return -torch.cat(losses)[: self.num_prompts].sum(dim=1)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Scores of image token ``position``; the caller then moves ``position``.

        Args:
            tokens: (samples, image_len) int64, contiguous; the column before ``position`` is read.

        Returns:
            (rows, image_vocab_size), float32 or wider. The next step may write into the same memory.
        """
        with without_autocast(self.position.device):
            model = self.model
            embed_token(tokens, self.position, model.image_embedding.weight, model.start_of_image, self._place, self._x)
            if self._logits is None:
                return self._run_layers(self._x)
            for call in self._calls:
                call()
            return self._logits

    def bind_step(self, tokens: Tensor, draw: Callable[[Tensor], partial]) -> Callable[[], None] | None:
        """One call that is :meth:`step`, what ``draw`` makes of the scores, and the move of ``position``.

        It holds until the next prefill. None where the step is not made of C++ ops.

        Args:
            tokens: see :meth:`step`.
            draw: gives the bound call of a C++ op that reads the scores (rows, image_vocab_size).
        """
        if self._logits is None:
            return None
        model = self.model
        embedding, start = model.image_embedding.weight, model.start_of_image
        embed = bind_embed_token(tokens, self.position, embedding, start, self._place, self._x)
        return bind_together([embed, *self._calls, draw(self._logits)], advance=self.position)

    def _run_layers(self, x: Tensor) -> Tensor:
        """Layers and logits through the model's own modules."""
        for layer, cache in zip(self.model.layers, self.caches, strict=True):
            block: AttentionBlock = layer["attention"]
            qkv = _as_cache_takes_it(block.project_qkv(x), cache)
            query, key, value = qkv.unsqueeze(3).unbind(1)  # each (rows, H, 1, D)
            if self._kernel is None:
                attended = attention_with_kvcache(query, key, value, cache)
            else:
                attended = query.new_empty(query.shape)
                bind_attention(query, key, value, cache, attended, kernel=self._kernel)()
            x = layer["mlp"](x + block.project(attended.squeeze(2)))
        return self.model.image_logits(self.model.norm(x))

    def _bind_layers(self) -> list[partial]:
        """The same as calls of C++ ops on the decoder's buffers, to be made one after the other."""
        model, x = self.model, self._x
        query, key, value = self._qkv.view(self.rows, 3, model.config.heads, 1, model.config.head_dim).unbind(1)
        attended = self._attended.view(self.rows, model.config.width)
        calls = []
        for layer, cache in zip(model.layers, self.caches, strict=True):
            block, mlp = layer["attention"], layer["mlp"]
            calls += [
                bind_decode_linear(x, block.qkv.weight, block.qkv.bias, norm=_norm_of(block.norm), out=self._qkv),
                bind_attention(query, key, value, cache, self._attended, kernel=self._kernel),
                bind_decode_linear(attended, block.projection.weight, block.projection.bias, residual=x, out=x),
                bind_decode_linear(
                    x,
                    mlp.expand.weight,
                    mlp.expand.bias,
                    norm=_norm_of(mlp.norm),
                    activation=model.config.activation,
                    out=self._hidden,
                ),
                bind_decode_linear(self._hidden, mlp.contract.weight, mlp.contract.bias, residual=x, out=x),
            ]
        norm = _norm_of(model.norm) if isinstance(model.norm, LayerNorm) else None
        return [*calls, bind_decode_linear(x, model.image_head.weight, norm=norm, out=self._logits)]


def decoder_bytes(
    model: Dalle,
    num_prompts: int,
    num_images: int,
    *,
    guided: bool = False,
    cache_dtype: torch.dtype | None = None,
    prefix: int = 0,
) -> int:
    """What a :class:`Decoder` of these sizes and its draw take beside the model: caches and buffers, about.

    ``prefix`` is the number of image tokens that are prefilled.
    """
    config, weight = model.config, model.layers[0]["attention"].qkv.weight
    copies = 2 if guided else 1
    prompts, rows = copies * num_prompts, copies * num_prompts * num_images
    dtype = weight.dtype if cache_dtype is None else cache_dtype
    caches = sum(
        KVCache.nbytes_of(pattern, rows, config.heads, config.head_dim, prompts, dtype) for pattern in config.patterns()
    )
    states = (6 + config.mlp_ratio) * config.width + config.image_vocab_size
    # The widest of a prefill: the MLP's hidden states beside the residual stream and its keys and values.
    prefill = prompts * (config.text_states + prefix) * (5 + 2 * config.mlp_ratio) * config.width
    return caches + 4 * (rows * states + prefill) + 8 * rows * config.image_len


def _norm_of(norm: LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps


def _as_cache_takes_it(qkv: Tensor, cache: KVCache) -> Tensor:
    """In the cache's dtype or in float32, which the cache rounds."""
    return qkv if qkv.dtype in (torch.float32, cache.dtype) else qkv.float()


def _prefill_layer(layer: nn.ModuleDict, states: list[Tensor], cache: KVCache, groups: list[int]) -> list[Tensor]:
    """The layer on the first states of sequences, (P, S, width) in parts.

    Prompt i of the cache keeps the keys and values of sequence groups[i].
    """
    block: AttentionBlock = layer["attention"]
    packed = [block.project_qkv(part) for part in states]
    kept = torch.cat(packed)[groups].permute(2, 0, 3, 1, 4)[1:]  # keys and values, each (P, H, S, D)
    cache.prefill(*_as_cache_takes_it(kept, cache))
    after = []
    for part, qkv in zip(states, packed, strict=True):
        attended = attention_qkvpacked(qkv, block.pattern)
        after.append(layer["mlp"](part + block.project(attended)))
    return after
