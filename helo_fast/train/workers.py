"""Folds in parallel: worker processes that outlive a failed fold and do not outlive the run.

A worker is a fresh interpreter (no fork: torch's threads do not survive one). It reads one JSON task per line from stdin
and answers on stdout with one JSON event per line. What the fold itself prints goes to the fold's ``log.txt``. When the
run is killed, stdin ends and the worker exits at once, so no orphan goes on writing into the folder.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

Task = tuple[int, str]  # seed, fold
LOG = "log.txt"


class Worker:
    """One worker process, seen from the run."""

    def __init__(self, config: Path, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "helo_fast.train.workers", str(config), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the run, which then stops its workers
        )

    def train(self, task: Task, tell: Callable[[int], None]) -> str | None:
        """Runs a task; calls ``tell(epochs done)`` as it goes on. Returns None, or why it failed."""
        try:
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it died; the answer below says how
        for line in self._process.stdout:
            event, value = json.loads(line)
            if event == "epoch":
                tell(value)
            else:
                return value
        code = self._process.wait()
        return f"the worker process was killed by signal {-code}" if code < 0 else f"the worker process exited ({code})"

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """Ends the process, in the middle of a task or not; checkpoints are written in one step, so nothing breaks."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


def train_parallel(
    config: Path, tasks: list[Task], jobs: int, threads: int, tell: Callable[[Task, int], None]
) -> Iterator[tuple[Task, str | None]]:
    """Runs the tasks on ``jobs`` workers and gives (task, None or why it failed) as each ends.

    Args:
        config: The run's ``config.yaml``.
        tasks: (seed, fold) each.
        jobs: Worker processes.
        threads: torch threads of each.
        tell: Called with (task, epochs done), from several threads.
    """
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    ended: queue.SimpleQueue[tuple[Task, str | None]] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    workers: list[Worker | None] = [None] * jobs
    stopping = threading.Event()

    def serve(slot: int) -> None:
        while not stopping.is_set():
            try:
                task = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                worker = workers[slot]
                if worker is None or not worker.alive:
                    worker = workers[slot] = Worker(config, threads)
                error = worker.train(task, lambda epochs, task=task: tell(task, epochs))
            except Exception as failure:
                error = f"{type(failure).__name__}: {failure}"
            ended.put((task, error))

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for slot in range(jobs):
                pool.submit(serve, slot)
            for _ in tasks:
                yield ended.get()
        finally:
            stopping.set()
            for worker in workers:
                if worker is not None:
                    worker.stop()


# ---- in the worker process


def _read_tasks(stdin: TextIO, tasks: queue.SimpleQueue[Task]) -> None:
    for line in stdin:
        seed, fold = json.loads(line)
        tasks.put((seed, fold))
    os._exit(1)  # the run has gone: stop in the middle of whatever this is


def _work(config: Path, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing else may come between the answers
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
    threading.Thread(target=_read_tasks, args=(sys.stdin, tasks), daemon=True).start()

    from helo_fast.train.fold import fold_folder, train_fold
    from helo_fast.train.options import HeLoCLI

    def answer(*event: Any) -> None:
        answers.write(json.dumps(event) + "\n")

    cli = HeLoCLI(["--config", str(config)])
    data = None
    while True:
        seed, fold = tasks.get()
        folder = fold_folder(config.parent, seed, fold)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / LOG, "a", buffering=1) as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        error = None
        try:
            if data is None or data.seed != seed:
                data = cli.make_data(seed)
            train_fold(cli, data, fold, tell=lambda epochs: answer("epoch", epochs))
        except Exception as failure:
            traceback.print_exc()
            error = f"{type(failure).__name__}: {failure}"
        sys.stdout.flush()
        sys.stderr.flush()
        answer("end", error)


if __name__ == "__main__":
    _work(Path(sys.argv[1]), int(sys.argv[2]))
