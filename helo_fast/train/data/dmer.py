"""DMER (Zenodo 11194571): EEG, GSR and PPG features and face-video embeddings of 73 subjects, a MATLAB file each.

``{root}/{subject}.mat`` holds ``feas [N, 913]`` (EEG 18 channels x 5 bands | GSR 28 | PPG 27 | video 768),
``vids [N, 1]``, the 0-based clip of each row, and ``dis_label [V, K]``, each clip's ratings, normalised here to sum to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.io

from helo_fast.train.data.base import EmotionData, EmotionDataModule

COLUMNS = {"eeg": 90, "gsr": 28, "ppg": 27, "video": 768}
N_COLUMNS = sum(COLUMNS.values())
VARIABLES = ("feas", "vids", "dis_label")
SUBJECTS = tuple(
    str(subject) for span in ((1, 2), (5, 12), (14, 15), (18, 26), (28, 30), (32, 80)) for subject in range(span[0], span[1] + 1)
)
"""The 73 subjects of the released training script."""


class SubjectError(ValueError):
    """One subject's file cannot be used; ``skip_bad_subjects`` turns this into a note."""


def read_mat(path: Path) -> dict[str, np.ndarray]:
    """The three variables of a subject's file, MATLAB v5 (scipy) or v7.3 (HDF5, stored transposed).

    Raises:
        SubjectError: the file is damaged, is no MATLAB file, or lacks a variable.
    """
    try:
        if h5py.is_hdf5(path):
            with h5py.File(path, "r") as file:
                # MATLAB stores columns first, so HDF5 sees every array transposed.
                found = {name: file[name][()].T for name in VARIABLES if isinstance(file.get(name), h5py.Dataset)}
        else:
            found = scipy.io.loadmat(path, variable_names=VARIABLES)
    except Exception as error:  # scipy and h5py raise a dozen types for damaged files; all are passed on
        raise SubjectError(f"{path}: cannot be read as a MATLAB file ({error}): copy or download it again") from error
    missing = [name for name in VARIABLES if name not in found]
    if missing:
        raise SubjectError(f"{path}: lacks {', '.join(missing)}: expected the variables {', '.join(VARIABLES)}")
    return {name: found[name] for name in VARIABLES}


def _real(path: Path, name: str, value: Any) -> np.ndarray:
    value = np.asarray(value)
    if value.ndim != 2 or value.dtype.kind not in "fiub" or 0 in value.shape:
        raise SubjectError(f"{path}: {name}: expected a non-empty matrix of real numbers, got shape {value.shape} of {value.dtype}")
    return value


def _column(column: int) -> str:
    """Name of a column of ``feas`` for a message; both numbers count from 0: ``column 91 (gsr 1)``."""
    modality = [name for name, width in COLUMNS.items() for _ in range(width)]
    return f"column {column} ({modality[column]} {column - modality.index(modality[column])})"


def read_subject(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Reads and checks one subject.

    Args:
        path: ``{root}/{subject}.mat``.

    Returns:
        Features [N, 913] float32, clip [N] int64, the clips' label distributions [N, K] float64 by row, and whether the
        file's ratings had to be normalised.

    Raises:
        SubjectError: anything in the file is not as described above; the message names file, row and column.
    """
    values = {name: _real(path, name, value) for name, value in read_mat(path).items()}
    features, vids, ratings = (values[name] for name in VARIABLES)
    if features.shape[1] != N_COLUMNS:
        turned = " (it is transposed)" if features.shape[0] == N_COLUMNS else ""
        raise SubjectError(
            f"{path}: feas: expected {N_COLUMNS} columns (EEG 90, GSR 28, PPG 27, video 768), got shape {features.shape}{turned}"
        )
    if vids.size != len(features) or 1 not in vids.shape:
        raise SubjectError(f"{path}: vids: expected [{len(features)}, 1], one clip per row of feas, got {vids.shape}")
    clip = vids.ravel().astype(np.float64)
    clips = len(ratings)
    bad = ~((clip == np.floor(clip)) & (clip >= 0) & (clip < clips))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        one_based = clip.min() == 1 and clip.max() == clips
        mend = "these look 1-based: subtract 1" if one_based else "expected whole numbers counting from 0"
        raise SubjectError(f"{path}: vids: row {row} is {clip[row]:g}, but dis_label has clips 0 to {clips - 1}: {mend}")
    clip = clip.astype(np.int64)
    with np.errstate(over="ignore"):  # too large for float32 is infinite, and named below
        features = features.astype(np.float32)
    bad = ~np.isfinite(features)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise SubjectError(
            f"{path}: feas: row {row}, {_column(column)} is {features[row, column]} ({int(bad.sum())} such values in all): "
            "drop or impute these rows in the file"
        )
    ratings = ratings.astype(np.float64)
    for used in np.unique(clip).tolist():
        rating = ratings[used]
        if not np.isfinite(rating).all() or (rating < 0).any() or rating.sum() == 0:
            raise SubjectError(f"{path}: dis_label: row {used} is {rating.tolist()}: expected ratings >= 0 that are finite and not all 0")
    labels = ratings[clip]
    total = labels.sum(axis=1, keepdims=True)
    return features, clip, labels / total, bool((np.abs(total - 1) > 1e-6).any())


class DMERData(EmotionDataModule):
    """DMER from a folder with one MATLAB file per subject, v5 or v7.3.

    Args:
        root: Folder of the files ``{subject}.mat``.
        subjects: Subjects to read; by default those of the released script's 73 that are present.
        label_names: The K emotions in the order of dis_label's columns; by default ``emotion 1`` to ``emotion K``.
        skip_bad_subjects: Leave out subjects whose file cannot be used, and say so in the notes, instead of stopping.
        kwargs: The arguments of ``EmotionDataModule``.
    """

    default_n_channels = 18

    def __init__(
        self,
        root: str,
        *,
        subjects: list[str] | None = None,
        label_names: list[str] | None = None,
        skip_bad_subjects: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root, self.subjects, self.label_names_given = Path(root), subjects, label_names
        self.skip_bad_subjects = skip_bad_subjects

    def _chosen(self) -> tuple[list[str], list[str]]:
        """Subjects to read, and notes on the choice."""
        if not self.root.is_dir():
            raise FileNotFoundError(f"root: {self.root} is no folder: give the one that holds DMER's files {{subject}}.mat")
        present = {path.stem for path in self.root.glob("*.mat")}
        if self.subjects is not None:
            chosen = [str(subject) for subject in self.subjects]
            if len(set(chosen)) != len(chosen) or not chosen:
                raise ValueError(f"subjects: expected a non-empty list without repetition, got {self.subjects}")
            return chosen, []
        chosen = [subject for subject in SUBJECTS if subject in present]
        if not chosen:
            raise FileNotFoundError(
                f"root: {self.root} holds no {{subject}}.mat of DMER's subjects (1.mat ... 80.mat): "
                f"found {_some(sorted(present)) or 'no .mat file'}; name other files in subjects"
            )
        notes = []
        absent = [subject for subject in SUBJECTS if subject not in present]
        if absent:
            notes.append(f"DMER: {len(chosen)} of {len(SUBJECTS)} subjects present; absent: {', '.join(absent)}")
        other = sorted(present - set(SUBJECTS))
        if other:
            notes.append(f"DMER: not in the released list of subjects, so not read: {_some(other)} (.mat)")
        return chosen, notes

    def load(self) -> EmotionData:
        """Reads the chosen subjects.

        Raises:
            FileNotFoundError: no such folder or file.
            SubjectError: a subject's file cannot be used (without ``skip_bad_subjects``).
            ValueError: no subject is left, or label_names does not fit.
        """
        chosen, notes = self._chosen()
        parts, kept, rescaled = [], [], []
        for name in chosen:
            path = self.root / f"{name}.mat"
            if not path.is_file():
                raise FileNotFoundError(f"subjects: {name!r}: no file {path}")
            try:
                features, clip, labels, was_rescaled = read_subject(path)
                if parts and labels.shape[1] != parts[0][2].shape[1]:
                    expected = parts[0][2].shape[1]
                    raise SubjectError(
                        f"{path}: dis_label: {labels.shape[1]} columns, but subject {kept[0]!r} has {expected}: "
                        "every subject must rate the same emotions"
                    )
            except SubjectError as error:
                if not self.skip_bad_subjects:
                    raise SubjectError(f"subject {name!r}: {error} (or set skip_bad_subjects)") from error
                notes.append(f"subject {name}: skipped: {error}")
                continue
            parts.append((features, clip, labels))
            kept.append(name)
            if was_rescaled:
                rescaled.append(name)
        if not parts:
            raise ValueError(f"root: {self.root}: no usable subject: {_some(notes)}")
        if rescaled:
            notes.append(f"DMER: ratings divided by their sum for subjects {', '.join(rescaled)}")
        features, clip, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        edges = np.cumsum(list(COLUMNS.values()))[:-1]
        names = self.label_names_given or [f"emotion {i + 1}" for i in range(labels.shape[1])]
        if len(names) != labels.shape[1]:
            raise ValueError(f"label_names: {len(names)} names for the {labels.shape[1]} columns of dis_label: {names}")
        return EmotionData(
            modalities=dict(zip(COLUMNS, np.split(features, edges, axis=1), strict=True)),
            labels=labels,
            subject=np.repeat(kept, [len(part[0]) for part in parts]),
            trial=clip.astype(str),
            names=tuple(names),
            notes=tuple(notes),
        )


def _some(items: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
