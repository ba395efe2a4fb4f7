"""The report: one file that needs nothing else, with what the run's files say."""

import base64
import io
import json
import re
import shutil

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch

from helo_fast.train import figures
from helo_fast.train.cli import main
from helo_fast.train.fold import fold_folder
from helo_fast.train.report import conditions, write_report

NAMES = ("calm <b>", "tense", "sad", "glad")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small are slower on several
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two folds, its label names and trials renamed in its files."""
    out = tmp_path_factory.mktemp("report") / "out"
    sizes = {"n_subjects": 3, "n_trials": 2, "n_windows": 3, "n_channels": 2, "dim_video": 8, "emotion_classes": 4}
    options = [*(f"--data.{name}={value}" for name, value in sizes.items()), "--model.feature_dim=16", "--epochs=2", "--jobs=1", "--quiet"]
    assert main(["train", *options, "--folds", "S01", "S03", "--out", str(out)]) == 0
    for path in out.glob("folds/*/*/predictions.csv"):
        table = pd.read_csv(path)
        for k, name in enumerate(NAMES):
            table = table.rename(columns={f"{kind}_emotion {k + 1}": f"{kind}_{name}" for kind in ("true", "predicted")})
        table["trial"] = table.subject + "/" + table.trial
        table.to_csv(path, index=False)
    write_report(out)
    return out


@pytest.fixture(scope="module")
def page(run):
    return (run / "report.html").read_text()


def test_report_is_one_file(page):
    sources = re.findall(r"(?:src|href)='([^']*)'", page)
    assert len(sources) == 6 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"<script|<link|@import|url\(", page)
    for source in sources:
        image = matplotlib.image.imread(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert min(image.shape[:2]) > 150 and image[..., :3].std() > 0.02  # something is drawn


def test_report_tells_the_scores_of_the_run(run, page):
    metrics = json.loads((run / "metrics.json").read_text())["metrics"]
    for method, scores in metrics.items():
        row = re.search(rf"<tr[^>]*><td>{method}</td>(.*?)</tr>", page).group(1)
        assert [f"{score['mean']:.4f}" for score in scores.values()] == re.findall(r">(\d+\.\d{4})", row)
    table = pd.read_csv(run / "per_subject.csv")
    for _, row in table[table.method == "HeLo"].iterrows():
        assert f"<td>{row.subject}</td><td>6</td><td>{row.chebyshev:.4f}</td>" in page


def test_report_tells_configuration_and_notes(run, page):
    assert "data_seed 0: scores say nothing about people" in page
    assert "Optimizer: lr 0." in page and "Model: n_channels 2" in page
    assert "feature_dim: 16" in page and "max_epochs: 2" in page and f"torch {torch.__version__}" in page


def test_notes_that_change_the_meaning_are_not_folded_away(run, tmp_path):
    out = tmp_path / "copy"
    out.mkdir()
    for name in ("config.yaml", "per_subject.csv", "folds"):
        (out / name).symlink_to(run / name)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["notes"] = ["S4: skipped: truncated <zip>", "S2: E4 zip used"]
    metrics["errors"] = [{"fold": "S02", "seed": 0, "error": "RuntimeError: no space"}]
    (out / "metrics.json").write_text(json.dumps(metrics))
    page = write_report(out).read_text()
    assert "<p class='note'>fold S02, seed 0 failed and is not in these numbers: RuntimeError: no space</p>" in page
    assert "<p class='note'>S4: skipped: truncated &lt;zip&gt;</p>" in page
    assert "<li>S2: E4 zip used</li>" in page and "<summary>1 more note on the data</summary>" in page


def test_samples_are_the_best_the_median_and_the_worst_window(run, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        figures, "samples", lambda rows, names, draw=figures.samples: seen.update(rows=rows, names=names) or draw(rows, names)
    )
    monkeypatch.setattr(figures, "conditions", lambda *tables, draw=figures.conditions: seen.update(tables=tables) or draw(*tables))
    write_report(run)
    table = pd.concat(pd.read_csv(fold_folder(run, 0, fold) / "predictions.csv") for fold in ("S01", "S03"))
    true, predicted = (table.filter(regex=f"^{kind}_").to_numpy() for kind in ("true", "predicted"))
    kl = np.sort(np.sum(true * np.log(true / predicted), axis=1))
    titles = [title for title, _, _ in seen["rows"]]
    assert [title.partition(":")[0] for title in titles] == ["Best window", "Median window", "Worst window"]
    for title, expected in zip(titles, kl[[0, len(kl) // 2, -1]], strict=True):
        assert f"KL {expected:.3f}" in title
    assert tuple(seen["names"]) == NAMES
    means = seen["tables"][0]  # a trial named after its subject counts by its condition
    assert list(means.index) == ["clip 01", "clip 02"]
    np.testing.assert_allclose(means.loc["clip 01"], true[table.trial.str.endswith("clip 01").to_numpy()].mean(axis=0))


def test_names_are_told_as_they_are_written(run, tmp_path, monkeypatch):
    """No name is a missing value, a number, mathematics or a tag."""
    out = shutil.copytree(run, tmp_path / "copy")
    subjects, trials = {"S01": "NA", "S03": r"<i>$\frac$"}, {"S01/clip 01": "None", "S03/clip 01": "1e3", "S03/clip 02": r"$\frac$"}
    for path in (out / "per_subject.csv", *out.glob("folds/*/*/predictions.csv")):
        table = pd.read_csv(path).replace({"subject": subjects, "trial": trials})
        table.rename(columns=lambda column: column.replace("tense", r"$\frac$")).to_csv(path, index=False)
    drawn = []
    monkeypatch.setattr(figures, "conditions", lambda *tables, draw=figures.conditions: drawn.extend(tables) or draw(*tables))
    page = write_report(out).read_text()
    assert list(drawn[0].index) == ["None", "S01/clip 02", "1e3", r"$\frac$"]
    assert "<td>NA</td>" in page and r"<td>&lt;i&gt;$\frac$</td>" in page and "<i>" not in page


@pytest.mark.parametrize(
    ("subjects", "trials", "expected"),
    [
        (["S2", "S3"], ["S2/TSST", "S3/Fun"], ["TSST", "Fun"]),
        (["1", "1", "2"], ["1", "12", "2"], ["1", "12", "2"]),  # clips: a subject's name may begin another's number
        (["1", "2"], ["1_2", "1_2"], ["1_2", "1_2"]),  # not named after their subjects
    ],
)
def test_a_trial_is_told_by_its_condition_where_all_begin_with_their_subjects(subjects, trials, expected):
    assert conditions(pd.Series(subjects), pd.Series(trials)) == expected


def test_plan_is_drawn_relative_to_the_uniform_one():
    plan = np.full((4, 4), 1 / 16)
    plan[0, 0], plan[0, 1] = 1.5 / 16, 0.5 / 16
    axes = figures.transport_plan(plan).axes[0]
    drawn = axes.images[0].get_array()
    np.testing.assert_allclose(drawn[0, :3], [1.5, 0.5, 1])
    assert axes.get_xlabel() == "behavioural token" and axes.get_ylabel() == "physiological token"


def test_learning_curves_mark_the_tested_epoch_and_average_common_epochs():
    histories = {
        "a": pd.DataFrame({"epoch": [0, 1, 2], "train_kl": [3.0, 2.0, 1.0], "validation_kl": [3.0, 1.0, 2.0]}),
        "b": pd.DataFrame({"epoch": [0, 1], "train_kl": [5.0, 4.0], "validation_kl": [1.0, 3.0]}),
    }
    left, right = figures.learning_curves(histories, {"a": 1, "b": 0}).axes
    np.testing.assert_allclose(left.lines[-1].get_ydata(), [4.0, 3.0])  # the mean, over the two epochs that both folds have
    points = [line.get_xydata().tolist() for line in right.lines if line.get_marker() == "." and len(line.get_xdata())]
    assert points == [[[2.0, 1.0]], [[1.0, 1.0]]]


def test_learning_curves_without_validation_draw_the_training_alone():
    left, right = figures.learning_curves({"a": pd.DataFrame({"epoch": [0, 1], "train_kl": [3.0, 2.0]})}, {"a": 1}).axes
    assert left.lines[1].get_ydata().tolist() == [3.0, 2.0] and np.isnan(right.lines[0].get_ydata()).all()


def test_many_trials_are_cut_and_many_labels_go_without_numbers():
    table = pd.DataFrame(np.random.default_rng(0).random((50, 20)), index=[f"clip {i}" for i in range(50)])
    axes = figures.conditions(table, table).axes[0]
    assert axes.images[0].get_array().shape == (figures.MOST_TRIALS, 20) and not axes.texts
    assert len(figures.correlations(np.eye(4), np.eye(4), NAMES).axes[0].texts) == 16
