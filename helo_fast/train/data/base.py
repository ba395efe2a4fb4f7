"""The Lightning data module that every data set of this package shares.

A data set of one's own is a subclass of :class:`EmotionDataModule` with a ``load`` method that returns an
:class:`EmotionData`; splits, normalisation, batches and what a report must say about them are done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_convert

from helo_fast.train.data.emotion_data import EmotionData
from helo_fast.train.data.splits import PROTOCOLS, Split, make_split, ordered_subjects

PLACES = ("eeg", "gsr", "ppg", "video")
NORMALISATIONS = ("train", "subject", "none")


def _mean_std(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the columns in float64; the std of a constant column is inf."""
    mean, std = value.mean(axis=0, dtype=np.float64), value.std(axis=0, dtype=np.float64)
    # float32 resolves 1e-7 of a value: a spread below that is rounding, and dividing by it would make noise of size 1.
    constant = std <= 1e-6 * np.abs(value).max(axis=0)
    return mean, np.where(constant, np.inf, std)


class _Rows(Dataset):
    """The rows ``rows`` of tensors that share their first axis; a batch is one indexing per tensor, not a collation."""

    def __init__(self, tensors: dict[str, Tensor], rows: np.ndarray) -> None:
        self.tensors, self.rows = tensors, torch.from_numpy(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int | list[int]) -> dict[str, Tensor]:
        return {name: value[self.rows[position]] for name, value in self.tensors.items()}

    __getitems__ = __getitem__  # torch's loader asks for all rows of a batch at once where it finds this


class EmotionDataModule(pl.LightningDataModule):
    """Folds, normalisation and batches over an :class:`EmotionData`.

    A subclass gives ``load`` and, since an array [N, features] does not tell the number of channels, ``default_n_channels``
    (or n_channels at every use); it may override ``default_places``. Batches are dicts
    ``{"eeg": [B, C, dim], "gsr": [B, d], "ppg": [B, d], "video": [B, d], "labels": [B, K], "index": [B]}``, float32,
    ``index`` int64 being the row in ``data``. To go on to another fold, set ``fold`` and call ``setup`` again: the data
    are loaded once.

    Args:
        places: Which modality sits in which of HeLo's four inputs (eeg, gsr, ppg, video).
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

    default_places: dict[str, str] = {"eeg": "eeg", "gsr": "gsr", "ppg": "ppg", "video": "video"}  # noqa: RUF012
    default_n_channels: int | None = None

    def __init__(
        self,
        *,
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
        super().__init__()
        self.places = dict(self.default_places if places is None else places)
        self.n_channels = self.default_n_channels if n_channels is None else n_channels
        self.placed = tuple(dict.fromkeys(self.places.values()))  # the modalities in use, each once
        self.protocol, self.fold, self.normalise, self.validation = protocol, fold, normalise, validation
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        if set(self.places) != set(PLACES):
            raise ValueError(f"places: expected a modality for each of {', '.join(PLACES)}, got {self.places}")
        if self.n_channels is None:
            raise ValueError(
                "n_channels: not given: set --data.n_channels, or default_n_channels in the class "
                f"{type(self).__name__}, to the number of channels in the eeg place"
            )
        for name, least in {"n_channels": 1, "batch_size": 1, "num_workers": 0, "seed": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
        for name, known in {"protocol": PROTOCOLS, "normalise": NORMALISATIONS}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not 0 < validation < 1:
            raise ValueError(f"validation: expected a share between 0 and 1 (exclusive), got {validation!r}")
        self._data: EmotionData | None = None
        self._made: tuple[tuple[Any, ...], Split] | None = None  # what the split and statistics were made for; the split
        self._statistics: dict[str, np.ndarray] | None = None
        self._tensors: dict[str, Tensor] | None = None

    def load(self) -> EmotionData:
        """Reads or makes the data; called once, by the first use of ``data``."""
        raise NotImplementedError(f"{type(self).__name__}.load(): return an EmotionData")

    @property
    def data(self) -> EmotionData:
        """The data set, loaded at first use."""
        if self._data is None:
            data = self.load()
            if not isinstance(data, EmotionData):
                raise TypeError(f"{type(self).__name__}.load() returned {type(data).__name__}: return an EmotionData")
            for place, modality in self.places.items():
                if modality not in data.modalities:
                    have = ", ".join(data.modalities)
                    raise ValueError(f"places: {place!r} names modality {modality!r}, which is not among {have}")
            features = data.modalities[self.places["eeg"]].shape[1]
            if features % self.n_channels:
                what = f"the {features} features of modality {self.places['eeg']!r} in the eeg place"
                raise ValueError(f"n_channels: {self.n_channels} does not divide {what}: choose a divisor")
            self._data = data
        return self._data

    @property
    def dims(self) -> dict[str, int]:
        """The sizes that ``HeLoConfig`` needs: n_channels, dim_eeg, dim_gsr, dim_ppg, dim_video, emotion_classes."""
        width = {f"dim_{place}": self.data.modalities[self.places[place]].shape[1] for place in PLACES}
        width["dim_eeg"] //= self.n_channels
        return {"n_channels": self.n_channels, **width, "emotion_classes": self.data.labels.shape[1]}

    @property
    def label_names(self) -> tuple[str, ...]:
        """The K label names."""
        return self.data.names

    def fold_names(self) -> list[str]:
        """One fold per subject, in the order in which subjects appear in the data."""
        return ordered_subjects(self.data.subject)

    def split(self, fold: str) -> Split:
        """Rows of training, validation and test of ``fold``; a pure function of data, protocol, fold and seed."""
        unit = (self.data.subject, self.data.trial)
        return make_split(self.protocol, *unit, fold, validation=self.validation, seed=self.seed)

    @property
    def current(self) -> Split:
        """The split of ``fold`` (of the first fold where ``fold`` is None)."""
        fold = self.fold_names()[0] if self.fold is None else self.fold
        made_for = (self.protocol, fold, self.validation, self.seed, self.normalise)
        if self._made is None or self._made[0] != made_for:
            split = self.split(fold)
            if self._made is not None:
                self._statistics = None  # the previous fold's would leak into this one
            self._made, self._tensors = (made_for, split), None
        return self._made[1]

    def _follow(self) -> None:
        if self._made is not None:  # without a split, statistics that were given are enough to predict
            _ = self.current

    def setup(self, stage: str | None = None) -> None:
        """Loads the data, splits them by ``fold`` and normalises them.

        The predict stage needs no split when the statistics of a training run are given (``use_normalisation``, or a
        checkpoint that Lightning restores after this call), so there both wait for the data loader.
        """
        if stage == "predict":
            _ = self.data
            return
        for warning in (note for note in self.current.notes if note.startswith("warning")):
            rank_zero_warn(warning)
        _ = self.tensors

    @property
    def notes(self) -> tuple[str, ...]:
        """What a report must say: notes of the data, of the fold's split and of the normalisation."""
        transductive = "normalised per subject by all of the subject's own unlabelled rows, test rows too: transductive"
        return (*self.data.notes, *self.current.notes, *((transductive,) if self.normalise == "subject" else ()))

    @property
    def normalisation(self) -> dict[str, np.ndarray]:
        """Statistics in use: ``"<modality>.mean"`` and ``"<modality>.std"``, float64 [features].

        Taken over the training rows of the fold unless given; empty for normalise = subject or none, which keep
        nothing from training. A feature that is constant over the training rows has std inf: it becomes 0 in every row,
        since nothing can be learned from it and a small divisor would blow it up elsewhere.
        """
        self._follow()
        if self._statistics is None:
            statistics = {}
            for modality in self.placed if self.normalise == "train" else ():
                mean, std = _mean_std(self.data.modalities[modality][self.current.train])
                statistics |= {f"{modality}.mean": mean, f"{modality}.std": std}
            self._statistics = statistics
        return dict(self._statistics)

    def use_normalisation(self, statistics: Mapping[str, Any]) -> None:
        """Normalises with another run's ``normalisation``, as prediction must, until the fold changes."""
        given = {name: np.asarray(value, dtype=np.float64) for name, value in statistics.items()}
        placed = self.placed if self.normalise == "train" else ()
        width = {modality: self.data.modalities[modality].shape for modality in placed}
        needed = {f"{modality}.{which}": width[modality][1:] for modality in placed for which in ("mean", "std")}
        found = {name: value.shape for name, value in given.items()}
        bad = [name for name, value in given.items() if np.isnan(value).any() or ".std" in name and (value <= 0).any()]
        if found != needed or bad:
            raise ValueError(
                f"statistics: expected the shapes {needed} for normalise={self.normalise!r}, no NaN and std > 0; got "
                f"{found}, bad values in {bad or 'none'}: use the data, places and normalise of the run they come from"
            )
        self._statistics, self._tensors = given, None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: protocol, fold, normalisation (as tensors: checkpoints load with weights_only)."""
        statistics = {name: torch.from_numpy(value) for name, value in self.normalisation.items()}
        fold = self.current.fold
        return {"protocol": self.protocol, "fold": fold, "normalise": self.normalise, "normalisation": statistics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the training run's normalisation; refuses to test on rows that the checkpoint was trained on."""
        protocol, fold, normalise = (state_dict[name] for name in ("protocol", "fold", "normalise"))
        if normalise != self.normalise:
            raise ValueError(f"normalise: the checkpoint was trained with {normalise!r}, not {self.normalise!r}: set it so")
        testing = self.trainer is not None and self.trainer.testing
        if testing and fold in self.fold_names() and (protocol, fold) != (self.protocol, self.current.fold):
            raise ValueError(
                f"fold: the checkpoint was trained for protocol {protocol!r}, fold {fold!r}, so the test rows of "
                f"protocol {self.protocol!r}, fold {self.current.fold!r} may be its training rows: set these to its own"
            )
        self.use_normalisation(state_dict["normalisation"])

    def _normalised(self, modality: str) -> np.ndarray:
        value = self.data.modalities[modality]
        if self.normalise == "none":
            return value
        out = np.empty_like(value)
        mean, std = (self.normalisation.get(f"{modality}.{statistic}") for statistic in ("mean", "std"))
        for subject in self.fold_names():  # a subject at a time, also to bound the float64 temporaries
            rows = self.data.subject == subject
            if self.normalise == "subject":
                mean, std = _mean_std(value[rows])
            out[rows] = (value[rows] - mean) / std
        return out

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every row of the data, normalised for the fold: a batch is these tensors at some rows."""
        self._follow()
        if self._tensors is None:
            ready = {modality: torch.from_numpy(self._normalised(modality)) for modality in self.placed}
            tensors = {place: ready[self.places[place]] for place in PLACES}
            tensors["eeg"] = tensors["eeg"].view(len(self.data), self.n_channels, -1)  # [N, C, dim]
            tensors |= {"labels": torch.from_numpy(self.data.labels), "index": torch.arange(len(self.data))}
            self._tensors = tensors
        return self._tensors

    def features(self, rows: np.ndarray) -> np.ndarray:
        """The modalities in use, normalised for the fold and concatenated: [len(rows), features], for baselines."""
        tensors = {modality: self.tensors[place] for place, modality in self.places.items()}  # each modality once
        return np.concatenate([value[torch.from_numpy(rows)].flatten(1).numpy() for value in tensors.values()], axis=1)

    @property
    def train_labels(self) -> Tensor:
        """Labels of the fold's training rows, [N_train, K] float32 (for ``HeLo.fit_correlation``)."""
        return torch.from_numpy(self.data.labels[self.current.train])

    def _loader(self, rows: np.ndarray, sampler: type[DistributedSampler] | None = None) -> DataLoader:
        dataset, order = _Rows(self.tensors, rows), None
        if sampler is not None:
            world, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
            # Hashed, so that epoch e + 1 of seed s is not epoch e of seed s + 1 (torch adds seed and epoch).
            seed = int(np.random.SeedSequence(self.seed).generate_state(1)[0])
            order = sampler(dataset, world, rank, shuffle=sampler is DistributedSampler, seed=seed)
        options = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0, "sampler": order}
        options |= {"batch_size": self.batch_size, "pin_memory": torch.cuda.is_available()}
        return DataLoader(dataset, collate_fn=default_convert, **options)  # by name: Lightning makes it anew to predict

    def train_dataloader(self) -> DataLoader:
        """Training rows in an order that depends on seed and epoch alone, so that a resumed run repeats it.

        torch's DistributedSampler does that also with one process; Lightning calls its ``set_epoch`` and, with several
        processes, keeps it as it is (whatever ``use_distributed_sampler`` says).
        """
        return self._loader(self.current.train, DistributedSampler)

    def val_dataloader(self) -> DataLoader:
        """Validation rows; with several processes Lightning repeats a few so that all have as many batches."""
        return self._loader(self.current.validation)

    def test_dataloader(self) -> DataLoader:
        """Test rows, each exactly once also with several processes."""
        return self._loader(self.current.test, UnrepeatedDistributedSampler)

    def predict_dataloader(self) -> DataLoader:
        """Every row of the data."""
        return self._loader(np.arange(len(self.data)))
