"""How a kernel is compiled: one description that its launcher, the checks without a GPU and their table share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel: every kernel file lists its own in ``variants()``, one per entry of its table of configurations."""

    name: str  # what a table calls it: "float32 64 x 64"
    kernel: triton.JITFunction
    pointers: Mapping[str, torch.dtype]  # parameters that are tensors
    constants: Mapping[str, object]  # tl.constexpr parameters, strides of 1 and tensors of None
    options: Mapping[str, object]  # num_warps, maxnreg, ...: as given at a launch

    def compile(self, architecture: int) -> CompiledKernel:
        """For sm_<architecture>, without a GPU, as a launch with 16-byte aligned tensors would compile it; the rest are 32-bit integers
        unless annotated."""
        names = [parameter.name for parameter in self.kernel.params]
        unknown = [name for name in (*self.pointers, *self.constants) if name not in names]
        if unknown:
            raise ValueError(f"{self.kernel.__name__} has no parameter {', '.join(unknown)}; it has {', '.join(names)}")
        signature = {parameter.name: parameter.annotation_type or "i32" for parameter in self.kernel.params}
        signature |= {name: _POINTERS[dtype] for name, dtype in self.pointers.items()} | dict.fromkeys(self.constants, "constexpr")
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in self.pointers if name not in self.constants}
        source = ASTSource(self.kernel, signature, dict(self.constants), aligned)
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(self.options))
