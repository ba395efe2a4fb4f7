"""Build _C (CPU, C++) and, where nvcc is found, _C_cuda, on the LibTorch stable ABI and the limited Python API.

Environment: HELO_FAST_CUDA=0|1 (never | must), CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from glob import glob

from setuptools import Extension, find_packages, setup

TORCH_TARGET = (2, 10)  # the stable ABI compiled against; the lower bound on torch in pyproject.toml says the same
STABLE_ABI = f"-DTORCH_TARGET_VERSION={(TORCH_TARGET[0] << 56) | (TORCH_TARGET[1] << 48)}ULL"
FLAGS = ["-O3", "-std=c++17", STABLE_ABI]
# Python's own flags ask for debug information, most of a library's size.
NO_DEBUG = [] if "-g" in os.environ.get("CFLAGS", "") else ["-g0"]

# An isolated build hides the environment that the package will be installed in: look for its torch there.
sys.path += [path for path in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")) if path not in sys.path]
try:
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
except ImportError:  # setup_requires fetches a torch, and this file runs again
    setup(packages=[], setup_requires=[f"torch>={TORCH_TARGET[0]}.{TORCH_TARGET[1]}"])
    sys.exit()


def find_nvcc():
    wish, home = os.environ.get("HELO_FAST_CUDA"), os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if wish == "1" and nvcc is None:
        sys.exit("HELO_FAST_CUDA=1, but nvcc was not found: put it on PATH or set CUDA_HOME")
    return None if wish == "0" else nvcc


def architectures():
    """TORCH_CUDA_ARCH_LIST, or Ampere, Hopper and Blackwell as far as nvcc knows them, and PTX for what comes after."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"].replace(" ", ";").split(";")
    nvcc = find_nvcc()
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split() if nvcc else ()
    names = [name for name in ("8.0", "9.0", "10.0") if f"compute_{name.replace('.', '')}" in known] or ["8.0"]
    return [*names[:-1], f"{names[-1]}+PTX"]


ARCHITECTURES = architectures()


def front_ends():
    """ARCHITECTURES by run of nvcc's front end, half of its time: to it Hopper is an Ampere, as the sources use nothing newer."""
    together = [name for name in ("8.0", "9.0") if name in ARCHITECTURES]
    return [together] * bool(together) + [[name] for name in ARCHITECTURES if name not in together]


def generate_code(names):
    """nvcc's options for one of front_ends(): "9.0" is machine code, "9.0+PTX" also PTX, "9.0-virtual" PTX alone, compiled as it loads."""
    codes = []
    for name in names:
        number = name.removesuffix("+PTX").removesuffix("-virtual").replace(".", "")
        codes += [f"sm_{number}"] * (not name.endswith("-virtual")) + [f"compute_{number}"] * name.endswith(("+PTX", "-virtual"))
    return ["-gencode", f"arch=compute_{codes[0].partition('_')[2]},code=[{','.join(codes)}]"]


class Build(BuildExtension):
    def build_extension(self, extension):
        """A library that cannot be built is left out, unless HELO_FAST_CUDA=1 forces it: the package says so in info()."""
        try:
            self.link_with_nvcc(extension) if extension.name.endswith("_C_cuda") else super().build_extension(extension)
        except Exception as error:
            if extension.name.endswith("_C_cuda") and os.environ.get("HELO_FAST_CUDA") == "1":
                raise
            self.warn(f"{extension.name} was not built ({error}); the package works without it, see helo_fast.info()")
            extension.optional = True  # so that its absence is accepted later on

    def link_with_nvcc(self, extension):
        """torch's CUDAExtension refuses where torch itself has no CUDA; the stable ABI needs none."""
        output = self.get_ext_fullpath(extension.name)
        self.mkpath(os.path.dirname(output))
        flags = ["-shared", *FLAGS, "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xlinker", "--no-as-needed"]
        flags += [option for names in front_ends() for option in generate_code(names)]
        flags += ["--threads", os.environ.get("MAX_JOBS", "0"), *(f"-I{path}" for path in extension.include_dirs)]
        flags += [f"-I{sysconfig.get_path('include')}", *(f"-L{path}" for path in extension.library_dirs)]
        flags += [f"-l{name}" for name in extension.libraries]
        self.spawn([find_nvcc(), *extension.sources, *extension.depends, "-o", output, *flags])


def library(name, sources, **options):
    return Extension(
        f"helo_fast.{name}",
        sources,
        include_dirs=["csrc", *include_paths()],
        library_dirs=library_paths(),
        libraries=["torch_cpu", "torch"],
        extra_compile_args=[*FLAGS, *NO_DEBUG],
        py_limited_api=True,
        **options,
    )


# The .cu files stand in depends: BuildExtension, seeing them among the sources, would ask torch for its own CUDA.
cuda = [library("_C_cuda", ["csrc/ops_cuda.cpp"], depends=sorted(glob("csrc/cuda/*.cu")))] if find_nvcc() else []
setup(
    packages=[*find_packages(include=["helo_fast", "helo_fast.*"]), "helo_fast.kernels"],
    ext_modules=[library("_C", ["csrc/ops.cpp", *sorted(glob("csrc/cpu/*.cpp"))]), *cuda],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
