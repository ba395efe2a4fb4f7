"""Empatica E4 recordings: the four sensor files, from a zip or from the same files unpacked."""

from __future__ import annotations

import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# file stem -> (sampling rate in Hz, columns); HR, IBI and tags are derived from these and are not read
E4_FILES = {"ACC": (32.0, 3), "BVP": (64.0, 1), "EDA": (4.0, 1), "TEMP": (4.0, 1)}
ACC_COUNTS_PER_G = 64.0


class SubjectError(ValueError):
    """The data of one subject cannot be used; the message names the file, the row and the mend."""


@dataclass(frozen=True)
class Signal:
    """One sensor's samples on the clock of its recording.

    Args:
        samples: float64 ``[n]`` or ``[n, 3]``.
        rate: samples per second.
        start: time of the first sample in seconds on the recording's clock.
    """

    samples: np.ndarray
    rate: float
    start: float = 0.0

    @property
    def end(self) -> float:
        """Time just after the last sample, in seconds on the recording's clock."""
        return self.start + len(self.samples) / self.rate

    def index(self, time: float) -> int:
        """The sample nearest to ``time`` seconds (it may lie outside of the recording)."""
        return round((time - self.start) * self.rate)

    def between(self, begin: float, end: float) -> Signal:
        """The part from ``begin`` to ``end`` seconds, cut to what was recorded."""
        first = max(self.index(begin), 0)
        last = max(self.index(end), first)
        return Signal(self.samples[first:last], self.rate, self.start + first / self.rate)


@dataclass(frozen=True)
class WristRecording:
    """What the wrist device measured, on one clock.

    Args:
        acc: acceleration ``[n, 3]`` in g, 32 Hz.
        bvp: blood volume pulse ``[n]`` in arbitrary units, 64 Hz.
        eda: electrodermal activity ``[n]`` in microsiemens, 4 Hz.
        temp: skin temperature ``[n]`` in degrees Celsius, 4 Hz.
    """

    acc: Signal
    bvp: Signal
    eda: Signal
    temp: Signal

    def signals(self) -> dict[str, Signal]:
        """The four signals under the stems of their E4 files."""
        return {"ACC": self.acc, "BVP": self.bvp, "EDA": self.eda, "TEMP": self.temp}


def read_e4(source: Path) -> WristRecording:
    """Read ACC, BVP, EDA and TEMP of an E4 session; time 0 is the first pulse (BVP) sample.

    Args:
        source: the session's zip file, or the folder with its unpacked files.

    Raises:
        SubjectError: a file is missing, cut off, has another header than the E4's, or holds a sample that is no
            finite number; the message names file and line.

    Source: the E4's own ``info.txt`` (line 1 UTC start, line 2 rate in Hz, then samples).
    """
    if source.is_dir():
        parsed = {stem: _parse(_read_from_folder(source, stem), stem, f"{source / stem}.csv") for stem in E4_FILES}
    else:
        parsed = _read_zip(source)
    zero = parsed["BVP"][0]
    signals = {stem: Signal(samples, E4_FILES[stem][0], utc - zero) for stem, (utc, samples) in parsed.items()}
    acc = Signal(signals["ACC"].samples / ACC_COUNTS_PER_G, signals["ACC"].rate, signals["ACC"].start)
    return WristRecording(acc=acc, bvp=signals["BVP"], eda=signals["EDA"], temp=signals["TEMP"])


def _read_from_folder(folder: Path, stem: str) -> bytes:
    try:
        return (folder / f"{stem}.csv").read_bytes()
    except FileNotFoundError as error:
        raise SubjectError(f"{folder} has no {stem}.csv; unpack the E4 zip again into this folder.") from error


def _read_zip(path: Path) -> dict[str, tuple[float, np.ndarray]]:
    file = io.BytesIO(path.read_bytes())  # at once: what fails below is the content's fault, not the disk's
    try:
        with zipfile.ZipFile(file) as archive:
            members = {Path(name).name: name for name in archive.namelist()}
            found = {stem: archive.read(members[f"{stem}.csv"]) for stem in E4_FILES if f"{stem}.csv" in members}
    except Exception as error:  # zipfile raises a dozen types for damaged files; all are passed on
        raise SubjectError(f"{path} is damaged or cut off ({error}); download it again.") from error
    parsed = {}
    for stem in E4_FILES:
        if stem not in found:
            raise SubjectError(f"{path} has no {stem}.csv (it holds {sorted(members)}); download it again.")
        parsed[stem] = _parse(found[stem], stem, f"{path}:{members[f'{stem}.csv']}")
    return parsed


def _parse(content: bytes, stem: str, where: str) -> tuple[float, np.ndarray]:
    """UTC start and samples ``[n]`` or ``[n, columns]`` of one E4 file."""
    rate, columns = E4_FILES[stem]
    lines = content.decode("latin-1").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if len(lines) < 3:
        raise SubjectError(f"{where} has {len(lines)} lines, no samples; export or download it again.")
    start, stated_rate = (_header(line, row, columns, where) for row, line in enumerate(lines[:2], start=1))
    if stated_rate != rate:
        raise SubjectError(f"{where}, line 2: the rate is {stated_rate:g} Hz, an E4 {stem} file has {rate:g} Hz; is it another file?")
    try:
        samples = np.loadtxt(io.StringIO("\n".join(lines[2:])), delimiter=",", comments=None, ndmin=2)
    except ValueError as error:
        raise _sample_error(lines, columns, where) from error
    if samples.shape != (len(lines) - 2, columns) or not np.isfinite(samples).all():
        raise _sample_error(lines, columns, where)
    return start, samples[:, 0] if columns == 1 else samples


def _header(line: str, row: int, columns: int, where: str) -> float:
    cells = line.split(",")
    values = {_number(cell) for cell in cells}
    if len(cells) != columns or len(values) != 1 or not math.isfinite(value := values.pop()):
        meaning = "the UTC start in seconds" if row == 1 else "the rate in Hz"
        raise SubjectError(
            f"{where}, line {row}: expected {meaning} in {columns} equal column(s), found {line.strip()!r}; "
            "an E4 file begins with its start time and its rate."
        )
    return value


def _sample_error(lines: list[str], columns: int, where: str) -> SubjectError:
    """Find the first line that is not ``columns`` finite numbers."""
    for row, line in enumerate(lines[2:], start=3):
        cells = line.split(",")
        if len(cells) != columns or not all(math.isfinite(_number(cell)) for cell in cells):
            return SubjectError(
                f"{where}, line {row}: expected {columns} finite number(s), found {line.strip()!r}; "
                "restore the sample from the original file."
            )
    return SubjectError(f"{where}: not a table of {columns} column(s) of numbers; restore the original file.")


def _number(cell: str) -> float:
    """The cell's value, NaN if it is no number (the callers refuse NaN)."""
    try:
        return float(cell)
    except ValueError:
        return math.nan
