"""The WESAD data module, on small files and on the published recordings where they are."""

import inspect

import numpy as np
import pandas as pd
import pytest

from helo_fast.train.cli import main
from helo_fast.train.data import wesad_subject
from helo_fast.train.data.base import EmotionDataModule
from helo_fast.train.data.e4 import SubjectError
from helo_fast.train.data.wesad import WESADData
from helo_fast.train.data.wesad_features import FEATURES
from helo_fast.train.data.wesad_pulse import PULSE_FEATURES, clean_pulse, find_beats
from helo_fast.train.data.wesad_quest import CONDITIONS, LABEL_SETS, PANAS_ITEMS, read_quest
from helo_fast.train.data.wesad_subject import OFFSETS


def test_data_module(pristine, warm, open_data, small):
    module = open_data(pristine, warm)
    got = module.data
    assert got.names == ("happy", "excited", "enthusiastic", "inspired", "proud", "nervous", "annoyed", "stressed", "frustrated")
    assert got.subject.tolist() == ["S2"] * 15 + ["S3"] * 15
    assert got.trial[3] == "S2/TSST" and len(set(got.trial.tolist())) == 10
    assert {"S2: E4 zip used", "S3: E4 folder used"} <= set(got.notes) and "2 of 15" in got.notes[0]
    assert not np.array_equal(got.modalities["ppg"][:15], got.modalities["ppg"][15:])
    expected = np.array([max(small.RATINGS["Fun"][PANAS_ITEMS.index(item)] - 1, 0) + 0.1 for item in LABEL_SETS["e9"]])
    np.testing.assert_allclose(got.labels[got.trial == "S3/Fun"], [expected / expected.sum()] * 3, rtol=1e-6)
    sizes = {"n_channels": 9, "dim_eeg": 3, "dim_gsr": 28, "dim_ppg": 12, "dim_video": 64, "emotion_classes": 9}
    assert module.dims == sizes
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert batch["eeg"].shape[1:] == (9, 3) and batch["video"].shape[1:] == (64,) and batch["labels"].shape[1:] == (9,)
    assert open_data(pristine, warm, label_set="panas").data.labels.shape == (30, 23)


def test_every_argument_of_the_base_is_spelled_out():
    own, base = (inspect.signature(cls).parameters for cls in (WESADData, EmotionDataModule))
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
    for name, parameter in base.items():
        assert own[name].default == parameter.default and own[name].annotation == parameter.annotation
        assert f"        {name}: " in WESADData.__doc__


def test_features_are_made_once(pristine, tmp_path, monkeypatch, open_data):
    first = open_data(pristine, tmp_path, subjects=["S2"]).load()
    monkeypatch.setattr(wesad_subject, "extract_features", lambda *_, **__: pytest.fail("made again"))
    second = open_data(pristine, tmp_path, subjects=["S2"]).load()
    assert second.notes == first.notes
    for name in FEATURES:
        np.testing.assert_array_equal(first.modalities[name], second.modalities[name])
    for change in ({"stride": 15.0}, {"window": 40.0}, {"offsets": {"S2": 21.0}}):
        with pytest.raises(pytest.fail.Exception):
            open_data(pristine, tmp_path, subjects=["S2"], **change).load()


def test_processes_give_the_same(pristine, tmp_path, warm, open_data):
    alone, together = open_data(pristine, warm).load(), open_data(pristine, tmp_path, jobs=2).load()
    for name in FEATURES:
        np.testing.assert_array_equal(alone.modalities[name], together.modalities[name])


def test_bad_subjects_are_skipped_and_noted(root, tmp_path, warm, open_data):
    archive = root / "S2/S2_E4_Data.zip"
    archive.write_bytes(archive.read_bytes()[:-5000])
    got = open_data(root, warm, skip_bad_subjects=True, subjects=["S2", "S3", "S9"]).load()
    assert set(got.subject.tolist()) == {"S3"}
    skipped = [note for note in got.notes if "skipped" in note]
    assert len(skipped) == 2 and skipped[0].startswith("S2: skipped: ") and "damaged or cut off" in skipped[0]
    assert skipped[1].startswith("S9: skipped: ")
    (root / "S3/S3_quest.csv").unlink()
    with pytest.raises(ValueError, match="(?s)no usable subject.*S2: skipped.*S3: skipped.*S3_quest.csv"):
        open_data(root, tmp_path, skip_bad_subjects=True).load()


def test_unknown_offset_and_wrong_root(root, tmp_path, open_data, small):
    (root / "S2").rename(root / "S20")
    for path in (root / "S20").iterdir():
        path.rename(path.with_name(path.name.replace("S2_", "S20_")))
    (root / "S20/S20_quest.csv").write_text(small.quest("S20"))
    with pytest.raises(SubjectError, match=r"^S20: no offset.*`offsets`.*'S20': 1200.0"):
        open_data(root, tmp_path, subjects=["S20"]).load()
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        open_data(root / "nowhere", tmp_path).load()
    with pytest.raises(FileNotFoundError, match="holds no folder S2, S3"):
        open_data(root / "S3", tmp_path).load()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("label_set", "e10"),
        ("window", 20.0),
        ("window", float("nan")),
        ("stride", 0.0),
        ("jobs", 0),
        ("subjects", []),
        ("subjects", ["S2"] * 2),
    ],
)
def test_bad_arguments_are_named(tmp_path, argument, value, open_data):
    with pytest.raises(ValueError, match=argument):
        open_data(tmp_path, tmp_path, **{argument: value})


@pytest.fixture(scope="session")
def published(request, shared):
    folder = shared / "data" / "wesad"
    if not folder.is_dir():
        message = f"no recordings at {folder} (set HELO_FAST_SHARED)"
        (pytest.fail if request.config.getoption("--require-shared") else pytest.skip)(message)
    return folder


@pytest.fixture(scope="session")
def features(tmp_path_factory):
    """Where the features of the published recordings are kept from test to test."""
    return str(tmp_path_factory.mktemp("features"))


def rises(published, subject, offset):
    """Whether heart rate and skin conductance are higher under stress than at baseline."""
    files = wesad_subject.find_files(published, subject, allow_pickle=False)
    recording, periods = files.read(), read_quest(files.quest, subject).periods
    rate, conductance = {}, {}
    for name in ("Base", "TSST"):
        begin, end = (time + offset for time in periods[name])
        rate[name] = -np.mean(find_beats(clean_pulse(recording.bvp.between(begin, end))).interval)
        conductance[name] = recording.eda.between(begin + 10, end - 10).samples.mean()
    return rate["TSST"] > rate["Base"], conductance["TSST"] > conductance["Base"]


def test_stress_shows_at_the_known_offsets_and_not_without(published):
    names = [name for name in OFFSETS if (published / name).is_dir()]
    assert len(names) >= 10
    matched = np.array([rises(published, name, OFFSETS[name]) for name in names])
    unmatched = np.array([rises(published, name, 0.0) for name in names])
    assert (matched.sum(axis=0) >= len(names) - 1).all(), matched
    assert (unmatched.sum(axis=0) <= len(names) // 4).all(), unmatched


def test_published_subjects(published, features):
    module = WESADData(str(published), subjects=["S2", "S5", "S17"], cache_dir=features)
    got = module.data
    for name in ("S2", "S5", "S17"):
        rows = got.subject == name
        assert 88 <= rows.sum() <= 96
        assert set(got.trial[rows].tolist()) == {f"{name}/{condition}" for condition in CONDITIONS}
    # S2, TSST: Happy 2, Excited 4, Enthusiastic 3, Inspired 1, Proud 2, Nervous 4, Annoyed 3, Stressed 3, Frustrated 3
    by_hand = np.array([1.1, 3.1, 2.1, 0.1, 1.1, 3.1, 2.1, 2.1, 2.1]) / 16.9
    rows = got.trial == "S2/TSST"
    np.testing.assert_allclose(got.labels[rows], np.tile(by_hand, (rows.sum(), 1)), rtol=1e-5)
    assert "S5: Medi 1: the rating of Nervous is missing, taken as 1" in got.notes
    assert len(np.unique(got.labels, axis=0)) == 15
    rate = got.modalities["ppg"][:, PULSE_FEATURES.index("hr_mean")]
    assert (rate > 45).all() and (rate < 140).all()


def test_bfloat16_learns_the_recordings_as_float32_does(published, features, tmp_path):
    """The loss curves lie nearer to each other, epoch by epoch, than to that of another seed."""

    def curve(name, seed, precision):
        data = ["--data", "wesad", "--data.root", str(published), "--data.cache_dir", features, "--data.subjects", "[S2,S5,S17]"]
        run = ["--protocol", "loso", "--folds", "S2", "--seeds", str(seed), "--epochs", "6", "--trainer.precision", precision, "--quiet"]
        assert main(["train", *data, *run, "--baselines", "false", "--out", str(tmp_path / name)]) == 0
        return pd.read_csv(tmp_path / name / "folds" / str(seed) / "S2" / "history.csv")["train_loss"].to_numpy()

    exact, half, other = curve("exact", 0, "32-true"), curve("half", 0, "bf16-mixed"), curve("other", 1, "32-true")
    assert len(exact) == 6 and exact[-1] < 0.9 * exact[0]  # it learns
    assert 0 < np.abs(half - exact).max() < 0.5 * np.abs(other - exact).min()
