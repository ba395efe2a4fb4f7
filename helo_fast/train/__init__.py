"""Training, data sets, metrics and baselines for HeLo: the ``train`` extra."""

from importlib.util import find_spec as _find_spec

_missing = [name for name in ("lightning", "jsonargparse", "torchmetrics", "scipy", "sklearn", "h5py") if _find_spec(name) is None]
if _missing:
    raise ImportError(f'helo_fast.train needs {", ".join(_missing)}: pip install "helo-fast[train]"', name=_missing[0])
