"""EmotionData: a data set in memory, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

LABEL_SUM_TOLERANCE = 1e-4


@dataclass(frozen=True)
class EmotionData:
    """A data set in memory: one row per window, checked when it is made.

    Args:
        modalities: name -> [N, features], converted to float32; every value finite.
        labels: [N, K] float32 label distributions: non-negative, rows sum to 1 (within 1e-4).
        subject: [N] subject of each row, as strings.
        trial: [N] trial of each row within its subject (clip, condition): the unit that a split never cuts. The same
            trial name under two subjects is two trials.
        names: the K label names.
        notes: what a report must say about the data, for example ``"S4: skipped: truncated zip"``.

    Raises:
        ValueError: anything above does not hold; the message names modality, subject, row and column, and the mend.

    Example:
        >>> data = EmotionData({"eeg": [[0.5, 1.0]]}, [[0.25, 0.75]], ["S1"], ["clip 1"], ("sad", "happy"))
        >>> len(data), data.modalities["eeg"].dtype
        (1, dtype('float32'))
    """

    modalities: dict[str, np.ndarray]
    labels: np.ndarray
    subject: np.ndarray
    trial: np.ndarray
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field, value in (("names", self.names), ("notes", self.notes)):
            if isinstance(value, str) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"EmotionData.{field}: expected a tuple of strings, got {value!r}")
            object.__setattr__(self, field, tuple(value))
        if not isinstance(self.modalities, Mapping) or not self.modalities:
            raise ValueError("EmotionData.modalities: expected a non-empty dict of name -> [N, features] arrays")
        modalities = {name: self._numbers(f"modality {name!r}", value) for name, value in self.modalities.items()}
        object.__setattr__(self, "labels", self._numbers("labels", self.labels))
        object.__setattr__(self, "modalities", modalities)
        for field in ("subject", "trial"):
            object.__setattr__(self, field, self._strings(field, getattr(self, field)))
        columns = {f"modality {name!r}": value for name, value in modalities.items()} | {"labels": self.labels}
        for what, value in (columns | {"subject": self.subject, "trial": self.trial}).items():
            if len(value) != len(self):
                raise ValueError(f"{what} has {len(value)} rows but labels has {len(self)}: give one row per window")
        for what, value in columns.items():
            if not np.isfinite(value).all():
                row, column = np.argwhere(~np.isfinite(value))[0].tolist()
                raise ValueError(
                    f"{what}: {self._row(row)}, column {column} is {value[row, column]} as float32, one of "
                    f"{np.count_nonzero(~np.isfinite(value))} such values: drop or impute these rows beforehand"
                )
        self._check_labels()

    def __len__(self) -> int:
        return len(self.labels)

    @staticmethod
    def _numbers(what: str, value: Any) -> np.ndarray:
        value = np.asarray(value)
        if value.ndim != 2 or value.dtype.kind not in "fiu" or 0 in value.shape:
            raise ValueError(f"{what}: expected non-empty [N, features] real numbers, got {value.shape} {value.dtype}")
        with np.errstate(over="ignore"):  # too large for float32 becomes inf, which is named as not finite
            return np.ascontiguousarray(value, dtype=np.float32)

    @staticmethod
    def _strings(what: str, value: Any) -> np.ndarray:
        value = np.asarray(value)
        if value.ndim != 1 or not all(isinstance(item, str) and item for item in value.tolist()):
            raise ValueError(f"{what}: expected [N] non-empty strings, got {value.shape} {value.dtype}: use astype(str)")
        return value.astype(str)

    def _row(self, row: int) -> str:
        return f"subject {str(self.subject[row])!r}, trial {str(self.trial[row])!r}, row {row}"

    def _check_labels(self) -> None:
        names, labels = self.names, self.labels
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if duplicates or "" in names:
            raise ValueError(f"names: {duplicates or 'an empty name'}: every label needs a name of its own")
        if len(names) != labels.shape[1] or len(names) < 2:
            raise ValueError(f"labels has {labels.shape[1]} columns and names has {len(names)}: K >= 2 of each, equal")
        total = labels.sum(axis=1, dtype=np.float64)
        for bad, problem in (
            ((labels < 0).any(axis=1), "has a negative entry: clip ratings to >= 0, then divide each row by its sum"),
            (total == 0, "is all zero: drop it, or add a small constant to every rating and normalise"),
            (np.abs(total - 1) > LABEL_SUM_TOLERANCE, "sums not to 1: use labels / labels.sum(axis=1, keepdims=True)"),
        ):
            if bad.any():
                row = int(np.flatnonzero(bad)[0])
                this = dict(zip(names, labels[row].tolist(), strict=True))
                raise ValueError(f"labels: {self._row(row)} {problem} ({np.count_nonzero(bad)} such rows; this: {this})")
