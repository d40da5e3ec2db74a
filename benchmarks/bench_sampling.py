"""Decoding a batch of images token by token, arg-max each time: with cached keys and values, and without.

Without a cache, every token runs ``Dalle.forward`` over the text and all image tokens so far. Both draw whole images
for as many different captions, at the preset's sizes.
"""

import pytest
import torch
from torch import Tensor, nn

from dalle_fast.models.transformer import Dalle, DalleConfig
from dalle_fast.sampling import sample_tokens

BATCH = 16


@torch.no_grad()
def recompute_prefix(model: Dalle, text: Tensor) -> Tensor:
    """Tokens (B, image_len) of captions (B, caption_len), the whole prefix computed anew for each."""
    tokens = torch.empty(len(text), 0, dtype=torch.int64)
    for position in range(model.config.image_len):
        drawn = model(text, tokens).image[:, position].argmax(dim=-1, keepdim=True)
        tokens = torch.cat([tokens, drawn], dim=1)
    return tokens


def cached(model: Dalle, text: Tensor) -> Tensor:
    """The same from the cache."""
    return sample_tokens(model, text, temperature=0)[0]


def make_model(config: DalleConfig) -> Dalle:
    """A transformer whose scores differ from token to token; as initialised, all are 0."""
    model = Dalle(config).eval()
    nn.init.normal_(model.image_head.weight)
    return model


@pytest.mark.benchmark(group="sampling", min_rounds=5)
@pytest.mark.parametrize("decode", [recompute_prefix, cached], ids=["recompute", "cached"])
def test_sampling(checked, prior_preset, captions, decode):
    model, text = make_model(prior_preset.model), captions(BATCH)
    other = recompute_prefix if decode is cached else cached
    expected = other(model, text)
    assert len(expected.unique()) > model.config.image_len, "the tokens are too alike to tell right from wrong"

    def check(tokens: Tensor) -> None:
        assert torch.equal(tokens, expected)

    checked(lambda: decode(model, text), check, images=BATCH, tokens=BATCH * model.config.image_len)
