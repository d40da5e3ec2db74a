"""What a gradient scale for each residual block is for: one deep network trained in several precisions.

    python benchmarks/precision_proof.py --out docs

writes ``precision_proof.json`` and ``precision_proof.png``.

The problem. A DALL-E-style transformer has two heads. The first reads the residual stream after half of the blocks and
predicts the next image token, a noisy function of the current one. The second reads it at the end and predicts a noisy
entry of a table of (current token, column), which no linear map of their embeddings gives. The loss is

    first_weight * sum over tokens of the first head's cross-entropy + second_weight * the same of the second head's

so the blocks of the first half get gradients of the first head, and those of the second half gradients that are smaller
by second_weight / first_weight = 2^-40. The paper sees gradients shrink from block to block in a network too large to
train here; the weights make a small one have as wide a range. A weight means nothing to Adam whose eps is small enough:
float32 learns both alike.

float16 holds 2^-24 .. 2^16, 40 binades of which the lowest ten are inexact, and one block's gradients take many of
them; so no global scale fits both halves. ``sweep`` tries every power of two on the trained float32 network.

The four ways differ in the blocks' dtype and in the scaling alone: float32 weights, cast in the forward pass, float32
gradients cast from the 16-bit ones, torch.optim.AdamW, the same data and initial weights. A fifth trains float16
weights with 16-bit moments (dalle_fast.AdamW16), whose formats end at gradients of 2^-30: its second_weight is milder.
Matrix products are float16 in what they read and write and float32 in their sums. Everything else (LayerNorm, residual
stream, embeddings, heads) is float32. On a CPU the results repeat, bit for bit with one number of threads.

Source: arXiv 2102.12092, section 2.4 and appendix D.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_fast import AdamW16, ResblockGradScaler, attention_qkvpacked, scaled_resblock
from dalle_fast.patterns import Pattern, schedule

SWEEP = range(-10, 41)  # base-2 logarithms of the global scales tried
FASTER = 8  # times the paper's growth and back-off, in logarithms
EVERY = 10  # updates between two records of scales and flushed shares


@dataclass(frozen=True)
class Problem:
    """Sizes of the network, the data and the training."""

    depth: int = 24  # attention layers, each followed by an MLP: two residual blocks
    width: int = 32
    heads: int = 2
    text_len: int = 8
    side: int = 8  # of the grid of image tokens
    vocab: int = 16
    columns: int = 2  # of the table; column c of the grid reads column c mod columns
    noise: float = 0.2  # share of targets that are drawn at random
    first_weight: float = 2.0**4
    second_weight: float = 2.0**-36
    batch: int = 8
    updates: int = 600
    warmup: int = 40
    learning_rate: float = 4e-3
    eps: float = 1e-20
    seed: int = 0
    device: str = "cpu"

    @property
    def image_len(self) -> int:
        """Image tokens of a sequence."""
        return self.side**2


class Way(NamedTuple):
    """How a network is trained."""

    dtype: torch.dtype  # of the blocks' arithmetic
    scaling: str | None = None  # "global", "resblock" or None
    adamw16: bool = False  # float16 weights and 16-bit moments


WAYS = {
    "fp32": Way(torch.float32),
    "fp16 global": Way(torch.float16, "global"),
    "fp16 resblock": Way(torch.float16, "resblock"),
    "bf16": Way(torch.bfloat16),
    "fp16 resblock, AdamW16": Way(torch.float16, "resblock", adamw16=True),
}


class Matrix(nn.Module):
    """x W^T, read and written in x's dtype, summed in float32, as a GPU's matrix units do; so are its gradients."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if x.is_cuda:
            return F.linear(x, weight)
        return F.linear(x.float(), weight.float()).to(x.dtype)


class Block(nn.Module):
    """x + branch(LayerNorm(x)), the branch in ``dtype``; with ``scale`` a scaled_resblock."""

    dtype = torch.float32
    scale: Tensor | None = None

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return x + self.body(x).to(x.dtype)
        return scaled_resblock(x, self.body, self.scale)

    def body(self, x: Tensor) -> Tensor:
        return self.branch(self.norm(x).to(self.dtype))


class AttentionBlock(Block):
    def __init__(self, width: int, heads: int, pattern: Pattern) -> None:
        super().__init__(width)
        self.heads, self.pattern = heads, pattern
        self.first = Matrix(width, 3 * width)
        self.last = Matrix(width, width)

    def branch(self, x: Tensor) -> Tensor:
        qkv = self.first(x).unflatten(-1, (3, self.heads, -1))
        attended = attention_qkvpacked(qkv if qkv.is_cuda else qkv.float(), self.pattern)
        return self.last(attended.flatten(-2).to(x.dtype))


class MLPBlock(Block):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.first = Matrix(width, 2 * width)
        self.last = Matrix(2 * width, width)

    def branch(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.first(x)))


class Network(nn.Module):
    """The blocks, and a head after each half of them."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        width, grid = problem.width, (problem.side, problem.side)
        self.text_len = problem.text_len
        self.tokens = nn.Embedding(problem.vocab, width)
        self.text_position = nn.Embedding(problem.text_len, width)
        self.row = nn.Embedding(problem.side, width)
        self.column = nn.Embedding(problem.side, width)
        self.blocks = nn.ModuleList()
        for pattern in schedule("dalle", problem.depth, problem.text_len, grid):
            self.blocks += [AttentionBlock(width, problem.heads, pattern), MLPBlock(width)]
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.heads = nn.ModuleList([nn.Linear(width, problem.vocab), nn.Linear(width, problem.vocab)])
        for embedding in (self.tokens, self.text_position, self.row, self.column):
            nn.init.normal_(embedding.weight, std=0.5)
        for block in self.blocks:
            for matrix, gain in ((block.first, 0.5), (block.last, problem.depth**-0.5)):
                nn.init.normal_(matrix.weight, std=gain / math.sqrt(matrix.weight.shape[1]))
        for head in self.heads:
            nn.init.zeros_(head.weight)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """(B, text_len + image_len) to each head's logits (B, image_len, vocab)."""
        grid = (self.row.weight[:, None] + self.column.weight).flatten(0, 1)
        x = self.tokens(tokens) + torch.cat([self.text_position.weight, grid])
        logits, half = [], len(self.blocks) // 2
        for blocks, norm, head in zip((self.blocks[:half], self.blocks[half:]), self.norms, self.heads, strict=True):
            for block in blocks:
                x = block(x)
            logits.append(head(norm(x))[:, self.text_len :])
        return logits


def make_batch(problem: Problem, count: int, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (count, text_len + image_len) and both heads' targets (count, image_len); ``index`` is its seed."""
    table = torch.randint(
        problem.vocab, (problem.vocab, problem.columns), generator=torch.Generator().manual_seed(problem.seed)
    )
    generator = torch.Generator().manual_seed(1 + problem.seed * 1_000_003 + index)

    def draw(length: int) -> Tensor:
        return torch.randint(problem.vocab, (count, length), generator=generator)

    def noisy(targets: Tensor) -> Tensor:
        changed = torch.rand(targets.shape, generator=generator) < problem.noise
        return torch.where(changed, draw(targets.shape[1]), targets)

    text, image = draw(problem.text_len), [draw(1)]
    for _ in range(problem.image_len):
        image.append(noisy((5 * image[-1] + 3) % problem.vocab))
    image = torch.cat(image, dim=1)
    current, following = image[:, :-1], image[:, 1:]
    column = torch.arange(problem.image_len) % problem.side % problem.columns
    batch = torch.cat([text, current], dim=1), following, noisy(table[current, column])
    return tuple(part.to(problem.device) for part in batch)


def losses(network: Network, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each head, nats a token."""
    tokens, *targets = batch
    first, second = (
        F.cross_entropy(logits.flatten(0, 1), target.flatten())
        for logits, target in zip(network(tokens), targets, strict=True)
    )
    return first, second


def weighted(problem: Problem, first: Tensor, second: Tensor) -> Tensor:
    """What is differentiated: the weighted sum over a batch's tokens."""
    tokens = problem.batch * problem.image_len
    return tokens * (problem.first_weight * first + problem.second_weight * second)


def matrices(block: Block) -> list[Tensor]:
    return [block.first.weight, block.last.weight]


def zero_share(grads: list[Tensor]) -> float:
    """The part of all elements that is 0."""
    return 1 - sum(int(grad.count_nonzero()) for grad in grads) / sum(grad.numel() for grad in grads)


def log2(scales: list[float]) -> list[float]:
    return [round(math.log2(scale), 2) for scale in scales]


def make_network(problem: Problem, way: Way) -> Network:
    """The same initial weights for every way of one problem."""
    torch.manual_seed(problem.seed)
    network = Network(problem).to(problem.device)
    for block in network.blocks:
        block.dtype = way.dtype
        if way.adamw16:
            for matrix in (block.first, block.last):
                matrix.to(way.dtype)
    return network


def make_optimizer(problem: Problem, way: Way, network: Network) -> torch.optim.Optimizer:
    if way.adamw16:
        # Of the formats' range: the root of the smallest variance that 0-6-10 holds is 2^-30.
        return AdamW16(network.parameters(), lr=0.0, eps=2.0**-34, weight_decay=0.0, seed=problem.seed)
    return torch.optim.AdamW(
        network.parameters(), lr=0.0, betas=(0.9, 0.96), eps=problem.eps, weight_decay=0.0, fused=True
    )


class NoScaling:
    """A scaler that does nothing."""

    def scale(self, loss: Tensor) -> Tensor:
        return loss

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        optimizer.step()
        return True

    def update(self) -> None:
        pass

    def get_scale(self) -> float:
        return 1.0


def make_scaler(problem: Problem, way: Way, network: Network) -> Any:
    """The way's scaler, told to the blocks.

    Both scalers' constants are for runs of a hundred thousand updates. ResblockGradScaler's rates are eight times as
    fast here, to the same balance: 2^(8/1000) an update, back-off by 2^4 that 500 clean updates regain. It may back off
    at every update, and starts at its largest scale, for it falls faster than it grows. GradScaler grows after 16 clean
    updates in place of 2000. All else, limits among it, is as by default.
    """
    if way.scaling == "global":
        return torch.amp.GradScaler(problem.device, growth_interval=16)
    if way.scaling is None:
        return NoScaling()
    scaler = ResblockGradScaler(
        network.blocks,
        init_scale=2.0**24,
        growth_factor=2 ** (FASTER / 1000),
        backoff_factor=2 ** (-FASTER / 2),
        backoff_interval=1,
    )
    for block, scale in zip(network.blocks, scaler.block_scales, strict=True):
        block.scale = scale
    return scaler


def train(problem: Problem, way: Way, log: Callable[[str], None] = lambda line: None) -> tuple[Network, dict[str, Any]]:
    """A network trained one way, and what happened."""
    start = time.perf_counter()
    network = make_network(problem, way)
    initial = [[weight.detach().clone() for weight in matrices(block)] for block in network.blocks]
    optimizer, scaler = make_optimizer(problem, way, network), make_scaler(problem, way, network)
    curves: dict[str, list[float]] = {"first": [], "second": []}
    flushed, scales, skipped = [], [], []
    for update in range(problem.updates):
        rate = min(1.0, (update + 1) / problem.warmup) * 0.5 * (1 + math.cos(math.pi * update / problem.updates))
        for group in optimizer.param_groups:
            group["lr"] = problem.learning_rate * rate
        both = losses(network, make_batch(problem, problem.batch, update))
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(weighted(problem, *both)).backward()
        record = update % EVERY == EVERY - 1
        if record:
            shares = [zero_share([weight.grad for weight in matrices(block)]) for block in network.blocks]
        scaler.unscale_(optimizer)
        before = scaler.get_scale()
        stepped = scaler.step(optimizer)
        scaler.update()
        if way.scaling == "global":  # whose step returns what the optimiser's does
            stepped = scaler.get_scale() >= before
        skipped += [] if stepped else [update]
        for curve, loss in zip(curves.values(), both, strict=True):
            curve.append(round(loss.item(), 5))
        if record:
            scales.append(log2(before if isinstance(before, list) else [before]))
            if stepped and update >= problem.updates // 2:
                flushed.append(shares)
            log(f"update {update + 1:4}  first {both[0]:.4f}  second {both[1]:.4f}  skipped {len(skipped)}")
    with torch.no_grad():
        held_out = losses(network, make_batch(problem, 8 * problem.batch, -1))
        moved = [
            max(
                ((weight.float() - old.float()).norm() / old.float().norm()).item()
                for weight, old in zip(matrices(block), before, strict=True)
            )
            for block, before in zip(network.blocks, initial, strict=True)
        ]
    return network, {
        "final_loss": {name: loss.item() for name, loss in zip(curves, held_out, strict=True)},
        "flushed": [round(sum(column) / len(column), 4) for column in zip(*flushed, strict=True)],
        "moved": [round(value, 4) for value in moved],
        "skipped": skipped,
        "log2_scales": scales,
        "loss": curves,
        "seconds": round(time.perf_counter() - start, 1),
    }


def sweep(problem: Problem, trained: Network, exponents: range) -> dict[str, list[Any]]:
    """What each global scale 2^exponent would do to one backward pass of a trained network in float16.

    Returns:
        Exponents, the share of zeros in each half's gradients, and whether each half has a non-finite one.
    """
    network = make_network(problem, WAYS["fp16 global"])
    network.load_state_dict(trained.state_dict())
    loss = weighted(problem, *losses(network, make_batch(problem, problem.batch, problem.updates)))
    half = len(network.blocks) // 2
    halves = {"first": network.blocks[:half], "second": network.blocks[half:]}
    found: dict[str, list[Any]] = {"exponent": list(exponents)}
    for name, blocks in halves.items():
        weights = [weight for block in blocks for weight in matrices(block)]
        found[f"{name}_flushed"], found[f"{name}_overflow"] = [], []
        for exponent in exponents:
            grads = torch.autograd.grad(
                loss, weights, torch.tensor(2.0**exponent, device=problem.device), retain_graph=True
            )
            found[f"{name}_flushed"].append(round(zero_share(list(grads)), 4))
            found[f"{name}_overflow"].append(not all(bool(grad.isfinite().all()) for grad in grads))
    return found


def prove(problem: Problem, log: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Every way, and the sweep on the float32 network: the JSON file's content."""
    results: dict[str, Any] = {"problem": asdict(problem), "torch": torch.__version__, "ways": {}}
    for name, way in WAYS.items():
        # Adam of float32 moments learns alike under any weights; those of the formats' range are between these.
        own = replace(problem, first_weight=1.0, second_weight=2.0**-28) if way.adamw16 else problem
        log(name)
        network, found = train(own, way, log)
        results["ways"][name] = {"first_weight": own.first_weight, "second_weight": own.second_weight} | found
        if name == "fp32":
            results["sweep"] = sweep(problem, network, SWEEP)
    reference = results["ways"]["fp32"]["final_loss"]["second"]
    for found in results["ways"].values():
        found["relative_to_fp32"] = round(found["final_loss"]["second"] / reference - 1, 4)
    return results


STYLES = {
    "fp32": {"color": "#2c3e50", "linewidth": 3.0, "alpha": 0.5},
    "fp16 global": {"color": "#e67e22"},
    "fp16 resblock": {"color": "#c0392b"},
    "bf16": {"color": "#2980b9", "linestyle": "--"},
    "fp16 resblock, AdamW16": {"color": "#16a085", "linestyle": ":", "linewidth": 2.0},
}
LABELS = {
    "fp32": "fp32",
    "fp16 global": "fp16, torch.amp.GradScaler",
    "fp16 resblock": "fp16, ResblockGradScaler",
    "bf16": "bf16, no scaling",
    "fp16 resblock, AdamW16": "fp16 weights, ResblockGradScaler, AdamW16",
}


def draw(results: dict[str, Any]) -> Any:
    """The JSON file's content as a matplotlib figure of four panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.4), layout="constrained")
    (shares, curves), (scales, swept) = figure.subplots(2, 2)
    for name, way in results["ways"].items():
        shares.plot(way["flushed"], label=LABELS[name], **STYLES[name])
        loss = torch.tensor(way["loss"]["second"])
        window = 20  # updates
        curves.plot(range(window - 1, len(loss)), loss.unfold(0, window, 1).mean(1), **STYLES[name])
    shares.set(
        title="Gradient elements flushed to zero, second half of training",
        xlabel="residual block",
        ylabel="share",
        ylim=(-0.03, 1.03),
    )
    curves.set(title="Loss of the last head, mean of 20 updates", xlabel="update", ylabel="nats a token")

    by_block = list(zip(*results["ways"]["fp16 resblock"]["log2_scales"], strict=True))
    ticks = [EVERY * (index + 1) for index in range(len(by_block[0]))]
    for block, values in enumerate(by_block):
        first = block < len(by_block) // 2
        scales.plot(ticks, values, color="#c0392b" if first else "#8e44ad", linewidth=0.8, alpha=0.6)
    scales.plot([], [], color="#c0392b", label="blocks of the first half")
    scales.plot([], [], color="#8e44ad", label="blocks of the second half")
    values = [entry[0] for entry in results["ways"]["fp16 global"]["log2_scales"]]
    scales.plot(ticks, values, label="the global scale", **STYLES["fp16 global"])
    scales.set(title="Scales", xlabel="update", ylabel="log2")
    scales.legend(frameon=False)

    found = results["sweep"]
    for half, color in (("first", "#c0392b"), ("second", "#8e44ad")):
        swept.plot(found["exponent"], found[f"{half}_flushed"], color=color, label=f"flushed in the {half} half")
    overflow = [e for e, is_over in zip(found["exponent"], found["first_overflow"], strict=True) if is_over]
    if overflow:
        swept.axvspan(
            min(overflow), found["exponent"][-1], color="#7f8c8d", alpha=0.3, label="overflow in the first half"
        )
    swept.set(
        title="Every global scale, on the trained fp32 network",
        xlabel="log2 of the scale",
        ylabel="share",
        ylim=(-0.03, 1.03),
    )
    swept.legend(frameon=False)
    for panel in (shares, curves, scales, swept):
        panel.grid(alpha=0.25)
    lines = shares.get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=len(STYLES), frameon=False, fontsize=9)
    problem = results["problem"]
    figure.suptitle(
        f"{2 * problem['depth']} residual blocks, width {problem['width']}; the second half's gradients are "
        f"2^{math.log2(problem['second_weight'] / problem['first_weight']):.0f} of the first half's"
    )
    return figure


def write(results: dict[str, Any], out: Path) -> None:
    """``precision_proof.json`` and ``precision_proof.png`` in the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "precision_proof.json").write_text(json.dumps(results) + "\n", encoding="utf-8")
    draw(results).savefig(out / "precision_proof.png", dpi=100)


def main() -> None:
    """Run everything, print a line a way, and write the files."""
    parser = argparse.ArgumentParser(description="One deep network trained in fp32, fp16 and bf16.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON and PNG files")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--threads", type=int, default=1, help="default: %(default)s: small tensors gain little by more"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    results = prove(Problem(seed=arguments.seed, device=arguments.device), print)
    write(results, arguments.out)
    for name, way in results["ways"].items():
        print(
            f"{LABELS[name]:42} loss {way['final_loss']['second']:.4f} ({way['relative_to_fp32']:+.2%}), "
            f"skipped {len(way['skipped'])}, {way['seconds']} s"
        )


if __name__ == "__main__":
    main()
