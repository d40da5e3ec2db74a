"""The Triton attention kernels in Triton's interpreter, against float64; on a machine without a GPU too.

The interpreter is chosen when triton is imported, and other tests need its compiler: this module runs itself once more
in a process of its own. What the interpreter cannot show (registers, bfloat16, races) is not tested here.
"""

import math
import mmap

import pytest
import torch
from helpers import assert_within_budget, every_pattern, pattern_id
from interpreter import INTERPRETED, interpreted, run_interpreted
from torch import Tensor

from dalle_fast import reference
from dalle_fast.patterns import Column, Conv, Full, Row
from dalle_fast.reference.attention import visible_keys

pytest.importorskip("triton")

from dalle_fast.kernels.attention_backward import attention_bwd, plan_bwd
from dalle_fast.kernels.attention_forward import attention_fwd, plan_fwd
from dalle_fast.kernels.common import H200, Tiles


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.skipif(INTERPRETED, reason="the compiled kernels")
def test_no_cpu_tensors_outside_the_interpreter():
    x, pattern = torch.zeros(1, 1, 8, 16), Row(4, 2)
    lse = torch.zeros(1, 1, 8)
    with pytest.raises(RuntimeError, match="run on CUDA devices, got a tensor on cpu; move it to one, or set"):
        attention_fwd(x, x, x, x, lse, pattern=pattern.code, text_lens=None, scale=1.0)
    with pytest.raises(RuntimeError, match="run on CUDA devices, got a tensor on cpu; move it to one, or set"):
        attention_bwd(x, x, x, x, lse, x, None, x, x, x, pattern=pattern.code, text_lens=None, scale=1.0)


@interpreted
def test_bfloat16_is_refused():
    x, pattern = torch.zeros(1, 1, 8, 16, dtype=torch.bfloat16), Row(4, 2)
    lse = torch.zeros(1, 1, 8)
    with pytest.raises(
        RuntimeError, match=r"interpreter computes bfloat16 on its bit patterns.*unset TRITON_INTERPRET"
    ):
        attention_fwd(x, x, x, x, lse, pattern=pattern.code, text_lens=None, scale=1.0)
    with pytest.raises(
        RuntimeError, match=r"interpreter computes bfloat16 on its bit patterns.*unset TRITON_INTERPRET"
    ):
        attention_bwd(x, x, x, x, lse, x, None, x, x, x, pattern=pattern.code, text_lens=None, scale=1.0)


def poisoned(values: Tensor, stride_d: int = 1) -> Tensor:
    """``values`` (B, H, S, D) in the middle of a buffer of NaN, with room before and after every axis."""
    batch, heads, length, head_dim = values.shape
    buffer = torch.full((batch + 2, heads + 2, length + 70, (head_dim + 9) * stride_d), math.nan, dtype=values.dtype)
    view = buffer[1:-1, 1:-1, 35:-35, 3 * stride_d : (3 + head_dim) * stride_d : stride_d]
    view.copy_(values)
    return view


def empty_like(tensor: Tensor) -> Tensor:
    """Memory to write to: NaN, in a buffer of NaN."""
    return poisoned(torch.full_like(tensor, math.nan, memory_format=torch.contiguous_format))


def surroundings_untouched(view: Tensor) -> bool:
    """Whether the buffer around a view of :func:`poisoned` still holds nothing but NaN."""
    buffer = view._base.clone()
    inside = torch.as_strided(buffer, view.shape, view.stride(), view.storage_offset())
    inside.fill_(math.nan)
    return bool(buffer.isnan().all())


def make_inputs(pattern, *, batch=1, heads=1, key_heads=None, length=None, head_dim=16, dtype=torch.float32):
    """Query, key, value, and the gradients of out and lse; scores that leave some keys no weight."""
    length = length or pattern.seq_len
    key_heads = key_heads or heads
    query = 2 * torch.randn(batch, heads, length, head_dim)
    key, value = 2 * torch.randn(2, batch, key_heads, length, head_dim)
    grad_out, grad_lse = torch.randn(batch, heads, length, head_dim), torch.randn(batch, heads, length)
    return *(poisoned(tensor.to(dtype)) for tensor in (query, key, value, grad_out)), grad_lse


def forward(query, key, value, pattern, *, text_lens=None, scale=None, tiles=None):
    """out and lse of the kernel, into poisoned memory."""
    out, lse = empty_like(query), torch.full(query.shape[:3], math.nan)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attention_fwd(query, key, value, out, lse, pattern=pattern.code, text_lens=text_lens, scale=scale, tiles=tiles)
    assert surroundings_untouched(out)
    return out, lse


def backward(
    query, key, value, out, lse, grad_out, grad_lse, pattern,
    *, text_lens=None, scale=None, dq_tiles=None, dkdv_tiles=None, num_splits=None,
):  # fmt: skip
    """Gradients of the kernels, into poisoned memory."""
    grads = [empty_like(tensor) for tensor in (query, key, value)]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attention_bwd(
        query, key, value, out, lse, grad_out, grad_lse, *grads,
        pattern=pattern.code, text_lens=text_lens, scale=scale,
        dq_tiles=dq_tiles, dkdv_tiles=dkdv_tiles, num_splits=num_splits,
    )  # fmt: skip
    assert all(surroundings_untouched(grad) for grad in grads)
    return grads


def expected(query, key, value, grad_out, grad_lse, pattern, dtype, text_lens=None, scale=None):
    """out, lse and the gradients of the reference in ``dtype``."""
    inputs = [tensor.to(dtype).requires_grad_() for tensor in (query, key, value)]
    out, lse = reference.attention(*inputs, pattern, text_lens=text_lens, scale=scale, enable_gqa=True, return_lse=True)
    loss = (out * grad_out.to(dtype)).sum()
    if grad_lse is not None:
        loss = loss + (lse.masked_fill(lse.isinf(), 0.0) * grad_lse.to(lse.dtype)).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, inputs)


def by_formula(query, key, value, out, lse, grad_out, grad_lse, pattern, text_lens=None, scale=None):
    """Gradients in float32 from the rounded out and lse, as no S x S matrix is kept: exp(s - lse) errs as lse does."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group = query.shape[1] // key.shape[1]
    q, o, do = query.float(), out.float(), grad_out.float()
    k, v = (tensor.float().repeat_interleave(group, 1) for tensor in (key, value))
    seen = visible_keys(pattern, query.shape[2], text_lens, query.device)
    seen = seen if text_lens is None else seen[:, 0]
    p = torch.exp((q @ k.mT) * scale - lse[..., None]).masked_fill(~seen, 0.0)
    delta = (o * do).sum(-1)
    delta = delta if grad_lse is None else delta - grad_lse
    ds = p * (do @ v.mT - delta[..., None])
    gradients = scale * ds @ k, *(x.unflatten(1, (-1, group)).sum(2) for x in (scale * ds.mT @ q, p.mT @ do))
    return [gradient.to(query.dtype) for gradient in gradients]


def check(
    pattern, *, tiles, dq_tiles, dkdv_tiles, num_splits=1, text_lens=None, scale=None, with_grad_lse=True, **shape
):
    """Forward and backward against float64, within the budget of plain PyTorch in the inputs' dtype."""
    query, key, value, grad_out, grad_lse = make_inputs(pattern, **shape)
    grad_lse = grad_lse if with_grad_lse else None
    options = {"text_lens": text_lens, "scale": scale}
    out, lse = forward(query, key, value, pattern, tiles=tiles, **options)
    grads = backward(
        query, key, value, out, lse, grad_out, grad_lse, pattern,
        dq_tiles=dq_tiles, dkdv_tiles=dkdv_tiles, num_splits=num_splits, **options,
    )  # fmt: skip
    truth = expected(query, key, value, grad_out, grad_lse, pattern, torch.float64, **options)
    peer_out, peer_lse, *_ = expected(query, key, value, grad_out, grad_lse, pattern, query.dtype, **options)
    peer_grads = by_formula(query, key, value, peer_out, peer_lse, grad_out, grad_lse, pattern, **options)
    for actual, peer, exact in zip((out, lse, *grads), (peer_out, peer_lse, *peer_grads), truth, strict=True):
        assert_within_budget(actual, peer, exact)


T16, T32 = Tiles(16, 16, 16, 4, 1), Tiles(32, 32, 32, 4, 1)
WIDE, TALL = Tiles(16, 32, 32, 4, 1), Tiles(32, 16, 16, 4, 1)
each_pattern = pytest.mark.parametrize("pattern", every_pattern(19, (5, 7)), ids=pattern_id)


@interpreted
@each_pattern
def test_float32(pattern):
    """Whole sequences of two samples, one with part of its text hidden; shares of queries added up."""
    check(
        pattern, tiles=T32, dq_tiles=T16, dkdv_tiles=TALL, num_splits=3,
        text_lens=torch.tensor([19, 4]), batch=2, head_dim=12,
    )  # fmt: skip


@interpreted
@each_pattern
def test_float16_of_a_prefix(pattern):
    """A prefix that ends within a tile, and query heads that share a key head."""
    check(
        pattern, tiles=WIDE, dq_tiles=TALL, dkdv_tiles=WIDE, with_grad_lse=False,
        length=pattern.text_len + 23, heads=2, key_heads=1, dtype=torch.float16,
    )  # fmt: skip


@interpreted
@pytest.mark.parametrize(
    "pattern",
    [
        Row(0, (4, 9)),
        Column(32, (20, 3)),
        Conv(16, (6, 40), kernel_size=5),
        Conv(3, (9, 4), variant="torus"),
        Full(5, 6),
    ],
    ids=pattern_id,
)
@pytest.mark.parametrize("tiles", [T16, T32], ids=["16", "32"])
def test_other_grids(pattern, tiles):
    """No text, text of whole tiles, patches, two-span windows, steps without a mask."""
    check(pattern, tiles=tiles, dq_tiles=tiles, dkdv_tiles=tiles, num_splits=1 + (tiles is T32))


@interpreted
def test_published_size():
    """A whole head of the paper's row attention, with the tiles of the tables."""
    pattern = Row(256, 32)
    check(pattern, tiles=None, dq_tiles=None, dkdv_tiles=None, num_splits=None, head_dim=64)


@interpreted
@pytest.mark.parametrize("length", [1, 9, 10, 11, 12, 16, 17, 27, 28])
def test_every_end_of_a_tile(length):
    pattern = Column(10, (9, 2))
    check(pattern, tiles=T16, dq_tiles=T16, dkdv_tiles=T16, length=length)


@interpreted
@pytest.mark.parametrize("head_dim", [1, 16, 40])
def test_head_dims(head_dim):
    check(Row(6, 4), tiles=T16, dq_tiles=T16, dkdv_tiles=T16, num_splits=2, head_dim=head_dim)


@interpreted
@pytest.mark.parametrize("scale", [-0.4, 0.0, 1e-40, 30.0])
def test_scales(scale):
    pattern = Conv(0, 5, kernel_size=3, variant="torus")
    check(pattern, tiles=T16, dq_tiles=T16, dkdv_tiles=T16, scale=scale)


@interpreted
def test_text_lens():
    """None of the text, parts that end within and at a step, all; values beyond the range act as its ends."""
    pattern, text_lens = Row(34, (2, 5)), torch.tensor([0, 99, 7, 99, 16, 99, 34, 99])[::2]
    shape = {"batch": 4, "dtype": torch.float32}
    check(pattern, tiles=T16, dq_tiles=T16, dkdv_tiles=T16, num_splits=2, text_lens=text_lens, **shape)
    query, key, value, *_ = make_inputs(pattern, **shape)
    out, lse = forward(query, key, value, pattern, text_lens=text_lens, tiles=T16)
    assert (out[0, :, :34] == 0).all()
    assert (lse[0, :, :34] == -math.inf).all()
    for same in (torch.tensor([-9, 7, 16, 2**40]), text_lens.to(torch.uint8), text_lens.to(torch.int32)):
        again, lse_again = forward(query, key, value, pattern, text_lens=same, tiles=T16)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


@interpreted
def test_hidden_text_does_not_leak():
    """Keys and values behind text_lens may be anything, also not numbers."""
    pattern, text_lens = Conv(20, (3, 4), kernel_size=3), torch.tensor([5, 18])
    query, key, value, grad_out, grad_lse = make_inputs(pattern, batch=2)
    results = []
    for fill in (0.0, math.nan):
        for b, text_len in enumerate(text_lens):
            key[b, :, text_len:20] = value[b, :, text_len:20] = fill
        out, lse = forward(query, key, value, pattern, text_lens=text_lens, tiles=T16)
        grads = backward(
            query, key, value, out, lse, grad_out, grad_lse, pattern,
            text_lens=text_lens, dq_tiles=T16, dkdv_tiles=T16, num_splits=2,
        )  # fmt: skip
        results.append((out, lse, *grads))
    for zeros, nans in zip(*results, strict=True):
        assert torch.equal(zeros, nans)
    for grad in results[0][3:]:
        assert (grad[0, :, 5:20] == 0).all()
        assert (grad[1, :, 18:20] == 0).all()


@interpreted
def test_packed_projection():
    """Views of one (B, S, 3, H, D) tensor, read and written in place."""
    pattern = Row(9, (3, 5))
    qkv = torch.randn(2, pattern.seq_len, 3, 2, 16)
    grad_qkv, out = torch.full_like(qkv, math.nan), torch.full((2, pattern.seq_len, 2, 16), math.nan)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    lse = torch.full((2, 2, pattern.seq_len), math.nan)
    grad_out = torch.randn_like(out)
    attention_fwd(
        query, key, value, out.transpose(1, 2), lse,
        pattern=pattern.code, text_lens=None, scale=0.25, tiles=T16,
    )  # fmt: skip
    attention_bwd(
        query, key, value, out.transpose(1, 2), lse, grad_out.transpose(1, 2), None,
        *grad_qkv.permute(2, 0, 3, 1, 4),
        pattern=pattern.code, text_lens=None, scale=0.25, dq_tiles=T16, dkdv_tiles=T16,
    )  # fmt: skip
    for dtype in (torch.float64, torch.float32):
        leaf = qkv.to(dtype).requires_grad_()
        exact = reference.attention_qkvpacked(leaf, pattern, scale=0.25)
        (grad,) = torch.autograd.grad(exact, leaf, grad_out.to(dtype))
        if dtype == torch.float64:
            truth = exact.detach(), grad
    assert_within_budget(out, exact.detach(), truth[0])
    assert_within_budget(grad_qkv, grad, truth[1])


@interpreted
@pytest.mark.parametrize("grad_out", ["expanded", "transposed", "every other"])
def test_strides_of_grad_out(grad_out):
    pattern = Column(5, (3, 4))
    query, key, value, dense, _ = make_inputs(pattern)
    if grad_out == "expanded":
        strided = torch.tensor(0.75).expand_as(dense)
        assert set(strided.stride()) == {0}
    elif grad_out == "transposed":
        strided = dense.mT.contiguous().mT
    else:
        strided = poisoned(dense, stride_d=2)
    out, lse = forward(query, key, value, pattern, tiles=T16)
    options = {"dq_tiles": T16, "dkdv_tiles": T16}
    actual = backward(query, key, value, out, lse, strided, None, pattern, **options)
    contiguous = backward(query, key, value, out, lse, strided.contiguous(), None, pattern, **options)
    for a, b in zip(actual, contiguous, strict=True):
        assert torch.equal(a, b)


@interpreted
@pytest.mark.parametrize("pattern", [Row(11, (5, 7)), Conv(4, (3, 24), kernel_size=5)], ids=pattern_id)
def test_order_of_programs(pattern, monkeypatch):
    """Run twice, and with the programs of every grid in reverse: the same bits, so no program needs another."""
    from triton.runtime.interpreter import InterpreterBuilder

    query, key, value, grad_out, grad_lse = make_inputs(pattern)

    def run():
        out, lse = forward(query, key, value, pattern, tiles=T16)
        grads = backward(
            query, key, value, out, lse, grad_out, grad_lse, pattern, dq_tiles=T16, dkdv_tiles=T16, num_splits=3
        )
        return [out, lse, *grads]

    first, second = run(), run()
    set_grid_idx, seen = InterpreterBuilder.set_grid_idx, []

    def reversed_grid_idx(self, x, y, z):
        seen.append(x)
        set_grid_idx(self, self.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", reversed_grid_idx)
    third = run()
    assert max(seen) > 0
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@interpreted
@each_pattern
def test_later_tokens_do_not_leak(pattern):
    query, key, value, *_ = make_inputs(pattern)
    before, lse_before = forward(query, key, value, pattern, tiles=T16)
    for position in (4, 19, 37):
        changed = [tensor.clone() for tensor in (query, key, value)]
        for tensor in changed:
            tensor[:, :, position:] += 100.0
        after, lse_after = forward(*changed, pattern, tiles=T16)
        assert torch.equal(after[:, :, :position], before[:, :, :position])
        assert torch.equal(lse_after[:, :, :position], lse_before[:, :, :position])
        assert not torch.equal(after[:, :, position], before[:, :, position])


MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # its name came with Python 3.13


@interpreted
@pytest.mark.parametrize("axis", ["batch", "head", "position"])
def test_offsets_beyond_32_bits(axis):
    """Strides that fit into 32 bits, and offsets that do not, in memory of which next to nothing is touched."""
    pattern, far, head_dim = Row(2, (1, 3)), 2**30, 16
    sizes = {"batch": (3, 1, 5), "head": (1, 3, 5), "position": (1, 1, 5)}[axis]
    strides = {"batch": (far, 128, 128), "head": (128, far, 128), "position": (128, 128, far)}[axis]
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    assert last > 2**31
    # Eight tensors side by side, and room before them where an offset that wrapped around would lead.
    origin = 2**31
    bytes_needed = 2 * (origin + last + 8 * head_dim)
    memory = mmap.mmap(-1, bytes_needed, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    arena = torch.frombuffer(memory, dtype=torch.float16)
    views = [torch.as_strided(arena, (*sizes, head_dim), (*strides, 1), origin + i * head_dim) for i in range(8)]
    near = [torch.randn(*sizes, head_dim, dtype=torch.float16) for _ in range(4)]
    for view, values in zip(views, near, strict=False):
        view.copy_(values)
    results = []
    for query, key, value, grad_out, *written in (views, [*near, *(torch.empty_like(near[0]) for _ in range(4))]):
        out, *grads = written
        lse = torch.empty(sizes)
        attention_fwd(query, key, value, out, lse, pattern=pattern.code, text_lens=None, scale=0.3, tiles=T16)
        attention_bwd(
            query, key, value, out, lse, grad_out, None, *grads, pattern=pattern.code, text_lens=None, scale=0.3,
            dq_tiles=T16, dkdv_tiles=T16, num_splits=1,
        )  # fmt: skip
        results.append([out.clone(), lse, *(grad.clone() for grad in grads)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert results[0][0].isfinite().all()


def test_one_grid_axis_for_any_number_of_heads():
    """The second axis of a CUDA grid ends at 65535."""
    pattern = Row(256, 32)
    x = torch.empty(2048, 64, pattern.seq_len, 64, dtype=torch.float16, device="meta")
    lse = torch.empty(x.shape[:3], device="meta")
    options = {"pattern": pattern.code, "text_lens": None, "scale": 0.125, "device": H200}
    launches = [plan_fwd(x, x, x, x, lse, **options), *plan_bwd(x, x, x, x, lse, x, None, x, x, x, **options)]
    assert all(65535 < launch.grid < 2**31 for launch in launches)
