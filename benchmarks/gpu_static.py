"""What the compilers make of the GPU kernels, without a GPU: ``python -m benchmarks.gpu_static``.

A row per kernel variant and architecture: registers, shared and local memory, and the theoretical occupancy. Triton kernels are those
that ``variants()`` of the modules in kernels/ lists; CUDA kernels those of csrc/cuda, compiled with the options of setup.py.
Exit status: 1 if a kernel does not compile, spills, uses local memory or exceeds the shared memory of a block; 2 if a compiler
named by --require is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

from .gpu_report import align
from .occupancy import LIMITS, Occupancy, occupancy

ROOT = Path(__file__).resolve().parents[1]
TRITON_ARCHITECTURES = (80, 90)
COMPILERS = ("triton", "nvcc")
HEAD = ("compiler", "kernel", "for", "registers", "shared", "local", "threads", "blocks", "warps", "occupancy", "limited by")


@dataclass(frozen=True)
class Row:
    """A kernel as compiled for one architecture."""

    compiler: str
    kernel: str  # its file and name, and its variant's
    architecture: int
    registers: int = 0  # a thread
    shared: int = 0  # bytes a block
    local: int = 0  # bytes of stack frame, spill stores and spill loads
    threads: int | None = None  # a block; None where the kernel does not say
    dynamic: bool = False  # shared memory is also chosen at the launch, unknown here
    ptx: bool = False  # PTX for later architectures was made too
    error: str | None = None  # why it does not compile

    @property
    def occupancy(self) -> Occupancy | None:
        known = self.error is None and self.threads and self.architecture in LIMITS
        return occupancy(self.architecture, self.registers, self.shared, self.threads) if known else None

    @property
    def problem(self) -> str | None:
        """What is wrong with it, or None."""
        if self.error is not None:
            return f"does not compile: {self.error}"
        if self.local:
            return f"{self.local} bytes of local memory and spills"
        if self.architecture in LIMITS and self.shared > LIMITS[self.architecture].shared_block:
            return f"{self.shared} bytes of shared memory, {LIMITS[self.architecture].shared_block} at most"
        if self.occupancy is not None and self.occupancy.blocks == 0:
            return f"not one block fits: {self.occupancy.limit}"
        return None


def missing(compiler: str) -> str | None:
    """Why a compiler cannot be used here, or None."""
    if compiler == "triton":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return "Triton's interpreter does not compile: unset TRITON_INTERPRET"
        return None if importlib.util.find_spec("triton") else 'triton is not installed: pip install "helo-fast[triton]"'
    return None if setup_script()["find_nvcc"]() else "nvcc is not found: put it on PATH or set CUDA_HOME (and leave HELO_FAST_CUDA=0 out)"


@cache
def setup_script() -> dict:
    """The names of setup.py, which builds nothing here: how it compiles is how the kernels are checked."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


@cache
def triton_variants(module: str) -> list:
    return importlib.import_module(f"helo_fast.kernels.{module}").variants()


def triton_modules() -> list[str]:
    """Those of the kernels that offer variants() of their own."""
    import helo_fast.kernels as package

    names = [f"{package.__name__}.{info.name}" for info in pkgutil.iter_modules(package.__path__)]
    offered = {name: getattr(importlib.import_module(name), "variants", None) for name in names}
    return [name.rpartition(".")[2] for name, function in offered.items() if function is not None and function.__module__ == name]


def compile_variant(module: str, index: int, architecture: int) -> list[Row]:
    variant = triton_variants(module)[index]
    kernel = variant.kernel.__name__
    head = ("triton", f"{module}.{kernel} {variant.name.removeprefix(kernel.strip('_')).strip()}", architecture)
    try:
        compiled = variant.compile(architecture)
        registers, local = resources(compiled.asm["cubin"])
    except Exception as error:
        return [Row(*head, error=f"{type(error).__name__}: {error}")]
    return [Row(*head, registers, compiled.metadata.shared, local, 32 * compiled.metadata.num_warps)]


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) of a compiled kernel; what it spills is in the second."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        printed = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", str(path)], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed.stdout + printed.stderr)
    if not found:
        raise RuntimeError(f"cuobjdump prints no resource usage:\n{printed.stdout}{printed.stderr}")
    return int(found[1]), int(found[2]) + int(found[3])


def compile_cuda(source: str, architectures: list[str]) -> list[Row]:
    """The kernels of one .cu file for one entry of setup.py's front_ends()."""
    script = setup_script()
    from torch.utils.cpp_extension import include_paths

    with tempfile.TemporaryDirectory() as folder:
        flags = ["-fatbin", "-Xptxas", "-v", "-keep", "-keep-dir", folder, *script["FLAGS"], *script["generate_code"](architectures)]
        flags += [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
        command = [script["find_nvcc"](), source, "-o", str(Path(folder) / "out.fatbin"), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            numbers = [int(re.match(r"\d+", name.replace(".", ""))[0]) for name in architectures]  # also of 9.0a
            return [Row("nvcc", Path(source).name, number, error=(done.stderr or done.stdout)[-3000:]) for number in numbers]
        ptx = "\n".join(path.read_text() for path in Path(folder).glob("*.ptx"))
    return [
        dataclasses.replace(row, kernel=f"{Path(source).stem}.{row.kernel}", ptx=architectures[0].endswith("+PTX"))
        for row in parse_ptxas(done.stdout + done.stderr, ptx)
    ]


def parse_ptxas(printed: str, ptx: str = "") -> list[Row]:
    """Rows from what ``ptxas -v`` prints; threads a block and dynamic shared memory from the PTX."""
    entries = _entries(ptx)
    rows = []
    for block in re.split(r"Compiling entry function ", printed)[1:]:
        name, number = re.match(r"'(\w+)' for 'sm_(\d+)[af]?'", block).groups()
        # Of the functions that the kernel calls, each has a stack frame of its own.
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
        used = re.search(r"Used (\d+) registers", block)
        if not (frames and used):
            raise ValueError(f"ptxas -v prints no resource usage of {name}:\n{block}")
        shared = re.search(r"(\d+) bytes smem", block)
        threads, dynamic = entries.get(name, (None, False))
        local = sum(int(size) for frame in frames for size in frame)
        rows.append(
            Row("nvcc", _short(name), int(number), int(used[1]), int(shared[1]) if shared else 0, local, threads=threads, dynamic=dynamic)
        )
    return rows


def _entries(ptx: str) -> dict[str, tuple[int | None, bool]]:
    """{kernel: (its threads a block by __launch_bounds__, whether it uses shared memory of a size chosen at the launch)}."""
    external = re.findall(r"\.extern \.shared [^;]*?(\w+)\[\]", ptx)
    found = {}
    for body in re.split(r"\.entry ", ptx)[1:]:
        bounds = re.search(r"^\.maxntid (.*)$", body, re.MULTILINE)
        sizes = [int(size) for size in bounds[1].split(",")] if bounds else []
        threads = None
        for size in sizes:
            threads = (threads or 1) * size
        found[re.match(r"\w+", body)[0]] = threads, any(name in body for name in external)
    return found


def _short(mangled: str) -> str:
    """A kernel's name and template arguments."""
    demangler = shutil.which("c++filt")
    name = subprocess.run([demangler, mangled], capture_output=True, text=True, check=True).stdout.strip() if demangler else mangled
    name = name.replace("(anonymous namespace)::", "").replace("helo_fast::", "").removeprefix("void ")
    return re.sub(r"\((int|bool|long|unsigned int)\)", "", name).partition("(")[0]


def collect(compilers: Iterable[str] = COMPILERS) -> list[Row]:
    """All rows of the compilers, which are there; a process for each CPU."""
    jobs = []
    if "nvcc" in compilers:  # the longest first
        sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        jobs += [(compile_cuda, str(source), names) for source in sources for names in setup_script()["front_ends"]()]
    if "triton" in compilers:
        lengths = {module: len(triton_variants(module)) for module in triton_modules()}
        jobs += [
            (compile_variant, module, i, number) for module in lengths for i in range(lengths[module]) for number in TRITON_ARCHITECTURES
        ]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        rows = [row for found in [pool.submit(*job) for job in jobs] for row in found.result()]
    return sorted(rows, key=lambda row: (row.compiler, row.kernel, row.architecture))


def table(rows: list[Row]) -> list[str]:
    cells = [HEAD]
    for row in rows:
        architecture = f"sm_{row.architecture}{', PTX' if row.ptx else ''}"
        if row.error is not None:
            cells.append((row.compiler, row.kernel, architecture, *["-"] * 8))
            continue
        shared = f"{row.shared}{' + dynamic' if row.dynamic else ''}"
        o = row.occupancy
        fits = (o.blocks, o.warps, f"{'<= ' if row.dynamic else ''}{o.share:.0%}", o.limit) if o else ("?",) * 4
        cells.append((row.compiler, row.kernel, architecture, row.registers, shared, row.local, row.threads or "?", *fits))
    return align(cells)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_static", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--require", choices=COMPILERS, action="append", default=[], help="exit status 2 where it is missing")
    options = parser.parse_args(arguments)
    reasons = {compiler: missing(compiler) for compiler in COMPILERS}
    rows = collect([compiler for compiler, reason in reasons.items() if reason is None])
    print("\n".join(table(rows)))
    for compiler, reason in reasons.items():
        if reason is not None:
            print(f"{compiler}: nothing compiled, {reason}")
    problems = [f"{row.compiler} {row.kernel}, sm_{row.architecture}: {row.problem}" for row in rows if row.problem]
    print("\n".join(problems) or f"{len(rows)} compilations: no spills, no local memory, shared memory within limits")
    if options.json:
        fields = [dataclasses.asdict(row) | {"occupancy": row.occupancy and dataclasses.asdict(row.occupancy)} for row in rows]
        options.json.write_text(json.dumps({"rows": fields, "missing": {k: v for k, v in reasons.items() if v}}, indent=1) + "\n")
    return 1 if problems else 2 if any(reasons[compiler] for compiler in options.require) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
