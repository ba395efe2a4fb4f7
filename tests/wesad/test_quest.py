"""Questionnaires: times, ratings, label distributions, and what is said of malformed ones."""

import numpy as np
import pytest

from helo_fast.train.data.e4 import SubjectError
from helo_fast.train.data.wesad_quest import LABEL_SETS, PANAS_ITEMS, label_distribution, protocol_seconds, read_quest


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("7.08", 428), ("50.3", 3030), ("2.5", 170), ("32", 1920), ("109", 6540), ("115.5", 6950), ("70.19", 4219), (" 104.27 ", 6267)],
)
def test_times_are_minutes_and_seconds(text, seconds):
    assert protocol_seconds(text) == seconds


@pytest.mark.parametrize("text", ["7.6", "7.60", "7.085", "", "x", "-1", ".5", "7,08", "1e3"])
def test_times_that_are_none(text):
    with pytest.raises(ValueError, match="minute"):
        protocol_seconds(text)


def test_label_distribution_by_hand():
    ratings = dict.fromkeys(PANAS_ITEMS, 1) | {"Happy": 4, "Nervous": 2, "Annoyed": 5}
    got = label_distribution(ratings, LABEL_SETS["e9"])
    np.testing.assert_allclose(got, np.array([3.1, 0.1, 0.1, 0.1, 0.1, 1.1, 4.1, 0.1, 0.1]) / 8.9, rtol=1e-6)
    assert got.dtype == np.float32
    np.testing.assert_allclose(label_distribution(dict.fromkeys(PANAS_ITEMS, 1), PANAS_ITEMS), 1 / 23, rtol=1e-6)


def test_quest_is_keyed_by_name(tmp_path, small):
    path = tmp_path / "S2_quest.csv"
    path.write_text(small.quest().replace("Subj;S2", "Subj:;S2").replace("Base;TSST;Medi 1;Fun;Medi 2", "Base;TSST;Medi 2;Fun;Medi 1"))
    quest = read_quest(path, "S2")
    assert quest.periods["Medi 2"] == small.PERIODS["Medi 1"] and quest.periods["Medi 1"] == small.PERIODS["Medi 2"]
    assert list(quest.periods) == ["Base", "TSST", "Medi 2", "Fun", "Medi 1"]
    assert [quest.ratings["Medi 2"][item] for item in PANAS_ITEMS] == small.RATINGS["Medi 1"][:23]
    assert quest.ratings["TSST"]["Sad"] == 1 and quest.ratings["TSST"]["Angry"] == 2
    assert quest.ratings["Base"]["Sad"] == small.RATINGS["Base"][23]


def test_the_one_missing_rating(tmp_path, small):
    rows = small.quest("S5").splitlines()
    cells = rows[7].split(";")
    cells[PANAS_ITEMS.index("Nervous") + 1] = "Nan"
    rows[7] = ";".join(cells)
    (tmp_path / "quest.csv").write_text("\n".join(rows))
    quest = read_quest(tmp_path / "quest.csv", "S5")
    assert quest.ratings["Medi 1"]["Nervous"] == 1
    assert "Nervous" in quest.notes[0]
    (tmp_path / "quest.csv").write_text("\n".join(rows).replace("S5", "S6"))
    with pytest.raises(SubjectError, match=r"line 8 \(PANAS, Medi 1\), rating 16 \(Nervous\).*'Nan'"):
        read_quest(tmp_path / "quest.csv", "S6")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# Subj;S2", "# Subj;S3", r"line 1.*'S3'.*'S2'"),
        ("# ORDER", "# ORDRE", "one row ORDER, found 0"),
        ("Medi 1;Fun", "Fun;Fun", r"line 2 \(ORDER\).*Medi 1"),
        ("START;1;", "START;1.75;", r"line 3 \(START, Base\).*'1.75'"),
        ("END;2.5;", "END;;", r"line 4 \(END, Base\).*''"),
        ("5.1;7.2;9.3;20;21;;", "5.1", r"line 3 \(START\): no time for Fun"),
        ("END;2.5;", "END;0.5;", "Base ends"),
        ("# PANAS;1;2;3;4;5", "# PANAS;1;2;3;4;6", r"line 6 \(PANAS, Base\), rating 5 \(Annoyed\).*'6'"),
        ("# PANAS;1;2;3;4;5", "# PANAS;1;2;3;4;;5", r"line 6 \(PANAS, Base\): expected 24 ratings, found 25"),
        ("# PANAS;1;2;3;4;5", "# PANIC;1;2;3;4;5", "expected 5 PANAS rows.*found 4"),
    ],
)
def test_malformed_quest_names_file_row_and_subject(root, tmp_path, old, new, message, open_data):
    path = root / "S2/S2_quest.csv"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(SubjectError, match=f"(?s)^S2: .*S2_quest.csv.*{message}"):
        open_data(root, tmp_path).load()
