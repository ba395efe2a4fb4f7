"""Statistics over the last axis of a stack of windows ``[..., n]``: plain numpy and scipy, finite for every input."""

from __future__ import annotations

import numpy as np
from scipy import signal


def cut_windows(samples: np.ndarray, first: np.ndarray, length: int) -> np.ndarray:
    """Windows ``[W, length, ...]`` of ``samples [n, ...]`` that begin at the sample indices ``first [W]``.

    A window that would end after the last sample is moved back: callers check that it is rounding, one sample at most.
    """
    return np.stack([samples[begin : begin + length] for begin in np.minimum(first, len(samples) - length)])


def log_of(x: np.ndarray, floor: float) -> np.ndarray:
    """``log(x + floor)`` of something that is never negative; ``floor`` is about the sensor's resolution."""
    return np.log(np.maximum(x, 0.0) + floor)


def asinh_of(x: np.ndarray, scale: float) -> np.ndarray:
    """``asinh(x / scale)`` of something with a sign and long tails: linear below ``scale``, logarithmic above."""
    return np.arcsinh(x / scale)


def slope(x: np.ndarray, rate: float) -> np.ndarray:
    """Least-squares slope over the last axis, in units per minute."""
    minutes = np.arange(x.shape[-1]) / (60.0 * rate)
    minutes = minutes - minutes.mean()
    return (x * minutes).sum(axis=-1) / (minutes**2).sum()


def curvature(x: np.ndarray, rate: float) -> np.ndarray:
    """Quadratic coefficient of the least-squares parabola over the last axis, in units per minute squared."""
    minutes = np.arange(x.shape[-1]) / (60.0 * rate)
    minutes = minutes - minutes.mean()
    quadratic = minutes**2 - (minutes**2).mean()  # symmetric grid: orthogonal to 1 and to minutes
    return (x * quadratic).sum(axis=-1) / (quadratic**2).sum()


def asinh_skewness(x: np.ndarray) -> np.ndarray:
    """``asinh`` of the skewness over the last axis; 0 for a constant window."""
    return np.arcsinh(_standardised_moment(x, 3))


def log_kurtosis(x: np.ndarray) -> np.ndarray:
    """Log of the fourth standardised moment (log 3 for a Gaussian); 0, its least value, for a constant window."""
    return np.log(np.maximum(_standardised_moment(x, 4), 1.0))


def _standardised_moment(x: np.ndarray, order: int) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = x.std(axis=-1, keepdims=True)
    # a deviation at the level of rounding is a constant window
    constant = scale <= 1e-9 * np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-300)
    standardised = np.where(constant, 0.0, centred / np.where(constant, 1.0, scale))
    return (standardised**order).mean(axis=-1)


def spectrum(x: np.ndarray, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies ``[F]`` in Hz and power spectral density ``[..., F]`` of linearly detrended, Hann-tapered windows."""
    frequencies, density = signal.periodogram(x, fs=rate, window="hann", detrend="linear", axis=-1)
    return frequencies, density


def band_power(frequencies: np.ndarray, density: np.ndarray, low: float, high: float) -> np.ndarray:
    """Power in ``low <= f < high`` Hz, in squared units of the signal."""
    band = (frequencies >= low) & (frequencies < high)
    return density[..., band].sum(axis=-1) * (frequencies[1] - frequencies[0])


def spectral_entropy(frequencies: np.ndarray, density: np.ndarray, low: float, high: float) -> np.ndarray:
    """Shannon entropy of the spectrum in ``low <= f < high``, over its maximum: 0 a pure tone, 1 white or constant."""
    inside = density[..., (frequencies >= low) & (frequencies < high)]
    total = inside.sum(axis=-1, keepdims=True)
    share = np.where(total > 0, inside / np.where(total > 0, total, 1.0), 1.0 / inside.shape[-1])
    return -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=-1) / np.log(inside.shape[-1])


def peak_frequency(frequencies: np.ndarray, density: np.ndarray, low: float, high: float) -> np.ndarray:
    """Frequency in Hz of the greatest density in ``low <= f < high``."""
    band = np.flatnonzero((frequencies >= low) & (frequencies < high))
    return frequencies[band][density[..., band].argmax(axis=-1)]
