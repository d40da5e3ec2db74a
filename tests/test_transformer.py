"""The transformer: who sees whom, pads, layers, starting values, the loss by hand, precision and messages."""

import dataclasses
import math
import re

import pytest
import torch
from helpers import random_captions, random_image_tokens, randomize, tiny_dalle
from torch import nn
from torch.nn import functional as F

from dalle_fast.models.transformer import Dalle, DalleConfig, LayerNorm
from dalle_fast.patterns import Column, Conv, Row

LAYOUTS = ("dalle", "dalle-pytorch", "ru-dalle")
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_start = pytest.mark.parametrize("start", ["inside", "before"])


def make_batch(config, lengths=(3, 2)):
    return random_captions(config, list(lengths)), random_image_tokens(config, len(lengths))


@every_layout
@every_start
def test_image_tokens_are_causal(layout, start):
    """Token p is scored before it is read: changing it and all after it leaves scores 0 .. p as they were, bitwise."""
    model = tiny_dalle(layout=layout, start_of_text=start)
    text, tokens = make_batch(model.config)
    before = model(text, tokens)
    for position in range(model.config.image_len):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 1) % model.config.image_vocab_size
        after = model(text, changed)
        assert torch.equal(after.text, before.text)
        assert torch.equal(after.image[:, : position + 1], before.image[:, : position + 1])
        if position + 1 < model.config.image_len:
            assert not torch.equal(after.image[:, position + 1], before.image[:, position + 1])


@every_layout
@every_start
def test_text_tokens_are_causal_and_all_image_states_see_them(layout, start):
    model = tiny_dalle(layout=layout, start_of_text=start)
    text, tokens = make_batch(model.config, lengths=[model.config.caption_len] * 2)
    before = model(text, tokens)
    for position in range(model.config.caption_len):
        changed = text.clone()
        changed[:, position] = 1 + changed[:, position] % (model.config.text_vocab_size - 1)
        after = model(changed, tokens)
        assert torch.equal(after.text[:, : position + 1], before.text[:, : position + 1])
        assert (after.text[:, position + 1 :] != before.text[:, position + 1 :]).any(dim=-1).all()
        assert (after.image != before.image).any(dim=-1).all()


def test_a_changed_token_reaches_what_the_pattern_lets_see_it():
    """With one row layer, token p is read at state p + 1, which the states up to a row further attend to."""
    model = tiny_dalle(depth=1, grid=(4, 4), layout="ru-dalle")
    pattern = Row(model.config.text_states, (4, 4))
    model.layers[0]["attention"].pattern = pattern
    text, tokens = make_batch(model.config)
    changed = tokens.clone()
    changed[:, 2] = (changed[:, 2] + 1) % model.config.image_vocab_size
    differs = (model(text, tokens).image != model(text, changed).image).any(dim=-1)
    first_image = pattern.text_len
    assert differs.tolist() == [pattern.dense()[first_image:, first_image + 3].tolist()] * 2


def test_samples_do_not_see_each_other():
    model = tiny_dalle()
    text, tokens = make_batch(model.config)
    alone = model(text[:1], tokens[:1])
    together = model(text, tokens)
    torch.testing.assert_close(together.text[:1], alone.text)
    torch.testing.assert_close(together.image[:1], alone.image)


@every_start
@pytest.mark.parametrize("count", [0, 1, 5, 11, 12])
def test_prefix_of_an_image(start, count):
    model = tiny_dalle(start_of_text=start)
    text, tokens = make_batch(model.config)
    full, prefix = model(text, tokens), model(text, tokens[:, :count])
    scored = min(count + 1, model.config.image_len)
    assert prefix.image.shape == (2, scored, model.config.image_vocab_size)
    torch.testing.assert_close(prefix.image, full.image[:, :scored])
    torch.testing.assert_close(prefix.text, full.text)


def changed_scores(model, text, tokens, parameter, row):
    """Where the scores differ once a row of a parameter is changed: (B, caption_len) and (B, image_len) bools."""
    before = model(text, tokens)
    with torch.no_grad():
        parameter[row] += torch.randn_like(parameter[row])
    after = model(text, tokens)
    return tuple((new != old).any(dim=-1) for new, old in zip(after, before, strict=True))


@every_start
def test_pads_are_learned_vectors_without_position(start):
    """The second caption has three tokens, so state 4, behind the start state, is a pad; the first one fills it."""
    model = tiny_dalle(text_len=6 if start == "inside" else 5, start_of_text=start)
    text, tokens = make_batch(model.config, lengths=[5, 3])
    padded = torch.tensor([False, True])

    changed_text, changed_image = changed_scores(model, text, tokens, model.pad_embedding.weight, 4)
    assert torch.equal(changed_image, padded[:, None].expand_as(changed_image))
    assert torch.equal(changed_text, padded[:, None] & (torch.arange(5) >= 4))

    changed_text, changed_image = changed_scores(model, text, tokens, model.text_position.weight, 4)
    assert torch.equal(changed_image, ~padded[:, None].expand_as(changed_image))
    assert torch.equal(changed_text, ~padded[:, None] & (torch.arange(5) >= 4))


@every_start
def test_start_vectors_and_position_embeddings_are_read(start):
    model = tiny_dalle(start_of_text=start)
    text, tokens = make_batch(model.config)
    for parameter in (model.start_of_text, model.text_position.weight):
        changed_text, changed_image = changed_scores(model, text, tokens, parameter, 0)
        assert changed_text.all()
        assert changed_image.all()
    for parameter in (model.start_of_image, model.row_embedding.weight, model.column_embedding.weight):
        changed_text, changed_image = changed_scores(model, text, tokens, parameter, 0)
        assert not changed_text.any()
        assert changed_image.all()


def test_image_states_are_embedded_at_the_place_they_predict():
    model = tiny_dalle(grid=(2, 3))
    tokens = random_image_tokens(model.config, 1)
    states = model.embed_image(tokens)
    read = [model.start_of_image, *model.image_embedding(tokens[0, :-1])]
    for position, state in enumerate(states[0]):
        place = model.row_embedding.weight[position // 3] + model.column_embedding.weight[position % 3]
        torch.testing.assert_close(state, read[position] + place)
    assert states.shape == (1, 6, model.config.width)


@every_start
def test_start_of_text(start):
    model = tiny_dalle(text_len=5, start_of_text=start)
    config = model.config
    assert (config.text_states, config.caption_len) == ((5, 4) if start == "inside" else (6, 5))
    assert {layer["attention"].pattern.text_len for layer in model.layers} == {config.text_states}
    logits = model(*make_batch(config))
    assert logits.text.shape == (2, config.caption_len, config.text_vocab_size)
    assert logits.image.shape == (2, config.image_len, config.image_vocab_size)


def test_layers_follow_the_schedule():
    model = tiny_dalle(depth=8)
    patterns = [layer["attention"].pattern for layer in model.layers]
    assert patterns == model.config.patterns()
    assert [type(pattern) for pattern in patterns] == [Row, Column, Row, Row, Row, Column, Row, Conv]


def test_full_size():
    """12 width^2 weights a layer in matrices: 12.1 billion in all at the paper's sizes."""
    with torch.device("meta"):
        model = Dalle(DalleConfig())
    config = model.config
    matrices = sum(module.weight.numel() for module in model.layers.modules() if isinstance(module, nn.Linear))
    assert matrices == 12 * config.width**2 * config.depth == 12_092_178_432
    assert (config.head_dim, config.image_len, config.text_states + config.image_len) == (64, 1024, 1280)
    kinds = [type(layer["attention"].pattern) for layer in model.layers]
    assert [kinds.count(kind) for kind in (Row, Column, Conv)] == [47, 16, 1]
    assert kinds[-1] is Conv
    assert 12.2e9 < sum(parameter.numel() for parameter in model.parameters()) < 12.4e9


def test_initial_values():
    model = Dalle(dataclasses.replace(tiny_dalle().config, width=128, depth=3, init_scale=0.2, grid=(32, 32)))
    ends = math.sqrt(2 * 3)
    expected = {
        model.text_embedding.weight: 0.2 / math.sqrt(128),
        model.pad_embedding.weight: 0.2 / math.sqrt(128),
        model.row_embedding.weight: 0.2 / math.sqrt(128 * 2),
        model.column_embedding.weight: 0.2 / math.sqrt(128 * 2),
        model.start_of_image: 0.2 / math.sqrt(128),
    }
    for layer in model.layers:
        expected |= {
            layer["attention"].qkv.weight: 0.2 / math.sqrt(128),
            layer["attention"].projection.weight: 0.2 / math.sqrt(128) / ends,
            layer["mlp"].expand.weight: 0.2 / math.sqrt(128),
            layer["mlp"].contract.weight: 0.2 / math.sqrt(512) / ends,
        }
    for parameter, std in expected.items():
        # Five standard errors of the estimate.
        assert parameter.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * parameter.numel()))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()
    assert not any(parameter.any() for name, parameter in model.layers.named_parameters() if name.endswith(".bias"))


def test_training_starts_from_the_uniform_distribution():
    model = Dalle(tiny_dalle().config)
    loss = model.loss(*make_batch(model.config))
    assert loss.text.item() == pytest.approx(math.log(20))
    assert loss.image.item() == pytest.approx(math.log(12))


def cross_entropy_by_hand(scores, targets):
    return -sum(row.double().log_softmax(0)[target] for row, target in zip(scores, targets, strict=True)) / len(targets)


@pytest.mark.parametrize("predict_pads", [False, True])
def test_loss_by_hand(predict_pads):
    """Each kind is averaged on its own over the whole batch, then 1/8 of the text and 7/8 of the image."""
    model = tiny_dalle(predict_pads=predict_pads)
    text, tokens = make_batch(model.config, lengths=[4, 1])
    logits, loss = model(text, tokens), model.loss(text, tokens)
    counted = torch.ones_like(text, dtype=torch.bool) if predict_pads else text != 0
    assert counted.sum() == (8 if predict_pads else 5)
    text_loss = cross_entropy_by_hand(logits.text[counted], text[counted])
    image_loss = cross_entropy_by_hand(logits.image.flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(loss.text.double(), text_loss, check_dtype=False, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.image.double(), image_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.total.double(), text_loss / 8 + 7 * image_loss / 8, rtol=1e-5, atol=0)
    assert loss.total.requires_grad
    assert not loss.text.requires_grad


@every_layout
def test_gradients_are_those_of_the_loss_by_hand(layout):
    model = tiny_dalle(layout=layout, predict_pads=True)
    text, tokens = make_batch(model.config)
    model.loss(text, tokens).total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model(text, tokens)
    by_hand = F.cross_entropy(logits.text.flatten(0, 1), text.flatten()) / 8
    by_hand = by_hand + 7 / 8 * F.cross_entropy(logits.image.flatten(0, 1), tokens.flatten())
    by_hand.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
        assert parameter.grad.any(), name


OTHER_VALUES = {
    "text_vocab_size": 21,
    "image_vocab_size": 13,
    "text_len": 6,
    "grid": (4, 3),
    "depth": 5,
    "width": 18,
    "heads": 4,
    "mlp_ratio": 3,
    "layout": "dalle-pytorch",
    "activation": "gelu",
    "start_of_text": "before",
    "predict_pads": True,
    "dropout": 0.5,
    "linear_bias": False,
    "layer_norm_eps": 1e-1,
    "final_layer_norm": False,
    "tie_embeddings": True,
    "init_scale": 0.25,
    "text_loss_weight": 0.5,
}


def fingerprint(config):
    """The parameters' shapes, and the loss of a model whose heads are not zero."""
    torch.manual_seed(0)
    model = Dalle(config)
    if not config.tie_embeddings:
        randomize(nn.ModuleList([model.text_head, model.image_head]))
    torch.manual_seed(0)
    loss = model.loss(*make_batch(config)).total.item()
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}, loss


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(DalleConfig)])
def test_every_config_field_has_an_effect(field):
    base = tiny_dalle().config
    assert fingerprint(base) == fingerprint(base)
    assert fingerprint(dataclasses.replace(base, **{field: OTHER_VALUES[field]})) != fingerprint(base)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("fast_gelu", lambda x: x / (1 + math.exp(-1.702 * x))),
        ("gelu", lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
        ("gelu_tanh", lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2),
    ],
)
def test_activation(activation, function):
    block = tiny_dalle(activation=activation).layers[0]["mlp"]
    x = torch.linspace(-4, 4, 17)
    expected = torch.tensor([function(value) for value in x.tolist()])
    torch.testing.assert_close(block.activation(x), expected)


def test_tied_embeddings_share_memory():
    model = tiny_dalle(tie_embeddings=True)
    assert model.text_head.weight is model.text_embedding.weight
    assert model.image_head.weight is model.image_embedding.weight


def test_dropout_acts_in_training_alone():
    model = tiny_dalle(dropout=0.5)
    batch = make_batch(model.config)
    assert torch.equal(model(*batch).image, model(*batch).image)
    model.train()
    assert not torch.equal(model(*batch).image, model(*batch).image)


def test_layer_norm_is_fp32_under_autocast():
    norm = LayerNorm(16)
    randomize(norm)
    x = (torch.randn(4, 16) * 5 + 40).bfloat16()
    expected = F.layer_norm(x.float(), (16,), norm.weight, norm.bias, norm.eps)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)


def test_residual_stream_and_scores_are_fp32_under_autocast():
    model = tiny_dalle()
    text, tokens = make_batch(model.config)
    dtypes = {"stream": set(), "matrices": set()}
    for layer in model.layers:
        for block in layer.values():
            block.register_forward_hook(lambda _, inputs, output: dtypes["stream"].add(output.dtype))
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda _, inputs, output: dtypes["matrices"].add(output.dtype))
    exact = model(text, tokens)
    dtypes["matrices"].clear()
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(text, tokens), model.loss(text, tokens)
    assert dtypes == {"stream": {torch.float32}, "matrices": {torch.bfloat16}}
    assert {logits.text.dtype, logits.image.dtype, loss.total.dtype} == {torch.float32}
    assert not torch.equal(logits.image, exact.image)
    torch.testing.assert_close(logits.image, exact.image, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_vocab_size": 0}, "image_vocab_size must be >= 1, got 0"),
        ({"text_len": 0}, "text_len must be >= 1, got 0"),
        ({"depth": 0}, "depth must be >= 1, got 0"),
        ({"width": 0}, "width must be >= 1, got 0"),
        ({"heads": 0}, "heads must be >= 1, got 0"),
        ({"mlp_ratio": 0}, "mlp_ratio must be >= 1, got 0"),
        ({"text_vocab_size": 1}, "text_vocab_size must be >= 2, got 1"),
        ({"grid": (0, 4)}, "grid must be two sides >= 1, got (0, 4)"),
        ({"grid": (4, 4, 4)}, "grid must be two sides >= 1, got (4, 4, 4)"),
        ({"heads": 3, "width": 16}, "heads must divide width 16, got 3"),
        ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
        ({"dropout": -0.1}, "dropout must be in [0, 1), got -0.1"),
        ({"text_loss_weight": 1.5}, "text_loss_weight must be in [0, 1], got 1.5"),
        ({"activation": "relu"}, "activation must be one of fast_gelu, gelu, gelu_tanh, got 'relu'"),
        ({"start_of_text": "after"}, "start_of_text must be inside or before, got 'after'"),
        ({"text_len": 1}, "text_len must be >= 2 where the start vector is inside, got 1"),
        ({"layout": "dense"}, "layout must be one of dalle, dalle-pytorch, ru-dalle, got 'dense'"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DalleConfig(**changes)


def integers(*shape):
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(integers(2, 5), integers(2, 12)), "text must be integers of shape (B, 4), got torch.int64 (2, 5)"),
        (lambda m: m(integers(4), integers(2, 12)), "text must be integers of shape (B, 4), got torch.int64 (4,)"),
        (lambda m: m(torch.zeros(2, 4), integers(2, 12)), "text must be integers of shape (B, 4), got torch.float32"),
        (lambda m: m(integers(2, 4), integers(2, 13)), "image_tokens must be integers of shape (B, at most 12), got"),
        (lambda m: m(integers(2, 4), torch.zeros(2, 12)), "(B, at most 12), got torch.float32 (2, 12)"),
        (lambda m: m(integers(2, 4), integers(2, 3, 4)), "(B, at most 12), got torch.int64 (2, 3, 4)"),
        (lambda m: m.loss(integers(2, 4), integers(2, 11)), "image_tokens must have shape (B, 12), got (2, 11)"),
    ],
)
def test_call_errors(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(tiny_dalle())
