"""The core's clock, from a chain of dependent additions: one a cycle on every processor in use.

Each addition needs the one before it, so that neither width nor reordering helps; both operands are registers, since some
processors fold additions of constants away. What the system reports as a frequency is often the nominal one.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

ADDITIONS_A_BLOCK = 16
_SOURCE = """
#define PAIR x += y; __asm__ volatile("" : "+r"(x)); y += x; __asm__ volatile("" : "+r"(y));
unsigned long long additions(long long blocks) {
  unsigned long long x = 0, y = 1;
  for (long long i = 0; i < blocks; ++i) { PAIR PAIR PAIR PAIR PAIR PAIR PAIR PAIR }
  return y;
}
"""


def compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc").split()[0])


@cache
def additions() -> Callable[[int], int]:
    """(blocks) -> the Fibonacci number of index 1 + 16 blocks, modulo 2^64, by that many dependent additions.

    Raises:
        subprocess.CalledProcessError: the compiler failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "clock.so"
        command = [compiler(), "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=_SOURCE, text=True, check=True, capture_output=True)
        function = ctypes.CDLL(str(library)).additions
    function.argtypes, function.restype = [ctypes.c_longlong], ctypes.c_ulonglong
    return function
