"""What several tests share: patterns to run over, the error budget of an op against float64, tiny models."""

from pathlib import Path

import torch
from torch import Tensor, nn

from dalle_fast.models.dvae import DVAE, DVAEConfig
from dalle_fast.models.transformer import Dalle, DalleConfig
from dalle_fast.patterns import Column, Conv, Full, Pattern, Row


def every_pattern(text_len: int, grid: int | tuple[int, int]) -> list[Pattern]:
    """One pattern of each kind and variant."""
    return [
        Full(text_len, grid),
        Row(text_len, grid),
        Row(text_len, grid, variant="same_row"),
        Column(text_len, grid),
        Conv(text_len, grid, kernel_size=3),
        Conv(text_len, grid, kernel_size=3, variant="clip"),
        Conv(text_len, grid, kernel_size=3, variant="torus"),
        Conv(text_len, grid, kernel_size=2, variant="corner"),
        Conv(text_len, grid, kernel_size=3, variant="clip", dilation=2),
    ]


def pattern_id(pattern: Pattern) -> str:
    """The pattern's name and variant, for test ids."""
    return "-".join(str(value) for key, value in pattern.to_dict().items() if key not in ("text_len", "grid"))


def assert_within_budget(actual: Tensor, same_dtype: Tensor, truth: Tensor) -> None:
    """err(actual) <= 2 (err(same_dtype) + eps max|truth|), and NaN and infinities in the same places.

    Args:
        actual: the op's result.
        same_dtype: what plain PyTorch gives in the inputs' dtype.
        truth: float64.
    """
    assert actual.shape == truth.shape
    finite = torch.isfinite(truth)
    assert torch.equal(torch.isfinite(actual), finite)
    assert torch.equal(actual[~finite].double(), truth[~finite])
    if not finite.any():
        return
    eps = torch.finfo(actual.dtype).eps
    error = (actual.double() - truth)[finite].abs().max()
    peer_error = (same_dtype.double() - truth)[finite].abs().max()
    assert error <= 2 * (peer_error + eps * truth[finite].abs().max())


def randomize(module: nn.Module, std: float = 0.3) -> None:
    """Give every parameter random values, so that none hides another by being zero or one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)


def tiny_dvae(**changes) -> DVAE:
    """A dVAE for 16 x 16 images, 4 x 4 tokens of 12 codes."""
    sizes = {"image_size": 16, "vocab_size": 12, "hidden": 8, "codebook_dim": 6, "groups": 3, "blocks_per_group": 1}
    return DVAE(DVAEConfig(**sizes | changes))


def tiny_dalle(**changes) -> Dalle:
    """A transformer with a layer of each pattern and random weights."""
    sizes = {
        "text_vocab_size": 20,
        "image_vocab_size": 12,
        "text_len": 5,
        "grid": (3, 4),
        "depth": 4,
        "width": 16,
        "heads": 2,
    }
    model = Dalle(DalleConfig(**sizes | changes))
    randomize(model)
    return model.eval()


def random_captions(config: DalleConfig, lengths: list[int]) -> Tensor:
    """Captions of these lengths, (B, caption_len), padded."""
    text = torch.randint(1, config.text_vocab_size, (len(lengths), config.caption_len))
    return text * (torch.arange(config.caption_len) < torch.tensor(lengths)[:, None])


def random_image_tokens(config: DalleConfig, count: int) -> Tensor:
    """Tokens of whole images, (count, image_len)."""
    return torch.randint(config.image_vocab_size, (count, config.image_len))


FONT_PATHS = [
    Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf"),
]
FONT_PATH = next((path for path in FONT_PATHS if path.is_file()), None)
