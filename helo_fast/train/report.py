"""A run's ``report.html``: one file with everything in it, made from the run's folder and nothing else."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from helo_fast.train import figures
from helo_fast.train.files import read_json, write_text
from helo_fast.train.metrics import FUNCTIONS, emotion_metrics

MODEL = "HeLo"
TITLES = {name: "KL" if name == "kl" else name.capitalize() for name in FUNCTIONS}
HIGHER_IS_BETTER = {name for name, metric in emotion_metrics().items() if metric.higher_is_better}
DPI = 130

# Notes with these words change what the numbers mean, or which subjects they are of: they are not folded away.
WEIGHTY = ("warning", "leak", "transductive", "skipped", "absent", "validation", "synthetic")

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #22262e; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin-bottom: 0; }}  h2 {{ font-size: 1.15rem; margin-top: 2.2rem; }}
p.lead, figcaption {{ color: #5a6270; }}  figcaption {{ font-size: 0.9rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
.wide {{ overflow-x: auto; }}
th, td {{ padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid #e6e8ec; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
tr.model td {{ font-weight: 600; background: #fdf3ea; }}  td.best {{ color: #b3540c; }}
td small {{ color: #7d8694; font-weight: 400; }}
figure {{ margin: 1rem 0; }}  img {{ max-width: 100%; }}
pre {{ background: #f5f6f8; padding: 0.8rem; overflow-x: auto; font-size: 0.85rem; }}
.note {{ border-left: 4px solid #d1701f; background: #fdf6ef; padding: 0.3rem 0.9rem; margin: 0.4rem 0; }}
</style></head><body>
{body}
</body></html>
"""


def count(number: int, what: str) -> str:
    """``1 fold``, ``2 folds``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def format_score(value: dict[str, float | None]) -> str:
    """``mean +- sd`` with four digits, the mean alone where there is one value only."""
    return f"{value['mean']:.4f}" + ("" if value["sd"] is None else f" +- {value['sd']:.4f}")


def conditions(subjects: pd.Series, trials: pd.Series) -> list[str]:
    """The trial names, or the conditions where a data set names every trial "subject/condition"."""
    pairs = list(zip(subjects, trials, strict=True))
    for separator in "/-_ ":
        if all(trial.startswith(subject + separator) for subject, trial in pairs):
            return [trial.removeprefix(subject + separator) for subject, trial in pairs]
    return list(trials)


def write_report(out: Path) -> Path:
    """Writes ``report.html`` of the run in ``out`` and returns its path.

    Args:
        out: Folder with ``metrics.json``, ``per_subject.csv``, ``config.yaml`` and the folders of finished folds.
    """
    metrics = read_json(out / "metrics.json")
    table = _table(out / "per_subject.csv")
    results = {path.parent: read_json(path) for path in out.glob("folds/*/*/metrics.json")}
    order = metrics["folds"].index
    results = dict(sorted(results.items(), key=lambda item: (item[1]["seed"], order(item[1]["fold"]))))
    title = f"HeLo ({metrics['preset']}) on {metrics['data']}"
    body = [
        f"<h1>{_text(title)}</h1>",
        f"<p class='lead'>{count(len(metrics['folds']), 'fold')} ({_text(metrics['protocol'])}), "
        f"{count(len(metrics['seeds']), 'seed')}, {metrics['windows']} test windows, normalisation: {_text(metrics['normalise'])}</p>",
        *_notes(metrics),
        "<h2>Scores</h2>",
        _scores(metrics),
        *_subjects(table),
        *_curves(results),
        *_distributions(results),
        *_interior(results),
        *_configuration(out, metrics),
    ]
    path = out / "report.html"
    write_text(path, _PAGE.format(title=_text(title), body="\n".join(body)))
    return path


def _table(path: Path) -> pd.DataFrame:
    """A table of the run with its names as they were written: "007" is no number, and "NA" is not missing."""
    return pd.read_csv(path, dtype={"subject": str, "trial": str}, keep_default_na=False, na_values="")


def _text(value: object) -> str:
    return html.escape(str(value))


def _image(figure: Figure, alt: str, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    data = base64.b64encode(buffer.getvalue()).decode()
    width = round(figure.get_figwidth() * 96)  # the same size of type in every figure
    image = f"<img alt='{_text(alt)}' width='{width}' src='data:image/png;base64,{data}'>"
    return f"<figure>{image}<figcaption>{_text(caption)}</figcaption></figure>"


def _notes(metrics: dict[str, Any]) -> list[str]:
    failed = [f"fold {e['fold']}, seed {e['seed']} failed and is not in these numbers: {e['error']}" for e in metrics["errors"]]
    weighty = [note for note in metrics["notes"] if any(word in note for word in WEIGHTY)]
    rest = [note for note in metrics["notes"] if note not in weighty]
    lines = [f"<p class='note'>{_text(note)}</p>" for note in (*failed, *weighty)]
    if rest:
        items = "".join(f"<li>{_text(note)}</li>" for note in rest)
        lines.append(f"<details><summary>{count(len(rest), 'more note')} on the data</summary><ul>{items}</ul></details>")
    return lines


def _header(*first: str) -> str:
    names = (f"{TITLES[name]} {'&uarr;' if name in HIGHER_IS_BETTER else '&darr;'}" for name in FUNCTIONS)
    return "<tr>" + "".join(f"<th>{cell}</th>" for cell in (*first, *names)) + "</tr>"


def _scores(metrics: dict[str, Any]) -> str:
    methods = metrics["metrics"]
    rivals = [method for method in methods if method != "best possible"]
    best = {
        name: (max if name in HIGHER_IS_BETTER else min)(rivals, key=lambda method, name=name: methods[method][name]["mean"])
        for name in FUNCTIONS
    }
    rows = [_header("")]
    for method, values in methods.items():
        cells = [f"<td>{_text(method)}</td>"]
        for name in FUNCTIONS:
            value = values[name]
            spread = "" if value["sd"] is None else f" <small>&plusmn; {value['sd']:.3f}</small>"
            cells.append(f"<td{' class=best' if best[name] == method else ''}>{value['mean']:.4f}{spread}</td>")
        rows.append(f"<tr{' class=model' if method == MODEL else ''}>{''.join(cells)}</tr>")
    over = "folds and seeds" if len(metrics["seeds"]) > 1 else "folds"
    seeds = methods[MODEL]["kl"]["sd_over_seeds"]
    spread = "" if seeds is None else f" Over the seeds alone, the KL of {MODEL} has a standard deviation of {seeds:.4f}."
    return (
        f"<div class='wide'><table>{''.join(rows)}</table></div><p class='lead'>Mean &plusmn; standard deviation over {over}. "
        f"Arrows point to better; the best of each column is in colour. Baselines are fitted to all rows of the fold but the test rows: "
        f"those for training and, as they need none to stop by, those for validation.{spread}</p>"
    )


def _subjects(table: pd.DataFrame) -> list[str]:
    own = table[table.method == MODEL]
    rows = [_header("subject", "windows")]
    for _, row in own.iterrows():
        numbers = "".join(f"<td>{row[name]:.4f}</td>" for name in FUNCTIONS)
        rows.append(f"<tr><td>{_text(row.subject)}</td><td>{row.windows}</td>{numbers}</tr>")
    caption = f"{MODEL} beside the baselines on the same fold; mean over the seeds."
    return [
        "<h2>Subjects</h2>",
        _image(figures.subjects(table, MODEL), "KL of each subject", caption),
        f"<div class='wide'><table>{''.join(rows)}</table></div>",
    ]


def _curves(results: dict[Path, dict[str, Any]]) -> list[str]:
    histories = {str(folder): pd.read_csv(folder / "history.csv") for folder in results}
    tested = {str(folder): result["tested"]["epoch"] for folder, result in results.items()}
    weights = " and ".join(sorted({result["tested"]["weights"] for result in results.values()}))
    caption = f"Kullback-Leibler divergence per window. The weights that were tested: {weights}."
    return ["<h2>Learning curves</h2>", _image(figures.learning_curves(histories, tested), "Learning curves", caption)]


def _distributions(results: dict[Path, dict[str, Any]]) -> list[str]:
    first_seed = min(result["seed"] for result in results.values())
    files = [folder / "predictions.csv" for folder, result in results.items() if result["seed"] == first_seed]
    table = pd.concat([_table(file) for file in files], ignore_index=True)
    true, predicted = (
        table.filter(regex=f"^{kind}_").rename(columns=lambda column, kind=kind: column.removeprefix(f"{kind}_"))
        for kind in ("true", "predicted")
    )
    kl = FUNCTIONS["kl"](torch.from_numpy(true.to_numpy()), torch.from_numpy(predicted.to_numpy())).numpy()
    condition = conditions(table.subject, table.trial)
    order = np.argsort(kl, kind="stable")
    chosen = {"Best": order[0], "Median": order[len(order) // 2], "Worst": order[-1]}
    rows = [
        (f"{name} window: KL {kl[i]:.3f}\nsubject {table.subject[i]}, {condition[i]}", true.loc[i].to_numpy(), predicted.loc[i].to_numpy())
        for name, i in chosen.items()
    ]
    by_trial = [value.groupby(pd.Series(condition, name=None), sort=False).mean() for value in (true, predicted)]
    more = len(by_trial[0]) - figures.MOST_TRIALS
    cut = f" The first {figures.MOST_TRIALS} trial names; {more} more are in predictions.csv." if more > 0 else ""
    return [
        "<h2>True and predicted distributions</h2>",
        _image(
            figures.samples(rows, list(true.columns)),
            "True and predicted distributions of three windows",
            f"Of all {len(table)} test windows (seed {first_seed}), those with the smallest, the median and the largest KL.",
        ),
        _image(
            figures.conditions(*by_trial),
            "Mean distributions by trial",
            f"Means over all test windows of the same trial name, over all subjects (seed {first_seed}).{cut}",
        ),
    ]


def _interior(results: dict[Path, dict[str, Any]]) -> list[str]:
    folder, result = next(iter(results.items()))
    with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
        arrays = dict(arrays)
    names = [c.removeprefix("true_") for c in pd.read_csv(folder / "predictions.csv", nrows=0).columns if c.startswith("true_")]
    where = f"fold {result['fold']}, seed {result['seed']}"
    return [
        "<h2>Inside the model</h2>",
        _image(
            figures.transport_plan(arrays["plan"]),
            "Transport plan",
            f"Optimal transport from physiological to behavioural tokens, mean over the test windows of {where} "
            "(tokens of separately trained folds do not correspond, so folds are not averaged).",
        ),
        _image(
            figures.correlations(arrays["learned_correlation"], arrays["data_correlation"], names),
            "Label correlations",
            f"Similarity of the learned label embeddings beside that of the labels; {where}.",
        ),
    ]


def _configuration(out: Path, metrics: dict[str, Any]) -> list[str]:
    backends = metrics["backends"]
    chosen = [f"{op}: {', '.join(f'{name} on {device}' for device, name in by.items())}" for op, by in backends["auto"].items()]
    paragraphs = (
        ", ".join(f"{name} {version}" for name, version in metrics["versions"].items()),
        f"Back end asked for: {backends['requested']}; auto takes {'; '.join(chosen)}. {backends['cpu']}.",
        *(f"{part.capitalize()}: " + ", ".join(f"{k} {v}" for k, v in metrics[part].items()) for part in ("model", "optimizer")),
    )
    config = (out / "config.yaml").read_text(encoding="utf-8")
    return ["<h2>Configuration</h2>", *(f"<p>{_text(text)}</p>" for text in paragraphs), f"<pre>{_text(config)}</pre>"]
