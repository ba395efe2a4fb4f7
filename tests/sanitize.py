"""Runs the cpp back end's tests on an extension built with AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

The build lies in build/sanitize, beside a copy of the package, and leaves the ordinary one alone. Every instruction set that the
processor has is run. Fresh memory, the kernels' scratch included, is NaN: who reads what nobody wrote fails its test.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
FILES = (
    ("test_sinkhorn*.py",),
    ("test_gromov*.py", "test_attention*.py", "test_residual_norm.py", "test_transformer.py"),
)  # about as long to run
SHARED = os.environ.get("HELO_FAST_SHARED") or str(ROOT.parent / "shared")
# left out for their time: each repeats thousands of times what others run too
SELECTION = "cpp and not gradcheck and not oracle and not epsilon_of_1e_4 and not limit"
QUICK = "cpp and (properties or test_every_vector_length or test_large_problems)"  # of the instruction sets below the best
# Runs pytest on the sanitized package, whatever the interpreter's own path says.
RUN = """
import sys; sys.path.insert(0, sys.argv.pop(1))
import torch, helo_fast._C as extension, pytest
assert extension.__file__.startswith(sys.path[0]), extension.__file__
assert torch.empty(1000).isnan().all(), "fresh memory is not poisoned"
print(torch.ops.helo_fast_cpu.cpu_capability(), "sanitized", flush=True)
sys.exit(pytest.main(sys.argv[1:]))
"""


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def build() -> None:
    library = BUILD / "helo_fast" / "_C.abi3.so"
    library.unlink(missing_ok=True)  # setup.py goes on without a library that does not compile
    command = (sys.executable, "setup.py", "--quiet", "build", "--build-base", f"{BUILD}-objects", "--build-lib", str(BUILD))
    compiler = BUILD / "g++"  # has the last word: setup.py's -O3 would take twice as long, most of it for the sanitizers' branches
    compiler.parent.mkdir(parents=True, exist_ok=True)
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O1\n')
    compiler.chmod(0o755)
    environment = os.environ | {"CC": str(compiler), "CXX": str(compiler), "CFLAGS": FLAGS, "LDFLAGS": FLAGS, "HELO_FAST_CUDA": "0"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if not library.exists():
        sys.exit(done.stdout[-5000:] + done.stderr[-5000:])
    symbols = output("nm", "-D", "--undefined-only", str(library))
    assert "__asan_report_store" in symbols and "__ubsan_handle" in symbols, "the extension was built without its sanitizers"


def run(capability: str, patterns: tuple[str, ...], selection: str) -> tuple[int, str]:
    environment = {
        # libstdc++ too: exceptions that cross from torch need it from the start
        "LD_PRELOAD": " ".join(output("g++", f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so.6")),
        "ASAN_OPTIONS": "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1000000000",  # 255 everywhere is NaN
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "HELO_FAST_CPU_CAPABILITY": capability,
        "HELO_FAST_SHARED": SHARED,
        "OMP_NUM_THREADS": "1",
    }
    files = [str(path) for pattern in patterns for path in sorted((ROOT / "tests").glob(pattern))]
    # a sanitizer writes its report past Python: not into what pytest captures and loses
    options = ("-q", "-x", "-k", selection, "--capture=sys", "-p", "no:cacheprovider", "--require-backend", "cpp", "--rootdir", str(ROOT))
    command = (sys.executable, "-c", RUN, str(BUILD), *files, *options, *sys.argv[1:])
    done = subprocess.run(command, cwd=BUILD, text=True, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


def brief(text: str) -> str:
    """Without the frames of the interpreter, and no longer than a screen or two."""
    lines = [line for line in text.splitlines() if "Python/" not in line and "Objects/" not in line and "Modules/" not in line]
    return "\n".join(lines[:5] + ["..."] + lines[-60:] if len(lines) > 65 else lines)


def best() -> str:
    from helo_fast import _native

    return _native.cpu_capability()


if __name__ == "__main__":
    build()
    sets = ("avx512", "avx2", "baseline")
    sets = sets[sets.index(best()) :]
    runs = [(sets[0], patterns, SELECTION) for patterns in FILES] + [(name, sum(FILES, ()), QUICK) for name in sets[1:]]
    failed = []
    with ThreadPoolExecutor(2) as pool:
        for (capability, *_), (status, text) in zip(runs, pool.map(run, *zip(*runs))):
            print(f"{capability}: exit status {status}\n{brief(text)}")
            failed += [capability] if status else []
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
