"""Shared fixtures, and the option that turns skipped back ends into failures."""

import pytest
import torch

from helo_fast import _registry
from helo_fast.testing import shared_folder


def pytest_addoption(parser):
    parser.addoption("--require-backend", action="append", default=[], metavar="NAME", help="fail, rather than skip, where NAME cannot run")
    parser.addoption("--require-shared", action="store_true", help="fail, rather than skip, where the shared folder is absent")


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
