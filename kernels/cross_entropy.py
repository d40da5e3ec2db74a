"""Softmax cross-entropy of rows of logits: their losses, and their gradients in place or in 16 bits.

    x_v = logits_v + bias_v      loss = ln sum_v e^(x_v - m) + m - x_t,  m = max_v x_v
    d loss / d x_v = e^(x_v - m) / sum_u e^(x_u - m) - (v = t)           times the row's factor, if there is one

One program a row. The first loop reads the logits BLOCK_N at a time for their maximum and, online, the sum of their
exponentials; the second, only where gradients are asked for, reads them once more, from L2 (a row of 8192 is 32 KB),
and writes the gradients. Of a row whose target is ignored nothing is read: its loss and gradients are 0. 12 bytes a
logit of float32, 8 from and to memory; two exponentials each. All arithmetic is float32.

A NaN or +inf among the logits, or nothing but -inf, makes the row NaN, as in torch.nn.functional.cross_entropy.

Source: Liger Kernel (arXiv 2410.10989), section 3.2, for gradients in the place of the logits; arXiv 1805.02867 for the
online sum. Limits: each row contiguous.
"""

import torch
import triton
import triton.language as tl
from dalle_fast.kernels.common import LN_2, LOG2_E, Compilation, Launch, check_runnable
from torch import Tensor

# Chosen by what the compilers make of them (Triton 3.6 and 3.9), not by time: no row was measured on a GPU. Eight warps
# of 2048 logits read 32 bytes a thread at a time and keep 8 programs on a multiprocessor.
BLOCK_N, NUM_WARPS = 2048, 8


@triton.jit
def _load_logits(logits, bias, offs_n, num_classes):
    """float32, -inf past the last class."""
    inside = offs_n < num_classes
    x = tl.load(logits + offs_n, mask=inside, other=float("-inf"))
    if bias is not None:
        x += tl.load(bias + offs_n, mask=inside, other=0.0)
    return x


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_rows_kernel(
    logits, bias, target, factor, losses, grads,
    stride_logits, stride_grads, num_classes, ignore_index,
    WITH_GRAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_logits
    grads += row * stride_grads
    label = tl.load(target + row)
    is_counted = label != ignore_index
    # Ignored rows walk through no block at all, and write zeros below.
    num_read = tl.where(is_counted, num_classes, 0)

    m, total = float("-inf"), 0.0
    for start_n in range(0, num_read, BLOCK_N):
        x = _load_logits(logits, bias, start_n + tl.arange(0, BLOCK_N), num_classes)
        m_new = tl.maximum(m, tl.max(x, 0))
        # Nothing but -inf so far: exp(-inf - 0), not exp(-inf + inf).
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        total = total * tl.exp2((m - base) * LOG2_E) + tl.sum(tl.exp2((x - base) * LOG2_E), 0)
        m = m_new
    # A target out of range reads nothing, and its loss is NaN.
    is_inside = is_counted & (label >= 0) & (label < num_classes)
    x_target = tl.load(logits + label, mask=is_inside, other=float("nan"))
    if bias is not None:
        x_target += tl.load(bias + label, mask=is_inside, other=0.0)
    loss = tl.log2(total) * LN_2 - (x_target - m)
    tl.store(losses + row, tl.where(is_counted, loss, 0.0))

    if WITH_GRAD:
        row_factor = 1.0
        if factor is not None:
            row_factor = tl.load(factor + row)
        inverse = row_factor / total
        # The program's other threads may still read the target's logit, which the next loop overwrites.
        tl.debug_barrier()
        for start_n in range(0, num_read, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            x = _load_logits(logits, bias, offs_n, num_classes)
            grad = tl.exp2((x - m) * LOG2_E) * inverse
            grad = tl.where(offs_n == label, grad - row_factor, grad)
            tl.store(grads + offs_n, grad.to(grads.dtype.element_ty), mask=offs_n < num_classes)
        zeros = tl.zeros([BLOCK_N], grads.dtype.element_ty)
        for start_n in range(num_read, num_classes, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            tl.store(grads + offs_n, zeros, mask=offs_n < num_classes)


def plan_rows(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor | None,
    losses: Tensor,
    grads: Tensor | None,
    *,
    ignore_index: int,
    block_n: int = BLOCK_N,
) -> Launch:
    """The launch of :func:`cross_entropy_rows`."""
    written = logits if grads is None else grads
    arguments = {
        "logits": logits,
        "bias": bias,
        "target": target,
        "factor": factor,
        "losses": losses,
        "grads": written,
        "stride_logits": logits.stride(0),
        "stride_grads": written.stride(0),
        "num_classes": logits.shape[1],
        "ignore_index": ignore_index,
    }
    constants = {"WITH_GRAD": grads is not None, "BLOCK_N": block_n}
    options = {"num_warps": NUM_WARPS, "num_stages": 2, "enable_fp_fusion": True}
    return Launch(_cross_entropy_rows_kernel, logits.shape[0], arguments, constants, options)


def cross_entropy_rows(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    factor: Tensor | None,
    losses: Tensor,
    grads: Tensor | None,
    *,
    ignore_index: int,
    block_n: int = BLOCK_N,
) -> None:
    """Losses of rows of logits, and their gradients.

    Args:
        logits: (N, V) float32, each row contiguous.
        bias: (V,) float32, contiguous, added to each row; or None.
        target: (N,) int64, contiguous, in 0..V-1 or ignore_index. The loss of any other is NaN.
        factor: (N,) float32, contiguous, of the rows' gradients; None is 1.
        losses: (N,) float32, contiguous. Written: nats, 0 where ignored.
        grads: (N, V) float32, float16 or bfloat16, each row contiguous, ``logits`` itself if they are not needed any
            more, or None. Written: d loss / d (logits + bias) times factor, 0 where ignored.
        ignore_index: of rows that do not count.
        block_n: logits that one step takes.

    Raises:
        RuntimeError: bfloat16 in Triton's interpreter; tensors that are not on a CUDA device outside of it.
    """
    check_runnable(logits if grads is None else grads)
    plan_rows(
        logits, bias, target, factor, losses, grads, ignore_index=ignore_index, block_n=block_n
    ).run(logits.device)  # fmt: skip


def shipped_configs() -> list[Compilation]:
    """What the launches of :func:`cross_entropy_rows` compile, for ahead-of-time compilation.

    8192 classes: gradients in place and in 16 bits, losses alone, and with a bias and factors.
    """

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    logits, target, losses = meta(1024, 8192), meta(1024, dtype=torch.int64), meta(1024)
    found = []
    for name, grads, bias, factor in (
        ("float32", logits, None, None),
        ("bfloat16", meta(1024, 8192, dtype=torch.bfloat16), None, None),
        ("float16", meta(1024, 8192, dtype=torch.float16), None, None),
        ("float32-bias-factor", logits, meta(8192), meta(1024)),
        ("loss", None, None, None),
    ):
        launch = plan_rows(logits, bias, target, factor, losses, grads, ignore_index=-100)
        found.append(launch.compilation(f"cross_entropy_rows-{name}"))
    return found
