"""AdamW16 under torch.amp.GradScaler and ResblockGradScaler, with closures, and with memory laid out in other ways."""

import copy
import re

import pytest
import torch
from optim_steps import BACKENDS, RULE, assert_same, make_params, snapshot, update
from torch import Tensor, nn

from dalle_fast import AdamW16, ResblockGradScaler, scaled_resblock
from dalle_fast.ops.grad_scale import GradScaling

FLOAT32, MIXED = (torch.float32,) * 2, (torch.float16, torch.float32, torch.bfloat16)


def loss_of(params: list[nn.Parameter]) -> Tensor:
    """A sum whose gradients are small integers over 8, which no power of two rounds."""
    weights = [torch.arange(param.numel()).view_as(param) % 7 / 8 for param in params]
    return sum((param.float() * weight).sum() for param, weight in zip(params, weights, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad_clip", [None, 1.0])
@pytest.mark.parametrize(("dtypes", "unscaled"), [(MIXED, False), (FLOAT32, False), (FLOAT32, True)])
def test_grad_scaler_of_torch(dtypes, unscaled, grad_clip, backend):
    """Its scale is a power of two, so the updates are those without it; one with an infinity leaves no trace."""
    params = make_params(*dtypes)
    optimizer = AdamW16(params, **RULE, grad_clip=grad_clip, backend=backend)
    copies, plain = copy.deepcopy((params, optimizer))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for infinity in (False, True, False, False):
        scaler.scale(loss_of(params)).backward()
        if infinity:
            params[0].grad.view(-1)[3] = torch.inf
        else:
            loss_of(copies).backward()
            plain.step()
            plain.zero_grad()
        if unscaled:
            scaler.unscale_(optimizer)
        before = snapshot(optimizer)
        scaler.step(optimizer)
        if infinity:
            assert_same(snapshot(optimizer), before)
        scale = scaler.get_scale()
        scaler.update()
        assert scaler.get_scale() == (scale / 2 if infinity else scale)
        assert_same(snapshot(optimizer), snapshot(plain))
        assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
        optimizer.zero_grad()
    assert all(optimizer.state[param]["step"] == 3 for param in params)


def test_two_scalers_at_once_are_refused():
    params = make_params(torch.float32)
    optimizer = AdamW16(params, **RULE)
    optimizer.found_inf = torch.tensor(0.0)
    scaling = GradScaling(torch.ones(1), {params[0]: 0}, torch.tensor(False), torch.tensor(1.0).double())
    with pytest.raises(ValueError, match=r"^scaling must be None under torch\.amp\.GradScaler, got both$"):
        update(optimizer, [torch.ones(5, 7)], scaling=scaling)


def test_parameter_that_the_scaling_does_not_know_is_refused():
    params = make_params(*FLOAT32)
    optimizer = AdamW16(params, **RULE)
    scaling = GradScaling(torch.ones(1), {params[0]: 0}, torch.tensor(False), torch.tensor(1.0).double())
    message = "scaling.block_of must have every parameter, got no block of number 1, (5, 7)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        update(optimizer, [torch.ones(5, 7)] * 2, scaling=scaling)


class Tiny(nn.Module):
    """Two residual blocks in float16 between float32 layers."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 16), nn.Linear(16, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).half() for _ in range(2)
        )

    def forward(self, x: Tensor, scales: tuple[Tensor | float, ...] = (1.0, 1.0)) -> Tensor:
        x = self.enter(x)
        for block, scale in zip(self.blocks, scales, strict=True):
            x = scaled_resblock(x, lambda entry, block=block: block(entry.half()), scale)
        return self.leave(x)


@pytest.mark.parametrize("rounding", ["stochastic", "master"])
def test_small_float16_model_learns(rounding):
    """The loss is so small that float16 has no numbers for its gradients, but for the blocks' scales."""
    model, inputs = Tiny(), torch.randn(256, 6)
    target = (inputs[:, :1] * inputs[:, 1:2]).tanh()
    optimizer = AdamW16(model.parameters(), lr=3e-3, weight_decay=0.0, grad_clip=4.0, rounding=rounding)
    scaler = ResblockGradScaler(model.blocks, init_scale=2.0**13)
    losses, small = [], 1e-6
    ((model(inputs) - target).square().mean() * small).backward()
    assert not any(param.grad.any() for param in model.blocks.parameters())
    optimizer.zero_grad()
    for _ in range(200):
        loss = (model(inputs, scaler.block_scales) - target).square().mean()
        (loss * small).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    variance = target.var().item()  # the loss of a constant
    assert losses[-1] < 0.2 * variance
    assert scaler.report().skipped == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_overflow_in_one_block_skips_the_update_of_all(backend):
    model, inputs = Tiny(), torch.randn(32, 6)
    optimizer = AdamW16(model.parameters(), lr=1e-3, backend=backend)
    scaler = ResblockGradScaler(model.blocks)
    for overflow in (False, True, False):
        model(inputs, scaler.block_scales).square().mean().backward()
        if overflow:
            model.blocks[1][0].weight.grad[0, 0] = torch.inf
        before = snapshot(optimizer)
        scales = scaler.scales()
        scaler.unscale_(optimizer)
        assert scaler.step(optimizer) is not overflow
        scaler.update()
        if overflow:
            assert_same(snapshot(optimizer), before)
            assert scaler.scales()[1] < scales[1] and scaler.scales()[0] > scales[0]
        optimizer.zero_grad()
    assert {int(optimizer.state[param]["step"]) for param in model.parameters()} == {2}


def test_closure_computes_the_gradients():
    params = make_params(*MIXED)
    optimizer = AdamW16(params, **RULE)
    copies, plain = copy.deepcopy((params, optimizer))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(params)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    expected = loss_of(copies)
    expected.backward()
    assert plain.step() is None
    assert torch.equal(loss, expected)
    assert_same(snapshot(optimizer), snapshot(plain))


def test_without_gradients_nothing_happens():
    params = make_params(torch.float32)
    optimizer = AdamW16(params, **RULE)
    optimizer.step()
    assert not optimizer.state


def laid_out(kind: str, dtype: torch.dtype) -> Tensor:
    """(4, 6) of values that do not depend on ``kind``."""
    values = torch.linspace(-1, 1, 24).view(4, 6).to(dtype)
    if kind == "transposed":
        return values.t().contiguous().t()
    if kind == "strided":  # with gaps
        return torch.empty(4, 12, dtype=dtype)[:, ::2].copy_(values)
    return values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("param_kind", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("grad_kind", ["contiguous", "transposed", "strided", "expanded"])
def test_strides_of_parameters_and_gradients(param_kind, grad_kind, backend):
    """Elements meet their own gradients, moments and counters, wherever they lie."""
    results = []
    for kinds in (("contiguous", "contiguous"), (param_kind, grad_kind)):
        param = nn.Parameter(laid_out(kinds[0], torch.float16))
        optimizer = AdamW16([param], **RULE, rounding="master", grad_clip=1.0, backend=backend)
        for _ in range(3):
            grad = laid_out(kinds[1], torch.float16)
            param.grad = torch.ones((), dtype=torch.float16).expand(4, 6) if grad_kind == "expanded" else grad
            optimizer.step()
        results.append(snapshot(optimizer))
    assert_same(*results)


@pytest.mark.parametrize("dtype", MIXED)
def test_parameters_of_no_dimensions_and_of_no_elements(dtype):
    params = [nn.Parameter(torch.tensor(1.5, dtype=dtype)), nn.Parameter(torch.zeros(0, 3, dtype=dtype))]
    optimizer = AdamW16(params, **RULE, grad_clip=1.0)
    update(optimizer, [torch.ones_like(param) for param in params])
    assert params[0] < 1.5
    assert [int(optimizer.state[param]["step"]) for param in params] == [1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_through_a_parameter_that_was_updated_is_an_error(backend):
    params = make_params(torch.float32)
    optimizer = AdamW16(params, **RULE, backend=backend)
    loss = params[0].square().sum()
    update(optimizer, [torch.ones(5, 7)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_memory_format_may_change_between_updates():
    module = nn.Conv2d(4, 6, 3).half()
    optimizer = AdamW16(module.parameters(), **RULE, rounding="master")
    other, peer = copy.deepcopy((module, optimizer))
    for step in range(3):
        if step == 1:
            other.to(memory_format=torch.channels_last)
        grads = [torch.randn_like(param) for param in module.parameters()]
        update(optimizer, grads)
        update(peer, grads)
    assert peer.state[other.weight]["exp_avg"].stride() == other.weight.stride() != module.weight.stride()
    assert_same(snapshot(optimizer), snapshot(peer))
