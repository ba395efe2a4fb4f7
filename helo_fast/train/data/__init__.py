"""Data sets by name. Nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from helo_fast.train.data.base import EmotionDataModule

DATASETS: dict[str, str] = {
    "synthetic": "helo_fast.train.data.synthetic.SyntheticData",
    "dmer": "helo_fast.train.data.dmer.DMERData",
    "wesad": "helo_fast.train.data.wesad.WESADData",
}


def resolve(name: str) -> type[EmotionDataModule]:
    """The data module class of a name in ``DATASETS``, or of an import path ``package.module.Class``.

    Raises:
        ValueError: neither a known name nor an import path, or not an EmotionDataModule.
        ImportError: the import path's module cannot be imported.

    Example:
        >>> resolve("synthetic").__name__
        'SyntheticData'
    """
    module_name, _, class_name = DATASETS.get(name, name).replace(":", ".").rpartition(".")
    if not module_name:
        raise ValueError(f"data: {name!r} is none of {', '.join(DATASETS)}; give one of these or an import path package.module.Class")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(f"data: cannot import {module_name!r} for {name!r}: {error}", name=error.name) from error
    found = getattr(module, class_name, None)
    # here, since base imports Lightning
    from helo_fast.train.data.base import EmotionDataModule

    if not (isinstance(found, type) and issubclass(found, EmotionDataModule)):
        raise ValueError(f"data: {name!r} is not a subclass of helo_fast.train.data.base.EmotionDataModule: {found!r}")
    return found
