"""WESAD: wrist recordings and questionnaires of 15 subjects under five conditions, as emotion distributions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np
from joblib import Parallel, cpu_count, delayed

from helo_fast.train.data.base import EmotionData, EmotionDataModule
from helo_fast.train.data.cache import FeatureCache
from helo_fast.train.data.e4 import SubjectError
from helo_fast.train.data.wesad_features import FEATURES, MIN_WINDOW
from helo_fast.train.data.wesad_quest import LABEL_SETS, label_distribution
from helo_fast.train.data.wesad_subject import OFFSETS, Subject


class WESADData(EmotionDataModule):
    """WESAD's wrist data: pulse (ppg, 27 features), skin conductance (gsr, 28), temperature (temp, 12), acceleration (acc, 64).

    Per subject the folder ``root/SX`` holds ``SX_quest.csv`` and the recording: ``SX_E4_Data.zip``, else the unpacked
    folder ``SX_E4_Data``, else, only with allow_pickle, ``SX.pkl``. Each condition gives windows that begin 10 s after
    its start and end 10 s before its end; a trial is a subject's condition, ``"S2/TSST"``. The label of a window is
    its condition's: rating r of 1..5 weighs max(r - 1, 0) + 0.1, normalised over the label set.

    HeLo's places: pulse where EEG is (9 channels x 3), skin conductance in its own, temperature in PPG's,
    acceleration in video's.

    Source: Schmidt et al., Introducing WESAD, ICMI 2018. Scientific use with credit.

    Args:
        root: Folder of the subjects' folders.
        subjects: Subjects to read, for example S2; by default all that are there.
        label_set: Emotions of the label distribution: e9 (nine), or panas (all 23 common items).
        window: Length of a window in seconds, at least 30.
        stride: Seconds from the begin of one window to the begin of the next.
        offsets: Seconds between the E4's clock and the protocol's (E4 time = protocol time + offset) of subjects that
            are not among the published ones, or to use instead of theirs; a pickle needs none.
        allow_pickle: Read ``SX.pkl`` where there is no other recording. Only plain numpy arrays are admitted from it;
            still, a pickle can run code: use this for files that you trust.
        skip_bad_subjects: Leave out subjects whose files cannot be used, and say so in the notes, instead of stopping.
        cache_dir: Folder where features are kept; default ``$HELO_FAST_CACHE``, else the user's cache folder.
        jobs: Processes that make features; by default one per usable core.
        places: Which modality (ppg, gsr, temp, acc) sits in which of HeLo's four inputs (eeg, gsr, ppg, video).
        n_channels: Channels C that the features in the eeg place are viewed as: [C, features / C].
        protocol: loso holds out one subject, subject-dependent some trials of one subject, random some windows (leaks).
        fold: The subject that the fold is named after; the first one where not given.
        normalise: Mean and standard deviation from the training rows (train), from each subject's own unlabelled rows
            (subject: transductive), or left alone (none).
        validation: Share of the training subjects (loso) or trials (subject-dependent) held out for validation.
        batch_size: Rows per batch.
        seed: Seed of the split and of the training order.
        num_workers: Worker processes of each data loader; 0 is fastest for data in memory.
    """

    default_places = {"eeg": "ppg", "gsr": "gsr", "ppg": "temp", "video": "acc"}
    default_n_channels = 9

    def __init__(
        self,
        root: str,
        *,
        subjects: list[str] | None = None,
        label_set: str = "e9",
        window: float = 60.0,
        stride: float = 30.0,
        offsets: dict[str, float] | None = None,
        allow_pickle: bool = False,
        skip_bad_subjects: bool = False,
        cache_dir: str | None = None,
        jobs: int | None = None,
        places: dict[str, str] | None = None,
        n_channels: int | None = None,
        protocol: Literal["loso", "subject-dependent", "random"] = "loso",
        fold: str | None = None,
        normalise: Literal["train", "subject", "none"] = "train",
        validation: float = 0.2,
        batch_size: int = 128,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            places=places,
            n_channels=n_channels,
            protocol=protocol,
            fold=fold,
            normalise=normalise,
            validation=validation,
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
        )
        if label_set not in LABEL_SETS:
            raise ValueError(f"label_set: expected one of {', '.join(LABEL_SETS)}, got {label_set!r}")
        if not window >= MIN_WINDOW:
            raise ValueError(f"window: expected at least {MIN_WINDOW:g} s, got {window!r}: heart rate variability needs that")
        if not stride > 0:
            raise ValueError(f"stride: expected more than 0 s, got {stride!r}")
        if jobs is not None and jobs < 1:
            raise ValueError(f"jobs: expected at least 1 process, got {jobs!r}")
        if subjects is not None and (not subjects or len(set(subjects)) < len(subjects)):
            raise ValueError(f"subjects: expected a non-empty list without repetition, got {subjects}")
        self.root, self.subjects, self.label_set = Path(root), subjects, label_set
        self.window, self.stride = float(window), float(stride)
        self.offsets = {**OFFSETS, **(offsets or {})}
        self.allow_pickle, self.skip_bad_subjects, self.jobs = allow_pickle, skip_bad_subjects, jobs
        self.cache = FeatureCache(cache_dir)

    def load(self) -> EmotionData:
        """Reads the subjects and makes their features, or takes them from the cache.

        Raises:
            FileNotFoundError: root is no folder, or holds no subject.
            SubjectError: a subject cannot be used (without skip_bad_subjects).
            ValueError: no subject is left.
        """
        notes: list[str] = []
        found: dict[str, Subject] = {}
        errors: dict[str, SubjectError] = {}
        names = self._names(notes)
        for name in names:
            try:
                found[name] = Subject.find(
                    self.root,
                    name,
                    offsets=self.offsets,
                    allow_pickle=self.allow_pickle,
                    window=self.window,
                    stride=self.stride,
                    cache=self.cache,
                )
            except SubjectError as error:
                errors[name] = error
                self._stop(name, error)
        features = self._features(found, errors)
        for name in names:
            if name in errors:
                notes.append(f"{name}: skipped: {errors[name]}")
            else:
                notes.extend(f"{name}: {note}" for note in _notes(found[name], features[name]))
        if not features:
            raise ValueError(f"root: {self.root} holds no usable subject: " + "; ".join(notes))
        return self._assemble(found, features, notes)

    def _names(self, notes: list[str]) -> list[str]:
        if not self.root.is_dir():
            raise FileNotFoundError(f"root: {self.root} is no folder: give the one that holds WESAD's folders S2, S3, ...")
        if self.subjects is not None:
            return list(self.subjects)
        names = [path.name for path in self.root.iterdir() if path.is_dir() and re.fullmatch(r"S\d+", path.name)]
        if not names:
            raise FileNotFoundError(f"root: {self.root} holds no folder S2, S3, ...: give the one that does")
        if absent := [name for name in OFFSETS if name not in names]:
            notes.append(f"WESAD: {len(OFFSETS) - len(absent)} of {len(OFFSETS)} subjects are there; absent: {', '.join(absent)}")
        return sorted(names, key=lambda name: int(name[1:]))

    def _stop(self, name: str, error: SubjectError) -> None:
        if not self.skip_bad_subjects:
            raise SubjectError(f"{name}: {error} (Or leave such subjects out with skip_bad_subjects.)") from error

    def _features(self, found: dict[str, Subject], errors: dict[str, SubjectError]) -> dict[str, dict[str, np.ndarray]]:
        """Features by subject, made in parallel where the cache has none; adds the subjects that fail to ``errors``."""
        cached = {name: arrays for name, subject in found.items() if (arrays := subject.cached()) is not None}
        missing = [name for name in found if name not in cached]
        if missing:
            pool = Parallel(n_jobs=min(self.jobs or cpu_count(), len(missing)))
            results = pool(delayed(found[name].features_or_error)() for name in missing)
            for name, result in zip(missing, results, strict=True):
                if isinstance(result, SubjectError):
                    errors[name] = result
                    self._stop(name, result)
                else:
                    cached[name] = result
        return {name: cached[name] for name in found if name in cached}

    def _assemble(self, found: dict[str, Subject], features: dict[str, dict[str, np.ndarray]], notes: list[str]) -> EmotionData:
        items = LABEL_SETS[self.label_set]
        labels = {
            (name, condition): label_distribution(ratings, items)
            for name in features
            for condition, ratings in found[name].quest.ratings.items()
        }
        rows = [(name, str(condition)) for name, arrays in features.items() for condition in arrays["condition"]]
        return EmotionData(
            modalities={key: np.concatenate([arrays[key] for arrays in features.values()]) for key in FEATURES},
            labels=np.stack([labels[row] for row in rows]),
            subject=np.array([name for name, _ in rows]),
            trial=np.array([f"{name}/{condition}" for name, condition in rows]),
            names=tuple(item.lower() for item in items),
            notes=tuple(notes),
        )


def _notes(subject: Subject, arrays: dict[str, np.ndarray]) -> list[str]:
    """What a report says of a subject that was read; the same whether its features were made or found."""
    notes = [f"{subject.files.kind} used", *subject.quest.notes]
    if count := int(arrays["imputed"].sum()):
        notes.append(f"the pulse features of {count} of {len(arrays['imputed'])} windows are imputed: too few usable beats")
    return notes
