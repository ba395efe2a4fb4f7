"""The package as users meet it: what import costs, what the wheel holds, what happens without a compiler or an extra."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch

import helo_fast
from helo_fast import _native

ROOT = Path(__file__).resolve().parents[1]
OLDEST_TORCH = f"{(2 << 56) | (10 << 48)}ULL"
SOURCES = ("helo_fast", "csrc", "kernels", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)


def copy_sources(folder):
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        path = ROOT / name
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(path, source / name, ignore=ignore) if path.is_dir() else shutil.copy(path, source / name)
    return source


def build_wheel(folder, **environment):
    """A wheel from a copy of the sources; returns (completed process, wheel path or None)."""
    source = copy_sources(folder)
    command = ("-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "-w", str(folder / "wheels"), "-v")
    done = python(*command, env={**os.environ, "HELO_FAST_CUDA": "0", **environment})
    return done, next(iter((folder / "wheels").glob("*.whl")), None)


def run_from_wheel(wheel, folder, code):
    """Runs code where helo_fast is the unpacked wheel alone, out of reach of an editable install."""
    zipfile.ZipFile(wheel).extractall(folder)
    alone = "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]\n"
    return python("-c", alone + code, env={**os.environ, "PYTHONPATH": str(folder)}, cwd=folder)


def test_import_is_light():
    code = "import sys, torch; before = set(sys.modules); import helo_fast; print(*sorted(set(sys.modules) - before))"
    done = python("-c", code)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert done.returncode == 0 and "helo_fast" in loaded
    assert not loaded & {"triton", "lightning", "pandas", "scipy", "matplotlib", "safetensors", "ot"}, loaded
    assert "helo_fast._C" not in done.stdout.split()


@pytest.mark.parametrize(
    "known, wanted",
    (("75 80 86 90 100 120", ["8.0", "9.0", "10.0+PTX"]), ("75 80 86 90", ["8.0", "9.0+PTX"])),  # nvcc 12.8 and later; before
)
def test_architectures_are_those_that_nvcc_knows(known, wanted, tmp_path, monkeypatch):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nprintf 'compute_%s\\n' " + known)
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for name in ("HELO_FAST_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    with mock.patch("setuptools.setup"):
        assert runpy.run_path(str(ROOT / "setup.py"))["ARCHITECTURES"] == wanted
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a+PTX")
        assert runpy.run_path(str(ROOT / "setup.py"))["ARCHITECTURES"] == ["8.6", "9.0a+PTX"]


@pytest.mark.parametrize("missing", ("lightning", "torchmetrics"))
def test_missing_train_extra_names_the_pip_command(missing):
    hide = f"import sys, importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == {missing!r} else f(n, *a)"
    run = f"{hide}; sys.argv = ['helo-fast', %r]; from helo_fast.__main__ import main; sys.exit(main())"
    train = python("-c", run % "train")
    assert train.returncode == 1 and 'pip install "helo-fast[train]"' in train.stderr and "Traceback" not in train.stderr
    info = python("-c", run % "info")
    assert info.returncode == 0 and "back ends:" in info.stdout


def quick_compiler(folder):
    """The C++ compiler without setup.py's -O3, which takes minutes: optimised code is what all other tests run."""
    path = folder / "c++"
    path.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX") or "c++"} "$@" -O0\n')
    path.chmod(0o755)
    return str(path)


def test_wheel_is_complete_and_runs(tmp_path):
    compiler = quick_compiler(tmp_path)
    done, wheel = build_wheel(tmp_path, CC=compiler, CXX=compiler)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert {"helo_fast/_C.abi3.so", "helo_fast/kernels/sinkhorn.py", "helo_fast/ops/sinkhorn/reference.py"} <= set(names)
    assert not [n for n in names if n.startswith(("tests", "benchmarks", "csrc"))]
    code = "import helo_fast, torch; print(helo_fast.__file__, helo_fast.sinkhorn(torch.rand(2, 3, 4), backend='cpp').plan.sum().item())"
    ran = run_from_wheel(wheel, tmp_path / "site", code)
    assert ran.returncode == 0, ran.stderr
    path, total = ran.stdout.split()
    assert path.startswith(str(tmp_path)) and float(total) == pytest.approx(2, abs=1e-5)


def test_source_distribution_holds_all_that_is_compiled(tmp_path):
    source = copy_sources(tmp_path)
    done = python("setup.py", "-q", "sdist", cwd=source, env={**os.environ, "HELO_FAST_CUDA": "0"})
    assert done.returncode == 0, done.stderr[-3000:]
    with tarfile.open(next((source / "dist").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = {str(path.relative_to(source)) for path in (source / "csrc").rglob("*") if path.is_file()}
    assert {"csrc/cuda/team.h", "csrc/common/hd.h", "csrc/cpu/simd.h"} <= native <= names, native - names


def test_without_a_compiler_the_package_installs_and_says_what_is_missing(tmp_path):
    nowhere = str(tmp_path / "no-compiler")
    done, wheel = build_wheel(tmp_path, CC=nowhere, CXX=nowhere)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "was not built" in done.stdout + done.stderr
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")]
    code = (
        "import helo_fast, torch; helo_fast.info(); c = torch.rand(2, 3, 4); print(helo_fast.sinkhorn(c).plan.shape)\n"
        "try: helo_fast.sinkhorn(c, backend='cpp')\nexcept RuntimeError as error: print('refused:', error)"
    )
    ran = run_from_wheel(wheel, tmp_path / "site", code)
    assert ran.returncode == 0, ran.stderr
    assert "helo_fast._C is missing" in ran.stdout and "C++17 compiler" in ran.stdout
    assert re.search("sinkhorn +eager on cpu", ran.stdout) and "refused: sinkhorn: back end 'cpp' was asked for" in ran.stdout


def test_cuda_asked_for_but_missing_is_an_error(tmp_path):
    done, wheel = build_wheel(tmp_path, HELO_FAST_CUDA="1", CUDA_HOME=str(tmp_path / "no-cuda"))
    assert done.returncode != 0 and wheel is None
    assert "HELO_FAST_CUDA=1, but nvcc was not found" in done.stdout + done.stderr


def stable_symbols():
    """The functions of the C shim, as its headers declare them for the oldest torch that the package supports."""
    from torch.utils.cpp_extension import include_paths

    headers = "torch/csrc/inductor/aoti_torch/c/shim.h", "torch/csrc/stable/c/shim.h"
    code = "".join(f"#include <{header}>\n" for header in headers)
    command = ["g++", "-E", "-x", "c++", "-", f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", *(f"-I{path}" for path in include_paths())]
    text = subprocess.run(command, input=code, capture_output=True, text=True, check=True).stdout
    # Lives in the CUDA library of torch, so its header asks for CUDA's.
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", text)) | {"aoti_torch_get_current_cuda_stream"}


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: it preprocesses torch's headers")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
@pytest.mark.parametrize("library", ("_C", "_C_cuda"))
def test_native_libraries_use_stable_interfaces_only(library):
    """What a later torch and Python must still offer: the C shim of the stable ABI and the limited Python API, nothing else of theirs."""
    reason = _native.missing(library)
    if reason:
        (pytest.fail if "does not load" in reason else pytest.skip)(reason)
    path = sys.modules[f"helo_fast.{library}"].__file__
    lines = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = {line.split()[-1].partition("@")[0] for line in lines}
    assert {s for s in symbols if s.startswith("aoti_torch_")}, "reads no torch symbol at all: is this the right file?"
    unstable = {s for s in symbols if re.search("c10|at6|torch", s)} - stable_symbols()
    assert not unstable, unstable
    assert {s for s in symbols if s.startswith(("Py", "_Py"))} <= {"PyModule_Create2", "_Py_NoneStruct"}, symbols
    assert ".abi3." in path


def test_cuda_library_is_built_where_nvcc_is_and_loads_beside_this_torch():
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed: _C_cuda is not built here")
    assert _native.missing("_C_cuda") is None
    assert hasattr(torch.ops.helo_fast_cuda, "sinkhorn_fwd")


def test_one_constant_for_the_stable_abi_and_the_pin():
    target = re.search(r"TORCH_TARGET = \((\d+), (\d+)\)", (ROOT / "setup.py").read_text()).groups()
    metadata = (ROOT / "pyproject.toml").read_text()
    assert f'"torch>={target[0]}.{target[1]}"' in metadata
    assert f'version = "{helo_fast.__version__}"' in metadata
