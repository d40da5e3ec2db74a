"""A checkpoint is there as a whole or not at all: kills at every file operation, and full disks.

Run as a script, this file is the process that is killed, over and over: `saves_that_die`.
"""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dalle_fast import checkpoint
from dalle_fast.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_training_state,
    load_weights,
    save_checkpoint,
)


def save(out, step, value=None, **options):
    value = step if value is None else value
    arguments = {
        "config": {"kind": "dvae", "model": {}},
        "model": {"weight": torch.full((4,), float(value))},
        "training": {"value": value},
    }
    return save_checkpoint(out, step, **(arguments | options))


def value_of(path):
    """What `save` was given, if every file of the checkpoint says the same."""
    value = load_training_state(path)["value"]
    assert torch.equal(load_weights(path, ema=False)["weight"], torch.full((4,), float(value)))
    return value


def names(out):
    return sorted(path.name for path in out.iterdir())


def die_at(stage, base):
    """End this process at the `stage`-th file operation that Python is about to make below `base`."""
    calls = 0

    def hook(event, arguments):
        nonlocal calls
        if event.split(".")[0] in ("open", "os", "shutil") and str(base) in str(arguments):
            calls += 1
            if calls == stage:
                os._exit(9)

    sys.addaudithook(hook)


def write_in_two_halves(write):
    """safetensors writes without Python seeing it; show the hook a moment with half a file."""

    def halves(tensors, path):
        write(tensors, path)
        os.truncate(path, path.stat().st_size // 2)
        os.listdir(path.parent)
        write(tensors, path)

    return halves


def saves_that_die(base, new_step):
    """Save `new_step` over a run with steps 1 and 2, killed at the first file operation, at the second, ...

    Prints the number of the first save that was not killed.
    """
    torch.set_num_threads(1)
    (base / "tokenizer.json").write_text("{}")
    files = {"tokenizer.json": base / "tokenizer.json"}
    for step in (1, 2):
        save(base / "run", step, files=files)
    stage, finished = 0, False
    while not finished:
        stage += 1
        out = base / "copy"
        shutil.copytree(base / "run", out)
        child = os.fork()
        if child == 0:
            checkpoint.save_file = write_in_two_halves(checkpoint.save_file)
            die_at(stage, base)
            save(out, new_step, value=-1, files=files)
            os._exit(0)
        finished = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        value = value_of(latest_checkpoint(out))
        assert value == -1 if finished else value in (2, -1), (stage, value)
        save(out, new_step + 1, value=77)
        assert value_of(latest_checkpoint(out)) == 77
        # Two checkpoints, and nothing that the killed save had left.
        assert names(out)[1] == f"step-{new_step + 1:07d}", (stage, names(out))
        assert len(names(out)) == 2 and names(out)[0].startswith("step-"), (stage, names(out))
        shutil.rmtree(out)
    print(stage)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("new_step", [3, 2], ids=["a new step", "a step saved again"])
def test_a_kill_at_any_file_operation_leaves_the_last_good_checkpoint(tmp_path, new_step):
    # The script finds the same dalle_fast as this process, installed or not.
    package_root = str(Path(checkpoint.__file__).parents[2])
    result = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(new_step)],
        env=os.environ | {"PYTHONPATH": package_root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    # Five files, links, renames and deletions: fewer stages would mean that the hook saw nothing.
    assert int(result.stdout) > 15


def test_everything_is_on_disk_before_the_rename_and_the_rename_after_it(tmp_path, monkeypatch):
    events = []
    rename, fsync = os.rename, checkpoint._fsync
    monkeypatch.setattr(checkpoint, "_fsync", lambda path: (events.append(path.name), fsync(path)))
    monkeypatch.setattr(os, "rename", lambda old, new: (events.append("rename"), rename(old, new)))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inner.json").write_text("{}")
    save(tmp_path / "run", 1, files={"dvae": tmp_path / "folder"})
    moment = events.index("rename")
    assert sorted(events[:moment]) == [
        ".step-0000001.tmp",
        "config.json",
        "dvae",
        "inner.json",
        "model.safetensors",
        "training.json",
        "training.safetensors",
    ]
    assert events[moment:] == ["rename", "run"]


@pytest.fixture
def full_disk(request, monkeypatch):
    """The disk fills up, or may no longer be written to, in the given function, after its first `after` calls."""
    owner, name, after, code = request.param
    function, calls = getattr(owner, name), []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) > after:
            raise OSError(code, os.strerror(code))
        return function(*args, **kwargs)

    return lambda: monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize(
    "full_disk",
    [
        (os, "fsync", 0, errno.ENOSPC),
        (os, "fsync", 2, errno.ENOSPC),
        (checkpoint, "save_file", 0, errno.ENOSPC),
        (checkpoint, "save_file", 1, errno.ENOSPC),
        (Path, "mkdir", 1, errno.ENOSPC),
        (Path, "write_text", 0, errno.ENOSPC),
        (os, "rename", 0, errno.ENOSPC),
        (Path, "mkdir", 1, errno.EACCES),
        (Path, "mkdir", 1, errno.EROFS),
        (os, "rename", 0, errno.EACCES),
    ],
    indirect=True,
    ids=lambda value: f"{value[1]}-{value[2]}-{errno.errorcode[value[3]]}",
)
def test_full_or_unwritable_disk_leaves_the_old_checkpoint(request, tmp_path, full_disk):
    for step in (1, 2):
        save(tmp_path, step)
    full_disk()
    with pytest.raises(CheckpointError) as raised:
        save(tmp_path, 3)
    cause = os.strerror(request.node.callspec.params["full_disk"][3])
    assert str(raised.value) == (
        f"cannot write checkpoint {tmp_path / 'step-0000003'}: {cause}; earlier checkpoints are kept"
    )
    assert names(tmp_path) == ["step-0000001", "step-0000002"]
    assert value_of(latest_checkpoint(tmp_path)) == 2


def test_operating_system_refuses_to_write_the_tensors(tmp_path):
    resource = pytest.importorskip("resource")
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(CheckpointError, match=r"^cannot write checkpoint .*/step-0000002: .*File too large"):
            save(tmp_path, 2, model={"weight": torch.zeros(2**16)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step-0000001"]
    assert value_of(latest_checkpoint(tmp_path)) == 1


if __name__ == "__main__":
    saves_that_die(Path(sys.argv[1]), int(sys.argv[2]))
