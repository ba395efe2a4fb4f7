"""Everything that a GPU is needed for, in one run of nine minutes at most: ``python -m benchmarks.gpu_check``.

Builds, benchmarks, tests and sanitises in parts, each a process of its own with a budget of time: one that fails or runs out of time
keeps what it has measured and does not keep the others from running. What measures runs alone and first. Writes <gpu>-<date>.json while
the parts run and after each, into $OUT if that is set and else into benchmarks/results, and prints the tables at the end. Needs torch,
Triton, pytest and nvcc, and downloads nothing. The card's settings are read, never changed. Exit status 1 if a part failed or ran out
of time.
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
PAUSE, TICK = 0.1, 5  # seconds between looks at the parts that run, and between writing what they have found so far
CANNOT = 77  # exit status of a part that cannot run here; its last row holds the reason
LOG = 6000  # characters of a part's output that are kept if it is not well
# JAX, which POT imports where it is installed, would take most of the GPU's memory, in each process.
ENVIRONMENT = {f"POT_BACKEND_DISABLE_{name}": "1" for name in ("JAX", "TENSORFLOW", "CUPY")} | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


@dataclass(frozen=True)
class Part:
    """What one child process does. Its command gets two more arguments: its seconds, and the file of its rows, a line of JSON each."""

    name: str
    seconds: int  # at most
    command: tuple[str, ...]
    skip: str | None = None  # why it is not run
    alongside: bool = False  # begins with the part before it


def parts(device: str, quick: bool, chosen: list[str] | None = None) -> list[Part]:
    """In order, what matters most first; the last ones have what time the others leave."""
    needs_gpu = None if device == "cuda" else "it is for a GPU"
    plan = {
        "environment": (20, False, None),
        "build": (110, False, needs_gpu or ("a quick run takes what is built" if quick else None)),
        "ops": (85, False, None),
        "steps": (110, False, None),
        "batch": (45, False, None),
        "tests": (130, False, needs_gpu),
        "smallest": (130, True, needs_gpu),  # it also compiles, for the sanitizers, under which compiling is slow
        "memcheck": (120, False, needs_gpu),
        "racecheck": (120, True, needs_gpu),
        "suite": (SECONDS, True, needs_gpu or ("not part of a quick run" if quick else None)),
    }
    found = []
    for name, (seconds, alongside, skip) in plan.items():
        command = (sys.executable, "-m", "benchmarks.gpu_parts", name, "--device", device, *(["--quick"] if quick else []))
        if chosen and name not in chosen and name != "environment":
            skip = "not asked for"
        found.append(Part(name, seconds, command, skip, alongside))
    return found


def groups(plan: list[Part]) -> list[list[Part]]:
    """Parts that run at the same time."""
    found: list[list[Part]] = []
    for part in plan:
        if part.alongside and found:
            found[-1].append(part)
        else:
            found.append([part])
    return found


class Running:
    """A part from its start on, with at most ``seconds`` for it; ``found`` is what the results hold of it.

    That is {"status": "running", "ok", "failed", "timed out" or "not run", "seconds", "rows", and where it is not well "reason" and "log"}.
    """

    def __init__(self, part: Part, seconds: float, folder: Path):
        self.name, self.start, self.budget = part.name, time.monotonic(), min(part.seconds, seconds)
        self.rows, self.log = folder / f"{part.name}.rows", folder / f"{part.name}.log"
        self.child = None
        reason = part.skip or ("the run's time is used up" if self.budget < LEAST else None)
        if reason is not None:
            self.found = {"status": "not run", "seconds": 0.0, "reason": reason, "rows": []}
            return
        with self.log.open("wb") as output:
            # a session of its own, to be ended with all that it has started
            self.child = subprocess.Popen(
                [*part.command, f"{self.budget:.0f}", str(self.rows)],
                cwd=ROOT,
                env=os.environ | ENVIRONMENT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.found = self.so_far("running")

    def ended(self) -> bool:
        """Whether it is over, by itself or because its time is."""
        if self.child is None:
            return True
        status = self.child.poll()
        if status is None and time.monotonic() < self.start + self.budget:
            return False
        self.end()
        if status == 0:
            self.found = self.so_far("ok")
        elif status == CANNOT:
            rows = _read(self.rows)
            self.found = self.so_far("not run", rows.pop()["reason"] if rows else "it does not say why", rows)
        elif status is None:
            self.found = self.so_far("timed out", f"ran out of its {self.budget:.0f} s")
        else:
            self.found = self.so_far("failed", f"exit status {status}")
        return True

    def end(self) -> None:
        """With all that it has started."""
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()

    def so_far(self, status: str, reason: str | None = None, rows: list[dict] | None = None) -> dict:
        rows = _read(self.rows) if rows is None else rows
        found = {"status": status, "seconds": round(time.monotonic() - self.start, 1), "rows": gpu_report.condense(rows)}
        return found if reason is None else {**found, "reason": reason, "log": self.log.read_text(errors="replace")[-LOG:]}


def _read(path: Path) -> list[dict]:
    """The whole lines of a file of rows: a process that was ended may have left half of one."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def run(plan: list[Part], seconds: float, path: Callable[[dict], Path], **facts: object) -> tuple[dict, Path]:
    """The result of all parts, and where it was written while they ran and after each of them."""
    end = time.monotonic() + seconds
    result = {**facts, "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for group in groups(plan):
            print(f"{', '.join(part.name for part in group)} ...", flush=True)
            running: list[Running] = []
            try:
                for part in group:
                    running.append(Running(part, end - time.monotonic(), Path(folder)))
                _follow(running, result, path)
            finally:
                for child in running:
                    child.end()
    return result, path(result)


def _follow(running: list[Running], result: dict, path: Callable[[dict], Path]) -> None:
    """Until all have ended: their results into ``result``, and that into its file, which so holds what they found whatever happens."""
    left, written = list(running), time.monotonic()
    result["parts"].update({part.name: part.found for part in running})
    while left:
        ended = [part for part in left if part.ended()]
        left = [part for part in left if part not in ended]
        for part in ended:
            result["parts"][part.name] = part.found
            print(f"{part.name}: {gpu_report.line(part.found)}", *gpu_report.failed_tests(part.found["rows"]), sep="\n  ", flush=True)
        if ended or time.monotonic() > written + TICK:
            result["parts"].update({part.name: part.so_far("running") for part in left})
            write(path(result), result)
            written = time.monotonic()
        if left:
            time.sleep(PAUSE)


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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the parts are ended too
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
