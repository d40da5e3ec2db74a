"""The published dVAE: what its two files hold, and the sizes that follow from the shapes.

    encoder.pkl    blocks.input.w (hidden, channels, 7, 7), ..., blocks.output.conv.w (vocab_size, ., 1, 1)
    decoder.pkl    blocks.input.w (codebook_dim, vocab_size, 1, 1), ..., blocks.output.conv.w (2 channels, hidden, 1, 1)

Source: https://cdn.openai.com/dall-e/encoder.pkl and decoder.pkl, arXiv 2102.12092.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from dalle_fast.models.pickled_tensors import read_tensors

__all__ = ["load_part", "read_parts", "sizes_of"]

_BLOCK = re.compile(r"blocks\.group_(\d+)\.block_(\d+)\.")
_FIRST, _LAST = "blocks.input.w", "blocks.output.conv.w"


def read_parts(encoder_path: str | Path, decoder_path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read the tensors of both files; see :func:`dalle_fast.models.pickled_tensors.read_tensors`.

    Raises:
        ValueError: a file cannot be read, is not what it should be, or the two are swapped.
    """
    paths = {"encoder": encoder_path, "decoder": decoder_path}
    states = {part: read_tensors(path) for part, path in paths.items()}
    found = {part: _part_of(state) for part, state in states.items()}
    if (found["encoder"], found["decoder"]) == ("decoder", "encoder"):
        raise ValueError(
            f"encoder_path must hold the encoder and decoder_path the decoder, got them swapped: "
            f"{encoder_path} is the decoder"
        )
    for part, path in paths.items():
        if found[part] is None and _FIRST not in states[part]:
            raise ValueError(f"{part}_path must hold the {part} of a dVAE, got no tensor {_FIRST} in {path}")
        if found[part] is None:
            shape = "(hidden, channels, 7, 7)" if part == "encoder" else "(codebook_dim, vocab_size, 1, 1)"
            raise ValueError(f"{_FIRST} must have shape {shape}, got {tuple(states[part][_FIRST].shape)} in {path}")
        if found[part] != part:
            raise ValueError(f"{part}_path must hold the {part} of a dVAE, got the {found[part]} of one in {path}")
        for name in (_FIRST, _LAST):  # whose shapes say the sizes, and without values could be of any
            if name in states[part] and not states[part][name].numel():
                raise ValueError(f"{name} must have values, got shape {tuple(states[part][name].shape)} in {path}")
    return states["encoder"], states["decoder"]


def _part_of(state: dict[str, Tensor]) -> str | None:
    """Which part the first convolution belongs to: 7 x 7 on pixels, or 1 x 1 on codes."""
    shape = state[_FIRST].shape if _FIRST in state else ()
    return {(7, 7): "encoder", (1, 1): "decoder"}.get(tuple(shape[2:])) if len(shape) == 4 else None


def sizes_of(encoder: dict[str, Tensor], decoder: dict[str, Tensor], encoder_path: str | Path) -> dict[str, int]:
    """Fields of DVAEConfig by the shapes, which :func:`load_part` then checks one by one.

    Raises:
        ValueError: the encoder has no logits or no blocks.
    """
    if _LAST not in encoder or encoder[_LAST].ndim != 4:
        got = tuple(encoder[_LAST].shape) if _LAST in encoder else "none"
        raise ValueError(f"{_LAST} must have shape (vocab_size, channels, 1, 1), got {got} in {encoder_path}")
    blocks = {match.groups() for match in map(_BLOCK.match, encoder) if match}
    groups = Counter(group for group, _ in blocks)
    if not groups:
        raise ValueError(f"{encoder_path} must hold tensors named blocks.group_1.block_1.*, got none")
    hidden, channels = encoder[_FIRST].shape[:2]
    return {
        "vocab_size": encoder[_LAST].shape[0],
        "hidden": hidden,
        "channels": channels,
        "codebook_dim": decoder[_FIRST].shape[0],
        "groups": len(groups),
        "blocks_per_group": max(groups.values()),
    }


def load_part(module: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Give a module on the meta device its tensors, in float32, all of them and no other.

    Raises:
        ValueError: names the first tensor that is missing, too many, of another shape or not floating point.
    """
    own = module.state_dict()
    for name in own:
        if name not in state:
            raise ValueError(f"a dVAE of these sizes must have the tensor {name}, got none in {path}")
    for name, tensor in state.items():
        if name not in own:
            raise ValueError(f"a dVAE of these sizes must not have the tensor {name}, got one in {path}")
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{name} must have shape {tuple(own[name].shape)} to fit the encoder's sizes, "
                f"got {tuple(tensor.shape)} in {path}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype} in {path}")
    module.load_state_dict({name: state[name].to(torch.float32) for name in own}, assign=True)
