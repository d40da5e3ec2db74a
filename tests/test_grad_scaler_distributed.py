"""ResblockGradScaler over two processes: all ranks decide alike, and as one process with the whole batch does."""

import copy
import math
import os
import re
import traceback
from pathlib import Path

import pytest
import torch
from scaled_models import Residual, ScaledSGD, run_update
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

from dalle_fast import ResblockGradScaler, scaled_resblock

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo processes"
)

RANKS, UPDATES = 2, 8
BAD = {2: (1, 1), 3: (0, 0), 6: (1, None)}  # update -> the rank with a non-finite gradient, and in which block
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "fused AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "reading SGD": ScaledSGD,
}


def start(rank: int, scenario, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    try:
        scenario(rank)
        dist.barrier()  # a rank that ends earlier closes its connections
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # gloo's threads may be running still, which ends an ordinary exit in an abort


def run_on_all_ranks(scenario, folder: Path) -> None:
    try:
        mp.start_processes(start, (scenario, folder), nprocs=RANKS, start_method="spawn")
    except mp.ProcessExitedException as error:
        causes = "\n".join(path.read_text() for path in sorted(folder.glob("error*")))
        raise AssertionError(causes or str(error)) from None


class Checkpointed(Residual):
    """Every block is recomputed in backward."""

    def forward(self, tokens, scales):
        x = self.embedding(tokens)
        for block, scale in zip(self.blocks, scales, strict=True):
            x = checkpoint(scaled_resblock, x, block, scale, use_reentrant=False)
        return nn.functional.cross_entropy(self.head(x * self.gain).flatten(0, 1), tokens.flatten())


def make_batches() -> list[torch.Tensor]:
    return [torch.randint(10, (2 * RANKS, 5), generator=torch.Generator().manual_seed(i)) for i in range(UPDATES)]


def spoil(model: nn.Module, block: int | None) -> None:
    """Set an element of the last row of a gradient; of what this rank holds of it, where it is sharded."""
    grad = (model.head if block is None else model.blocks[block][2]).weight.grad
    (grad.to_local() if hasattr(grad, "to_local") else grad)[-1, 0] = math.inf


def train(model, scaler, optimizer, forward, spoil_update, part=slice(None)):
    """Parameters, report and norms after all updates."""
    norms = []
    for number, batch in enumerate(make_batches()):
        forward(batch[part], scaler.block_scales).backward()
        if number in BAD:
            spoil_update(*BAD[number])
        assert bool(run_update(scaler, optimizer)) is (number not in BAD)
        norms.append(scaler.grad_norm.item())
        optimizer.zero_grad()
    return [full(p) for p in model.parameters()], scaler.report(), norms


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def train_alone(model, kind):
    """In this process alone, on whole batches."""
    scaler, optimizer = ResblockGradScaler(model.blocks, backoff_interval=2), OPTIMIZERS[kind](model.parameters())
    return train(model, scaler, optimizer, model, lambda rank, block: spoil(model, block))


def assert_same(actual, expected) -> None:
    """To the rounding of sums in another order; scales and counts to the bit, on every rank."""
    for one, other in zip(actual[0], expected[0], strict=True):
        torch.testing.assert_close(one, other)
    assert actual[1] == expected[1]
    torch.testing.assert_close(actual[2], expected[2])
    everywhere = [None] * RANKS
    dist.all_gather_object(everywhere, (actual[1], actual[2]))
    assert all(of_rank == everywhere[0] for of_rank in everywhere)


def make_model(kind=Residual, **options) -> nn.Module:
    torch.manual_seed(0)
    return kind(**options)


def replicated(rank: int) -> None:
    part = slice(2 * rank, 2 * rank + 2)
    for kind in OPTIMIZERS:
        model = make_model()
        expected = train_alone(copy.deepcopy(model), kind)
        wrapped = nn.parallel.DistributedDataParallel(model)
        scaler, optimizer = ResblockGradScaler(model.blocks, backoff_interval=2), OPTIMIZERS[kind](model.parameters())
        numbers = iter(range(UPDATES))

        # One rank's own gradient is not finite before it is averaged.
        def forward(tokens, scales, wrapped=wrapped, model=model, numbers=numbers):
            bad_rank, block = BAD.get(next(numbers), (None, None))
            loss = wrapped(tokens, scales)
            if rank == bad_rank:
                weight = (model.head if block is None else model.blocks[block][2]).weight[-1, 0]
                loss = loss + (weight - weight.detach()) * math.inf
            return loss

        assert_same(train(model, scaler, optimizer, forward, lambda rank, block: None, part), expected)


def sharded(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    part = slice(2 * rank, 2 * rank + 2)
    # A mesh of two dimensions replicates over the first.
    runs = [((RANKS,), kind, Residual) for kind in OPTIMIZERS]
    runs += [((RANKS,), "SGD", Checkpointed), ((RANKS, 1), "SGD", Residual), ((1, RANKS), "SGD", Residual)]
    for shape, kind, module in runs:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        model = make_model(module)
        expected = train_alone(copy.deepcopy(model), kind)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        scaler = ResblockGradScaler(model.blocks, backoff_interval=2)

        def spoil_one(bad_rank, block, model=model, every_rank=shape == (RANKS, 1)):
            if every_rank or rank == bad_rank:
                spoil(model, block)

        optimizer = OPTIMIZERS[kind](model.parameters())
        assert_same(train(model, scaler, optimizer, model, spoil_one, part), expected)


def narrow_and_sharded(rank: int) -> None:
    """float32 shards, float16 branches, gradients reduced in float32: an overflow in one rank's backward."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = make_model()
    model.dtype = torch.float16
    for block in model.blocks:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32))
    fully_shard(model)
    scaler, optimizer = ResblockGradScaler(model.blocks), torch.optim.SGD(model.parameters(), lr=0.1)
    before = [full(p) for p in model.parameters()]
    loss = model(make_batches()[0], scaler.block_scales)
    (loss * 2.0**16 if rank == 1 else loss).backward()
    assert not run_update(scaler, optimizer)
    report = scaler.report()
    assert report.skips == [1, 1, 1] and report.rest_skips == 0
    assert all(torch.equal(one, full(p)) for one, p in zip(before, model.parameters(), strict=True))
    optimizer.zero_grad()
    model(make_batches()[0], scaler.block_scales).backward()
    assert run_update(scaler, optimizer)
    assert not torch.equal(before[0], full(model.embedding.weight))


def by_hand(rank: int) -> None:
    """Sharded beside whole parameters, and what is refused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh = init_device_mesh("cpu", (RANKS,))
    split = nn.Parameter(DTensor.from_local(torch.zeros(3), mesh, [Shard(0)]))
    whole, rest = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(()))
    scaler = ResblockGradScaler([[split], [whole]])
    optimizer = torch.optim.SGD([split, whole, rest], lr=0.1)
    for bad in (False, True):
        split.grad = DTensor.from_local(torch.full((3,), 2.0**13), mesh, [Shard(0)])
        whole.grad, rest.grad = torch.full((5,), 2.0**14), torch.tensor(math.nan if bad and rank else 3.0)
        if bad and rank:
            split.grad.to_local()[1] = math.nan
        scaler.load_state_dict(ResblockGradScaler([[split], [whole]]).state_dict())
        assert run_update(scaler, optimizer) is not bad
        assert scaler.grad_norm == (math.inf if bad else math.sqrt(3 * RANKS + 4 * 5 + 9))
    assert scaler.report().skips == [1, 0] and scaler.report().rest_skips == 1

    split.grad = DTensor.from_local(torch.ones(6), mesh, [Partial()])
    message = "gradients must be reduced over the ranks, that of parameter 0 of block 0 is placed (Partial(sum),)"
    with pytest.raises(ValueError, match=re.escape(message)):
        scaler.unscale_(optimizer)

    model = make_model()
    scaler = ResblockGradScaler(model.blocks)
    fully_shard(model)
    model(make_batches()[0], scaler.block_scales).backward()
    scaler.unscale_(torch.optim.SGD(model.parameters()))
    with pytest.raises(RuntimeError, match=re.escape("make the scaler after fully_shard")):
        scaler.update()


@pytest.mark.parametrize("scenario", [replicated, sharded, narrow_and_sharded, by_hand])
def test_two_processes(scenario, tmp_path):
    run_on_all_ranks(scenario, tmp_path)
