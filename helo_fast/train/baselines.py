"""Baselines that a model must beat on the same fold.

Each is ``predict(train_x, train_y, test_x, seed) -> [N_test, K]`` on the concatenated modalities, normalised as in the
fold (``EmotionDataModule.features``): train_x [N, F], train_y [N, K] label distributions, test_x [N_test, F].
Predictions are float64 distributions. The first three use no randomness and ignore the seed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsRegressor
from torch import nn

KNN_NEIGHBOURS = 5
# Strong regularisation: subjects are few, and their rows far from independent.
RIDGE_ALPHA = 3000.0  # for features of unit variance and about 1000 training rows
MLP_HIDDEN = 64
MLP_DROPOUT = 0.7
MLP_EPOCHS = 15
MLP_BATCH = 128
MLP_LR = 1e-3
MLP_WEIGHT_DECAY = 1.0


def training_mean(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, seed: int = 0) -> np.ndarray:
    """The mean training label for every row: what a model that learned nothing from the features can reach."""
    mean = np.asarray(train_y, dtype=np.float64).mean(axis=0)
    return np.tile(mean / mean.sum(), (len(test_x), 1))


def aa_knn(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, seed: int = 0) -> np.ndarray:
    """AA-kNN (Geng, TKDE 2016): the mean label of the 5 nearest training rows (Euclidean)."""
    model = KNeighborsRegressor(min(KNN_NEIGHBOURS, len(train_x))).fit(train_x, np.asarray(train_y, dtype=np.float64))
    return _distribution(model.predict(test_x))


def ridge(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, seed: int = 0) -> np.ndarray:
    """Ridge regression with an intercept, penalty ``RIDGE_ALPHA``; clipped to be non-negative and renormalised."""
    model = Ridge(alpha=RIDGE_ALPHA).fit(np.asarray(train_x, dtype=np.float64), np.asarray(train_y, dtype=np.float64))
    return _distribution(model.predict(np.asarray(test_x, dtype=np.float64)))


def mlp(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, seed: int = 0) -> np.ndarray:
    """One hidden layer, ReLU, dropout, softmax; KL loss, AdamW, a fixed number of epochs (no data to stop early by)."""
    x, y, test = (torch.as_tensor(np.asarray(value), dtype=torch.float32) for value in (train_x, train_y, test_x))
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(seed)
        hidden, dropout = nn.Linear(x.shape[1], MLP_HIDDEN), nn.Dropout(MLP_DROPOUT)
        model = nn.Sequential(hidden, nn.ReLU(), dropout, nn.Linear(MLP_HIDDEN, y.shape[1]), nn.LogSoftmax(dim=1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=MLP_LR, weight_decay=MLP_WEIGHT_DECAY)
        for _ in range(MLP_EPOCHS):
            for rows in torch.randperm(len(x)).split(MLP_BATCH):
                loss = nn.functional.kl_div(model(x[rows]), y[rows], reduction="batchmean")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    with torch.inference_mode():
        return _distribution(model.eval()(test).double().exp().numpy())


def _distribution(value: np.ndarray) -> np.ndarray:
    # Rows sum to 1 before clipping (ridge too: it is linear in labels that do), so none is all zero after it.
    value = np.clip(value, 0, None)
    return value / value.sum(axis=1, keepdims=True)


BASELINES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]] = {
    "training mean": training_mean,
    "AA-kNN": aa_knn,
    "ridge": ridge,
    "MLP": mlp,
}
"""The baselines by the names that a report shows."""
