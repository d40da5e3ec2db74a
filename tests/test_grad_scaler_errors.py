"""What ResblockGradScaler refuses: each message names the rule, then the value."""

import math
import re

import pytest
import torch
from scaled_models import make_parameters, run_update, scaler_of, set_gradients
from torch import nn

from dalle_fast import ResblockGradScaler


def module_of(*parameters: nn.Parameter) -> nn.Module:
    return nn.ParameterList(parameters)


P = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
FROZEN = nn.Parameter(torch.zeros(2), requires_grad=False)
ON_META = nn.Parameter(torch.zeros(2, device="meta"))
SHARED = module_of(P[0])


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        ([], ValueError, "blocks must hold at least one block, got none"),
        ([SHARED, [P[1]], SHARED], ValueError, "a block must be listed once, blocks 0 and 2 are the same object"),
        (
            [module_of(P[1], P[0]), [P[2], P[0]]],
            ValueError,
            "a parameter must be listed once, parameter 1 of block 1 is parameter 1 (1) of block 0",
        ),
        ([[P[0], P[0]]], ValueError, "a parameter must be listed once, parameter 1 of block 0 is parameter 0 of block"),
        ([[P[0]], []], ValueError, "a block must have a trainable parameter, block 1 has none of 0"),
        ([nn.GELU()], ValueError, "a block must have a trainable parameter, block 0 has none of 0"),
        ([[FROZEN]], ValueError, "a block must have a trainable parameter, block 0 has none of 1"),
        ([P[0]], TypeError, "blocks must be modules or iterables of parameters, block 0 is a Parameter"),
        ([3], TypeError, "blocks must be modules or iterables of parameters, block 0 is a int"),
        (
            [[P[0], "w"]],
            TypeError,
            "blocks must be modules or iterables of parameters, parameter 1 of block 0 is a str",
        ),
        (
            [[P[0]], [ON_META]],
            ValueError,
            "blocks must be on one device, not meta, got cpu and meta: parameter 0 of block 1",
        ),
        ([[ON_META]], ValueError, "blocks must be on one device, not meta, got meta and meta"),
    ],
)
def test_blocks_that_are_refused(blocks, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ResblockGradScaler(blocks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"init_scale": 64.0},
            "init_scale must lie between min_scale and max_scale, all > 0, got 64.0, 128.0, 16777216",
        ),
        (
            {"init_scale": 2.0**25},
            "init_scale must lie between min_scale and max_scale, all > 0, got 33554432.0, 128.0",
        ),
        ({"init_scale": math.nan}, "init_scale must lie between min_scale and max_scale, all > 0, got nan"),
        ({"min_scale": 0.0}, "init_scale must lie between min_scale and max_scale, all > 0, got 8192.0, 0.0"),
        (
            {"min_scale": 2.0**-150},
            "min_scale * replicas must be at least 1.1754943508222875e-38, got 7.006492321624085e-46 * 1",
        ),
        ({"max_scale": math.inf}, "max_scale * replicas must be at most 3.4028234663852886e+38, got inf * 1"),
        (
            {"max_scale": 2.0**127, "replicas": 2},
            "max_scale * replicas must be at most 3.4028234663852886e+38, got 1.7",
        ),
        ({"growth_factor": 0.99}, "growth_factor must be finite and >= 1, got 0.99"),
        ({"growth_factor": math.inf}, "growth_factor must be finite and >= 1, got inf"),
        ({"backoff_factor": 0.0}, "backoff_factor must lie in (0, 1), got 0.0"),
        ({"backoff_factor": 1.0}, "backoff_factor must lie in (0, 1), got 1.0"),
        ({"backoff_interval": 0}, "backoff_interval must be an integer >= 1, got 0"),
        ({"backoff_interval": 1.5}, "backoff_interval must be an integer >= 1, got 1.5"),
        ({"replicas": 0}, "replicas must be an integer >= 1, got 0"),
    ],
)
def test_numbers_that_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ResblockGradScaler([[P[0]]], **options)


def half_outside(parameters):
    outside = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    return torch.optim.SGD([{"params": parameters}, {"params": [outside]}])


def half_inside(dtype):
    def change(parameters):
        parameters[1].data = parameters[1].data.to(dtype)
        parameters[1].grad_dtype = None
        parameters[1].grad = torch.ones(2, dtype=torch.float16)
        return torch.optim.SGD(parameters)

    return change


def with_gradient(index, grad):
    def change(parameters):
        parameters[index].grad = grad
        return torch.optim.SGD([(f"w{i}", parameter) for i, parameter in enumerate(parameters)])

    return change


def on_meta(parameters):
    outside = nn.Parameter(torch.zeros(2, device="meta"))
    outside.grad = torch.zeros(2, device="meta")
    return torch.optim.SGD([*parameters, outside])


def without_gradients(parameters):
    return torch.optim.SGD(make_parameters(2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            half_outside,
            TypeError,
            "a 16-bit parameter must belong to a block, parameter 0 of param_groups[1] is torch.bfloat16: "
            "keep it in float32 or add its block",
        ),
        (
            with_gradient(1, None),
            ValueError,
            "every trainable parameter of a block must have a gradient, parameter 0 of",
        ),
        (
            with_gradient(0, torch.ones(2).to_sparse()),
            TypeError,
            "gradients must be dense, that of parameter 0 of block 0 has layout torch.sparse_coo",
        ),
        (
            with_gradient(2, torch.ones(2).to_sparse()),
            TypeError,
            "gradients must be dense, that of parameter 2 (w2) of param_groups[0] has layout torch.sparse_coo",
        ),
        (
            half_inside(torch.float32),
            TypeError,
            "gradients must be float16, bfloat16, float32 or float64, as their parameters are, that of parameter 0 of "
            "block 1 is torch.float16 and the parameter torch.float32",
        ),
        (
            half_inside(torch.float16),
            TypeError,
            "float16 gradients would lose what falls below float16 when they are unscaled in place, that of parameter "
            "0 of block 1 is float16: use an optimizer that reads scaled gradients (dalle_fast.AdamW16)",
        ),
        (
            on_meta,
            ValueError,
            "gradients must be on the blocks' device, cpu, that of parameter 3 of param_groups[0] is on meta",
        ),
        (without_gradients, ValueError, "the optimizer's parameters must have gradients, none of 2 has one"),
    ],
)
def test_gradients_that_are_refused(change, error, message):
    """Before anything is unscaled."""
    scaler, parameters, _ = scaler_of(2)
    set_gradients(parameters)
    optimizer = change(parameters)
    with pytest.raises(error, match=re.escape(message)):
        scaler.unscale_(optimizer)
    grad = parameters[0].grad
    assert grad.is_sparse or (grad == 1).all()
    with pytest.raises(RuntimeError, match=re.escape("unscale_(optimizer) must come before update()")):
        scaler.update()


def test_gradient_of_another_kind_of_number():
    scaler, parameters, _ = scaler_of(1)
    set_gradients(parameters)
    outside = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    outside.grad = torch.zeros_like(outside)
    message = "that of parameter 0 of param_groups[0] is torch.complex64 and the parameter torch.complex64"
    with pytest.raises(TypeError, match=re.escape(message)):
        scaler.unscale_(torch.optim.SGD([outside, *parameters]))


def test_order_of_the_calls():
    scaler, parameters, optimizer = scaler_of(1)
    set_gradients(parameters)

    def assert_refused(call, message, error=RuntimeError):
        with pytest.raises(error, match=re.escape(message)):
            call()

    assert_refused(lambda: scaler.step(optimizer), "unscale_(optimizer) must come before step(optimizer)")
    assert_refused(scaler.update, "unscale_(optimizer) must come before update()")
    assert_refused(lambda: scaler.grad_norm, "unscale_(optimizer) must come before grad_norm")
    scaler.unscale_(optimizer)
    twice = "unscale_ may be called once for an optimizer between two updates, got a second call"
    assert_refused(lambda: scaler.unscale_(optimizer), twice)
    assert_refused(lambda: scaler.step(optimizer, lambda: None), "step takes no closure", ValueError)
    assert_refused(lambda: scaler.step(optimizer, closure=lambda: None), "step takes no closure", ValueError)
    scaler.step(optimizer)
    stepped = "step may be called once for an optimizer between two updates, got a second call"
    assert_refused(lambda: scaler.step(optimizer), stepped)
    assert_refused(lambda: scaler.unscale_(optimizer), twice)
    scaler.update()
    assert_refused(scaler.update, "unscale_(optimizer) must come before update()")
    assert_refused(lambda: scaler.step(optimizer), "unscale_(optimizer) must come before step(optimizer)")
    run_update(scaler, optimizer)


def test_a_gradient_is_unscaled_once():
    """A parameter of two optimizers would be divided by its scale twice."""
    scaler, parameters, optimizer = scaler_of(1)
    set_gradients(parameters)
    scaler.unscale_(optimizer)
    before = [parameter.grad.clone() for parameter in parameters]
    message = "a parameter must belong to one optimizer, parameter 0 of block 0 was unscaled through another"
    with pytest.raises(ValueError, match=re.escape(message)):
        scaler.unscale_(torch.optim.SGD(parameters))
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(parameters, before, strict=True))


def test_a_failing_step_leaves_nothing_behind():
    scaler, parameters, _ = scaler_of(1)
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    set_gradients(parameters)
    scaler.unscale_(optimizer)

    def fail(*_):
        assert optimizer.found_inf == 0
        raise MemoryError

    with optimizer.register_step_pre_hook(fail) as handle, pytest.raises(MemoryError):
        scaler.step(optimizer)
    handle.remove()
    assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")
    assert scaler.step(optimizer)


def test_update_wants_every_block():
    scaler, parameters, _ = scaler_of(2)
    set_gradients(parameters)
    scaler.unscale_(torch.optim.SGD([parameters[0], parameters[2]]))
    message = (
        "every trainable parameter of a block must be unscaled before update(), through the optimizer that owns it, "
        "parameter 0 of block 1 was not: make the scaler after fully_shard, or freeze the parameter"
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        scaler.update()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": torch.tensor([2.0**13, 64.0])}, "scales must lie in [128.0, 16777216.0], got 64.0 of block 1"),
        (
            {"scales": torch.tensor([2.0**25, 256.0])},
            "scales must lie in [128.0, 16777216.0], got 33554432.0 of block 0",
        ),
        ({"scales": torch.tensor([math.nan, 256.0])}, "scales must lie in [128.0, 16777216.0], got nan of block 0"),
        ({"scales": torch.full((3,), 256.0)}, "state_dict must be of 2 blocks, got 3"),
        ({"scales": torch.tensor(256.0)}, "scales must have shape (2,), got ()"),
        ({"skips": torch.zeros(2, dtype=torch.int64)}, "skips must have shape (3,), got (2,)"),
        ({"updates": torch.tensor(-1)}, "updates must be >= 0, got -1"),
        ({"skips": torch.tensor([0.0, 1.0, torch.nan])}, "skips must be >= 0, got nan"),
        ({"replicas": torch.tensor(0)}, "replicas must be >= 1, got 0"),
        (
            {"skips": None},
            "state_dict must have the fields scales, updates_since_backoff, skips, streaks, updates, skip",
        ),
        ({"scale": torch.ones(1)}, "updates, skipped, replicas, scale"),
    ],
)
def test_states_that_are_refused(change, message):
    """And leave the scaler as it was."""
    scaler, parameters, optimizer = scaler_of(2)
    set_gradients(parameters, {1})
    run_update(scaler, optimizer)
    before = scaler.report()
    state = {name: value for name, value in (scaler.state_dict() | change).items() if value is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        scaler.load_state_dict(state)
    assert scaler.report() == before
