"""Triton kernels without a GPU: values under the interpreter, in processes of their own; the kernels' tests are test_triton_<op>.py."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton", reason='triton is not installed: pip install "helo-fast[triton]"')

FILES = sorted(Path(__file__).parent.glob("test_triton_*.py"))


def arrays_of_one_are_numbers():
    """As they were to NumPy once, and as Triton 3.6 takes them."""
    try:
        return int(numpy.ones(1)) == 1
    except TypeError:
        return False


@pytest.fixture(scope="module")
def children():
    """file -> the future of its tests' run on the CPU, in a child: Triton reads TRITON_INTERPRET once, when it is imported."""
    if triton.__version__.startswith("3.6.") and not arrays_of_one_are_numbers():
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not work with NumPy {numpy.__version__}")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    options = ["-q", "-m", "not gpu", "--require-backend", "triton", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]

    def run(file):
        command = [sys.executable, "-m", "pytest", str(file), *options]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the interpreter runs on one core
        yield {file: pool.submit(run, file) for file in FILES}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process is the interpreter's")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("test_triton_"))
def test_under_the_interpreter(file, children):
    child = children[file].result()
    assert child.returncode == 0, f"{child.stdout}\n{child.stderr}"
    assert re.search(r"\d+ passed", child.stdout) and "skipped" not in child.stdout, child.stdout


def test_triton_is_imported_only_when_it_runs():
    script = "import sys, torch; before = 'triton' in sys.modules; import helo_fast; helo_fast.sinkhorn(torch.rand(2, 3, 3)); "
    script += "assert ('triton' in sys.modules) == before, 'helo_fast imported triton'"
    subprocess.run([sys.executable, "-c", script], check=True)
