"""ResblockGradScaler: the rule of its scales, the steps it skips, its report and its state."""

import copy
import math
import random

import pytest
import torch
from scaled_models import Residual, ScaledSGD, make_parameters, run_update, scaler_of, set_gradients
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dalle_fast import ResblockGradScaler, scaled_resblock
from dalle_fast.ops.grad_scale import GradScaling

STEP = 2 ** (1 / 1000)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1),
    "fused SGD": lambda params: torch.optim.SGD(params, lr=0.1, fused=True),
    "fused Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1, fused=True),
    "fused AdamW": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "reading SGD": ScaledSGD,
}


class PaperRule:
    """Section 4.2's table in plain numbers: a scale is 2 ** (thousandths / 1000), exactly."""

    def __init__(self, log_replicas: int, log_max: int):
        self.smallest, self.largest = 1000 * (7 + log_replicas), 1000 * (log_max + log_replicas)
        self.thousandths, self.last_backoff = 1000 * (13 + log_replicas), None

    def update(self, number: int, nonfinite: bool) -> None:
        if not nonfinite:
            self.thousandths += 1
        elif self.last_backoff is None or number - self.last_backoff >= 125:
            self.thousandths -= 500
            self.last_backoff = number
        self.thousandths = min(max(self.thousandths, self.smallest), self.largest)


@pytest.mark.parametrize("log_replicas", [0, 3])
def test_follows_the_rule(log_replicas):
    """Blocks that overflow never, always, now and then, in stretches and around the edge of the window."""
    scaler, parameters, optimizer = scaler_of(6, max_scale=2.0**14, replicas=2**log_replicas)
    rules = [PaperRule(log_replicas, 14) for _ in range(6)]
    rng = random.Random(log_replicas)
    edge = {1, 125, 126, 250, 251, 376, 501, 625, 626}  # 126 is the first after 1 that may back off
    updates, skipped, skips, limits = 2000, 0, [0] * 7, set()
    for number in range(1, updates + 1):
        flags = [
            False,
            number <= 1400,
            rng.random() < 0.05,
            (number // 300) % 2 == 1,
            number in edge,
            number % rng.choice((124, 125, 126)) == 0,
            rng.random() < 0.01,  # of the rest
        ]
        set_gradients(parameters, {i for i, flag in enumerate(flags) if flag}, rng.choice((math.inf, math.nan)))
        assert run_update(scaler, optimizer) == (not any(flags))
        for rule, flag in zip(rules, flags, strict=False):
            rule.update(number, flag)
        skipped += any(flags)
        skips = [count + flag for count, flag in zip(skips, flags, strict=True)]
        expected = torch.tensor([2 ** (rule.thousandths / 1000) for rule in rules], dtype=torch.float64)
        # Every update rounds once, by up to half an eps: such errors add up as their squares do.
        tolerance = 4 * math.sqrt(number) * torch.finfo(torch.float32).eps / 2
        torch.testing.assert_close(scaler.scales().double(), expected, rtol=tolerance, atol=0)
        limits |= {rule.thousandths for rule in rules} & {rules[0].smallest, rules[0].largest}
    assert len(limits) == 2  # both were reached
    report = scaler.report()
    assert (report.updates, report.skipped) == (updates, skipped)
    assert [*report.skips, report.rest_skips] == skips


def test_numbers_of_the_paper():
    scaler = scaler_of(2)[0]
    assert scaler.get_scale() == [2.0**13] * 2
    assert (scaler.min_scale, scaler.max_scale, scaler.growth_factor) == (2.0**7, 2.0**24, STEP)
    assert (scaler.backoff_factor, scaler.backoff_interval) == (2**-0.5, 125)
    of_many = scaler_of(1, replicas=1024)[0]
    assert (of_many.get_scale(), of_many.min_scale, of_many.max_scale) == ([2.0**23], 2.0**17, 2.0**34)


def test_views_stay_live_and_copies_do_not_move():
    scaler, parameters, optimizer = scaler_of(2)
    views, before, first = scaler.block_scales, scaler.scales(), scaler.get_scale()
    set_gradients(parameters, {1})
    run_update(scaler, optimizer)
    assert [view.item() for view in views] == scaler.get_scale() == scaler.scales().tolist() != first
    assert all(view.dtype == torch.float32 and view.ndim == 0 for view in views)
    assert before.tolist() == first
    assert scaler.scales()[0] == torch.tensor(2.0**13 * STEP)
    assert scaler.scales()[1] == torch.tensor(2.0**12.5)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_like_a_run_without_scales(kind):
    """Gradients are those of the plain model, and updates with a non-finite gradient leave no trace."""
    model = Residual()
    plain = copy.deepcopy(model)
    optimizer, plain_optimizer = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](plain.parameters())
    scaler = ResblockGradScaler(model.blocks, growth_factor=2.0, backoff_factor=0.5)  # powers of two change no rounding
    for number in range(6):
        tokens = torch.randint(10, (2, 5))
        scaler.scale(model(tokens, scaler.block_scales)).backward()
        if number % 2:
            model.blocks[1][0].weight.grad[0, 0] = math.nan
        assert run_update(scaler, optimizer) is (number % 2 == 0)
        assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")
        if number % 2 == 0:
            plain(tokens, [1.0] * 3).backward()
            norm = torch.cat([p.grad.double().flatten() for p in plain.parameters()]).norm()
            torch.testing.assert_close(scaler.grad_norm, norm, rtol=1e-6, atol=0)
            if isinstance(plain_optimizer, ScaledSGD):
                one = torch.ones(1), dict.fromkeys(plain.parameters(), 0), torch.tensor(False), norm
                plain_optimizer.step(scaling=GradScaling(*one))
            else:
                plain_optimizer.step()
        else:
            assert scaler.grad_norm == math.inf
        optimizer.zero_grad()
        plain_optimizer.zero_grad()
    for actual, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_a_step_skipped_for_any_optimizer_skips_all():
    scaler, parameters, _ = scaler_of(2, init_scale=2.0, min_scale=1.0)
    optimizers = [ScaledSGD(parameters[:1]), torch.optim.SGD(parameters[1:], lr=0.1)]
    for bad in ({0}, {2}, set()):
        set_gradients(parameters, bad)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        assert [scaler.step(optimizer) for optimizer in optimizers] == [not bad] * 2
        expected = math.inf if bad else math.sqrt(2 + sum(2 / scale**2 for scale in scaler.get_scale()))
        torch.testing.assert_close(scaler.grad_norm, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)
        scaler.update()
        assert all((parameter == 0).all() for parameter in parameters) == bool(bad)
    assert scaler.report().skips == [1, 0] and scaler.report().rest_skips == 1


def test_what_an_optimizer_that_reads_scaled_gradients_gets():
    scaler, parameters, _ = scaler_of(2)
    optimizer = ScaledSGD(parameters)
    set_gradients(parameters)
    run_update(scaler, optimizer)
    (scaling,) = optimizer.scalings
    assert [scaling.block_of[parameter] for parameter in parameters] == [0, 1, 2]
    assert scaling.scales.shape == (3,) and scaling.scales[2] == 1
    assert scaling.skip.dtype == torch.bool and scaling.sum_of_squares.dtype == torch.float64
    assert all((parameter.grad == 1).all() for parameter in parameters)


def test_half_precision_branches():
    """float16 branches whose gradients fall below float16 unscaled learn as a float32 model does."""
    model = Residual(dtype=torch.float16)
    optimizer = ScaledSGD(model.parameters(), lr=0.0)
    scaler = ResblockGradScaler(model.blocks)
    tokens = torch.randint(10, (2, 5))
    small = 2.0**-24  # of the loss
    (small * model(tokens, scaler.block_scales)).backward()
    run_update(scaler, optimizer)
    unscaled = [p.grad.double() / 2.0**13 for p in model.blocks.parameters()]
    wide = Residual().double()
    wide.load_state_dict(model.state_dict())
    wide.dtype = torch.float64
    (small * wide(tokens, [1.0] * 3)).backward()
    for actual, parameter in zip(unscaled, wide.blocks.parameters(), strict=True):
        error = (actual - parameter.grad).norm() / parameter.grad.norm()
        assert error < 0.02
    model.zero_grad()
    (small * model(tokens, [1.0] * 3)).backward()
    assert all((p.grad == 0).all() for p in model.blocks.parameters())


def test_nan_loss_blames_no_block():
    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = ResblockGradScaler(model.blocks)
    before = copy.deepcopy(model.state_dict())
    (model(torch.randint(10, (2, 5)), scaler.block_scales) * math.nan).backward()
    assert model.embedding.weight.grad.isnan().any()
    assert not run_update(scaler, optimizer)
    report = scaler.report()
    assert (report.skips, report.rest_skips, report.skipped) == ([0, 0, 0], 1, 1)
    assert report.scales == [torch.tensor(2.0**13 * STEP).item()] * 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_overflow_of_one_branch_blames_that_block():
    model = Residual(dtype=torch.float16)
    optimizer = ScaledSGD(model.parameters())
    scaler = ResblockGradScaler(model.blocks, init_scale=2.0**24)
    scaler.block_scales[0].fill_(2.0**13), scaler.block_scales[2].fill_(2.0**13)
    model(torch.randint(10, (2, 5)), scaler.block_scales).backward()
    assert not run_update(scaler, optimizer)
    assert scaler.report().skips == [0, 1, 0] and scaler.report().rest_skips == 0


def test_reports_a_block_at_its_floor():
    """From 2**13 to 2**7 are 12 back-offs, of which the first comes at once."""
    scaler, parameters, optimizer = scaler_of(3)
    floor = 1 + 11 * 125
    for number in range(1, floor + 1):
        set_gradients(parameters, {0, 2})
        run_update(scaler, optimizer)
        if number == floor - 1:
            assert scaler.report().stuck == [] and scaler.report().warning is None
    report = scaler.report()
    assert report.scales == [
        2.0**7,
        pytest.approx(2 ** (13 + floor / 1000), rel=4 * math.sqrt(floor) * 2.0**-24),
        2.0**7,
    ]
    assert report.stuck == [0, 2] and report.streaks == [floor, 0, floor] and report.skips == [floor, 0, floor]
    assert (report.updates, report.skipped, report.rest_streak) == (floor, floor, 0)
    assert report.warning == (
        "2 of 3 blocks (0, 2) had non-finite gradients in each of the last 1376 updates, "
        "with the scale at its smallest, 128"
    )
    set_gradients(parameters)
    run_update(scaler, optimizer)
    assert scaler.report().stuck == [] and scaler.report().streaks == [0, 0, 0]


def test_reports_a_loss_that_stays_nan():
    scaler, parameters, optimizer = scaler_of(1, backoff_interval=3)
    for number in range(1, 4):
        set_gradients(parameters, {1}, math.nan)
        run_update(scaler, optimizer)
        assert (scaler.report().warning is not None) == (number == 3)
    assert scaler.report().warning == (
        "parameters outside the blocks had non-finite gradients in each of the last 3 updates, which no scale mends"
    )


def run_random_updates(scaler, parameters, optimizer, rng, count):
    for _ in range(count):
        set_gradients(parameters, {i for i in range(len(parameters)) if rng.random() < 0.1})
        run_update(scaler, optimizer)


def test_state_round_trips(tmp_path):
    """A resumed run is the uninterrupted one to the bit, and a state is a copy."""
    one, two = scaler_of(4), scaler_of(4)
    run_random_updates(*one, random.Random(0), 300)
    state = one[0].state_dict()
    torch.save(state, tmp_path / "scaler.pt")
    views = two[0].block_scales
    two[0].load_state_dict(torch.load(tmp_path / "scaler.pt", weights_only=True))
    assert [view.item() for view in views] == one[0].get_scale()
    kept = {name: value.clone() for name, value in state.items()}
    for scaler, parameters, optimizer in (one, two):
        run_random_updates(scaler, parameters, optimizer, random.Random(1), 300)
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    assert one[0].report() == two[0].report()
    after, resumed = one[0].state_dict(), two[0].state_dict()
    assert all(torch.equal(after[name], resumed[name]) for name in after)


def test_state_of_another_number_of_replicas():
    one, many = scaler_of(2, replicas=2)[0], scaler_of(2, replicas=8)[0]
    one.block_scales[1].fill_(2.0**24 * 2)
    many.load_state_dict(one.state_dict())
    assert many.get_scale() == [2.0**16, 2.0**27]


def test_deepcopy_with_the_model():
    model = Residual()
    scaler = ResblockGradScaler(model.blocks)
    twin, twin_scaler = copy.deepcopy((model, scaler))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    views = twin_scaler.block_scales
    twin(torch.randint(10, (2, 5)), views).backward()
    run_update(twin_scaler, optimizer)
    assert [view.item() for view in views] == twin_scaler.get_scale() != scaler.get_scale()


def test_frozen_parameters_need_no_gradient():
    frozen, free, rest = make_parameters(3)
    frozen.requires_grad_(False)
    scaler = ResblockGradScaler([[frozen, free]])
    optimizer = torch.optim.SGD([frozen, free, rest], lr=0.1)
    for parameters in ([free, rest], [frozen, free, rest]):
        set_gradients(parameters)
        run_update(scaler, optimizer)
        assert free.grad[0] == pytest.approx(2.0**-13, rel=1e-3)
        frozen.requires_grad_()  # and from then on it is the block's
    assert frozen.grad[0] == free.grad[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_gradients(dtype):
    parameter = nn.Parameter(torch.zeros(2, dtype=dtype))
    scaler = ResblockGradScaler([[parameter]])
    for optimizer in (torch.optim.SGD([parameter], lr=2.0**13), ScaledSGD([parameter], lr=2.0**13)):
        if dtype == torch.float16 and not isinstance(optimizer, ScaledSGD):
            continue
        scaler.load_state_dict(ResblockGradScaler([[parameter]]).state_dict())
        set_gradients([parameter])
        before = parameter.detach().clone()
        assert run_update(scaler, optimizer)
        assert torch.equal(parameter, before - 1)


class CountHostReads(TorchDispatchMode):
    """Counts what an accelerator's queue would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_nothing_waits_for_the_host(kind):
    """But for the CPU's answer of step, and steps of optimisers that cannot skip by themselves."""
    scaler, parameters, _ = scaler_of(3)
    optimizer = OPTIMIZERS[kind](parameters)
    set_gradients(parameters, {0})
    with CountHostReads() as unread:
        scaler.unscale_(optimizer)
        with CountHostReads() as read:
            scaler.step(optimizer)
        assert read.count == (1 if optimizer.__class__ is ScaledSGD or "fused" in kind else 2)
        scaler.update()
        scaler.grad_norm, scaler.scales(), scaler.block_scales, scaler.state_dict()
    assert unread.count == read.count


@needs_cuda
@pytest.mark.parametrize("kind", ["fused AdamW", "reading SGD"])
def test_nothing_waits_on_cuda(kind):
    parameters = [nn.Parameter(torch.zeros(2, device="cuda")) for _ in range(3)]
    scaler = ResblockGradScaler([[parameter] for parameter in parameters[:2]])
    optimizer = OPTIMIZERS[kind](parameters)
    taken = []
    for bad in (set(), {0}):
        set_gradients(parameters)
        for index in bad:
            parameters[index].grad = torch.full((2,), math.inf, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            taken.append(run_update(scaler, optimizer))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(isinstance(answer, torch.Tensor) for answer in taken) and list(map(bool, taken)) == [True, False]
    assert scaler.report().skips == [1, 0]


def test_compiled_block_follows_its_scale_without_recompiling():
    block, eager_block = nn.Linear(6, 6), nn.Linear(6, 6)
    eager_block.load_state_dict(block.state_dict())

    def loss(module, x, scale):
        return scaled_resblock(x, module, scale).square().mean()

    runs = []
    for module, forward in ((block, torch.compile(loss, fullgraph=True, backend="aot_eager")), (eager_block, loss)):
        scaler = ResblockGradScaler([module], backoff_interval=7)
        runs.append((module, forward, torch.optim.SGD(module.parameters(), lr=0.1), scaler, *scaler.block_scales))
    rng = random.Random(0)
    for number in range(250):
        x, bad = torch.randn(2, 6), rng.random() < 0.1
        for module, forward, optimizer, scaler, scale in runs:
            optimizer.zero_grad()
            with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
                forward(module, x, scale).backward()
            scaled = [parameter.grad.clone() for parameter in module.parameters()]
            if bad:
                module.weight.grad.fill_(math.nan)
            run_update(scaler, optimizer)
            if module is block:
                compiled = scaled
        for actual, expected in zip(compiled, scaled, strict=True):
            torch.testing.assert_close(actual, expected)
    assert runs[0][3].report() == runs[1][3].report()
    assert runs[0][3].report().skipped > 10
