"""What the compilers make of the GPU kernels, without a GPU: nothing spills, shared memory is within limits; and the table of that."""

import importlib
import json
from dataclasses import replace

import pytest

from benchmarks import gpu_static
from benchmarks.gpu_static import Row, parse_ptxas
from benchmarks.occupancy import LIMITS, occupancy

KIB = 1024
PTXAS = """ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '_ZN9helo_fast12_GLOBAL__N_15solveIfEEvPT_' for 'sm_90'
ptxas info    : Function properties for _ZN9helo_fast12_GLOBAL__N_15solveIfEEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 62 registers, used 1 barriers, 2048 bytes smem
ptxas info    : Compile time = 267.403 ms
ptxas info    : Compiling entry function '_ZN9helo_fast12_GLOBAL__N_15solveIdEEvPT_' for 'sm_90'
ptxas info    : Function properties for _ZN9helo_fast12_GLOBAL__N_15solveIdEEvPT_
    40 bytes stack frame, 60 bytes spill stores, 76 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
ptxas info    : Function properties for __internal_trig_reduction_slowpathd
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
PTX = """.extern .shared .align 16 .b8 _ZN9helo_fast6memoryE[];
.entry _ZN9helo_fast12_GLOBAL__N_15solveIdEEvPT_(
.maxntid 32, 4, 1
.minnctapersm 4
{ mov.b64 %rd1, _ZN9helo_fast6memoryE; }
.entry _ZN9helo_fast12_GLOBAL__N_15solveIfEEvPT_(
{ ret; }
"""


@pytest.mark.parametrize("compiler", gpu_static.COMPILERS)
def test_kernels_compile_without_spills(compiler):
    reason = gpu_static.missing(compiler)
    if reason:
        pytest.skip(reason)
    rows = gpu_static.collect([compiler])
    spill = compiler == "triton" and importlib.import_module("triton").__version__.startswith("3.6.")  # some do there: README
    judged = [replace(row, local=0) if spill else row for row in rows]
    problems = [f"{row.kernel}, sm_{row.architecture}: {row.problem}" for row in judged if row.problem]
    assert not problems, "\n".join(problems)
    assert all(row.registers and row.occupancy is not None for row in rows), "a kernel needs __launch_bounds__ with its threads"
    by_architecture = {row.architecture for row in rows}
    if compiler == "triton":
        assert by_architecture == set(gpu_static.TRITON_ARCHITECTURES)
        offered = sum(len(gpu_static.triton_variants(module)) for module in gpu_static.triton_modules())
        assert len(rows) == offered * len(by_architecture) and len({(row.kernel, row.architecture) for row in rows}) == len(rows)
    else:
        architectures = gpu_static.setup_script()["ARCHITECTURES"]
        assert len(by_architecture) == len(architectures)
        sources = (gpu_static.ROOT / "csrc" / "cuda").glob("*.cu")
        assert {row.kernel.partition(".")[0] for row in rows} == {path.stem for path in sources if "__global__" in path.read_text()}
        assert any(row.ptx for row in rows) == any(name.endswith("+PTX") for name in architectures)


@pytest.mark.parametrize(
    "architecture, registers, shared, threads, blocks, warps, limit",
    (
        (80, 32, 0, 256, 8, 64, "registers"),  # all three of registers, warps and threads are used up
        (80, 33, 0, 256, 6, 48, "registers"),  # 1280 registers a warp: 12 warps in a quarter
        (90, 255, 0, 128, 2, 8, "registers"),
        (90, 16, 0, 32, 32, 32, "blocks"),
        (90, 16, 0, 1024, 2, 64, "warps"),
        (90, 65, 0, 1024, 0, 0, "registers"),  # 28 warps fit
        (80, 32, 100 * KIB, 128, 1, 4, "shared memory"),
        (90, 32, 100 * KIB, 128, 2, 8, "shared memory"),
        (80, 32, 163 * KIB, 128, 1, 4, "shared memory"),
        (80, 32, 163 * KIB + 1, 128, 0, 0, "shared memory"),
        (100, 32, 227 * KIB, 100, 1, 4, "shared memory"),  # 100 threads are four warps
        (90, 32, 0, 1025, 0, 0, "threads"),
    ),
)
def test_occupancy(architecture, registers, shared, threads, blocks, warps, limit):
    found = occupancy(architecture, registers, shared, threads)
    assert (found.blocks, found.warps, found.limit) == (blocks, warps, limit)
    assert found.share == warps / 64


def test_occupancy_falls_with_registers_and_shared_memory():
    for architecture in LIMITS:
        by_registers = [occupancy(architecture, registers, 0, 128).warps for registers in range(1, 256)]
        by_shared = [occupancy(architecture, 32, shared, 128).warps for shared in range(0, 256 * KIB, KIB)]
        for warps in (by_registers, by_shared):
            assert warps == sorted(warps, reverse=True) and warps[0] == 64


def test_ptxas_output_with_a_spill():
    clean, spilling = parse_ptxas(PTXAS, PTX)
    assert (clean.registers, clean.shared, clean.local, clean.threads, clean.dynamic) == (62, 2048, 0, None, False)
    assert clean.problem is None and clean.architecture == 90
    assert (spilling.registers, spilling.local, spilling.threads, spilling.dynamic) == (255, 40 + 60 + 76, 128, True)
    assert spilling.problem == "176 bytes of local memory and spills"
    with pytest.raises(ValueError, match="no resource usage"):
        parse_ptxas("Compiling entry function '_Z1fv' for 'sm_80'\n")


def test_what_is_a_problem():
    good = Row("triton", "k", 80, registers=32, shared=163 * KIB, threads=128)
    assert good.problem is None
    assert "at most" in Row("triton", "k", 80, registers=32, shared=164 * KIB, threads=128).problem
    assert Row("triton", "k", 90, registers=32, shared=164 * KIB, threads=128).problem is None
    assert "not one block fits: registers" in Row("nvcc", "k", 90, registers=80, threads=1024).problem
    assert "does not compile: no" in Row("nvcc", "k", 90, error="no").problem


def test_command(monkeypatch, capsys, tmp_path):
    good = Row("nvcc", "good", 100, registers=64, shared=512, threads=128, dynamic=True, ptx=True)
    rows = [good]
    monkeypatch.setattr(gpu_static, "collect", lambda compilers: rows if list(compilers) == ["nvcc"] else pytest.fail(str(compilers)))
    monkeypatch.setattr(gpu_static, "missing", lambda compiler: "it is not here" if compiler == "triton" else None)
    assert gpu_static.main([]) == 0 and gpu_static.main(["--require", "nvcc"]) == 0
    assert gpu_static.main(["--require", "triton", "--json", str(tmp_path / "rows.json")]) == 2
    printed = capsys.readouterr().out
    assert "sm_100, PTX" in printed and "<= 50%" in printed and "triton: nothing compiled, it is not here" in printed
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert saved["missing"] == {"triton": "it is not here"} and saved["rows"][0]["occupancy"]["blocks"] == 8
    rows.append(Row("nvcc", "bad", 90, registers=64, local=8, threads=128))
    assert gpu_static.main([]) == 1
    assert "nvcc bad, sm_90: 8 bytes of local memory and spills" in capsys.readouterr().out
