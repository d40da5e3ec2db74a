"""What is there on this machine, and why not: torch, a CUDA device, Triton, the compiled extension.

``available`` and ``describe`` report it; ``load_extension`` is how an op gets ``dalle_fast._C`` when its
caller asks for ``backend="cpp"`` by name. A part that is missing is reported with its cause.
"""

import importlib
import importlib.metadata
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch

BUILD_COMMAND = "pip install --no-build-isolation ."
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_GPU = (8, 0)  # compute capability that the Triton kernels are compiled and tuned for: Ampere


def _import_extension() -> tuple[ModuleType | None, ImportError | None]:
    # import_module, because `from dalle_fast import _C` blames a circular import where the file is missing.
    try:
        return importlib.import_module("dalle_fast._C"), None
    except ImportError as error:
        return None, error


# Found out once, with this module: torch.compile can trace neither an import nor the search for a module, but reads
# these names as constants.
extension, extension_error = _import_extension()
has_triton: bool = importlib.util.find_spec("triton") is not None
has_cuda_extension: bool = extension is not None and bool(extension.build_info()["cuda_architectures"])


def load_extension() -> ModuleType:
    """Return the compiled module ``dalle_fast._C``.

    Raises:
        RuntimeError: it could not be imported; names the cause and the command that builds it.
    """
    if extension is None:
        raise RuntimeError(
            f'backend="cpp" needs the compiled extension dalle_fast._C, which cannot be imported '
            f"({extension_error}). Build it in the source folder: {BUILD_COMMAND}"
        ) from extension_error
    return extension


def has_cpp_backend(device: torch.device) -> bool:
    """Whether the compiled ops can run on tensors of ``device``."""
    if device.type == "cpu":
        return extension is not None
    return device.type == "cuda" and has_cuda_extension


def require_cpp_backend(device: torch.device) -> None:
    """Check that the compiled ops can run on tensors of ``device``.

    Raises:
        RuntimeError: the extension is missing, or has no code for this kind of device.
    """
    if has_cpp_backend(device):
        return
    load_extension()
    if device.type == "cuda":
        raise RuntimeError(
            'backend="cpp" on a CUDA tensor needs the CUDA half of dalle_fast._C, which was not built. '
            f"With nvcc on the PATH, build it in the source folder: {BUILD_COMMAND}"
        )
    raise RuntimeError(f'backend="cpp" runs on cpu and cuda tensors, got a tensor on {device}')


def _missing_for_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of ``device``, or None where they can."""
    if not has_triton:
        return "triton is not installed; it comes with torch for CUDA, or: pip install triton"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return 'the kernels are for NVIDIA GPUs and their tiles do not compile for AMD ones; use backend="auto"'
        # What dynamo cannot trace, it is not asked for; an older GPU then names itself when Triton compiles.
        if not torch.compiler.is_compiling() and torch.cuda.get_device_capability(device) < OLDEST_GPU:
            found = ".".join(map(str, torch.cuda.get_device_capability(device)))
            return f'the GPU needs compute capability 8.0 or newer, got {found}; use backend="auto"'
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return (
        f'it runs on cuda tensors, got a tensor on {device}; use backend="auto", '
        "or set TRITON_INTERPRET=1 before the first use of triton to try the kernels on CPU tensors, slowly"
    )


def has_triton_backend(device: torch.device) -> bool:
    """Whether "auto" takes the Triton kernels for tensors of ``device``; never those of Triton's interpreter."""
    return device.type == "cuda" and _missing_for_triton(device) is None


def require_triton_backend(device: torch.device) -> None:
    """Check that the Triton kernels can run on tensors of ``device``.

    Raises:
        RuntimeError: triton is missing, or does not run there; names the cause and the remedy.
    """
    cause = _missing_for_triton(device)
    if cause is not None:
        raise RuntimeError(f'backend="triton" is not available: {cause}')


def choose_kernel(
    op: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES,
) -> str | None:
    """The kernels that ``backend`` means for such tensors, "triton" or "cpp"; None is plain PyTorch.

    Args:
        op: public name of an op with Triton kernels for CUDA tensors and C++ ones for CPU tensors.
        backend: "auto", "triton", "cpp" or "reference".
        dtypes: what its kernels take.

    Raises:
        TypeError: another dtype, for a backend that was asked for by name.
        RuntimeError: a backend that is not there, with the cause and the remedy.
    """
    if backend == "reference":
        return None
    is_taken = dtype in dtypes
    if backend == "auto":
        if is_taken and device.type == "cpu" and has_cpp_backend(device):
            return "cpp"
        return "triton" if is_taken and has_triton_backend(device) else None
    if not is_taken:
        names = [str(taken).removeprefix("torch.") for taken in dtypes]
        listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        raise TypeError(f'backend "{backend}" of {op} takes {listed}, got {dtype}; use backend="reference"')
    if backend == "triton":
        require_triton_backend(device)
    else:
        require_cpp_backend(device)
        if device.type != "cpu":
            raise RuntimeError(f'backend "cpp" of {op} runs on cpu tensors, got {device}; use backend="triton"')
    return backend


def available() -> dict[str, Any]:
    """Return what is there: one entry for each part, None where it is missing.

    Returns:
        ``torch`` (version), ``threads`` (of torch on the CPU), ``cuda`` (name of the device), ``triton``
        (version), ``cpp`` (``dalle_fast._C.build_info()``), and ``missing``: for each part that is None the
        cause and, where there is one, the command that mends it.
    """
    missing = {}
    cuda = None
    if torch.cuda.is_available():
        cuda = torch.cuda.get_device_name()
    elif torch.version.cuda is None:
        missing["cuda"] = f"torch {torch.__version__} is built without CUDA"
    else:
        missing["cuda"] = f"torch {torch.__version__} finds no CUDA device"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
        missing["triton"] = "not installed; it comes with torch for CUDA, or: pip install triton"
    if extension is None:
        missing["cpp"] = f"{extension_error}; build it in the source folder: {BUILD_COMMAND}"
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": cuda,
        "triton": triton,
        "cpp": None if extension is None else extension.build_info(),
        "missing": missing,
    }


def describe() -> str:
    """Return ``available`` as a table for people, one line a part."""
    parts = available()
    missing = parts["missing"]
    lines = [
        f"torch   {parts['torch']}, {parts['threads']} threads",
        f"cuda    {parts['cuda'] or 'none: ' + missing['cuda']}",
        f"triton  {parts['triton'] or 'none: ' + missing['triton']}",
    ]
    if parts["cpp"] is None:
        lines.append(f"_C      none: {missing['cpp']}")
    else:
        info = parts["cpp"]
        architectures = ", ".join(info["cuda_architectures"]) or "none"
        lines += [
            f"_C      {info['compiler']}, C++{info['cpp_standard'] // 100 % 100}, for torch {info['torch']}",
            f"        CPU level {info['cpu_level']} of {', '.join(info['cpu_levels'])}; "
            f"CUDA architectures: {architectures}",
        ]
    return "\n".join(lines)
