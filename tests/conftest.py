"""Every test starts from the same random state; CPU levels; what the tests of training runs start from."""

import dataclasses
import os

import pytest
import torch


def pytest_runtest_logfinish(nodeid, location):
    """End a worker process of pytest-xdist whose GPU gave up, so that another one takes over the tests after it.

    An illegal access makes every later call of its process fail.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"after {nodeid}: {error}", flush=True)
        os._exit(1)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _loop_bounds(monkeypatch):
    """NumPy 2.4 takes no array of one element for an integer, as which the interpreter of Triton 3.6 hands it over."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_and_index)


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def level(request):
    """Runs the test at each CPU level that this machine has."""
    from dalle_fast.ops import backends

    extension = backends.load_extension()
    before = extension.build_info()["cpu_level"]
    try:
        extension.set_cpu_level(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    extension.set_cpu_level(before)


@pytest.fixture
def one_thread():
    """torch runs on one thread: work this small is done before a second one is awake."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def drawings(tmp_path_factory):
    """A folder of a few captioned drawings."""
    from training_runs import DRAWINGS

    from dalle_fast.data.shapes import write_shapes

    out = tmp_path_factory.mktemp("drawings") / "shapes"
    write_shapes(out, train=DRAWINGS, heldout=0, size=16)
    return out / "train"


@pytest.fixture(scope="session")
def dvae_run(drawings, tmp_path_factory):
    """The run directory of a dVAE that was trained a little."""
    from training_runs import DVAE_CONFIG

    from dalle_fast.training.dvae import train_dvae

    out = tmp_path_factory.mktemp("dvae") / "run"
    train_dvae(drawings, out, dataclasses.replace(DVAE_CONFIG, steps=2))
    return out


@pytest.fixture(scope="session")
def token_shards(drawings, dvae_run, tmp_path_factory):
    """The drawings as token shards of that dVAE, two augmentations of each."""
    from dalle_fast.training.encode import EncodeConfig, encode

    out = tmp_path_factory.mktemp("tokens") / "drawings"
    encode(dvae_run, drawings, out, EncodeConfig(copies=2, batch_size=2, shard_size=4, device="cpu"))
    return out


@pytest.fixture(params=["dvae", "dalle"])
def start(request, drawings, dvae_run):
    """Call start(out, resume=False, **changes of the configuration) to train either model."""
    from training_runs import Run

    return Run(request.param, drawings, dvae_run)
