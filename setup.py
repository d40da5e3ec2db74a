"""Builds the C++/CUDA extension dalle_fast._C; everything else about the package is in pyproject.toml.

torch is imported only when the extension is really compiled, so metadata, sdist and a pure-Python install
work without it. The environment variable DALLE_FAST_BUILD says what happens where torch or a C++ compiler is
missing: ``auto`` (default) installs the package without the extension and prints one warning, ``require`` is
an error, ``skip`` never builds it. A compile error is an error always.

The CUDA half is built where torch has CUDA and nvcc is found, for TORCH_CUDA_ARCH_LIST (default 8.0;9.0, and 10.0 where
nvcc knows it).
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

INSTALL_COMMAND = "pip install --no-build-isolation ."
BUILD_MODES = ("auto", "require", "skip")
DEFAULT_CUDA_ARCHITECTURES = {"8.0": "sm_80", "9.0": "sm_90", "10.0": "sm_100"}  # by torch's names, and nvcc's
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cu"))


def missing_requirement() -> str | None:
    """Why the extension cannot be built here, or None where it can."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"torch cannot be imported in the build environment ({error})"
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        return f"the C++ compiler {compiler!r} is not there"
    return None


def default_cuda_architectures(cuda_home: str) -> str:
    """The defaults that its nvcc compiles for; all where it does not say, so that the build names what is wrong."""
    nvcc = shutil.which("nvcc", path=os.path.join(cuda_home, "bin"))
    known = []
    if nvcc is not None:
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    return ";".join(name for name, code in DEFAULT_CUDA_ARCHITECTURES.items() if not known or code in known)


def configure(extension: Extension) -> None:
    """Add what only torch knows: include and library folders, and whether the CUDA half can be built."""
    import torch
    from torch.utils import cpp_extension

    has_cuda = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
    kind = "cuda" if has_cuda else "cpu"
    extension.include_dirs += cpp_extension.include_paths(device_type=kind)
    extension.library_dirs += cpp_extension.library_paths(device_type=kind)
    extension.libraries += ["c10", "torch", "torch_cpu"]
    flags = ["-O3", "-std=c++20"]
    extension.extra_compile_args = {"cxx": [*flags, "-g0", "-Wall", "-Wno-psabi", "-fvisibility=hidden"], "nvcc": flags}
    if has_cuda:
        if "TORCH_CUDA_ARCH_LIST" not in os.environ:
            os.environ["TORCH_CUDA_ARCH_LIST"] = default_cuda_architectures(cpp_extension.CUDA_HOME)
        architectures = os.environ["TORCH_CUDA_ARCH_LIST"]
        listed = ";".join(architectures.replace(";", " ").split())
        extension.sources += CUDA_SOURCES
        extension.libraries += ["cudart", "c10_cuda", "torch_cuda"]
        extension.define_macros += [("USE_CUDA", None), ("DALLE_FAST_CUDA_ARCHITECTURES", f'"{listed}"')]


class BuildExtension(build_ext):
    """setuptools' build_ext, with the compile step handed to torch's BuildExtension (ninja, nvcc)."""

    def run(self) -> None:
        mode = os.environ.get("DALLE_FAST_BUILD", "auto")
        if mode not in BUILD_MODES:
            raise ValueError(f"DALLE_FAST_BUILD must be one of {', '.join(BUILD_MODES)}, got {mode!r}")
        cause = None if mode == "skip" else missing_requirement()
        if cause is not None:
            message = (
                f"dalle_fast._C is not built: {cause}. "
                f"Install torch and a C++ compiler first, then run: {INSTALL_COMMAND}"
            )
            if mode == "require":
                raise RuntimeError(message)
            print(f"WARNING: {message}", file=sys.stderr)
        if mode == "skip" or cause is not None:
            self.extensions = []
            return
        for extension in self.extensions:
            configure(extension)
        super().run()

    def build_extensions(self) -> None:
        from torch.utils import cpp_extension

        builder = cpp_extension.BuildExtension(self.distribution)
        vars(builder).update(vars(self))  # the options and the compiler settled on for this build
        builder.force = True  # ninja decides what is out of date
        builder.build_extensions()


setup(
    ext_modules=[
        Extension(
            "dalle_fast._C",
            sources=[*sorted(glob("csrc/*.cpp")), *sorted(glob("csrc/cpu/*.cpp"))],
            depends=[*sorted(glob("csrc/*/*.h")), *CUDA_SOURCES],
            include_dirs=[sysconfig.get_path("include")],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
