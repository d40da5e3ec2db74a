"""How the benchmarks of kernels measure: time, the machine's ceilings, and peak memory.

Time. On a CPU it is wall-clock time of one call after the other on the same tensors, so inputs that fit the caches are
in them. On a GPU it is the time between two events around the call. Before it L2 is overwritten, and a spin on the
device lets the host hand over all launches of the call, so that the time is the kernels' and not the host's.

Ceilings. The rate of a large matrix product and, on a GPU, of a large copy, the best of several, measured in the same
process with the same dtype and number of threads; random data, since zeros can be faster.

Peak memory. What the call needs beyond the tensors it is given, its results included. On a GPU it comes from PyTorch's
allocator. On a CPU it is the growth of the resident set, so that memory which never passes through PyTorch counts too:
a fresh process calls once, which shows what the op keeps for later calls, then once more under a reset high-water mark,
which shows what it takes and gives back. The fresh process is forked from one that has imported torch and computed
nothing, and begins with a call on a small problem, so that what is loaded once does not count. Of an op that is
compiled at the first call, which leaves much else behind, only the second part is measured, and in this process.
Resolution: half a MiB. Linux only.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

FLUSH_BYTES = 1 << 28  # more than the L2 of any GPU
SPIN_CYCLES = 4_000_000  # about two milliseconds, in which the host hands over the launches of a call
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): reset the high-water mark of the resident set
FRESH_PROCESS_SECONDS = 120

_device_seconds = 0.0


def clock() -> float:
    """The clock that pytest-benchmark reads before and after a call: seconds, on a GPU those :func:`timed` measured."""
    return _device_seconds if DEVICE == "cuda" else time.perf_counter()


def timed(call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` as it is to be timed by :func:`clock`."""
    return _on_device_clock(call) if DEVICE == "cuda" else call


def _on_device_clock(call: Callable[[], Any]) -> Callable[[], Any]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed_call() -> Any:
        global _device_seconds
        torch.cuda._sleep(SPIN_CYCLES)
        flush.zero_()
        start.record()
        result = call()
        end.record()
        end.synchronize()
        _device_seconds += start.elapsed_time(end) / 1000
        return result

    return timed_call


def seconds_of(call: Callable[[], Any]) -> float:
    """One call's time on :func:`clock`."""
    prepared = timed(call)
    start = clock()
    prepared()
    return clock() - start


@functools.cache
def matmul_flops_per_s(dtype: torch.dtype, threads: int) -> float:
    """The best rate of a large square matrix product; ``threads`` is torch's number, and only keys the cache."""
    size = 8192 if DEVICE == "cuda" else 2048
    left, right = torch.randn(2, size, size, device=DEVICE).to(dtype)
    return 2 * size**3 / _best_seconds(lambda: left @ right)


@functools.cache
def copy_bytes_per_s() -> float:
    """The best rate of a large copy on the device, bytes read plus bytes written."""
    source = torch.randn(1 << 28 if DEVICE == "cuda" else 1 << 25, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source))


def _best_seconds(call: Callable[[], Any], rounds: int = 10) -> float:
    for _ in range(3):
        call()
    return min(seconds_of(call) for _ in range(rounds))


def device_peak_bytes(call: Callable[[], Any]) -> int:
    """Peak of PyTorch's allocator on the GPU during a call, beyond what is allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def host_peak_bytes(call: Callable[[], Any]) -> int | None:
    """Peak of this process's resident set during a call, beyond what it is before it.

    Returns:
        Bytes, or None where the kernel has no resettable high-water mark.
    """
    if not CLEAR_REFS.exists():
        return None
    _give_back_free_memory()
    CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def fresh_host_peak_bytes(
    make_call: Callable[[str, Any], Callable[[], Any]], name: str, case: Any, small_case: Any
) -> int | None:
    """:func:`host_peak_bytes` in a fresh process, and what the first call there keeps for later ones.

    Args:
        make_call: of a module that a fresh process can import; given an op's name and a case, it returns what to call.
        small_case: what the process warms up on.

    Raises:
        RuntimeError: the fresh process failed or took too long; its traceback is on stderr.
    """
    if not CLEAR_REFS.exists():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "dalle_fast"])
    receiver, sender = context.Pipe(duplex=False)
    work = (sender, torch.get_num_threads(), make_call, name, case, small_case)
    child = context.Process(target=_send_peak, args=work, daemon=True)
    child.start()
    sender.close()
    try:
        if not receiver.poll(FRESH_PROCESS_SECONDS):
            raise RuntimeError(f"measuring peak memory took longer than {FRESH_PROCESS_SECONDS} s")
        return receiver.recv()
    except EOFError as error:
        child.join(FRESH_PROCESS_SECONDS)  # it may still be printing its traceback
        raise RuntimeError("the process that measures peak memory ended without a result") from error
    finally:
        child.kill()
        child.join()


def _send_peak(
    sender: Connection,
    threads: int,
    make_call: Callable[[str, Any], Callable[[], Any]],
    name: str,
    case: Any,
    small_case: Any,
) -> None:
    torch.set_num_threads(threads)
    make_call(name, small_case)()
    call = make_call(name, case)
    _give_back_free_memory()
    before = _status_bytes("RssAnon")
    call()
    _give_back_free_memory()
    kept = max(0, _status_bytes("RssAnon") - before)
    sender.send(kept + host_peak_bytes(call))


def _give_back_free_memory() -> None:
    # Blocks that the allocator holds free would hide what a call takes.
    ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")
