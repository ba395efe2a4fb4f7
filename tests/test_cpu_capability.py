"""Every instruction set that this processor has passes the tests of the cpp back end, each in a process of its own.

The best one is what all other tests run; here are the others, side by side.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helo_fast import _native

SETS = ("baseline", "avx2", "avx512")
FILES = (
    "test_sinkhorn.py",
    "test_sinkhorn_gradient_values.py",
    "test_gromov.py",
    "test_gromov_kernels.py",
    "test_attention_kernels.py",
    "test_transformer.py",
)


def run(*arguments, capability):
    # Memory that malloc gives out holds 0x7f7f... (glibc): what a kernel reads before it has written it shows.
    environment = {**os.environ, "HELO_FAST_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1", "MALLOC_PERTURB_": "128"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def run_tests(capability):
    tests = [str(Path(__file__).with_name(name)) for name in FILES]
    return run("-m", "pytest", *tests, "-q", "-p", "no:cacheprovider", "-k", "cpp", "--require-backend", "cpp", capability=capability)


@pytest.fixture(autouse=True, scope="module")
def _compiled(request):
    reason = _native.missing("_C")
    if reason:
        (pytest.fail if "cpp" in request.config.getoption("--require-backend") else pytest.skip)(reason)


def asked_for(capability):
    return run("-c", "from helo_fast import _native; print(_native.cpu_capability())", capability=capability)


@pytest.fixture(scope="module")
def runs():
    """The tests of each set that the processor has and that is not in use anyway, all started at once."""
    others = [name for name in SETS if name != _native.cpu_capability() and asked_for(name).returncode == 0]
    with ThreadPoolExecutor() as pool:
        yield {name: pool.submit(run_tests, name) for name in others}


@pytest.mark.parametrize("capability", SETS)
def test_each_instruction_set(capability, runs):
    asked = asked_for(capability)
    if "this processor has at most" in asked.stderr:
        pytest.skip(f"this processor lacks {capability}")
    assert asked.stdout.strip() == capability, asked.stderr
    if capability == _native.cpu_capability():
        return
    done = runs[capability].result()
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


def test_unknown_instruction_set_is_an_error():
    done = run("-c", "import torch, helo_fast; helo_fast.sinkhorn(torch.rand(2, 2))", capability="sse9")
    assert done.returncode != 0 and "HELO_FAST_CPU_CAPABILITY=sse9: choose baseline, avx2 or avx512" in done.stderr
