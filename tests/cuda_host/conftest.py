"""csrc/common compiled for the host, its lanes taking turns: how the tests of the CUDA kernels reach its programs."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
FLAGS = {
    "plain": ("-O1",),
    "sanitized": ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover"),
}


@pytest.fixture(autouse=True)
def one_thread():
    """For the reference: on problems this small, beside a compiler at work, two threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def programs(request, tmp_path_factory):
    """programs(source, flags), a function; see talk(). The module's SOURCES compile side by side, from the first question on."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: it compiles the kernels for the host")
    folder = tmp_path_factory.mktemp("cuda_host")

    def build(source, flags):
        target = folder / f"{source}-{flags}"
        options = ("-std=c++17", "-Wall", "-Wextra", "-Wno-clobbered", "-Werror", "-Icsrc", f"-I{FOLDER}")
        command = ("g++", *FLAGS[flags], *options, str(FOLDER / f"{source}.cpp"), "-o", str(target))
        return target, subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        asked = {(source, flags): pool.submit(build, source, flags) for flags in FLAGS for source in request.module.SOURCES}

        def program(source, flags):
            target, done = asked[source, flags].result()
            assert done.returncode == 0, done.stderr[-3000:]
            return lambda *arguments: talk(target, *arguments)

        yield program


def talk(program, words, tensors, wanted):
    """The tensors that a program writes, each wanted as (shape, dtype); words are its arguments, a dtype's without "torch."."""
    given = b"".join(t.contiguous().numpy().tobytes() for t in tensors)
    command = [str(program), *(str(word).removeprefix("torch.") for word in words)]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # a sanitizer's library wants to be the first
    done = subprocess.run(command, input=given, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    found, at = [], 0
    for shape, dtype in wanted:
        size = torch.Size(shape).numel() * dtype.itemsize
        part = bytearray(done.stdout[at : at + size])
        found.append(torch.frombuffer(part, dtype=dtype).view(shape) if size else torch.empty(shape, dtype=dtype))
        at += size
    assert at == len(done.stdout)
    return found
