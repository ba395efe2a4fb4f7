"""benchmarks/ratios.py and benchmarks/report.py on a small saved run."""

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason='the plots need matplotlib: pip install "helo-fast[train]"')
ROOT = Path(__file__).resolve().parents[1]
HZ = 2.5e9
FLOOR = 2 * 1024 * 36**2 * 100 / (32 * HZ * 2)  # seconds: 32 multiply-adds a cycle on each of two cores


def entry(group, member, seconds, **extra):
    return {"group": group, "extra_info": {"member": member, **extra}, "stats": {"median": seconds, "min": seconds}}


def saved(scaling=True):
    forward, own = "sinkhorn fwd B1024 n36", {"backend": True, "auto": "cpp", "multiply_adds": 2 * 1024 * 36**2 * 100}
    rows = [
        entry(forward, "cpp", 3 * FLOOR, **own),
        entry(forward, "eager", 90 * FLOOR, **own),
        entry(forward, "pot", 240 * FLOOR),
        entry("clock of a core", "additions", 1e-3, cycles=HZ * 1e-3),
        entry("sinkhorn tol 1e-4 B1024 n36", "cpp", 1e-3, **own),
        entry("sinkhorn tol 1e-4 B1024 n36", "pot", 59e-3),
    ]
    sizes = [*((4**k, 36) for k in range(5)), *((4**k, 256 >> k) for k in range(5))]
    for threads in (1, 2) if scaling else ():
        for batch, n in sizes:
            facts = {"batch": batch, "n": n, "threads": threads, "backend": True, "auto": "cpp"}
            rows.append(entry(f"sinkhorn scaling B{batch} n{n} threads {threads}", "auto", 1e-8 * batch * n**2 / threads, **facts))
    environment = {
        "helo_fast": "0.1.0",
        "torch": "2.13.0",
        "pot": "0.9.7",
        "threads": 2,
        "cpu": "AVX512 in torch, AVX512 in helo_fast",
        "torch_cpu_capability": "AVX512",
        "gpu": None,
        "backends": {"eager": "available", "cpp": "available"},
        "load_average_at_start": 0.0,
        "cpus": 2,
    }
    return {
        "benchmarks": rows,
        "unmeasured": [{"group": forward, "member": "compile", "reason": "no compiler | here"}],
        "machine_info": {"helo_fast": environment, "cpu": {"brand_raw": "A Processor", "hz_actual": [1, 0]}},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
    }


def python(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def docs(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(saved()))
    (tmp_path / "performance.md").write_text((ROOT / "docs" / "performance.md").read_text())
    return tmp_path


def test_table_prints_targets_beside_ratios_and_the_floor(docs):
    done = python("benchmarks/ratios.py", docs / "run.json")
    assert done.returncode == 0, done.stderr
    lines = {tuple(re.split(r"  +", line)[:5]) for line in done.stdout.splitlines()}
    assert ("sinkhorn forward, B1024 n36", "pot", "50x", "80.00x", "yes") in lines
    assert ("sinkhorn forward, B1024 n36", "compile", "30x", "not measured", "-") in lines
    assert ("sinkhorn forward, tol 1e-4, mixed, B1024 n36", "pot", "60x", "59.00x", "no") in lines
    assert ("sinkhorn forward, B1024 n36", "floor, clock", "2.5x", "3.00x", "no") in lines
    assert ("sinkhorn forward, B1024 n36", "floor, matmul rate", "-", "not measured", "-") in lines
    tolerance = f"{1e-3 / FLOOR:.2f}x"
    assert ("sinkhorn forward, tol 1e-4, mixed, B1024 n36", "floor, clock", "-", tolerance, "-") in lines
    assert "32 a cycle (AVX512, two ports) x 2.50 GHz (measured) x 2 thread(s)" in done.stdout


def test_every_sinkhorn_row_has_a_floor():
    rows = "{row.group for row in r.CPU_ROWS if row.group.startswith('sinkhorn')}"
    code = f"from benchmarks import ratios as r; print({rows} == {{group for _, group, _ in r.FLOORS}})"
    assert python("-c", code).stdout == "True\n"


def test_report_writes_between_the_markers_only_and_twice_the_same(docs):
    before = (docs / "performance.md").read_text()
    done = python("-m", "benchmarks.report", docs / "run.json", docs)
    assert done.returncode == 0, done.stderr
    first = {path.name: path.read_text() for path in docs.iterdir()}
    assert set(first) == {"run.json", "performance.md", "scaling_batch.svg", "scaling_size.svg", "scaling_threads.svg"}
    text = first["performance.md"]
    assert text.partition("<!--")[0] == before.partition("<!--")[0] and text.rstrip().endswith("<!-- to here -->")
    assert "| sinkhorn forward, B1024 n36 | pot | 50x | 80.00x | yes | cpp; " in text
    assert "no compiler \\| here" in text and "A Processor at 2.5 GHz" in text
    assert "1 thread: time ~ B^1.00 (B 16 to 256); time of a problem ~ n^2.00 (n 64 to 256)." in text
    assert "2 threads over one: 2.00x at B 256, n 36." in text
    for name in ("batch", "size", "threads"):
        assert f"(scaling_{name}.svg)" in text
    assert python("-m", "benchmarks.report", docs / "run.json", docs).returncode == 0
    assert {path.name: path.read_text() for path in docs.iterdir()} == first


def test_plots_are_small_neutral_and_labelled(docs):
    assert python("-m", "benchmarks.report", docs / "run.json", docs).returncode == 0
    labels = {
        "batch": ("time (ms)", "linear"),
        "size": ("time of a problem (µs)", "quadratic"),
        "threads": ("speed-up over one thread", "2 threads"),
    }
    for name, texts in labels.items():
        path = docs / f"scaling_{name}.svg"
        assert path.stat().st_size < 60_000
        svg = path.read_text()
        found = {"".join(node.itertext()).strip() for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}
        assert set(texts) <= found, found
        assert "#ffffff" not in svg and "dc:date" not in svg


@pytest.mark.parametrize("broken", ("no scaling rows", "no marker", "no run"))
def test_nothing_is_written_where_something_is_missing(docs, broken):
    if broken == "no scaling rows":
        (docs / "run.json").write_text(json.dumps(saved(scaling=False)))
    elif broken == "no marker":
        (docs / "performance.md").write_text("# Performance\n")
    else:
        (docs / "run.json").write_text("{}")
    before = (docs / "performance.md").read_text()
    done = python("-m", "benchmarks.report", docs / "run.json", docs)
    assert done.returncode == 1 and "nothing written" in done.stderr and "Traceback" not in done.stderr
    assert (docs / "performance.md").read_text() == before and not list(docs.glob("*.svg"))
