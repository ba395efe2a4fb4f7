"""The synthetic data's oracle, and the baselines beside it."""

import time

import numpy as np
import pytest
import torch

from helo_fast.train import baselines
from helo_fast.train.baselines import BASELINES, KNN_NEIGHBOURS, RIDGE_ALPHA
from helo_fast.train.data.synthetic import SyntheticData
from helo_fast.train.metrics import kl

# ---- synthetic data and their oracle

SMALL = {"n_subjects": 4, "n_trials": 3, "n_windows": 2, "dim_video": 9, "dim_gsr": 4, "dim_ppg": 4}


def test_synthetic_is_dmer_shaped_and_deterministic():
    data = SyntheticData(n_subjects=3, n_trials=2, n_windows=2)
    data.setup()
    assert data.dims == {"n_channels": 18, "dim_eeg": 5, "dim_gsr": 28, "dim_ppg": 27, "dim_video": 768, "emotion_classes": 10}
    again, other = (SyntheticData(n_subjects=3, n_trials=2, n_windows=2, seed=9, data_seed=seed).data for seed in (0, 1))
    for name, value in data.data.modalities.items():
        assert np.array_equal(value, again.modalities[name]) and not np.array_equal(value, other.modalities[name])
    assert np.array_equal(data.data.labels, again.labels)
    labels, key = data.data.labels, np.char.add(data.data.subject, data.data.trial)
    assert len(np.unique(labels, axis=0)) == len(np.unique(key)) == 6  # one label per trial, windows share it
    assert all(len(np.unique(labels[key == one], axis=0)) == 1 for one in key)


def test_synthetic_sizes_are_free():
    data = SyntheticData(**SMALL, n_channels=3, dim_eeg=2, emotion_classes=4, label_noise=0.0, subject_effect=0.0)
    assert data.dims == {"n_channels": 3, "dim_eeg": 2, "dim_gsr": 4, "dim_ppg": 4, "dim_video": 9, "emotion_classes": 4}
    assert np.isfinite(data.oracle("subject")).all()
    with pytest.raises(ValueError, match="n_trials: expected at least 1, got 0"):
        SyntheticData(n_trials=0)
    with pytest.raises(ValueError, match="window_noise: expected a finite standard deviation >= 0, got -1"):
        SyntheticData(window_noise=-1)


def test_synthetic_labels_correlate():
    labels = SyntheticData(n_subjects=40, dim_video=3).data.labels[::5]
    correlation = np.corrcoef(np.log(labels).T - np.log(labels).mean(1))
    values = np.linalg.eigvalsh(correlation)[::-1]
    assert values[:3].sum() > 0.99 * values.sum()  # log-ratios of 10 labels span the three latents


@pytest.mark.parametrize("information", ["window", "subject", "effects"])
def test_oracle_posterior_is_gaussian_conditioning(information):
    """Against one joint Gaussian over all that a subject's rows hold, conditioned by brute force."""
    data = SyntheticData(**SMALL, n_channels=2, dim_eeg=2, subject_effect=0.7, subject_offset=0.4, window_noise=0.6)
    process, (subjects, trials, windows) = data.process, data.shape
    x, _, effects = data._draw()
    features, rows = x.shape[-1], trials * windows
    of_trial = np.kron(np.eye(trials), np.ones((windows, 1)))  # [rows, trials]
    loading = process.basis @ process.gain
    shared = process.basis @ process.basis.T
    own = 0.7**2 * shared + 0.4**2 * np.eye(features)
    noise = np.kron(np.eye(rows), 0.6**2 * shared + np.eye(features))
    cross = np.kron(of_trial, loading)  # Cov(x, z), [rows * features, trials * 3]
    total = cross @ cross.T + noise
    if information != "effects":
        total += np.kron(np.ones((rows, rows)), own)
    mean, covariance = process.posterior(x, effects, information)
    mean = np.broadcast_to(mean, (subjects, trials, windows, 3))
    for s in range(subjects):
        seen = (x[s] - (effects[s] if information == "effects" else 0)).reshape(-1)
        for t in range(trials):
            for w in range(windows):
                known = np.arange(rows * features)
                if information == "window":
                    known = known.reshape(rows, features)[t * windows + w]
                at = cross[known][:, 3 * t : 3 * t + 3]
                gain = np.linalg.solve(total[np.ix_(known, known)], at)
                np.testing.assert_allclose(mean[s, t, w], seen[known] @ gain, atol=1e-10)
                np.testing.assert_allclose(covariance, np.eye(3) - at.T @ gain, atol=1e-10)


def test_oracle_integral():
    process = SyntheticData(**SMALL).process
    random = np.random.default_rng(0)
    mean, root = random.normal(size=(4, 3)), random.normal(size=(3, 3)) / 2
    value = process.expected_label(mean, root @ root.T)
    np.testing.assert_allclose(value, process.expected_label(mean, root @ root.T, nodes=25), atol=1e-5)
    np.testing.assert_allclose(value.sum(1), 1, atol=1e-12)
    z = mean[:, None] + random.normal(size=(200_000, 3)) @ root.T + process.label_noise * random.normal(size=(200_000, 3))
    logits = z @ process.label_loading.T + process.label_bias
    sampled = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(value, sampled.mean(1), atol=6 * sampled.std(1).max() / 200_000**0.5)


def test_oracle_arguments():
    data = SyntheticData(**SMALL)
    assert np.array_equal(data.oracle(), data.oracle("window"))
    assert np.array_equal(SyntheticData(**SMALL, normalise="subject").oracle(), data.oracle("subject"))
    assert np.array_equal(SyntheticData(**SMALL, protocol="subject-dependent").oracle(), data.oracle("effects"))
    with pytest.raises(ValueError, match="random trains on labels of the test trials"):
        SyntheticData(**SMALL, protocol="random").best_scores()
    with pytest.raises(ValueError, match="expected one of window, subject, effects, got 'all'"):
        data.oracle("all")


# ---- baselines


def problem(rows: int = 200, test: int = 50, features: int = 12, k: int = 5, seed: int = 0):
    """Labels that are a softmax of a linear map of the features: training x, y, test x, y."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows + test, features)).astype(np.float32)
    logits = x @ random.normal(size=(features, k)) / 2
    y = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)
    return x[:rows], y[:rows], x[rows:], y[rows:]


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return kl(torch.from_numpy(p).double(), torch.from_numpy(q).double()).numpy()


@pytest.mark.parametrize("name", BASELINES)
def test_predictions_are_distributions(name):
    x, y, test_x, _ = problem()
    far = np.concatenate([test_x, 100 * test_x])  # a line leaves the simplex there
    q = BASELINES[name](x, y, far, 0)
    assert q.shape == (100, 5) and q.dtype == np.float64 and (q >= 0).all()
    np.testing.assert_allclose(q.sum(1), 1, atol=1e-12)


def test_definitions():
    x, y, test_x, _ = problem()
    np.testing.assert_allclose(BASELINES["training mean"](x, y, test_x, 0), np.tile(y.mean(0), (50, 1)), rtol=1e-5)
    nearest = np.linalg.norm(test_x[:, None] - x, axis=-1).argsort(1)[:, :KNN_NEIGHBOURS]
    assert KNN_NEIGHBOURS == 5
    np.testing.assert_allclose(BASELINES["AA-kNN"](x, y, test_x, 0), y[nearest].mean(1), rtol=1e-5)
    centred, mean = x.astype(float) - x.mean(0, dtype=float), y.mean(0, dtype=float)
    weights = np.linalg.solve(centred.T @ centred + RIDGE_ALPHA * np.eye(12), centred.T @ (y - mean))
    raw = (test_x - x.mean(0, dtype=float)) @ weights + mean
    clipped = np.clip(raw, 0, None)
    np.testing.assert_allclose(BASELINES["ridge"](x, y, test_x, 0), clipped / clipped.sum(1, keepdims=True), atol=1e-9)
    assert len(BASELINES["AA-kNN"](x[:3], y[:3], test_x, 0)) == 50  # fewer rows than neighbours


def test_what_can_be_learned_is_learned():
    x, y, test_x, test_y = problem(rows=1500)
    score = {name: divergence(test_y, predict(x, y, test_x, 0)).mean() for name, predict in BASELINES.items()}
    assert score["AA-kNN"] < 0.8 * score["training mean"] and score["ridge"] < 0.7 * score["training mean"]
    assert score["MLP"] < 0.5 * score["training mean"]


def test_mlp_depends_on_its_seed_alone():
    x, y, test_x, _ = problem()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = BASELINES["MLP"](x, y, test_x, 3)
    assert torch.get_rng_state().equal(before)
    torch.rand(7)
    assert np.array_equal(first, BASELINES["MLP"](x, y, test_x, 3))
    assert not np.allclose(first, BASELINES["MLP"](x, y, test_x, 4))


def test_mlp_is_quick():
    x, y, test_x, _ = problem(rows=1000, features=130)
    start = time.process_time()
    BASELINES["MLP"](x, y, test_x, 0)
    assert time.process_time() - start < 5 * torch.get_num_threads()


# ---- baselines against the oracle


def scores(data: SyntheticData, labels: np.ndarray, folds: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """KL of each baseline on each test row of some folds, and those rows."""
    found, rows = {name: [] for name in BASELINES}, []
    for fold in data.fold_names()[:folds]:
        data.fold = fold
        data.setup()
        split = data.current
        training = np.union1d(split.train, split.validation)
        x, test_x = data.features(training), data.features(split.test)
        for name, predict in BASELINES.items():
            found[name].append(divergence(labels[split.test], predict(x, labels[training], test_x, 0)))
        rows.append(split.test)
    return {name: np.concatenate(parts) for name, parts in found.items()}, np.concatenate(rows)


SIZES = {"n_subjects": 12, "n_trials": 20, "n_windows": 3, "dim_video": 40}


@pytest.fixture(scope="module", params=[("loso", "train"), ("loso", "subject"), ("subject-dependent", "train")], ids="-".join)
def measured(request):
    protocol, normalise = request.param
    data = SyntheticData(**SIZES, protocol=protocol, normalise=normalise)
    found, rows = scores(data, data.data.labels, folds=12)
    return data, found, rows


def test_no_baseline_beats_the_oracle(measured):
    data, found, rows = measured
    best = divergence(data.data.labels[rows], data.oracle()[rows])
    subject = data.data.subject[rows]
    for name, value in found.items():
        gain = np.array([(value - best)[subject == one].mean() for one in np.unique(subject)])  # subjects are independent
        error = gain.std(ddof=1) / len(gain) ** 0.5
        assert gain.mean() > -2 * error, f"{name} beats the oracle by {-gain.mean():.4f} +- {error:.4f}"
    assert best.mean() == pytest.approx(data.best_scores(rows)["kl"], rel=1e-9)


def test_best_score_tells_learning_from_guessing(measured):
    data, found, rows = measured
    guess, best = found["training mean"].mean(), data.best_scores(rows)["kl"]
    assert best < 0.6 * guess
    if data.protocol == "loso":  # subject-dependent has 15 labels to learn from
        assert found["MLP"].mean() < guess - 0.3 * (guess - best)
        assert found["AA-kNN"].mean() < guess - 0.2 * (guess - best)


def test_shuffled_labels_destroy_the_score():
    data = SyntheticData(**SIZES)
    trial = np.arange(len(data.data)) // 3
    labels = data.data.labels[::3][np.random.default_rng(1).permutation(trial.max() + 1)][trial]  # whole trials
    found, rows = scores(data, labels, folds=6)
    guess = found["training mean"].mean()
    for name in ("AA-kNN", "ridge", "MLP"):
        assert found[name].mean() > 0.98 * guess, f"{name} finds something in shuffled labels: a leak"
    assert divergence(labels[rows], data.oracle()[rows]).mean() > 1.3 * guess


def test_more_knowledge_is_worth_more():
    data = SyntheticData(**SIZES)
    window, subject, effects = (data.best_scores(information=information)["kl"] for information in ("window", "subject", "effects"))
    assert effects < subject < window < 0.7 * divergence(data.data.labels, np.tile(data.data.labels.mean(0), (720, 1))).mean()


def test_oracle_is_calibrated():
    """E[y | q] = q, as for a conditional mean: regressing labels on predictions gives slope 1."""
    data = SyntheticData(**SIZES | {"n_subjects": 60, "n_windows": 1})
    labels = data.data.labels
    for information in ("window", "subject", "effects"):
        q = data.oracle(information)
        deviation = q - labels.mean(0)
        slope = (deviation * (labels - labels.mean(0))).sum() / (deviation**2).sum()
        assert slope == pytest.approx(1, abs=0.05), information


def test_enough_data_come_near_the_oracle(monkeypatch):
    """The bound can be reached: a softmax regression on many subjects closes nearly all of the gap."""
    monkeypatch.setattr(baselines, "MLP_DROPOUT", 0.1)
    data = SyntheticData(n_subjects=150, n_trials=20, n_windows=1, n_channels=4, dim_eeg=4, dim_gsr=10, dim_ppg=10, dim_video=16)
    data.setup()
    held = np.flatnonzero(np.isin(data.data.subject, data.fold_names()[:30]))
    training = np.setdiff1d(np.arange(len(data.data)), held)
    labels = data.data.labels
    q = baselines.mlp(data.features(training), labels[training], data.features(held), 0)
    best = data.best_scores(held, "window")["kl"]
    guess = divergence(labels[held], np.tile(labels[training].mean(0), (len(held), 1))).mean()
    assert best < divergence(labels[held], q).mean() < best + 0.15 * (guess - best)
