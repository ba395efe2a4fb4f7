"""Peak memory of one step, measured in a process of its own.

The highest resident set during the step less that just before it, after inputs and parameters exist and a small step has loaded every
library and made the gradient buffers. On a GPU: torch.cuda.max_memory_allocated, likewise.

The high-water mark is Linux's VmHWM, reset by /proc/self/clear_refs. getrusage's ru_maxrss is no substitute: a child starts with its
parent's. A profiler's count of torch allocations would miss what C++ kernels take for themselves. glibc is told to give every large
block a mapping of its own, returned when freed: else the heap's fragmentation, which differs by 40 % from run to run, is measured too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
# A child that imports this package from where it lies, whatever is on its path, so that helo_fast is the installed one.
_CHILD = """
import sys, types
package = sys.modules["benchmarks"] = types.ModuleType("benchmarks")
package.__path__ = [sys.argv[1]]
from benchmarks.memory import main
main(*sys.argv[2:])
"""


def unavailable(device: str) -> str | None:
    return None if device == "cuda" or _RESET.exists() else "peak memory is read from Linux's /proc"


def peak_bytes(work: str, *arguments: object) -> int:
    """Peak memory of ``work`` in a new process: "sinkhorn", member, batch, n, device; or preset, member, batch, device.

    Raises:
        RuntimeError: the process failed; the message holds what it wrote.
    """
    folder = Path(__file__).resolve().parent
    command = [sys.executable, "-c", _CHILD, str(folder), work, *map(str, arguments)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"memory of {work} {arguments}: exit status {done.returncode}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def _measure(step: Callable[[], object], device: str) -> int:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _RESET.write_text("5")
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def main(work: str, member: str, *rest: str) -> None:
    """What the new process does: print the bytes."""
    from . import steps

    *sizes, device = rest
    if work == "sinkhorn":
        batch, n = map(int, sizes)
        steps.sinkhorn_gradient(member, 2, 5, device)()
        step = steps.sinkhorn_gradient(member, batch, n, device)
    else:
        (batch,) = map(int, sizes)
        step = steps.TrainingStep(work, member, batch, device)
        whole, step.batch = step.batch, [t[:2] for t in step.batch]
        step()
        step.batch = whole
        if member == "compile":  # not the compiler's own memory
            step()
    print(_measure(step, device))
