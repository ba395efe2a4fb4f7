"""The data container, the data module's sizes, batches and errors, the registry, and the DMER reader."""

import subprocess
import sys

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from jsonargparse import ArgumentParser

from helo_fast.train.data import DATASETS, resolve
from helo_fast.train.data.base import EmotionData, EmotionDataModule
from helo_fast.train.data.dmer import COLUMNS, SUBJECTS, DMERData, SubjectError
from helo_fast.train.data.synthetic import SyntheticData

WIDTHS = {"eeg": 6, "gsr": 3, "ppg": 2, "video": 5}
PARTS = ("train", "validation", "test")


def fields(subjects: int = 5, trials: int = 4, windows: int = 3, seed: int = 0) -> dict:
    """Fields of a valid EmotionData: 60 rows, subject effects far larger than the rest, 3 labels."""
    random = np.random.default_rng(seed)
    rows = subjects * trials * windows
    effect = np.repeat(10 * np.arange(subjects), trials * windows)[:, None]
    return {
        "modalities": {name: random.normal(size=(rows, width)) * 3 + effect for name, width in WIDTHS.items()},
        "labels": np.repeat(random.dirichlet([1, 1, 1], size=subjects * trials), windows, axis=0),
        "subject": np.repeat([f"S{i}" for i in range(subjects)], trials * windows),
        "trial": np.tile(np.repeat([f"clip {i}" for i in range(trials)], windows), subjects),
        "names": ("calm", "glad", "sad"),
    }


class Own(EmotionDataModule):
    """A user's data set, as the documentation says to write one."""

    default_n_channels = 2

    def __init__(self, data: dict | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.given, self.loads = data or fields(), 0

    def load(self) -> EmotionData:
        self.loads += 1
        return EmotionData(**self.given)


# ---- EmotionData


def test_valid_data_become_float32():
    data = EmotionData(**fields())
    assert len(data) == 60 and data.labels.dtype == np.float32
    assert all(value.dtype == np.float32 for value in data.modalities.values())


def _set(*path, value):
    def change(data):
        target = data
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _set("modalities", "gsr", (17, 2), value=np.nan),
            r"modality 'gsr': subject 'S1', trial 'clip 1', row 17, column 2 is nan .*impute",
        ),
        (_set("modalities", "eeg", (0, 1), value=1e39), r"modality 'eeg': subject 'S0', trial 'clip 0', row 0, column 1 is inf"),
        (_set("modalities", "ppg", value=np.zeros((59, 2))), r"modality 'ppg' has 59 rows but labels has 60: give one row per window"),
        (_set("modalities", "ppg", value=np.zeros(60)), r"modality 'ppg': expected non-empty \[N, features\] real numbers, got \(60,\)"),
        (_set("modalities", "ppg", value=np.zeros((60, 0))), r"modality 'ppg': expected non-empty"),
        (_set("modalities", "ppg", value=np.full((60, 2), "x")), r"modality 'ppg': expected .* real numbers"),
        (_set("modalities", value={}), r"modalities: expected a non-empty dict"),
        (_set("labels", 13, value=0), r"labels: subject 'S1', trial 'clip 0', row 13 is all zero: drop it"),
        (_set("labels", 13, value=[1.2, -0.2, 0]), r"row 13 has a negative entry: clip .*'glad': -0.2"),
        (_set("labels", 13, value=[50, 30, 20]), r"row 13 sums not to 1: use labels / labels.sum\(axis=1, keepdims=True\) \(1 such"),
        (_set("labels", (13, 0), value=np.inf), r"labels: .*row 13, column 0 is inf"),
        (_set("labels", value=np.zeros((0, 3))), r"labels: expected non-empty"),
        (_set("names", value=("calm", "glad")), r"labels has 3 columns and names has 2"),
        (_set("names", value=("calm", "glad", "calm")), r"names: \['calm'\]: every label needs a name of its own"),
        (_set("names", value="abc"), r"names: expected a tuple of strings"),
        (_set("subject", value=np.arange(60)), r"subject: expected \[N\] non-empty strings, got \(60,\) int64: use astype\(str\)"),
        (_set("subject", value=["S0"] * 59), r"subject has 59 rows but labels has 60"),
        (_set("trial", 3, value=""), r"trial: expected \[N\] non-empty strings"),
    ],
)
def test_bad_data_are_named(change, message):
    data = fields()
    change(data)
    with pytest.raises(ValueError, match=message):
        EmotionData(**data)


def test_label_sums_have_a_tolerance():
    data = fields()
    data["labels"] = data["labels"] * (1 + 9e-5)
    EmotionData(**data)
    data["labels"] = data["labels"] * (1 + 5e-5)
    with pytest.raises(ValueError, match="sums not to 1"):
        EmotionData(**data)


# ---- EmotionDataModule


def test_sizes_and_batches():
    data = Own(batch_size=16, fold="S2")
    data.setup("fit")
    assert data.dims == {"n_channels": 2, "dim_eeg": 3, "dim_gsr": 3, "dim_ppg": 2, "dim_video": 5, "emotion_classes": 3}
    assert data.label_names == ("calm", "glad", "sad") and data.fold_names() == ["S0", "S1", "S2", "S3", "S4"]
    batches = list(data.train_dataloader())
    assert [len(batch["index"]) for batch in batches] == [16, 16, 4]
    first = batches[0]
    assert {name: tuple(value.shape[1:]) for name, value in first.items()} == {
        "eeg": (2, 3), "gsr": (3,), "ppg": (2,), "video": (5,), "labels": (3,), "index": ()
    }  # fmt: skip
    assert first["index"].dtype == torch.int64 and all(first[name].dtype == torch.float32 for name in ("eeg", "labels"))
    for batch in batches:
        rows = batch["index"].numpy()
        np.testing.assert_array_equal(batch["labels"].numpy(), data.data.labels[rows])
        for place, modality in data.places.items():
            mean, std = (data.normalisation[f"{modality}.{name}"] for name in ("mean", "std"))
            expected = (data.data.modalities[modality][rows] - mean) / std
            np.testing.assert_allclose(batch[place].flatten(1).numpy(), expected, rtol=1e-5, atol=1e-6)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    for loader, part in zip(loaders, PARTS):
        rows = torch.cat([batch["index"] for batch in loader]).tolist()
        assert (sorted(rows) if part == "train" else rows) == getattr(data.current, part).tolist()
    assert torch.cat([batch["index"] for batch in data.predict_dataloader()]).tolist() == list(range(60))
    assert data.loads == 1
    np.testing.assert_array_equal(data.train_labels.numpy(), data.data.labels[data.current.train])


def test_places_are_configuration():
    places = {"eeg": "video", "gsr": "eeg", "ppg": "gsr", "video": "eeg"}  # one left out, one twice
    data = Own(places=places, n_channels=5)
    data.setup()
    assert data.dims == {"n_channels": 5, "dim_eeg": 1, "dim_gsr": 6, "dim_ppg": 3, "dim_video": 6, "emotion_classes": 3}
    assert data.tensors["gsr"].equal(data.tensors["video"])
    features = data.features(np.array([4, 2]))
    assert features.shape == (2, 14) and np.array_equal(features[:, 5:11], data.tensors["gsr"][[4, 2]])


def test_normalisation_of_another_run():
    trained = Own(fold="S1")
    trained.setup()
    other = Own(fields(subjects=1, seed=5))  # one subject alone: no fold exists, prediction is possible all the same
    other.use_normalisation(trained.normalisation)
    other.setup("predict")
    batch = next(iter(other.predict_dataloader()))
    mean, std = trained.normalisation["gsr.mean"], trained.normalisation["gsr.std"]
    np.testing.assert_allclose(batch["gsr"], (other.data.modalities["gsr"] - mean) / std, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="only subject"):
        other.setup("fit")
    damaged = trained.normalisation | {"gsr.std": np.array([1.0, 0.0, 1.0])}
    for statistics in ({}, {**trained.normalisation, "eeg.mean": np.zeros(7)}, damaged):
        with pytest.raises(ValueError, match="statistics: expected the shapes"):
            other.use_normalisation(statistics)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"places": {"eeg": "eeg"}}, "places: expected a modality for each of eeg, gsr, ppg, video"),
        ({"places": {"eeg": "eeg", "gsr": "gsr", "ppg": "temp", "video": "video"}}, "'ppg' names modality 'temp', .* not among eeg, gsr"),
        ({"n_channels": 4}, "n_channels: 4 does not divide the 6 features of modality 'eeg'"),
        ({"n_channels": 0}, "n_channels: expected an integer >= 1, got 0"),
        ({"fold": "S77"}, "fold: no rows of subject 'S77': choose from S0, S1"),
        ({"protocol": "kfold"}, "protocol: expected one of loso, subject-dependent, random, got 'kfold'"),
        ({"normalise": "z"}, "normalise: expected one of train, subject, none"),
        ({"validation": 1.0}, "validation: expected a share between 0 and 1"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Own(**arguments).setup()


def test_number_of_channels_is_asked_for():
    class Bare(Own):
        default_n_channels = None

    with pytest.raises(ValueError, match=r"n_channels: not given: set --data.n_channels, or default_n_channels in the class Bare"):
        Bare()
    assert Bare(n_channels=3).dims["n_channels"] == 3


def test_random_protocol_says_that_it_leaks():
    data = Own(protocol="random")
    with pytest.warns(UserWarning, match="protocol random leaks"):
        data.setup()
    assert any("leaks" in note for note in data.notes) and any("validation = test" in note for note in data.notes)


# ---- registry, command line, missing extra


def test_registry():
    assert resolve("synthetic") is SyntheticData and resolve("dmer") is DMERData
    assert resolve("helo_fast.train.data.dmer.DMERData") is resolve("helo_fast.train.data.dmer:DMERData") is DMERData
    with pytest.raises(ValueError, match="none of synthetic, dmer, wesad; give one of these or an import path"):
        resolve("demr")
    with pytest.raises(ImportError, match="cannot import 'no_such_package'"):
        resolve("no_such_package.Data")
    for wrong in ("helo_fast.train.data.dmer.read_mat", "helo_fast.train.data.dmer.Nothing"):
        with pytest.raises(ValueError, match="not a subclass of .*EmotionDataModule"):
            resolve(wrong)
    lazy = "import sys, helo_fast.train.data as d; sys.exit('lightning' in sys.modules or 'torchmetrics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", lazy], timeout=120).returncode == 0 and set(DATASETS) >= {"synthetic", "dmer"}


def test_missing_extra_says_what_to_install():
    code = "import sys; sys.modules['torchmetrics'] = None\nimport importlib.util as u\nfind = u.find_spec\n"
    code += "u.find_spec = lambda name, *a: None if name == 'torchmetrics' else find(name, *a)\nimport helo_fast.train"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and 'needs torchmetrics: pip install "helo-fast[train]"' in done.stderr


@pytest.mark.parametrize("data", [SyntheticData, DMERData])
def test_command_line_sees_every_argument(data):
    parser = ArgumentParser()
    parser.add_class_arguments(data, "data")
    help_text = parser.format_help()
    assert "transductive" in help_text and "--data.normalise {train,subject,none}" in help_text  # docstring of the base
    required = ["--data.root", "x"] if data is DMERData else ["--data.n_trials", "7"]
    parsed = parser.parse_args([*required, "--data.protocol", "random", "--data.seed", "4", "--data.fold", "12"])
    built = parser.instantiate(parsed).data if hasattr(parser, "instantiate") else parser.instantiate_classes(parsed).data
    assert (built.protocol, built.seed, built.fold) == ("random", 4, "12")


# ---- DMER


def subject_arrays(rows: int = 12, clips: int = 4, k: int = 10, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    features = np.arange(rows)[:, None] * 1000.0 + np.arange(913)  # a value tells its row and column
    return {"feas": features, "vids": np.arange(rows)[:, None] % clips, "dis_label": random.dirichlet(np.ones(k), size=clips)}


def write_v5(path, arrays):
    scipy.io.savemat(path, arrays)


def write_v73(path, arrays):
    with h5py.File(path, "w", userblock_size=512) as file:  # MATLAB: a text header, then arrays as columns
        for name, value in arrays.items():
            file[name] = np.asarray(value, dtype=np.float64).T
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(116) + b"\0" * 8 + b"\x00\x02IM")


@pytest.mark.parametrize("write", [write_v5, write_v73])
def test_dmer_reads_both_formats(tmp_path, write):
    for seed, name in enumerate(("10", "2", "80")):
        write(tmp_path / f"{name}.mat", subject_arrays(seed=seed))
    write(tmp_path / "3.mat", subject_arrays())
    data = DMERData(str(tmp_path), fold="10")
    data.setup()
    assert data.fold_names() == ["2", "10", "80"] and len(data.data) == 36
    assert data.dims == {"n_channels": 18, "dim_eeg": 5, "dim_gsr": 28, "dim_ppg": 27, "dim_video": 768, "emotion_classes": 10}
    starts = {"eeg": 0, "gsr": 90, "ppg": 118, "video": 145}
    for name, value in data.data.modalities.items():
        expected = np.arange(12)[:, None] * 1000.0 + starts[name] + np.arange(COLUMNS[name])
        assert np.array_equal(value, np.tile(expected, (3, 1)))
    ratings = subject_arrays(seed=1)["dis_label"]  # subject 2
    np.testing.assert_allclose(data.data.labels[:12], np.tile(ratings, (3, 1)), rtol=1e-6)
    assert data.data.trial[:5].tolist() == ["0", "1", "2", "3", "0"]
    notes = " ".join(data.data.notes)
    assert "3 of 73 subjects present; absent: 1, 5" in notes and "not read: 3 (.mat)" in notes and "divided" not in notes


def test_dmer_subject_list():
    spans = "1 2 5-12 14 15 18-26 28-30 32-80".split()
    listed = [str(i) for span in spans for i in range(int(span.split("-")[0]), int(span.split("-")[-1]) + 1)]
    assert list(SUBJECTS) == listed and len(SUBJECTS) == 73


def test_dmer_ratings_are_normalised(tmp_path):
    arrays = subject_arrays()
    arrays["dis_label"] = arrays["dis_label"] * 7
    write_v5(tmp_path / "1.mat", arrays)
    data = DMERData(str(tmp_path), label_names=list("abcdefghij")).data
    np.testing.assert_allclose(data.labels[:4], arrays["dis_label"] / 7, rtol=1e-6)
    assert data.names == tuple("abcdefghij") and "divided by their sum for subjects 1" in data.notes[-1]


def _array(name, change):
    def apply(arrays):
        arrays[name] = change(arrays[name])

    return apply


def _cell(name, index, value):
    def change(array):
        array = np.array(array, dtype=np.float64)
        array[index] = value
        return array

    return _array(name, change)


@pytest.mark.parametrize("write", [write_v5, write_v73])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_cell("feas", (5, 91), np.nan), r"subject '7': .*7\.mat: feas: row 5, column 91 \(gsr 1\) is nan"),
        (_cell("feas", (0, 912), np.inf), r"feas: row 0, column 912 \(video 767\) is inf"),
        (_array("feas", lambda a: a[:, :912]), r"feas: expected 913 columns \(EEG 90.*got shape \(12, 912\)"),
        (_array("feas", lambda a: a.T), r"feas: expected 913 columns.*\(it is transposed\)"),
        (_array("feas", lambda a: a[:11]), r"vids: expected \[11, 1\], one clip per row of feas, got \(12, 1\)"),
        (_cell("vids", 3, 1.5), r"vids: row 3 is 1.5, but dis_label has clips 0 to 3: expected whole numbers"),
        (_array("vids", lambda a: a + 1), r"vids: row 3 is 4, but .* 0 to 3: these look 1-based: subtract 1"),
        (_cell("vids", 2, -1), r"vids: row 2 is -1"),
        (_cell("vids", 2, np.nan), r"vids: row 2 is nan"),
        (_cell("dis_label", 1, 0), r"dis_label: row 1 is \[0.0, .*not all 0"),
        (_cell("dis_label", (1, 2), -0.5), r"dis_label: row 1 is .*-0.5"),
        (lambda arrays: arrays.pop("vids"), r"7\.mat: lacks vids: expected the variables feas, vids, dis_label"),
    ],
)  # fmt: skip
def test_dmer_bad_files_are_named(tmp_path, write, change, message):
    arrays = subject_arrays()
    change(arrays)
    write(tmp_path / "7.mat", arrays)
    write(tmp_path / "8.mat", subject_arrays())
    with pytest.raises(SubjectError, match=message):
        _ = DMERData(str(tmp_path)).data
    data = DMERData(str(tmp_path), skip_bad_subjects=True).data
    assert set(data.subject) == {"8"} and any(note.startswith("subject 7: skipped:") for note in data.notes)


@pytest.mark.parametrize("write", [write_v5, write_v73])
@pytest.mark.parametrize("keep", [0, 50, 600, 3000, 40_000])
def test_dmer_cut_off_files(tmp_path, write, keep):
    write(tmp_path / "1.mat", subject_arrays())
    content = (tmp_path / "1.mat").read_bytes()
    (tmp_path / "1.mat").write_bytes(content[:keep])
    with pytest.raises(SubjectError, match=r"subject '1': .*1\.mat: .*(cannot be read as a MATLAB file|lacks)"):
        _ = DMERData(str(tmp_path)).data


def test_dmer_folder_and_choice(tmp_path):
    with pytest.raises(FileNotFoundError, match="root: .*nowhere is no folder"):
        _ = DMERData(str(tmp_path / "nowhere")).data
    with pytest.raises(FileNotFoundError, match="holds no .*found no .mat file"):
        _ = DMERData(str(tmp_path)).data
    write_v5(tmp_path / "anna.mat", subject_arrays())
    write_v5(tmp_path / "1.mat", subject_arrays(k=9))
    assert set(DMERData(str(tmp_path), subjects=["anna"]).data.subject) == {"anna"}
    with pytest.raises(FileNotFoundError, match="subjects: 'ben': no file"):
        _ = DMERData(str(tmp_path), subjects=["anna", "ben"]).data
    with pytest.raises(SubjectError, match="subject '1': .*dis_label: 9 columns, but subject 'anna' has 10"):
        _ = DMERData(str(tmp_path), subjects=["anna", "1"]).data
    with pytest.raises(ValueError, match="label_names: 2 names for the 10 columns"):
        _ = DMERData(str(tmp_path), subjects=["anna"], label_names=["a", "b"]).data
    (tmp_path / "1.mat").write_bytes(b"no MATLAB file")
    with pytest.raises(ValueError, match="no usable subject: .*subject 1: skipped"):
        _ = DMERData(str(tmp_path), subjects=["1"], skip_bad_subjects=True).data
