"""One gradient scale for each residual block, moved by whether the block's gradients are finite.

    update     all parameter gradients of the block finite     scale * growth_factor
               one not finite                                  scale * backoff_factor, unless the last back-off of
                                                               the block is less than backoff_interval updates ago
               then                                            clamped to min_scale..max_scale

A non-finite gradient anywhere skips the whole optimiser step. Scales, counters and decisions stay on the blocks'
device: on an accelerator nothing here waits for it, except where a method says so.

Source: arXiv 2102.12092, section 2.4, Figure 4 and appendix D.1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from dalle_fast import reference
from dalle_fast.ops.checks import shape_of
from dalle_fast.ops.grad_scale import GradScaling, Unscaled, unscale_
from dalle_fast.ops.sharding import is_dtensor, local_part, sharding_groups

T = TypeVar("T")

_HALF_DTYPES = (torch.float16, torch.bfloat16)
_GRADIENT_DTYPES = (*_HALF_DTYPES, torch.float32, torch.float64)
_COUNTS = ("updates_since_backoff", "skips", "streaks", "updates", "skipped")


class ScalerReport(NamedTuple):
    """The scaler's state for a log; a block is named by its index.

    Attributes:
        scales: one a block.
        skips: updates in which the block had a non-finite gradient, one a block.
        rest_skips: the same of all parameters that belong to no block.
        updates: updates so far.
        skipped: those of them in which any gradient was not finite.
        streaks: updates with a non-finite gradient of the block in a row, up to the last one; one a block.
        rest_streak: the same of all parameters that belong to no block.
        stuck: blocks at the smallest scale whose streak is backoff_interval or longer: a smaller scale would not help.
        warning: one sentence about ``stuck`` and a streak as long of the rest, or None.
    """

    scales: list[float]
    skips: list[int]
    rest_skips: int
    updates: int
    skipped: int
    streaks: list[int]
    rest_streak: int
    stuck: list[int]
    warning: str | None


class ResblockGradScaler:
    """Scales of residual blocks for :func:`dalle_fast.scaled_resblock`, and the update that depends on them.

    ::

        scaler = ResblockGradScaler(blocks)
        # in the model: x = scaled_resblock(x, blocks[i], scaler.block_scales[i])
        for batch in batches:
            model.loss(batch).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    Methods carry the names of torch.amp.GradScaler's. With several optimisers call ``unscale_`` on all of them before
    the first ``step``: a step is skipped where any gradient seen since the last ``update`` is not finite.

    Parameters may be DTensors (fully_shard): flags and norms are then agreed upon by one all-reduce over the ranks that
    share them. Make the scaler after fully_shard, which replaces parameters, and after the model is on its device. A
    copy by copy.deepcopy refers to copies of the parameters; copy model, optimiser and scaler together, or use
    state_dict.

    Args:
        blocks: modules, or iterables of parameters: what one scaled_resblock's ``fn`` owns. Blocks share no parameter.
            Parameters that do not require gradients are left aside.
        init_scale: first scale of each block.
        growth_factor: >= 1.
        backoff_factor: in (0, 1).
        backoff_interval: >= 1, in updates.
        min_scale, max_scale: limits.
        replicas: M, by which init_scale and the limits are multiplied: the number of data-parallel replicas where the
            loss is divided by the batch of all of them and their gradients are summed. Where each averages over its own
            part and gradients are averaged (DistributedDataParallel, fully_shard) a replica's gradients are not
            smaller by M, and it stays 1.

    Raises:
        TypeError: blocks that are no modules or iterables of tensors.
        ValueError: no block, a block without trainable parameters, parameters in two blocks or on several devices, a
            number out of its range.

    Source: arXiv 2102.12092, appendix D.1.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module | Iterable[Tensor]],
        *,
        init_scale: float = 2.0**13,
        growth_factor: float = 2 ** (1 / 1000),
        backoff_factor: float = 2**-0.5,
        backoff_interval: int = 125,
        min_scale: float = 2.0**7,
        max_scale: float = 2.0**24,
        replicas: int = 1,
    ):
        _check_numbers(init_scale, growth_factor, backoff_factor, backoff_interval, min_scale, max_scale, replicas)
        self.growth_factor, self.backoff_factor, self.backoff_interval = growth_factor, backoff_factor, backoff_interval
        self.min_scale, self.max_scale = _float32(min_scale * replicas), _float32(max_scale * replicas)
        self.replicas = replicas
        self._places = _find_parameters(blocks)
        count, device = len(blocks), next(iter(self._places)).device
        # The last scale is that of all parameters outside the blocks; so is the last of skips and streaks.
        self._scales = torch.full((count + 1,), init_scale * replicas, dtype=torch.float32, device=device)
        self._scales[-1] = 1.0
        self._updates_since_backoff = torch.full((count,), backoff_interval, dtype=torch.int64, device=device)
        self._skips, self._streaks = (torch.zeros(count + 1, dtype=torch.int64, device=device) for _ in range(2))
        self._updates, self._skipped = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self._found: Unscaled | None = None  # over all optimisers unscaled since the last update, or before it
        self._pending: dict[Optimizer, _Pending] = {}

    @property
    def block_scales(self) -> tuple[Tensor, ...]:
        """One float32 tensor without dimensions a block, for scaled_resblock; ``update`` changes them in place."""
        return tuple(self._scales[:-1].unbind())

    def scales(self) -> Tensor:
        """The scales as they are now, (n,) float32 on the blocks' device, a copy."""
        return self._scales[:-1].clone()

    def get_scale(self) -> list[float]:
        """The scales, one a block. Waits for the device."""
        return self._scales[:-1].tolist()

    def is_enabled(self) -> bool:
        """True."""
        return True

    def scale(self, outputs: T) -> T:
        """``outputs`` themselves: the loss is not scaled, the blocks are."""
        return outputs

    @property
    def grad_norm(self) -> Tensor:
        """Norm of all gradients since the last update, unscaled, or of those before it if none came since.

        float64 of no dimensions on the blocks' device; infinite where a gradient was not finite.

        Raises:
            RuntimeError: before the first unscale_.
        """
        if self._found is None:
            raise RuntimeError("unscale_(optimizer) must come before grad_norm")
        return torch.where(self._found.nonfinite.any(), math.inf, self._found.sum_of_squares.sqrt())

    @torch.no_grad()
    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients of the optimiser's parameters by their blocks' scales and look for non-finite ones.

        Gradients of an optimiser with ``reads_scaled_grads`` (:class:`dalle_fast.AdamW16`) are read alone: they stay
        scaled, and ``step`` hands it the scales. Those of any other are divided in place, non-finite elements becoming
        0; float16 ones are refused, for they would lose what falls below float16.

        Raises:
            RuntimeError: a second time before ``update``.
            TypeError: a gradient that is sparse or of a dtype that is not taken, a 16-bit parameter outside the blocks.
            ValueError: a block's gradient is missing, or all are; another device than the blocks'; a DTensor whose sum
                over the ranks is still due; a parameter of another optimizer that was unscaled.
        """
        if optimizer in self._pending:
            raise RuntimeError("unscale_ may be called once for an optimizer between two updates, got a second call")
        reads_scaled_grads = getattr(optimizer, "reads_scaled_grads", False)
        rest = len(self._scales) - 1
        block_of: dict[Tensor, int] = {}
        shares: dict[tuple, _Share] = defaultdict(lambda: _Share([], []))
        for parameter in _parameters_of_optimizer(optimizer):
            place = self._places.get(parameter)
            block = block_of[parameter] = rest if place is None else place.block
            grad = parameter.grad
            self._check_gradient(optimizer, parameter, place, reads_scaled_grads)
            if grad is not None:
                if any(parameter in seen.block_of for seen in self._pending.values()):
                    raise ValueError(
                        f"a parameter must belong to one optimizer, {place or _name(optimizer, parameter)} "
                        "was unscaled through another"
                    )
                share = shares[sharding_groups(grad)]
                share.grads.append(local_part(grad))
                share.blocks.append(block)
        if not shares:
            raise ValueError(f"the optimizer's parameters must have gradients, none of {len(block_of)} has one")
        found = self._unscale_shares(shares, write=not reads_scaled_grads)
        if self._pending:
            nonfinite, sum_of_squares = self._found
            found = Unscaled(nonfinite | found.nonfinite, sum_of_squares + found.sum_of_squares)
        self._found = found
        self._pending[optimizer] = _Pending(block_of)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> bool | Tensor:
        """``optimizer.step(*args, **kwargs)``, unless a gradient seen since the last ``update`` was not finite.

        An optimiser with ``reads_scaled_grads`` gets ``scaling=``, an ``ops.grad_scale.GradScaling``, and
        skips by it. PyTorch's with ``fused=True`` skip on their device too. For any other the decision is read on the
        host, which waits for the device.

        Returns:
            False if the step was skipped. On an accelerator a bool tensor of no dimensions, so that only a caller who
            asks for its truth waits.

        Raises:
            RuntimeError: before ``unscale_``, or a second time before ``update``.
            ValueError: a closure, which would compute gradients that nobody unscales.
        """
        pending = self._pending.get(optimizer)
        if pending is None:
            raise RuntimeError("unscale_(optimizer) must come before step(optimizer)")
        if pending.stepped:
            raise RuntimeError("step may be called once for an optimizer between two updates, got a second call")
        if any(callable(arg) for arg in (*args, kwargs.get("closure"))):
            raise ValueError("step takes no closure, for nobody would unscale its gradients")
        skip = self._found.nonfinite.any()
        if getattr(optimizer, "reads_scaled_grads", False):
            scaling = GradScaling(self._scales, pending.block_of, skip, self._found.sum_of_squares)
            optimizer.step(*args, scaling=scaling, **kwargs)
        elif getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale, optimizer.found_inf = None, skip.float()
            try:
                optimizer.step(*args, **kwargs)
            finally:
                del optimizer.grad_scale, optimizer.found_inf
        elif not skip.item():
            optimizer.step(*args, **kwargs)
        pending.stepped = True
        return not skip.item() if skip.device.type == "cpu" else ~skip

    @torch.no_grad()
    def update(self) -> None:
        """Move the scales by the rule, count, and forget the gradients' flags. Once after the optimisers' steps.

        A block backs off only for its own parameters' gradients; one that is not finite outside the blocks skips the
        step and leaves the scales to grow. Scales change in place, which autograd reports if a backward pass that
        saved them is still to come.

        Raises:
            RuntimeError: before any ``unscale_``, or a trainable parameter of a block belongs to no optimiser that was
                unscaled.
        """
        if not self._pending:
            raise RuntimeError("unscale_(optimizer) must come before update()")
        for parameter, place in self._places.items():
            if parameter.requires_grad and not any(parameter in seen.block_of for seen in self._pending.values()):
                raise RuntimeError(
                    "every trainable parameter of a block must be unscaled before update(), through the optimizer that "
                    f"owns it, {place} was not: make the scaler after fully_shard, or freeze the parameter"
                )
        nonfinite = self._found.nonfinite
        scales, elapsed = reference.update_grad_scale(
            self._scales[:-1].double(),  # growth_factor in float32 would be off to one side, update by update
            nonfinite[:-1],
            self._updates_since_backoff,
            growth_factor=self.growth_factor,
            backoff_factor=self.backoff_factor,
            backoff_interval=self.backoff_interval,
            min_scale=self.min_scale,
            max_scale=self.max_scale,
        )
        self._scales[:-1].copy_(scales)
        self._updates_since_backoff.copy_(elapsed)
        self._skips.add_(nonfinite)
        self._streaks.add_(1).mul_(nonfinite)
        self._updates.add_(1)
        self._skipped.add_(nonfinite.any())
        self._pending.clear()

    def report(self) -> ScalerReport:
        """Scales and counters as Python numbers. Waits for the device, by one copy."""
        counts = torch.stack((self._updates, self._skipped))
        values = torch.cat([x.double() for x in (self._scales, self._skips, self._streaks, counts)]).tolist()
        size = len(self._scales)
        scales, (*skips, rest_skips) = values[: size - 1], map(int, values[size : 2 * size])
        *streaks, rest_streak = map(int, values[2 * size : 3 * size])
        updates, skipped = map(int, values[3 * size :])
        stuck = [
            block
            for block, (scale, streak) in enumerate(zip(scales, streaks, strict=True))
            if scale <= self.min_scale and streak >= self.backoff_interval
        ]
        warnings = []
        if stuck:
            names = ", ".join(map(str, stuck[:8])) + (", ..." if len(stuck) > 8 else "")
            warnings.append(
                f"{len(stuck)} of {len(scales)} blocks ({names}) had non-finite gradients in each of the last "
                f"{min(streaks[block] for block in stuck)} updates, with the scale at its smallest, {self.min_scale:g}"
            )
        if rest_streak >= self.backoff_interval:
            warnings.append(
                f"parameters outside the blocks had non-finite gradients in each of the last {rest_streak} updates, "
                "which no scale mends"
            )
        warning = "; ".join(warnings) or None
        return ScalerReport(scales, skips, rest_skips, updates, skipped, streaks, rest_streak, stuck, warning)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the scales and counters, tensors on the blocks' device; the constructor's numbers are not in it.

        What ``unscale_`` found since the last ``update`` is not in it either: save after ``update``.
        """
        return {
            "scales": self.scales(),
            "updates_since_backoff": self._updates_since_backoff.clone(),
            "skips": self._skips.clone(),
            "streaks": self._streaks.clone(),
            "updates": self._updates.clone(),
            "skipped": self._skipped.clone(),
            "replicas": torch.tensor(self.replicas),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over a state, in place. Waits for the device.

        A state of another number of replicas has its scales multiplied by the ratio, and clamped.

        Raises:
            ValueError: fields missing or unknown, another number of blocks, a scale that is NaN or outside the limits,
                a negative count. Nothing has changed then.
        """
        state = _checked_state(state_dict, len(self._scales) - 1)
        scales = state["scales"]
        if (saved := int(state["replicas"])) != self.replicas:
            scales = (scales.double() * self.replicas / saved).float().clamp(self.min_scale, self.max_scale)
        for block, value in enumerate(scales.tolist()):
            if not self.min_scale <= value <= self.max_scale:
                raise ValueError(
                    f"scales must lie in [{self.min_scale}, {self.max_scale}], got {value} of block {block}"
                )
        self._scales[:-1].copy_(scales)
        for name in _COUNTS:
            getattr(self, f"_{name}").copy_(state[name])
        self._pending.clear()
        self._found = None

    def _check_gradient(
        self, optimizer: Optimizer, parameter: Tensor, place: _Place | None, reads_scaled_grads: bool
    ) -> None:
        grad = parameter.grad
        if place is None and parameter.dtype in _HALF_DTYPES and (parameter.requires_grad or grad is not None):
            raise TypeError(
                f"a 16-bit parameter must belong to a block, {_name(optimizer, parameter)} is {parameter.dtype}: "
                "keep it in float32 or add its block"
            )
        if grad is None:
            if place is not None and parameter.requires_grad:
                raise ValueError(f"every trainable parameter of a block must have a gradient, {place} has none")
            return

        def whose() -> str:  # a search among all parameters
            return f"that of {place or _name(optimizer, parameter)}"

        if grad.layout != torch.strided:
            raise TypeError(f"gradients must be dense, {whose()} has layout {grad.layout}")
        if grad.dtype not in _GRADIENT_DTYPES or grad.dtype != parameter.dtype:
            raise TypeError(
                "gradients must be float16, bfloat16, float32 or float64, as their parameters are, "
                f"{whose()} is {grad.dtype} and the parameter {parameter.dtype}"
            )
        if grad.device != (device := self._scales.device):
            raise ValueError(f"gradients must be on the blocks' device, {device}, {whose()} is on {grad.device}")
        if is_dtensor(grad) and any(placement.is_partial() for placement in grad.placements):
            raise ValueError(f"gradients must be reduced over the ranks, {whose()} is placed {grad.placements}")
        if grad.dtype == torch.float16 and not reads_scaled_grads:
            raise TypeError(
                f"float16 gradients would lose what falls below float16 when they are unscaled in place, {whose()} is "
                "float16: use an optimizer that reads scaled gradients (dalle_fast.AdamW16)"
            )

    def _unscale_shares(self, shares: Mapping[tuple, _Share], write: bool) -> Unscaled:
        """Unscale what this rank holds, and agree with the ranks that hold the rest."""
        flags, sums, owners = [], [], []
        for groups, share in shares.items():
            nonfinite, sum_of_squares = unscale_(share.grads, self._scales, share.blocks, write=write)
            flags.append(nonfinite)
            sums.append(sum_of_squares)
            owners.append(groups)
        nonfinite = torch.stack(flags).any(0)
        # One all-reduce a group, of flags and sums together; ranks see parameters, and so groups, in one order.
        for group in dict.fromkeys(group for groups in owners for group in groups):
            values = torch.cat([nonfinite.double(), torch.stack(sums)])
            dist.all_reduce(values, group=group)
            nonfinite = values[: len(nonfinite)] > 0
            totals = values[len(nonfinite) :].unbind()
            sums = [total if group in groups else s for total, s, groups in zip(totals, sums, owners, strict=True)]
        return Unscaled(nonfinite, torch.stack(sums).sum())


class _Place(NamedTuple):
    """Where among the blocks a parameter is."""

    block: int
    index: int
    name: str | None

    def __str__(self) -> str:
        name = "" if self.name is None else f" ({self.name})"
        return f"parameter {self.index}{name} of block {self.block}"


class _Share(NamedTuple):
    """Gradients that are sharded alike."""

    grads: list[Tensor]
    blocks: list[int]


@dataclass
class _Pending:
    """An optimiser between its unscale_ and the next update."""

    block_of: dict[Tensor, int]
    stepped: bool = False


def _find_parameters(blocks: Sequence[nn.Module | Iterable[Tensor]]) -> dict[Tensor, _Place]:
    places: dict[Tensor, _Place] = {}
    seen: dict[int, int] = {}
    device = None
    for block, entry in enumerate(blocks):
        if (first := seen.setdefault(id(entry), block)) != block:
            raise ValueError(f"a block must be listed once, blocks {first} and {block} are the same object")
        if isinstance(entry, Tensor) or not isinstance(entry, nn.Module | Iterable):
            raise TypeError(f"blocks must be modules or iterables of parameters, block {block} is a {_kind(entry)}")
        if isinstance(entry, nn.Module):
            named = list(entry.named_parameters())
        else:
            named = [(None, parameter) for parameter in entry]
        for index, (name, parameter) in enumerate(named):
            place = _Place(block, index, name)
            if not isinstance(parameter, Tensor):
                raise TypeError(f"blocks must be modules or iterables of parameters, {place} is a {_kind(parameter)}")
            if parameter in places:
                raise ValueError(f"a parameter must be listed once, {place} is {places[parameter]}")
            device = parameter.device if device is None else device
            if parameter.device != device or device.type == "meta":
                raise ValueError(
                    f"blocks must be on one device, not meta, got {device} and {parameter.device}: {place}"
                )
            places[parameter] = place
        if not any(parameter.requires_grad for _, parameter in named):
            raise ValueError(f"a block must have a trainable parameter, block {block} has none of {len(named)}")
    if not places:
        raise ValueError("blocks must hold at least one block, got none")
    return places


def _check_numbers(
    init_scale: float,
    growth_factor: float,
    backoff_factor: float,
    backoff_interval: int,
    min_scale: float,
    max_scale: float,
    replicas: int,
) -> None:
    if not 1 <= growth_factor < math.inf:
        raise ValueError(f"growth_factor must be finite and >= 1, got {growth_factor}")
    if not 0 < backoff_factor < 1:
        raise ValueError(f"backoff_factor must lie in (0, 1), got {backoff_factor}")
    for name, value in (("backoff_interval", backoff_interval), ("replicas", replicas)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value}")
    if not 0 < min_scale <= init_scale <= max_scale:
        raise ValueError(
            f"init_scale must lie between min_scale and max_scale, all > 0, got {init_scale}, {min_scale}, {max_scale}"
        )
    smallest, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    if min_scale * replicas < smallest:
        raise ValueError(f"min_scale * replicas must be at least {smallest}, got {min_scale} * {replicas}")
    if max_scale * replicas > largest:
        raise ValueError(f"max_scale * replicas must be at most {largest}, got {max_scale} * {replicas}")


def _checked_state(state_dict: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The fields on the CPU, each of its shape, its counts >= 0."""
    shapes = {"scales": (count,), "updates_since_backoff": (count,), "skips": (count + 1,), "streaks": (count + 1,)}
    shapes |= {"updates": (), "skipped": (), "replicas": ()}
    if shapes.keys() != state_dict.keys():
        raise ValueError(f"state_dict must have the fields {', '.join(shapes)}, got {', '.join(state_dict) or 'none'}")
    state = {name: torch.as_tensor(value).detach().cpu() for name, value in state_dict.items()}
    if state["scales"].ndim == 1 and len(state["scales"]) != count:
        raise ValueError(f"state_dict must be of {count} blocks, got {len(state['scales'])}")
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {shape_of(state[name])}")
        least = 1 if name == "replicas" else 0
        if name != "scales" and not (state[name] >= least).all():
            raise ValueError(f"{name} must be >= {least}, got {state[name].min().item()}")
    return state


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def _kind(entry: object) -> str:
    return type(entry).__name__


def _parameters_of_optimizer(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _name(optimizer: Optimizer, parameter: Tensor) -> str:
    """What a message calls a parameter outside the blocks."""
    for number, group in enumerate(optimizer.param_groups):
        for index, candidate in enumerate(group["params"]):
            if candidate is parameter:
                name = f" ({group['param_names'][index]})" if "param_names" in group else ""
                return f"parameter {index}{name} of param_groups[{number}]"
    raise AssertionError("the parameter is the optimizer's")
