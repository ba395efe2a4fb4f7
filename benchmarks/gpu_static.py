"""What the compilers make of the GPU kernels: registers, spills and shared memory, without a GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may use on sm_80 and sm_90


def resources(cubin: bytes, folder: Path) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) of a compiled kernel; what it spills is in the second."""
    from triton import knobs

    (folder / "kernel.cubin").write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(folder / "kernel.cubin")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed.stdout + printed.stderr)
    if not found:
        raise RuntimeError(f"cuobjdump prints no resource usage:\n{printed.stdout}{printed.stderr}")
    return int(found[1]), int(found[2]) + int(found[3])
