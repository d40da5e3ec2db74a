"""The whole model on a GPU: updates in training, whole images, and the token step of a large one.

- ``model-training``: an update of 24 layers of width 1024 on 256 + 32 x 32 positions, with 16 heads and the paper's
  schedule: forward, backward, clipping and optimiser, as ``dalle-fast train`` does it. bf16 is autocast with torch's
  fused AdamW, bf16_compiled the same through torch.compile, fp16 has a gradient scale for each block and AdamW16. The
  same model with other attention, in bf16: SDPA under dense masks, compiled FlexAttention; and DALLE-pytorch's of the
  same depth and width with full attention, with its own feed-forward layers.
- ``model-dvae``: an update of the published dVAE (256 x 256 pixels, 8192 codes) in bf16, with this library's quantiser,
  and with softmax, argmax and a matrix product of PyTorch in its place.
- ``model-sampling``: whole images from that model in bfloat16, arg-max each time; ``dense`` is the same model and
  sampler over a dense cache: keys and values of every position and sample, preallocated, and SDPA under the pattern's
  mask, captured as a CUDA graph as ours is.
- ``model-step``: a token step for one image from 24 layers of width 2048, 1.2 billion weights, in bfloat16.

Extra info: ``tokens_per_s``, of a sequence's; ``teraflops``, useful ones, which leave out what a mask hides and count a
backward pass as twice the forward pass (attention: 2.5 times); ``matrix_share``, these over a large matrix product's
rate; ``peak_gib``, of an update, beyond weights and moments; ``images_per_s``; ``bandwidth_share``, the time to read
the step's matrices once at a large copy's rate, over the step's. ``product_share`` and ``attention_share``: of the time
that an update's kernels take, by their names; ``kernels``: those that take most, with their shares.

On a CPU it is skipped, or with DALLE_FAST_BENCH_SMALL=1 runs at sizes that show that it works, and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterator

import measure
import pytest
import rivals
import sampling_rivals
import torch
from bench_sampling import rewind
from oracle import Case
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_fast import AdamW16, ResblockGradScaler
from dalle_fast.models import dvae, transformer
from dalle_fast.models.decoder import Decoder
from dalle_fast.models.dvae import DVAE, DVAEConfig
from dalle_fast.models.transformer import Dalle, DalleConfig
from dalle_fast.patterns import Pattern
from dalle_fast.reference.gumbel import GumbelOutput
from dalle_fast.sampling import Sampler

ON_GPU = measure.DEVICE == "cuda"
CONFIG = (
    DalleConfig(depth=24, width=1024, heads=16)
    if ON_GPU
    else DalleConfig(text_vocab_size=300, image_vocab_size=64, text_len=8, grid=(4, 4), depth=5, width=64, heads=2)
)
LARGE = dataclasses.replace(CONFIG, width=2 * CONFIG.width, heads=2 * CONFIG.heads)
BATCH = 16 if ON_GPU else 2
BATCHES = [1, 8, 64, 512] if ON_GPU else [1, 3]
DENSE_BATCHES = BATCHES[-1:]
STEPS = CONFIG.image_len // 4  # of the token step in one timed call
UPDATES_TO_LEARN = 4
RULE = {"lr": 4.5e-4, "betas": (0.9, 0.96), "weight_decay": 4.5e-2}  # the paper's
GRAD_CLIP = 4.0
KERNELS_KEPT = 16
# What kernels of matrix products (cuBLAS, CUTLASS) and of attention are called, on a CPU the ops.
KERNEL_WORDS = {
    "product": "gemm|cutlass(?!.*(fmha|flash))|nvjet|xmma|::addmm|::mm$",
    "attention": "attention|fmha|flash|attend|_dkdv|_dq",
}

pytestmark = [
    pytest.mark.benchmark(timer=measure.clock),
    pytest.mark.skipif(not ON_GPU and not os.environ.get("DALLE_FAST_BENCH_SMALL"), reason="needs a GPU"),
]


def captions(count: int, length: int = CONFIG.caption_len) -> Tensor:
    """The same at every call, (count, length)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, CONFIG.text_vocab_size, (count, length), generator=generator).to(measure.DEVICE)


def images(count: int) -> Tensor:
    """Image tokens, the same at every call, (count, image_len)."""
    generator = torch.Generator().manual_seed(2)
    size = (count, CONFIG.image_len)
    return torch.randint(CONFIG.image_vocab_size, size, generator=generator).to(measure.DEVICE)


def linear_flops(model: Dalle, sequences: int) -> float:
    """Of one forward pass through the matrices."""
    config = model.config
    layers = sum(module.weight.numel() for module in model.layers.modules() if isinstance(module, nn.Linear))
    heads = config.caption_len * model.text_head.weight.numel() + config.image_len * model.image_head.weight.numel()
    return 2 * sequences * (layers * (config.text_states + config.image_len) + heads)


def attention_flops(config: DalleConfig, sequences: int) -> float:
    """Of one forward pass through attention, over the pairs that the patterns let see each other."""
    return sum(pattern.flops(sequences, config.heads, config.head_dim) for pattern in config.patterns())


OTHER_ATTENTION = ("sdpa_mask", "flex")
WAYS = ("bf16", "fp16", *OTHER_ATTENTION)


@pytest.fixture
def attention(way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts a rival's attention into the model's layers."""
    if way in OTHER_ATTENTION:
        if way == "flex" and not ON_GPU:
            pytest.skip("FlexAttention has no backward pass on a CPU")
        monkeypatch.setattr(transformer, "attention_qkvpacked", functools.partial(_attend, way))
    yield
    _make_attend.cache_clear()


def _attend(op: str, qkv: Tensor, pattern: Pattern) -> Tensor:
    batch, _, _, heads, head_dim = qkv.shape
    attend = _make_attend(op, pattern, batch, heads, head_dim, qkv.dtype)
    return attend(*(x.transpose(1, 2) for x in qkv.unbind(2))).transpose(1, 2)


@functools.cache
def _make_attend(op: str, pattern: Pattern, batch: int, heads: int, head_dim: int, dtype: torch.dtype) -> rivals.Attend:
    return rivals.OPS[op].make(Case("model", pattern, batch, heads, head_dim, dtype, measure.DEVICE, "training"))


def make_update(way: str) -> tuple[Dalle, Callable[[], Tensor]]:
    """The model, and a function that makes one update and returns the loss before it."""
    torch.manual_seed(0)
    model = Dalle(CONFIG).to(measure.DEVICE)
    scaler = None
    if way == "fp16":
        model.cast_blocks(torch.float16)
        scaler = ResblockGradScaler(model.branches())
        model.set_grad_scales(scaler.block_scales)
        optimizer = AdamW16(model.parameters(), **RULE, grad_clip=GRAD_CLIP, seed=0)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **RULE, fused=True)
    loss_of = torch.compile(model.loss) if way == "bf16_compiled" else model.loss
    text, image_tokens = captions(BATCH), images(BATCH)

    return model, make_step(optimizer, lambda: loss_of(text, image_tokens).total, scaler)


def make_step(
    optimizer: torch.optim.Optimizer, compute_loss: Callable[[], Tensor], scaler: ResblockGradScaler | None = None
) -> Callable[[], Tensor]:
    """A function that makes one update and returns the loss before it; without a scaler in bfloat16 by autocast."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def update() -> Tensor:
        with torch.autocast(measure.DEVICE, torch.bfloat16, enabled=scaler is None):
            loss = compute_loss()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        else:
            nn.utils.clip_grad_norm_(parameters, GRAD_CLIP)
            optimizer.step()
        return loss.detach()

    return update


def time_updates(
    benchmark, update: Callable[[], Tensor], first_loss: float | None, updates: int = UPDATES_TO_LEARN
) -> None:
    """Check that the loss starts where it should and falls, then time updates."""
    loss = update().item()
    if first_loss is not None:
        assert math.isclose(loss, first_loss, rel_tol=0.02), "the loss is not the one without a rival's attention"
    for _ in range(updates):
        last = update().item()
    assert math.isfinite(last) and last < loss
    peak = measure.device_peak_bytes(update) if ON_GPU else None
    benchmark.pedantic(measure.timed(update), rounds=10 if ON_GPU else 2)
    if peak is not None:
        benchmark.extra_info["peak_gib"] = peak / 2**30


def kernel_shares(update: Callable[[], Tensor]) -> dict[str, float]:
    """Each kernel's part of the time that all take in one update, the longest first; of ops on a CPU."""
    activity = torch.profiler.ProfilerActivity.CUDA if ON_GPU else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        update()
        if ON_GPU:
            torch.cuda.synchronize()
    spent = {
        event.key: event.self_device_time_total if ON_GPU else event.self_cpu_time_total
        for event in profile.key_averages()
    }
    longest = sorted(spent, key=spent.get, reverse=True)
    return {name: spent[name] / sum(spent.values()) for name in longest if spent[name] > 0}


def report_kernels(benchmark, update: Callable[[], Tensor]) -> None:
    """What of an update is products, what attention, and what the rest is."""
    if benchmark.stats is None:
        return
    shares = kernel_shares(update)
    for part, words in KERNEL_WORDS.items():
        benchmark.extra_info[f"{part}_share"] = sum(
            share for name, share in shares.items() if re.search(words, name, re.IGNORECASE)
        )
    benchmark.extra_info["kernels"] = dict(list(shares.items())[:KERNELS_KEPT])


def report_speed(benchmark, flops: float) -> None:
    """Of an update's useful operations."""
    if benchmark.stats is None:
        return
    seconds = benchmark.stats.stats.median
    rate = flops / seconds
    benchmark.extra_info |= {
        "tokens_per_s": BATCH * (CONFIG.text_states + CONFIG.image_len) / seconds,
        "teraflops": rate / 1e12,
        "matrix_share": rate / measure.matmul_flops_per_s(torch.bfloat16, torch.get_num_threads()),
    }


@functools.cache
def first_loss() -> float:
    """Of the model in float32, before any update."""
    torch.manual_seed(0)
    model = Dalle(CONFIG).to(measure.DEVICE)
    with torch.no_grad():
        return model.loss(captions(BATCH), images(BATCH)).total.item()


@pytest.mark.benchmark(group="model-training")
@pytest.mark.parametrize("way", WAYS)
def test_training(benchmark, way, attention):
    time_training(benchmark, way)


def time_training(benchmark, way: str) -> None:
    """A row of the group."""
    expected = first_loss()
    model, update = make_update(way)
    time_updates(benchmark, update, expected)
    report_kernels(benchmark, update)
    report_speed(benchmark, 3 * linear_flops(model, BATCH) + 3.5 * attention_flops(CONFIG, BATCH))


@pytest.mark.benchmark(group="model-training")
def test_training_dalle_pytorch(benchmark):
    reason = sampling_rivals.why_missing()
    if reason is not None:
        pytest.skip(reason)
    model = sampling_rivals.make_package_model(CONFIG).to(measure.DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), **RULE, fused=True)
    text, image_tokens = captions(BATCH, CONFIG.text_len), images(BATCH)

    update = make_step(optimizer, lambda: model(text, image_tokens, return_loss=True))
    time_updates(benchmark, update, None)
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    dense = 4 * CONFIG.depth * CONFIG.width * (CONFIG.text_states + CONFIG.image_len) ** 2 / 2  # causal pairs
    positions = CONFIG.text_states + CONFIG.image_len
    report_speed(benchmark, BATCH * (6 * matrices * positions + 3.5 * dense))


DVAE_CONFIG = (
    DVAEConfig() if ON_GPU else DVAEConfig(image_size=32, vocab_size=64, hidden=8, codebook_dim=8, blocks_per_group=1)
)
DVAE_BATCH = 16 if ON_GPU else 2


def quantize_eagerly(logits: Tensor, codebook: Tensor, tau: float, *, seed: int | None) -> GumbelOutput:
    """gumbel_quantize of (B, codes, H, W) in PyTorch's ops; its noise is PyTorch's, whatever the seed."""
    relaxed = F.gumbel_softmax(logits.float(), tau, dim=1).to(logits.dtype)
    quantized = torch.einsum("bkhw,kd->bdhw", relaxed, codebook.to(logits.dtype))
    log_q = logits.float().log_softmax(dim=1)
    kl = (log_q.exp() * log_q).sum(dim=1) + math.log(logits.shape[1])
    return GumbelOutput(quantized, logits.argmax(dim=1), kl)


@pytest.mark.benchmark(group="model-dvae")
@pytest.mark.parametrize("quantize", ["gumbel_quantize", "eager"])
def test_dvae(benchmark, quantize, monkeypatch):
    if quantize == "eager":
        monkeypatch.setattr(dvae, "gumbel_quantize", quantize_eagerly)
    torch.manual_seed(0)
    layout = {"memory_format": torch.channels_last}
    model = DVAE(DVAE_CONFIG).to(measure.DEVICE, **layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    size = (DVAE_BATCH, DVAE_CONFIG.channels, DVAE_CONFIG.image_size, DVAE_CONFIG.image_size)
    pixels = torch.full(size, 0.9, device=measure.DEVICE).contiguous(**layout)  # soon learned, unlike noise
    pixels += 0.1 * torch.rand_like(pixels)

    update = make_step(optimizer, lambda: model.loss(pixels, 1.0, 0.0).total)
    time_updates(benchmark, update, None, updates=20)
    if benchmark.stats is not None:
        benchmark.extra_info["images_per_s"] = DVAE_BATCH / benchmark.stats.stats.median


def make_sampled_model(config: DalleConfig) -> Dalle:
    """In bfloat16 on a GPU; its scores differ from token to token, which as initialised they do not."""
    torch.manual_seed(0)
    model = Dalle(config).eval()
    nn.init.normal_(model.image_head.weight, std=0.1)
    return model.cast_blocks(torch.bfloat16 if ON_GPU else torch.float32).to(measure.DEVICE)


class DenseDecoder(Decoder):
    """A decoder whose layers keep keys and values of all positions of every sample, and attend under masks."""

    @torch.inference_mode(False)
    def __init__(self, model: Dalle, num_prompts: int, num_images: int) -> None:
        super().__init__(model, num_prompts, num_images)
        config = model.config
        self._logits = None  # the layers are run through the model's modules
        self.captures = ON_GPU
        shape = (self.rows, config.heads, config.text_states + config.image_len, config.head_dim)
        kind = {"dtype": self.caches[0].dtype, "device": measure.DEVICE}
        self._dense = [torch.zeros(2, *shape, **kind) for _ in config.patterns()]
        position = torch.arange(shape[2], device=measure.DEVICE)
        hidden = {
            pattern: ~pattern.visible(position[-config.image_len :, None], position) for pattern in config.patterns()
        }
        zeros = torch.zeros(config.image_len, shape[2], **kind)
        masks = {pattern: zeros.masked_fill(mask, -torch.inf) for pattern, mask in hidden.items()}
        self._masks = [masks[pattern] for pattern in config.patterns()]

    def prefill(self, text: Tensor, image_tokens: Tensor | None = None) -> Tensor:
        """Of captions alone."""
        likelihoods = super().prefill(text, image_tokens)
        length, each = self.model.config.text_states, self.rows // self.num_prompts
        for cache, dense in zip(self.caches, self._dense, strict=True):
            for to, kept in zip(dense, (cache.text_key.mT, cache.text_value), strict=True):
                to[:, :, :length] = kept.repeat_interleave(each, dim=0)
        return likelihoods

    def _run_layers(self, x: Tensor) -> Tensor:
        row = self.position.view(1)
        for layer, dense, masks in zip(self.model.layers, self._dense, self._masks, strict=True):
            block = layer["attention"]
            query, *new = block.project_qkv(x).to(dense.dtype).unsqueeze(3).unbind(1)  # each (rows, H, 1, D)
            for held, values in zip(dense, new, strict=True):
                held.index_copy_(2, row + self.model.config.text_states, values)
            mask = masks.index_select(0, row)
            attended = F.scaled_dot_product_attention(query, *dense, attn_mask=mask)
            x = layer["mlp"](x + block.project(attended.squeeze(2)))
        return self.model.image_logits(self.model.norm(x))


@pytest.mark.benchmark(group="model-step")
@torch.no_grad()
def test_token_step(benchmark):
    model = make_sampled_model(LARGE)
    sampler = Sampler(model, 1, 1)
    tokens, _ = sampler.run(captions(1), torch.zeros(1, dtype=torch.int64))
    assert len(tokens.unique()) > CONFIG.image_len // 16, "the tokens are too alike to tell right from wrong"

    def steps() -> None:
        """From the middle of the image on."""
        rewind(sampler.decoder)
        for _ in range(STEPS):
            sampler._advance()

    steps()
    benchmark.pedantic(measure.timed(steps), rounds=5)
    if benchmark.stats is None:
        return
    matrices = [module.weight for module in model.layers.modules() if isinstance(module, nn.Linear)]
    read_bytes = sum(weight.nbytes for weight in (*matrices, model.image_head.weight))
    seconds = benchmark.stats.stats.median / STEPS
    benchmark.extra_info |= {
        "ms_a_step": 1000 * seconds,
        "read_gb": read_bytes / 1e9,
        "bandwidth_share": read_bytes / measure.copy_bytes_per_s() / seconds,
    }


@pytest.mark.benchmark(group="model-sampling")
@pytest.mark.parametrize(
    ("count", "dense"),
    [pytest.param(count, False, id=str(count)) for count in BATCHES]
    + [pytest.param(count, True, id=f"{count}-dense") for count in DENSE_BATCHES],
)
def test_images(benchmark, count, dense):
    model = make_sampled_model(CONFIG)
    sampler = Sampler(model, 1, count, temperature=0)
    if dense:
        sampler.decoder = None  # its memory first
        sampler.decoder = DenseDecoder(model, 1, count)
    text, seeds = captions(1), torch.arange(count)
    tokens, _ = sampler.run(text, seeds)
    with torch.no_grad():
        scores = model(text, tokens[:1]).image.squeeze(0)
    drawn = scores.gather(-1, tokens[0, :, None]).squeeze(-1)
    behind = (scores.amax(dim=-1) - drawn) / (scores.amax(dim=-1) - scores.amin(dim=-1))
    assert behind.max() < 0.05, "a token is not the likeliest, rounding aside"
    assert len(tokens.unique()) > CONFIG.image_len // 16, "the tokens are too alike to tell right from wrong"
    benchmark.pedantic(measure.timed(lambda: sampler.run(text, seeds)), rounds=1 if dense else 2)
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info |= {"images_per_s": count / seconds, "ms_a_step": 1000 * seconds / CONFIG.image_len}


@pytest.mark.benchmark(group="model-training")
def test_training_compiled(benchmark):
    """Last, because it compiles longest."""
    time_training(benchmark, "bf16_compiled")
