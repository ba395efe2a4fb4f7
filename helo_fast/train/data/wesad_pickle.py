"""The wrist signals of WESAD's ``SX.pkl``, read by an unpickler that admits numpy arrays and nothing else."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from helo_fast.train.data.e4 import ACC_COUNTS_PER_G, E4_FILES, Signal, SubjectError, WristRecording


class _Dtype:
    """Stands in for ``numpy.dtype``: numbers only. numpy's own can be told, by a forged state, that bytes are pointers."""

    def __init__(self, text: str, *_: object) -> None:
        if not isinstance(text, str) or not re.fullmatch(r"[<>|=]?([iuf][248]|[iub]1)", text):
            raise pickle.UnpicklingError(f"it holds an array of {text!r}, which is no number")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        self.dtype = self.dtype.newbyteorder(order if order in ("<", ">") else "|")


class _Array:
    """Stands in for ``numpy.ndarray``: keeps the parts until `array` is asked for."""

    def __init__(self, *_: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """The array; ValueError where the parts do not fit together."""
        if not isinstance(self.state, tuple) or len(self.state) != 5 or not isinstance(self.state[2], _Dtype):
            raise ValueError("it is not in the form of a pickled array")
        _, shape, dtype, fortran, content = self.state
        content = content.encode("latin-1") if isinstance(content, str) else content  # Python 2 wrote bytes as text
        return np.frombuffer(content, dtype.dtype).reshape(shape, order="F" if fortran else "C")


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _frombuffer(content: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.state = (1, shape, dtype, order == "F", content)
    return array


def _scalar(dtype: _Dtype, content: bytes) -> _Array:
    return _frombuffer(content, dtype, (), "C")


def _encode(text: str, encoding: str = "latin-1") -> bytes:
    """What a Python 3 pickle of protocol 2 calls to rebuild bytes."""
    if encoding.lower() not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it names the codec {encoding!r}, which no array needs")
    return text.encode("latin-1")


class NumpyOnlyUnpickler(pickle.Unpickler):
    """An unpickler of plain containers and arrays of numbers; any other name in the file is refused, not called.

    A pickle is a program: loading one with ``pickle.load`` can run any code. Here the names that a pickled array uses
    lead to stand-ins that keep shape, type and bytes, so that not even numpy's own unpickling, which trusts its
    input, is called. Everything else raises ``pickle.UnpicklingError``.
    """

    _admitted: dict[tuple[str, str], object] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,
        # numpy 2 moved these to numpy._core; the name in a file is that of the numpy that wrote it
        **{
            (f"{package}.{module}", name): stand_in
            for package in ("numpy.core", "numpy._core")
            for module, name, stand_in in (
                ("multiarray", "_reconstruct", _reconstruct),
                ("multiarray", "scalar", _scalar),
                ("numeric", "_frombuffer", _frombuffer),
            )
        },
    }

    def find_class(self, module: str, name: str) -> object:
        """The stand-in of that name, or ``pickle.UnpicklingError``."""
        try:
            return self._admitted[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an array") from None


def read_wrist_pickle(path: Path, subject: str) -> WristRecording:
    """Read the wrist signals ``data["signal"]["wrist"]`` of ``SX.pkl``; time 0 is the protocol's.

    The file is a latin-1 pickle that was written by Python 2. It is opened with `NumpyOnlyUnpickler`, which refuses
    whatever is not needed for numpy arrays; even so, read only files that you trust.

    Raises:
        SubjectError: the file is damaged, names anything but numpy arrays, lacks a signal, or is another subject's.

    Source: Schmidt et al., ICMI 2018, ``wesad_readme.pdf``.
    """
    try:
        with path.open("rb") as file:
            data = NumpyOnlyUnpickler(file, encoding="latin-1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError, OverflowError) as error:
        raise SubjectError(f"{path} was refused or is damaged: {error}; download it again.") from error
    named = data.get("subject", subject) if isinstance(data, Mapping) else subject
    if named != subject:
        raise SubjectError(f"{path} is of the subject {named!r}, expected {subject!r}; put it in that subject's folder.")
    signals = {stem: _signal(data, stem, path) for stem in E4_FILES}
    acc = Signal(signals["ACC"].samples / ACC_COUNTS_PER_G, signals["ACC"].rate)
    return WristRecording(acc=acc, bvp=signals["BVP"], eda=signals["EDA"], temp=signals["TEMP"])


def _signal(data: object, stem: str, path: Path) -> Signal:
    rate, columns = E4_FILES[stem]
    where = f"{path}, data['signal']['wrist']['{stem}']"
    for key in ("signal", "wrist", stem):
        if not isinstance(data, Mapping) or key not in data:
            raise SubjectError(f"{where} is missing (no {key!r}); is it WESAD's SX.pkl?")
        data = data[key]
    if not isinstance(data, _Array):
        raise SubjectError(f"{where} is no array; is it WESAD's SX.pkl?")
    try:
        data = data.array()
    except (ValueError, TypeError) as error:
        raise SubjectError(f"{where} is damaged: {error}; download the file again.") from error
    samples = data.astype(np.float64)
    if samples.ndim == 1:
        samples = samples[:, None]
    if samples.ndim != 2 or samples.shape[1] != columns:
        raise SubjectError(f"{where} has shape {data.shape}, expected [n, {columns}].")
    bad = np.flatnonzero(~np.isfinite(samples).all(axis=1))
    if bad.size:
        raise SubjectError(f"{where}, row {bad[0]} (counted from 0) is not finite; restore the original file.")
    return Signal(samples[:, 0] if columns == 1 else samples, rate)
