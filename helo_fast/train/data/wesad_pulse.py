"""Pulse and heart rate variability: beats of the wrist pulse signal (NeuroKit2) and 27 features per window."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from scipy import ndimage, signal

from helo_fast.train.data import window_statistics as stats
from helo_fast.train.data.e4 import Signal

# Nine groups of three: HeLo's first place views the 27 values as 9 channels x 3.
PULSE_FEATURES = (
    "hr_mean", "hr_median", "asinh_hr_slope",  # level in 1/min, trend over 5/min per min
    "hr_log_std", "hr_p05", "hr_p95",  # spread
    "log_rmssd", "pnn20", "pnn50",  # beat to beat
    "log_sdnn", "log_cvnn", "log_iqr_nn",  # whole window
    "log_sd2", "log_sd1_sd2", "turning_fraction",  # Poincare plot, share of beats where the series turns
    "log_lf", "log_hf", "log_lf_hf",  # 0.04-0.15 Hz, 0.15-0.4 Hz
    "amplitude_log_mean", "amplitude_log_cv", "amplitude_log_slope",  # pulse height over the preceding trough
    "rise_time", "rise_fraction", "half_width",  # pulse shape, s, share of the beat, s
    "wave_asinh_skewness", "wave_log_kurtosis", "wave_entropy",  # the band-passed signal itself
)  # fmt: skip

NN_RANGE = (0.3, 1.6)  # s: 37.5 to 200 beats per minute
LEVELLING = 3.0  # s over which the amplitude is evened out before beats are looked for
NN_TOLERANCE = 0.25  # largest relative deviation from the median of the surrounding 11 intervals
MIN_INTERVALS = 15  # a window with fewer valid intervals has no heart rate variability of its own
TACHOGRAM_RATE = 4.0  # Hz
_WAVE_FEATURES = 3  # the last ones need no beats


@dataclass(frozen=True)
class Beats:
    """Beats with a usable interval before them; every array is ``[beats]``.

    Args:
        time: time of the systolic peak, s.
        interval: time since the beat before, s.
        successive: whether the beat before is usable too (differences of neighbours need both).
        amplitude: height over the preceding trough, arbitrary units.
        rise: time from that trough to the peak, s.
        width: width at half prominence, s.
    """

    time: np.ndarray
    interval: np.ndarray
    successive: np.ndarray
    amplitude: np.ndarray
    rise: np.ndarray
    width: np.ndarray

    def between(self, begin: float, end: float) -> Beats:
        """The beats from ``begin`` to ``end`` seconds."""
        inside = (self.time >= begin) & (self.time < end)
        return Beats(*(getattr(self, field.name)[inside] for field in fields(self)))


def clean_pulse(bvp: Signal) -> Signal:
    """The pulse signal band-passed to 0.5-8 Hz (NeuroKit2, Elgendi's filter)."""
    import neurokit2 as nk  # heavy, and needed only where features are made

    cleaned = nk.ppg_clean(bvp.samples, sampling_rate=int(bvp.rate), method="elgendi")
    return Signal(np.asarray(cleaned), bvp.rate, bvp.start)


def find_beats(pulse: Signal) -> Beats:
    """Beats of a cleaned pulse signal: systolic peaks by NeuroKit2, intervals that are no heart beats left out.

    Intervals outside of `NN_RANGE`, or further than `NN_TOLERANCE` from the median of their neighbourhood, are
    artefacts (motion, missed or doubled beats). A signal with fewer than `MIN_INTERVALS` peaks has no beats.

    Source: Elgendi et al., 2013.
    """
    import neurokit2 as nk

    x = pulse.samples
    # Even out the amplitude: else one strong artefact raises the threshold, which has the mean power in it, above the
    # beats of the whole condition (motion under stress is strong, the pulse then weak).
    power = ndimage.uniform_filter1d(x**2, round(LEVELLING * pulse.rate))
    level = x / np.sqrt(power + 1e-6 * power.mean() + np.finfo(float).tiny)
    try:
        peaks = nk.ppg_findpeaks(level, sampling_rate=int(pulse.rate), method="elgendi")["PPG_Peaks"]
    except IndexError:  # NeuroKit2 on a signal without one wave
        peaks = np.zeros(0, dtype=np.int64)
    if len(peaks) < MIN_INTERVALS:
        return Beats(*[np.zeros(0)] * 2, np.zeros(0, dtype=bool), *[np.zeros(0)] * 3)
    time = (peaks + _vertex_offset(level, peaks)) / pulse.rate + pulse.start
    interval = np.diff(time)
    local = ndimage.median_filter(interval, size=11, mode="nearest")
    valid = (interval >= NN_RANGE[0]) & (interval <= NN_RANGE[1]) & (np.abs(interval - local) <= NN_TOLERANCE * local)
    trough = np.array([a + x[a:b].argmin() for a, b in zip(peaks[:-1], peaks[1:], strict=True)])
    prominence = signal.peak_prominences(level, peaks[1:], wlen=int(2 * NN_RANGE[1] * pulse.rate))
    width = signal.peak_widths(level, peaks[1:], rel_height=0.5, prominence_data=prominence)[0] / pulse.rate
    return Beats(
        time=time[1:][valid],
        interval=interval[valid],
        successive=np.concatenate([[False], valid[:-1]])[valid],
        amplitude=np.maximum(x[peaks[1:]] - x[trough], 0.0)[valid],
        rise=((peaks[1:] - trough) / pulse.rate)[valid],
        width=width[valid],
    )


def _vertex_offset(x: np.ndarray, peaks: np.ndarray) -> np.ndarray:
    """Vertex of the parabola through each peak and its neighbours, in samples: 64 Hz is too coarse for RMSSD."""
    before, here, after = x[peaks - 1], x[peaks], x[peaks + 1]
    bend = before - 2 * here + after
    return np.where(bend < 0, 0.5 * (before - after) / np.where(bend < 0, bend, 1.0), 0.0).clip(-0.5, 0.5)


def pulse_features(pulse: Signal, beats: Beats, begins: np.ndarray, window: float) -> tuple[np.ndarray, np.ndarray]:
    """The features of `PULSE_FEATURES` for windows of one condition.

    Args:
        pulse: cleaned pulse signal, arbitrary units.
        beats: its usable beats.
        begins: begin of each window ``[W]``, s.
        window: length of a window, s.

    Returns:
        features ``[W, 27]``, NaN where they need beats and the window has fewer than `MIN_INTERVALS` usable ones, and
        ``[W]`` whether that is so (the caller imputes them).
    """
    waves = stats.cut_windows(pulse.samples, np.array([pulse.index(begin) for begin in begins]), round(window * pulse.rate))
    frequencies, density = stats.spectrum(waves, pulse.rate)
    features = np.full((len(begins), len(PULSE_FEATURES)), np.nan)
    features[:, -_WAVE_FEATURES:] = np.stack(
        [
            stats.asinh_skewness(waves),
            stats.log_kurtosis(waves),
            stats.spectral_entropy(frequencies, density, 0.5, 8.0),
        ],
        axis=-1,
    )
    lacking = np.zeros(len(begins), dtype=bool)
    for row, begin in enumerate(begins):
        inside = beats.between(begin, begin + window)
        lacking[row] = inside.successive.sum() < MIN_INTERVALS
        if not lacking[row]:
            features[row, :-_WAVE_FEATURES] = _beat_features(inside)
    return features, lacking


def _beat_features(beats: Beats) -> list[float]:
    nn = beats.interval
    rate = 60.0 / nn
    minutes = (beats.time - beats.time.mean()) / 60.0
    spread = (minutes**2).sum()
    difference = np.diff(nn, prepend=nn[0])[beats.successive]
    rmssd = np.sqrt((difference**2).mean())
    sd1 = rmssd / np.sqrt(2)
    sd2 = np.sqrt(max(2 * nn.var() - sd1**2, 0.0))
    turning = (difference[1:] * difference[:-1] < 0).mean()
    quartiles = np.percentile(nn, [25, 75])
    lf, hf = _tachogram_power(beats)
    height = np.log(beats.amplitude + 1e-2)
    ms = 1e-3  # floor of the logs of intervals: the resolution of the beats' times
    return [
        60.0 / nn.mean(), np.median(rate), np.arcsinh((rate * minutes).sum() / spread / 5),
        np.log(rate.std() + 0.1), np.percentile(rate, 5), np.percentile(rate, 95),
        np.log(rmssd + ms), (np.abs(difference) > 0.02).mean(), (np.abs(difference) > 0.05).mean(),
        np.log(nn.std() + ms), np.log(nn.std() / nn.mean() + ms), np.log(quartiles[1] - quartiles[0] + ms),
        np.log(sd2 + ms), np.log((sd1 + ms) / (sd2 + ms)), turning,
        np.log(lf + ms**2), np.log(hf + ms**2), np.log((lf + ms**2) / (hf + ms**2)),
        height.mean(), np.log(height.std() + 1e-2), (height * minutes).sum() / spread,
        np.median(beats.rise), np.median(beats.rise / nn), np.median(beats.width),
    ]  # fmt: skip


def _tachogram_power(beats: Beats) -> tuple[float, float]:
    """Low (0.04-0.15 Hz) and high (0.15-0.4 Hz) frequency power of the intervals, s^2, resampled to 4 Hz."""
    grid = np.arange(beats.time[0], beats.time[-1], 1 / TACHOGRAM_RATE)
    frequencies, density = stats.spectrum(np.interp(grid, beats.time, beats.interval), TACHOGRAM_RATE)
    return (
        float(stats.band_power(frequencies, density, 0.04, 0.15)),
        float(stats.band_power(frequencies, density, 0.15, 0.4)),
    )
