"""Bound calls of a decoding step made one after the other in one go, on a CPU.

Each op by itself wakes PyTorch's threads and waits for them, and there are five of them a layer, each a few dozen
microseconds long. A plan holds the sizes and addresses of all of them, and one op works them off: the threads enter
once a step, and meet at counters between the parts (``csrc/cpu/decode_parts.cpp``). The bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dalle_fast.ops import backends

__all__ = ["bind_together"]

_PLANS: dict[object, Callable[..., Tensor]] = {}
if backends.extension is not None:
    _PLANS = {
        getattr(torch.ops.dalle_fast, f"{name}_cpu").default: getattr(torch.ops.dalle_fast, f"{name}_plan_cpu").default
        for name in ("attention_with_kvcache", "decode_linear", "draw_token", "embed_token")
    }


def bind_together(calls: Sequence[partial], advance: Tensor | None = None) -> Callable[[], None]:
    """A call that does the work of all ``calls``, in their order.

    Args:
        calls: what ``bind_attention``, ``bind_decode_linear``, ``bind_draw_token`` and ``bind_embed_token`` give for
            the C++ kernel. Their tensors must keep their place in memory.
        advance: int64 of no dimensions, which is 1 more in the end.

    Raises:
        RuntimeError: now, an argument that one of the calls would not take; in the call, before anything is computed,
            a value that it would not take, such as a position outside the image, or a cache that is full.
    """
    plan = torch.cat([_PLANS[call.func](*call.args) for call in calls])
    return partial(_run, plan, advance, tuple(calls))


def _run(plan: Tensor, advance: Tensor | None, calls: tuple[partial, ...]) -> None:
    """``calls`` are here to keep the memory that the plan points to.

    The op has no shapes for tracing, so that a compiler leaves it alone: it would see no reason to keep what seems to
    change nothing, nor to leave tensors where they are.
    """
    torch.ops.dalle_fast.run_decode_plan_cpu(plan, advance)
