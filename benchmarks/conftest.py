"""Groups, members and the environment in the saved JSON, with the reason for each member that gave no time."""

from __future__ import annotations

import os

import pytest

from .harness import Bench, environment

_unmeasured = pytest.StashKey[list]()
_load = pytest.StashKey[object]()


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, default=1.5, help="for each benchmark's rounds, three at least; 0: one round (1.5)")


def pytest_configure(config):
    config.stash[_unmeasured] = []
    config.stash[_load] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def pytest_collection_modifyitems(config, items):
    """Without -m, the benchmarks marked large are left out."""
    if config.getoption("-m"):
        return
    large = [item for item in items if item.get_closest_marker("large")]
    config.hook.pytest_deselected(items=large)
    items[:] = [item for item in items if item not in large]


@pytest.fixture
def bench(benchmark, request):
    """Times the member ``member`` of the group ``case.group`` on ``case.device``, the test's two parameters."""
    parameters = request.node.callspec.params
    benchmark.group = parameters["case"].group
    benchmark.extra_info.update(member=parameters["member"], environment=environment())
    return Bench(benchmark, parameters["case"].device, request.config.getoption("--seconds"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    parameters = getattr(item, "callspec", None) and item.callspec.params
    if parameters and "member" in parameters and report.outcome != "passed":
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else f"failed: {call.excinfo.exconly().splitlines()[0]}"
        entry = {"group": parameters["case"].group, "member": parameters["member"], "reason": reason}
        item.config.stash[_unmeasured].append(entry)
    return report


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["helo_fast"] = environment() | {"load_average_at_start": config.stash[_load], "cpus": os.cpu_count()}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["unmeasured"] = config.stash[_unmeasured]
