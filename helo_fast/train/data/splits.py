"""Which rows train, validate and test in a fold: pure functions of subjects, trials, protocol, fold and seed.

Choices depend on the sorted names and not on the order of rows, so that the same data in another order split alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from zlib import crc32

import numpy as np

PROTOCOLS = ("loso", "subject-dependent", "random")
TEST_SHARE = 0.2

RANDOM_LEAKS = (
    "warning: protocol random leaks: windows of the same trial, overlapping ones too, lie in training and test, so its "
    "scores measure recognition of the recording, not of the emotion: use it only to reproduce published numbers"
)


@dataclass(frozen=True)
class Split:
    """Rows of one fold, each an increasing int64 index array.

    ``test`` never meets ``train``. ``validation`` meets neither, but where nothing could be held out for it, it is
    ``train`` itself, or (random) ``test`` itself: ``notes`` then says so.
    """

    fold: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    notes: tuple[str, ...] = ()


def ordered_subjects(subject: np.ndarray) -> list[str]:
    """The subjects, each once, in order of appearance."""
    return list(dict.fromkeys(subject.tolist()))


def _generator(purpose: str, fold: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, crc32(purpose.encode()), crc32(fold.encode())])  # hash() differs between runs


def _held_out(units: list[str], share: float, generator: np.random.Generator) -> tuple[list[str], list[str]]:
    """About ``share`` of the units, at least one and never all of them, and the rest."""
    number = min(max(1, round(share * len(units))), len(units) - 1)
    order = generator.permutation(len(units))
    return [units[i] for i in order[:number]], [units[i] for i in order[number:]]


def _check_disjoint(split: Split, unit: np.ndarray, what: str) -> Split:
    """A split that leaks must never leave this module, also under ``python -O``."""
    parts = [set(unit[rows].tolist()) for rows in (split.train, split.validation, split.test)]
    shared = (parts[0] | parts[1]) & parts[2]
    if split.validation is not split.train:
        shared |= parts[0] & parts[1]
    if shared or not all(parts):
        raise RuntimeError(f"fold {split.fold!r}: {what} {sorted(shared)} in two parts, or an empty part: a bug, please report")
    return split


def loso(subject: np.ndarray, fold: str, *, validation: float = 0.2, seed: int = 0) -> Split:
    """Leave one subject out: tests on ``fold``, validates on some of the other subjects, trains on the rest.

    Raises:
        ValueError: there is no other subject to train on.
    """
    others = sorted(set(subject.tolist()) - {fold})
    if not others:
        raise ValueError(f"loso: {fold!r} is the only subject, nobody is left to train on: use protocol subject-dependent")
    if len(others) == 1:
        train = np.flatnonzero(subject == others[0])
        note = f"fold {fold}: one training subject, so validation = train: do not select models by it"
        split = Split(fold, train, train, np.flatnonzero(subject == fold), (note,))
    else:
        held_out, _ = _held_out(others, validation, _generator("loso", fold, seed))
        validating, testing = np.isin(subject, held_out), subject == fold
        split = Split(fold, *(np.flatnonzero(rows) for rows in (~validating & ~testing, validating, testing)))
    return _check_disjoint(split, subject, "subjects")


def subject_dependent(subject: np.ndarray, trial: np.ndarray, fold: str, *, validation: float = 0.2, seed: int = 0) -> Split:
    """Within the subject ``fold``, by trial: a fifth of the trials tests, some of the others validate, the rest train.

    Raises:
        ValueError: the subject has one trial only.
    """
    own = subject == fold
    trials = sorted(set(trial[own].tolist()))
    if len(trials) < 2:
        raise ValueError(
            f"subject-dependent: subject {fold!r} has one trial only ({trials[0]!r}) and a trial is never cut: "
            "use protocol loso, or leave this fold out"
        )
    generator = _generator("subject-dependent", fold, seed)
    test, rest = _held_out(trials, TEST_SHARE, generator)
    testing = np.flatnonzero(own & np.isin(trial, test))
    if len(rest) < 3:
        train = np.flatnonzero(own & np.isin(trial, rest))
        note = f"fold {fold}: {len(rest)} training trial(s), so validation = train: do not select models by it"
        return _check_disjoint(Split(fold, train, train, testing, (note,)), trial, "trials")
    held_out, rest = _held_out(rest, validation, generator)
    train, validating = (np.flatnonzero(own & np.isin(trial, part)) for part in (rest, held_out))
    return _check_disjoint(Split(fold, train, validating, testing), trial, "trials")


def random_windows(subject: np.ndarray, fold: str, *, seed: int = 0) -> Split:
    """The released protocol: a random 80/20 split of the windows of the subject ``fold``, whatever their trial. Leaks.

    Raises:
        ValueError: the subject has one row only.
    """
    rows = np.flatnonzero(subject == fold)
    if len(rows) < 2:
        raise ValueError(f"random: subject {fold!r} has one row only, which cannot be split: use protocol loso")
    rows = _generator("random", fold, seed).permutation(rows)
    number = max(1, round(TEST_SHARE * len(rows)))
    test, train = np.sort(rows[:number]), np.sort(rows[number:])
    notes = (RANDOM_LEAKS, f"fold {fold}: validation = test: do not select models by it")
    split = Split(fold, train, test, test, notes)
    if np.intersect1d(split.train, split.test).size or not len(train):
        raise RuntimeError(f"fold {fold!r}: rows in two parts, or an empty part: a bug, please report")
    return split


def make_split(protocol: str, subject: np.ndarray, trial: np.ndarray, fold: str, *, validation: float = 0.2, seed: int = 0) -> Split:
    """The split of ``fold`` (a subject) under ``protocol``: loso, subject-dependent or random.

    Args:
        protocol: one of ``PROTOCOLS``.
        subject: [N] strings.
        trial: [N] strings, trials within a subject.
        fold: the subject that the fold is named after.
        validation: share of the training subjects (loso) or trials (subject-dependent) that validate.
        seed: with the fold's name, all that the choices depend on.

    Raises:
        ValueError: an unknown protocol or fold, or too few subjects, trials or rows to split.

    Example:
        >>> make_split("loso", np.array(["a", "b", "b", "c"]), np.array(["1"] * 4), "b").test
        array([1, 2])
    """
    makers: dict[str, Callable[[], Split]] = {
        "loso": lambda: loso(subject, fold, validation=validation, seed=seed),
        "subject-dependent": lambda: subject_dependent(subject, trial, fold, validation=validation, seed=seed),
        "random": lambda: random_windows(subject, fold, seed=seed),
    }
    if protocol not in makers:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    if not (subject == fold).any():
        raise ValueError(f"fold: no rows of subject {fold!r}: choose from {', '.join(ordered_subjects(subject))}")
    return makers[protocol]()
