"""The tables of a GPU run, and how the rows of its test runs are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

FAILURES = 50  # of tests, kept with their whole messages
# (case, against) -> how many times faster; of a training step (batch, mode) -> how many times faster than the eager step run plainly
TARGETS = {
    ("sinkhorn B8192 n36", "pot"): 50,
    ("sinkhorn B256 n256", "pot"): 20,
    ("sinkhorn B16 n1024", "pot"): 5,
    ("gromov_from_tokens B128 n36 D128", "eager"): 100,
    ("gromov_from_tokens B8192 n36 D128", "eager"): 30,
    ("lcd_attention B8192 H4 n36 d32", "eager"): 6,
    ("lcd_attention B8192 H4 n36 d32", "flex"): 1.5,
}
FLOOR_TARGETS = {"sinkhorn B8192 n36": 3}
STEP_TARGETS = {(128, "plain"): 10, (8192, "plain"): 4, (128, "graph"): 20}
MEMORY_TARGETS = {8192: 8}
BATCH_TARGET = 8
LAUNCHES_TARGET = 60  # of a step with its optimiser's
WHO = ("case", "op", "backend", "batch", "member", "mode", "dtype")  # what a row is about
COUNTS = ("kernels", "launches", "kernels_with_adam", "launches_with_adam")
OWN = ("triton", "cuda", "cpp", "triton first", "cuda first", "cpp first")
_MISS = "-"


def condense(rows: list[dict]) -> list[dict]:
    """The rows, with those of tests counted into one: how many passed, what failed, why tests were skipped."""
    tests = [row for row in rows if "test" in row]
    rest = [row for row in rows if "test" not in row]
    if not tests:
        return rest
    failed = [row for row in tests if row["outcome"] == "failed"]
    skipped = Counter(row["reason"] for row in tests if row["outcome"] == "skipped")
    counts = Counter(row["outcome"] for row in tests)
    kept = [{"test": row["test"], "line": message(row["reason"])} for row in failed]
    for short, row in zip(kept[:FAILURES], failed):
        short["reason"] = row["reason"]
    return [*rest, {"tests": dict(counts), "failures": kept, "skipped": dict(skipped.most_common())}]


def message(reason: str) -> str:
    """A failed test's error and where it was raised, in a line, from pytest's long report of it."""
    lines = [line for line in reason.splitlines() if line.strip()] or ["no reason is given"]
    marked = [line.startswith("E  ") for line in lines]
    # of an error of several lines the first; of a chain of errors the last
    begins = [i for i, mark in enumerate(marked) if mark and not (i and marked[i - 1])]
    error = f"{lines[begins[-1]][1:].strip()} ({lines[-1].strip()})" if begins else lines[-1].strip()
    return error[:300]


def failed_tests(rows: list[dict]) -> list[str]:
    """A line for each of the first; the results have all."""
    lines = [f"{failure['test']}: {failure['line']}" for row in rows for failure in row.get("failures", [])]
    more = [f"and {len(lines) - FAILURES} more failures"] if len(lines) > FAILURES else []
    return lines[:FAILURES] + more


def line(part: dict) -> str:
    """A part in a line."""
    text = f"{part['status']}, {part['seconds']:.0f} s"
    counts = next((row["tests"] for row in part["rows"] if "tests" in row), None)
    if counts:
        text += " (" + ", ".join(f"{number} {outcome}" for outcome, number in counts.items()) + ")"
    return text + (f": {part['reason']}" if "reason" in part else "")


def align(rows: Iterable[Iterable[object]]) -> list[str]:
    """Cells in columns."""
    text = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in text]


def tables(result: dict) -> list[str]:
    """All that a run measured, to be read."""
    parts = result["parts"]
    rows = {name: part["rows"] for name, part in parts.items()}
    facts = next(iter(rows.get("environment", [])), {})
    lines = [
        "",
        f"{facts.get('gpu') or result['device']}, commit {result['commit']}, torch {facts.get('torch')}, Triton {facts.get('triton')}",
    ]
    lines += ["", *align([("part", "result"), *((name, line(part)) for name, part in parts.items())])]
    for name in ("tests", "suite"):
        lines += failed_tests(rows.get(name, []))
    for title, made in (
        ("Operators", operators(rows.get("ops", []))),
        ("Training step, released preset", steps(rows.get("steps", []))),
        ("Largest batch that trains", batches(rows.get("batch", []))),
    ):
        if len(made) > 1:
            lines += ["", title, *align(made)]
    measured = ("ops", "steps", "batch")
    reasons = [(name, row) for name in rows for row in rows[name] if row.get("reason") and (name in measured or row.get("failed"))]
    lines += [""] * bool(reasons) + [f"{_who(name, row)}: {row['reason']}" for name, row in reasons]
    return lines


def operators(rows: list[dict]) -> list[tuple]:
    """Each member of each case; how many times faster the package's are than the others, with the target where there is one."""
    table = [("case", "member", "ms", "over floor", "peak MiB", "times faster than")]
    found = {(row["case"], row["member"]): row for row in rows if "median_ms" in row}
    for (case, member), row in found.items():
        floor = f"{row['over_floor']:.2f}"
        if member in OWN and case in FLOOR_TARGETS:
            floor += f" (at most {FLOOR_TARGETS[case]})"
        faster = []
        if member in OWN:
            for (other_case, other), theirs in found.items():
                if other_case == case and other not in OWN:
                    faster.append(f"{other} {_times(theirs['median_ms'] / row['median_ms'], TARGETS.get((case, other)))}")
        table.append((case, member, f"{row['median_ms']:.4g}", floor, _mebibytes(row), ", ".join(faster)))
    return table


def steps(rows: list[dict]) -> list[tuple]:
    """Each batch size, member and way of running; against eager run plainly in float32. "+ Adam": with the optimiser's step."""
    heads = ("B", "member", "mode", "dtype", "ms", "kernels", "launches", "kernels + Adam", "launches + Adam", "synchronises", "peak MiB")
    table = [(*heads, "times faster than eager", "less memory")]
    found = {(row["batch"], row["member"], row["mode"], row["dtype"]): row for row in rows if "median_ms" in row}
    for (batch, member, mode, dtype), row in found.items():
        eager, faster, less = found.get((batch, "eager", "plain", "float32")), _MISS, _MISS
        targeted = dtype == "float32"
        if eager and member in OWN:
            faster = _times(eager["median_ms"] / row["median_ms"], STEP_TARGETS.get((batch, mode)) if targeted else None)
            if row["peak_bytes"] and eager["peak_bytes"]:
                less = _times(eager["peak_bytes"] / row["peak_bytes"], MEMORY_TARGETS.get(batch) if targeted and mode == "plain" else None)
        counts = [_MISS if row.get(name) is None else f"{row[name]:g}" for name in COUNTS]
        if member in OWN and counts[-1] != _MISS:
            counts[-1] += f" (at most {LAUNCHES_TARGET})"
        waits = {True: "yes", False: "no"}.get(row.get("synchronises"), _MISS)
        table.append((batch, member, mode, dtype, f"{row['median_ms']:.4g}", *counts, waits, _mebibytes(row), faster, less))
    return table


def batches(rows: list[dict]) -> list[tuple]:
    table = [("member", "largest", "too large", "times eager's")]
    found = {row["member"]: row for row in rows if "largest" in row}
    eager = found.get("eager", {}).get("largest")
    for member, row in found.items():
        times = _times(row["largest"] / eager, BATCH_TARGET) if eager and member in OWN else _MISS
        table.append((member, row["largest"], row["too_large"] or row["stopped"], times))
    return table


def _times(measured: float, target: float | None) -> str:
    return f"{measured:.2f}x" + ("" if target is None else f" (target {target:g}x)")


def _mebibytes(row: dict) -> str:
    return _MISS if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"


def _who(part: str, row: dict) -> str:
    return " ".join([part, *(str(row[name]) for name in WHO if name in row)])
