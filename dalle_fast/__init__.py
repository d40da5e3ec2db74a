"""Fast DALL-E: sparse attention, quantisation and mixed precision for text-to-image transformers.

The ops (``attention``, ``gumbel_quantize``, ...) and the patterns that say who sees whom need PyTorch alone; so do the
models. ``Pipeline`` also needs the tokenizers package, and is imported when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

from dalle_fast import formats, patterns, reference
from dalle_fast.grad_scaler import ResblockGradScaler
from dalle_fast.models.dvae import DVAE, DVAEConfig
from dalle_fast.models.transformer import Dalle, DalleConfig
from dalle_fast.ops.attention import attention, attention_qkvpacked
from dalle_fast.ops.cross_entropy import linear_cross_entropy
from dalle_fast.ops.grad_scale import scaled_resblock
from dalle_fast.ops.gumbel import GumbelOutput, gumbel_quantize, gumbel_softmax
from dalle_fast.ops.kv_cache import KVCache, attention_with_kvcache
from dalle_fast.optim import AdamW16

if TYPE_CHECKING:
    from dalle_fast.pipeline import GenerateOutput, Pipeline

__version__ = "0.1.0"

__all__ = [
    "DVAE",
    "AdamW16",
    "DVAEConfig",
    "Dalle",
    "DalleConfig",
    "GenerateOutput",
    "GumbelOutput",
    "KVCache",
    "Pipeline",
    "ResblockGradScaler",
    "attention",
    "attention_qkvpacked",
    "attention_with_kvcache",
    "formats",
    "gumbel_quantize",
    "gumbel_softmax",
    "linear_cross_entropy",
    "patterns",
    "reference",
    "scaled_resblock",
]


def __getattr__(name: str) -> Any:
    if name in ("GenerateOutput", "Pipeline"):
        from dalle_fast import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'dalle_fast' has no attribute {name!r}")
