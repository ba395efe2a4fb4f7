"""The table of ratios from a saved run: ``python benchmarks/ratios.py .benchmarks/latest.json``.

Times are medians, and both sides of a ratio come from the same run. "by" is the back end that auto picks or, where that is eager, the
fastest other one. Targets are information: the exit status is 0 unless the file cannot be read.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

MULTIPLY_ADDS_A_CYCLE = {"AVX512": 32, "AVX2": 16}  # float32, of one core with two vector ports
BUSY = 0.3  # load average per CPU before a run above which its times are not worth quoting


class Row(NamedTuple):
    label: str
    group: str
    against: str  # member of the group
    target: float | None
    quantity: str = "time"  # or "peak_bytes"


def _sinkhorn(size: str, pot: float, compiled: float | None, device: str = "") -> list[Row]:
    label, group = f"sinkhorn forward, {size}{device}", f"sinkhorn fwd {size}{device}"
    return [Row(label, group, "pot", pot), Row(label, group, "compile", compiled)]


def _training(preset: str, batch: int, target: float, memory: float | None = None, device: str = "") -> list[Row]:
    label, group = f"training step, {preset}, B {batch}{device}", f"train step {preset} B{batch}{device}"
    return [
        Row(label, group, "eager", target),
        Row(label, group, "naive", None),
        Row(label + ": peak memory", group, "eager", memory, "peak_bytes"),
        Row(label + ": peak memory", group, "naive", None, "peak_bytes"),
    ]


_GRADIENT = "sinkhorn fwd+bwd B1024 n36"
CPU_ROWS = [
    *_sinkhorn("B1024 n36", 50, 30),
    *_sinkhorn("B64 n128", 40, 20),
    *_sinkhorn("B8 n512", 15, 6),
    Row("sinkhorn forward + implicit backward, B1024 n36", _GRADIENT, "unrolled autograd", 40),
    Row("sinkhorn forward + implicit backward: peak memory", _GRADIENT, "unrolled autograd", 50, "peak_bytes"),
    Row("sinkhorn forward, tol 1e-4, mixed, B1024 n36", "sinkhorn tol 1e-4 B1024 n36", "pot", 60),
    Row("gromov_from_tokens, B128 n36 D128", "gromov_from_tokens B128 n36 D128", "naive", 15),
    Row("gromov_from_tokens, B128 n36 D128", "gromov_from_tokens B128 n36 D128", "compile", None),
    Row("gromov_wasserstein, entropic, B16 n36", "gromov entropic B16 n36", "pot", None),
    Row("lcd_attention forward + backward, B128", "lcd_attention fwd+bwd B128 H4 n36 d32", "eager", 5),
    Row("lcd_attention forward + backward, B128", "lcd_attention fwd+bwd B128 H4 n36 d32", "naive", 5),
    Row("lcd_attention forward + backward, bias, B128", "lcd_attention fwd+bwd B128 H4 n36 d32 bias", "eager", 5),
    Row("lcd_attention forward + backward, bias, B128", "lcd_attention fwd+bwd B128 H4 n36 d32 bias", "naive", 5),
    *_training("released", 128, 3.5),
    *_training("paper", 128, 3.5),
]
CUDA_ROWS = [
    *_sinkhorn("B8192 n36", 50, None, " cuda"),
    *_sinkhorn("B256 n256", 20, None, " cuda"),
    *_sinkhorn("B16 n1024", 5, None, " cuda"),
    Row("gromov_from_tokens, B128 cuda", "gromov_from_tokens B128 n36 D128 cuda", "eager", 100),
    Row("gromov_from_tokens, B8192 cuda", "gromov_from_tokens B8192 n36 D128 cuda", "eager", 30),
    Row("lcd_attention forward + backward, B8192 cuda", "lcd_attention fwd+bwd B8192 H4 n36 d32 cuda", "eager", 6),
    *_training("released", 128, 10, None, " cuda"),
    *_training("released", 8192, 4, 8, " cuda"),
]
HEAD = ("case", "against", "target", "measured", "met", "by; theirs / ours")
HALF = [("released", 7.0), ("paper", 7.0)]
FLOORS = [
    ("sinkhorn forward, B1024 n36", "sinkhorn fwd B1024 n36", 2.5),
    ("sinkhorn forward, B64 n128", "sinkhorn fwd B64 n128", None),
    ("sinkhorn forward, B8 n512", "sinkhorn fwd B8 n512", None),
    ("sinkhorn forward, tol 1e-4, mixed, B1024 n36", "sinkhorn tol 1e-4 B1024 n36", None),
    ("sinkhorn forward + implicit backward, B1024 n36", _GRADIENT, None),
]
# What the authors' own code took, in 2048^3 matrix products.
CALIBRATION = [
    ("training step, released: naive", "train step released B128", "naive", 1.9),
    ("training step, released: eager", "train step released B128", "eager", 1.9),
    ("transport solver with gradients on: naive", "gromov_from_tokens B128 n36 D128", "naive", 0.34),
]
DISPATCH, IMPORT, PRODUCT, CLOCK = "dispatch sinkhorn B1 n4 1 iteration", "import helo_fast after torch", "matmul 2048", "clock of a core"


class Run:
    """A saved run, by group and member."""

    def __init__(self, saved: dict):
        self.groups: dict[str, dict[str, dict]] = {}
        for entry in saved["benchmarks"]:
            self.groups.setdefault(entry["group"], {})[entry["extra_info"]["member"]] = entry
        self.reasons = {(entry["group"], entry["member"]): entry["reason"] for entry in saved["unmeasured"]}
        self.machine, self.commit = saved["machine_info"], saved["commit_info"]
        self.environment = self.machine["helo_fast"]

    def missing(self, group: str, member: str, quantity: str = "time") -> str | None:
        """Why a member has no such quantity; None where it has."""
        entry = self.groups.get(group, {}).get(member)
        if entry is None:
            return f"{member}: {self.reasons.get((group, member), 'not part of this run')}"
        if quantity == "time" or quantity in entry["extra_info"]:
            return None
        return entry["extra_info"].get("no_peak", f"{member} has no {quantity}")

    def value(self, group: str, member: str, quantity: str = "time") -> float:
        entry = self.groups[group][member]
        return entry["stats"]["median"] if quantity == "time" else entry["extra_info"][quantity]

    def fastest(self, group: str, member: str) -> float:
        return self.groups[group][member]["stats"]["min"]

    def ours(self, group: str) -> str | None:
        """The member that stands for the package."""
        entries = self.groups.get(group, {})
        own = [member for member, entry in entries.items() if entry["extra_info"].get("backend") and " " not in member]
        if not own:
            return None
        choice = entries[own[0]]["extra_info"]["auto"]
        others = [member for member in own if member != "eager"]
        if choice not in own or (choice in ("eager", "auto") and others):
            choice = min(others or own, key=lambda member: self.value(group, member))
        return choice

    def without_ours(self, group: str) -> str:
        """Why there is no back end of ours, or none but eager."""
        names = ("auto", *self.environment["backends"])
        reasons = [f"{member}: {reason}" for (g, member), reason in self.reasons.items() if g == group and member in names]
        return "; ".join(reasons) or "not part of this run"


def ratio(run: Run, row: Row) -> tuple[str, ...]:
    target = "-" if row.target is None else f"{row.target:g}x"
    head, ours = (row.label, row.against, target), run.ours(row.group)
    if ours is None or ours == row.against:
        return *head, "not measured", "-", f"eager alone serves it ({run.without_ours(row.group)})" if ours else run.without_ours(row.group)
    reason = run.missing(row.group, row.against, row.quantity) or run.missing(row.group, ours, row.quantity)
    if reason:
        return *head, "not measured", "-", reason
    theirs, own = run.value(row.group, row.against, row.quantity), run.value(row.group, ours, row.quantity)
    unit = f"{theirs / 2**20:.0f} / {own / 2**20:.0f} MiB" if row.quantity == "peak_bytes" else f"{theirs * 1e3:.3g} / {own * 1e3:.3g} ms"
    return *head, f"{theirs / own:.2f}x", _met(row.target, theirs / own), f"{ours}; {unit}"


def _met(target: float | None, measured: float, at_most: bool = False) -> str:
    if target is None:
        return "-"
    return "yes" if (measured <= target if at_most else measured >= target) else "no"


def half_precision(run: Run, preset: str, target: float | None, batch: int = 128) -> tuple[str, ...]:
    group, member = f"train step {preset} B{batch}", "auto bfloat16"
    head = (f"training step, {preset}, bfloat16 autocast, B {batch}", "eager float32", "-" if target is None else f"{target:g}x")
    reason = run.missing(group, member) or run.missing(group, "eager")
    if reason:
        return *head, "not measured", "-", reason
    theirs, own = run.value(group, "eager"), run.value(group, member)
    return *head, f"{theirs / own:.2f}x", _met(target, theirs / own), f"auto; {theirs * 1e3:.3g} / {own * 1e3:.3g} ms"


def by_batch_size(run: Run) -> list[tuple[str, ...]]:
    """Training over the batch sizes of the run; nothing where it held only the one of the other tables."""
    found = (re.fullmatch(r"train step released B(\d+)", group) for group in run.groups)
    batches = sorted(int(match[1]) for match in found if match)
    if len(batches) < 2:
        return []
    rows = []
    for preset in ("released", "paper"):
        for batch in batches:
            label, group = f"training step, {preset}, B {batch}", f"train step {preset} B{batch}"
            rows += [ratio(run, Row(label, group, against, None)) for against in ("eager", "compile")]
            rows.append(half_precision(run, preset, None, batch))
            rows += [ratio(run, Row(label + ": peak memory", group, against, None, "peak_bytes")) for against in ("eager", "compile")]
    return rows


def dispatch(run: Run) -> tuple[str, ...]:
    head, ours = ("dispatch: sinkhorn, B1 n4, 1 iteration", "torch add", "12 us more"), run.ours(DISPATCH)
    reason = run.missing(DISPATCH, "torch add") or (None if ours else run.without_ours(DISPATCH))
    if reason:
        return *head, "not measured", "-", reason
    more = 1e6 * (run.value(DISPATCH, ours) - run.value(DISPATCH, "torch add"))
    return *head, f"{more:.1f} us", _met(12, more, at_most=True), ours


def importing(run: Run) -> tuple[str, ...]:
    head = ("import helo_fast after import torch", "-", "0.15 s")
    reason = run.missing(IMPORT, "helo_fast", "import_median")
    if reason:
        return *head, "not measured", "-", reason
    seconds = run.value(IMPORT, "helo_fast", "import_median")
    return *head, f"{seconds:.3f} s", _met(0.15, seconds, at_most=True), "median of the processes"


def hertz(run: Run) -> float | None:
    """Of a core: the fastest chain of dependent additions, which others on the machine disturbed least."""
    return None if run.missing(CLOCK, "additions") else run.value(CLOCK, "additions", "cycles") / run.fastest(CLOCK, "additions")


def floors(run: Run) -> tuple[list[tuple[str, ...]], str]:
    """Rows of achieved over floor, and the assumption in words."""
    threads, capability = run.environment["threads"], run.environment["torch_cpu_capability"]
    a_cycle, clock = MULTIPLY_ADDS_A_CYCLE.get(capability), hertz(run)
    no_clock = run.missing(CLOCK, "additions") or (None if a_cycle else f"vectors of unknown width ({capability})")
    no_product = run.missing(PRODUCT, "torch")
    bounds = {
        "floor, clock": (no_clock, None if no_clock else a_cycle * clock * threads),
        "floor, matmul rate": (
            no_product,
            None if no_product else run.value(PRODUCT, "torch", "multiply_adds") / run.value(PRODUCT, "torch"),
        ),
    }
    rows = []
    for label, group, target in FLOORS:
        ours = run.ours(group)
        for name, (unknown, speed) in bounds.items():
            wanted = target if name == "floor, clock" else None
            head = (label, name, "-" if wanted is None else f"{wanted:g}x")
            reason = run.without_ours(group) if ours is None else unknown or run.missing(group, ours, "multiply_adds")
            if reason:
                rows.append((*head, "not measured", "-", reason))
                continue
            floor, own = run.value(group, ours, "multiply_adds") / speed, run.value(group, ours)
            met = _met(wanted, own / floor, at_most=True)
            rows.append((*head, f"{own / floor:.2f}x", met, f"{ours}; {floor * 1e3:.3g} / {own * 1e3:.3g} ms"))
    known = no_clock or f"{a_cycle} a cycle ({capability}, two ports) x {clock / 1e9:.2f} GHz (measured) x {threads} thread(s)"
    return rows, (
        "An iteration is K v and K' u: 2 n m multiply-adds (4 n m floating-point operations); the floor with a backward is the forward's.\n"
        f"Clock: {known}.\n"
        "Matmul rate: the multiply-adds a second of the 2048^3 product of this run."
    )


def calibration(run: Run) -> list[tuple[str, ...]]:
    rows = []
    for label, group, member, authors in CALIBRATION:
        reason = run.missing(group, member) or run.missing(PRODUCT, "torch")
        measured = "not measured" if reason else f"{run.value(group, member) / run.value(PRODUCT, 'torch'):.2f}"
        rows.append((label, "one 2048^3 matmul", f"{authors:g} (theirs)", measured, "-", reason or ""))
    return rows


def table(title: str, rows: list[tuple[str, ...]], say: Callable[[str], None]) -> None:
    widths = [max(len(row[i]) for row in (HEAD, *rows)) for i in range(5)]
    say(f"\n{title}")
    for row in (HEAD, tuple("-" * width for width in (*widths, 17)), *rows):
        say("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[5]]).rstrip())


def heading(run: Run) -> list[str]:
    """What the numbers depend on, a line each."""
    env, load = run.environment, run.environment["load_average_at_start"]
    commit = (run.commit.get("id") or "no commit")[:12] + (" with uncommitted changes" if run.commit.get("dirty") else "")
    clock = hertz(run)
    processor = run.machine.get("cpu", {}).get("brand_raw", "unknown") + (f" at {clock / 1e9:.1f} GHz" if clock else "")
    lines = [
        f"helo-fast {env['helo_fast']} ({commit}), torch {env['torch']}, POT {env['pot']}, {env['threads']} thread(s)",
        f"CPU: {processor}; {env['cpu']}. GPU: {env['gpu'] or 'none'}",
    ]
    if load is not None and load > BUSY * env["cpus"]:
        lines.append(
            f"The machine was busy before the run (load average {load:.1f} on {env['cpus']} CPUs): repeat it idle before quoting it."
        )
    return lines


def tables(run: Run) -> list[tuple[str, list[tuple[str, ...]], str]]:
    """(title, rows, note) of each."""
    speed = [row for row in CPU_ROWS if row.quantity == "time"]
    memory = [row for row in CPU_ROWS if row.quantity == "peak_bytes"]
    rows = [*(ratio(run, row) for row in speed), *(half_precision(run, *entry) for entry in HALF), dispatch(run), importing(run)]
    gpu = run.environment["gpu"]
    by_batch = by_batch_size(run)
    on_gpu = [(f"On {gpu}", [ratio(run, row) for row in CUDA_ROWS], "")] if gpu else []
    return [
        ("Speed", rows, ""),
        ("Over the floor (at most)", *floors(run)),
        ("Peak memory", [ratio(run, row) for row in memory], ""),
        *([("Training over batch sizes", by_batch, "")] if by_batch else []),
        ("Calibration", calibration(run), "" if gpu else "GPU rows: not measured, no CUDA device is visible to torch."),
        *on_gpu,
    ]


def show(run: Run, say: Callable[[str], None] = print) -> None:
    for line in heading(run):
        say(line)
    for title, rows, note in tables(run):
        table(title, rows, say)
        if note:
            say(note)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python benchmarks/ratios.py RUN.json", file=sys.stderr)
        return 2
    try:
        run = Run(json.loads(Path(arguments[0]).read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"ratios: {arguments[0]} is no run saved by `pytest benchmarks --benchmark-json=...`: {error!r}", file=sys.stderr)
        return 1
    show(run)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
