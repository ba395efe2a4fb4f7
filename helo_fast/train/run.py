"""A run: every fold with every seed, resumed from whatever is there, then its metrics, tables and report."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from helo_fast.train.checks import check_folds
from helo_fast.train.data.base import EmotionDataModule
from helo_fast.train.data.splits import RANDOM_LEAKS
from helo_fast.train.files import read_json, write_json, write_text
from helo_fast.train.fold import finished, fold_folder, quiet_lightning, train_fold
from helo_fast.train.options import PRESENTATION, HeLoCLI, check_backend
from helo_fast.train.summary import metrics_table, summarise
from helo_fast.train.workers import LOG, Task, train_parallel

CONFIG = "config.yaml"
DATA = "data.json"
OWNED = ("folds", CONFIG, DATA, "metrics.json", "per_subject.csv", "report.html")


def train(argv: list[str]) -> int:
    """``helo-fast train``: returns the exit code, 1 where a fold failed.

    Raises:
        ValueError, OSError, ImportError: the options or the data are wrong; nothing was trained.
    """
    cli = HeLoCLI(argv)
    out, first = Path(cli.config.out), rank_zero_only.rank == 0
    data = cli.make_data(cli.config.seeds[0])
    folds = _folds(cli, data)
    tasks = [(seed, fold) for seed in cli.config.seeds for fold in folds]
    # Options that no fold can be trained with are told now, not once per fold.
    quiet_lightning()
    check_backend()
    cli.make_module(data)
    check_folds(data, tasks, cli.make_trainer([], []))
    jobs = _jobs(cli, len(tasks))  # of all folds, not of those that wait: the last digits depend on the number of threads
    with _process_group(cli), _claim(out, cli.config.overwrite) if first else contextlib.nullcontext():
        if first:
            _settle(out, cli, data)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if first and data.protocol == "random":
            print(f"helo-fast: {RANDOM_LEAKS}", file=sys.stderr)
        errors = _train(cli, data, tasks, jobs)
        if not first:
            return 1 if errors else 0
        results = [r for seed, fold in tasks if (r := finished(fold_folder(out, seed, fold))) is not None]
        if results:
            summarise(out, cli, data, results, errors)
            print(metrics_table(read_json(out / "metrics.json")))
            print(f"report: {out / 'report.html'}")
    for (seed, fold), error in errors.items():
        log = fold_folder(out, seed, fold) / LOG
        print(f"helo-fast: fold {fold}, seed {seed} failed: {error}\n  log: {log}", file=sys.stderr)
    if errors:
        print(f"helo-fast: {len(errors)} of {len(tasks)} folds failed; the same command tries them again", file=sys.stderr)
    return 1 if errors else 0


def _folds(cli: HeLoCLI, data: EmotionDataModule) -> list[str]:
    known, chosen = data.fold_names(), cli.config.folds
    if chosen is None:
        return known
    unknown = [fold for fold in chosen if fold not in known]
    if unknown:
        raise ValueError(f"--folds: no {', '.join(unknown)} in these data; choose from {', '.join(known)}")
    return [fold for fold in known if fold in chosen]


# ---- several processes of one launch


@contextlib.contextmanager
def _process_group(cli: HeLoCLI) -> Iterator[None]:
    """Under torchrun the processes must agree on what is finished before Lightning first joins them."""
    if not torch.distributed.is_torchelastic_launched():
        yield  # Lightning starts the other processes itself, when the run's folder is settled
        return
    if cli.config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl")
    else:
        torch.distributed.init_process_group("gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


# ---- the run's folder


@contextlib.contextmanager
def _claim(out: Path, overwrite: bool) -> Iterator[None]:
    """The run's folder, for this process alone; emptied of an earlier run where asked."""
    lock = FileLock(out / ".lock", timeout=0)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"--out: another helo-fast train is at work in {out}: wait for it, or choose another --out") from error
    except OSError as error:
        raise ValueError(f"--out: {out} cannot be a run's folder ({error.strerror}): choose another --out") from error
    try:
        if overwrite:
            for name in OWNED:
                path = out / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def _settle(out: Path, cli: HeLoCLI, data: EmotionDataModule) -> None:
    """Writes ``config.yaml`` and ``data.json``, or holds this run to those of the run that is to go on."""
    config, facts = cli.dump(), describe(data)
    if any((*out.glob("folds/*/*/checkpoints/*.ckpt"), *out.glob("folds/*/*/metrics.json"))):  # else no number is there yet
        _compare(out, config, facts["sha256"])
    write_text(out / CONFIG, config)
    write_json(out / DATA, facts)


def _compare(out: Path, config: str, sha256: str) -> None:
    """Refuses to go on with another configuration or other data than those of the run in ``out``."""
    mend = f"choose another --out, or --overwrite to replace the run in {out}"
    if not (out / CONFIG).exists():
        raise ValueError(f"--out: {out} holds folds but no {CONFIG}: {mend}")
    try:
        old, new = (_flat(yaml.safe_load(text)) for text in ((out / CONFIG).read_text(encoding="utf-8"), config))
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        raise ValueError(f"--out: {out / CONFIG} is empty or broken: {mend}") from error
    differences = [
        f"{key}: {old.get(key, 'default')} there, {new.get(key, 'default')} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in PRESENTATION
    ]
    if differences:
        raise ValueError(f"--out: {out} holds a run with another configuration ({'; '.join(differences)}): {mend}")
    if not (out / DATA).exists():
        return
    facts = read_json(out / DATA)
    if not isinstance(facts, dict) or not isinstance(digest := facts.get("sha256"), str):
        raise ValueError(f"--out: {out / DATA} has no sha256 of the data: {mend}")
    if digest != sha256:
        raise ValueError(
            f"--out: the data have changed since the run in {out} began (sha256 {digest[:12]} then, {sha256[:12]} now): {mend}"
        )


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def describe(data: EmotionDataModule) -> dict[str, Any]:
    """What a run notes of its data: sizes, label names, modalities, notes, and a checksum of every number."""
    content = data.data
    checksum = hashlib.sha256(repr((content.names, content.subject.tolist(), content.trial.tolist())).encode())
    for name in sorted(content.modalities):
        checksum.update(name.encode())
        checksum.update(np.ascontiguousarray(content.modalities[name]).tobytes())
    checksum.update(np.ascontiguousarray(content.labels).tobytes())
    return {
        "sha256": checksum.hexdigest(),
        "windows": len(content),
        "subjects": data.fold_names(),
        "labels": list(content.names),
        "modalities": {name: value.shape[1] for name, value in content.modalities.items()},
        "places": data.places,
        "n_channels": data.n_channels,
        "notes": list(content.notes),
    }


# ---- training


def _train(cli: HeLoCLI, data: EmotionDataModule, tasks: list[Task], jobs: int) -> dict[Task, str]:
    """Trains what is not finished, ``jobs`` folds at a time; returns the errors by task."""
    config, out = cli.config, Path(cli.config.out)
    waiting = [task for task in tasks if finished(fold_folder(out, *task)) is None]
    if not waiting:
        return {}
    if len(waiting) < len(tasks) and not config.quiet:
        print(f"{out}: {len(tasks) - len(waiting)} of {len(tasks)} folds are finished already")
    if jobs == 1:
        return _train_here(cli, data, waiting)
    threads = max(1, _cores() // jobs)
    limit = os.environ.get("OMP_NUM_THREADS", "")
    threads = min(threads, int(limit)) if limit.isdigit() else threads
    errors = {}
    with (
        _Progress(len(tasks), len(tasks) - len(waiting), config.trainer.max_epochs, config.quiet) as progress,
        contextlib.closing(train_parallel(out / CONFIG, waiting, min(jobs, len(waiting)), threads, progress.epochs)) as ended,
    ):
        for task, error in ended:
            progress.end(task, error)
            if error is not None:
                errors[task] = error
    return errors


def _train_here(cli: HeLoCLI, data: EmotionDataModule, tasks: list[Task]) -> dict[Task, str]:
    errors = {}
    for number, (seed, fold) in enumerate(tasks, 1):
        if not cli.config.quiet and rank_zero_only.rank == 0:
            print(f"fold {fold}, seed {seed} ({number} of {len(tasks)})")
        try:
            if data.seed != seed:
                data = cli.make_data(seed)
            train_fold(cli, data, fold, progress_bar=not cli.config.quiet)
        except SystemExit as error:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from error
        except Exception as error:  # one fold's failure, whatever it is, must not cost the others
            if torch.distributed.is_initialized():
                raise  # the other processes are waiting in the middle of this fold
            errors[seed, fold] = f"{type(error).__name__}: {error}"
            with open(fold_folder(cli.config.out, seed, fold) / LOG, "a", encoding="utf-8") as log:
                traceback.print_exc(file=log)
    return errors


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _jobs(cli: HeLoCLI, tasks: int) -> int:
    trainer, asked = cli.config.trainer, cli.config.jobs
    on_cpu = trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not torch.accelerator.is_available())
    alone = trainer.devices in ("auto", 1, "1", [0]) and trainer.num_nodes == 1
    launched = "LOCAL_RANK" in os.environ or torch.distributed.is_torchelastic_launched()
    if not alone or launched:
        if asked not in (None, 1):
            raise ValueError(f"--jobs: {asked} with several devices (--trainer.devices {trainer.devices}): leave --jobs out")
        return 1
    return min(asked or (_cores() if on_cpu else 1), tasks)


class _Progress:
    """One line for all folds: epochs of the whole run, folds done, folds failed."""

    def __init__(self, folds: int, done: int, epochs: int | None, quiet: bool) -> None:
        self._epochs = max(epochs or 1, 1)  # not known where steps or time end the training
        self._folds, self._done, self._failed = folds, done, 0
        self._seen: dict[Task, int] = {}
        self._bar = tqdm(
            total=folds * self._epochs, initial=done * self._epochs, unit="epoch", disable=quiet, mininterval=1, dynamic_ncols=True
        )
        self._show()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def epochs(self, task: Task, done: int) -> None:
        self._bar.update(done - self._seen.get(task, 0))
        self._seen[task] = done

    def end(self, task: Task, error: str | None) -> None:
        self.epochs(task, self._epochs)  # early stopping leaves epochs out
        self._done, self._failed = self._done + (error is None), self._failed + (error is not None)
        self._show()

    def _show(self) -> None:
        failed = f", {self._failed} failed" if self._failed else ""
        self._bar.set_description(f"folds {self._done}/{self._folds}{failed}")
