"""The run on a GPU, tried on the CPU: parts that fail, hang or cannot run lose nothing of what they and the others found."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from benchmarks import gpu_check, gpu_parts, gpu_report, gpu_steps
from benchmarks.gpu_check import CANNOT, Part

ROWS = "import json, sys, time; seconds, rows = sys.argv[1:]; rows = open(rows, 'a'); "


def part(name, then, seconds=60):
    code = ROWS + f"print('the log of {name}', flush=True); rows.write(json.dumps(dict(found='{name}')) + '\\n'); rows.flush(); {then}"
    return Part(name, seconds, (sys.executable, "-c", code))


def test_a_part_that_fails_hangs_or_cannot_run_loses_nothing(tmp_path):
    path = tmp_path / "results" / "gpu.json"
    hangs = "rows.write('{\"half'); rows.flush(); time.sleep(60)"
    cannot = f"rows.write(json.dumps(dict(reason='no sanitizer')) + '\\n'); rows.flush(); sys.exit({CANNOT})"
    plan = [
        part("well", "sys.exit(0)"),
        part("failing", "sys.exit(3)"),
        part("hanging", hangs, gpu_check.LEAST),
        part("unable", cannot),
        Part("skipped", 60, (), "it is for a GPU"),
        part("last", "sys.exit(0)"),
    ]
    result, written = gpu_check.run(plan, 120, lambda result: path, commit="c", device="cpu", quick=True, chosen=[])
    assert written == path and json.loads(path.read_text()) == result and not path.with_suffix(".partial").exists()
    found = result["parts"]
    assert [found[name]["status"] for name in found] == ["ok", "failed", "timed out", "not run", "not run", "ok"]
    for name in ("well", "failing", "hanging", "unable", "last"):
        assert found[name]["rows"][0] == {"found": name}
    assert found["failing"]["reason"] == "exit status 3" and "the log of failing" in found["failing"]["log"]
    assert found["hanging"]["rows"] == [{"found": "hanging"}] and "ran out of its 5 s" in found["hanging"]["reason"]
    assert found["unable"]["reason"] == "no sanitizer" and found["skipped"]["reason"] == "it is for a GPU"
    table = "\n".join(gpu_report.tables(result))
    assert all(name in table for name in found) and "timed out" in table


def test_time_used_up():
    start = time.monotonic()
    found = gpu_check.run_part(part("late", "sys.exit(0)"), gpu_check.LEAST - 1)
    assert found["status"] == "not run" and "used up" in found["reason"] and time.monotonic() - start < 1


def test_a_quick_run_on_the_cpu(tmp_path):
    command = (sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--quick", "--commit", "abc")
    done = subprocess.run(command, cwd=gpu_check.ROOT, env=os.environ | {"OUT": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("local-cpu-") and done.stdout.rstrip().endswith(str(path))
    result = json.loads(path.read_text())
    assert result["commit"] == "abc"
    statuses = {name: found["status"] for name, found in result["parts"].items()}
    assert {name for name, status in statuses.items() if status == "ok"} == {"environment", "ops", "steps", "batch"}
    measured = {(row["case"], row["member"]) for row in result["parts"]["ops"]["rows"] if row.get("median_ms", 0) > 0}
    assert {member for _, member in measured} == {"eager", "cpp", "pot"} and len({case for case, _ in measured}) == 4
    steps = [row for row in result["parts"]["steps"]["rows"] if "median_ms" in row]
    assert {(row["member"], row["mode"]) for row in steps} == {("cpp first", "plain"), ("eager", "plain")}
    assert [row["largest"] for row in result["parts"]["batch"]["rows"]] == [8, 8]
    assert "times faster than" in done.stdout


@pytest.mark.parametrize("line", ("raise SystemExit(1)", "assert False"))
def test_a_failed_test_is_reported_with_its_message(tmp_path, line):
    file, rows = tmp_path / "test_it.py", gpu_parts.Rows(tmp_path / "rows")
    file.write_text(f"import pytest\ndef test_good(): pass\ndef test_bad():\n    {line}\ndef test_out(): pytest.skip('no card')\n")
    code = "import sys, pytest; from pathlib import Path; from benchmarks import gpu_parts; rows = gpu_parts.Rows(Path(sys.argv[1])); "
    code += "pytest.main([sys.argv[2], '-q', '-p', 'no:cacheprovider'], plugins=[gpu_parts.Reporter(rows)]); sys.exit(int(rows.failed))"
    child = subprocess.run((sys.executable, "-c", code, str(rows.path), str(file)), cwd=gpu_check.ROOT, capture_output=True, text=True)
    (found,) = gpu_report.condense(gpu_check._read(rows.path))
    assert child.returncode == 1, child.stdout + child.stderr
    assert found["tests"] == {"passed": 1, "failed": 1, "skipped": 1} and found["skipped"] == {"no card": 1}
    assert found["failures"][0]["test"].endswith("test_bad") and line in found["failures"][0]["reason"]


def test_a_package_that_is_absent_skips_the_tests_that_use_it(tmp_path):
    file = tmp_path / "test_it.py"
    text = "import no_such_package\n\n\ndef test_without():\n    pass\n\n\ndef test_with():\n    no_such_package.solve()\n"
    file.write_text(text)
    shutil.copy(gpu_check.ROOT / "tests" / "conftest.py", tmp_path)
    options = ("-ra", "-p", "no:cacheprovider", "--skip-absent", "no_such_package")
    done = subprocess.run((sys.executable, "-m", "pytest", str(file), *options), cwd=gpu_check.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed, 1 skipped" in done.stdout and "no_such_package is not installed" in done.stdout
    assert gpu_parts.imports(text) == {"no_such_package"}


def test_every_kernel_is_sanitised():
    names = gpu_parts.kernel_names()
    for source in (gpu_check.ROOT / "csrc" / "cuda").glob("*.cu"):
        kernels = source.read_text().count("__global__")
        assert sum(name in source.read_text() for name in names) >= kernels
    assert any(name.startswith("sinkhorn") for name in names)


@pytest.mark.parametrize("capacity", (1024, 1500, 40_000))
def test_the_largest_batch_is_found(capacity):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= capacity

    good, bad, stopped = gpu_steps.largest(fits, 1024, 2**24, time.monotonic() + 60)
    assert stopped == "found" and good <= capacity < bad and bad - good <= max(0.03 * bad, 1) and len(set(tried)) == len(tried)


def test_the_largest_batch_search_ends():
    assert gpu_steps.largest(lambda batch: False, 4, 64, time.monotonic() + 60) == (0, 1, "found")
    assert gpu_steps.largest(lambda batch: True, 4, 64, time.monotonic() + 60) == (64, None, "cap reached")
    assert gpu_steps.largest(lambda batch: True, 4, 64, time.monotonic() - 1) == (0, None, "time used up")


def test_kernels_and_launches_are_counted():
    events = [
        ("sinkhorn_kernel", True),
        ("Memcpy DtoD", True),
        ("cudaLaunchKernel", False),
        ("cuLaunchKernelEx", False),
        ("aten::mm", False),
    ]
    assert gpu_steps.count(events * 2, 2) == {"kernels": 1, "launches": 2}


def test_only_a_whole_run_on_a_gpu_is_named_for_the_record(tmp_path):
    environment = {"environment": {"rows": [{"gpu": "NVIDIA H200"}]}}
    facts = {"device": "cuda", "quick": False, "chosen": [], "started": "2030-01-02T03:04:05+00:00", "parts": environment}
    assert gpu_check.result_path(tmp_path, facts).name == "nvidia-h200-2030-01-02.json"
    assert gpu_check.result_path(tmp_path, facts | {"chosen": ["ops"]}).name == "local-nvidia-h200-ops-2030-01-02.json"
    assert gpu_check.result_path(tmp_path, facts | {"quick": True}).name.startswith("local-")
    assert gpu_check.result_path(None, facts).parent == gpu_check.RESULTS


def test_targets_are_compared():
    rows = [
        {"case": "sinkhorn B8192 n36", "member": "triton", "median_ms": 2.0, "over_floor": 2.5, "peak_bytes": 2**20},
        {"case": "sinkhorn B8192 n36", "member": "pot", "median_ms": 110.0, "over_floor": 137.0, "peak_bytes": 2**21},
    ]
    table = gpu_report.operators(rows)
    assert table[1][2:] == ("2", "2.50 (at most 3)", "1", "pot 55.00x (target 50x)") and table[2][-1] == ""
    steps = [
        {"batch": 8192, "member": member, "mode": "plain", "median_ms": ms, "peak_bytes": peak, "kernels": 60, "launches": 60}
        for member, ms, peak in (("triton first", 10.0, 2**20), ("eager", 50.0, 2**24))
    ]
    assert gpu_report.steps(steps)[1][-2:] == ("5.00x (target 4x)", "16.00x (target 8x)")
