"""What the tests of ResblockGradScaler share: a small residual model, and blocks whose gradients are set by hand."""

import math

import torch
from torch import nn

from dalle_fast import ResblockGradScaler, scaled_resblock


class Residual(nn.Module):
    """An embedding, residual blocks and a head; the branches may be of another dtype than the rest."""

    def __init__(self, depth: int = 3, width: int = 6, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 8, dtype=dtype), nn.GELU(), nn.Linear(8, width, dtype=dtype))
            for _ in range(depth)
        )
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(width, 10)
        self.dtype = dtype

    def forward(self, tokens: torch.Tensor, scales) -> torch.Tensor:
        x = self.embedding(tokens)
        for block, scale in zip(self.blocks, scales, strict=True):
            x = scaled_resblock(x, lambda h, block=block: block(h.to(self.dtype)), scale)
        return nn.functional.cross_entropy(self.head(x * self.gain).flatten(0, 1), tokens.flatten())


class ScaledSGD(torch.optim.Optimizer):
    """p -= lr * grad / scale, skipped on the device: an optimiser that reads scaled gradients."""

    reads_scaled_grads = True

    def __init__(self, params, lr: float = 0.1):
        super().__init__(params, {"lr": lr})
        self.scalings = []

    @torch.no_grad()
    def step(self, closure=None, *, scaling):
        self.scalings.append(scaling)
        for group in self.param_groups:
            for param in group["params"]:
                change = group["lr"] * param.grad.float() / scaling.scales[scaling.block_of[param]]
                param.sub_(torch.where(scaling.skip, 0.0, change).to(param.dtype))


def make_parameters(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2)) for _ in range(count)]


def set_gradients(parameters: list[nn.Parameter], bad: set[int] = frozenset(), value: float = math.inf) -> None:
    for index, parameter in enumerate(parameters):
        parameter.grad = torch.ones_like(parameter)
        if index in bad:
            parameter.grad[1] = value


def run_update(scaler: ResblockGradScaler, optimizer: torch.optim.Optimizer) -> bool:
    scaler.unscale_(optimizer)
    taken = scaler.step(optimizer)
    scaler.update()
    return taken


def scaler_of(count: int, rest: int = 1, **options):
    """A scaler of ``count`` blocks of one parameter each, all parameters, and their optimiser."""
    parameters = make_parameters(count + rest)
    scaler = ResblockGradScaler([[parameter] for parameter in parameters[:count]], **options)
    return scaler, parameters, ScaledSGD(parameters)
