"""Where a training step spends its time, an operator a row: ``python -m benchmarks.profile_step --preset released --batch 128``.

Each operator's own time on the CPU by torch's profiler (what it calls is counted there), as a share of the steps' time.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile

from helo_fast._allocator import keep_freed_memory

from .steps import TrainingStep

LEAST = 0.005  # shares below it are added up
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::_addmm_activation"}


def shares(step: TrainingStep, steps: int) -> tuple[float, dict[str, tuple[float, float]]]:
    """(seconds a step without the profiler, {operator: (share of the profiled time, calls a step)}), the largest first."""
    for _ in range(3):
        step()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    seconds = (time.perf_counter() - start) / steps
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step()
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return seconds, {event.key: (event.self_cpu_time_total / total, event.count / steps) for event in events}


def lines(title: str, seconds: float, found: dict[str, tuple[float, float]]) -> list[str]:
    rows = [("share", "ms a step", "calls a step", "operator")]
    rows += [
        (f"{share:.1%}", f"{1e3 * share * seconds:.2f}", f"{calls:.0f}", name) for name, (share, calls) in found.items() if share >= LEAST
    ]
    rest, products = (sum(share for name, (share, _) in found.items() if keep(name, share)) for keep in _SUMS)
    rows.append((f"{rest:.1%}", f"{1e3 * rest * seconds:.2f}", "", f"all below {LEAST:.1%}"))
    body = ["  ".join((f"{share:>6}", f"{each:>9}", f"{calls:>12}", name)) for share, each, calls, name in rows]
    return [f"{title}: {1e3 * seconds:.1f} ms a step, {torch.get_num_threads()} thread(s); matrix products {products:.1%}", *body]


_SUMS = (lambda name, share: share < LEAST, lambda name, share: name in PRODUCTS)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_step", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=("released", "paper"), nargs="+", default=["released", "paper"])
    parser.add_argument("--member", nargs="+", default=["auto", "auto bfloat16", "eager"], help="as in benchmarks/steps.py")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    keep_freed_memory()  # as training does
    for preset in options.preset:
        for member in options.member:
            title = f"{preset}, {member}, B {options.batch}"
            print("\n".join(lines(title, *shares(TrainingStep(preset, member, options.batch), options.steps))), end="\n\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
