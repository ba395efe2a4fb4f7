"""Trains and scores one fold with one seed, from wherever an earlier attempt was interrupted, and writes its folder."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from helo_fast._allocator import keep_freed_memory
from helo_fast.train.baselines import BASELINES
from helo_fast.train.callbacks import (
    AtomicCheckpoints,
    EpochReport,
    History,
    PatientStopping,
    Predictions,
    RandomState,
)
from helo_fast.train.data.base import PLACES, EmotionDataModule
from helo_fast.train.files import read_json, replacing, write_json
from helo_fast.train.metrics import FUNCTIONS
from helo_fast.train.module import HeLoModule
from helo_fast.train.options import HeLoCLI

MONITOR = "validation_kl"
PARTS = ("history.csv", "predictions.csv", "arrays.npz")  # what the report reads beside metrics.json
LOCK_SECONDS = 60  # a worker whose parent was killed notices at once; this is for a slow file system


def fold_folder(out: str | Path, seed: int, fold: str) -> Path:
    """Folder of one fold and seed of the run in ``out``; different folds never share one, whatever their names."""
    return Path(out, "folds", str(seed), quote(fold, safe=" ").replace(".", "%2E"))


def finished(folder: Path) -> dict[str, Any] | None:
    """The results of a fold that was finished and has lost no part, else None: ``metrics.json`` is the last file that it writes."""
    path = folder / "metrics.json"
    return read_json(path) if path.exists() and all((folder / part).exists() for part in PARTS) else None


def quiet_lightning() -> None:
    """Silences what Lightning says about every fold anew and what does not apply to data in memory."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*exists and is not empty.*", ".*isinstance.treespec, LeafSpec.*"):
        warnings.filterwarnings("ignore", message)
    warnings.filterwarnings("ignore", ".*random leaks.*")  # of the data, at every fold: the run tells it once


def score(p: np.ndarray, q: np.ndarray) -> dict[str, float]:
    """The six metrics, means over the rows of labels p [N, K] and predictions q [N, K]."""
    labels, predictions = (torch.as_tensor(np.asarray(value), dtype=torch.float64) for value in (p, q))
    return {name: float(function(labels, predictions).mean()) for name, function in FUNCTIONS.items()}


def train_fold(
    cli: HeLoCLI,
    data: EmotionDataModule,
    fold: str,
    *,
    progress_bar: bool = False,
    tell: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Trains, tests and scores ``fold`` with the seed of ``data``; a finished fold is only read.

    Args:
        cli: The parsed configuration.
        data: The data set; its ``fold`` is set here.
        fold: A name out of ``data.fold_names()``.
        progress_bar: Show Lightning's.
        tell: Called with the number of epochs done after each.

    Returns:
        What the fold's ``metrics.json`` holds. The folder also gets ``checkpoints/{last,best}.ckpt``,
        ``model.safetensors``, ``history.csv``, ``predictions.csv`` and ``arrays.npz`` (mean transport plan of the test
        rows, learned and data label correlation).
    """
    keep_freed_memory()
    folder = fold_folder(cli.config.out, data.seed, fold)
    quiet_lightning()
    first = rank_zero_only.rank == 0
    if first:
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock", timeout=LOCK_SECONDS) if first else contextlib.nullcontext():
        results = finished(folder)
        if results is None:
            if first:
                (folder / "metrics.json").unlink(missing_ok=True)  # of a fold that lost a part: it is finished when all are new
            seed_everything(data.seed, workers=True, verbose=False)
            data.fold = fold
            module, predictions, results = _fit_and_test(cli, data, folder, progress_bar, tell)
            if first:
                _write(cli, data, module, predictions, results, folder)
    return results


def _fit_and_test(
    cli: HeLoCLI, data: EmotionDataModule, folder: Path, progress_bar: bool, tell: Callable[[int], None] | None
) -> tuple[HeLoModule, Predictions, dict[str, Any]]:
    config, split = cli.config, data.current
    # Where validation rows are test rows, whatever is chosen by them is chosen by the test labels.
    honest = np.intersect1d(split.validation, split.test).size == 0
    selected = config.select if honest else "last"
    patience = config.patience if honest else 0

    checkpoints = folder / "checkpoints"
    keep = {"dirpath": checkpoints, "enable_version_counter": False}
    history, predictions = History(folder / "history.csv"), Predictions()
    callbacks: list[Callback] = [
        RandomState(),
        history,
        predictions,
        ModelCheckpoint(**keep, filename="best", monitor=MONITOR, mode="min"),
        ModelCheckpoint(**keep, filename="last", save_on_train_epoch_end=True),
    ]
    if patience:
        callbacks.append(PatientStopping(MONITOR, patience=patience))
    if tell is not None:
        callbacks.append(EpochReport(tell))
    trainer = cli.make_trainer(callbacks, [AtomicCheckpoints()], default_root_dir=folder, enable_progress_bar=progress_bar)
    module = cli.make_module(data)
    last, best = checkpoints / "last.ckpt", checkpoints / "best.ckpt"
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None)
    epochs = len(history.rows)  # the test below sets callbacks back to the checkpoint that it tests

    tested = best if selected == "best" and best.exists() else last
    seed_everything(data.seed, workers=True, verbose=False)  # released draws random numbers in evaluation too
    scores = trainer.test(module, datamodule=data, ckpt_path=tested, verbose=False)[0]
    results = {
        "fold": split.fold,
        "seed": data.seed,
        "rows": {part: len(getattr(split, part)) for part in ("train", "validation", "test")},
        "epochs": epochs,
        "tested": {"weights": tested.stem, "epoch": int(torch.load(tested, weights_only=True)["epoch"])},
        "model": {name: scores[f"test_{name}"] for name in FUNCTIONS},
        "baselines": {},
        "notes": list(data.notes),
    }
    return module, predictions, results


def _write(
    cli: HeLoCLI,
    data: EmotionDataModule,
    module: HeLoModule,
    predictions: Predictions,
    results: dict[str, Any],
    folder: Path,
) -> None:
    split = data.current
    if cli.config.baselines:
        # A baseline needs no validation: it gets those rows too, all the labels that the model's training has seen.
        rows = np.setdiff1d(np.union1d(split.train, split.validation), split.test)
        train_x, train_y, test_x = data.features(rows), data.data.labels[rows], data.features(split.test)
        for name, predict in BASELINES.items():
            predicted = predict(train_x, train_y, test_x, data.seed)
            results["baselines"][name] = score(data.data.labels[split.test], predicted)
    if hasattr(data, "best_scores") and data.protocol != "random":  # synthetic data know what can be reached at all
        # A model whose predictions depend on their batch-mates sees other rows of the test subject.
        batched = data.protocol == "loso" and module.model.config.threshold_over == "batch"
        results["best_possible"] = data.best_scores(split.test, "subject" if batched else None)
    with replacing(folder / "predictions.csv") as temporary:
        prediction_table(data, predictions.index, predictions.predict).to_csv(temporary, index=False)
    with replacing(folder / "arrays.npz") as temporary:
        np.savez(temporary, **_interior(module, data, split.test))
    with replacing(folder / "model.safetensors") as temporary:
        module.model.save_pretrained(temporary)
    write_json(folder / "metrics.json", results)  # last: it marks the fold as finished


def prediction_table(data: EmotionDataModule, index: Tensor, predict: Tensor) -> pd.DataFrame:
    """One line per window: subject, trial, index (row in the data), true and predicted distribution by label name."""
    rows = index.numpy()
    columns = {"subject": data.data.subject[rows], "trial": data.data.trial[rows], "index": rows}
    for kind, values in (("true", data.data.labels[rows]), ("predicted", predict.numpy())):
        columns |= {f"{kind}_{name}": values[:, k] for k, name in enumerate(data.label_names)}
    return pd.DataFrame(columns)


@torch.inference_mode()
def _interior(module: HeLoModule, data: EmotionDataModule, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Means over ``rows`` of the transport plan [2C, 2C] and of the label correlations [K, K], learned and in the data."""
    model = module.model.cpu().eval()
    dtype = next(model.parameters()).dtype  # --trainer.precision may have changed it
    sums: dict[str, Tensor] = {}
    for some in torch.from_numpy(rows).split(data.batch_size):
        *inputs, labels = (data.tensors[name][some].to(dtype) for name in (*PLACES, "labels"))
        _, learned, given = model(*inputs, labels=labels)
        batch = {"plan": model.transport_plan(*inputs), "learned_correlation": learned, "data_correlation": given}
        for name, value in batch.items():
            total = value.double().sum(0) if value.ndim == 3 else value.double() * len(some)
            sums[name] = sums.get(name, 0) + total / len(rows)
    return {name: value.numpy() for name, value in sums.items()}
