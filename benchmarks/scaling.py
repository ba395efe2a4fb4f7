"""The plots of sinkhorn's time against batch size, problem size and threads, from a saved run's rows marked large."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, GUIDE = "#808080", "#a0a0a0"  # readable on light and on dark pages
COLOURS = ("#2b7bba", "#d1701f", "#3c9d5d", "#a05ab5")
# Text stays text; no date and fixed ids, so that the same numbers give the same file.
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "helo-fast",
    "font.size": 9,
    "font.family": "sans-serif",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
BATCH_N = 36  # the size at which the batch varies; elsewhere B n^2 is constant


class Point(NamedTuple):
    batch: int
    n: int
    threads: int
    seconds: float


def points(saved: dict) -> list[Point]:
    """In order of batch, n and threads."""
    rows = [entry for entry in saved["benchmarks"] if entry["group"].startswith("sinkhorn scaling")]
    found = [Point(*(row["extra_info"][k] for k in ("batch", "n", "threads")), row["stats"]["median"]) for row in rows]
    return sorted(found)


def slope(x: list[float], y: list[float]) -> float:
    """The exponent p of y ~ x^p, least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def sentences(found: list[Point]) -> list[str]:
    """The exponents, and what the second thread brings, in words: of the upper half of each range, where overheads are past."""
    lines = []
    for threads in sorted({p.threads for p in found}):
        batches, sizes = _against_batch(found, threads), _against_n(found, threads)
        texts = []
        for name, series, top in (("B", batches, "time"), ("n", sizes, "time of a problem")):
            upper = series[len(series) // 2 :]
            if len(upper) > 1:
                exponent = slope([x for x, _ in upper], [y for _, y in upper])
                texts.append(f"{top} ~ {name}^{exponent:.2f} ({name} {upper[0][0]:,} to {upper[-1][0]:,})")
        if texts:
            lines.append(f"{threads} thread{'s' if threads > 1 else ''}: {'; '.join(texts)}.")
    for threads, series in _speedups(found).items():
        batch, gain = series[-1]
        lines.append(f"{threads} threads over one: {gain:.2f}x at B {batch:,}, n {BATCH_N}.")
    return lines


def _against_batch(found: list[Point], threads: int) -> list[tuple[int, float]]:
    return [(p.batch, p.seconds) for p in found if p.n == BATCH_N and p.threads == threads]


def _against_n(found: list[Point], threads: int) -> list[tuple[int, float]]:
    """Seconds a problem."""
    return sorted((p.n, p.seconds / p.batch) for p in found if p.n != BATCH_N and p.threads == threads)


def _speedups(found: list[Point]) -> dict[int, list[tuple[int, float]]]:
    """threads -> (batch, time on one thread over time on those), n fixed."""
    alone = dict(_against_batch(found, 1))
    many = sorted({p.threads for p in found} - {1})
    series = {t: [(batch, alone[batch] / seconds) for batch, seconds in _against_batch(found, t) if batch in alone] for t in many}
    return {t: pairs for t, pairs in series.items() if pairs}


def write(found: list[Point], folder: Path) -> list[Path]:
    """scaling_batch.svg, scaling_size.svg and scaling_threads.svg."""
    threads = sorted({p.threads for p in found})
    with rc_context(STYLE):
        figures = {
            "batch": _powers(
                {t: [(x, 1e3 * y) for x, y in _against_batch(found, t)] for t in threads},
                1,
                f"batch size B (n = m = {BATCH_N})",
                "time (ms)",
            ),
            "size": _powers(
                {t: [(x, 1e6 * y) for x, y in _against_n(found, t)] for t in threads},
                2,
                "problem size n = m (B n² = 2²⁰)",
                "time of a problem (µs)",
            ),
            "threads": _gains(_speedups(found)),
        }
        paths = []
        for name, figure in figures.items():
            paths.append(folder / f"scaling_{name}.svg")
            figure.savefig(paths[-1], transparent=True, metadata={"Date": None, "Creator": None})
    return paths


def _figure(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GUIDE, linewidth=0.4, alpha=0.4)
    return figure, axes


def _powers(series: dict[int, list[tuple[int, float]]], power: int, xlabel: str, ylabel: str) -> Figure:
    """A line per number of threads, and the line of slope ``power`` through the first one's last point."""
    figure, axes = _figure(xlabel, ylabel)
    axes.set_yscale("log")
    for colour, (threads, pairs) in zip(COLOURS, series.items()):
        axes.plot(*zip(*pairs), "o-", color=colour, markersize=3, linewidth=1.2, label=f"{threads} thread{'s' if threads > 1 else ''}")
    x, y = zip(*next(iter(series.values())))
    guide = [y[-1] * (value / x[-1]) ** power for value in x]
    axes.plot(x, guide, "--", color=GUIDE, linewidth=1, label="linear" if power == 1 else "quadratic", zorder=0)
    axes.set_ylim(bottom=0.6 * min(min(values) for values in ([v for _, v in pairs] for pairs in series.values())))
    axes.legend(frameon=False)
    return figure


def _gains(series: dict[int, list[tuple[int, float]]]) -> Figure:
    figure, axes = _figure(f"batch size B (n = m = {BATCH_N})", "speed-up over one thread")
    for colour, (threads, pairs) in zip(COLOURS[1:], series.items()):
        axes.plot(*zip(*pairs), "o-", color=colour, markersize=3, linewidth=1.2, label=f"{threads} threads")
        axes.axhline(threads, linestyle="--", color=GUIDE, linewidth=1, zorder=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure
