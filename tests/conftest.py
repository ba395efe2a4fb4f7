"""Shared fixtures, and the options for back ends and packages that are absent."""

import functools
import importlib.util
import inspect
import os
import sys
import types

import pytest
import torch

from helo_fast import _registry
from helo_fast.testing import shared_folder


def pytest_addoption(parser):
    parser.addoption("--require-backend", action="append", default=[], metavar="NAME", help="fail, rather than skip, where NAME cannot run")
    parser.addoption("--require-shared", action="store_true", help="fail, rather than skip, where the shared folder is absent")
    parser.addoption("--skip-absent", action="append", default=[], metavar="NAME", help="skip tests that use package NAME if it is absent")


# Files whose tests compile, or run others, for minutes: the first to start, so that no process waits for them at the end.
LONG = ("test_gpu_static", "test_triton", "test_portable", "test_cpu_capability", "test_packaging")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


class Absent(types.ModuleType):
    """A package that is not installed: a test that uses it is skipped, the others of its file run."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        pytest.skip(f"{self.__name__} is not installed", allow_module_level=True)


def pytest_configure(config):
    for name in config.getoption("--skip-absent"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = Absent(name)
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        patch_builtins_by_name()


def patch_builtins_by_name():
    """Triton's interpreter looks through all of triton.language at every call of a jitted function: a third of its time."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def builtins(package):  # first asked for where nothing is patched
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package, builder, scope):
        names = builtins(package)
        if names and is_builtin(getattr(package, names[0])):  # else the function that calls this one has patched them all
            for name in names:
                interpreter._patch_attr(package, name, getattr(package, name), builder, scope)

    interpreter._patch_builtin = patch_builtin


@pytest.fixture
def device_for(request):
    """device_for(op, name): where that back end runs; skips (under --require-backend NAME: fails) where it cannot."""

    def check(op: str, name: str) -> str:
        device = "cuda" if name == "cuda" or (name == "triton" and torch.cuda.is_available()) else "cpu"
        reason = _registry.BACKENDS[name].unavailable() or _registry._refusal(op, name, torch.empty(0, device=device))
        if reason is None:
            return device
        return (pytest.fail if name in request.config.getoption("--require-backend") else pytest.skip)(f"{name} for {op}: {reason}")

    return check


@pytest.fixture(scope="session")
def shared(request):
    """The folder with the released model's numbers and the recordings."""
    folder = shared_folder()
    if not (folder / "golden").is_dir():
        message = f"no golden numbers at {folder} (set HELO_FAST_SHARED)"
        (pytest.fail if request.config.getoption("--require-shared") else pytest.skip)(message)
    return folder
