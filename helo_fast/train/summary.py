"""What a run comes to: ``metrics.json``, ``per_subject.csv``, the table on the terminal, and the report's input."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helo_fast import _registry
from helo_fast.train.data.base import EmotionDataModule
from helo_fast.train.files import replacing, write_json
from helo_fast.train.metrics import FUNCTIONS
from helo_fast.train.options import HeLoCLI
from helo_fast.train.report import HIGHER_IS_BETTER, MODEL, TITLES, count, format_score, write_report
from helo_fast.train.workers import Task

BEST_POSSIBLE = "best possible"
PACKAGES = ("helo-fast", "torch", "lightning", "torchmetrics", "numpy", "scikit-learn")


def summarise(out: Path, cli: HeLoCLI, data: EmotionDataModule, results: list[dict[str, Any]], errors: dict[Task, str]) -> None:
    """Writes the run's ``metrics.json``, ``per_subject.csv`` and ``report.html`` from the results of its folds.

    Args:
        out: Folder of the run.
        cli: Its configuration.
        data: Its data.
        results: ``metrics.json`` of every finished fold.
        errors: Folds that failed.
    """
    scores = score_table(results)
    hparams = dict(cli.make_module(data).hparams)
    with replacing(out / "per_subject.csv") as temporary:
        per_subject(scores).to_csv(temporary, index=False)
    write_json(
        out / "metrics.json",
        {
            "complete": not errors,
            "data": cli.data_name,
            "preset": cli.config.preset,
            "protocol": data.protocol,
            "normalise": data.normalise,
            "folds": list(dict.fromkeys(result["fold"] for result in results)),
            "seeds": list(dict.fromkeys(result["seed"] for result in results)),
            "windows": int(scores.drop_duplicates("fold").windows.sum()),  # every seed and method is tested on the same
            "metrics": {method: aggregate(scores[scores.method == method]) for method in dict.fromkeys(scores.method)},
            "notes": merge_notes(results),
            "errors": [{"fold": fold, "seed": seed, "error": error} for (seed, fold), error in errors.items()],
            "model": hparams.pop("config"),
            "optimizer": hparams,
            "versions": versions(),
            "backends": backends(),
        },
    )
    write_report(out)


def merge_notes(results: list[dict[str, Any]]) -> list[str]:
    """The notes of all folds, each once and in order; what several folds say of themselves is one note that counts them."""
    folds: dict[tuple[bool, str], set[str]] = {}  # (of the fold itself, text) -> the folds that say it
    for result in results:
        for note in result["notes"]:
            text = note.removeprefix(f"fold {result['fold']}: ")
            folds.setdefault((text != note, text), set()).add(result["fold"])
    return [
        text if not own else f"{f'fold {min(of)}' if len(of) == 1 else f'{len(of)} folds'}: {text}" for (own, text), of in folds.items()
    ]


def score_table(results: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per fold, seed and method: fold, seed, method, windows, and the six metrics."""
    rows = []
    for result in results:
        methods = {MODEL: result["model"], **result["baselines"]}
        if "best_possible" in result:
            methods[BEST_POSSIBLE] = result["best_possible"]
        for method, scores in methods.items():
            known = {"fold": result["fold"], "seed": result["seed"], "method": method, "windows": result["rows"]["test"]}
            rows.append(known | scores)
    return pd.DataFrame(rows)


def aggregate(scores: pd.DataFrame) -> dict[str, dict[str, float | None]]:
    """Per metric: mean and standard deviation over folds and seeds, of the seeds' means, and the mean over windows.

    Standard deviations are those of a sample (n - 1), and None for a sample of one.
    """
    out = {}
    for name in FUNCTIONS:
        values, over_seeds = scores[name], scores.groupby("seed")[name].mean()
        out[name] = {
            "mean": float(values.mean()),
            "sd": float(values.std()) if len(values) > 1 else None,
            "sd_over_seeds": float(over_seeds.std()) if len(over_seeds) > 1 else None,
            "mean_over_windows": float(np.average(values, weights=scores.windows)),
        }
    return out


def per_subject(scores: pd.DataFrame) -> pd.DataFrame:
    """One row per subject and method: means over the seeds, and the standard deviation of KL over them."""
    groups = scores.groupby(["fold", "method"], sort=False)
    columns = {"windows": ("windows", "first"), "seeds": ("seed", "count")}
    columns |= {name: (name, "mean") for name in FUNCTIONS} | {"kl_sd": ("kl", "std")}
    return groups.agg(**columns).reset_index().rename(columns={"fold": "subject"})


def metrics_table(metrics: dict[str, Any]) -> str:
    """The table of ``metrics.json`` for a terminal: mean and standard deviation over folds and seeds."""
    header = ["", *(f"{TITLES[name]} {'^' if name in HIGHER_IS_BETTER else 'v'}" for name in FUNCTIONS)]
    lines = [header]
    for method, values in metrics["metrics"].items():
        lines.append([method, *(format_score(values[name]) for name in FUNCTIONS)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
    runs = f"{count(len(metrics['folds']), 'fold')} x {count(len(metrics['seeds']), 'seed')}, {metrics['protocol']}"
    return f"{text}\nmean +- standard deviation over {runs}; v: lower is better, ^: higher is better"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    out = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree that was not installed
            out[package] = _registry.describe()["version"] if package == "helo-fast" else "not installed"
    return out


def backends() -> dict[str, Any]:
    """The back end asked for, what it means for each operator, and the machine."""
    facts = _registry.describe()
    return {"requested": _registry.requested(None), **{key: facts[key] for key in ("backends", "auto", "cpu", "gpu")}}
