"""One subject of WESAD: which files there are, and the features of its windows, made once and kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from helo_fast.train.data.cache import FeatureCache
from helo_fast.train.data.e4 import E4_FILES, SubjectError, WristRecording, read_e4
from helo_fast.train.data.wesad_features import FEATURES_VERSION, extract_features
from helo_fast.train.data.wesad_pickle import read_wrist_pickle
from helo_fast.train.data.wesad_quest import Questionnaire, read_quest

# E4 time = protocol time + offset, in seconds: the E4 was started 15 to 24 minutes before the protocol's clock.
# Found by matching window statistics of the synchronised files to the raw pulse signal, to 0.02 s.
OFFSETS = {
    "S2": 1413.77, "S3": 1029.45, "S4": 1398.80, "S5": 1186.69, "S6": 1162.20, "S7": 1135.63, "S8": 1041.10,
    "S9": 918.78, "S10": 1193.70, "S11": 1120.72, "S13": 1192.57, "S14": 1289.57, "S15": 1142.58, "S16": 1294.43,
    "S17": 1178.20,
}  # fmt: skip


@dataclass(frozen=True)
class SubjectFiles:
    """The files of one subject that are read.

    Args:
        subject: for example ``"S2"``.
        kind: ``"E4 zip"``, ``"E4 folder"`` or ``"pickle"``.
        recording: the zip, folder or pickle.
        quest: the questionnaire.
    """

    subject: str
    kind: str
    recording: Path
    quest: Path

    @property
    def inputs(self) -> list[Path]:
        """Every file that the features depend on."""
        folder = self.kind == "E4 folder"
        return [self.quest, *([self.recording / f"{stem}.csv" for stem in E4_FILES] if folder else [self.recording])]

    def read(self) -> WristRecording:
        """The wrist signals."""
        return read_wrist_pickle(self.recording, self.subject) if self.kind == "pickle" else read_e4(self.recording)


def find_files(root: Path, subject: str, allow_pickle: bool) -> SubjectFiles:
    """The subject's E4 zip, else its unpacked folder, else (with ``allow_pickle``) its pickle.

    Raises:
        SubjectError: there is none of them.
    """
    folder = root / subject
    if not folder.is_dir():
        present = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "none"
        raise SubjectError(f"{folder} is no folder (folders there: {present}); correct `subjects`.")
    quest = folder / f"{subject}_quest.csv"
    archive, unpacked, pickled = folder / f"{subject}_E4_Data.zip", folder / f"{subject}_E4_Data", folder / f"{subject}.pkl"
    if archive.is_file():
        return SubjectFiles(subject, "E4 zip", archive, quest)
    if unpacked.is_dir():
        for stem in E4_FILES:
            if not (unpacked / f"{stem}.csv").is_file():
                raise SubjectError(f"{unpacked} has no {stem}.csv; unpack the E4 zip again into this folder.")
        return SubjectFiles(subject, "E4 folder", unpacked, quest)
    if pickled.is_file():
        if allow_pickle:
            return SubjectFiles(subject, "pickle", pickled, quest)
        raise SubjectError(
            f"{folder} has only {pickled.name} of the recording, and a pickle can run code; restore {archive.name}, or, if you "
            "trust the file, set allow_pickle."
        )
    raise SubjectError(f"{folder} has neither {archive.name} nor the folder {unpacked.name}; download one of them again.")


@dataclass(frozen=True)
class Subject:
    """One subject, ready to make its features.

    Args:
        files: what is read.
        quest: times and ratings.
        offset: recording time = protocol time + offset, s; 0 for the synchronised pickle.
        window: length of a window, s.
        stride: from the begin of one window to the begin of the next, s.
        cache: where features are kept.
    """

    files: SubjectFiles
    quest: Questionnaire = field(repr=False)
    offset: float
    window: float
    stride: float
    cache: FeatureCache = field(repr=False)

    @classmethod
    def find(
        cls, root: Path, subject: str, *, offsets: dict[str, float], allow_pickle: bool, window: float, stride: float, cache: FeatureCache
    ) -> Subject:
        """Find the files and read the questionnaire; the recording is not opened.

        Raises:
            SubjectError: a file is missing, the questionnaire is malformed, or the subject's offset is not known.
        """
        files = find_files(root, subject, allow_pickle)
        quest = read_quest(files.quest, subject)
        if files.kind == "pickle":
            offset = 0.0
        elif subject in offsets:
            offset = offsets[subject]
        else:
            raise SubjectError(
                f"no offset between the E4's clock and the protocol's is known (known: {', '.join(offsets)}); give it as "
                f"`offsets`, for example {{{subject!r}: 1200.0}}, in seconds: E4 time = protocol time + offset."
            )
        return cls(files, quest, offset, window, stride, cache)

    @property
    def recipe(self) -> dict[str, Any]:
        """What decides the features besides the files."""
        return {
            "data": "wesad",
            "version": FEATURES_VERSION,
            "libraries": {name: version(name) for name in ("neurokit2", "scipy")},
            "subject": self.files.subject,
            "kind": self.files.kind,
            "offset": self.offset,
            "window": self.window,
            "stride": self.stride,
        }

    def cached(self) -> dict[str, np.ndarray] | None:
        """The features if they were made before, else None."""
        return self.cache.find(self.files.inputs, self.recipe)

    def features(self) -> dict[str, np.ndarray]:
        """The arrays of `extract_features`, from the cache or made and kept."""
        return self.cache.get_or_make(self.files.inputs, self.recipe, self._make)

    def features_or_error(self) -> dict[str, np.ndarray] | SubjectError:
        """`features`, or what is wrong with the subject: so that a pool of processes finishes the others."""
        try:
            return self.features()
        except SubjectError as error:
            return error

    def _make(self) -> dict[str, np.ndarray]:
        periods = {name: (begin + self.offset, end + self.offset) for name, (begin, end) in self.quest.periods.items()}
        try:
            return extract_features(self.files.read(), periods, window=self.window, stride=self.stride)
        except SubjectError as error:
            if str(self.files.recording) in str(error):
                raise
            raise SubjectError(f"{self.files.recording}: {error}") from error
