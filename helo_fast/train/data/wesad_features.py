"""Features of WESAD's wrist signals: 27 pulse, 28 electrodermal, 12 temperature, 4 x 16 acceleration per window."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import signal

from helo_fast.train.data import window_statistics as stats
from helo_fast.train.data.e4 import Signal, SubjectError, WristRecording
from helo_fast.train.data.wesad_pulse import PULSE_FEATURES, clean_pulse, find_beats, pulse_features

FEATURES_VERSION = 1  # raise it with every change of what is computed: cached features are then made anew

MARGIN = 10.0  # s left out at both ends of a condition
MIN_WINDOW = 30.0  # s: 0.04 Hz, the lowest frequency of the heart rate variability, needs about that

# The level of a signal stands once, as its mean; whatever else would repeat it (median, extremes) is relative to the
# mean: levels differ more between subjects than between conditions. Heavy tails are taken through log or asinh.
EDA_FEATURES = (
    "log_mean", "log_median_ratio", "log_min_ratio", "log_max_ratio", "log_std", "log_range",  # the whole signal, uS
    "asinh_slope", "asinh_curvature", "asinh_skewness", "log_kurtosis", "log_mean_abs_diff", "rising_fraction",
    "tonic_log_ratio", "tonic_log_std", "tonic_asinh_slope", "tonic_asinh_net_change",  # below 0.05 Hz
    "phasic_log_std", "phasic_log_max", "phasic_log_area", "phasic_asinh_skewness",  # above 0.05 Hz
    "scr_rate", "scr_log_mean_amplitude", "scr_log_max_amplitude", "scr_log_sum_amplitude",  # responses, 1/min and uS
    "scr_log_rise_time", "scr_log_recovery_time",  # s
    "log_power_low", "log_power_high",  # 0.05-0.15 Hz, 0.15-0.5 Hz
)  # fmt: skip
TEMP_FEATURES = (
    "mean", "median_deviation", "log_min_depth", "log_max_height", "log_std", "log_range",  # degrees Celsius
    "asinh_slope", "asinh_curvature", "asinh_net_change", "asinh_skewness", "log_mean_abs_diff", "rising_fraction",
)  # fmt: skip
ACC_AXES = ("x", "y", "z", "magnitude")
ACC_AXIS_FEATURES = (
    "mean", "asinh_median_deviation", "log_p05_depth", "log_p95_height",  # g
    "log_std", "log_iqr", "log_range", "log_mean_abs_diff",
    "asinh_skewness", "log_kurtosis", "crossing_rate", "log_peak_frequency", "spectral_entropy",  # 1/s, Hz
    "log_power_low", "log_power_middle", "log_power_high",  # 0.1-0.5 Hz, 0.5-3 Hz, 3-10 Hz
)  # fmt: skip
ACC_FEATURES = tuple(f"{axis}_{name}" for axis in ACC_AXES for name in ACC_AXIS_FEATURES)

FEATURES = {"ppg": PULSE_FEATURES, "gsr": EDA_FEATURES, "temp": TEMP_FEATURES, "acc": ACC_FEATURES}

SCR_AMPLITUDE = 0.01  # uS, the customary least amplitude of a skin conductance response
EDA_LOWPASS = 1.0  # Hz: without it each step of the converter is a peak
_EDA_FLOOR, _TEMP_FLOOR, _ACC_FLOOR = 1e-3, 1e-2, 1e-3  # about the sensors' resolution, in uS, degrees, g
_EDA_LEVEL_FLOOR = 0.01  # uS, dry skin
_EDA_TREND, _TEMP_TREND = 0.05, 0.1  # an ordinary change over a minute, in uS, degrees
_SCR_TIME_FLOOR = 0.25  # s, one sample


def window_begins(begin: float, end: float, window: float, stride: float) -> np.ndarray:
    """Begins ``[W]`` of the windows that lie in ``begin + MARGIN .. end - MARGIN`` seconds."""
    count = int(np.floor((end - begin - 2 * MARGIN - window) / stride + 1e-9)) + 1
    return begin + MARGIN + stride * np.arange(max(count, 0))


def extract_features(
    recording: WristRecording, periods: Mapping[str, tuple[float, float]], *, window: float = 60.0, stride: float = 30.0
) -> dict[str, np.ndarray]:
    """Features of every window of every condition of one subject.

    Beats are found condition by condition (so that a strong artefact elsewhere does not raise their threshold), the
    skin conductance is decomposed once over the whole protocol (its 0.05 Hz filter needs room at the ends).

    Args:
        recording: the wrist signals.
        periods: condition -> (begin, end) in seconds on the recording's clock.
        window: length of a window, s, at least `MIN_WINDOW`.
        stride: from the begin of one window to the begin of the next, s, more than 0.

    Returns:
        ``ppg [N, 27]``, ``gsr [N, 28]``, ``temp [N, 12]``, ``acc [N, 64]`` (float32, finite; names in `FEATURES`),
        ``condition [N]``, ``begin [N]`` (s on the recording's clock) and ``imputed [N]``: windows with too few usable
        beats, whose 24 beat features are the median over the condition's other windows, or the subject's if
        the condition has none. Quantities without an event in the window have the value that says so: no skin
        conductance response is rate 0, amplitude 0, rise time 0; none that half recovers is recovery time 0.

    Raises:
        SubjectError: the recording does not cover a condition, a condition is shorter than a window, a signal is
            constant, or no window has enough beats.
    """
    check_coverage(recording, periods, window)
    span = (min(begin for begin, _ in periods.values()) - 60.0, max(end for _, end in periods.values()) + 60.0)
    conductance = Conductance.of(recording.eda.between(*span))
    parts = []
    for condition, (begin, end) in periods.items():
        begins = window_begins(begin, end, window, stride)
        pulse = clean_pulse(recording.bvp.between(begin, end))
        ppg, lacking = pulse_features(pulse, find_beats(pulse), begins, window)
        parts.append(
            {
                "ppg": ppg,
                "gsr": conductance.features(begins, window),
                "temp": temperature_features(_cut(recording.temp, begins, window), recording.temp.rate),
                "acc": acceleration_features(_cut(recording.acc, begins, window), recording.acc.rate),
                "condition": np.full(len(begins), condition),
                "begin": begins,
                "imputed": lacking,
            }
        )
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    impute(arrays["ppg"], arrays["imputed"], arrays["condition"])
    for name, features in FEATURES.items():
        if bad := [features[column] for column in np.flatnonzero(~np.isfinite(arrays[name]).all(axis=0))]:
            raise SubjectError(f"the {name} features {bad} are not finite; look for a broken stretch in the signal.")
        arrays[name] = arrays[name].astype(np.float32)
    return arrays


def check_coverage(recording: WristRecording, periods: Mapping[str, tuple[float, float]], window: float) -> None:
    """Refuse conditions that are not wholly recorded, or too short, and signals that are constant in one of them."""
    for condition, (begin, end) in periods.items():
        if end - begin - 2 * MARGIN < window:
            raise SubjectError(
                f"{condition} lasts {end - begin:g} s: no window of {window:g} s fits between its margins of "
                f"{MARGIN:g} s; use a shorter window or correct START and END."
            )
        for stem, sensor in recording.signals().items():
            if sensor.start > begin + MARGIN or sensor.end < end - MARGIN:
                raise SubjectError(
                    f"{stem} was recorded from {sensor.start:.1f} to {sensor.end:.1f} s and does not cover {condition} "
                    f"({begin:.1f} to {end:.1f} s on the same clock): no windows; is the file cut off, or the offset "
                    "of the protocol's clock wrong (argument `offsets`)?"
                )
            if (np.ptp(sensor.between(begin, end).samples, axis=0) == 0).all():
                raise SubjectError(f"{stem} is constant during {condition}: the sensor measured nothing.")


def impute(features: np.ndarray, lacking: np.ndarray, conditions: np.ndarray) -> None:
    """Fill the NaN of windows that lack beats, in place, with the median over their condition, else the subject.

    Raises:
        SubjectError: every window lacks beats.
    """
    if lacking.all():
        raise SubjectError("BVP: no window has enough heart beats; was the device worn?")
    for condition in np.unique(conditions[lacking]):
        here = conditions == condition
        source = here & ~lacking if (here & ~lacking).any() else ~lacking
        median = np.median(features[source], axis=0)
        rows = np.flatnonzero(here & lacking)
        features[rows] = np.where(np.isnan(features[rows]), median, features[rows])


def _cut(sensor: Signal, begins: np.ndarray, window: float) -> np.ndarray:
    first = np.array([sensor.index(begin) for begin in begins])
    return stats.cut_windows(sensor.samples, first, round(window * sensor.rate))


class Conductance:
    """Skin conductance with its tonic and phasic parts and its responses (NeuroKit2).

    Args:
        whole, tonic, phasic: signals ``[n]`` in microsiemens.
        peak_times, amplitudes, rise_times, recovery_times: of the responses ``[responses]``, s and microsiemens;
            a recovery time is NaN where the next response comes before half recovery.
    """

    def __init__(self, whole: Signal, tonic: np.ndarray, phasic: np.ndarray, responses: Mapping[str, np.ndarray]):
        self.whole = whole
        self.tonic = Signal(tonic, whole.rate, whole.start)
        self.phasic = Signal(phasic, whole.rate, whole.start)
        self.peak_times = whole.start + responses["SCR_Peaks"] / whole.rate
        self.amplitudes = responses["SCR_Amplitude"]
        self.rise_times = responses["SCR_RiseTime"]
        self.recovery_times = responses["SCR_RecoveryTime"]

    @classmethod
    def of(cls, eda: Signal) -> Conductance:
        """Decompose by a 0.05 Hz high-pass, find the responses of at least `SCR_AMPLITUDE`."""
        import neurokit2 as nk

        smooth = signal.sosfiltfilt(signal.butter(4, EDA_LOWPASS, fs=eda.rate, output="sos"), eda.samples)
        parts = nk.eda_phasic(smooth, sampling_rate=int(eda.rate), method="highpass")
        phasic = parts["EDA_Phasic"].to_numpy()
        try:
            # least relative height 0: the relative threshold would depend on the largest response of the session
            _, found = nk.eda_peaks(phasic, sampling_rate=int(eda.rate), method="neurokit", amplitude_min=0.0)
        except (ValueError, IndexError) as error:
            raise SubjectError(f"EDA: NeuroKit2 finds no responses ({error}); was the device worn?") from error
        keep = np.flatnonzero(np.nan_to_num(found["SCR_Amplitude"]) >= SCR_AMPLITUDE)
        responses = {
            key: np.asarray(found[key], dtype=np.float64)[keep]
            for key in ("SCR_Peaks", "SCR_Amplitude", "SCR_RiseTime", "SCR_RecoveryTime")
        }
        return cls(Signal(smooth, eda.rate, eda.start), parts["EDA_Tonic"].to_numpy(), phasic, responses)

    def features(self, begins: np.ndarray, window: float) -> np.ndarray:
        """The features of `EDA_FEATURES` ``[W, 28]`` of the windows that begin at ``begins [W]`` seconds."""
        rate = self.whole.rate
        x, tonic, phasic = (_cut(part, begins, window) for part in (self.whole, self.tonic, self.phasic))
        frequencies, density = stats.spectrum(x, rate)
        step = np.diff(x, axis=-1)
        level = stats.log_of(x.mean(axis=-1), _EDA_LEVEL_FLOOR)
        columns = [
            level,
            *(stats.log_of(f(x, axis=-1), _EDA_LEVEL_FLOOR) - level for f in (np.median, np.min, np.max)),
            stats.log_of(x.std(axis=-1), _EDA_FLOOR),
            stats.log_of(np.ptp(x, axis=-1), _EDA_FLOOR),
            stats.asinh_of(stats.slope(x, rate), _EDA_TREND),
            stats.asinh_of(stats.curvature(x, rate), _EDA_TREND),
            stats.asinh_skewness(x),
            stats.log_kurtosis(x),
            stats.log_of(np.abs(step).mean(axis=-1), _EDA_FLOOR / 10),
            (step > 0).mean(axis=-1),
            stats.log_of(tonic.mean(axis=-1), _EDA_LEVEL_FLOOR) - level,
            stats.log_of(tonic.std(axis=-1), _EDA_FLOOR),
            stats.asinh_of(stats.slope(tonic, rate), _EDA_TREND),
            stats.asinh_of(tonic[:, -1] - tonic[:, 0], _EDA_TREND),
            stats.log_of(phasic.std(axis=-1), _EDA_FLOOR),
            stats.log_of(phasic.max(axis=-1), _EDA_FLOOR),
            stats.log_of(np.abs(phasic).mean(axis=-1), _EDA_FLOOR),
            stats.asinh_skewness(phasic),
            *np.array([self._responses(begin, begin + window) for begin in begins]).T,
            stats.log_of(stats.band_power(frequencies, density, 0.05, 0.15), _EDA_FLOOR**2),
            stats.log_of(stats.band_power(frequencies, density, 0.15, 0.5), _EDA_FLOOR**2),
        ]
        return np.stack(columns, axis=-1)

    def _responses(self, begin: float, end: float) -> list[float]:
        inside = (self.peak_times >= begin) & (self.peak_times < end)
        amplitude = self.amplitudes[inside] if inside.any() else np.zeros(1)
        rise = self.rise_times[inside] if inside.any() else np.zeros(1)
        recovery = self.recovery_times[inside]
        recovery = recovery[np.isfinite(recovery)] if np.isfinite(recovery).any() else np.zeros(1)
        return [
            60.0 * inside.sum() / (end - begin),
            *np.log(np.array([amplitude.mean(), amplitude.max(), amplitude.sum()]) + _EDA_FLOOR),
            *np.log(np.array([rise.mean(), recovery.mean()]) + _SCR_TIME_FLOOR),
        ]


def temperature_features(x: np.ndarray, rate: float) -> np.ndarray:
    """The features of `TEMP_FEATURES` ``[W, 12]`` of windows ``x [W, n]`` in degrees Celsius at ``rate`` Hz."""
    second = max(round(rate), 1)
    step = np.diff(x, axis=-1)
    mean = x.mean(axis=-1)
    columns = [
        mean,
        np.median(x, axis=-1) - mean,
        stats.log_of(mean - x.min(axis=-1), _TEMP_FLOOR),
        stats.log_of(x.max(axis=-1) - mean, _TEMP_FLOOR),
        stats.log_of(x.std(axis=-1), _TEMP_FLOOR),
        stats.log_of(np.ptp(x, axis=-1), _TEMP_FLOOR),
        stats.asinh_of(stats.slope(x, rate), _TEMP_TREND),
        stats.asinh_of(stats.curvature(x, rate), _TEMP_TREND),
        stats.asinh_of(x[:, -5 * second :].mean(axis=-1) - x[:, : 5 * second].mean(axis=-1), _TEMP_TREND),
        stats.asinh_skewness(x),
        stats.log_of(np.abs(step).mean(axis=-1), _TEMP_FLOOR / 10),
        (step > 0).mean(axis=-1),
    ]
    return np.stack(columns, axis=-1)


def acceleration_features(acc: np.ndarray, rate: float) -> np.ndarray:
    """The features of `ACC_FEATURES` ``[W, 64]`` of windows ``acc [W, n, 3]`` in g at ``rate`` Hz."""
    magnitude = np.linalg.norm(acc, axis=-1, keepdims=True)
    x = np.moveaxis(np.concatenate([acc, magnitude], axis=-1), 1, -1)  # [W, 4, n]
    frequencies, density = stats.spectrum(x, rate)
    p05, p25, median, p75, p95 = np.percentile(x, [5, 25, 50, 75, 95], axis=-1)
    mean = x.mean(axis=-1)
    above = x > mean[..., None]
    columns = [
        mean,
        stats.asinh_of(median - mean, 10 * _ACC_FLOOR),
        stats.log_of(mean - p05, _ACC_FLOOR),
        stats.log_of(p95 - mean, _ACC_FLOOR),
        stats.log_of(x.std(axis=-1), _ACC_FLOOR),
        stats.log_of(p75 - p25, _ACC_FLOOR),
        stats.log_of(np.ptp(x, axis=-1), _ACC_FLOOR),
        stats.log_of(np.abs(np.diff(x, axis=-1)).mean(axis=-1), _ACC_FLOOR),
        stats.asinh_skewness(x),
        stats.log_kurtosis(x),
        (above[..., 1:] != above[..., :-1]).mean(axis=-1) * rate,
        np.log(stats.peak_frequency(frequencies, density, 0.1, 10.0)),
        stats.spectral_entropy(frequencies, density, 0.1, 10.0),
        *(
            stats.log_of(stats.band_power(frequencies, density, low, high), _ACC_FLOOR**2)
            for low, high in ((0.1, 0.5), (0.5, 3.0), (3.0, 10.0))
        ),
    ]
    return np.stack(columns, axis=-1).reshape(len(acc), -1)
