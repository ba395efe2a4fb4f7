"""The run on a GPU, tried on the CPU: parts that fail, hang or cannot run lose nothing of what they and the others found."""

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch

import helo_fast
from benchmarks import gpu_check, gpu_parts, gpu_report, gpu_steps
from benchmarks.gpu_check import CANNOT, Part

ROWS = "import json, sys, time; seconds, rows = sys.argv[1:]; rows = open(rows, 'a'); "


def part(name, then, seconds=60):
    code = ROWS + f"print('the log of {name}', flush=True); rows.write(json.dumps(dict(found='{name}')) + '\\n'); rows.flush(); {then}"
    return Part(name, seconds, (sys.executable, "-c", code))


def test_a_part_that_fails_hangs_or_cannot_run_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LEAST", 2)
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
    assert found["hanging"]["rows"] == [{"found": "hanging"}] and "ran out of its 2 s" in found["hanging"]["reason"]
    assert found["unable"]["reason"] == "no sanitizer" and found["skipped"]["reason"] == "it is for a GPU"
    table = "\n".join(gpu_report.tables(result))
    assert all(name in table for name in found) and "timed out" in table


def test_what_a_part_finds_is_on_disk_and_printed_while_it_runs_and_if_its_time_runs_out(tmp_path, monkeypatch, capsys):
    """Its failed tests in a line each, too."""
    monkeypatch.setattr(gpu_check, "TICK", 0.2)
    monkeypatch.setattr(gpu_check, "LEAST", 2)
    failed = dict(test="tests/test_x.py::test_y", outcome="failed", reason="E   RuntimeError: no memory\n\ntests/test_x.py:3: RuntimeError")
    row = f"rows.write(json.dumps({failed}) + '\\n'); rows.flush(); "
    plan = [part("tests", row + "time.sleep(60)", gpu_check.LEAST)]
    written = []
    monkeypatch.setattr(gpu_check, "write", lambda path, result: written.append(json.loads(json.dumps(result["parts"]["tests"]))))
    result, _ = gpu_check.run(plan, 60, lambda result: tmp_path / "gpu.json", device="cpu")
    while_running = [found["rows"][1]["failures"] for found in written if found["status"] == "running" and len(found["rows"]) == 2]
    assert while_running and written[-1]["status"] == "timed out"
    line = "tests/test_x.py::test_y: RuntimeError: no memory (tests/test_x.py:3: RuntimeError)"
    assert line in capsys.readouterr().out and while_running[0][0]["reason"] == failed["reason"]
    assert line in gpu_report.tables({**result, "commit": "c"})


def test_parts_side_by_side_run_at_the_same_time_and_with_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("POT_BACKEND_DISABLE_JAX", "")

    def meets(name, other):
        """Ends well only if the other is there at the same time."""
        files = [f"pathlib.Path({str(tmp_path / one)!r})" for one in (name, other)]
        wait = f"[time.sleep(0.01) for _ in iter({files[1]}.exists, True)]"
        return part(name, f"import os, pathlib; assert os.environ['POT_BACKEND_DISABLE_JAX'] == '1'; {files[0]}.touch(); {wait}", 30)

    first, second = meets("one", "two"), meets("two", "one")
    plan = [part("before", "sys.exit(0)"), first, dataclasses.replace(second, alongside=True)]
    assert [[one.name for one in group] for group in gpu_check.groups(plan)] == [["before"], ["one", "two"]]
    result, _ = gpu_check.run(plan, 60, lambda result: tmp_path / "gpu.json", device="cpu")
    assert [found["status"] for found in result["parts"].values()] == ["ok"] * 3, result


def test_the_budgets_fit_and_what_measures_runs_alone_before_what_may_be_cut():
    found = gpu_check.groups(gpu_check.parts("cuda", False))
    names = [[one.name for one in group] for group in found]
    assert names[2:5] == [["ops"], ["steps"], ["batch"]] and names[5][0] == "tests" and names[-1][-1] == "suite"
    assert sum(max(one.seconds for one in group) for group in found[:-1]) <= gpu_check.SECONDS - 40  # for the sanitizers
    smallest, sanitized = ([i for i, group in enumerate(names) if name in group] for name in ("smallest", "memcheck"))
    assert smallest < sanitized


def test_time_used_up(tmp_path):
    start = time.monotonic()
    late = gpu_check.Running(part("late", "sys.exit(0)"), gpu_check.LEAST - 1, tmp_path)
    found = late.found
    assert late.ended() and found["status"] == "not run" and "used up" in found["reason"] and time.monotonic() - start < 1


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
    assert {member for _, member in measured} == {"eager", "cpp", "pot"} and len({case for case, _ in measured}) == 5
    steps = [row for row in result["parts"]["steps"]["rows"] if "median_ms" in row]
    plain = [("cpp first", "plain", "float32"), ("eager", "plain", "float32"), ("cpp first", "plain", "bfloat16")]
    assert [(row["member"], row["mode"], row["dtype"]) for row in steps] == plain
    left_out = {(row["mode"], row["dtype"]) for row in result["parts"]["steps"]["rows"] if "median_ms" not in row}
    assert left_out == {("graph", "float32"), ("plain", "bfloat16"), ("graph", "bfloat16"), ("compiled", "float32")}
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
    (failure,) = found["failures"]
    assert failure["test"].endswith("test_bad") and line in failure["reason"]
    assert re.search(r"(SystemExit: 1|assert False) \(.*test_it.py:4: \w+\)$", failure["line"])
    assert gpu_report.failed_tests([found]) == [f"{failure['test']}: {failure['line']}"]


def test_a_package_that_is_absent_skips_the_tests_that_use_it(tmp_path):
    file = tmp_path / "test_it.py"
    text = "import no_such_package\n\n\ndef test_without():\n    pass\n\n\ndef test_with():\n    no_such_package.solve()\n"
    file.write_text(text)
    shutil.copy(gpu_check.ROOT / "tests" / "conftest.py", tmp_path)
    options = ("-ra", "-p", "no:cacheprovider", "--skip-absent", "no_such_package")
    done = subprocess.run((sys.executable, "-m", "pytest", str(file), *options), cwd=gpu_check.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed, 1 skipped" in done.stdout and "no_such_package is not installed" in done.stdout
    assert gpu_parts.imports(text) == {"no_such_package"}


@pytest.mark.parametrize(
    "printed, status, outcome",
    (
        ("========= ERROR SUMMARY: 0 errors", 0, 0),
        ("========= ERROR SUMMARY: 3 errors", 9, "memcheck: ERROR SUMMARY: 3 errors, exit status 9"),
        ("========= ERROR SUMMARY: 0 errors", 1, "memcheck: ERROR SUMMARY: 0 errors, exit status 1"),
        ("it never began", 0, "memcheck: no summary, exit status 0"),
        ("Error: Device not supported", 0, CANNOT),
        (None, None, CANNOT),
    ),
)
def test_only_a_clean_summary_of_a_sanitizer_is_well(tmp_path, monkeypatch, capsys, printed, status, outcome):
    monkeypatch.setattr(gpu_parts, "kernel_names", lambda: ["sinkhorn"])
    monkeypatch.setenv("PATH", str(tmp_path))
    if printed is not None:
        script = tmp_path / "compute-sanitizer"
        script.write_text(f"#!/bin/sh\necho '{printed}'\nexit {status}\n")
        script.chmod(0o755)
    rows = gpu_parts.Rows(tmp_path / "rows")
    result = gpu_parts.sanitize(argparse.Namespace(name="memcheck", seconds=60, device="cuda"), rows) or int(rows.failed)
    (found,) = gpu_check._read(rows.path)
    if isinstance(outcome, int):
        assert result == outcome
    else:
        assert result not in (0, CANNOT) and found["failed"] and found["reason"] == outcome
    assert printed is None or printed in capsys.readouterr().out


@pytest.mark.parametrize("cpus, workers", ((16, "14"), (64, "14"), (8, "6"), (2, "1")))
def test_the_tests_leave_two_processors_and_run_a_thread_each(tmp_path, monkeypatch, cpus, workers):
    called = []
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # so that it is restored
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(pytest, "main", lambda arguments, plugins: called.append((arguments, os.environ["OMP_NUM_THREADS"])) or 0)
    assert gpu_parts.test(argparse.Namespace(name="tests"), gpu_parts.Rows(tmp_path / "rows")) == 0
    ((arguments, threads),) = called
    assert arguments[arguments.index("-n") + 1] == workers and threads == "1"


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


class Step:
    """A training step of a linear layer."""

    label_embedding = None

    def __init__(self):
        self.model = torch.nn.Linear(3, 1)
        self.x = torch.ones(2, 3)

    def __call__(self, **options):
        self.model.zero_grad()
        loss = self.model(self.x).square().mean()
        loss.backward()
        return loss.detach()

    _step = __call__

    def answer(self):
        return self(), torch.cat([p.grad.flatten() for p in self.model.parameters()])


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_a_graph_is_held_to_the_step_run_plainly(monkeypatch, dtype):
    monkeypatch.setattr(gpu_steps, "capture", lambda function: function)
    step = Step()
    assert gpu_steps.graph(step, dtype, True)().isfinite()
    for factor in (1.1, float("nan")):
        monkeypatch.setattr(gpu_steps, "capture", lambda function, factor=factor: lambda: factor * function())
        with pytest.raises(AssertionError, match="loss differ"):
            gpu_steps.graph(step, dtype, True)

    def wrong_gradients(function):
        return lambda: (function(), [p.grad.mul_(1.1) for p in step.model.parameters()])[0]

    monkeypatch.setattr(gpu_steps, "capture", wrong_gradients)
    with pytest.raises(AssertionError, match="gradients differ"):
        gpu_steps.graph(step, dtype, True)


@pytest.mark.parametrize("mode", ("plain", "graph"))
def test_the_optimisers_step_is_taken(monkeypatch, mode):
    monkeypatch.setattr(gpu_steps, "capture", lambda function: function)
    step = Step()
    before = step()
    assert gpu_steps.with_adam(step, mode)() < before
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    with pytest.raises(AssertionError, match="leaves the parameters"):
        gpu_steps.with_adam(step, mode)


def test_a_loss_that_is_not_finite_is_a_failure(monkeypatch):
    monkeypatch.setitem(gpu_steps.MODES, "plain", lambda step, dtype, own: lambda: torch.tensor(float("nan")))
    assert gpu_steps.one("plain", "float32", 2, "cpp first", "cpu", 0.01) == {"failed": True, "reason": "AssertionError: the loss is nan"}


def test_synchronisation_is_found(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run(message):
        def step():
            if modes and modes[-1] == "error" and message:
                raise RuntimeError(message)

        return step

    assert gpu_steps.synchronisation(run(None), "cuda", True) == {"synchronises": False}
    found = gpu_steps.synchronisation(run("called a synchronizing CUDA operation"), "cuda", True)
    assert found["synchronises"] and found["failed"] and "called a synchronizing" in found["message"]
    assert "failed" not in gpu_steps.synchronisation(run("called a synchronizing CUDA operation"), "cuda", False)
    with pytest.raises(RuntimeError, match="out of memory"):
        gpu_steps.synchronisation(run("out of memory"), "cuda", True)
    assert modes == ["error", 0] * 4


def test_no_way_of_running_begins_when_time_is_used_up(monkeypatch):
    monkeypatch.setattr(gpu_steps, "members", lambda device: [("eager", None)])
    monkeypatch.setattr(gpu_steps, "wrong", lambda *_: None)
    rows = list(gpu_steps.measure((4,), "cuda", 0.01, False, 0))
    assert len(rows) == len(gpu_steps.RUNS) and {row["reason"] for row in rows} == {"the part's time is used up"}


def test_the_smallest_cases_run_and_an_operator_that_fails_is_a_failure(tmp_path, monkeypatch):
    options = argparse.Namespace(device="cpu")
    assert gpu_parts.smallest(options, gpu_parts.Rows(tmp_path / "good")) == 0
    rows = gpu_check._read(tmp_path / "good")
    assert {row["op"]: row["ran"] for row in rows} == dict.fromkeys(("sinkhorn", "gromov", "lcd_attention", "residual_norm"), True)
    monkeypatch.setattr(helo_fast, "lcd_attention", lambda q, *rest, **options: q * float("nan"))
    assert gpu_parts.smallest(options, gpu_parts.Rows(tmp_path / "bad")) == 1
    assert [row["op"] for row in gpu_check._read(tmp_path / "bad") if row["failed"]] == ["lcd_attention"]


def test_only_a_whole_run_on_a_gpu_is_named_for_the_record(tmp_path):
    environment = {"environment": {"rows": [{"gpu": "NVIDIA H200"}]}}
    facts = {"device": "cuda", "quick": False, "chosen": [], "started": "2030-01-02T03:04:05+00:00", "parts": environment}
    assert gpu_check.result_path(tmp_path, facts).name == "nvidia-h200-2030-01-02.json"
    assert gpu_check.result_path(tmp_path, facts | {"chosen": ["ops"]}).name == "local-nvidia-h200-ops-2030-01-02.json"
    assert gpu_check.result_path(tmp_path, facts | {"quick": True}).name.startswith("local-")
    assert gpu_check.result_path(None, facts).parent == gpu_check.RESULTS


def test_what_failed_is_told_and_a_long_list_is_cut():
    rows = [{"test": f"test_{i}", "outcome": "failed", "reason": f"E   KeyError: {i}\nE   more\n\na.py:1: KeyError"} for i in range(60)]
    parts = {
        "build": {"status": "failed", "seconds": 1.0, "rows": [{"failed": True, "reason": "cuda: not built"}]},
        "smallest": {"status": "ok", "seconds": 1.0, "rows": [{"op": "gromov", "backend": "cuda", "reason": "not for this"}]},
        "tests": {"status": "failed", "seconds": 1.0, "rows": gpu_report.condense(rows)},
    }
    lines = gpu_report.tables({"device": "cuda", "commit": "c", "parts": parts})
    assert "build: cuda: not built" in lines and not any("not for this" in line for line in lines)
    assert [line for line in lines if line.startswith("test_")][-1] == "test_49: KeyError: 49 (a.py:1: KeyError)"
    assert "and 10 more failures" in lines and len(parts["tests"]["rows"][0]["failures"]) == 60


def test_targets_are_compared():
    rows = [
        {"case": "sinkhorn B8192 n36", "member": "triton", "median_ms": 2.0, "over_floor": 2.5, "peak_bytes": 2**20},
        {"case": "sinkhorn B8192 n36", "member": "pot", "median_ms": 110.0, "over_floor": 137.0, "peak_bytes": 2**21},
    ]
    table = gpu_report.operators(rows)
    assert table[1][2:] == ("2", "2.50 (at most 3)", "1", "pot 55.00x (target 50x)") and table[2][-1] == ""
    steps = [
        {"batch": 8192, "member": member, "mode": "plain", "median_ms": ms, "peak_bytes": peak, "kernels": 60, "launches": 60}
        | {"mode": "plain", "dtype": "float32", "launches_with_adam": 58.0, "synchronises": False}
        for member, ms, peak in (("triton first", 10.0, 2**20), ("eager", 50.0, 2**24))
    ]
    heads, own, eager = gpu_report.steps(steps)
    assert own[-2:] == ("5.00x (target 4x)", "16.00x (target 8x)")
    assert dict(zip(heads, own))["launches + Adam"] == "58 (at most 60)" and dict(zip(heads, own))["synchronises"] == "no"
    assert dict(zip(heads, eager))["launches + Adam"] == "58"
