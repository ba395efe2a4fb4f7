"""A training run on tiny synthetic data: what it sums up, and that an interrupted run goes on exactly."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from filelock import FileLock
from small_run import TINY, independent_kl, numbers, read, train

from helo_fast.train import summary
from helo_fast.train.callbacks import History
from helo_fast.train.cli import main
from helo_fast.train.fold import PARTS, fold_folder
from helo_fast.train.module import HeLoModule


def test_run_sums_up_folds_and_seeds(finished):
    metrics = read(finished / "metrics.json")
    assert metrics["complete"] and metrics["folds"] == ["S01", "S02", "S03"] and metrics["seeds"] == [0, 1]
    assert metrics["windows"] == 36  # of the data, however many seeds are tested on them
    kl = np.array([[read(fold_folder(finished, s, f) / "metrics.json")["model"]["kl"] for f in metrics["folds"]] for s in (0, 1)])
    found = metrics["metrics"]["HeLo"]["kl"]
    np.testing.assert_allclose([found["mean"], found["sd"]], [kl.mean(), kl.std(ddof=1)])
    np.testing.assert_allclose(found["sd_over_seeds"], kl.mean(axis=1).std(ddof=1))
    assert list(metrics["metrics"]) == ["HeLo", "training mean", "AA-kNN", "ridge", "MLP", "best possible"]
    table = pd.read_csv(finished / "per_subject.csv").set_index(["subject", "method"])
    np.testing.assert_allclose(table.loc[("S02", "HeLo"), "kl"], kl[:, 1].mean())
    assert table.loc[("S02", "HeLo"), ["windows", "seeds"]].tolist() == [12, 2]
    checkpoint = torch.load(fold_folder(finished, 0, "S01") / "checkpoints" / "last.ckpt", weights_only=True)
    assert {"config": metrics["model"], **metrics["optimizer"]} == checkpoint["hyper_parameters"]
    assert metrics["versions"]["torch"] == torch.__version__ and metrics["backends"]["backends"]["eager"] == "available"


def test_rerun_keeps_finished_folds_and_refuses_another_configuration(finished, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    before, written = numbers(out), (fold_folder(out, 1, "S03") / "metrics.json").stat().st_mtime_ns
    assert train(out, "--seeds", "0", "1") == 0
    assert numbers(out) == before and (fold_folder(out, 1, "S03") / "metrics.json").stat().st_mtime_ns == written
    assert train(out, "--seeds", "0", "1", "--optimizer.lr", "0.5") == 2
    error = capsys.readouterr().err
    assert "optimizer.lr: default there, 0.5 here" in error and "--overwrite" in error
    (out / "kept.txt").write_text("the user's own")
    assert train(out, "--folds", "S01", "--optimizer.lr", "0.5", "--overwrite") == 0
    assert [p.parent.name for p in out.glob("folds/*/*/metrics.json")] == ["S01"] and (out / "kept.txt").exists()


def test_fold_that_lost_a_part_is_finished_again_with_the_same_numbers(finished, tmp_path, monkeypatch):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    lost = [fold_folder(out, 0, fold) / name for fold, name in zip(("S01", "S02", "S03"), PARTS, strict=True)]
    for path in lost:
        path.unlink()
    shutil.rmtree(lost[0].parent / "checkpoints")  # this one trains again
    with monkeypatch.context() as patch:
        patch.setattr("helo_fast.train.fold._write", lambda *_: 1 / 0)
        assert train(out, "--seeds", "0", "1") == 1
    assert [path.parent.name for path in out.glob("folds/*/*/metrics.json") if path.parent.parent.name == "0"] == []
    assert train(out, "--seeds", "0", "1") == 0
    assert numbers(out) == numbers(finished) and all(path.exists() for path in lost)


def test_changed_data_are_refused(finished, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    facts = read(out / "data.json")
    (out / "data.json").write_text(json.dumps({**facts, "sha256": "0" * 64}))
    assert train(out, "--seeds", "0", "1") == 2
    assert "data have changed" in capsys.readouterr().err


def test_files_that_were_cut_short_are_named_with_the_mend(finished, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    fold = str(fold_folder(out, 1, "S03").relative_to(out) / "metrics.json")
    for name, content in ((fold, '{"fold": '), ("data.json", "{}"), ("data.json", ""), ("config.yaml", ""), ("config.yaml", "a: [")):
        whole = (out / name).read_text()
        (out / name).write_text(content)
        assert train(out, "--seeds", "0", "1") == 2
        error = capsys.readouterr().err
        assert str(out / name) in error and ("delete it" in error or "--overwrite" in error) and error.count("\n") == 1
        (out / name).write_text(whole)


def test_run_that_has_trained_nothing_yet_may_change_its_configuration(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(HeLoModule, "setup", fail)
        assert train(tmp_path, "--folds", "S01") == 1
    assert train(tmp_path, "--folds", "S01", "--optimizer.lr", "0.01", "--baselines", "false") == 0


def test_config_file_is_the_same_run(finished, tmp_path):
    assert main(["train", "--config", str(finished / "config.yaml"), "--out", str(tmp_path), "--folds", "S01"]) == 0
    assert numbers(tmp_path)["folds/1/S01/metrics.json"] == numbers(finished)["folds/1/S01/metrics.json"]
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["seeds"] == [0, 1] and saved["overwrite"] is False


@pytest.mark.parametrize("preset", ("paper", "released"))
@pytest.mark.parametrize("hook", ("on_train_epoch_end", "on_test_epoch_start"))
def test_fold_that_failed_goes_on_to_the_same_numbers(tmp_path, monkeypatch, capsys, preset, hook):
    """Dropout, DropKey, released's random label embedding, data order, Adam, learning rate, early stopping: all continue."""
    options = (
        "--preset",
        preset,
        "--epochs",
        "30",
        "--patience",
        "5",
        "--optimizer.lr",
        "0.02",
        "--folds",
        "S01",
        "S03",
        "--baselines=false",
    )
    assert train(tmp_path / "whole", *options) == 0
    go_on = getattr(History, hook)

    def fail(self, trainer, module):
        if trainer.datamodule.fold == "S01" and (trainer.testing or trainer.current_epoch == 3):
            raise RuntimeError("the disk is full")
        go_on(self, trainer, module)

    with monkeypatch.context() as patch:
        patch.setattr(History, hook, fail)
        assert train(tmp_path / "broken", *options) == 1
    error = capsys.readouterr().err
    log = fold_folder(tmp_path / "broken", 0, "S01") / "log.txt"
    assert "fold S01, seed 0 failed: RuntimeError: the disk is full" in error and str(log) in error
    assert "Traceback" in log.read_text()
    partial = read(tmp_path / "broken" / "metrics.json")
    assert not partial["complete"] and partial["folds"] == ["S03"] and partial["errors"][0]["fold"] == "S01"
    assert train(tmp_path / "broken", *options) == 0
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "whole")


def test_run_killed_within_its_folds_goes_on_to_the_same_numbers(tmp_path):
    """SIGKILL to the run while two workers train: they stop too, and the same command ends at the numbers of one that was left alone."""
    options = ("--epochs", "60", "--patience", "0", "--folds", "S01", "S02")
    assert train(tmp_path / "whole", *options) == 0
    command = [sys.executable, "-m", "helo_fast", "train", *TINY, *options, "--jobs", "2", "--out", str(tmp_path / "killed")]
    folders = [fold_folder(tmp_path / "killed", 0, fold) for fold in ("S01", "S02")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not all((folder / "checkpoints" / "last.ckpt").exists() for folder in folders) and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for folder in folders:
        with FileLock(folder / ".lock", timeout=20):  # its worker has gone
            pass
    assert not all((folder / "metrics.json").exists() for folder in folders), "it was killed too late to show anything"
    assert train(tmp_path / "killed", *options, jobs=2) == 0
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")


MY_DATA = """
from helo_fast.train.data.synthetic import SyntheticData

class MyData(SyntheticData):
    '''Synthetic data of which one fold cannot be split.'''

    def split(self, fold):
        if fold == "S02":
            raise RuntimeError("S02 is broken")
        return super().split(fold)
"""


def test_parallel_folds_of_ones_own_data_survive_the_failure_of_one(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_module.py").write_text(MY_DATA)
    monkeypatch.chdir(tmp_path)
    assert train("out", "--data", "my_module.MyData", "--split", "random", "--epochs", "1", jobs=2) == 1
    error = capsys.readouterr().err
    assert error.count("protocol random leaks") == 1
    log = fold_folder("out", 0, "S02") / "log.txt"
    assert "fold S02, seed 0 failed: RuntimeError: S02 is broken" in error and "Traceback" in log.read_text()
    metrics = read("out/metrics.json")
    assert metrics["folds"] == ["S01", "S03"] and [e["fold"] for e in metrics["errors"]] == ["S02"]


NAMED_LIKE_NUMBERS = """
from dataclasses import replace

import numpy as np

from helo_fast.train.data.synthetic import SyntheticData

class MyData(SyntheticData):
    '''Synthetic data of subjects that are named like numbers.'''

    def load(self):
        data = super().load()
        names = {"S01": "1e3", "S02": "007", "S03": "0x10"}
        return replace(data, subject=np.array([names[subject] for subject in data.subject]))
"""


def test_subjects_named_like_numbers_are_trained_on_in_parallel(tmp_path, monkeypatch):
    (tmp_path / "numbered_module.py").write_text(NAMED_LIKE_NUMBERS)
    monkeypatch.chdir(tmp_path)
    options = ("--data", "numbered_module.MyData", "--epochs", "1", "--folds", "007", "1e3", "--baselines", "false")
    assert train("out", *options, jobs=2) == 0
    metrics, table = read("out/metrics.json"), pd.read_csv("out/per_subject.csv", dtype={"subject": str})
    assert metrics["folds"] == ["1e3", "007"] and list(dict.fromkeys(table.subject)) == metrics["folds"]


def test_trainer_options_are_held_to_the_fold_of_fewest_batches(tmp_path, monkeypatch, capsys):
    """A fold that cannot be split fails in its turn, and is no reason to refuse the others."""
    (tmp_path / "my_module.py").write_text(MY_DATA)
    monkeypatch.chdir(tmp_path)
    options = ("--data", "my_module.MyData", "--batch-size", "5", "--epochs", "1", "--baselines", "false")
    assert train("out", *options, "--trainer.val_check_interval", "4") == 2  # 12 rows of one subject train: three batches
    assert "4 is more than the 3 training batches of fold S01: give at most 3" in capsys.readouterr().err
    assert not Path("out").exists()
    assert train("out", *options, "--trainer.val_check_interval", "3") == 1
    assert read("out/metrics.json")["folds"] == ["S01", "S03"]


OWN_ARRAYS = """
import numpy as np

eeg, gsr, ppg, video = (np.random.default_rng(0).normal(size=(24, width)) for width in (36, 3, 4, 5))
labels = np.random.default_rng(1).dirichlet([1, 1], 24)
subject, trial = np.repeat(["Ann", "Ben", "Cai"], 8), np.tile(np.repeat(["clip 1", "clip 2"], 4), 3)
"""


def test_own_data_as_the_readme_has_them_are_trained_on(tmp_path, monkeypatch):
    readme = Path(__file__).parents[2].joinpath("README.md").read_text()
    example = next(code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "class MyData" in code)
    (tmp_path / "readme_module.py").write_text(OWN_ARRAYS + example)
    monkeypatch.chdir(tmp_path)
    options = ["--model.feature_dim=16", "--epochs=1", "--jobs=1", "--quiet", "--baselines=false", "--out=out"]
    assert main(["train", "--data", "readme_module.MyData", *options]) == 0
    assert read("out/metrics.json")["folds"] == ["Ann", "Ben", "Cai"]


def test_two_processes_score_every_window_once(tmp_path):
    """torchrun: the metrics are over all windows of both processes, and each is predicted once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "helo_fast", "train"]
    options = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--folds", "S01", "--epochs", "1"]
    done = subprocess.run([*command, *TINY, *options, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    folder = fold_folder(tmp_path, 0, "S01")
    predictions = pd.read_csv(folder / "predictions.csv")
    assert predictions["index"].tolist() == list(range(12))
    np.testing.assert_allclose(read(folder / "metrics.json")["model"]["kl"], independent_kl(predictions), rtol=1e-6)
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    states = checkpoint["callbacks"]["RandomState"]["ranks"]
    assert len(states) == 2 and not torch.equal(states[0]["torch"], states[1]["torch"])  # each drew its own dropout masks


def test_notes_are_told_once():
    results = [
        {"fold": fold, "notes": ["all: synthetic", f"fold {fold}: validation = train", *more]}
        for fold, more in (("A", ()), ("B", ("B: zip",)))
    ]
    assert summary.merge_notes(results) == ["all: synthetic", "2 folds: validation = train", "B: zip"]
    assert summary.merge_notes(results[:1]) == ["all: synthetic", "fold A: validation = train"]
