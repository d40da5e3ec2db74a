"""The C++ kernel of the AdamW16 update at every CPU level: the reference's bits, its noise, threads, memory, errors.

The reference's arithmetic is float32 in a given order, so that results are compared for equality. How far it is from an
exact Adam is held to a budget of its own, over many updates.
"""

import copy
import math
import re

import pytest
import torch
from helpers import assert_within_budget, needs_extension
from torch import Tensor

from dalle_fast import reference
from dalle_fast.ops.adamw16 import UpdatedTensors, UpdateRule, adamw16_
from dalle_fast.ops.tensor_table import CHUNK, DTYPE_CODES

pytestmark = needs_extension

STATE = ("param", "exp_avg", "exp_avg_sq", "master")
HALVES = (torch.float16, torch.bfloat16)
RULES = (UpdateRule(1e-3, 0.9, 0.96, 1e-8, 0.045, 5.0), UpdateRule(0.03, 0.8, 0.99, 1e-6, 0.1, 1e-4))
each_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
each_rounding = pytest.mark.parametrize("seed", [None, 3], ids=["nearest", "stochastic"])


def compressed(mean: Tensor, variance: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Moments as a parameter of this dtype has them."""
    if dtype == torch.float32:
        return mean, variance
    return reference.encode_169(mean), reference.encode_0610(variance)


def make(shape, dtype=torch.float16, *, master=False, group=0, block=0, index=0) -> UpdatedTensors:
    """A parameter in the middle of its training, of sizes from subnormal to large, some moments 0."""
    param, grad, mean, variance = (torch.randn(shape) * 10 ** torch.empty(shape).uniform_(-6, 0) for _ in range(4))
    nothing = torch.rand(shape) < 0.1
    moments = compressed(mean.masked_fill(nothing, 0), variance.square().masked_fill(nothing, 0), dtype)
    grad = (100 * grad.masked_fill(nothing, 0)).to(dtype)
    return UpdatedTensors(param.to(dtype), grad, *moments, param if master else None, group, block, index)


def make_several(shapes) -> list[UpdatedTensors]:
    """Parameters of each kind, over two groups and three blocks."""
    kinds = [(torch.float32, False), *((dtype, master) for dtype in HALVES for master in (False, True))]
    return [
        make(shape, dtype, master=master, group=index % 2, block=index % 3, index=index)
        for index, (shape, (dtype, master)) in enumerate((shape, kind) for shape in shapes for kind in kinds)
    ]


def update(rows, *, backend="cpp", rules=RULES, steps=None, **options) -> list[UpdatedTensors]:
    """Copies of the rows after one update."""
    new = copy.deepcopy(rows)
    steps = torch.arange(1, 1 + max(row.index for row in rows) + 1) if steps is None else steps
    adamw16_(new, rules, steps, torch.tensor([2.0, 8192.0, 3.0]), backend=backend, **options)
    return new


def assert_same(found, expected) -> None:
    """Bit by bit, but for what a NaN looks like."""
    for one, other in zip(found, expected, strict=True):
        for name in STATE:
            actual, wanted = getattr(one, name), getattr(other, name)
            if actual is not None:
                torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)
                assert torch.equal(actual.signbit()[~actual.isnan()], wanted.signbit()[~wanted.isnan()])


def check(rows, **options) -> list[UpdatedTensors]:
    found = update(rows, **options)
    assert_same(found, update(rows, backend="reference", **options))
    return found


@each_rounding
def test_sizes(level, seed):
    check(make_several([1, 7, 8, 9, 15, 16, 17, 33, 511, 512, 513, 1000, 4099]), seed=seed)


@each_rounding
@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 9])
def test_sizes_around_a_chunk(size, seed):
    check(make_several([size]), seed=seed)


def test_no_elements():
    check([make(0), make(5, index=1), make(0, index=2)], seed=1)
    adamw16_([], RULES, torch.ones(1, dtype=torch.int64), torch.ones(1), backend="cpp")


@each_rounding
def test_many_updates(level, seed):
    """From moments of 0 on; each continues with what the last one left."""
    rows = make_several([50])
    for row in rows:
        row.exp_avg.zero_()
        row.exp_avg_sq.zero_()
    for step in range(1, 20):
        for row in rows:
            row.grad.normal_()
        rows = check(rows, seed=seed, steps=torch.full((len(rows),), step))


@pytest.mark.parametrize("step", [1, 2, 1000, 10**6, 2**31 + 7])
def test_steps(level, step):
    check(make_several([100]), seed=1, steps=torch.full((5,), step))


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 0.0},
        {"lr": 1e-40},
        {"weight_decay": 0.0},
        {"eps": 0.0},
        {"beta1": 0.0},
        {"beta2": 0.0},
        {"variance_clip": math.inf},
    ],
    ids=str,
)
def test_rules(level, changes):
    check(make_several([200]), seed=1, rules=[rule._replace(**changes) for rule in RULES])


def test_a_step_size_of_0_leaves_parameters_alone(level):
    rows = make_several([200])
    for new, row in zip(update(rows, seed=1, rules=[RULES[0]._replace(lr=0.0)] * 2), rows, strict=True):
        assert torch.equal(new.param, row.param if row.master is None else row.master.to(row.param.dtype))
        assert not torch.equal(new.exp_avg, row.exp_avg)


@pytest.mark.parametrize("sum_of_squares", [0.0, 1e-30, 4.0, 1e30, math.inf, math.nan])
def test_clipping(level, sum_of_squares):
    norm = torch.tensor(sum_of_squares, dtype=torch.float64)
    check(make_several([100]), sum_of_squares=norm, grad_clip=1.5)


def test_clipping_scales_gradients(level):
    """By 1.5 / 6, but for the 1e-6 that is added to the 6; not at all below the largest norm."""
    row = make(1000, torch.float32)
    row.exp_avg.zero_()
    clipped = update([row], sum_of_squares=torch.tensor(36.0, dtype=torch.float64), grad_clip=1.5)[0]
    smaller = copy.deepcopy(row)
    smaller.grad.mul_(0.25)
    torch.testing.assert_close(clipped.exp_avg, update([smaller])[0].exp_avg, rtol=1e-6, atol=0)
    below = update([row], sum_of_squares=torch.tensor(1.0, dtype=torch.float64), grad_clip=1.5)
    assert_same(below, update([row]))


def test_skip(level):
    rows = make_several([100, CHUNK + 5])
    assert_same(update(rows, skip=torch.tensor(True)), rows)
    assert_same(update(rows, skip=torch.tensor(False)), update(rows))


@each_half
@each_rounding
def test_every_word(level, dtype, seed):
    """Every pattern of parameter, gradient and moments, NaN and infinities too, each with many of the others."""
    words = torch.arange(-(2**15), 2**15).to(torch.int16)
    param, grad, mean, variance = (words[torch.randperm(2**16)] for _ in range(4))
    row = UpdatedTensors(param.view(dtype), grad.view(dtype), mean, variance, None, 0, 0, 0)
    found = check([row], seed=seed)[0].param
    nan = found.view(torch.int16)[found.isnan()]
    assert len(nan) > 100 and (nan == (0x7E00 if dtype == torch.float16 else 0x7FC0)).all()


@each_rounding
def test_special_values(level, seed):
    """Subnormal numbers, the largest ones, infinities and NaN of float32, each with each."""
    special = [0.0, -0.0, 1e-45, -1e-40, 1e-30, 1.0, -6e4, 6.6e4, 3e38, -3.4028234e38, math.inf, -math.inf, math.nan]
    values = torch.tensor(special)
    param, grad, mean, variance = (x.flatten() for x in torch.meshgrid(*[values] * 4, indexing="ij"))
    rows = [UpdatedTensors(param, grad, mean, variance.abs(), None, 0, 0, 0)]
    for index, dtype in enumerate(HALVES, 1):
        words = compressed(mean, variance, dtype)
        rows.append(UpdatedTensors(param.to(dtype), grad.to(dtype), *words, param.clone(), 0, 0, index))
        rows.append(UpdatedTensors(param.to(dtype), grad.to(dtype), *words, None, 0, 0, index + 2))
    check(rows, seed=seed)


@each_half
def test_what_overflows_saturates_where_it_is_rounded_stochastically(level, dtype):
    largest = torch.finfo(dtype).max
    param = torch.tensor([largest, -largest, largest, -largest] * 9).to(dtype)
    row = UpdatedTensors(param, torch.zeros(36, dtype=dtype), *torch.zeros(2, 36, dtype=torch.int16), None, 0, 0, 0)
    grow = [UpdateRule(1.0, 0.9, 0.96, 1e-8, -0.5, 5.0)]
    assert torch.equal(check([row], seed=1, rules=grow)[0].param, param)
    assert check([row], rules=grow)[0].param.isinf().all()


@pytest.mark.parametrize("shift", [1, 3, 8])
@each_rounding
def test_views_and_what_lies_around_them(level, shift, seed):
    """Tensors that start anywhere in their memory: the same bits, and nothing else is written."""
    rows = make_several([1, 17, 700])
    expected, buffers = update(rows, seed=seed), []
    moved = copy.deepcopy(rows)
    for row in moved:
        for name in ("grad", *STATE):
            tensor = getattr(row, name)
            if tensor is None:
                continue
            buffer = torch.full((tensor.numel() + shift + 40,), 77, dtype=tensor.dtype)
            view = buffer[shift : shift + tensor.numel()].copy_(tensor)
            buffers.append((buffer, view, shift))
            setattr(row, name, view)
    adamw16_(moved, RULES, torch.arange(1, 17), torch.tensor([2.0, 8192.0, 3.0]), seed=seed, backend="cpp")
    assert_same(moved, expected)
    for buffer, view, start in buffers:
        assert (buffer[:start] == 77).all() and (buffer[start + len(view) :] == 77).all()
    for one, other in zip(moved, rows, strict=True):
        assert torch.equal(one.grad, other.grad)


@each_half
def test_any_dense_layout(level, dtype):
    """Noise goes by the order of memory."""
    row = make((3, 5, 7, 11), dtype)
    for name in ("param", "grad", "exp_avg", "exp_avg_sq"):
        setattr(row, name, getattr(row, name).contiguous(memory_format=torch.channels_last))
    found = check([row], seed=1)[0]
    assert found.param.is_contiguous(memory_format=torch.channels_last)
    in_order = copy.deepcopy(row)
    for name in ("param", "grad", "exp_avg", "exp_avg_sq"):
        setattr(in_order, name, getattr(row, name).permute(0, 2, 3, 1).flatten())
    assert torch.equal(update([in_order], seed=1)[0].param, found.param.permute(0, 2, 3, 1).flatten())


@pytest.mark.parametrize("chunk", [8, 24, 520, 4096])
def test_the_same_bits_whatever_the_chunks(level, chunk):
    rows = make_several([1500, 9])
    expected, new = update(rows, seed=5), copy.deepcopy(rows)
    table, num_chunks = [], 0
    for row in new:
        pointers = [0 if getattr(row, name) is None else getattr(row, name).data_ptr() for name in STATE]
        param, mean, variance, master = pointers
        sizes = [row.group, row.block, row.index, row.param.numel(), DTYPE_CODES[row.param.dtype], num_chunks]
        table.append([param, row.grad.data_ptr(), mean, variance, master, *sizes])
        num_chunks += -(-row.param.numel() // chunk)
    torch.ops.dalle_fast.multi_tensor_adamw16(
        torch.tensor(table),
        num_chunks,
        chunk,
        torch.tensor(RULES, dtype=torch.float64),
        torch.arange(1, len(rows) + 1),
        torch.tensor([2.0, 8192.0, 3.0]),
        None,
        None,
        math.inf,
        5,
        True,
    )
    assert_same(new, expected)


def test_the_same_bits_for_any_number_of_threads():
    rows, before = make_several([3 * CHUNK + 11]), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(update(rows, seed=1))
    finally:
        torch.set_num_threads(before)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


# The noise of stochastic rounding


def test_noise_of_the_reference():
    """Against the known answer of Philox-4x32-7 for a counter and key of 0 (Random123's kat_vectors)."""
    noise = reference.rounding_noise(8, seed=0, index=0, step=0)
    assert noise.tolist() == [0xB709, 0x5F6F, 0x3F64, 0x0D89, 0x1F81, 0x4F12, 0x0A48, 0x4F73]


def rounded(value: float, dtype: torch.dtype, count: int, **options) -> Tensor:
    """A float32 number, rounded stochastically: an update by weight decay alone that ends at it."""
    param = torch.full((count,), value).to(dtype)
    decay = 1 - value / float(param[0])
    row = UpdatedTensors(param, torch.zeros_like(param), *torch.zeros(2, count, dtype=torch.int16), None, 0, 0, 0)
    return update([row], rules=[UpdateRule(1.0, 0.9, 0.96, 1e-8, decay, 5.0)], **options)[0].param


@each_half
@pytest.mark.parametrize("seed", [0, 3, 2**32 - 1, 2**32, 2**63 + 5, 2**64 - 1])
def test_noise(level, dtype, seed):
    """Up where what is cut off and the noise together carry."""
    bits = 13 if dtype == torch.float16 else 16
    start = 1 + 0.375 * 2.0 ** (bits - 23)
    found = rounded(start, dtype, 1003, seed=seed)
    noise = reference.rounding_noise(1003, seed=seed, index=0, step=1) >> (16 - bits)
    # What float32 makes of 1 (1 - decay).
    value = torch.tensor(1.0) * torch.tensor(1 - (1 - start), dtype=torch.float32)
    cut_off = value.view(torch.int32) & ((1 << bits) - 1)
    assert torch.equal(found > 1, noise + cut_off >= 1 << bits)


def test_noise_differs_between_seeds_steps_and_parameters(level):
    row = make(4000)
    other = copy.deepcopy(row)
    other.index = 1
    one, two = (update([row, other], seed=seed, steps=torch.tensor([4, 4])) for seed in (1, 2))
    assert_same(update([row, other], seed=1, steps=torch.tensor([4, 4])), one)
    assert not torch.equal(one[0].param, two[0].param)
    assert not torch.equal(one[0].param, one[1].param)
    still = [RULES[0]._replace(lr=1e-3, beta1=0.0, beta2=0.0)] * 2  # does not depend on the step
    early, late = (update([row], seed=1, steps=torch.tensor([step]), rules=still)[0].param for step in (1, 2))
    assert not torch.equal(early, late)
    assert torch.equal(*(update([row], steps=torch.tensor([step]), rules=still)[0].param for step in (1, 2)))


VALUES = {
    torch.float16: [1.0003, -0.0171, 3.0 + 2**-11, 2.5e-5, -1.3e-7, 6.1e-5, 40000.0 + 11],
    torch.bfloat16: [1.003, -0.0171, 3.0 + 2**-9, 1e-30, -7.3e20],
}


@pytest.mark.parametrize(("dtype", "value"), [(dtype, value) for dtype in HALVES for value in VALUES[dtype]], ids=str)
def test_stochastic_rounding_is_unbiased(level, dtype, value):
    """To one of the two neighbours, and up as often as the value is near the upper one: five standard deviations."""
    count = 2**18
    found = rounded(value, dtype, count, seed=11)
    nearest = torch.tensor(value).to(dtype)
    exact = float(nearest) * float(torch.tensor(value / float(nearest), dtype=torch.float32))
    toward = torch.tensor(math.copysign(math.inf, exact - float(nearest)), dtype=dtype)
    low, high = sorted([float(nearest), float(torch.nextafter(nearest, toward))])
    assert set(found.double().unique().tolist()) <= {low, high}
    up = (exact - low) / (high - low)
    deviation = math.sqrt(up * (1 - up) / count)
    # Noise has 16 bits, of which float16 uses 13 where it is normal: what is below is cut off.
    resolution = 2.0**-13 if dtype == torch.float16 else 2.0**-16
    assert abs((found.double() == high).double().mean().item() - up) < 5 * deviation + resolution


@each_half
def test_what_is_exact_stays(level, dtype):
    words = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    words = words[words.isfinite()]
    zeros = torch.zeros(2, len(words), dtype=torch.int16)
    row = UpdatedTensors(words, torch.zeros_like(words), *zeros, None, 0, 0, 0)
    new = update([row], seed=2, rules=[RULES[0]._replace(weight_decay=0.0)])[0].param
    assert torch.equal(new.view(torch.int16), words.view(torch.int16))


# Against an exact Adam, over many updates


def descend(dtype, *, master=False, seed=None, steps=200, lr=3e-3, size=600) -> tuple[Tensor, list[Tensor]]:
    """A parameter after updates with given gradients, and the gradients and start: [start, *gradients]."""
    generator = torch.Generator().manual_seed(7)
    start = torch.randn(size, generator=generator).mul(0.5).to(dtype)
    direction = torch.randn(size, generator=generator)
    grads = [(direction + torch.randn(size, generator=generator)).mul(1e-2).to(dtype) for _ in range(steps)]
    zeros = torch.zeros(2, size, dtype=torch.float32 if dtype == torch.float32 else torch.int16)
    row = UpdatedTensors(start.clone(), grads[0], *zeros, start.float() if master else None, 0, 0, 0)
    rule = RULES[0]._replace(lr=lr)
    for step, grad in enumerate(grads, 1):
        row.grad = grad
        adamw16_([row], [rule], torch.tensor([step]), torch.ones(1), seed=seed, backend="cpp")
    return (row.param if row.master is None else row.master), [start, *grads]


def exact_adam(history: list[Tensor], *, narrow=False, lr=3e-3) -> Tensor:
    """The same in float64, with moments of 16 bits where asked for."""
    p, rule = history[0].double(), RULES[0]
    m, v = torch.zeros(2, len(p), dtype=torch.float64)
    for step, grad in enumerate(history[1:], 1):
        g = grad.double()
        m = rule.beta1 * m + (1 - rule.beta1) * g
        v = rule.beta2 * v + (1 - rule.beta2) * g.square()
        root = (v / (1 - rule.beta2**step)).sqrt() + rule.eps
        p = p * (1 - lr * rule.weight_decay) - lr * m / (1 - rule.beta1**step) / root
        if narrow:
            m = reference.decode_169(reference.encode_169(m)).double()
            v = reference.decode_0610(reference.encode_0610(v)).double()
    return p


def torch_adam(history: list[Tensor], *, lr=3e-3) -> Tensor:
    rule, parameter = RULES[0], history[0].clone().requires_grad_()
    betas, decay = (rule.beta1, rule.beta2), rule.weight_decay
    optimizer = torch.optim.AdamW([parameter], lr=lr, betas=betas, eps=rule.eps, weight_decay=decay)
    for grad in history[1:]:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach()


def test_float32_is_as_exact_as_torch(level):
    found, history = descend(torch.float32)
    assert_within_budget(found, torch_adam(history), exact_adam(history))


@each_half
def test_narrow_moments_cost_what_their_rounding_costs(level, dtype):
    """With a float32 master, the error is that of an exact Adam whose moments are rounded."""
    found, history = descend(dtype, master=True)
    assert_within_budget(found, exact_adam(history, narrow=True), exact_adam(history))


@each_half
def test_stochastic_rounding_lets_small_updates_add_up(dtype):
    """Updates of a tenth of a last place and less: rounded to nearest most are lost, and parameters stand still."""
    lr, steps = torch.finfo(dtype).eps / 20, 300
    options = {"steps": steps, "lr": lr, "size": 4000}
    nearest, history = descend(dtype, **options)
    stochastic = descend(dtype, seed=1, **options)[0]
    truth = exact_adam(history, lr=lr)
    errors = [(one.double() - truth).square().mean().sqrt().item() for one in (nearest, stochastic)]
    assert errors[1] < 0.5 * errors[0]
    # Each update's rounding has at most half the distance of two neighbours as its standard deviation, and they are
    # independent; parameters stay below 4.
    bound = torch.finfo(dtype).eps * 2 * 0.5 * math.sqrt(steps)
    assert errors[1] < bound
    # Errors of both signs: the mean over all is small, while nearest's updates that are lost have a direction.
    bias = (stochastic.double() - truth).mean().abs().item()
    assert bias < 5 * bound / math.sqrt(len(truth))


# Errors


def call_op(**changes):
    arguments = {
        "table": torch.zeros(1, 11, dtype=torch.int64),
        "num_chunks": 0,
        "chunk": 8,
        "hyper": torch.zeros(1, 6, dtype=torch.float64),
        "steps": torch.ones(1, dtype=torch.int64),
        "scales": torch.ones(1),
        "skip": None,
        "sum_of_squares": None,
        "grad_clip": 1.0,
        "seed": 0,
        "stochastic": False,
    }
    torch.ops.dalle_fast.multi_tensor_adamw16(*(arguments | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": torch.zeros(1, 10, dtype=torch.int64)}, "table must have two dimensions and 11 columns, got shape"),
        ({"chunk": 12}, "chunk must be a multiple of 8, got 12"),
        ({"hyper": torch.zeros(1, 5, dtype=torch.float64)}, "hyper must have two dimensions and 6 columns, got shape"),
        ({"hyper": torch.zeros(1, 6)}, "hyper must have dtype Double, got Float"),
        ({"steps": torch.ones(1)}, "steps must have dtype Long, got Float"),
        ({"scales": torch.ones(1).double()}, "scales must have dtype Float, got Double"),
        ({"scales": torch.ones(4)[::2]}, "scales must be contiguous, got shape (2) with strides (2)"),
        ({"skip": torch.ones(())}, "skip must have dtype Bool, got Float"),
        ({"sum_of_squares": torch.ones(())}, "sum_of_squares must have dtype Double, got Float"),
        ({"skip": torch.ones(0, dtype=torch.bool)}, "skip must have 1 elements, got 0"),
        ({"sum_of_squares": torch.ones(0).double()}, "sum_of_squares must have 1 elements, got 0"),
    ],
)
def test_errors(changes, message):
    call_op()
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call_op(**changes)
