"""Files as the published dVAE's: whole modules, pickled under the names of its package."""

import sys
import types
from pathlib import Path

import torch
from torch import nn

from dalle_fast.models import dvae as own


class Encoder(nn.Module):
    pass


class EncoderBlock(nn.Module):
    pass


class Decoder(nn.Module):
    pass


class DecoderBlock(nn.Module):
    pass


class Conv2d(nn.Module):
    pass


CLASSES = {
    "dall_e.encoder": (Encoder, EncoderBlock),
    "dall_e.decoder": (Decoder, DecoderBlock),
    "dall_e.utils": (Conv2d,),
}
TOPS = {"encoder": (Encoder, EncoderBlock), "decoder": (Decoder, DecoderBlock)}


def imitate(module: nn.Module, part: str) -> nn.Module:
    """The module of ours with the classes and the attributes that the published one has."""
    top, block = TOPS[part]
    kinds = {own.Encoder: top, own.Decoder: top, own.ResidualBlock: block, own.Conv2d: Conv2d}
    if type(module) not in kinds | {nn.Sequential: nn.Sequential}:
        return module
    other = kinds.get(type(module), nn.Sequential)()
    other.device, other.requires_grad = torch.device("cpu"), False
    if isinstance(module, own.ResidualBlock):
        other.post_gain = module.gain
    for name, parameter in module.named_parameters(recurse=False):
        other.register_parameter(name, parameter)
    for name, child in module.named_children():
        other.add_module(name, imitate(child, part))
    return other


def save_published(dvae: own.DVAE, folder: Path, monkeypatch, *, legacy: bool = False) -> tuple[Path, Path]:
    """Write encoder.pkl and decoder.pkl; no trace of the package's names stays in this process."""
    paths = folder / "encoder.pkl", folder / "decoder.pkl"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
        for name, classes in CLASSES.items():
            stand_in = types.ModuleType(name)
            for kind in classes:
                setattr(stand_in, kind.__name__, kind)
                patch.setattr(kind, "__module__", name)
            patch.setitem(sys.modules, name, stand_in)
        for path in paths:
            part = imitate(getattr(dvae, path.stem), path.stem)
            torch.save(part, path, _use_new_zipfile_serialization=not legacy)
    return paths
