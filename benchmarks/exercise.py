"""Small calls of every op with a kernel, for compute-sanitizer to watch: ``python benchmarks/gpu.py --exercise``."""

from __future__ import annotations

import torch

import dalle_fast
from dalle_fast import formats, scaled_resblock
from dalle_fast.ops.adamw16 import UpdatedTensors, UpdateRule, adamw16_
from dalle_fast.ops.draw_token import draw_token
from dalle_fast.ops.grad_scale import unscale_
from dalle_fast.patterns import Column, Conv, Full, Pattern, Row


def exercise() -> None:
    """Small calls of every op with a kernel, forward and backward, on the GPU or, without one, on the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text_len, grid = 13, (5, 7)
    calls = 0
    kinds = [Full(text_len, grid), Row(text_len, grid), Column(text_len, grid), Conv(text_len, grid, kernel_size=3)]
    text_lens = torch.tensor([0, text_len], device=device)
    for pattern in kinds:
        for dtype, head_dim in ((torch.bfloat16, 64), (torch.float32, 40)):
            qkv = torch.randn(2, pattern.seq_len, 3, 2, head_dim).to(device, dtype).requires_grad_()
            out = dalle_fast.attention_qkvpacked(qkv, pattern, text_lens=text_lens)
            (gradient,) = torch.autograd.grad(out.float().sum(), qkv)
            assert out.isfinite().all() and gradient.isfinite().all()
            calls += 1
            calls += _exercise_decoding(device, pattern, dtype, head_dim)
    calls += _exercise_draws(device)
    for dtype, codes in ((torch.bfloat16, 300), (torch.float32, 256)):
        logits = torch.randn(2, codes, 7, 9).to(device, dtype).requires_grad_()
        codebook = torch.randn(codes, 40).to(device, dtype).requires_grad_()
        for hard in (False, True):
            soft = dalle_fast.gumbel_softmax(logits, 0.5, hard, dim=1)
            found = dalle_fast.gumbel_quantize(logits, codebook, 0.5, hard=hard)
            loss = soft.float().square().sum() + found.quantized.float().sum() + found.kl.sum()
            gradients = torch.autograd.grad(loss, (logits, codebook))
            assert all(each.isfinite().all() for each in (soft, found.quantized, found.kl, *gradients))
            calls += 1
    values = torch.randn(1001).to(device)
    backend = "cpp" if dalle_fast.ops.backends.has_cpp_backend(values.device) else "reference"
    for encode, decode in (
        (formats.encode_169, formats.decode_169),
        (formats.encode_0610, formats.decode_0610),
    ):
        assert decode(encode(values, backend=backend), backend=backend).isfinite().all()
        calls += 1
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        _exercise_precision(device, dtype, backend)
        calls += 4
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls on {device}, all finite")


def _exercise_decoding(device: str, pattern: Pattern, dtype: torch.dtype, head_dim: int) -> int:
    """Whole images of 17 samples of each of two prompts; the number of calls."""
    cache = dalle_fast.KVCache(pattern, 34, 2, head_dim, num_prompts=2, dtype=dtype, device=device)
    text = torch.randn(2, 2, 2, pattern.text_len, head_dim).to(device, dtype)
    cache.prefill(*text, torch.tensor([0, pattern.text_len], device=device))
    for _ in range(pattern.image_len):
        query, key, value = torch.randn(34, 3, 2, 1, head_dim).to(device, dtype).unbind(1)
        assert dalle_fast.attention_with_kvcache(query, key, value, cache).isfinite().all()
    return pattern.image_len


def _exercise_draws(device: str) -> int:
    """Draws with and without filters, guidance and kept tokens; the number of calls."""
    seeds, position = torch.arange(3, device=device), torch.tensor(4, device=device)
    settings = [{}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.9, "cond_scale": 2.0}]
    for codes in (300, 4096):
        logits = torch.randn(6, codes).to(device)
        tokens, scores = torch.zeros(3, 9, dtype=torch.int64, device=device), torch.zeros(3, device=device)
        keep = torch.rand(3, 9).to(device) < 0.5
        for each in settings:
            rows = logits if "cond_scale" in each else logits[:3]
            draw_token(rows, seeds, position, tokens, scores, keep=keep, **each)
        assert scores.isfinite().all() and ((tokens >= 0) & (tokens < codes)).all()
    return 2 * len(settings)


def _exercise_precision(device: str, dtype: torch.dtype, backend: str) -> None:
    """A residual block, unscaling and AdamW16, of tensors of more than one chunk."""
    scales = torch.full((2,), 1024.0, device=device)
    x = torch.randn(1001).to(device).requires_grad_()
    branch = scaled_resblock(x, lambda entry: 3 * entry.to(dtype), scales[0], backend=backend)
    (gradient,) = torch.autograd.grad(branch.sum(), x)
    grads = [torch.randn(size).to(device, dtype) for size in (1001, 0, 70_001)]
    found = unscale_(grads, scales, [0, 1, 1], write=False, backend=backend)
    rows = []
    for index, grad in enumerate(grads):
        moments = torch.zeros_like(grad, dtype=torch.float32 if dtype == torch.float32 else torch.int16)
        master = grad.float() if index == 0 and dtype != torch.float32 else None
        rows.append(UpdatedTensors(grad.clone(), grad, moments, moments.clone(), master, 0, index % 2, index))
    rules, steps = [UpdateRule(1e-3, 0.9, 0.96, 1e-8, 0.045, 5.0)], torch.ones(3, dtype=torch.int64, device=device)
    flags = {"skip": found.nonfinite.any(), "sum_of_squares": found.sum_of_squares, "grad_clip": 1.0}
    adamw16_(rows, rules, steps, scales, **flags, seed=5, backend=backend)
    unscaled = unscale_(grads, scales, [0, 1, 1], backend=backend)
    assert not found.nonfinite.any() and not unscaled.nonfinite.any() and found.sum_of_squares > 0
    assert all(each.isfinite().all() for each in (gradient, *grads, *(row.param for row in rows)))
