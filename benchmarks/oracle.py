"""A problem for attention benchmarks, its exact answer in float64, and the check that stands before every timing.

The truth is computed by the formulas, a block of queries at a time, since at 16,640 positions no machine holds all
scores; a block sees no key past its last query, and every query sees itself. The error budget of a result refers to
what PyTorch achieves from the same inputs:

    max|result - truth| <= 2 (max|peer - truth| + eps max|truth|),   eps of the inputs' dtype

The peer is the formulas in float32, rounded to the inputs' dtype. Where there are gradients it is that or the fused
attention of PyTorch under the pattern's mask, whichever errs more: its cheaper exponential costs the fused one some
digits on a CPU. No peer may err by more than half of the dtype's digits.

Queries are scaled up so that the weights of a row differ by orders of magnitude: at unit scale a softmax is nearly a
mean, and a mask with wrong entries goes unnoticed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_fast.patterns import Full, Pattern

QUERY_SCALE = 3.0
BLOCK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 30}  # of one block's scores in float64; on a CPU less than malloc maps anew
MASK_ROWS = 128  # queries at a time

NAMES = ("out", "dq", "dk", "dv")
Mode = str  # "forward": out; "backward": dq, dk, dv; "training": all four


@dataclass(frozen=True)
class Case:
    """Attention of one shape within one pattern, forward or backward.

    Args:
        shape: what a table calls the sizes and the dtype.
    """

    shape: str
    pattern: Pattern
    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: str
    mode: Mode

    @property
    def names(self) -> tuple[str, ...]:
        """What the op returns in this mode."""
        return {"forward": NAMES[:1], "backward": NAMES[1:], "training": NAMES}[self.mode]

    @property
    def flops(self) -> float:
        """Useful operations of one call: the backward pass has five products to the forward pass's two."""
        return self.pattern.flops(self.batch, self.heads, self.head_dim) * self._passes(1, 2.5)

    @property
    def io_bytes(self) -> int:
        """Least traffic of one call: forward reads q, k, v and writes o; backward reads those and do, writes three."""
        elements = self.batch * self.heads * self.pattern.seq_len * self.head_dim
        return int(elements * self.dtype.itemsize * self._passes(4, 8))

    @property
    def mask_ceiling(self) -> float:
        """How much faster than dense causal attention the pattern can make it: pairs there over pairs here."""
        return Full(self.pattern.text_len, self.pattern.grid).nnz() / self.pattern.nnz()

    def _passes(self, forward: float, backward: float) -> float:
        return {"forward": forward, "backward": backward, "training": forward + backward}[self.mode]

    def small(self) -> Case:
        """The same on a 4 x 4 grid."""
        return replace(self, pattern=replace(self.pattern, text_len=4, grid=4), batch=1, heads=1)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of the output, each (B, H, S, D); the same at every call."""
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (4, self.batch, self.heads, self.pattern.seq_len, self.head_dim)
        query, key, value, upstream = torch.randn(shape, generator=generator, device=self.device).unbind()
        return tuple(tensor.to(self.dtype) for tensor in (QUERY_SCALE * query, key, value, upstream))


def truth_and_peers(case: Case) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The answer in float64, and those of the peers; each holds at least ``case.names``."""
    return _truth_and_peers(case if case.mode == "forward" else replace(case, mode="training"))


@functools.lru_cache(maxsize=1)  # the benchmarks of one case follow each other
def _truth_and_peers(case: Case) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    inputs = case.inputs()
    with_gradients = case.mode != "forward"
    truth = blockwise_attention(*(tensor.double() for tensor in inputs), case.pattern, with_gradients)
    peers = [blockwise_attention(*inputs, case.pattern, with_gradients)]
    if with_gradients:
        peers.append(fused_attention(*inputs, case.pattern))
    return truth, peers


def blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, upstream: Tensor, pattern: Pattern, with_gradients: bool
) -> dict[str, Tensor]:
    """Attention of (B, H, S, D) tensors and its gradients, a block of queries at a time."""
    dtype, (batch, heads, length, head_dim) = query.dtype, query.shape
    q, k, v, do = (x.to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value, upstream))
    scale = head_dim**-0.5
    found = {name: torch.zeros_like(q) for name in (NAMES if with_gradients else NAMES[:1])}
    rows = max(1, BLOCK_BYTES[query.device.type] // (8 * batch * heads * length))
    position = torch.arange(length, dtype=torch.int32, device=query.device)
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        block, seen = slice(start, stop), slice(0, stop)
        visible = pattern.visible(position[block, None], position[seen])
        scores = (q[:, :, block] @ k[:, :, seen].mT * scale).masked_fill_(~visible, -torch.inf)
        weights = scores.sub_(torch.logsumexp(scores, -1, keepdim=True)).exp_()
        out = weights @ v[:, :, seen]
        found["out"][:, :, block] = out
        if not with_gradients:
            continue
        delta = (out.to(dtype) * do[:, :, block]).sum(-1, keepdim=True)
        ds = (do[:, :, block] @ v[:, :, seen].mT).sub_(delta).mul_(weights).mul_(scale)
        found["dq"][:, :, block] = ds @ k[:, :, seen]
        found["dk"][:, :, seen] += ds.mT @ q[:, :, block]
        found["dv"][:, :, seen] += weights.mT @ do[:, :, block]
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def fused_attention(query: Tensor, key: Tensor, value: Tensor, upstream: Tensor, pattern: Pattern) -> dict[str, Tensor]:
    """PyTorch's attention under the pattern's mask, and its gradients."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    mask = additive_mask(pattern, query.dtype, query.device)
    out = F.scaled_dot_product_attention(*leaves, attn_mask=mask)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, upstream)), strict=True))


def additive_mask(pattern: Pattern, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """``pattern.dense()`` as 0 and -inf, some queries at a time: all pairs of 16,640 positions take gigabytes."""
    position = torch.arange(pattern.seq_len, dtype=torch.int32, device=device)
    mask = torch.zeros(pattern.seq_len, pattern.seq_len, dtype=dtype, device=device)
    for rows, query in zip(mask.split(MASK_ROWS), position.split(MASK_ROWS), strict=True):
        rows.masked_fill_(~pattern.visible(query[:, None], position), -torch.inf)
    return mask


def worst_error(found: dict[str, Tensor], truth: dict[str, Tensor], peers: list[dict[str, Tensor]]) -> float:
    """The largest error in ``found``, each tensor's relative to the largest value of its truth.

    Raises:
        AssertionError: a tensor misses its error budget, or a peer is wrong.
    """
    errors = []
    for name, actual in found.items():
        expected = truth[name]
        assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
        eps = torch.finfo(actual.dtype).eps
        largest = expected.abs().max().item()
        error, *peer_errors = ((x.double() - expected).abs().max().item() for x in (actual, *(p[name] for p in peers)))
        # All of them, and not their maximum, which NaN does not change.
        assert all(each <= eps**0.5 * largest for each in peer_errors), f"a peer's {name} is off by {peer_errors}"
        budget = 2 * (max(peer_errors) + eps * largest)
        assert error <= budget, f"{name} is off by {error:.3g}, more than {budget:.3g}"
        errors.append(error / largest)
    return max(errors)
