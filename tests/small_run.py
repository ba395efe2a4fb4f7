"""Training on tiny synthetic data, and what it has written."""

import json
from pathlib import Path

import numpy as np

from helo_fast.train.cli import main

SIZES = {"n_subjects": 3, "n_trials": 4, "n_windows": 3, "n_channels": 2, "dim_video": 8, "emotion_classes": 4}
TINY = [f"--data.{name}={value}" for name, value in SIZES.items()] + ["--model.feature_dim=16", "--quiet", "--epochs", "2"]
NUMBERS = ("metrics.json", "history.csv", "predictions.csv")


def train(out, *options, jobs=1):
    return main(["train", *TINY, "--out", str(out), "--jobs", str(jobs), *options])


def read(path):
    return json.loads(Path(path).read_text())


def numbers(out):
    """Every number that a run has written, as bytes."""
    paths = [*Path(out).glob("*.csv"), Path(out, "metrics.json"), *(p for name in NUMBERS for p in Path(out, "folds").glob(f"*/*/{name}"))]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def independent_kl(predictions):
    true, predicted = (predictions.filter(regex=f"^{kind}_").to_numpy(np.float64) for kind in ("true", "predicted"))
    return np.sum(true * (np.log(true) - np.log(predicted)), axis=1).mean()
