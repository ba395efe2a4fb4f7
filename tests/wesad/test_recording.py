"""Recordings: E4 zips, folders and pickles, and what is said of damaged ones."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from helo_fast.train.data.e4 import SubjectError, read_e4
from helo_fast.train.data.wesad_features import FEATURES
from helo_fast.train.data.wesad_pickle import NumpyOnlyUnpickler, read_wrist_pickle


def test_zip_and_folder_are_read_alike(pristine, recording, tmp_path, small):
    expected = small.signals(1)
    with zipfile.ZipFile(tmp_path / "nested.zip", "w") as archive:
        for file in (pristine / "S3/S3_E4_Data").iterdir():
            archive.write(file, f"S3_E4_Data/{file.name}")
    for got in (recording, read_e4(tmp_path / "nested.zip")):
        np.testing.assert_array_equal(got.acc.samples, expected["ACC"] / 64)  # g
        for stem in ("BVP", "EDA", "TEMP"):
            np.testing.assert_array_equal(got.signals()[stem].samples, expected[stem])
        assert [signal.rate for signal in got.signals().values()] == [32, 64, 4, 4]
        assert all(signal.end == 720 for signal in got.signals().values())


def test_other_line_ends_and_another_start(pristine, root, small):
    folder = root / "S3/S3_E4_Data"
    small.write_csv(folder, "EDA", small.signals(1)["EDA"], newline="\r\n")
    path = folder / "TEMP.csv"
    path.write_text(path.read_text().replace("1500000000.000000", "1500000002.000000", 1))
    got = read_e4(folder)
    np.testing.assert_array_equal(got.eda.samples, small.signals(1)["EDA"])
    assert got.temp.start == 2 and got.temp.index(3.0) == 4 and got.eda.start == 0


def line(number, text):
    def edit(content):
        lines = content.split("\n")
        lines[number - 1] = text
        return "\n".join(lines)

    return edit


@pytest.mark.parametrize(
    ("stem", "edit", "message"),
    [
        ("BVP", line(2, "32.0"), "line 2: the rate is 32 Hz.*64 Hz"),
        ("ACC", line(2, "32.0, 32.0, 16.0"), "line 2: expected the rate"),
        ("BVP", line(1, "time"), "line 1: expected the UTC start"),
        ("ACC", line(1, "1500000000.0"), "line 1: expected the UTC start"),
        ("EDA", line(7, "nan"), "line 7: expected 1 finite.*'nan'"),
        ("EDA", line(9, "-inf"), "line 9"),
        ("TEMP", line(11, "warm"), "line 11.*'warm'"),
        ("TEMP", line(12, ""), "line 12"),
        ("ACC", line(5, "1,2"), "line 5: expected 3 finite.*'1,2'"),
        ("BVP", lambda content: "", "0 lines, no samples"),
        ("BVP", lambda content: content[: len(content) // 3], "was recorded from 0.0 to 240.0 s and does not cover TSST.*`offsets`"),
    ],
)
def test_bad_e4_file_names_file_line_and_subject(root, tmp_path, stem, edit, message, open_data):
    path = root / f"S3/S3_E4_Data/{stem}.csv"
    path.write_text(edit(path.read_text()))
    with pytest.raises(SubjectError, match=f"(?s)^S3: .*S3_E4_Data.*{stem}.*{message}"):
        open_data(root, tmp_path, subjects=["S3"]).load()


def remove(*paths):
    def edit(root):
        for path in paths:
            (root / path).unlink()

    return edit


def truncate(root):
    path = root / "S2/S2_E4_Data.zip"
    path.write_bytes(path.read_bytes()[:-5000])


def corrupt(root):
    path = root / "S2/S2_E4_Data.zip"
    content = bytearray(path.read_bytes())
    content[5000:5100] = bytes(100)
    path.write_bytes(content)


def change_method(root):
    path = root / "S2/S2_E4_Data.zip"
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 10] = 99  # of the last file in the directory: a compression that nothing knows
    path.write_bytes(content)


def empty_member(root):
    with zipfile.ZipFile(root / "S2/S2_E4_Data.zip", "w") as archive:
        archive.writestr("ACC.csv", "1500000000, 1500000000, 1500000000\n32, 32, 32\n1,2,3\n")
        archive.writestr("BVP.csv", "")


@pytest.mark.parametrize(
    ("subject", "damage", "message"),
    [
        ("S2", truncate, "S2_E4_Data.zip is damaged or cut off.*download"),
        ("S2", corrupt, "S2_E4_Data.zip is damaged or cut off.*download"),
        ("S2", change_method, "S2_E4_Data.zip is damaged or cut off.*download"),
        ("S2", empty_member, "S2_E4_Data.zip:BVP.csv has 0 lines"),
        ("S2", remove("S2/S2_E4_Data.zip"), "neither S2_E4_Data.zip nor the folder S2_E4_Data"),
        ("S2", remove("S2/S2_quest.csv"), "S2_quest.csv is missing"),
        ("S3", remove("S3/S3_E4_Data/EDA.csv"), "has no EDA.csv"),
        ("S7", lambda root: None, "S7 is no folder.*S2, S3.*`subjects`"),
    ],
)
def test_bad_files_name_subject_and_mend(root, tmp_path, subject, damage, message, open_data):
    damage(root)
    with pytest.raises(SubjectError, match=f"(?s)^{subject}: .*{message}.*skip_bad_subjects"):
        open_data(root, tmp_path, subjects=[subject]).load()


def test_zip_without_a_file(root, tmp_path, open_data):
    with zipfile.ZipFile(root / "S2/S2_E4_Data.zip", "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(SubjectError, match=r"has no ACC.csv \(it holds \['readme.txt'\]\)"):
        open_data(root, tmp_path, subjects=["S2"]).load()


@pytest.fixture
def write_pickle(small):
    """Writes an ``SX.pkl`` as published: the signals on the protocol's clock (no offset), columns ``[n, 1]``."""

    def write(path, subject="S2", protocol=2, **changes):
        wrist = {
            stem: samples[round(small.OFFSET * small.RATES[stem]) :].reshape(-1, 3 if stem == "ACC" else 1)
            for stem, samples in small.signals(0).items()
        }
        content = {"subject": subject, "signal": {"wrist": wrist | changes, "chest": {}}, "label": np.zeros(3, dtype=np.int32)}
        path.write_bytes(pickle.dumps(content, protocol=protocol))

    return write


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickle_gives_the_features_of_the_zip(root, tmp_path, warm, protocol, open_data, write_pickle):
    expected = open_data(root, warm, subjects=["S2"]).load()
    (root / "S2/S2_E4_Data.zip").unlink()
    write_pickle(root / "S2/S2.pkl", protocol=protocol)
    with pytest.raises(SubjectError, match="S2.pkl.*pickle can run code.*allow_pickle"):
        open_data(root, tmp_path, subjects=["S2"]).load()
    got = open_data(root, tmp_path, subjects=["S2"], allow_pickle=True, offsets=None).load()
    assert "S2: pickle used" in got.notes and "S2: E4 zip used" in expected.notes
    for name in FEATURES:
        np.testing.assert_allclose(got.modalities[name], expected.modalities[name], rtol=1e-3, atol=2e-2)
    np.testing.assert_array_equal(got.labels, expected.labels)


def test_zip_is_preferred_to_the_pickle(root, warm, open_data):
    (root / "S2/S2.pkl").write_bytes(b"never opened")
    assert "S2: E4 zip used" in open_data(root, warm, subjects=["S2"], allow_pickle=True).load().notes


class Touch:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickle_of_python_2_and_of_other_layouts(tmp_path, small, write_pickle):
    path = tmp_path / "S2.pkl"
    acc = np.asfortranarray(small.signals(0)["ACC"])  # another memory order
    write_pickle(path, protocol=2, ACC=acc, EDA=small.signals(0)["EDA"].astype(">f4"))
    # Python 2 names numpy.core, and writes an array's bytes as a string, which protocol 2 of Python 3 cannot do
    content = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path.write_bytes(content)
    got = read_wrist_pickle(path, "S2")
    np.testing.assert_array_equal(got.acc.samples * 64, acc)
    np.testing.assert_array_equal(got.eda.samples, small.signals(0)["EDA"].astype(np.float32))
    state = b"(I1\n(I2\nI1\nt%sI00\nS'\\x00\\x00\\x00\\x00\\x00\\x00\\xf0?\\x00\\x00\\x00\\x00\\x00\\x00\\x00@'\ntb."
    dtype = b"cnumpy\ndtype\n(S'f8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR" + state % dtype
    loaded = NumpyOnlyUnpickler(io.BytesIO(array), encoding="latin-1").load()
    np.testing.assert_array_equal(loaded.array(), [[1.0], [2.0]])


def test_forged_arrays_are_refused(tmp_path, write_pickle):
    path = tmp_path / "S2.pkl"
    write_pickle(path, EDA=np.array([{}, None], dtype=object))
    with pytest.raises(SubjectError, match="S2.pkl was refused.*array of 'O8'"):
        read_wrist_pickle(path, "S2")
    write_pickle(path, protocol=4, EDA=np.arange(40.0))
    path.write_bytes(path.read_bytes().replace(np.arange(40.0).tobytes(), bytes(320)).replace(b"K(\x85", b"K)\x85"))  # 41 samples
    with pytest.raises(SubjectError, match=r"\['EDA'\] is damaged"):
        read_wrist_pickle(path, "S2")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickle_that_is_a_program_is_refused_and_not_run(tmp_path, protocol):
    mark, path = tmp_path / "ran", tmp_path / "S2.pkl"
    path.write_bytes(pickle.dumps({"signal": {"wrist": {"ACC": Touch(mark)}}}, protocol=protocol))
    with pytest.raises(SubjectError, match=r"S2.pkl was refused.*it names (pathlib|__builtin__)"):
        read_wrist_pickle(path, "S2")
    assert not mark.exists()


def test_bad_pickles(tmp_path, write_pickle):
    path = tmp_path / "S2.pkl"
    for changes, message in (
        ({"subject": "S3"}, "subject 'S3'.*'S2'"),
        ({"BVP": np.zeros((8, 2))}, r"\['BVP'\] has shape \(8, 2\)"),
        ({"EDA": np.array([[1.0], [np.nan]])}, r"\['EDA'\], row 1.*not finite"),
        ({"TEMP": "warm"}, r"\['TEMP'\] is no array"),
    ):
        write_pickle(path, **changes)
        with pytest.raises(SubjectError, match=f"S2.pkl.*{message}"):
            read_wrist_pickle(path, "S2")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SubjectError, match=r"S2.pkl was refused or is damaged"):
        read_wrist_pickle(path, "S2")
    path.write_bytes(pickle.dumps({"signal": {}}))
    with pytest.raises(SubjectError, match="no 'wrist'"):
        read_wrist_pickle(path, "S2")
