"""A folder of features that were made from files once: found again by the files' contents and the recipe."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_MAGIC = b"helo-fast features 1"
_SUFFIX = ".features"


def default_folder() -> Path:
    """``$HELO_FAST_CACHE``, else ``helo-fast`` in the user's cache folder (``$XDG_CACHE_HOME``, else ``~/.cache``)."""
    if chosen := os.environ.get("HELO_FAST_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "helo-fast"


class FeatureCache:
    """Arrays kept in files, one file per entry.

    An entry's name is a hash of the contents of the input files and of the recipe, so that changed inputs or another
    recipe never find it. It is written beside its place and moved there, so that no reader and no other process sees
    half of it, and it begins with its size and checksum: a damaged file is warned of and made anew. Nothing is ever
    unpickled.

    Args:
        folder: where the entries are; it is created when the first one is written. Default: `default_folder`.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = FeatureCache(folder)
        ...     made = cache.get_or_make([], {"version": 1}, lambda: {"x": np.arange(3)})
        ...     found = cache.get_or_make([], {"version": 1}, dict)  # not called
        >>> found["x"].tolist()
        [0, 1, 2]
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = default_folder() if folder is None else Path(folder)

    def path(self, inputs: Sequence[Path], recipe: Mapping[str, Any]) -> Path:
        """Where the entry of these inputs and this recipe is, or would be.

        Args:
            inputs: files whose contents (not names or dates) decide.
            recipe: whatever else decides, as JSON; ``version`` is the making code's own.

        Raises:
            ValueError: the recipe has no version.
            TypeError: the recipe cannot be written as JSON.
        """
        if "version" not in recipe:
            raise ValueError("recipe: it has no 'version'; give one, and raise it when the code that makes the features changes")
        whole = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
        for file in inputs:
            whole.update(_digest(file))
        return self.folder / f"{whole.hexdigest()}{_SUFFIX}"

    def find(self, inputs: Sequence[Path], recipe: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
        """The entry of these inputs and this recipe, or None if there is none; a damaged one is warned of."""
        return _read(self.path(inputs, recipe))

    def get_or_make(
        self, inputs: Sequence[Path], recipe: Mapping[str, Any], make: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """The entry of these inputs and this recipe, made and kept if there is none.

        Args:
            inputs, recipe: see `path`.
            make: makes the arrays; it may read the inputs.

        Raises:
            TypeError: an array holds Python objects.
            OSError: the entry cannot be written; the message names the folder.
        """
        path = self.path(inputs, recipe)
        arrays = _read(path)
        if arrays is None:
            arrays = make()
            self._write(path, arrays)
        return arrays

    def _write(self, path: Path, arrays: Mapping[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            if array.dtype.hasobject:
                raise TypeError(f"array {name!r} holds Python objects: only numbers and strings are kept, convert it")
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        payload = buffer.getvalue()
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".writing-")
            with os.fdopen(handle, "wb") as file:
                file.write(_header(payload) + payload)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            raise OSError(
                error.errno, f"cannot keep features in {self.folder}: {error.strerror}; free space or choose another cache folder"
            ) from error
        finally:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)


def _digest(file: Path) -> bytes:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.digest()


def _header(payload: bytes) -> bytes:
    return b"%s %d %s\n" % (_MAGIC, len(payload), hashlib.sha256(payload).hexdigest().encode())


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    header, _, payload = content.partition(b"\n")
    if header + b"\n" != _header(payload):
        return _damaged(path, "it is cut off, or its checksum is wrong")
    try:
        with np.load(io.BytesIO(payload), allow_pickle=False) as entry:
            return {name: entry[name] for name in entry.files}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:  # a good checksum over what is no archive
        return _damaged(path, str(error))


def _damaged(path: Path, why: str) -> None:
    warnings.warn(f"the cached features {path} cannot be used ({why}); they are made anew", stacklevel=4)
