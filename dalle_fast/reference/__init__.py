"""Every op of this library in plain PyTorch, any dtype including float64: the specification.

These functions say what an op computes; ``dalle_fast.ops`` checks arguments and picks an implementation.
Where one differs from its reference beyond rounding, the implementation is wrong. Arguments are not checked
here.
"""

from dalle_fast.reference.attention import attention, attention_qkvpacked
from dalle_fast.reference.cross_entropy import linear_cross_entropy
from dalle_fast.reference.decode_linear import decode_linear
from dalle_fast.reference.draw_token import draw_token, filter_logits
from dalle_fast.reference.formats import decode_0610, decode_169, encode_0610, encode_169
from dalle_fast.reference.grad_scale import filter_nonfinite, scaled_resblock, unscale_, update_grad_scale
from dalle_fast.reference.gumbel import GumbelOutput, gumbel_noise, gumbel_quantize, gumbel_softmax
from dalle_fast.reference.kv_cache import KVCache, attention_with_kvcache
from dalle_fast.reference.likelihood import logit_laplace_nll
from dalle_fast.reference.optim import adamw16_step, round_stochastically, rounding_noise

__all__ = [
    "GumbelOutput",
    "KVCache",
    "adamw16_step",
    "attention",
    "attention_qkvpacked",
    "attention_with_kvcache",
    "decode_0610",
    "decode_169",
    "decode_linear",
    "draw_token",
    "encode_0610",
    "encode_169",
    "filter_logits",
    "filter_nonfinite",
    "gumbel_noise",
    "gumbel_quantize",
    "gumbel_softmax",
    "linear_cross_entropy",
    "logit_laplace_nll",
    "round_stochastically",
    "rounding_noise",
    "scaled_resblock",
    "unscale_",
    "update_grad_scale",
]
