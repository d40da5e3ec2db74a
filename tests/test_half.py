"""The models with 16-bit matrices and a gradient scale for each residual block."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dalle_fast import DVAE, Dalle, DalleConfig, DVAEConfig
from dalle_fast.models.decoder import Decoder
from dalle_fast.models.half import in_weight_dtype

SIZES = {"text_vocab_size": 30, "image_vocab_size": 40, "text_len": 6, "grid": (4, 4), "depth": 2, "width": 32}
DALLE = DalleConfig(**SIZES, heads=4)
DVAE_SMALL = DVAEConfig(image_size=16, vocab_size=24, hidden=8, codebook_dim=8, groups=2, residual_gain=0.3)

each_model = pytest.mark.parametrize("make", ["dalle", "dvae"])


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = Dalle(DALLE) if name == "dalle" else DVAE(DVAE_SMALL)
    if name == "dalle":  # its heads start at zero, which would leave no gradients to compare
        nn.init.normal_(model.image_head.weight, std=0.1)
        nn.init.normal_(model.text_head.weight, std=0.1)
    return model


def loss_of(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, Dalle):
        text = torch.randint(0, 30, (2, 5), generator=generator)
        return model.loss(text, torch.randint(0, 40, (2, 16), generator=generator)).total
    return model.loss(torch.rand(2, 3, 16, 16, generator=generator), 0.8, 1.0, seed=3).total


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss_of(model).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def scales_of(model: nn.Module) -> list[torch.Tensor]:
    """A power of two for each block, so that scaling is exact."""
    return [torch.tensor(2.0 ** (11 + index % 5)) for index in range(len(model.resblocks()))]


@each_model
def test_16_bit_are_the_matrices_of_the_blocks_alone(make):
    model = make_model(make)
    before = dict(model.named_parameters())
    assert model.cast_blocks(torch.float16) is model
    assert {name: id(p) for name, p in before.items()} == {name: id(p) for name, p in model.named_parameters()}
    half = {name for name, p in model.named_parameters() if p.dtype == torch.float16}
    inside = {id(p) for branch in model.branches() for p in branch.parameters()}
    assert half == {name for name, p in model.named_parameters() if id(p) in inside and p.ndim > 1}
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if name not in half)
    assert len(half) == len(model.resblocks()) * (2 if make == "dalle" else 4)


@each_model
def test_scales_are_in_the_gradients_of_the_blocks_and_nowhere_else(make):
    model = make_model(make)
    loss, plain = loss_of(model).detach(), gradients_of(model)
    scales = scales_of(model)
    model.set_grad_scales(scales)
    assert torch.equal(loss_of(model), loss)
    scaled = gradients_of(model)
    factor = {id(p): float(s) for branch, s in zip(model.branches(), scales, strict=True) for p in branch.parameters()}
    for name, parameter in model.named_parameters():
        if name in plain:
            assert torch.equal(scaled[name], plain[name] * factor.get(id(parameter), 1.0)), name
    model.set_grad_scales(None)
    assert all(torch.equal(grad, plain[name]) for name, grad in gradients_of(model).items())


@each_model
def test_16_bit_gradients_are_as_near_as_those_of_autocast(make):
    """The truth is the fp32 model with the same, rounded weights; ReLU and pooling make more of an error than eps."""
    model = make_model(make).cast_blocks(torch.float16)
    wide = make_model(make)
    wide.load_state_dict(model.state_dict())
    scales = scales_of(model)
    for each in (model, wide):
        each.set_grad_scales(scales)
    truth, grads = gradients_of(wide), gradients_of(model)
    with torch.autocast("cpu", torch.float16):
        rival = gradients_of(wide)
    assert grads.keys() == truth.keys() == rival.keys()
    for name, exact in truth.items():
        budget = 2 * ((rival[name] - exact).norm() + torch.finfo(torch.float16).eps * exact.norm())
        assert (grads[name].float() - exact).norm() <= budget, name


@each_model
def test_residual_path_is_fp32(make):
    model = make_model(make).cast_blocks(torch.float16)
    model.set_grad_scales(scales_of(model))
    seen = []
    for block in model.resblocks():
        block.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    branches = []
    hooked = [block.projection if hasattr(block, "projection") else block for block in model.resblocks()]
    for module in hooked:
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: branches.append(output.dtype))
    loss_of(model).backward()
    assert set(seen) == {torch.float32}
    assert set(branches) <= {torch.float16}


@each_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(make, dtype):
    model = make_model(make)
    model.set_grad_scales(scales_of(model))
    plain = gradients_of(model)
    with torch.autocast("cpu", dtype):
        cast = gradients_of(model)
    assert all(torch.isfinite(grad).all() for grad in cast.values())
    assert all(cast[name].dtype == torch.float32 for name in plain)


@each_model
def test_scales_are_no_part_of_the_state(make):
    model = make_model(make)
    names = list(model.state_dict())
    model.set_grad_scales(scales_of(model))
    assert list(model.state_dict()) == names


@each_model
def test_one_scale_a_block(make):
    model = make_model(make)
    with pytest.raises(ValueError, match=r"scales must be one a block, \d+, got 1"):
        model.set_grad_scales([torch.tensor(1.0)])


def test_recomputed_blocks_have_the_same_gradients():
    model = make_model("dalle").cast_blocks(torch.float16)
    model.set_grad_scales(scales_of(model))
    block, x = model.resblocks()[0], torch.randn(2, 22, 32, requires_grad=True)
    block(x).square().sum().backward()
    expected, x.grad = [x.grad, block.qkv.weight.grad], None
    block.zero_grad()
    checkpoint(block, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, expected[0]) and torch.equal(block.qkv.weight.grad, expected[1])


def test_compiles_without_a_break_and_sees_the_scale_change():
    model = make_model("dalle")
    block, scale = model.resblocks()[1], torch.tensor(8.0)
    model.set_grad_scales([scale] * len(model.resblocks()))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 22, 32)
    for value in (8.0, 64.0):
        scale.fill_(value)
        grads = []
        for module in (block, compiled):
            block.zero_grad()
            module(x).square().sum().backward()
            grads.append(block.expand.weight.grad)
        torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_are_rounded_once(dtype):
    x, weight, bias = torch.randn(5, 64), torch.randn(7, 64).to(dtype), torch.randn(7)
    result = in_weight_dtype(F.linear, x, weight, bias)
    truth = F.linear(x.to(dtype).double(), weight.double(), bias.to(dtype).double())
    assert result.dtype == dtype
    assert (result.double() - truth).abs().max() <= torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_gradients_of_biases_are_summed_in_fp32(kind, dtype):
    """Not rounded to 16 bits on the way, nor infinite where the sum passes float16's largest value."""
    bias = torch.zeros(3, requires_grad=True)
    if kind == "linear":
        out = in_weight_dtype(F.linear, torch.randn(4, 1500, 8), torch.randn(3, 8, dtype=dtype), bias)
        upstream, over = torch.rand_like(out) * 30, (0, 1)
    else:
        weight = torch.randn(3, 8, 3, 3, dtype=dtype)
        out = in_weight_dtype(F.conv2d, torch.randn(4, 8, 40, 40), weight, bias, padding=1)
        upstream, over = torch.rand_like(out) * 30, (0, 2, 3)
    assert out.dtype == dtype
    out.backward(upstream)
    truth = upstream.double().sum(over)
    assert (truth > torch.finfo(torch.float16).max).all()
    # Fewer than 2^13 positive terms, each addition rounded once.
    assert ((bias.grad - truth).abs() <= 2.0**13 * 2.0**-24 * truth).all()
    assert not torch.equal(bias.grad, bias.grad.to(dtype).float())


def test_gradients_of_a_single_sample():
    """Without a dimension to sum over, and of a bias that is frozen."""
    weight = torch.randn(3, 8, dtype=torch.float16, requires_grad=True)
    bias, x, upstream = torch.zeros(3, requires_grad=True), torch.randn(8, requires_grad=True), torch.randn(3)
    in_weight_dtype(F.linear, x, weight, bias).backward(upstream.half())
    assert torch.equal(bias.grad, upstream.half().float())
    with_bias = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    in_weight_dtype(F.linear, x, weight, bias.detach()).backward(upstream.half())
    assert torch.equal(x.grad, with_bias[0])
    assert torch.equal(weight.grad, with_bias[1])


def test_wider_weights_are_left_to_torch():
    x, weight = torch.randn(5, 8), torch.randn(7, 8)
    assert torch.equal(in_weight_dtype(F.linear, x, weight, None), F.linear(x, weight))


def test_a_half_model_draws_samples():
    model = make_model("dalle").cast_blocks(torch.float16).eval()
    text = torch.randint(0, 30, (2, 5))
    tokens = torch.randint(0, 40, (2, 16))
    with torch.no_grad():
        expected = model(text, tokens).image
    decoder = Decoder(model, 2)
    decoder.prefill(text)
    steps = []
    for _ in range(16):
        steps.append(decoder.step(tokens).clone())
        decoder.position += 1
    error = (torch.stack(steps, 1) - expected).abs().max()
    assert error < 32 * torch.finfo(torch.float16).eps * expected.abs().max()
