"""AdamW16 on parameters that fully_shard spreads over two processes, against one process."""

import copy
import os
from datetime import timedelta

import pytest
import torch
from optim_steps import RULE
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.tensor import distribute_tensor

from dalle_fast import AdamW16, ResblockGradScaler

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="torch is built without gloo"
)
RANKS = 2


def make_model() -> nn.ModuleDict:
    """Float32 and float16 parameters of 3 and 5 rows, which do not divide by two."""
    torch.manual_seed(0)
    return nn.ModuleDict({"enter": nn.Linear(4, 5), "block": nn.Linear(5, 3).half()})


def make_run(model: nn.ModuleDict, with_scaler: bool, rounding: str) -> tuple[AdamW16, ResblockGradScaler | None]:
    optimizer = AdamW16(model.parameters(), **RULE, grad_clip=0.5, rounding=rounding)
    return optimizer, ResblockGradScaler([model["block"]], growth_factor=1.0) if with_scaler else None


def train(model: nn.ModuleDict, optimizer: AdamW16, scaler: ResblockGradScaler | None, updates: range) -> None:
    """Updates by eighths, whose squares any order adds up to the same norm, scaled by a power of two."""
    scale = 1.0 if scaler is None else scaler.block_scales[0].item()
    for number in updates:
        for name, param in model.named_parameters():
            generator = torch.Generator().manual_seed(number)
            grad = (torch.randint(-8, 9, param.shape, generator=generator) / 8).to(param.dtype)
            grad = grad * scale if name.startswith("block") else grad
            if hasattr(param, "device_mesh"):
                grad = distribute_tensor(grad, param.device_mesh, param.placements)
            param.grad = grad
        if scaler is None:
            optimizer.step()
        else:
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()


def whole(tensor: Tensor) -> Tensor:
    if not hasattr(tensor, "full_tensor"):
        return tensor.detach().clone()
    wide = tensor.detach().int() if tensor.dtype == torch.int16 else tensor.detach()  # gloo sends no int16
    return wide.full_tensor().to(tensor.dtype)


def results(model: nn.Module, optimizer: AdamW16) -> list[dict[str, Tensor]]:
    return [{"param": whole(p)} | {k: whole(v) for k, v in optimizer.state[p].items()} for p in model.parameters()]


def run_rank(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    runs = {}
    for with_scaler in (False, True):
        for rounding in ("master", "stochastic"):
            model = make_model()
            for part in model.values():
                fully_shard(part)
            optimizer, scaler = make_run(model, with_scaler, rounding)
            train(model, optimizer, scaler, range(4))
            for param in model.parameters():
                state = optimizer.state[param]
                assert state["exp_avg"].placements == param.placements
                assert state["exp_avg"].to_local().shape == param.to_local().shape
                assert state["exp_avg"].dtype == (torch.float32 if param.dtype == torch.float32 else torch.int16)
            before = results(model, optimizer)
            state, scales = copy.deepcopy(optimizer.state_dict()), scaler and copy.deepcopy(scaler.state_dict())
            weights = copy.deepcopy(model.state_dict())
            train(model, optimizer, scaler, range(4, 6))
            after = results(model, optimizer)
            model.load_state_dict(weights)
            resumed, scaler = make_run(model, with_scaler, rounding)
            resumed.load_state_dict(state)
            if scaler is not None:
                scaler.load_state_dict(scales)
            train(model, resumed, scaler, range(4, 6))
            runs[with_scaler, rounding] = before, after, results(model, resumed)
    if rank == 0:
        torch.save(runs, os.path.join(folder, "runs.pt"))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def sharded_runs(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    multiprocessing.spawn(run_rank, args=(folder,), nprocs=RANKS)
    return torch.load(os.path.join(folder, "runs.pt"), weights_only=True)


@pytest.mark.parametrize("with_scaler", [False, True])
@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_shards_equal_one_process(sharded_runs, with_scaler, rounding):
    """To the bit; but stochastic rounding draws by the place in the shard, and may go the other way at each update."""
    before, _, _ = sharded_runs[with_scaler, rounding]
    model = make_model()
    optimizer, scaler = make_run(model, with_scaler, rounding)
    train(model, optimizer, scaler, range(4))
    for found, expected in zip(before, results(model, optimizer), strict=True):
        assert found.keys() == expected.keys()
        assert found["step"] == 4
        for name, value in found.items():
            assert value.dtype == expected[name].dtype
            if rounding == "stochastic" and value.dtype == torch.float16:
                unit = torch.finfo(torch.float16).eps * expected[name].abs().max()
                assert ((value - expected[name]).abs() <= 4 * unit).all()
            else:
                assert torch.equal(value, expected[name])


@pytest.mark.parametrize("with_scaler", [False, True])
@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_resumed_shards_are_the_uninterrupted_ones(sharded_runs, with_scaler, rounding):
    _, uninterrupted, resumed = sharded_runs[with_scaler, rounding]
    for found, expected in zip(resumed, uninterrupted, strict=True):
        assert found["step"] == 6
        assert all(torch.equal(found[name], expected[name]) for name in expected)
