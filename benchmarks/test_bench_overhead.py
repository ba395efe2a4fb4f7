"""What a call costs before any kernel runs, what importing the package costs, and the clock that floors are counted in."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import helo_fast
from helo_fast.testing import assert_close

from . import clock, harness

IMPORT = "import time, torch; start = time.perf_counter(); import helo_fast; print(time.perf_counter() - start)"
PROCESSES = 5
BLOCKS = 250_000  # of additions: about a millisecond


class Case(NamedTuple):
    group: str
    device: str = "cpu"


DISPATCH = [(Case("dispatch sinkhorn B1 n4 1 iteration"), member) for member in (*harness.backends("cpu"), "torch add")]
IMPORTS = [(Case("import helo_fast after torch"), "helo_fast")]
CLOCK = [(Case("clock of a core"), "additions")]


@pytest.mark.parametrize("case, member", DISPATCH, ids=harness.identify)
def test_dispatch(bench, case, member):
    cost = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0))
    if member == "torch add":

        def call():
            return torch.add(cost, cost)

        assert torch.equal(call(), 2 * cost)
    else:
        bench.serve("sinkhorn", member)

        def call(cost=cost, backend=member):
            return helo_fast.sinkhorn(cost, max_iter=1, backend=backend).plan

        assert_close(call(), call(cost.double(), "eager"), call(cost, "eager"), what=member)
    bench.time(call, iterations=200)


@pytest.mark.parametrize("case, member", IMPORTS, ids=harness.identify)
def test_import(bench, case, member):
    """What is timed is the whole process, torch included; what counts is the import alone, in extra_info."""
    seconds = []

    def run():
        done = subprocess.run([sys.executable, "-c", IMPORT], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
        seconds.append(float(done.stdout))

    run()  # writes bytecode, warms the file cache
    assert 0 < seconds.pop() < 60
    bench.benchmark.pedantic(run, rounds=PROCESSES if bench.seconds else 1, iterations=1)
    bench.note(backend=True, auto=member, import_seconds=seconds, import_median=statistics.median(seconds))


@pytest.mark.parametrize("case, member", CLOCK, ids=harness.identify)
def test_clock(bench, case, member):
    if clock.compiler() is None:
        pytest.skip("no C compiler: put cc on PATH or set CC")
    additions = clock.additions()
    x, y = 0, 1
    for _ in range(3 * clock.ADDITIONS_A_BLOCK):
        x, y = y, x + y
    assert additions(3) == y % 2**64
    bench.note(cycles=BLOCKS * clock.ADDITIONS_A_BLOCK)
    bench.time(lambda: additions(BLOCKS))
