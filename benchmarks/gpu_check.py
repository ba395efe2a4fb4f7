"""Everything that a GPU is needed for, in one run of nine minutes at most: ``python -m benchmarks.gpu_check``.

Builds, tests, sanitises and benchmarks in parts, each a process of its own with a budget of time: one that fails or runs out of time
keeps what it has measured and does not keep the others from running. Writes <gpu>-<date>.json after every part, into $OUT if that is
set and else into benchmarks/results, and prints the tables at the end. Needs torch, Triton, pytest and nvcc, and downloads nothing.
The card's settings are read, never changed. Exit status 1 if a part failed or ran out of time.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import gpu_report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SECONDS = 540  # of a whole run
LEAST = 5  # seconds: a part is not begun with less
CANNOT = 77  # exit status of a part that cannot run here; its last row holds the reason
LOG = 6000  # characters of a part's output that are kept if it is not well


@dataclass(frozen=True)
class Part:
    """What one child process does. Its command gets two more arguments: its seconds, and the file of its rows, a line of JSON each."""

    name: str
    seconds: int  # at most
    command: tuple[str, ...]
    skip: str | None = None  # why it is not run


def parts(device: str, quick: bool, chosen: list[str] | None = None) -> list[Part]:
    """In order; the last has what time the others leave."""
    needs_gpu = None if device == "cuda" else "it is for a GPU"
    plan = {
        "environment": (20, None),
        "build": (90, needs_gpu or ("a quick run takes what is built" if quick else None)),
        "tests": (120, needs_gpu),
        "memcheck": (40, needs_gpu),
        "racecheck": (40, needs_gpu),
        "ops": (100, None),
        "steps": (80, None),
        "batch": (40, None),
        "suite": (SECONDS, needs_gpu or ("not part of a quick run" if quick else None)),
    }
    found = []
    for name, (seconds, skip) in plan.items():
        command = (sys.executable, "-m", "benchmarks.gpu_parts", name, "--device", device, *(["--quick"] if quick else []))
        if chosen and name not in chosen and name != "environment":
            skip = "not asked for"
        found.append(Part(name, seconds, command, skip))
    return found


def run_part(part: Part, seconds: float) -> dict:
    """{"status": "ok", "failed", "timed out" or "not run", "seconds", "rows", and where it is not well "reason" and "log"}."""
    if part.skip is not None:
        return {"status": "not run", "seconds": 0.0, "reason": part.skip, "rows": []}
    budget = min(part.seconds, seconds)
    if budget < LEAST:
        return {"status": "not run", "seconds": 0.0, "reason": "the run's time is used up", "rows": []}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder) / "rows", Path(folder) / "log"
        with log.open("wb") as output:
            # a session of its own, to be ended with all that it has started
            command = [*part.command, f"{budget:.0f}", str(rows)]
            child = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                status = child.wait(budget)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        found = _read(rows)
        text = log.read_text(errors="replace")
    result = {"seconds": round(time.monotonic() - start, 1), "rows": gpu_report.condense(found)}
    if status == 0:
        return {"status": "ok", **result}
    if status == CANNOT:
        return {"status": "not run", **result, "reason": found.pop()["reason"] if found else "it does not say why", "log": text[-LOG:]}
    reason = f"ran out of its {budget:.0f} s" if status is None else f"exit status {status}"
    return {"status": "timed out" if status is None else "failed", **result, "reason": reason, "log": text[-LOG:]}


def _read(path: Path) -> list[dict]:
    """The whole lines of a file of rows: a process that was ended may have left half of one."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def run(plan: list[Part], seconds: float, path: Callable[[dict], Path], **facts: object) -> tuple[dict, Path]:
    """The result of all parts, and where it was written after each of them."""
    end = time.monotonic() + seconds
    result = {**facts, "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "parts": {}}
    for part in plan:
        print(f"{part.name} ...", flush=True)
        found = result["parts"][part.name] = run_part(part, end - time.monotonic())
        print(f"{part.name}: {gpu_report.line(found)}", flush=True)
        write(path(result), result)
    return result, path(result)


def write(path: Path, result: dict) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, path)


def result_path(folder: Path | None, result: dict) -> Path:
    """<gpu>-<date>.json; what is no run of all parts on a GPU begins with local-, which git ignores."""
    environment = next(iter(result["parts"].get("environment", {}).get("rows", [])), {})
    gpu = re.sub(r"[^a-z0-9]+", "-", (environment.get("gpu") or result["device"]).lower()).strip("-")
    whole = result["device"] == "cuda" and not result["quick"] and not result["chosen"]
    return (folder or RESULTS) / f"{'' if whole else 'local-'}{gpu}-{'-'.join([*result['chosen'], result['started'][:10]])}.json"


@contextlib.contextmanager
def kernels_importable() -> Iterator[None]:
    """Inside, helo_fast.kernels can be imported from a checkout in which the package is not installed."""
    link = ROOT / "helo_fast" / "kernels"
    linked = importlib.util.find_spec("helo_fast.kernels") is None
    if linked:
        link.symlink_to(ROOT / "kernels")
    try:
        yield
    finally:
        if linked:
            link.unlink()


def commit() -> str | None:
    """Of the checkout, with "+changes" where it differs."""
    try:
        name, changes = (
            subprocess.run(("git", *command), cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return name + ("+changes" if changes else "")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the script itself")
    parser.add_argument("--quick", action="store_true", help="tiny cases, of what is already built")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole run, at most")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in parts("cuda", False)], help="these and environment only")
    parser.add_argument("--commit", help="what is checked, where this is no git checkout")
    options = parser.parse_args(arguments)
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    facts = {"commit": options.commit or commit(), "device": options.device, "quick": options.quick, "chosen": options.parts or []}
    with kernels_importable():
        plan = parts(options.device, options.quick, options.parts)
        result, path = run(plan, options.seconds, lambda result: result_path(folder, result), **facts)
    print("\n".join(gpu_report.tables(result)))
    print(path)
    return 1 if any(found["status"] in ("failed", "timed out") for found in result["parts"].values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
