"""The dVAE: names and sizes of the published one, the likelihood, the loss term by term, tokens and messages."""

import dataclasses
import math
import re

import pytest
import torch
from helpers import randomize, tiny_dvae
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from dalle_fast.models.dvae import DVAE, DVAEConfig, logit_laplace_nll, map_pixels, normal_nll, unmap_pixels


def conv(name, n_in, n_out, kernel_size):
    return {f"{name}.w": (n_out, n_in, kernel_size, kernel_size), f"{name}.b": (n_out,)}


def published_blocks(n_in, widths, kernel_sizes):
    """Two residual blocks in each of the four groups, with a 1 x 1 id path where the width changes."""
    shapes = {}
    for group, width in enumerate(widths, start=1):
        for block in (1, 2):
            name = f"blocks.group_{group}.block_{block}"
            channels = [n_in if block == 1 else width, width // 4, width // 4, width // 4, width]
            for number, kernel_size in enumerate(kernel_sizes, start=1):
                shapes |= conv(f"{name}.res_path.conv_{number}", channels[number - 1], channels[number], kernel_size)
            if channels[0] != width:
                shapes |= conv(f"{name}.id_path", channels[0], width, 1)
        n_in = width
    return shapes


PUBLISHED_ENCODER = (
    conv("blocks.input", 3, 256, 7)
    | published_blocks(256, [256, 512, 1024, 2048], (3, 3, 3, 1))
    | conv("blocks.output.conv", 2048, 8192, 1)
)
PUBLISHED_DECODER = (
    conv("blocks.input", 8192, 128, 1)
    | published_blocks(128, [2048, 1024, 512, 256], (1, 3, 3, 3))
    | conv("blocks.output.conv", 256, 6, 1)
)


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return DVAE(DVAEConfig())


@pytest.fixture
def dvae():
    model = tiny_dvae()
    randomize(model)
    return model


@pytest.mark.parametrize(
    ("part", "published", "tensors", "parameters"),
    [("encoder", PUBLISHED_ENCODER, 74, 53_786_240), ("decoder", PUBLISHED_DECODER, 76, 43_829_766)],
)
def test_full_size_is_the_published_one(full_size, part, published, tensors, parameters):
    module = getattr(full_size, part)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes == published
    assert len(shapes) == tensors
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters


def test_full_size_makes_32_by_32_tokens_of_256_pixels(full_size):
    assert (full_size.config.grid, full_size.config.downsampling) == (32, 8)
    with torch.device("meta"):
        assert full_size.logits(torch.empty(2, 3, 256, 256)).shape == (2, 8192, 32, 32)
        assert full_size.decoder(torch.empty(2, 8192, 32, 32)).shape == (2, 6, 256, 256)


def test_residual_block(full_size):
    block = full_size.encoder.blocks.group_2.block_1
    assert block.gain == 1 / 64
    assert not {"gain"} & set(dict(block.named_parameters()) | dict(block.named_buffers()))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_block_by_hand(part):
    """ReLU before each convolution of the branch, none before the id path, and the gain on the branch alone."""
    model = tiny_dvae(groups=2, blocks_per_group=3)
    randomize(model, std=1.0)
    block = getattr(model, part).blocks.group_2.block_1
    x = torch.randn(2, block.id_path.w.shape[1], 5, 6)
    branch = x
    for number in range(1, 5):
        layer = getattr(block.res_path, f"conv_{number}")
        branch = F.conv2d(branch.relu(), layer.w, layer.b, padding="same")
    expected = F.conv2d(x, block.id_path.w, block.id_path.b) + branch / 36
    torch.testing.assert_close(block(x), expected)


def test_pooling_and_upsampling(full_size):
    encoder, decoder = full_size.encoder.blocks, full_size.decoder.blocks
    for number in (1, 2, 3):
        assert isinstance(encoder[number].pool, torch.nn.MaxPool2d)
        assert decoder[number].upsample.mode == "nearest"
    assert not hasattr(encoder.group_4, "pool")
    assert not hasattr(decoder.group_4, "upsample")


def test_outer_convolutions_stay_fp32_under_autocast(dvae):
    seen = {}

    def watch(name, module):
        module.register_forward_hook(lambda _, inputs, output: seen.update({name: output.dtype}))

    watch("encoder input", dvae.encoder.blocks.input)
    watch("encoder output", dvae.encoder.blocks.output.conv)
    watch("decoder input", dvae.decoder.blocks.input)
    watch("decoder output", dvae.decoder.blocks.output.conv)
    with torch.autocast("cpu", torch.bfloat16):
        logits = dvae.logits(torch.rand(1, 3, 16, 16))
        statistics = dvae.decoder(logits.softmax(dim=1))
    assert seen == {
        "encoder input": torch.bfloat16,
        "encoder output": torch.float32,
        "decoder input": torch.float32,
        "decoder output": torch.bfloat16,
    }
    assert statistics.dtype == torch.float32


def test_map_pixels():
    ends = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(map_pixels(ends), torch.tensor([0.1, 0.5, 0.9]))
    values = torch.linspace(0, 1, 256)
    torch.testing.assert_close(unmap_pixels(map_pixels(values)), values)
    assert unmap_pixels(torch.tensor([0.0, 0.05, 0.95, 1.0])).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("mu", "log_scale"), [(0.0, 0.0), (1.5, -1.0), (-2.0, -0.5), (0.3, -2.5)])
def test_likelihood(mu, log_scale):
    """The formula of the paper's equation 2, and a density: its integral over (0, 1) is 1."""
    log_odds = torch.linspace(-60, 60, 2_000_001, dtype=torch.float64)
    log_odds = log_odds[log_odds.abs() < 30]
    x = torch.sigmoid(log_odds)
    density = torch.exp(-logit_laplace_nll(x, torch.full_like(x, mu), log_scale))
    assert torch.trapezoid(density * x * (1 - x), log_odds).item() == pytest.approx(1, abs=1e-6)

    x = torch.tensor([0.1, 0.37, 0.5, 0.9], dtype=torch.float64)
    scale = math.exp(log_scale)
    distance = (torch.log(x / (1 - x)) - mu).abs()
    expected = torch.exp(-distance / scale) / (2 * scale * x * (1 - x))
    nll = logit_laplace_nll(x, torch.full_like(x, mu), torch.full_like(x, log_scale))
    torch.testing.assert_close(nll, -expected.log())


def test_normal_likelihood():
    x, mu = torch.rand(100, dtype=torch.float64), torch.randn(100, dtype=torch.float64)
    peer = torch.distributions.Normal(torch.sigmoid(mu), math.exp(-1.3))
    torch.testing.assert_close(normal_nll(x, mu, -1.3), -peer.log_prob(x))


@pytest.mark.parametrize("likelihood", ["logit_laplace", "normal"])
@pytest.mark.parametrize("log_scale", [None, -1.5])
def test_loss_reads_mu_before_the_log_scale(likelihood, log_scale):
    dvae = tiny_dvae(likelihood=likelihood, log_scale=log_scale)
    images = torch.rand(2, 3, 16, 16)
    loss = dvae.loss(images, tau=1e-4, kl_weight=0.0, seed=1)
    statistics = dvae.decoder(F.one_hot(loss.indices, dvae.config.vocab_size).permute(0, 3, 1, 2).float())
    nll = {"logit_laplace": logit_laplace_nll, "normal": normal_nll}[likelihood]
    scale = statistics[:, 3:] if log_scale is None else log_scale
    expected = nll(map_pixels(images), statistics[:, :3], scale).mean()
    torch.testing.assert_close(loss.reconstruction, expected, rtol=1e-4, atol=1e-5)


def test_initial_values_can_be_scaled():
    config = tiny_dvae().config
    torch.manual_seed(3)
    plain = DVAE(config)
    torch.manual_seed(3)
    scaled = DVAE(dataclasses.replace(config, logit_gain=2.0, codebook_std=1.0, residual_gain=0.5))
    torch.testing.assert_close(scaled.encoder.blocks.output.conv.w, 2 * plain.encoder.blocks.output.conv.w)
    assert scaled.decoder.codebook.std().item() == pytest.approx(1, rel=0.3)
    gains = {module.gain for module in scaled.modules() if hasattr(module, "gain")}
    assert gains == {0.5}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("likelihood", "cauchy", "likelihood must be one of logit_laplace, normal, got 'cauchy'"),
        ("residual_gain", 0.0, "residual_gain must be > 0, got 0.0"),
        ("codebook_std", -1.0, "codebook_std must be > 0, got -1.0"),
        ("logit_gain", 0.0, "logit_gain must be > 0, got 0.0"),
    ],
)
def test_open_choices_are_checked(field, value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DVAEConfig(**{field: value})


def test_loss_term_by_term(dvae):
    images, kl_weight = torch.rand(3, 3, 16, 16), 2.5
    loss = dvae.loss(images, tau=0.7, kl_weight=kl_weight, seed=5)
    kl = math.log(12) + (q := dvae.logits(images).softmax(1)).mul(q.log()).sum(1)
    torch.testing.assert_close(loss.kl, kl.mean())
    # 16 positions and 768 pixel values an image: in the paper's sizes this factor is 1 / 192.
    torch.testing.assert_close(loss.total, loss.reconstruction + kl_weight * kl.mean() * 16 / 768)
    assert 32 * 32 / (256 * 256 * 3) == 1 / 192
    assert loss.indices.shape == (3, 4, 4)
    assert loss.images.shape == images.shape
    assert not loss.images.requires_grad
    assert 0 <= loss.images.min() <= loss.images.max() <= 1


def test_reconstruction_at_low_temperature_is_that_of_the_drawn_codes(dvae):
    images = torch.rand(2, 3, 16, 16)
    loss = dvae.loss(images, tau=1e-4, kl_weight=0.0, seed=1)
    statistics = dvae.decoder(F.one_hot(loss.indices, 12).permute(0, 3, 1, 2).float())
    expected = logit_laplace_nll(map_pixels(images), *statistics.chunk(2, dim=1)).mean()
    torch.testing.assert_close(loss.reconstruction, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(loss.total, loss.reconstruction)
    torch.testing.assert_close(loss.images, dvae.decode(loss.indices), rtol=0, atol=1e-3)


def test_kl_is_that_of_the_raw_logits(dvae):
    images = torch.rand(2, 3, 16, 16)
    values = [dvae.loss(images, tau=tau, kl_weight=1.0, seed=seed).kl for tau, seed in ((0.1, 1), (1.0, 2), (7.0, 3))]
    assert values[0] == values[1] == values[2]
    assert 0 < values[0] < math.log(12)


def test_noise(dvae):
    images = torch.rand(2, 3, 16, 16)
    first, again, other = (dvae.loss(images, 1.0, 1.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.total, again.total)
    assert not torch.equal(first.total, other.total)
    torch.manual_seed(3)
    first = dvae.loss(images, 1.0, 1.0).total
    assert not torch.equal(first, dvae.loss(images, 1.0, 1.0).total)
    torch.manual_seed(3)
    assert torch.equal(first, dvae.loss(images, 1.0, 1.0).total)


def test_gradients_reach_every_parameter(dvae):
    dvae.loss(torch.rand(2, 3, 16, 16), tau=1.0, kl_weight=1.0).total.backward()
    for name, parameter in dvae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_initial_weights():
    dvae = tiny_dvae()
    statistics = dvae.decoder(F.one_hot(torch.randint(12, (2, 4, 4)), 12).permute(0, 3, 1, 2).float())
    assert statistics.isfinite().all()
    assert not any(tensor.any() for name, tensor in dvae.encoder.state_dict().items() if name.endswith(".b"))
    assert not torch.equal(tiny_dvae().encoder.blocks.input.w, dvae.encoder.blocks.input.w)


def test_encode_takes_the_likeliest_code(dvae):
    images = torch.rand(2, 3, 16, 16)
    tokens = dvae.encode(images)
    logits = dvae.encoder(map_pixels(images))
    assert tokens.shape == (2, 4, 4)
    assert tokens.dtype == torch.int64
    assert torch.equal(logits.gather(1, tokens[:, None])[:, 0], logits.amax(1))
    assert torch.equal(dvae.logits(images), logits)


def test_decode_equals_the_decoder_on_one_hot_codes(dvae):
    tokens = torch.randint(12, (2, 3, 5))
    images = dvae.decode(tokens)
    statistics = dvae.decoder(F.one_hot(tokens, 12).permute(0, 3, 1, 2).float())
    assert images.shape == (2, 3, 12, 20)
    torch.testing.assert_close(images, unmap_pixels(statistics[:, :3].sigmoid()))
    assert not images.requires_grad


def test_images_of_other_sides(dvae):
    assert dvae.encode(torch.rand(1, 3, 8, 20)).shape == (1, 2, 5)


def test_without_downsampling():
    dvae = tiny_dvae(groups=1, channels=1)
    assert dvae.decode(dvae.encode(torch.rand(1, 1, 16, 16))).shape == (1, 1, 16, 16)


@pytest.fixture
def channels_last(dvae):
    """The model and images in channels_last, as training has them."""
    images = torch.rand(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    return dvae.to(memory_format=torch.channels_last), images


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("autocast", [False, True])
def test_channels_last_stays(channels_last, autocast):
    """No module gets or gives another layout, forward or backward, so that nothing is copied between them."""
    model, images = channels_last
    others = []

    def watch(module, inputs, output):
        for tensor in (*inputs, output):
            if tensor is not None and not tensor.is_contiguous(memory_format=torch.channels_last):
                others.append((type(module).__name__, tuple(tensor.shape), tensor.stride()))

    for part in (model.encoder, model.decoder):
        for module in part.modules():
            module.register_forward_hook(watch)
            if not list(module.children()):
                module.register_full_backward_hook(lambda module, grads, outputs: watch(module, grads, outputs[0]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model.loss(images, 1.0, 1.0).total.backward()
        model.decode(model.encode(images))
    assert others == []


def test_layout_changes_no_result(dvae):
    images = torch.rand(2, 3, 16, 16)
    plain, tokens = dvae.loss(images, 0.7, 1.0, seed=3), dvae.encode(images)
    dvae.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    other = dvae.loss(images, 0.7, 1.0, seed=3)
    assert torch.equal(dvae.encode(images), tokens)
    torch.testing.assert_close(other.total, plain.total)
    torch.testing.assert_close(other.images, plain.images)


def test_autocast_is_near_float32(channels_last):
    model, images = channels_last
    exact = model.loss(images, 1.0, 1.0, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(images, 1.0, 1.0, seed=3)
        decoded = model.decode(exact.indices)
    assert (loss.total.dtype, loss.kl.dtype, loss.images.dtype) == (torch.float32,) * 3
    torch.testing.assert_close(loss.total, exact.total, rtol=0.05, atol=0.05)
    torch.testing.assert_close(decoded, model.decode(exact.indices), rtol=0, atol=0.05)
    loss.total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_compiles_without_graph_breaks(channels_last):
    model, images = channels_last
    encode, decode = (torch.compile(f, fullgraph=True) for f in (model.encode, model.decode))
    tokens = encode(images)
    assert torch.equal(tokens, model.encode(images))
    torch.testing.assert_close(decode(tokens), model.decode(tokens))


@pytest.mark.parametrize(("backend", "autocast"), [("inductor", False), ("aot_eager", True)])
def test_loss_compiles_without_graph_breaks(channels_last, backend, autocast):
    """With another temperature and weight at the next call, too."""
    model, images = channels_last
    compiled = torch.compile(lambda *arguments: model.loss(*arguments, seed=3), backend=backend, fullgraph=True)
    for tau, kl_weight in ((1.0, 0.0), (0.9, 0.1)):
        results = []
        for function in (compiled, lambda *arguments: model.loss(*arguments, seed=3)):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = function(images, tau, kl_weight)
            loss.total.backward()
            results.append([loss.total.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        for one, other in zip(*results, strict=True):
            tolerance = {"rtol": 0.1, "atol": 0.1 * other.abs().max().item()} if autocast else {}
            torch.testing.assert_close(one, other, **tolerance)


def test_schedules_compile_the_loss_once(channels_last):
    """Once for the first update, whose values are constants, and once for all others."""
    torch._dynamo.reset()
    model, images = channels_last
    counter = CompileCounter()
    compiled = torch.compile(model.loss, backend=counter, fullgraph=True)
    for tau, kl_weight in ((1.0, 0.0), (0.9, 0.1), (0.8, 0.2), (0.5, 2.0), (1 / 16, 6.6)):
        compiled(images, tau, kl_weight)
    assert counter.frame_count <= 2


VALUES_TESTED_ABOVE = {"likelihood", "log_scale", "residual_gain", "codebook_std", "logit_gain"}  # shapes stay the same
SIZES = [field.name for field in dataclasses.fields(DVAEConfig) if field.name not in VALUES_TESTED_ABOVE]


@pytest.mark.parametrize(
    "field", sorted({field.name for field in dataclasses.fields(DVAEConfig)} - VALUES_TESTED_ABOVE)
)
def test_every_size_has_an_effect(field):
    base = tiny_dvae(image_size=32).config
    other = dataclasses.replace(base, **{field: 2 * getattr(base, field)})

    def fingerprint(config):
        with torch.device("meta"):
            dvae = DVAE(config)
        return config.grid, [tuple(parameter.shape) for parameter in dvae.parameters()]

    assert fingerprint(base) != fingerprint(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "image_size must be >= 1, got 0"),
        ({"hidden": 0}, "hidden must be >= 1, got 0"),
        ({"codebook_dim": 0}, "codebook_dim must be >= 1, got 0"),
        ({"groups": 0}, "groups must be >= 1, got 0"),
        ({"blocks_per_group": 0}, "blocks_per_group must be >= 1, got 0"),
        ({"channels": 0}, "channels must be >= 1, got 0"),
        ({"vocab_size": 1}, "vocab_size must be >= 2, got 1"),
        ({"image_size": 100}, "image_size must be a multiple of 8 (2 ** (groups - 1)), got 100"),
        ({"hidden": 10}, "hidden must be a multiple of 4, got 10"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DVAEConfig(**changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda dvae: dvae.logits(torch.rand(1, 4, 16, 16)),
            "images must have shape (B, 3, height, width), got (1, 4,",
        ),
        (lambda dvae: dvae.encode(torch.rand(3, 16, 16)), "images must have shape (B, 3, height, width), got (3, 16"),
        (lambda dvae: dvae.encode(torch.rand(1, 3, 16, 18)), "image sides must be multiples of 4, got (16, 18)"),
        (
            lambda dvae: dvae.loss(torch.rand(1, 3, 15, 16), 1.0, 1.0),
            "image sides must be multiples of 4, got (15, 16)",
        ),
        (lambda dvae: dvae.decoder(torch.rand(1, 11, 4, 4)), "codes must have shape (B, 12, h, w), got (1, 11, 4, 4)"),
        (lambda dvae: dvae.decode(torch.zeros(4, 4, dtype=torch.int64)), "tokens must be integers of shape (B, h, w)"),
        (lambda dvae: dvae.decode(torch.zeros(1, 4, 4)), "tokens must be integers of shape (B, h, w), got torch.float"),
        (lambda dvae: dvae.decode(torch.tensor([[[0, 12]]])), "tokens must lie in [0, 12), got 0 to 12"),
        (lambda dvae: dvae.decode(torch.tensor([[[-1, 3]]])), "tokens must lie in [0, 12), got -1 to 3"),
        (lambda dvae: dvae.loss(torch.rand(1, 3, 16, 16), 0.0, 1.0), "tau must be finite and > 0, got 0.0"),
        (lambda dvae: dvae.loss(torch.rand(1, 3, 16, 16), -1.0, 1.0), "tau must be finite and > 0, got -1.0"),
        (lambda dvae: dvae.loss(torch.rand(1, 3, 16, 16), math.nan, 1.0), "tau must be finite and > 0, got nan"),
        (lambda dvae: dvae.loss(torch.rand(1, 3, 16, 16), math.inf, 1.0), "tau must be finite and > 0, got inf"),
        (lambda dvae: dvae.loss(torch.rand(1, 3, 16, 16), 1.0, -0.5), "kl_weight must be finite and >= 0, got -0.5"),
        (lambda dvae: dvae.loss(torch.rand(1, 3, 16, 16), 1.0, math.nan), "kl_weight must be finite and >= 0, got nan"),
        (
            lambda dvae: dvae.loss(torch.rand(0, 3, 16, 16), 1.0, 1.0),
            "images must hold at least one image, got shape (0",
        ),
        (lambda dvae: dvae.encode(torch.rand(1, 3, 0, 16)), "image sides must be multiples of 4, got (0, 16)"),
        (lambda dvae: dvae.encode(torch.full((1, 3, 16, 16), 1.5)), "images must lie in [0, 1], got 1.5 to 1.5"),
        (lambda dvae: dvae.logits(torch.full((1, 3, 16, 16), -0.25)), "images must lie in [0, 1], got -0.25 to -0.25"),
        (
            lambda dvae: dvae.loss(torch.full((1, 3, 16, 16), 255.0), 1.0, 1.0),
            "images must lie in [0, 1], got 255.0 to",
        ),
        (lambda dvae: dvae.encode(torch.full((1, 3, 16, 16), math.nan)), "images must lie in [0, 1], got nan to nan"),
    ],
)
def test_call_errors(dvae, call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(dvae)


def test_images_that_are_not_floating_point(dvae):
    with pytest.raises(TypeError, match=r"^images must be floating point, got torch\.uint8$"):
        dvae.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"^images must be a tensor, got list$"):
        dvae.loss([0.5], 1.0, 1.0)


def test_vmap(dvae):
    images = torch.rand(3, 1, 3, 16, 16)
    logits = torch.stack([dvae.logits(image) for image in images])
    torch.testing.assert_close(torch.vmap(dvae.logits)(images), logits)
    squares = torch.vmap(torch.func.grad(lambda image: dvae.logits(image).square().sum()))(images)
    assert squares.shape == images.shape
    assert torch.equal(torch.vmap(dvae.encode)(images), logits.argmax(2))


def test_values_are_not_looked_at_where_that_would_wait():
    """A tensor without values stands for one of an accelerator, whose values are far away."""
    with torch.device("meta"):
        model = tiny_dvae()
        tokens = model.encode(torch.rand(2, 3, 16, 16))
        assert model.decode(tokens).shape == (2, 3, 16, 16)
