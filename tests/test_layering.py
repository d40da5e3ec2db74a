"""Who may import whom: the arrows between the modules of the package, read from their source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, KERNELS = ROOT / "dalle_fast", ROOT / "kernels"

pytestmark = pytest.mark.skipif(not PACKAGE.is_dir(), reason="the tests run without the source tree")

# Part of the package -> the parts it may import besides itself; a part is the name after "dalle_fast.".
OPS = {"patterns", "ops"}
FILES_ON_DISK = {"checkpoint", "config", "data"}
ARROWS = {
    "patterns": set(),
    "reference": {"patterns"},
    "kernels": set(),
    "ops": {"patterns", "reference", "kernels", "_C"},
    "formats": {"reference", "ops", "_C"},
    "optim": {"reference", "ops", "formats"},
    "grad_scaler": {"reference", "ops"},
    "models": OPS,
    "data": set(),
    "config": set(),
    "checkpoint": set(),
    "sampling": OPS | {"models"},
    "batching": OPS | {"models"},
    "pipeline": OPS | FILES_ON_DISK | {"models", "sampling", "batching"},
    "training": OPS | FILES_ON_DISK | {"formats", "optim", "grad_scaler", "models", "sampling", "pipeline"},
}
DOORS_TO_NATIVE_CODE = {"ops", "formats"}
FRONT_DOORS = {"", "cli", "sample", "demo", "__main__"}  # may import everything


def source_files() -> dict[str, Path]:
    """Module name, as it is installed, to source file."""
    files = {f"dalle_fast.{p.relative_to(PACKAGE).with_suffix('').as_posix()}": p for p in PACKAGE.rglob("*.py")}
    files |= {
        f"dalle_fast.kernels.{p.relative_to(KERNELS).with_suffix('').as_posix()}": p for p in KERNELS.rglob("*.py")
    }
    return {name.replace("/", ".").removesuffix(".__init__"): path for name, path in files.items()}


def part_of(module: str) -> str:
    """The part of the package a module belongs to: "ops" for dalle_fast.ops.attention, "" for dalle_fast."""
    return module.removeprefix("dalle_fast").removeprefix(".").partition(".")[0]


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, inside functions too; from dalle_fast import x counts as dalle_fast.x."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level or node.module == "dalle_fast":
                yield from ("." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


def package_parts(path: Path) -> set[str]:
    """Parts of the package that a file imports; the version number is for all to read."""
    names = {name for name in imports(path) if name.split(".")[0] == "dalle_fast"}
    return {part_of(name) for name in names - {"dalle_fast.__version__"}}


FILES = source_files()


def test_imports_are_found():
    assert "dalle_fast._C" in imports(FILES["dalle_fast.ops.backends"])
    assert "dalle_fast.reference" in imports(FILES["dalle_fast.ops.attention"])
    assert {"dalle_fast.ops.attention", "dalle_fast.patterns"} <= set(imports(FILES["dalle_fast.models.transformer"]))


@pytest.mark.parametrize("module", FILES)
def test_arrows(module):
    part = part_of(module)
    if part in FRONT_DOORS:
        return
    assert part in ARROWS, f"say in ARROWS what {part} may import"
    allowed = ARROWS[part] | {part}
    assert package_parts(FILES[module]) <= allowed


@pytest.mark.parametrize("module", FILES)
def test_names_are_absolute(module):
    for name in imports(FILES[module]):
        assert not name.startswith("."), f"relative import {name}"
        assert name.split(".")[0] != "kernels", "import dalle_fast.kernels, not kernels"


@pytest.mark.parametrize("module", FILES)
def test_native_code_has_two_doors(module):
    if part_of(module) not in DOORS_TO_NATIVE_CODE | {"kernels"}:
        assert not package_parts(FILES[module]) & {"kernels", "_C"}


def test_arrows_have_no_cycle_below_the_ops():
    order = ["patterns", "reference", "ops", "models", "sampling", "pipeline", "training"]
    for index, part in enumerate(order):
        assert not ARROWS[part] & set(order[index:])


@pytest.mark.parametrize("module", [name for name in FILES if part_of(name) in ("patterns", "reference")])
def test_specification_needs_torch_alone(module):
    standard = {"__future__", "collections", "dataclasses", "functools", "math", "typing"}
    outside = {name.split(".")[0] for name in imports(FILES[module])} - {"dalle_fast"}
    assert outside <= standard | {"torch"}


@pytest.mark.parametrize("module", [name for name in FILES if part_of(name) == "kernels"])
def test_kernels_know_torch_triton_and_each_other(module):
    outside = {name.split(".")[0] for name in imports(FILES[module])}
    assert outside <= {"__future__", "math", "typing", "torch", "triton", "dalle_fast"}
