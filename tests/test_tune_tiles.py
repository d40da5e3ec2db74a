"""The timing of tiles, in Triton's interpreter: every candidate computes the same, and what cannot be run is said."""

import sys
from pathlib import Path

import pytest
import torch
from interpreter import INTERPRETED, interpreted, run_interpreted

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the tests run without the source tree", allow_module_level=True)
pytest.importorskip("triton")
sys.path.append(str(BENCHMARKS))

import tune_tiles  # noqa: E402

SIZES = tune_tiles.Sizes(1, 1, 16, 5, 6, torch.float16)


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter")
def test_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
def test_rows(monkeypatch):
    monkeypatch.setattr(tune_tiles, "ROUNDS", 1)
    rows = tune_tiles.tune(SIZES, most=3, workers=0)
    assert len(rows) == 3 * 3 * 3
    for kernel in tune_tiles.KERNELS:
        for pattern in ("row", "column", "conv"):
            mine = [row for row in rows if (row["kernel"], row["pattern"]) == (kernel, pattern)]
            assert [row["ms"] for row in mine] == sorted(row["ms"] for row in mine)
            assert sum(row["over_table"] == 1 for row in mine) >= 1
    text = tune_tiles.table([*rows, rows[0] | {"fault": "OutOfResources: shared memory"}])
    assert text.splitlines()[0] == "forward, row"
    assert " 1.00" in text


@interpreted
def test_another_result_is_refused(monkeypatch):
    bench = tune_tiles.Bench(SIZES, SIZES.patterns()[0])
    monkeypatch.setattr(bench, "call", lambda kernel, tiles: lambda: bench.out.fill_(tiles))
    with pytest.raises(AssertionError, match="is off by"):
        tune_tiles.time_kernel(bench, "forward", [1.0, 2.0])


@interpreted
def test_a_fault_of_the_compiler_is_an_answer():
    tiles = tune_tiles.Bench(SIZES, SIZES.patterns()[0]).tiles["forward"]
    assert tune_tiles.compile_one(SIZES, SIZES.patterns()[0], "forward", tiles) is None
    fault = tune_tiles.compile_one(SIZES, SIZES.patterns()[0], "forward", tiles._replace(block=48))
    assert fault and ":" in fault


@interpreted
def test_variations():
    tiles = tune_tiles.Bench(SIZES, SIZES.patterns()[0]).tiles["forward"]
    found = list(tune_tiles.variations(tiles))
    assert found[0] == tiles
    assert len(set(found)) == len(found) > 10
