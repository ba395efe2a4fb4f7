"""A small WESAD that the tests write: two subjects whose heart rates and skin responses are known."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from helo_fast.train.data.e4 import read_e4
from helo_fast.train.data.wesad import WESADData
from helo_fast.train.data.wesad_features import extract_features

QUEST = """# Subj;{subject};;
# ORDER;Base;TSST;Medi 1;Fun;Medi 2;sRead;fRead;;
# START;1;3.05;5.1;7.2;9.3;20;21;;
# END;2.5;4.55;7;9.1;11.2;20.3;21.3;;
;;;
{panas}
;;;
# STAI;3;2;1;4;2;3;;
# SSSQ;5;5;4;4;3;5;;
"""


class Small:
    """What is in the files, and how they are written."""

    OFFSET = 20.0  # s
    SECONDS = 720.0
    PERIODS = {"Base": (60, 170), "TSST": (185, 295), "Medi 1": (310, 420), "Fun": (440, 550), "Medi 2": (570, 680)}
    AT = {name: (begin + 20.0, end + 20.0) for name, (begin, end) in PERIODS.items()}  # on the recording's clock
    HEART_RATE = {"Base": 60, "TSST": 90, "Medi 1": 66, "Fun": 72, "Medi 2": 63}  # beats per minute
    RATINGS = {name: [1 + (3 * row + column) % 5 for column in range(24)] for row, name in enumerate(PERIODS)}
    START = "1500000000.000000"
    RATES = {"ACC": 32, "BVP": 64, "EDA": 4, "TEMP": 4}  # Hz

    @classmethod
    def quest(cls, subject="S2"):
        """Text of the questionnaire: the common 23 ratings, Sad, and under stress Angry 2, Irritated 3, Sad 1."""
        rows = {name: [str(rating) for rating in ratings] for name, ratings in cls.RATINGS.items()}
        rows["TSST"] = rows["TSST"][:23] + ["2", "3", "1"]
        return QUEST.format(subject=subject, panas="\n".join(f"# PANAS;{';'.join(row)};;" for row in rows.values()))

    @classmethod
    def signals(cls, seed=0):
        """The pulse beats as HEART_RATE says, skin conductance responds every 11 s and more under stress, the wrist is still."""
        rng = np.random.default_rng(seed)
        rate = np.full(round(cls.SECONDS * 64), 66.0)
        for name, (begin, end) in cls.AT.items():
            rate[round(begin * 64) : round(end * 64)] = cls.HEART_RATE[name]
        phase = 2 * np.pi * np.cumsum(rate / 60 / 64)
        bvp = 50 * np.sin(phase) + 12 * np.sin(2 * phase + 0.6) + rng.normal(size=phase.size)
        t = np.arange(round(cls.SECONDS * 4)) / 4
        stress = (t > cls.AT["TSST"][0]) & (t < cls.AT["TSST"][1])
        eda = 1.0 + 2.0 * stress + 0.02 * np.sin(t / 40)
        for onset in np.arange(5, cls.SECONDS - 20, 11.0):
            since = np.maximum(t - onset, 0)
            eda += (0.3 if stress[round(onset * 4)] else 0.05) * since / 2 * np.exp(1 - since / 2)
        temp = 33 - 0.1 * t / 60 + 0.01 * rng.normal(size=t.size)
        acc = np.round(np.array([0, 0, 64.0]) + 2 * rng.normal(size=(round(cls.SECONDS * 32), 3)))
        return {"ACC": acc, "BVP": bvp.round(2), "EDA": eda.round(6), "TEMP": temp.round(2)}

    @classmethod
    def write_csv(cls, folder, stem, samples, newline="\n"):
        """One E4 file."""
        columns = 3 if stem == "ACC" else 1
        rows = [", ".join([cls.START] * columns), ", ".join([f"{cls.RATES[stem]:.6f}"] * columns)]
        rows += [",".join(map(str, row)) for row in samples.reshape(len(samples), -1).tolist()]
        (folder / f"{stem}.csv").write_text(newline.join(rows) + newline, newline="")


@pytest.fixture(scope="session")
def small():
    return Small


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """The folder of S2 (zip) and S3 (unpacked)."""
    root = tmp_path_factory.mktemp("wesad")
    for seed, subject in enumerate(("S2", "S3")):
        unpacked = root / subject / f"{subject}_E4_Data"
        unpacked.mkdir(parents=True)
        (root / subject / f"{subject}_quest.csv").write_text(Small.quest(subject))
        for stem, samples in Small.signals(seed).items():
            Small.write_csv(unpacked, stem, samples)
    with zipfile.ZipFile(root / "S2/S2_E4_Data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in (root / "S2/S2_E4_Data").iterdir():
            archive.write(file, file.name)
    shutil.rmtree(root / "S2/S2_E4_Data")
    return root


@pytest.fixture
def root(pristine, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "wesad"))


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """A cache that the tests with undamaged files share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def open_data():
    """``open_data(root, cache, **arguments)``: the data module on the small files."""

    def make(root, cache, **arguments):
        arguments = {"window": 30.0, "jobs": 1, "offsets": {"S2": Small.OFFSET, "S3": Small.OFFSET}} | arguments
        return WESADData(str(root), cache_dir=str(cache), **arguments)

    return make


@pytest.fixture(scope="session")
def recording(pristine):
    """What S3's device measured."""
    return read_e4(pristine / "S3/S3_E4_Data")


@pytest.fixture(scope="session")
def features(recording):
    """S3's features, three windows of 30 s per condition."""
    return extract_features(recording, Small.AT, window=30.0, stride=30.0)
