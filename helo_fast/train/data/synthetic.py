"""Synthetic data of DMER's shape whose generating process, and so whose best attainable score, is known.

A latent affect z (valence, arousal, dominance) of each trial mixes K emotions into the trial's label distribution and
drives every modality; each subject adds effects of its own, each window noise. With subject s, trial t, window w,
modality m, all variables independent standard normal unless a scale precedes them:

    y[s,t]   = softmax(a + A (z[s,t] + label_noise * eta[s,t]))                                 # [K]
    h[m,...] = gain[m] * z[s,t] + subject_effect * c[m,s] + window_noise * u[m,s,t,w]           # [3]
    x[m,...] = offset[m] + scale[m] * (h[m,...] W[m] + subject_offset * d[m,s] + e[m,s,t,w])    # [features]

K labels from three latents correlate. Without offset and scale a row is x = H z + (subject's part) + (window's part),
jointly Gaussian with z: so z given features is Gaussian with known mean and covariance, and E[y | features] a
three-dimensional integral.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy.linalg import block_diag

from helo_fast.train.data.base import EmotionData, EmotionDataModule
from helo_fast.train.metrics import FUNCTIONS

# How strongly valence, arousal and dominance show in each modality: skin conductance tells arousal, the face valence.
GAINS = {"eeg": (0.5, 0.5, 0.5), "gsr": (0.1, 1.0, 0.2), "ppg": (0.2, 0.7, 0.4), "video": (0.9, 0.2, 0.5)}
LATENT = 3
QUADRATURE_NODES = 11  # per latent dimension: errors of E[y] below 1e-5

Information = Literal["window", "subject", "effects"]


@dataclass(frozen=True)
class Process:
    """The generating process, in features without offset and scale: x = B h + subject_offset * d + e.

    Args:
        basis: B [F, 4 * 3], the W of all modalities on the diagonal: from the stacked h to all features.
        gain: G [4 * 3, 3], from z to the stacked h.
        label_bias: a [K].
        label_loading: A [K, 3].
        subject_effect, subject_offset, window_noise, label_noise: standard deviations as in the module's formulas.
    """

    basis: np.ndarray
    gain: np.ndarray
    label_bias: np.ndarray
    label_loading: np.ndarray
    subject_effect: float
    subject_offset: float
    window_noise: float
    label_noise: float

    def sample(self, shape: tuple[int, int, int], random: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Draws x [subjects, trials, windows, F], y [subjects, trials, K] and the subjects' parts [subjects, F]."""
        subjects, trials, windows = shape
        features, stacked = self.basis.shape
        z = random.normal(size=(subjects, trials, LATENT))
        seen = z + self.label_noise * random.normal(size=z.shape)
        y = softmax(self.label_bias + seen @ self.label_loading.T)
        effects = self.subject_effect * random.normal(size=(subjects, stacked)) @ self.basis.T
        effects += self.subject_offset * random.normal(size=effects.shape)
        noise = self.window_noise * random.normal(size=(*shape, stacked))
        x = ((z @ self.gain.T)[:, :, None] + noise) @ self.basis.T + effects[:, None, None]
        return x + random.normal(size=x.shape), y, effects

    def posterior(self, x: np.ndarray, effects: np.ndarray, information: Information) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of each window's z given the information (see ``SyntheticData.oracle``).

        Args:
            x: [subjects, trials, windows, F].
            effects: [subjects, F], each subject's part; read for information = effects only.
            information: window, subject or effects.

        Returns:
            Mean [subjects, trials, windows or 1, 3] (1: the same for all windows of a trial) and covariance [3, 3].
        """
        trials, windows, features = x.shape[1:]
        loading = self.basis @ self.gain  # H
        shared, single = self.basis @ self.basis.T, np.eye(features)
        subject = self.subject_effect**2 * shared + self.subject_offset**2 * single  # covariances [F, F] of the parts
        window = self.window_noise**2 * shared + single

        def condition(prior: float, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            # z ~ N(0, prior I), x = H z + N(0, noise): E[z | x] = x gain, Cov[z | x]
            gain = np.linalg.solve(prior * loading @ loading.T + noise, prior * loading)  # [F, 3]
            return gain, prior * np.eye(LATENT) - prior * gain.T @ loading

        if information == "window":
            gain, covariance = condition(1.0, subject + window)
            return x @ gain, covariance
        mean = x.mean(axis=2, keepdims=True)  # of the trial: sufficient, as its windows are exchangeable
        gain, covariance = condition(1.0, window / windows)
        if information == "effects":
            return (mean - effects[:, None, None]) @ gain, covariance
        # The subject's part is in the subject's mean only: that tells the mean of z over the trials, and the trials'
        # deviations from it, independent of it and free of the subject's part, tell the deviations of z.
        centre = mean.mean(axis=1, keepdims=True)
        gain_centre, covariance_centre = condition(1 / trials, subject + window / (windows * trials))
        return centre @ gain_centre + (mean - centre) @ gain, covariance_centre + (1 - 1 / trials) * covariance

    def expected_label(self, mean: np.ndarray, covariance: np.ndarray, nodes: int = QUADRATURE_NODES) -> np.ndarray:
        """E[y] for z ~ N(mean [..., 3], covariance [3, 3]) by Gauss-Hermite quadrature: [..., K]."""
        abscissa, weight = np.polynomial.hermite_e.hermegauss(nodes)
        grid = np.stack(np.meshgrid(*[abscissa] * LATENT, indexing="ij"), axis=-1).reshape(-1, LATENT)
        weights = np.prod(np.meshgrid(*[weight / weight.sum()] * LATENT, indexing="ij"), axis=0).ravel()
        spread = np.linalg.cholesky(covariance + self.label_noise**2 * np.eye(LATENT))
        shift = grid @ spread.T @ self.label_loading.T  # [nodes^3, K]
        logits = mean.reshape(-1, LATENT) @ self.label_loading.T + self.label_bias  # [rows, K]
        out = np.stack([weights @ softmax(row + shift) for row in logits])
        return out.reshape(*mean.shape[:-1], -1)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


class SyntheticData(EmotionDataModule):
    """Data of DMER's shape from a seed, with a known best score.

    Args:
        n_subjects: Subjects.
        n_trials: Trials of each subject; a label distribution each.
        n_windows: Windows (rows) of each trial.
        n_channels: EEG channels; 18 where not given.
        dim_eeg: Features of each EEG channel.
        dim_gsr: GSR features.
        dim_ppg: PPG features.
        dim_video: Video features.
        emotion_classes: Emotions K.
        subject_effect: Size of each subject's shift in what a modality tells about affect; a model cannot remove it
            without other rows of the subject.
        subject_offset: Size of each subject's shift of single features.
        window_noise: Size of a window's noise in what a modality tells about affect.
        label_noise: Size of the label's noise, which no feature tells.
        data_seed: Seed of the data; ``seed`` is that of the split and the training order.
        kwargs: The arguments of ``EmotionDataModule``.

    Example:
        >>> data = SyntheticData(n_subjects=3, n_trials=2, n_windows=2, dim_video=8)
        >>> data.setup()
        >>> data.dims["n_channels"], data.dims["dim_eeg"], len(data.data)
        (18, 5, 12)
    """

    default_n_channels = 18

    def __init__(
        self,
        *,
        n_subjects: int = 12,
        n_trials: int = 20,
        n_windows: int = 5,
        n_channels: int | None = None,
        dim_eeg: int = 5,
        dim_gsr: int = 28,
        dim_ppg: int = 27,
        dim_video: int = 768,
        emotion_classes: int = 10,
        subject_effect: float = 0.5,
        subject_offset: float = 0.5,
        window_noise: float = 0.5,
        label_noise: float = 0.4,
        data_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(n_channels=n_channels, **kwargs)
        sizes = {"n_subjects": n_subjects, "n_trials": n_trials, "n_windows": n_windows}
        widths = {"eeg": self.n_channels * dim_eeg, "gsr": dim_gsr, "ppg": dim_ppg, "video": dim_video}
        least = {**dict.fromkeys(sizes, 1), **dict.fromkeys(widths, 1), "emotion_classes": 2}
        for name, value in {**sizes, **widths, "emotion_classes": emotion_classes}.items():
            if value < least[name]:
                raise ValueError(f"{name}: expected at least {least[name]}, got {value}")
        scales = {"subject_effect": subject_effect, "subject_offset": subject_offset}
        scales |= {"window_noise": window_noise, "label_noise": label_noise}
        for name, value in scales.items():
            if not 0 <= value < np.inf:
                raise ValueError(f"{name}: expected a finite standard deviation >= 0, got {value}")
        self.shape = (n_subjects, n_trials, n_windows)
        self.widths, self.emotion_classes, self.scales, self.data_seed = widths, emotion_classes, scales, data_seed
        self._oracles: dict[str, np.ndarray] = {}

    def _random(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.data_seed, stream])

    @cached_property
    def process(self) -> Process:
        """The process, its parameters drawn from ``data_seed``."""
        random, k = self._random(0), self.emotion_classes
        return Process(
            basis=block_diag(*(random.normal(size=(width, LATENT)) for width in self.widths.values())),
            gain=np.concatenate([np.diag(GAINS[place]) for place in self.widths]),
            label_bias=0.5 * random.normal(size=k),
            label_loading=0.6 * random.normal(size=(k, LATENT)),
            **self.scales,
        )

    def _draw(self) -> tuple[np.ndarray, ...]:
        return self.process.sample(self.shape, self._random(1))

    def load(self) -> EmotionData:
        """Draws the data; the same for the same sizes and ``data_seed``."""
        x, y, _ = self._draw()
        subjects, trials, windows = self.shape
        random = self._random(2)
        modalities, start = {}, 0
        for modality, width in self.widths.items():
            offset, scale = random.normal(size=width), np.exp(random.normal(size=width))  # units differ by feature
            modalities[modality] = (offset + scale * x[..., start : start + width]).reshape(-1, width)
            start += width
        names = tuple(f"emotion {i + 1}" for i in range(self.emotion_classes))
        subject = [f"S{i + 1:02d}" for i in range(subjects)]
        trial = [f"clip {i + 1:02d}" for i in range(trials)]
        return EmotionData(
            modalities,
            labels=np.repeat(y.reshape(-1, len(names)), windows, axis=0),
            subject=np.repeat(subject, trials * windows),
            trial=np.tile(np.repeat(trial, windows), subjects),
            names=names,
            notes=(f"synthetic data, data_seed {self.data_seed}: scores say nothing about people",),
        )

    def oracle(self, information: Information | None = None) -> np.ndarray:
        """The prediction q of each row that minimises the expected KL(y, q), by the process's own parameters.

        E[KL(y, q) | information] = const - sum E[y | information] ln q is least at q = E[y | information], so no
        predictor that uses the same information, or less, has a smaller expected KL. What it may use:

        * window: the features of the row alone (bounds loso with normalise = train or none, one row at a time);
        * subject: the features of all rows of the subject (bounds loso with normalise = subject, and a model whose
          prediction depends on its batch);
        * effects: the features of all windows of the trial, and the subject's effects exactly (bounds every predictor
          that saw no label of the same trial, so subject-dependent too).

        ``random`` has no such bound: its training rows hold labels of the test trials.

        Args:
            information: window, subject or effects; by default the one for the protocol and normalise of this module.

        Returns:
            [N, K] float64, rows sum to 1.

        Raises:
            ValueError: no information given under protocol random.
        """
        if information is None:
            if self.protocol == "random":
                raise ValueError(
                    "information: protocol random trains on labels of the test trials, no prediction from features "
                    "bounds it: name window, subject or effects to compare with one all the same"
                )
            loso: Information = "subject" if self.normalise == "subject" else "window"
            information = loso if self.protocol == "loso" else "effects"
        if information not in get_args(Information):
            raise ValueError(f"information: expected one of {', '.join(get_args(Information))}, got {information!r}")
        if information not in self._oracles:
            x, y, effects = self._draw()
            mean, covariance = self.process.posterior(x, effects, information)
            label = self.process.expected_label(mean, covariance)  # [subjects, trials, windows or 1, K]
            self._oracles[information] = np.broadcast_to(label, (*self.shape, y.shape[-1])).reshape(-1, y.shape[-1])
        return self._oracles[information].copy()

    def best_scores(self, rows: np.ndarray | None = None, information: Information | None = None) -> dict[str, float]:
        """The six metrics of ``oracle(information)``, averaged over ``rows`` (default: all).

        The KL is the best attainable in expectation (another prediction can only be luckier on few rows). The other
        five are those of the KL's optimum, not optima of their own.
        """
        rows = np.arange(len(self.data)) if rows is None else rows
        label = torch.from_numpy(self.data.labels[rows]).double()
        best = torch.from_numpy(self.oracle(information)[rows])
        return {name: float(function(label, best).mean()) for name, function in FUNCTIONS.items()}
