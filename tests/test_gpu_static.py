"""What the compilers make of the GPU kernels, without a GPU: nothing spills, shared memory is within limits."""

import os

import pytest

pytest.importorskip("triton", reason='triton is not installed: pip install "helo-fast[triton]"')

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)


@pytest.mark.parametrize("architecture", (80, 90))
def test_triton_kernels_compile_without_spills(architecture, tmp_path):
    from benchmarks.gpu_static import SHARED_MEMORY, resources
    from helo_fast.kernels import sinkhorn

    variants = sinkhorn.variants()
    bad = []
    for variant in variants:
        compiled = variant.compile(architecture)
        registers, spilled = resources(compiled.asm["cubin"], tmp_path)
        if spilled or compiled.metadata.shared > SHARED_MEMORY[architecture]:
            bad.append(f"{variant.name}: {registers} registers, {spilled} bytes spilled, {compiled.metadata.shared} bytes shared")
    assert len(variants) >= 26 and not bad, "\n".join(bad)
