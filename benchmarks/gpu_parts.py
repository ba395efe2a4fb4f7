"""What the processes of ``benchmarks.gpu_check`` do: ``python -m benchmarks.gpu_parts NAME SECONDS ROWS``.

Each writes what it finds to the file ROWS, a line of JSON as soon as it has it, and its log to the standard output.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .gpu_check import CANNOT, ROOT

TESTS = ROOT / "tests"
# Files whose tests run on a GPU, or say what runs there.
GPU_TESTS = (
    "sinkhorn*",
    "gromov*",
    "attention*",
    "residual_norm*",
    "triton_*",
    "philox",
    "dispatch",
    "allocator",
    "linear",
    "model*",
    "golden",
)
REQUIRED = ("cuda", "triton")  # back ends that must serve
MOST_WORKERS = 14  # of pytest: each takes some of the GPU's memory
OPTIONAL = "ot"  # tests of files that import it run, but for those that use it
CARD = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
)


class Rows:
    """Appends to the file of rows, and remembers whether one was a failure."""

    def __init__(self, path: Path):
        self.path, self.failed = path, False

    def add(self, **row: object) -> None:
        self.failed |= bool(row.get("failed")) or row.get("outcome") == "failed"
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def cannot(self, reason: str) -> int:
        self.add(reason=reason)
        return CANNOT


def environment(options: argparse.Namespace, rows: Rows) -> int:
    """Versions, and the card as it is."""
    from helo_fast import _registry

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    import torch

    facts = _registry.describe()
    packages = {
        name: installed(name) for name in ("numpy", "pot", "pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "setuptools", "ninja")
    }
    card = {}
    if options.device == "cuda":
        printed = output("nvidia-smi", f"--query-gpu={','.join(CARD)}", "--format=csv,noheader", "--id=0")
        card = dict(zip(CARD, map(str.strip, (printed or "").split(",")))) if printed else {}
    nvcc = re.search(r"release ([\d.]+)", output("nvcc", "--version") or "")
    rows.add(
        gpu=facts["gpu"] if options.device == "cuda" else None,
        card=card,
        helo_fast=facts["version"],
        torch=facts["torch"],
        torch_cuda=torch.version.cuda,
        triton=facts["triton"],
        nvcc=nvcc and nvcc[1],
        python=sys.version.split()[0],
        packages=packages,
        cpu=facts["cpu"],
        cpus=os.cpu_count(),
        threads=facts["threads"],
        backends=facts["backends"],
    )
    return 1 if options.device == "cuda" and not torch.cuda.is_available() else 0


def output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def build(options: argparse.Namespace, rows: Rows) -> int:
    """The extensions in place, for this card alone unless TORCH_CUDA_ARCH_LIST says otherwise; then what they serve."""
    import torch

    architecture = ".".join(map(str, torch.cuda.get_device_capability()))
    variables = {"HELO_FAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST") or architecture}
    done = subprocess.run((sys.executable, "setup.py", "build_ext", "--inplace", "-j", "2"), cwd=ROOT, env=os.environ | variables)
    built = sorted(path.name for path in (ROOT / "helo_fast").glob("*.so"))
    ask = "import json; from helo_fast import _registry; print(json.dumps(_registry.describe()['backends']))"
    asked = subprocess.run((sys.executable, "-c", ask), cwd=ROOT, capture_output=True, text=True)
    print(asked.stderr)
    states = json.loads(asked.stdout) if asked.returncode == 0 else {}
    missing = [f"{name}: {states.get(name)}" for name in ("cpp", *REQUIRED) if states.get(name) != "available"]
    rows.add(architectures=variables["TORCH_CUDA_ARCH_LIST"], built=built, backends=states, failed=bool(missing), reason="; ".join(missing))
    return done.returncode


def test(options: argparse.Namespace, rows: Rows) -> int:
    """The files of GPU_TESTS, or all others."""
    if importlib.util.find_spec("pytest") is None:
        return rows.cannot("pytest is not installed: pip install pytest")
    import pytest

    on_gpu = {path for pattern in GPU_TESTS for path in TESTS.glob(f"test_{pattern}.py")}
    files = sorted(on_gpu if options.name == "tests" else set(TESTS.rglob("test_*.py")) - on_gpu - {TESTS / "test_gpu_check.py"})
    chosen = []
    for path in files:
        lacking = absent(path) - {OPTIONAL}
        if lacking:
            rows.add(left_out=path.name, reason=f"not installed: {', '.join(sorted(lacking))}")
        else:
            chosen.append(str(path))
    arguments = ["-q", "-p", "no:cacheprovider", "--skip-absent", OPTIONAL]
    arguments += [word for name in REQUIRED for word in ("--require-backend", name)] if options.name == "tests" else []
    if importlib.util.find_spec("xdist"):
        arguments += ["-n", str(min(max((os.cpu_count() or 2) - 2, 1), MOST_WORKERS))]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return int(pytest.main([*chosen, *arguments], plugins=[Reporter(rows)]))


class Reporter:
    """A row for each test, when it ends: of a run that is broken off, what came before is known."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._add(report)

    def pytest_collectreport(self, report) -> None:
        if report.outcome == "failed":
            self._add(report)

    def _add(self, report) -> None:
        reason = None
        if report.outcome == "failed":
            reason = report.longreprtext[-4000:]
        elif report.outcome == "skipped":
            reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else "expected to fail"
        self.rows.add(test=report.nodeid, outcome=report.outcome, reason=reason)


def absent(path: Path) -> set[str]:
    """Packages that a test file, or the training that it tests, imports and that are not installed."""
    text = path.read_text()
    trees = [path, *((ROOT / "helo_fast" / "train").rglob("*.py") if re.search(r"helo_fast.train|helo-fast", text) else ())]
    return {name for tree in trees for name in imports(tree.read_text()) if importlib.util.find_spec(name) is None}


def imports(text: str) -> set[str]:
    """Packages that a module imports when it is imported."""
    names = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.partition(".")[0] for name in names} - {"helo_fast", "benchmarks", "tests"}


def sanitize(options: argparse.Namespace, rows: Rows) -> int:
    """compute-sanitizer's memcheck or racecheck on the package's kernels, over the smallest cases."""
    tool, sanitizer = options.name, shutil.which("compute-sanitizer")
    if sanitizer is None:
        return rows.cannot("compute-sanitizer is not on PATH")
    names = kernel_names()
    # Only these are instrumented, where the option is known: it is minutes without.
    only = [f"--kernel-regex=kns={name}" for name in names] if "--kernel-regex" in (output(sanitizer, "--help") or "") else []
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *only]
    command += [sys.executable, "-m", "benchmarks.gpu_parts", "smallest", str(options.seconds), str(rows.path)]
    # Without torch's caching of memory, so that the end of a tensor is the end of an allocation.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    printed = []
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        for line in child.stdout:  # at once, so that the log has it if time runs out
            print(line, end="", flush=True)
            printed.append(line)
    if any("Device not supported" in line for line in printed):
        return rows.cannot("compute-sanitizer does not support this device here")
    summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", "".join(printed))
    clean = child.returncode == 0 and bool(summary)
    reason = None if clean else f"{tool}: {summary[-1] if summary else 'no summary'}, exit status {child.returncode}"
    rows.add(tool=tool, kernels=names, summary=summary, failed=not clean, reason=reason)
    return child.returncode


def kernel_names() -> list[str]:
    """Of the package's kernels, Triton's and CUDA's."""
    sources = (path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*"))
    names = {name for text in sources for name in re.findall(r"__global__[^;{]*?(\w+)\([^(){]*\)\s*\{", text)}
    if importlib.util.find_spec("triton") is not None:
        from . import gpu_static

        names |= {variant.kernel.__name__ for module in gpu_static.triton_modules() for variant in gpu_static.triton_variants(module)}
    return sorted(names)


def smallest(options: argparse.Namespace, rows: Rows) -> int:
    """Forward and backward of every operator on every GPU back end that serves it, at sizes that leave parts of tiles empty.

    By itself it also fills Triton's cache for the sanitizers, under which compiling takes minutes.
    """
    import torch

    import helo_fast
    from helo_fast import _registry
    from helo_fast.ops.residual_norm import residual_norm

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, device=options.device, requires_grad=True)

    def sinkhorn(backend: str) -> torch.Tensor:
        results = [
            helo_fast.sinkhorn(drawn(2, n, m), max_iter=4, tol=tol, check_every=2, gradient=gradient, backend=backend)
            for n, m in ((3, 5), (17, 40), (5, 300), (520, 1010), (3, 1100))  # in registers, by rows, in stripes, and streamed
            for gradient, tol in (("implicit", 1e-3), ("unrolled", None))
        ]
        many = drawn(4099, 9, 13)  # of which Triton solves several to a program
        results.append(helo_fast.sinkhorn(many, max_iter=4, tol=1e-3, check_every=2, gradient="none", backend=backend))
        return sum(result.plan.square().sum() + result.transport_cost.sum() for result in results)

    def gromov(backend: str) -> torch.Tensor:
        options = {"outer_iter": 2, "inner_iter": 2, "backend": backend}
        sizes = ((2, 3, 8), (2, 17, 40))
        tokens = [helo_fast.gromov_from_tokens(drawn(b, n, d), drawn(b, n + 2, d), **options) for b, n, d in sizes]
        costs = [helo_fast.gromov_wasserstein(drawn(b, n, n), drawn(b, d, d), **options) for b, n, d in sizes]
        return sum(result.gw_cost.sum() for result in (*tokens, *costs))

    def lcd_attention(backend: str) -> torch.Tensor:
        rates = {"dropkey_p": 0.5, "dropout_p": 0.5, "seed": 1, "backend": backend}
        outs = [
            helo_fast.lcd_attention(drawn(2, 2, n, d), drawn(2, 2, m, d), drawn(2, 2, m, d), **rates)
            for n, m, d in ((3, 5, 8), (23, 30, 8), (17, 40, 20))
        ]
        outs.append(helo_fast.lcd_attention(drawn(1, 2, 5, 8), drawn(2, 2, 7, 8), drawn(2, 2, 7, 8), drawn(5, 7), **rates))
        return sum(out.square().sum() for out in outs)

    def norm(backend: str) -> torch.Tensor:
        return sum(
            residual_norm(drawn(r, d), drawn(r, d), drawn(d), drawn(d), dropout_p=0.5, seed=1, backend=backend).square().sum()
            for r, d in ((3, 5), (17, 200))
        )

    for backend in REQUIRED if options.device == "cuda" else ("cpp",):
        serves = False
        for op, run in {"sinkhorn": sinkhorn, "gromov": gromov, "lcd_attention": lcd_attention, "residual_norm": norm}.items():
            reason = _registry._refusal(op, backend, torch.empty(0, device=options.device))
            if reason is not None:
                rows.add(op=op, backend=backend, ran=False, reason=reason)
                continue
            serves = True
            try:
                total = run(backend)
                total.backward()
                failed = None if total.isfinite() else f"the sum of its answers is {total.item()}"
            except Exception as error:
                failed = f"{type(error).__name__}: {error}"[:500]
            rows.add(op=op, backend=backend, ran=True, failed=failed is not None, reason=failed)
        if not serves:
            rows.add(backend=backend, failed=True, reason="it serves no operator here")
    return int(rows.failed)


def ops(options: argparse.Namespace, rows: Rows) -> int:
    from . import gpu_ops

    bounds = gpu_ops.ceilings(options.device)
    rows.add(ceilings=bounds)
    each = 0.02 if options.quick else 0.3
    for case in gpu_ops.cases(options.device, options.quick):
        for row in gpu_ops.measure(case, options.device, bounds, each, options.quick):
            rows.add(**row)
    return 0


def steps(options: argparse.Namespace, rows: Rows) -> int:
    from . import gpu_steps

    sizes, each = ((4,), 0.05) if options.quick else ((128, 8192), 0.4)
    for row in gpu_steps.measure(sizes, options.device, each, options.quick, options.seconds):
        rows.add(**row)
    return 0


def batch(options: argparse.Namespace, rows: Rows) -> int:
    from . import gpu_steps

    for row in gpu_steps.largest_batches(options.device, 0.8 * options.seconds, options.quick):
        rows.add(**row)
    return 0


PARTS = {
    "environment": environment,
    "build": build,
    "tests": test,
    "memcheck": sanitize,
    "racecheck": sanitize,
    "smallest": smallest,
    "ops": ops,
    "steps": steps,
    "batch": batch,
    "suite": test,
}


def main(arguments: Iterable[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_parts", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("seconds", type=float)
    parser.add_argument("rows", type=Path)
    options = parser.parse_args(arguments)
    rows = Rows(options.rows)
    return PARTS[options.name](options, rows) or int(rows.failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
