"""AdamW16's state: saved and restored bit for bit, converted, copied; its groups; what it refuses."""

import copy
import io
import math
import pickle
import re

import pytest
import torch
from optim_steps import BACKENDS, RULE, assert_same, make_params, snapshot, update
from torch import Tensor, nn

from dalle_fast import AdamW16
from dalle_fast.formats import decode_0610, decode_169, encode_0610, encode_169

MIXED = (torch.float16, torch.float32, torch.bfloat16, torch.float16)


def mixed_params(memory_format: torch.memory_format = torch.contiguous_format) -> list[nn.Parameter]:
    params = make_params(*MIXED, shape=(4, 3, 2, 5))
    return [nn.Parameter(param.detach().to(memory_format=memory_format)) for param in params]


def random_grads(params: list[nn.Parameter], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(param.shape, generator=generator).to(param.dtype) for param in params]


def saved_and_loaded(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ["stochastic", "master"])
def test_resumed_run_is_the_uninterrupted_one(rounding, backend):
    options = RULE | {"rounding": rounding, "seed": 5, "grad_clip": 4.0, "backend": backend}
    params = mixed_params()
    optimizer = AdamW16(params, **options)
    for step in range(3):
        grads = random_grads(params, step)
        update(optimizer, [None if step == 1 and index == 2 else grad for index, grad in enumerate(grads)])
    weights, state = saved_and_loaded([param.detach() for param in params]), saved_and_loaded(optimizer.state_dict())
    resumed = [nn.Parameter(weight) for weight in weights]
    other = AdamW16(resumed, **options)
    other.load_state_dict(state)
    assert_same(snapshot(other), snapshot(optimizer))
    for step in range(3, 6):
        for run, own in ((optimizer, params), (other, resumed)):
            update(run, random_grads(own, step))
        assert_same(snapshot(other), snapshot(optimizer))
    assert [int(optimizer.state[param]["step"]) for param in params] == [6, 6, 5, 6]


@pytest.mark.parametrize(("saved", "own"), [("contiguous_format", "channels_last"), ("channels_last",) * 2])
def test_state_takes_the_memory_format_of_its_parameter(saved, own):
    saved, own = getattr(torch, saved), getattr(torch, own)
    params = mixed_params(saved)
    optimizer = AdamW16(params, **RULE, rounding="master")
    update(optimizer, random_grads(params, 0))
    copies = [nn.Parameter(param.detach().clone(memory_format=own)) for param in params]
    other = AdamW16(copies, **RULE, rounding="master")
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for param in copies:
        for name, value in other.state[param].items():
            assert name == "step" or value.stride() == param.stride()
    for run, tensors in ((optimizer, params), (other, copies)):
        update(run, random_grads(tensors, 1))
    assert_same(snapshot(other), snapshot(optimizer))


def test_loaded_state_is_a_copy():
    params = mixed_params()
    optimizer, other = AdamW16(params, **RULE), AdamW16(params, **RULE)
    update(optimizer, random_grads(params, 0))
    other.load_state_dict(optimizer.state_dict())
    before = [value.clone() for param in params for value in optimizer.state[param].values()]
    update(other, random_grads(params, 1))
    assert_same([value for param in params for value in optimizer.state[param].values()], before)


@pytest.mark.parametrize("rounding", ["stochastic", "master"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_the_optimizer_go_on_alike(duplicate, rounding):
    params = mixed_params()
    optimizer = AdamW16(params, **RULE, rounding=rounding, seed=3, grad_clip=1.0)
    update(optimizer, random_grads(params, 0))
    copies, other = duplicate((params, optimizer))
    for step in (1, 2):
        update(optimizer, random_grads(params, step))
        update(other, random_grads(copies, step))
        assert_same(snapshot(other), snapshot(optimizer))
    assert all(other.state[param]["step"] == 3 for param in copies)


def test_pickled_counters_do_not_grow_with_each_other():
    def size(count: int) -> int:
        optimizer = AdamW16(make_params(*[torch.float32] * count, shape=(1,)), **RULE)
        update(optimizer, [torch.ones(1)] * count)
        return len(pickle.dumps(optimizer))

    assert size(400) - size(200) < 1.1 * (size(200) - size(1))


def test_hooks_of_others_see_the_state_as_it_is():
    params = mixed_params()
    optimizer, other = AdamW16(params, **RULE), AdamW16(params, **RULE)
    update(optimizer, random_grads(params, 0))
    seen = []
    other.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["state"][0]["exp_avg"].dtype))
    other.register_load_state_dict_post_hook(lambda own: seen.append(own.state[params[0]]["exp_avg"].dtype))
    for _ in range(2):
        other.load_state_dict(optimizer.state_dict())
    assert seen == [torch.int16] * 4


def test_state_of_torch_is_converted():
    """Moments of torch's AdamW become words where the parameter is 16-bit, and its other numbers come along."""
    params = mixed_params()
    peer = torch.optim.AdamW(params, lr=3e-3, betas=(0.8, 0.9), weight_decay=0.1)
    for step in range(2):
        update(peer, random_grads(params, step))
    optimizer = AdamW16(params, **RULE)
    optimizer.load_state_dict(saved_and_loaded(peer.state_dict()))
    for param in params:
        state, source = optimizer.state[param], peer.state[param]
        assert state["step"] == 2 and state["step"].dtype == torch.int64
        if param.dtype == torch.float32:
            assert_same([state["exp_avg"], state["exp_avg_sq"]], [source["exp_avg"], source["exp_avg_sq"]])
        else:
            assert torch.equal(state["exp_avg"], encode_169(source["exp_avg"].float()))
            assert torch.equal(state["exp_avg_sq"], encode_0610(source["exp_avg_sq"].float()))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["variance_clip"]) == (3e-3, (0.8, 0.9), 5.0)
    update(optimizer, random_grads(params, 2))
    assert all(optimizer.state[param]["step"] == 3 for param in params)


def test_words_are_decoded_for_a_parameter_that_is_float32_now():
    (param,) = make_params(torch.float16)
    optimizer = AdamW16([param], **RULE)
    update(optimizer, [torch.randn(5, 7).half()])
    wide = nn.Parameter(param.detach().float())
    other = AdamW16([wide], **RULE)
    other.load_state_dict(optimizer.state_dict())
    state, source = other.state[wide], optimizer.state[param]
    assert torch.equal(state["exp_avg"], decode_169(source["exp_avg"]))
    assert torch.equal(state["exp_avg_sq"], decode_0610(source["exp_avg_sq"]))


def test_change_of_rounding():
    """A master that is missing starts as the parameter; one that nobody needs is left out."""
    params = mixed_params()
    stochastic, master = AdamW16(params, **RULE), AdamW16(params, **RULE, rounding="master")
    update(stochastic, random_grads(params, 0))
    master.load_state_dict(stochastic.state_dict())
    start = [param.detach().clone() for param in params]
    update(master, random_grads(params, 1))
    copies = [nn.Parameter(param.float()) for param in start]
    wide = AdamW16(copies, **RULE)
    wide.load_state_dict(stochastic.state_dict())
    assert torch.equal(master.state[params[0]]["master"].half(), params[0])
    assert not torch.equal(master.state[params[0]]["master"], params[0].float())
    stochastic.load_state_dict(master.state_dict())
    assert all("master" not in stochastic.state[param] for param in params)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda state: state["state"][0].update(exp_avg=torch.zeros(3)),
            ValueError,
            "exp_avg must have its parameter's shape (4, 3, 2, 5), got (3,)",
        ),
        (
            lambda state: state["state"][0].update(exp_avg_sq=torch.zeros(4, 3, 2, 5, dtype=torch.int64)),
            TypeError,
            "exp_avg_sq must be floating point or int16, got torch.int64",
        ),
        (
            lambda state: state["state"][0].update(master=torch.zeros(4, 3, 2, 5, dtype=torch.int16)),
            TypeError,
            "master must be floating point, got torch.int16",
        ),
        (
            lambda state: state["state"].update({0: {"momentum_buffer": torch.zeros(4, 3, 2, 5)}}),
            ValueError,
            "state must have step, exp_avg, exp_avg_sq and perhaps master, got momentum_buffer",
        ),
        (
            lambda state: state["param_groups"][0].update(maximize=True),
            ValueError,
            "maximize is not part of AdamW16, got a state with maximize=True",
        ),
        (
            lambda state: state["param_groups"][0].update(decoupled_weight_decay=False),
            ValueError,
            "weight decay must be decoupled, got the state of Adam, weight_decay=0.045",
        ),
        (
            lambda state: state["param_groups"][0].update(lr=torch.tensor(0.1)),
            TypeError,
            "lr must be a number, got Tensor",
        ),
        (
            lambda state: state["param_groups"][0]["params"].pop(),
            ValueError,
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group",
        ),
        (
            lambda state: state["param_groups"].append(state["param_groups"][0]),
            ValueError,
            "loaded state dict has a different number of parameter groups",
        ),
    ],
)
def test_refused_states_change_nothing(change, error, message):
    params = mixed_params()
    optimizer = AdamW16(params, **RULE, rounding="master")
    update(optimizer, random_grads(params, 0))
    state, before = copy.deepcopy(optimizer.state_dict()), snapshot(optimizer)
    change(state)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        optimizer.load_state_dict(state)
    assert_same(snapshot(optimizer), before)
    update(optimizer, random_grads(params, 1))


def test_groups_have_their_own_numbers():
    dtypes = (torch.float16, torch.float32)
    changes = [{}, {"lr": 0.1, "weight_decay": 0.0}, {"betas": (0.5, 0.6), "eps": 1e-3, "variance_clip": 0.1}]
    params = [make_params(*dtypes) for _ in changes]
    copies = copy.deepcopy(params)
    groups = [{"params": own} | change for own, change in zip(params, changes, strict=True)]
    optimizer = AdamW16(groups[:2], **RULE, rounding="master")
    separate = [AdamW16(own, **(RULE | change), rounding="master") for own, change in zip(copies, changes, strict=True)]
    for step in range(4):
        if step == 2:
            optimizer.add_param_group(groups[2])
        grads = [random_grads(own, step) for own in params[: len(optimizer.param_groups)]]
        update(optimizer, [grad for own in grads for grad in own])
        for alone, own in zip(separate, grads, strict=False):
            update(alone, own)
    assert_same(snapshot(optimizer)[6:], [value for alone in separate for value in snapshot(alone)[2:]])
    assert_same(snapshot(optimizer)[:6], [value for alone in separate for value in snapshot(alone)[:2]])
    assert [int(optimizer.state[own[0]]["step"]) for own in params] == [4, 4, 2]


def test_scheduler_moves_the_step_size():
    runs = []
    for scheduled in (True, False):
        torch.manual_seed(1)
        params = make_params(*MIXED)
        optimizer = AdamW16(params, **RULE)
        scheduler = (
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=3) if scheduled else None
        )
        for step in range(5):
            if not scheduled:
                optimizer.param_groups[0]["lr"] = RULE["lr"] * min(0.25 + 0.25 * step, 1.0)
            update(optimizer, random_grads(params, step))
            if scheduled:
                scheduler.step()
        runs.append([param.detach() for param in params])
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=2 * torch.finfo(one.dtype).eps, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_is_the_seed_the_place_and_the_count(backend):
    """Other parameters' gradients, and updates that did not happen, make no difference to one parameter."""

    def run(seed: int, with_others: bool) -> list[Tensor]:
        torch.manual_seed(1)
        params = make_params(torch.float16, torch.float16, shape=(300,))
        optimizer = AdamW16(params, **RULE, seed=seed, backend=backend)
        for step in range(3):
            first, second = random_grads(params, step)
            update(optimizer, [first if with_others else None, second])
        return [param.detach() for param in params]

    both, alone = run(7, True), run(7, False)
    assert_same(both, run(7, True))
    assert torch.equal(both[1], alone[1]) and not torch.equal(both[0], alone[0])
    assert not torch.equal(run(7 + 2**40, True)[1], both[1])


def test_rounding_of_two_parameters_differs():
    params = [nn.Parameter(torch.full((400,), 1.25).half()) for _ in range(2)]
    optimizer = AdamW16(params, **RULE | {"lr": 1e-4})
    update(optimizer, [torch.ones(400).half()] * 2)
    assert not torch.equal(*params)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be finite and >= 0, got -1.0"),
        ({"lr": math.nan}, ValueError, "lr must be finite and >= 0, got nan"),
        ({"lr": torch.tensor(0.1)}, TypeError, "lr must be a number, got Tensor"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas must be two numbers in [0, 1), got (0.9, 1.0)"),
        ({"betas": (0.9,)}, ValueError, "betas must be two numbers in [0, 1), got (0.9,)"),
        ({"eps": 0.0}, ValueError, "eps must be > 0, got 0.0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be >= 0, got -0.1"),
        ({"variance_clip": 0.0}, ValueError, "variance_clip must be > 0, got 0.0"),
        ({"grad_clip": 0.0}, ValueError, "grad_clip must be > 0 or None, got 0.0"),
        ({"rounding": "nearest"}, ValueError, "rounding must be one of stochastic, master, got 'nearest'"),
        ({"seed": 2**64}, ValueError, "seed must lie in [0, 2^64), got 18446744073709551616"),
        ({"seed": -1}, ValueError, "seed must lie in [0, 2^64), got -1"),
        ({"seed": 1.0}, TypeError, "seed must be an int, got float"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto, triton, cpp, reference, got 'cuda'"),
    ],
)
def test_arguments_are_checked(options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        AdamW16(make_params(torch.float16), **RULE | options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int32])
def test_parameters_of_other_dtypes_are_refused(dtype):
    param = nn.Parameter(torch.zeros(3, dtype=dtype), requires_grad=dtype.is_floating_point)
    message = f"parameters must be float32, float16 or bfloat16, got {dtype}"
    with pytest.raises(TypeError, match=f"^{message}$"):
        AdamW16([param], lr=1e-3)
    optimizer = AdamW16(make_params(torch.float32), lr=1e-3)
    with pytest.raises(TypeError, match=f"^{message}$"):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


def test_parameters_on_two_devices_are_refused():
    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, device="meta"))]
    with pytest.raises(ValueError, match=r"^parameters must be on one device, got cpu and meta$"):
        AdamW16(params, lr=1e-3)


def test_gradients_are_checked_before_anything_changes():
    params = make_params(torch.float32, torch.float16)
    optimizer = AdamW16(params, **RULE)
    update(optimizer, random_grads(params, 0))
    before = snapshot(optimizer)
    params[0].grad = torch.ones(5, 7).to_sparse()
    with pytest.raises(TypeError, match=r"^gradients must be dense, got layout torch\.sparse_coo$"):
        optimizer.step()
    params[0].grad = torch.ones(5, 7)
    params[1].grad = None
    params[1].grad_dtype = torch.float32
    params[1].grad = torch.ones(5, 7)
    message = r"^gradients must have their parameter's dtype torch\.float16, got torch\.float32$"
    with pytest.raises(TypeError, match=message):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_parameter_that_changed_its_dtype_is_refused():
    module = nn.Linear(3, 3)
    optimizer = AdamW16(module.parameters(), **RULE)
    update(optimizer, [torch.ones(3, 3), torch.ones(3)])
    module.half()
    with pytest.raises(RuntimeError, match=r"^a parameter must keep its dtype and device from its first update on"):
        update(optimizer, [torch.ones(3, 3).half(), torch.ones(3).half()])
