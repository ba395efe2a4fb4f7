"""Other compilers and processors: csrc/ compiles without a warning, and gives the same numbers, from clang and for AArch64.

Debian: apt-get install clang g++-aarch64-linux-gnu qemu-user-static.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from helo_fast import sinkhorn
from helo_fast.testing import SINKHORN_CASES, assert_close

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/ops.cpp", *(ROOT / "csrc" / "cpu").glob("*.cpp")))
DRIVER = "tests/portable/sinkhorn.cpp"
AARCH64 = "aarch64-linux-gnu-g++"
STRICT = ("-Wall", "-Wextra", "-Werror")


def needs(*programs):
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def includes():
    from torch.utils.cpp_extension import include_paths

    paths = (*include_paths(), sysconfig.get_path("include", "posix_prefix", {"base": sys.base_prefix, "installed_base": sys.base_prefix}))
    return ["-Icsrc", *(flag for path in paths for flag in ("-isystem", path)), f"-DTORCH_TARGET_VERSION={(2 << 56) | (10 << 48)}ULL"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results(name): what became of a compilation. All run side by side, the longest first, from the first question on.

    "clang" is the extension, built by setup.py; (compiler, source) an object, or of DRIVER a program: it needs no torch, so that it
    runs under an emulator.
    """
    folder = tmp_path_factory.mktemp("compiled")

    def extension():
        command = (sys.executable, "setup.py", "--quiet", "build", "--build-base", folder / "objects", "--build-lib", folder / "lib")
        flags = " ".join((*STRICT, "--system-header-prefix=torch/"))  # setup.py includes torch's headers as if they were ours
        environment = os.environ | {"CC": "clang", "CXX": "clang++", "CFLAGS": flags, "HELO_FAST_CUDA": "0"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        return folder / "lib" / "helo_fast" / "_C.abi3.so", done

    def compilation(compiler, source):
        target = folder / f"{compiler}-{Path(source).stem}{'-program' if source == DRIVER else '.o'}"
        # Objects are for the front end's warnings, and to see that there is code for everything; clang's extension is optimised.
        # Of programs, -O1 generates the code that is looked at, for vectors of every width; -O3 takes g++ four times as long.
        options = ("-O1", "-static", "-Icsrc") if source == DRIVER else ("-O0", "-fPIC", *includes(), "-c")
        command = (compiler, "-std=c++17", *STRICT, *options, source, "-o", target)
        return target, subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        asked = {"clang": pool.submit(extension)} if shutil.which("clang++") else {}
        wanted = [
            (AARCH64, DRIVER),
            ("clang++", DRIVER),
            *((AARCH64, source) for source in sorted(SOURCES, key=lambda s: "sinkhorn" not in s)),
        ]
        asked |= {(c, s): pool.submit(compilation, c, s) for c, s in wanted if shutil.which(c)}

        def result(name):
            target, done = asked[name].result()
            assert done.returncode == 0 and target.exists(), done.stdout[-3000:] + done.stderr[-3000:]
            return target

        yield result
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_a_warning(source, results):
    needs(AARCH64)
    results((AARCH64, source))


def solve(command, cost, a, b, epsilon, max_iter, taus):
    """(plan, f, g) from the driver."""
    kappas = [1.0 if tau is None else tau / (tau + epsilon) for tau in taus]
    slope = 0.0 if taus[1] is None else epsilon / taus[1]
    head = torch.tensor([*cost.shape, max_iter]), torch.tensor([epsilon, *kappas, slope], dtype=torch.float64)
    given = b"".join(t.contiguous().numpy().tobytes() for t in (*head, cost, a, b))
    done = subprocess.run(command, input=given, capture_output=True)
    assert done.returncode == 0, done.stderr
    values = torch.frombuffer(bytearray(done.stdout), dtype=cost.dtype).split([cost.numel(), a.numel(), b.numel()])
    return [v.view(t.shape) for v, t in zip(values, (cost, a, b))]


@pytest.mark.parametrize("compiler", (AARCH64, "clang++"))
def test_same_numbers_elsewhere(compiler, results):
    """AArch64 runs under qemu; every width of vectors, also those that the processor has to put together."""
    needs(compiler)
    emulator = ("qemu-aarch64-static",) if compiler == AARCH64 else ()
    needs(*emulator)
    program = results((compiler, DRIVER))
    widths = ("16", "32", "64") if emulator else ("16",)  # what this processor lacks would be an illegal instruction
    for name in ("rectangular", "square", "tiny_epsilon", "unbalanced_tiny_epsilon", "zero_mass", "large_cost", "one_by_one"):
        for dtype in (torch.float32, torch.float64):
            arguments = SINKHORN_CASES[name](dtype)
            cost, options = arguments.pop("cost"), {k: v for k, v in arguments.items() if k not in "ab"}
            a = arguments.get("a", torch.full(cost.shape[:2], 1 / cost.shape[1], dtype=dtype))
            b = arguments.get("b", torch.full((len(cost), cost.shape[2]), 1 / cost.shape[2], dtype=dtype))
            exact = sinkhorn(cost.double(), a.double(), b.double(), **options, backend="eager")
            eager = sinkhorn(cost, a, b, **options, backend="eager")
            taus = options.get("tau_a"), options.get("tau_b")
            for width in widths:
                command = (*emulator, program, str(dtype).removeprefix("torch."), width)
                values = solve(command, cost, a, b, options.get("epsilon", 0.1), options.get("max_iter", 100), taus)
                for what, value in zip(("plan", "f", "g"), values):
                    assert_close(value, getattr(exact, what), getattr(eager, what), f"{name} {what}, vectors of {width} bytes")


def test_extension_built_by_clang(tmp_path, results):
    """Without a warning either."""
    needs("clang", "clang++")
    library = results("clang")
    assert b"clang version" in library.read_bytes()
    run = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import torch, helo_fast._C as extension, pytest\n"
        "assert extension.__file__.startswith(sys.path[0]); sys.exit(pytest.main(sys.argv[1:]))"
    )
    files = [str(ROOT / "tests" / name) for name in ("test_sinkhorn.py", "test_sinkhorn_properties.py")]
    options = ("-q", "-k", "cpp", "-p", "no:cacheprovider", "--require-backend", "cpp", "--rootdir", str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", run, str(library.parents[1]), *files, *options], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
