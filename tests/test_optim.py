"""AdamW16's update: against float64, against the reference, its rounding, scaling, clipping and what it refuses."""

import math

import pytest
import torch
from helpers import assert_within_budget
from optim_steps import BACKENDS, RULE, assert_same, make_params, snapshot, update
from torch import Tensor, nn

from dalle_fast import AdamW16, reference
from dalle_fast.formats import decode_0610, decode_169
from dalle_fast.ops.grad_scale import GradScaling, unscale_


def adamw(param: Tensor, grads: list[Tensor], *, lr, betas, eps, weight_decay, variance_clip) -> list[Tensor]:
    """Parameter, mean and variance after updates by ``grads``, in param's dtype."""
    (beta1, beta2), mean, variance = betas, torch.zeros_like(param), torch.zeros_like(param)
    for step, grad in enumerate(grads, 1):
        mean = beta1 * mean + (1 - beta1) * grad.to(param.dtype)
        variance = (beta2 * variance + (1 - beta2) * grad.to(param.dtype) ** 2).clamp(max=variance_clip)
        root = (variance / (1 - beta2**step)).sqrt() + eps
        param = param * (1 - lr * weight_decay) - lr * mean / (1 - beta1**step) / root
    return [param, mean, variance]


def scaling_of(params: list[Tensor], scales: list[float], blocks: list[int], skip: bool = False) -> GradScaling:
    """What a scaler would say about the gradients that the parameters have now."""
    scales = torch.tensor(scales)
    found = unscale_([param.grad for param in params], scales, blocks, write=False)
    return GradScaling(scales, dict(zip(params, blocks, strict=True)), torch.tensor(skip), found.sum_of_squares)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variance_clip", [5.0, 0.02])
def test_float32_parameters_follow_float64(backend, variance_clip):
    rule = RULE | {"variance_clip": variance_clip}
    (param,) = make_params(torch.float32, shape=(33, 5))
    grads = [torch.randn(33, 5) * 10.0 ** torch.randint(-4, 1, (33, 5)) for _ in range(60)]
    truth, same_dtype = (adamw(param.detach().to(dtype), grads, **rule) for dtype in (torch.float64, torch.float32))
    assert (truth[2] == 0.02).any() == (variance_clip == 0.02)
    optimizer = AdamW16([param], **rule, backend=backend)
    for grad in grads:
        update(optimizer, [grad])
    state = optimizer.state[param]
    for actual, peer, true in zip((param, state["exp_avg"], state["exp_avg_sq"]), same_dtype, truth, strict=True):
        assert_within_budget(actual.detach(), peer, true)


def test_without_variance_clip_it_is_adamw_of_torch():
    (param,) = make_params(torch.float32)
    copy = nn.Parameter(param.detach().double())
    rule = {name: value for name, value in RULE.items() if name != "variance_clip"}
    optimizer, peer = AdamW16([param], **rule, variance_clip=math.inf), torch.optim.AdamW([copy], **rule)
    for _ in range(40):
        grad = torch.randn(5, 7) * 20
        copy.grad = grad.double()
        peer.step()
        update(optimizer, [grad])
    torch.testing.assert_close(param, copy.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_with_master_stays_within_the_error_of_its_moments(backend):
    """The bound follows each moment's rounding, 2^-10 and 2^-11 of it, through the averages and the quotient."""
    (param,) = make_params(torch.float16, shape=(40, 40))
    grads = [(torch.randn(40, 40) * 10.0 ** torch.randint(-3, 1, (40, 40))).half() for _ in range(50)]
    optimizer = AdamW16([param], **RULE, rounding="master", backend=backend)
    (beta1, beta2), lr, decay = RULE["betas"], RULE["lr"], 1 - RULE["lr"] * RULE["weight_decay"]
    p = param.detach().double()
    m, v, error_m, error_v, error_p = (torch.zeros_like(p) for _ in range(5))
    for step, grad in enumerate(grads, 1):
        error_m = beta1 * (error_m + 2.0**-10 * (m.abs() + error_m))
        error_v = beta2 * (error_v + 2.0**-11 * (v + error_v))
        m = beta1 * m + (1 - beta1) * grad.double()
        v = (beta2 * v + (1 - beta2) * grad.double() ** 2).clamp(max=RULE["variance_clip"])
        mean, spread = m / (1 - beta1**step), error_m / (1 - beta1**step)
        root = (v / (1 - beta2**step)).sqrt()
        low = ((v - error_v) / (1 - beta2**step)).clamp(min=0).sqrt()
        largest = (mean.abs() + spread) / (low + RULE["eps"]) - mean.abs() / (root + RULE["eps"])
        error_p = decay * error_p + lr * largest
        p = decay * p - lr * mean / (root + RULE["eps"])
        update(optimizer, [grad])
    master = optimizer.state[param]["master"]
    rounding = len(grads) * 4 * torch.finfo(torch.float32).eps * (p.abs() + 1)  # of float32, four roundings an update
    assert ((master.double() - p).abs() <= error_p + rounding).all()
    assert error_p.median() < 0.05 * lr * len(grads)  # which is how far it may go: the bound says something
    assert torch.equal(param, master.half())


@pytest.mark.parametrize("rounding", ["stochastic", "master"])
def test_reference_backend_is_the_reference_step_by_step(rounding):
    dtypes = (torch.float16, torch.float32, torch.bfloat16, torch.float16)
    params = make_params(*dtypes, shape=(3, 5, 4, 2))
    params[3] = nn.Parameter(params[3].detach().to(memory_format=torch.channels_last))
    seed = 2**64 - 3
    optimizer = AdamW16(params, **RULE, rounding=rounding, seed=seed, backend="reference")
    expected = []
    for param in params:
        wide = rounding == "master" or param.dtype == torch.float32
        kind = torch.float32 if param.dtype == torch.float32 else torch.int16
        zeros = torch.zeros_like(param, dtype=kind)
        expected.append([param.detach().to(torch.float32 if wide else param.dtype, copy=True), zeros, zeros])
    for step in range(1, 6):
        grads = [torch.randn(param.shape).to(param.dtype) for param in params]
        update(optimizer, grads)
        for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
            noise = None
            if rounding == "stochastic" and param.dtype != torch.float32:
                noise = reference.rounding_noise(param.numel(), seed=seed, index=index, step=step)
                if index == 3:  # its noise lies in the order of memory: batch, rows, columns, channels
                    noise = noise.view(3, 4, 2, 5).permute(0, 3, 1, 2)
                noise = noise.view(param.shape) if index != 3 else noise
            expected[index] = list(
                reference.adamw16_step(expected[index][0], grad, *expected[index][1:], step, noise=noise, **RULE)
            )
            state = optimizer.state[param]
            found = [state.get("master", param), state["exp_avg"], state["exp_avg_sq"]]
            assert_same([tensor.detach() for tensor in found], expected[index])
            assert torch.equal(param, expected[index][0].to(param.dtype))
            assert state["step"] == step


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearest_rounding_stalls_and_stochastic_does_not(backend):
    """A quadratic whose minimum is 128 units of float16 away, by updates of a fifth of a unit."""
    start, target, lr = 1.25, 1.125, 2e-4
    rule = {"lr": lr, "betas": (0.9, 0.96), "eps": 1e-8, "weight_decay": 0.0, "variance_clip": 5.0}
    nearest, moments = torch.full((512,), start).half(), torch.zeros(512, dtype=torch.int16)
    state = [nearest, moments, moments]
    param = nn.Parameter(nearest.clone())
    optimizer = AdamW16([param], **rule, backend=backend)
    for step in range(1, 1001):
        state = reference.adamw16_step(state[0], state[0] - target, *state[1:], step, **rule)
        update(optimizer, [param.detach() - target])
    assert torch.equal(state[0], nearest)
    unit = torch.finfo(torch.float16).eps
    assert abs(param.detach().double().mean() - target) < unit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding_has_the_right_mean(backend, dtype):
    """Under gradients that do not depend on the parameter the mean over elements is that of exact arithmetic."""
    count, updates = 1 << 14, 100
    rule = RULE | {"lr": 1e-4, "weight_decay": 0.0}
    param = nn.Parameter(torch.full((count,), 1.25, dtype=dtype))
    exact = [torch.full((1,), 1.25), torch.zeros(1, dtype=torch.int16), torch.zeros(1, dtype=torch.int16)]
    optimizer = AdamW16([param], **rule, backend=backend)
    for step in range(1, updates + 1):
        grad = torch.randn(1).to(dtype) + 1
        update(optimizer, [grad.expand(count)])
        exact = reference.adamw16_step(exact[0], grad, *exact[1:], step, **rule)
    # A rounding's standard deviation is at most half a unit.
    deviation = torch.finfo(dtype).eps / 2 * math.sqrt(updates / count)
    assert abs(param.detach().double().mean() - exact[0].double()) < 5 * deviation
    assert param.unique().numel() > 2


@pytest.mark.parametrize(("rounding", "bytes_per_element"), [("stochastic", 4), ("master", 8)])
def test_state_is_16_bit_where_the_parameter_is(rounding, bytes_per_element):
    params = make_params(torch.float16, torch.bfloat16, torch.float32)
    optimizer = AdamW16(params, **RULE, rounding=rounding)
    update(optimizer, [torch.randn_like(param) for param in params])
    for param, size in zip(params, (bytes_per_element, bytes_per_element, 8), strict=True):
        state = dict(optimizer.state[param])
        step = state.pop("step")
        assert step.dtype == torch.int64 and step.shape == () and step == 1
        assert sum(tensor.nbytes for tensor in state.values()) == size * param.numel()
        names = {"exp_avg", "exp_avg_sq"} | ({"master"} if size == 8 and param.dtype != torch.float32 else set())
        assert state.keys() == names
        kind = torch.float32 if param.dtype == torch.float32 else torch.int16
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == kind


def test_variance_is_clipped_in_the_words():
    (param,) = make_params(torch.float16)
    optimizer = AdamW16([param], lr=1e-3)
    update(optimizer, [torch.full((5, 7), 100.0).half()])
    assert (decode_0610(optimizer.state[param]["exp_avg_sq"]) == 5.0).all()
    assert (decode_169(optimizer.state[param]["exp_avg"]) - 10).abs().max() <= 10 * 2.0**-10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ["stochastic", "master"])
def test_scaled_gradients(backend, rounding):
    """Scales that are powers of two cancel, those of each block its own; so the bits are the same."""
    params = make_params(torch.float16, torch.float32, torch.float16)
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    optimizers = [AdamW16(ps, **RULE, rounding=rounding, grad_clip=3.0, backend=backend) for ps in (params, copies)]
    scales, blocks = [2.0**5, 2.0**-3], [1, 0, 0]
    for _ in range(4):
        grads = [torch.randn(param.shape).to(param.dtype) for param in params]
        update(optimizers[0], grads)
        for copy, grad, block in zip(copies, grads, blocks, strict=True):
            copy.grad = grad * scales[block]
        optimizers[1].step(scaling=scaling_of(copies, scales, blocks))
        assert_same(snapshot(optimizers[1]), snapshot(optimizers[0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ["stochastic", "master"])
def test_skipped_update_changes_nothing(backend, rounding):
    params = make_params(torch.float16, torch.float32, torch.bfloat16)
    optimizer = AdamW16(params, **RULE, rounding=rounding, grad_clip=4.0, backend=backend)
    grads = [torch.randn(param.shape).to(param.dtype) for param in params]
    for skips, steps in ((True, 0), (False, 1), (False, 2), (True, 2), (False, 3)):
        before = snapshot(optimizer) if optimizer.state else [param.detach().clone() for param in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad / 0 if skips else grad
        optimizer.step(scaling=scaling_of(params, [1.0], [0, 0, 0], skips))
        assert all(optimizer.state[param]["step"] == steps for param in params)
        after = snapshot(optimizer)
        if skips:
            assert_same(after[: len(before)], before)
        else:
            assert all(not torch.equal(one, other) for one, other in zip(after[:3], before[:3], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_clip_is_clip_grad_norm(backend):
    grads = [torch.randn(5, 7) * 3, torch.randn(5, 7), None]
    results = []
    for dtype, inside in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
        torch.manual_seed(1)
        params = [nn.Parameter(param.detach().to(dtype)) for param in make_params(*[torch.float32] * 3)]
        for param, grad in zip(params, grads, strict=True):
            param.grad = None if grad is None else grad.to(dtype)
        if not inside:
            assert torch.nn.utils.clip_grad_norm_(params, 4.0) > 4.0
        clipped = [param.grad for param in params[:2]]
        if dtype == torch.float64:
            results.append([adamw(p.detach(), [g], **RULE)[0] for p, g in zip(params, clipped, strict=False)])
            continue
        optimizer = AdamW16(params, **RULE, grad_clip=4.0 if inside else None, backend=backend)
        optimizer.step()
        results.append([param.detach() for param in params[:2]])
    for actual, same_dtype, truth in zip(*results, strict=True):
        assert_within_budget(actual, same_dtype, truth)


def test_grad_clip_leaves_small_gradients_alone():
    results = []
    for grad_clip in (None, 4.0):
        torch.manual_seed(1)
        params = make_params(torch.float16, torch.float32)
        optimizer = AdamW16(params, **RULE, grad_clip=grad_clip)
        update(optimizer, [torch.randn(5, 7).to(param.dtype) * 0.1 for param in params])
        results.append(snapshot(optimizer))
    assert_same(*results)
