"""Features of wrist signals: names, values that were put in, defined values where nothing happens, refusals."""

import numpy as np
import pytest

from helo_fast.train.data import window_statistics as stats
from helo_fast.train.data.e4 import Signal, SubjectError
from helo_fast.train.data.wesad_features import ACC_FEATURES, EDA_FEATURES, FEATURES, TEMP_FEATURES, extract_features, window_begins
from helo_fast.train.data.wesad_pulse import PULSE_FEATURES, clean_pulse, find_beats


def column(features, name, feature, condition=None):
    rows = slice(None) if condition is None else features["condition"] == condition
    return features[name][rows, FEATURES[name].index(feature)]


def test_counts_and_names():
    assert [len(names) for names in (PULSE_FEATURES, EDA_FEATURES, TEMP_FEATURES, ACC_FEATURES)] == [27, 28, 12, 64]
    assert all(len(set(names)) == len(names) for names in FEATURES.values())
    assert list(FEATURES) == ["ppg", "gsr", "temp", "acc"]


def test_windows_stay_ten_seconds_inside():
    np.testing.assert_array_equal(window_begins(100, 210, 30, 30), [110, 140, 170])
    np.testing.assert_array_equal(window_begins(100, 209.9, 30, 30), [110, 140])
    np.testing.assert_array_equal(window_begins(0.3, 80.3, 60, 30), [10.3])
    assert window_begins(0, 79.9, 60, 30).size == 0


def test_features_are_finite_and_find_what_was_put_in(features, small):
    assert {name: features[name].shape for name in FEATURES} == {"ppg": (15, 27), "gsr": (15, 28), "temp": (15, 12), "acc": (15, 64)}
    assert all(features[name].dtype == np.float32 and np.isfinite(features[name]).all() for name in FEATURES)
    assert not features["imputed"].any()
    assert features["condition"].tolist() == [name for name in small.PERIODS for _ in range(3)]
    for condition, rate in small.HEART_RATE.items():
        np.testing.assert_allclose(column(features, "ppg", "hr_mean", condition), rate, rtol=0.01)
        np.testing.assert_allclose(column(features, "ppg", "hr_median", condition), rate, rtol=0.01)
    assert (np.exp(column(features, "ppg", "log_rmssd")) < 0.02).all()  # a steady pulse, s
    np.testing.assert_allclose(np.exp(column(features, "gsr", "log_mean", "TSST")) - 0.01, 3.2, atol=0.3)
    np.testing.assert_allclose(column(features, "gsr", "scr_rate"), 60 / 11, atol=2.1)  # one every 11 s
    amplitude = np.exp(column(features, "gsr", "scr_log_mean_amplitude"))
    assert amplitude[features["condition"] == "TSST"].min() > 3 * amplitude[features["condition"] == "Fun"].max()
    np.testing.assert_allclose(column(features, "temp", "asinh_slope"), np.arcsinh(-0.1 / 0.1), atol=0.1)
    np.testing.assert_allclose(column(features, "acc", "z_mean"), 1, atol=0.01)
    np.testing.assert_allclose(column(features, "acc", "magnitude_mean"), 1, atol=0.01)
    np.testing.assert_allclose(column(features, "acc", "x_log_std"), np.log(2 / 64), atol=0.1)


def changed(recording, **signals_):
    return type(recording)(**{name: signals_.get(name, getattr(recording, name)) for name in ("acc", "bvp", "eda", "temp")})


def noisy(recording, begin, end):
    """The pulse replaced by a slow drift, which has no beats, from begin to end seconds."""
    bvp = recording.bvp.samples.copy()
    first, last = recording.bvp.index(begin), recording.bvp.index(end)
    bvp[first:last] = np.linspace(0, 1, last - first)
    return changed(recording, bvp=Signal(bvp, 64.0))


def test_windows_without_beats_are_imputed_from_their_condition(recording, features, small):
    begin = small.AT["TSST"][0] + 10
    got = extract_features(noisy(recording, begin - 5, begin + 29), small.AT, window=30.0, stride=30.0)
    assert np.flatnonzero(got["imputed"]).tolist() == [3]
    np.testing.assert_allclose(got["ppg"][3, :24], np.median(got["ppg"][4:6, :24], axis=0), rtol=1e-6)
    assert (got["ppg"][3, 24:] != np.median(got["ppg"][4:6, 24:], axis=0)).all()  # these need no beats
    np.testing.assert_array_equal(got["acc"], features["acc"])


@pytest.mark.parametrize("all_of_it", [True, False])
def test_a_condition_without_enough_beats_takes_the_subjects_median(recording, small, all_of_it):
    begin, end = small.AT["TSST"]
    for part in [(begin - 1, end + 1)] if all_of_it else [(begin - 1, begin + 28), (begin + 36, begin + 61), (begin + 69, end + 1)]:
        recording = noisy(recording, *part)
    got = extract_features(recording, small.AT, window=30.0, stride=30.0)
    lacking = np.flatnonzero(got["imputed"]).tolist()
    assert lacking == [3, 4, 5]
    np.testing.assert_allclose(got["ppg"][3, :24], np.median(np.delete(got["ppg"], lacking, axis=0)[:, :24], axis=0), rtol=1e-6)


def test_recording_without_a_pulse_is_refused(recording, small):
    with pytest.raises(SubjectError, match="heart beats.*worn"):
        extract_features(noisy(recording, 0, 720), small.AT, window=30.0)


@pytest.mark.parametrize("name", ["acc", "bvp", "eda", "temp"])
def test_constant_sensor_is_refused(recording, name, small):
    signal = getattr(recording, name)
    flat = changed(recording, **{name: Signal(np.broadcast_to(signal.samples[0], signal.samples.shape), signal.rate)})
    with pytest.raises(SubjectError, match=f"{name.upper()} is constant during Base"):
        extract_features(flat, small.AT, window=30.0)


def test_quiet_window_has_defined_values(recording, small):
    """No response of the skin, a dead-still wrist, a constant temperature: defined values, no NaN."""
    eda = np.where(np.arange(2880) < 1160, recording.eda.samples, 1.0)  # flat from 290 s on, after TSST began
    temp = np.where(np.arange(2880) < 1160, recording.temp.samples, 33.0)
    eda[-1] = temp[-1] = 1.1
    parts = {"Base": small.AT["Base"], "TSST": (small.AT["TSST"][0], 320.0 + 90)}
    got = extract_features(changed(recording, eda=Signal(eda, 4.0), temp=Signal(temp, 4.0)), parts, window=30.0)
    assert all(np.isfinite(got[name]).all() for name in FEATURES)
    last = -1
    assert got["gsr"][last, EDA_FEATURES.index("scr_rate")] == 0
    assert got["gsr"][last, EDA_FEATURES.index("scr_log_sum_amplitude")] == pytest.approx(np.log(1e-3))
    assert got["gsr"][last, EDA_FEATURES.index("scr_log_recovery_time")] == pytest.approx(np.log(0.25))
    assert got["temp"][last, TEMP_FEATURES.index("asinh_skewness")] == 0
    assert got["temp"][last, TEMP_FEATURES.index("log_std")] == pytest.approx(np.log(0.01))


def test_condition_shorter_than_a_window_is_refused(recording, small):
    with pytest.raises(SubjectError, match="Base lasts 110 s: no window of 100 s"):
        extract_features(recording, small.AT, window=100.0)


def test_statistics_in_closed_form():
    t = np.arange(1920) / 32
    line_, tone = 3 + 0.5 * t / 60, 2 * np.sin(2 * np.pi * 1.5 * t)
    np.testing.assert_allclose(stats.slope(line_, 32), 0.5)
    np.testing.assert_allclose(stats.curvature(line_ + 4 * (t / 60) ** 2, 32), 4)
    np.testing.assert_allclose(stats.slope((t / 60 - (t / 60).mean()) ** 2, 32), 0, atol=1e-12)
    frequencies, density = stats.spectrum(np.stack([tone, tone + 5 + t]), 32)
    np.testing.assert_allclose(stats.band_power(frequencies, density, 0.5, 3), 2, rtol=1e-3)  # amplitude^2 / 2
    np.testing.assert_allclose(stats.band_power(frequencies, density, 3, 10), 0, atol=1e-3)
    np.testing.assert_allclose(stats.peak_frequency(frequencies, density, 0.1, 10), 1.5)
    assert (stats.spectral_entropy(frequencies, density, 0.1, 10) < 0.25).all()
    white = np.random.default_rng(0).normal(size=1920)
    assert stats.spectral_entropy(*stats.spectrum(white, 32), 0.1, 10) > 0.9
    constant = np.full(1920, 0.1)
    assert stats.asinh_skewness(constant) == 0 and stats.log_kurtosis(constant) == 0
    assert stats.spectral_entropy(frequencies, np.zeros(961), 0.1, 10) == pytest.approx(1)
    skewed = np.random.default_rng(0).exponential(size=200_000)
    np.testing.assert_allclose([stats.asinh_skewness(skewed), stats.log_kurtosis(skewed)], [np.arcsinh(2), np.log(9)], rtol=0.05)


def test_beats_are_found_beside_an_artefact(recording, small):
    bvp = recording.bvp.between(*small.AT["Base"])
    samples = bvp.samples.copy()
    samples[640:960] += 5000 * np.sin(np.arange(320) / 9)  # 100 times the pulse, for 5 s
    beats = find_beats(clean_pulse(Signal(samples, bvp.rate, bvp.start)))
    after = beats.between(small.AT["Base"][0] + 20, small.AT["Base"][1])
    assert len(after.interval) > 80  # of 89
    np.testing.assert_allclose(np.median(after.interval), 1.0, atol=0.01)
