"""A fold of a training run on tiny synthetic data: the module that is trained, and the files that are written."""

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from small_run import SIZES, independent_kl, read, train

from helo_fast.model import HeLo, HeLoConfig
from helo_fast.train.data.synthetic import SyntheticData
from helo_fast.train.fold import fold_folder
from helo_fast.train.module import HeLoModule


@pytest.fixture
def data():
    data = SyntheticData(**SIZES, fold="S01")
    data.setup()
    return data


# ---- the module


@pytest.mark.parametrize("options", ({"lr": 0.0}, {"weight_decay": -1.0}, {"lr_gamma": 1.5}))
def test_module_refuses_what_cannot_train(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        HeLoModule(HeLoConfig(feature_dim=16), **options)


def test_module_trains_by_the_released_recipe(data):
    module = HeLoModule(HeLoConfig(feature_dim=16, **data.dims), lr=0.01, weight_decay=0.1, lr_gamma=0.5)
    made = module.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]
    assert type(optimizer) is torch.optim.Adam
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"], scheduler.gamma) == (0.01, 0.1, 0.5)

    batch = next(iter(data.train_dataloader()))
    logged = {}
    module.log_dict = lambda values, **options: logged.update(values)
    torch.manual_seed(1)
    loss = module.training_step(batch, 0)
    torch.manual_seed(1)
    expected, parts = module.model.loss(*(batch[name] for name in ("eeg", "gsr", "ppg", "video", "labels")))
    assert loss == expected  # a sum over the batch, as released
    assert torch.isclose(logged["train_kl"], parts["kl"] / len(batch["labels"]))  # told per sample


def test_module_fits_the_label_correlation_to_the_training_rows(data):
    trainer = pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    module = HeLoModule(HeLoConfig(feature_dim=16, **data.dims))
    trainer.fit(module, datamodule=data)
    labels = data.data.labels[data.split("S01").train].astype(np.float64)
    labels /= np.linalg.norm(labels, axis=0)
    np.testing.assert_allclose(module.model.label_correlation.numpy(), labels.T @ labels, rtol=1e-5)


def test_module_stops_where_weights_diverge(data):
    module = HeLoModule(HeLoConfig(feature_dim=16, **data.dims))
    with torch.no_grad():
        module.model.projection.weight.fill_(float("nan"))
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    with pytest.raises(RuntimeError, match="diverged.*--optimizer.lr"):
        trainer.validate(module, datamodule=data, verbose=False)


# ---- a fold


def test_fold_folders_are_distinct_and_safe():
    names = ["S1", "S 1", "S/1", "S%2F1", "..", ".", "ä", "a\\b"]
    folders = [fold_folder("out", 0, name) for name in names]
    assert len(set(folders)) == len(names)
    assert all(folder.parent == Path("out/folds/0") and folder.name not in (".", "..") for folder in folders)


def test_fold_metrics_are_those_of_its_predictions(finished, data):
    folder = fold_folder(finished, 0, "S01")
    metrics, predictions = read(folder / "metrics.json"), pd.read_csv(folder / "predictions.csv")
    split = data.split("S01")
    assert predictions["index"].tolist() == split.test.tolist()
    assert set(predictions.subject) == {"S01"}
    np.testing.assert_array_equal(predictions.filter(regex="^true_").astype(np.float32), data.data.labels[split.test])
    np.testing.assert_allclose(predictions.filter(regex="^predicted_").sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(metrics["model"]["kl"], independent_kl(predictions), rtol=1e-6)
    assert metrics["rows"] == {"train": len(split.train), "validation": len(split.validation), "test": len(split.test)}
    assert metrics["baselines"].keys() == {"training mean", "AA-kNN", "ridge", "MLP"}
    np.testing.assert_allclose(metrics["best_possible"]["kl"], data.best_scores(split.test)["kl"])
    assert metrics["best_possible"]["kl"] < metrics["baselines"]["training mean"]["kl"]


def test_best_possible_of_a_model_that_sees_its_batch(tmp_path):
    assert train(tmp_path, "--preset", "released", "--epochs", "1", "--folds", "S02", "--baselines", "false") == 0
    data = SyntheticData(**SIZES, fold="S02")
    data.setup()
    found = read(fold_folder(tmp_path, 0, "S02") / "metrics.json")["best_possible"]["kl"]
    np.testing.assert_allclose(found, data.best_scores(data.current.test, "subject")["kl"])


def test_training_mean_is_over_all_subjects_but_the_test_one(finished, data):
    split = data.split("S01")
    rows = np.concatenate([split.train, split.validation])
    mean, true = data.data.labels[rows].astype(np.float64).mean(axis=0), data.data.labels[split.test].astype(np.float64)
    expected = np.sum(true * np.log(true / mean), axis=1).mean()
    found = read(fold_folder(finished, 0, "S01") / "metrics.json")["baselines"]["training mean"]["kl"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_exported_weights_predict_what_was_written(finished, data):
    folder = fold_folder(finished, 0, "S01")
    model = HeLo.from_pretrained(folder / "model.safetensors")
    batch = next(iter(data.test_dataloader()))
    with torch.no_grad():
        predict = model(*(batch[name] for name in ("eeg", "gsr", "ppg", "video")))[0]
    written = pd.read_csv(folder / "predictions.csv").filter(regex="^predicted_").to_numpy()
    np.testing.assert_allclose(predict[batch["index"].argsort()].numpy(), written, atol=1e-6)


def test_checkpoint_loads_without_unpickling_and_explains_itself(finished, data):
    checkpoint = torch.load(fold_folder(finished, 0, "S01") / "checkpoints" / "best.ckpt", weights_only=True)
    assert HeLoConfig.from_dict(checkpoint["hyper_parameters"]["config"]) == HeLoConfig(feature_dim=16, **data.dims)
    about = checkpoint["data"]
    assert about["label_names"] == list(data.label_names) and about["places"] == data.places and about["dims"] == data.dims
    assert (about["protocol"], about["fold"], about["seed"], about["normalise"]) == ("loso", "S01", 0, "train")
    train_rows = data.data.modalities["gsr"][data.split("S01").train].astype(np.float64)
    np.testing.assert_allclose(about["normalisation"]["gsr.mean"].numpy(), train_rows.mean(axis=0), rtol=1e-6)
    assert HeLoModule(**checkpoint["hyper_parameters"]).load_state_dict(checkpoint["state_dict"])


def test_best_epoch_is_tested_and_patience_ends_training(tmp_path):
    assert train(tmp_path, "--epochs", "40", "--patience", "3", "--optimizer.lr", "0.05", "--folds", "S02", "--baselines", "false") == 0
    folder = fold_folder(tmp_path, 0, "S02")
    history, metrics = pd.read_csv(folder / "history.csv"), read(folder / "metrics.json")
    best = int(history.validation_kl.idxmin())
    assert metrics["tested"] == {"weights": "best", "epoch": best}
    assert metrics["epochs"] == len(history) == best + 1 + 3 < 40
    np.testing.assert_allclose(history.lr, 0.05 * 0.99**history.epoch)
    assert metrics["baselines"] == {}


def test_without_early_stopping_the_last_weights_can_be_tested(tmp_path):
    options = ("--epochs", "6", "--patience", "0", "--select", "last", "--optimizer.lr", "0.05", "--folds", "S02", "--baselines", "false")
    assert train(tmp_path, *options) == 0
    metrics = read(fold_folder(tmp_path, 0, "S02") / "metrics.json")
    assert metrics["epochs"] == 6 and metrics["tested"] == {"weights": "last", "epoch": 5}


def test_random_split_never_selects_by_test_rows(tmp_path):
    """Its validation rows are its test rows: the last epoch is tested, and the report says that the split leaks."""
    assert train(tmp_path, "--split", "random", "--patience", "1", "--epochs", "4", "--folds", "S01") == 0
    metrics = read(fold_folder(tmp_path, 0, "S01") / "metrics.json")
    assert metrics["epochs"] == 4 and metrics["tested"] == {"weights": "last", "epoch": 3}
    assert "best_possible" not in metrics
    assert any("leaks" in note for note in read(tmp_path / "metrics.json")["notes"])


def test_random_split_tells_once_that_it_leaks(tmp_path, capsys, recwarn):
    options = ("--split", "random", "--epochs", "1", "--folds", "S01", "S02", "--baselines", "false")
    assert train(tmp_path, *options) == 0
    assert capsys.readouterr().err.count("protocol random leaks") == 1
    assert not any("leaks" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("precision", ("64-true", "bf16-true"))
def test_weights_of_another_precision_are_scored(tmp_path, precision):
    options = ("--trainer.precision", precision, "--epochs", "1", "--folds", "S01", "--baselines", "false")
    assert train(tmp_path, *options) == 0
    folder = fold_folder(tmp_path, 0, "S01")
    np.testing.assert_allclose(np.load(folder / "arrays.npz")["plan"].sum(), 1, rtol=0.02)
    HeLo.from_pretrained(folder / "model.safetensors")


def test_released_preset_in_bfloat16_with_clipped_gradients(tmp_path):
    options = ("--preset", "released", "--trainer.precision", "bf16-mixed", "--trainer.gradient_clip_val", "1", "--folds", "S01")
    assert train(tmp_path, *options, "--normalise", "subject") == 0
    checkpoint = torch.load(fold_folder(tmp_path, 0, "S01") / "checkpoints" / "last.ckpt", weights_only=True)
    config = checkpoint["hyper_parameters"]["config"]
    assert (config["preset"], config["transport"]) == ("released", "gromov")
    metrics = read(tmp_path / "metrics.json")
    assert np.isfinite(metrics["metrics"]["HeLo"]["kl"]["mean"])
    assert any("transductive" in note for note in metrics["notes"])
