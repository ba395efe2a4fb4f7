"""The figures of a run's report, each a function of tables and arrays that returns a matplotlib Figure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

TRUE, PREDICTED, MUTED, ACCENT = "#4c566a", "#d1701f", "#b9c0cb", "#2b6ca3"
ANNOTATED = 12  # rows and columns up to which a heat map's cells carry their number
MOST_TRIALS = 30
PLAIN = {"parse_math": False}  # for names of the data set: matplotlib would take what is between two $ for mathematics


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _tidy(axes: Axes, grid: str = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e6e8ec", linewidth=0.8)
    axes.set_axisbelow(True)


def learning_curves(histories: dict[str, pd.DataFrame], tested: dict[str, int]) -> Figure:
    """KL per epoch on training and validation rows: a thin line per fold and seed, the mean in bold.

    Args:
        histories: label of a fold and seed -> its ``history.csv``.
        tested: the same labels -> the epoch whose weights were tested.
    """
    # A run may have been told to validate seldom or never: what is missing is not drawn.
    histories = {label: history.reindex(columns=["epoch", "train_kl", "validation_kl"]) for label, history in histories.items()}
    figure = _figure(10, 3.6)
    left, right = figure.subplots(1, 2, sharex=True)
    for axes, column, title in (
        (left, "train_kl", "Training (with dropout)"),
        (right, "validation_kl", "Validation"),
    ):
        for label, history in histories.items():
            axes.plot(history.epoch + 1, history[column], color=MUTED, linewidth=0.9)
            chosen = history[history.epoch == tested[label]]
            if axes is right:
                axes.plot(chosen.epoch + 1, chosen[column], ".", color=ACCENT, markersize=7)
        # Only epochs that every fold reached: beyond them the mean is over the folds that went on longest.
        common = min(len(history) for history in histories.values())
        mean = np.mean([history[column].to_numpy()[:common] for history in histories.values()], axis=0)
        axes.plot(np.arange(1, common + 1), mean, color=PREDICTED, linewidth=2.2)
        axes.set(title=title, xlabel="epoch", ylabel="KL per window (nats)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _tidy(axes)
    right.plot([], [], color=MUTED, label="one fold")
    right.plot([], [], color=PREDICTED, linewidth=2.2, label="mean of all folds")
    right.plot([], [], ".", color=ACCENT, markersize=7, label="weights that were tested")
    right.legend(frameon=False, fontsize=8)
    return figure


def samples(rows: Sequence[tuple[str, np.ndarray, np.ndarray]], names: Sequence[str]) -> Figure:
    """True and predicted distribution of a few windows, given as (title, true [K], predicted [K])."""
    figure = _figure(3.6 * len(rows), 3.6)
    every = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    position = np.arange(len(names))
    for axes, (title, true, predicted) in zip(every, rows, strict=True):
        axes.bar(position - 0.2, true, 0.4, color=TRUE, label="true")
        axes.bar(position + 0.2, predicted, 0.4, color=PREDICTED, label="predicted")
        axes.set_xticks(position, names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8, **PLAIN)
        axes.set_title(title, fontsize=9, **PLAIN)
        _tidy(axes)
    every[0].set_ylabel("share")
    every[-1].legend(frameon=False, fontsize=8)
    return figure


def conditions(true: pd.DataFrame, predicted: pd.DataFrame) -> Figure:
    """Mean distributions by trial name (condition, clip): true beside predicted, trials x labels."""
    true, predicted = true.iloc[:MOST_TRIALS], predicted.iloc[:MOST_TRIALS]
    figure = _figure(10, 1.6 + 0.32 * len(true))
    top = max(true.to_numpy().max(), predicted.to_numpy().max())
    panels = figure.subplots(1, 2, sharey=True)
    for axes, table, title in zip(panels, (true, predicted), ("True", "Predicted"), strict=True):
        image = _heatmap(axes, table.to_numpy(), list(table.columns), list(table.index), vmin=0, vmax=top, cmap="Blues")
        axes.set_title(f"{title}: mean over windows", fontsize=10)
    figure.colorbar(image, ax=panels, label="share", shrink=0.9)
    return figure


def correlations(learned: np.ndarray, data: np.ndarray, names: Sequence[str]) -> Figure:
    """Label correlation that the model learned beside that of the training labels, both [K, K], on one scale."""
    figure = _figure(10, 4.6)
    low, high = min(learned.min(), data.min()), max(learned.max(), data.max())
    panels = figure.subplots(1, 2, sharey=True)
    for axes, value, title in zip(panels, (learned, data), ("Learned", "Labels"), strict=True):
        image = _heatmap(axes, value, names, names, vmin=low, vmax=high, cmap="viridis")
        axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=panels, label="similarity of two labels", shrink=0.9)
    return figure


def transport_plan(plan: np.ndarray) -> Figure:
    """Mean plan [2C, 2C] relative to the uniform one: 1 where mass goes as if tokens did not matter."""
    figure = _figure(5.8, 4.8)
    axes = figure.subplots()
    relative = plan * plan.size / plan.sum()
    reach = max(np.abs(relative - 1).max(), 1e-6)
    image = axes.imshow(relative, cmap="RdBu_r", vmin=1 - reach, vmax=1 + reach, interpolation="nearest")
    half = len(plan) / 2
    axes.axhline(half - 0.5, color="black", linewidth=0.8)
    axes.set_yticks([half / 2 - 0.5, 1.5 * half - 0.5], ["eeg place\nattending to gsr", "eeg place\nattending to ppg"])
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel="behavioural token", ylabel="physiological token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Transported mass, relative to a uniform plan", fontsize=10)
    figure.colorbar(image, ax=axes, label="1: uniform", shrink=0.9)
    return figure


def subjects(table: pd.DataFrame, model: str) -> Figure:
    """KL of every subject: the model and each baseline, a row of dots per subject, sorted by the model's KL.

    Args:
        table: ``per_subject.csv``: subject, method, kl.
        model: the method that is the model.
    """
    wide = table.pivot(index="subject", columns="method", values="kl").sort_values(model, ascending=False)
    figure = _figure(10, 1.4 + 0.27 * len(wide))
    axes = figure.subplots()
    position = np.arange(len(wide))
    markers = iter("sD^vP*X<>")
    for method in wide.columns.drop(model):
        axes.plot(wide[method], position, next(markers, "o"), color=MUTED, markersize=5, markeredgecolor="#7d8694", label=method)
    axes.plot(wide[model], position, "o", color=PREDICTED, markersize=8, label=model)
    axes.set_yticks(position, wide.index, **PLAIN)
    axes.set_ylim(-0.7, len(wide) - 0.3)
    axes.set(xlabel="KL (nats), lower is better", ylabel="subject")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _tidy(axes, "both")
    return figure


def _heatmap(axes: Axes, value: np.ndarray, columns: Sequence[str], rows: Sequence[str], **options) -> object:
    image = axes.imshow(value, aspect="auto", interpolation="nearest", **options)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor", fontsize=8, **PLAIN)
    axes.set_yticks(range(len(rows)), rows, fontsize=8, **PLAIN)
    if max(value.shape) <= ANNOTATED:
        for (i, j), number in np.ndenumerate(value):
            red, green, blue, _ = image.cmap(image.norm(number))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            axes.text(j, i, f"{number:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    return image
