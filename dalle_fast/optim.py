"""AdamW with 16-bit moments: the optimiser of 16-bit training without float32 copies of the weights.

    m = b1 m + (1 - b1) g,   v = min(b2 v + (1 - b2) g^2, variance_clip)
    p = p (1 - lr weight_decay) - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

One update of all parameters is one call of ``dalle_fast.ops.adamw16.adamw16_``: a gradient is read once, and is divided
by its scale and clipped while it is read. Bytes of a 16-bit parameter at an update: 2 + 2 + 2 + 2 read (p, g, m, v) and
2 + 2 + 2 written. Nothing waits for the device.

Source: arXiv 2102.12092, section 2.4 and appendix B.2, which names no float32 copy of the weights, and not how 16-bit
weights are rounded; Gupta et al., "Deep learning with limited numerical precision", 2015 (stochastic rounding).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from dalle_fast import formats
from dalle_fast.ops.adamw16 import UpdatedTensors, UpdateRule, adamw16_
from dalle_fast.ops.checks import check_backend, shape_of
from dalle_fast.ops.grad_scale import GradScaling, unscale_
from dalle_fast.ops.sharding import is_dtensor, local_part, sharding_groups
from dalle_fast.ops.tensor_table import DTYPE_CODES, is_dense, to_device

_ROUNDINGS = ("stochastic", "master")
_NUMBERS = ("lr", "betas", "eps", "weight_decay", "variance_clip")  # of a group


class AdamW16(torch.optim.Optimizer):
    """AdamW whose moments of 16-bit parameters are 16-bit words, with clipped variance.

    float16 and bfloat16 parameters have moments in 1-6-9 and 0-6-10 (:mod:`dalle_fast.formats`); float32 ones (keep
    gains, biases, embeddings and unembeddings there) have float32 moments. Arithmetic is float32.

    Args:
        params: float32, float16 or bfloat16, on one device; or groups of them, each with its own numbers.
        lr: >= 0, a number; schedulers change it between updates.
        betas: of the running mean and the running variance.
        eps: > 0, added to the root of the variance.
        weight_decay: >= 0, decoupled.
        variance_clip: > 0, the running variance is clipped to it before it is used or stored.
        grad_clip: > 0, largest global norm of the gradients, which larger ones are scaled down to, as by
            ``torch.nn.utils.clip_grad_norm_``; None: no limit. The paper's is 4.
        rounding: how a 16-bit parameter is updated. "stochastic": up or down, each as likely as the float32 result is
            near to it; the noise depends on seed, the parameter's place among the optimiser's, its number of updates
            and the place in it alone. "master": rounded from a float32 copy, which is updated in its place.
            State is 4 bytes an element of a 16-bit parameter, or 8.
        seed: 0 <= seed < 2^64, of the stochastic rounding.
        backend: "auto", "cpp" or "reference".

    ``state[p]`` holds ``step``, ``exp_avg``, ``exp_avg_sq`` and, with rounding="master", ``master``. A state that was
    saved is restored bit for bit. One of another kind is converted: floating-point moments of a 16-bit parameter (those
    of torch.optim.AdamW) are encoded, words of a float32 one decoded, a missing master starts as the parameter, and
    one that is not needed is left out.

    Parameters may be DTensors (``fully_shard``): each process updates its shard, and draws its noise by the place in
    the shard. Gradients that are not finite reach the parameters unless a scaler says that the update is to be skipped.

    Raises:
        TypeError: parameters of another dtype, an lr that is a tensor; in :meth:`step` a sparse gradient or one of
            another dtype than its parameter.
        ValueError: a number out of range, or parameters on several devices.

    Source: arXiv 2102.12092, appendix B.2.
    """

    reads_scaled_grads = True  # ResblockGradScaler leaves the division by the scales to step
    _step_supports_amp_scaling = True  # torch.amp.GradScaler sets grad_scale and found_inf before it calls step

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.96),
        eps: float = 1e-8,
        weight_decay: float = 0.045,
        variance_clip: float = 5.0,
        *,
        grad_clip: float | None = None,
        rounding: str = "stochastic",
        seed: int = 0,
        backend: str = "auto",
    ):
        check_backend("AdamW16", backend, ("cpp",))
        if grad_clip is not None and not grad_clip > 0:
            raise ValueError(f"grad_clip must be > 0 or None, got {grad_clip}")
        if rounding not in _ROUNDINGS:
            raise ValueError(f"rounding must be one of {', '.join(_ROUNDINGS)}, got {rounding!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int, got {type(seed).__name__}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must lie in [0, 2^64), got {seed}")
        self.grad_clip, self.rounding, self.seed, self.backend = grad_clip, rounding, seed, backend
        self._forget_steps()
        numbers = (lr, betas, eps, weight_decay, variance_clip)
        super().__init__(params, dict(zip(_NUMBERS, numbers, strict=True)))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with their own numbers or the optimiser's.

        Raises:
            TypeError, ValueError: as of the class; the optimiser is then left as it was.
        """
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            _rule(group)
            first = self.param_groups[0]["params"] or group["params"]
            for param in group["params"]:
                _check_param(param, first[0].device)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, scaling: GradScaling | None = None) -> Any:
        """Update every parameter that has a gradient, once.

        Args:
            closure: computes the loss and the gradients anew.
            scaling: what a ResblockGradScaler knows about the gradients: they are divided by the scales while they
                are read, and nothing changes, on the device, where ``scaling.skip`` is set.

        Returns:
            The closure's result, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rules = [_rule(group) for group in self.param_groups]
        params = [(param, number) for number, group in enumerate(self.param_groups) for param in group["params"]]
        used = [(index, *entry) for index, entry in enumerate(params) if entry[0].grad is not None]
        if not used:
            return loss
        device = used[0][1].device
        for _, param, _ in used:
            _check_param(param, device)
            _check_grad(param)
        steps = self._packed_steps([param for param, _ in params], device)
        rows = [self._row(index, param, group, steps, scaling) for index, param, group in used]
        scales, skip, sum_of_squares = self._scaling([param for _, param, _ in used], rows, scaling)
        counted = self._counted_mask([index for index, _, _ in used], len(params), device)
        steps.add_(counted if skip is None else counted * ~skip)
        adamw16_(
            [row for row in rows if row.param.numel()],
            rules,
            steps,
            scales,
            skip=skip,
            sum_of_squares=sum_of_squares,
            grad_clip=self.grad_clip,
            seed=None if self.rounding == "master" else self.seed,
            backend=self.backend,
        )
        for row, (_, param, _) in zip(rows, used, strict=True):
            if row.param is not local_part(param):
                local_part(param).copy_(row.param)
        # Kernels write through addresses, and autograd has to learn that a tensor saved for backward is another now.
        torch.autograd.graph.increment_version([param for _, param, _ in used])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state: bit for bit, in the parameters' memory formats, or converted (see the class).

        Raises:
            TypeError: moments of a dtype that cannot be converted.
            ValueError: other numbers of groups or parameters, other shapes, or the state of an optimiser that is not
                AdamW. The optimiser is left as it was.
        """
        # After the hooks of others, and around torch's cast of all state to the parameter's dtype.
        handle = self.register_load_state_dict_pre_hook(AdamW16._converted_state_dict)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("grad_clip", "rounding", "seed", "backend")}
        # A view would be pickled with all counters that it is a part of.
        state = {param: held | {"step": held["step"].clone()} for param, held in self.state.items() if held}
        return super().__getstate__() | own | {"state": defaultdict(dict, state)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for param, held in self.state.items():
            if isinstance(held, _Held):
                self.state[param] = held.state
        self._forget_steps()

    def _forget_steps(self) -> None:
        """The counters of all parameters are packed anew at the next update, from state."""
        self._steps: Tensor | None = None
        self._counted: tuple[list[int], Tensor] | None = None

    def _packed_steps(self, params: Sequence[Tensor], device: torch.device) -> Tensor:
        """(number of parameters,) int64, of which state's ``step`` are views."""
        if self._steps is None or len(self._steps) != len(params) or self._steps.device != device:
            self._forget_steps()
            self._steps = torch.zeros(len(params), dtype=torch.int64, device=device)
            for counter, param in zip(self._steps.unbind(), params, strict=True):
                if self.state.get(param):
                    self.state[param]["step"] = counter.copy_(self.state[param]["step"])
        return self._steps

    def _counted_mask(self, indices: list[int], length: int, device: torch.device) -> Tensor:
        """(length,) int64, 1 at ``indices``; kept, for most often it is the one of the last update."""
        if self._counted is None or self._counted[0] != indices:
            mask = torch.zeros(length, dtype=torch.int64)
            mask[indices] = 1
            self._counted = (indices, to_device(mask, device))
        return self._counted[1]

    def _row(self, index: int, param: Tensor, group: int, steps: Tensor, scaling: GradScaling | None) -> UpdatedTensors:
        state = self.state[param]
        if not state:
            dtype = _moment_dtype(param)
            state["step"] = steps[index].zero_()
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)
        wants_master = self.rounding == "master" and param.dtype != torch.float32
        if wants_master and "master" not in state:
            state["master"] = torch.empty_like(param, dtype=torch.float32).copy_(param)
        local = local_part(param)
        dense = local if is_dense(local) else torch.empty_like(local).copy_(local)
        names = ("exp_avg", "exp_avg_sq", "master") if wants_master else ("exp_avg", "exp_avg_sq")
        for name in names:
            expected = torch.float32 if name == "master" else _moment_dtype(param)
            if state[name].dtype != expected or state[name].device != param.device:
                raise RuntimeError(
                    f"a parameter must keep its dtype and device from its first update on, got {param.dtype} on "
                    f"{param.device} with {name} of {state[name].dtype} on {state[name].device}"
                )
            if not _same_layout(local_part(state[name]), dense):
                state[name] = torch.empty_like(param, dtype=expected).copy_(state[name])
        grad = param.grad
        if is_dtensor(grad) and grad.placements != param.placements:
            grad = grad.redistribute(placements=param.placements)
        grad = local_part(grad)
        if not _same_layout(grad, dense):
            grad = torch.empty_like(dense).copy_(grad)
        block = 0
        if scaling is not None:
            if param not in scaling.block_of:
                raise ValueError(
                    f"scaling.block_of must have every parameter, got no block of number {index}, {shape_of(param)}"
                )
            block = scaling.block_of[param]
        master = local_part(state["master"]) if wants_master else None
        moments = local_part(state["exp_avg"]), local_part(state["exp_avg_sq"])
        return UpdatedTensors(dense, grad, *moments, master, group, block, index)

    def _scaling(
        self, params: Sequence[Tensor], rows: Sequence[UpdatedTensors], scaling: GradScaling | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scales, skip and the sum of squares, from a ResblockGradScaler, torch.amp.GradScaler or neither."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scaling is not None:
            if grad_scale is not None or found_inf is not None:
                raise ValueError("scaling must be None under torch.amp.GradScaler, got both")
            return scaling.scales, scaling.skip, scaling.sum_of_squares
        device = params[0].device
        if grad_scale is None:
            scales = torch.ones(1, device=device)
        else:
            scales = torch.as_tensor(grad_scale, dtype=torch.float32, device=device).reshape(1)
        skip = None if found_inf is None else found_inf.to(device).reshape(()) != 0
        sum_of_squares = None
        if self.grad_clip is not None:
            sum_of_squares = _sum_of_squares(params, [row.grad for row in rows], scales, self.backend)
        return scales, skip, sum_of_squares

    def _converted_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state dict with this optimiser's kinds of state, held so that torch passes them on as they are."""
        groups = []
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            groups.append({name: own[name] for name in _NUMBERS} | saved)
            _check_loaded_group(groups[-1])
        groups += state_dict["param_groups"][len(groups) :]  # torch refuses a wrong number
        saved_params = chain.from_iterable(group["params"] for group in groups)
        own_params = chain.from_iterable(group["params"] for group in self.param_groups)
        params = dict(zip(saved_params, own_params, strict=False))
        state = {
            key: _Held(self._converted_state(params[key], saved)) if key in params else saved
            for key, saved in state_dict["state"].items()
        }
        return state_dict | {"state": state, "param_groups": groups}

    def _converted_state(self, param: Tensor, saved: Mapping[str, Any]) -> dict[str, Tensor]:
        if not {"step", "exp_avg", "exp_avg_sq"} <= saved.keys() <= {"step", "exp_avg", "exp_avg_sq", "master"}:
            names = ", ".join(map(str, saved)) or "nothing"
            raise ValueError(f"state must have step, exp_avg, exp_avg_sq and perhaps master, got {names}")
        step = torch.as_tensor(saved["step"]).to(param.device, torch.int64).reshape(())
        state = {
            "step": step.clone(),
            "exp_avg": _loaded(param, saved, "exp_avg", formats.encode_169, formats.decode_169),
            "exp_avg_sq": _loaded(param, saved, "exp_avg_sq", formats.encode_0610, formats.decode_0610),
        }
        if "master" in saved and self.rounding == "master" and param.dtype != torch.float32:
            state["master"] = _loaded(param, saved, "master")
        return state


@dataclass
class _Held:
    """State of one parameter on its way through torch's load_state_dict, which casts tensors and looks into dicts."""

    state: dict[str, Tensor]


def _loaded(
    param: Tensor,
    saved: Mapping[str, Any],
    name: str,
    encode: Callable[[Tensor], Tensor] | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """A copy of a saved tensor in the layout of param, a moment as words or float32 as param's dtype has it."""
    value = saved[name]
    if shape_of(value) != shape_of(param):
        raise ValueError(f"{name} must have its parameter's shape {shape_of(param)}, got {shape_of(value)}")
    if not value.is_floating_point() and (value.dtype != torch.int16 or decode is None):
        raise TypeError(f"{name} must be floating point{' or int16' if decode else ''}, got {value.dtype}")
    if hasattr(param, "placements") and value.placements != param.placements:
        value = value.redistribute(placements=param.placements)
    dtype = torch.float32 if encode is None else _moment_dtype(param)
    loaded = torch.empty_like(param, dtype=dtype, requires_grad=False)
    local = local_part(value)
    if dtype == torch.int16 and local.dtype != torch.int16:
        local = encode(local.float())
    elif dtype == torch.float32 and local.dtype == torch.int16:
        local = decode(local)
    local_part(loaded).copy_(local)
    return loaded


def _rule(group: Mapping[str, Any]) -> UpdateRule:
    """The numbers of a group, checked."""
    numbers = {name: group[name] for name in ("lr", "eps", "weight_decay", "variance_clip")}
    for name, value in numbers.items():
        # A tensor's value is known on its device alone, and all numbers go there with the update.
        if not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    betas = tuple(group["betas"])
    if len(betas) != 2 or not all(isinstance(beta, Real) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']}")
    if not (numbers["lr"] >= 0 and math.isfinite(numbers["lr"])):
        raise ValueError(f"lr must be finite and >= 0, got {numbers['lr']}")
    if not numbers["weight_decay"] >= 0:
        raise ValueError(f"weight_decay must be >= 0, got {numbers['weight_decay']}")
    for name in ("eps", "variance_clip"):
        if not numbers[name] > 0:
            raise ValueError(f"{name} must be > 0, got {numbers[name]}")
    return UpdateRule(numbers["lr"], *betas, numbers["eps"], numbers["weight_decay"], numbers["variance_clip"])


def _check_param(param: Tensor, device: torch.device) -> None:
    if param.dtype not in DTYPE_CODES:
        raise TypeError(f"parameters must be float32, float16 or bfloat16, got {param.dtype}")
    if param.device != device:
        raise ValueError(f"parameters must be on one device, got {device} and {param.device}")


def _check_grad(param: Tensor) -> None:
    grad = param.grad
    if grad.layout != torch.strided:
        raise TypeError(f"gradients must be dense, got layout {grad.layout}")
    if grad.dtype != param.dtype:
        raise TypeError(f"gradients must have their parameter's dtype {param.dtype}, got {grad.dtype}")


def _check_loaded_group(group: Mapping[str, Any]) -> None:
    """Refuse what torch's optimisers of the same state compute differently."""
    _rule(group)
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"{name} is not part of AdamW16, got a state with {name}={group[name]}")
    if not group.get("decoupled_weight_decay", True) and group["weight_decay"]:
        raise ValueError(f"weight decay must be decoupled, got the state of Adam, weight_decay={group['weight_decay']}")


def _moment_dtype(param: Tensor) -> torch.dtype:
    return torch.float32 if param.dtype == torch.float32 else torch.int16


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether elements of one index lie at one offset; the stride of a dimension of one element says nothing."""
    if a.stride() == b.stride():
        return True
    return all(x == y or size == 1 for x, y, size in zip(a.stride(), b.stride(), b.shape, strict=True))


def _sum_of_squares(params: Sequence[Tensor], grads: Sequence[Tensor], scales: Tensor, backend: str) -> Tensor:
    """Of all unscaled gradients, float64; those of DTensors are summed over the processes that hold their shards."""
    shards: dict[tuple, list[Tensor]] = defaultdict(list)
    for param, grad in zip(params, grads, strict=True):
        shards[sharding_groups(param)].append(grad)
    total = torch.zeros((), dtype=torch.float64, device=scales.device)
    for groups, shard in shards.items():
        part = unscale_(shard, scales, write=False, backend=backend).sum_of_squares
        for group in groups:
            torch.distributed.all_reduce(part, group=group)
        total += part
    return total
