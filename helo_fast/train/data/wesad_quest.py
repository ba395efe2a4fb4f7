"""WESAD's questionnaires: when each condition took place, how it was rated, and the label distribution it gives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from helo_fast.train.data.e4 import SubjectError

CONDITIONS = ("Base", "TSST", "Medi 1", "Fun", "Medi 2")
READINGS = ("bRead", "sRead", "fRead")  # pauses for reading, never rated

PANAS_ITEMS = (
    "Active", "Distressed", "Interested", "Inspired", "Annoyed", "Strong", "Guilty", "Scared", "Hostile", "Excited",
    "Proud", "Irritable", "Enthusiastic", "Ashamed", "Alert", "Nervous", "Determined", "Attentive", "Jittery", "Afraid",
    "Stressed", "Frustrated", "Happy",
)  # fmt: skip
# the items after the common 23: the stress condition has three more, the others one
STRESS_ITEMS = ("Angry", "Irritated", "Sad")
OTHER_ITEMS = ("Sad",)

# name -> PANAS items of the label distribution, in its order. Sad is rated 1 by everyone in every condition.
LABEL_SETS: dict[str, tuple[str, ...]] = {
    "e9": (
        "Happy", "Excited", "Enthusiastic", "Inspired", "Proud", "Nervous", "Annoyed", "Stressed", "Frustrated",
    ),
    "panas": PANAS_ITEMS,
}  # fmt: skip

# the one rating that the published files lack
KNOWN_MISSING = {("S5", "Medi 1", "Nervous"): 1}

RATING_FLOOR = 0.1  # mass of an emotion rated "not at all"


@dataclass(frozen=True)
class Questionnaire:
    """One subject's protocol and ratings, keyed by condition in the order in which they took place.

    Args:
        periods: condition -> (begin, end) in seconds on the protocol's clock.
        ratings: condition -> PANAS item -> rating 1..5.
        notes: what was mended while reading.
    """

    periods: dict[str, tuple[float, float]]
    ratings: dict[str, dict[str, int]]
    notes: tuple[str, ...] = ()


def protocol_seconds(text: str) -> float:
    """Seconds of a time written as minutes.seconds with trailing zeros dropped.

    The text must be parsed, not a float of it: ``7.08`` is 7 min 8 s, ``50.3`` is 50 min 30 s, ``32`` is 32 min.

    Raises:
        ValueError: it is no such time.

    >>> protocol_seconds("7.08"), protocol_seconds("50.3"), protocol_seconds("2.5"), protocol_seconds("32")
    (428.0, 3030.0, 170.0, 1920.0)
    """
    match = re.fullmatch(r"(\d+)(?:\.(\d{1,2}))?", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no time in minutes.seconds")
    seconds = int((match[2] or "0").ljust(2, "0"))
    if seconds >= 60:
        raise ValueError(f"{text!r} has {seconds} seconds to the minute")
    return 60.0 * int(match[1]) + seconds


def label_distribution(ratings: Mapping[str, int], items: Sequence[str]) -> np.ndarray:
    """The label distribution ``[K]`` (float32, sums to 1) of one condition: ``max(r - 1, 0) + 0.1``, normalised.

    Args:
        ratings: PANAS item -> rating 1..5.
        items: the K items to keep, in order.

    >>> [round(float(p), 4) for p in label_distribution({"Happy": 3, "Nervous": 1}, ["Happy", "Nervous"])]
    [0.9545, 0.0455]
    """
    mass = np.array([max(ratings[item] - 1, 0) + RATING_FLOOR for item in items])
    return (mass / mass.sum()).astype(np.float32)


def read_quest(path: Path, subject: str) -> Questionnaire:
    """Read ``SX_quest.csv``: the times of the five conditions and their PANAS ratings.

    STAI, DIM and SSSQ rows and the reading pauses are not used.

    Raises:
        SubjectError: the file is missing or another subject's, a row is missing or malformed, a time is none or a
            rating is not 1..5; the message names file, line and mend.

    Source: Schmidt et al., ICMI 2018; Watson et al., 1988 (PANAS).
    """
    try:
        lines = path.read_text(encoding="latin-1").splitlines()
    except FileNotFoundError as error:
        raise SubjectError(f"{path} is missing; restore it, the labels come from it.") from error
    rows: dict[str, list[tuple[int, list[str]]]] = {}
    for number, line in enumerate(lines, start=1):
        tag, *cells = (cell.strip() for cell in line.split(";"))
        rows.setdefault(tag.lstrip("#").strip().rstrip(":"), []).append((number, cells))

    number, cells = _single(rows, "Subj", path)
    if not cells or cells[0] != subject:
        raise SubjectError(f"{path}, line {number}: the file is of {cells[:1]}, expected {subject!r}; restore its own.")
    number, cells = _single(rows, "ORDER", path)
    order = [cell for cell in cells if cell]
    rated = [name for name in order if name not in READINGS]
    if sorted(rated) != sorted(CONDITIONS):
        raise SubjectError(f"{path}, line {number} (ORDER): expected each of {', '.join(CONDITIONS)} once, found {rated}.")
    periods = _periods(rows, order, rated, path)
    panas = rows.get("PANAS", [])
    if len(panas) != len(rated):
        raise SubjectError(f"{path}: expected {len(rated)} PANAS rows, one per condition, found {len(panas)}.")
    notes: list[str] = []
    ratings = {
        condition: _ratings(cells, subject, condition, f"{path}, line {number} (PANAS, {condition})", notes)
        for condition, (number, cells) in zip(rated, panas, strict=True)
    }
    return Questionnaire(dict(sorted(periods.items(), key=lambda item: item[1])), ratings, tuple(notes))


def _single(rows: dict[str, list[tuple[int, list[str]]]], tag: str, path: Path) -> tuple[int, list[str]]:
    found = rows.get(tag, [])
    if len(found) != 1:
        raise SubjectError(f"{path}: expected one row {tag}, found {len(found)}; restore the original file.")
    return found[0]


def _periods(
    rows: dict[str, list[tuple[int, list[str]]]], order: list[str], rated: list[str], path: Path
) -> dict[str, tuple[float, float]]:
    times: dict[str, dict[str, float]] = {}
    for tag in ("START", "END"):
        number, cells = _single(rows, tag, path)
        times[tag] = {}
        for name, cell in zip(order, cells, strict=False):
            try:
                times[tag][name] = protocol_seconds(cell)
            except ValueError as error:
                raise SubjectError(f"{path}, line {number} ({tag}, {name}): {error}; write 7 min 8 s as 7.08.") from error
        if missing := [name for name in rated if name not in times[tag]]:
            raise SubjectError(f"{path}, line {number} ({tag}): no time for {missing[0]}; restore the original row.")
    periods = {name: (times["START"][name], times["END"][name]) for name in rated}
    for name, (begin, end) in periods.items():
        if begin >= end:
            raise SubjectError(f"{path}: {name} ends ({end:g} s, row END) before it starts ({begin:g} s, row START); restore the rows.")
    return periods


def _ratings(cells: list[str], subject: str, condition: str, where: str, notes: list[str]) -> dict[str, int]:
    items = PANAS_ITEMS + (STRESS_ITEMS if condition == "TSST" else OTHER_ITEMS)
    while cells and not cells[-1]:
        cells = cells[:-1]
    if len(cells) != len(items):
        raise SubjectError(f"{where}: expected {len(items)} ratings, found {len(cells)}; restore the original row.")
    ratings = {}
    for column, (item, cell) in enumerate(zip(items, cells, strict=True), start=1):
        if cell in ("1", "2", "3", "4", "5"):
            ratings[item] = int(cell)
        elif cell.lower() in ("", "nan") and (subject, condition, item) in KNOWN_MISSING:
            ratings[item] = KNOWN_MISSING[subject, condition, item]
            notes.append(f"{condition}: the rating of {item} is missing, taken as {ratings[item]}")
        else:
            raise SubjectError(f"{where}, rating {column} ({item}): expected 1 to 5, found {cell!r}; correct it.")
    return ratings
