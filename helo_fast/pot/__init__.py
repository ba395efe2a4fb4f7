"""Batched optimal transport with the interface of POT's ``ot.batch``: same arguments, same defaults, same fields of the result.

``from helo_fast.pot import solve_batch`` in place of ``from ot.batch import solve_batch``. POT itself is not needed.
"""

from .linear import solve_batch
from .quadratic import solve_gromov_batch
from .result import OTResult

__all__ = ["OTResult", "solve_batch", "solve_gromov_batch"]
