"""What several tests share: patterns to run over, the error budget of an op against float64, tiny models."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dalle_fast.data.tokenizer import Tokenizer
from dalle_fast.models.dvae import DVAE, DVAEConfig
from dalle_fast.models.transformer import Dalle, DalleConfig
from dalle_fast.ops import backends
from dalle_fast.patterns import Column, Conv, Full, Pattern, Row
from dalle_fast.pipeline import Pipeline

needs_extension = pytest.mark.skipif(
    backends.extension is None, reason=f"dalle_fast._C is not built: {backends.extension_error}"
)


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


def visible_pairs(pattern: Pattern, batch: int, length: int, text_lens: Tensor | None = None) -> Tensor:
    """Who sees whom among the first ``length`` positions, (B, 1, S, S)."""
    mask = pattern.dense()[:length, :length].expand(batch, 1, -1, -1)
    if text_lens is None:
        return mask
    position = torch.arange(length)
    hidden = (position >= text_lens[:, None]) & (position < pattern.text_len)
    return mask & ~hidden[:, None, None]


def attention_formulas(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    pattern: Pattern,
    text_lens: Tensor | None = None,
    scale: float | None = None,
) -> list[Tensor]:
    """out, lse and the gradients of query, key and value, with the weights made again from lse for the gradients.

    Computed in float32 or wider and rounded to the inputs' dtype, lse excepted: of float64 inputs the truth, of
    others the best that plain PyTorch gives without keeping the weights.
    """
    dtype, (batch, heads, length, head_dim) = query.dtype, query.shape
    q, k, v, do = (x.to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value, grad_out))
    groups = key.shape[1]
    k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    mask = visible_pairs(pattern, batch, length, text_lens)
    scores = (q @ k.mT * scale).masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    p = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0))
    out = (p @ v).to(dtype)
    delta = (out * do).sum(-1, keepdim=True) - (0.0 if grad_lse is None else grad_lse.to(q.dtype)[..., None])
    ds = p * (do @ v.mT - delta) * scale
    grads = [ds @ k, *((w.mT @ x).unflatten(1, (groups, -1)).sum(2) for w, x in ((ds, q), (p, do)))]
    return [out, lse.squeeze(-1), *(grad.to(dtype) for grad in grads)]


def assert_attention_within_budget(
    actual: list[Tensor], tensors: list[Tensor | None], pattern: Pattern, **options
) -> None:
    """out, lse, dq, dk, dv against float64, within the error budget.

    Args:
        actual: the five results.
        tensors: query, key, value and the gradients of out and (or None) of lse.
        options: text_lens, scale.
    """
    budget = AttentionBudget()
    budget.add(actual, tensors, pattern, **options)
    budget.check()


class AttentionBudget:
    """The error budget over several runs together; a single short one is near its truth or its peer by luck."""

    def __init__(self):
        self.runs: list[tuple[list[Tensor], ...]] = []

    def add(self, actual: list[Tensor], tensors: list[Tensor | None], pattern: Pattern, **options) -> None:
        """Take a run's results and inputs, as assert_attention_within_budget does."""
        wide = [None if tensor is None else tensor.double() for tensor in tensors]
        truth = attention_formulas(*wide, pattern, **options)
        self.add_results(actual, attention_formulas(*tensors, pattern, **options), truth)

    def add_results(self, actual: list[Tensor], same_dtype: list[Tensor], truth: list[Tensor]) -> None:
        """Take a run's results, what plain PyTorch gives, and float64."""
        for one, true in zip(actual, truth, strict=True):
            assert one.shape == true.shape
        self.runs.append((actual, same_dtype, truth))

    def check(self) -> None:
        """Hold each of the five results, of all runs, to the budget."""
        for number in range(5):
            joined = (torch.cat([run[kind][number].flatten() for run in self.runs]) for kind in range(3))
            assert_within_budget(*joined)


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


def tiny_pipeline(captions: list[str], **options) -> Pipeline:
    """A pipeline of both for 16 x 16 images, with a tokenizer of the captions, and images that differ by caption."""
    tokenizer = Tokenizer.train(captions, 270)
    dvae = tiny_dvae()
    randomize(dvae)
    dalle = tiny_dalle(text_vocab_size=tokenizer.vocab_size, text_len=12, grid=(4, 4))
    randomize(dalle, std=1.0)
    return Pipeline(dvae.eval(), dalle, tokenizer, **options)


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


@contextmanager
def no_cuda_synchronisation() -> Iterator[None]:
    """Whatever waits for the GPU raises; what is under way at the start is waited for."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
