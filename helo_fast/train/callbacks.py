"""Lightning callbacks that make an interrupted run continue to exactly the numbers of an uninterrupted one."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
import torch.distributed
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from helo_fast.train.files import replacing


class AtomicCheckpoints(TorchCheckpointIO):
    """Saves a checkpoint beside its place and moves it there (Lightning's own goes by way of the system's temp folder)."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any | None = None) -> None:
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)


def _processes() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _gather(value: Any) -> list[Any]:
    """``value`` of every process, in rank order; all processes must call it."""
    if _processes() == 1:
        return [value]
    out = [None] * _processes()
    torch.distributed.all_gather_object(out, value)
    return out


class RandomState(Callback):
    """Keeps the state of all random generators in the checkpoint, and starts every epoch after the first from it.

    The state is taken at the end of an epoch and set again before the first batch of the next one *also when nothing was
    interrupted*: what Lightning and its data loaders draw in between depends on whether the run was resumed.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    @staticmethod
    def _take() -> dict[str, Any]:
        kind, keys, position, has_gauss, gauss = np.random.get_state()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
            "python": random.getstate(),
        }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._state is not None:
            # Lightning (2.6) has already drawn the first batches of a resumed run, in the order of epoch 0: it tells the
            # sampler the epoch only afterwards.
            trainer.train_dataloader.sampler.set_epoch(trainer.current_epoch)
            iter(trainer.fit_loop._data_fetcher)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._state = self._take()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: dict[str, Tensor], batch_idx: int) -> None:
        if batch_idx > 0:
            return
        state = self._state
        if state is None:
            if trainer.global_rank > 0:  # all processes were seeded alike: give each its own dropout masks
                torch.manual_seed(torch.initial_seed() + trainer.global_rank)
            return
        torch.set_rng_state(state["torch"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        random.setstate(state["python"])

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": _gather(self._state)}  # Lightning collects a checkpoint on every process

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        ranks = state_dict["ranks"]
        if len(ranks) != _processes():
            raise ValueError(
                f"the run was interrupted with {len(ranks)} processes and goes on with {_processes()}: use the same "
                "--trainer.devices, or --overwrite to start again"
            )
        self._state = ranks[torch.distributed.get_rank() if len(ranks) > 1 else 0]


class PatientStopping(EarlyStopping):
    """Early stopping that also holds where the run was killed after its last epoch and before its test."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class History(Callback):
    """Learning curves: one row per epoch in ``path``, kept in the checkpoint so that a resumed run has all of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        self._lr = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._lr = trainer.optimizers[0].param_groups[0]["lr"]  # at the end it is the next epoch's

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        row = {"epoch": trainer.current_epoch, "lr": self._lr}
        metrics = trainer.callback_metrics
        row |= {name: float(value) for name, value in metrics.items() if name.startswith(("train_", "validation_"))}
        self.rows.append(row)
        self._write(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer)  # for a run that goes on after its last epoch, and whose file was lost

    def _write(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            with replacing(self.path) as temporary:
                pd.DataFrame(self.rows).to_csv(temporary, index=False)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [dict(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [dict(row) for row in state_dict["rows"]]


class EpochReport(Callback):
    """Calls ``tell(epochs done)`` after every epoch: the progress of a fold that runs out of sight."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self.tell = tell

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.tell(trainer.current_epoch + 1)


class Predictions(Callback):
    """Collects what ``test_step`` predicted, from all processes, one row per window and in the order of the data."""

    def __init__(self) -> None:
        self.index: Tensor | None = None  # [N] int64 rows in the data
        self.predict: Tensor | None = None  # [N, K] float32
        self._batches: list[dict[str, Tensor]] = []

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batches = []

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._batches.append({name: value.detach().cpu() for name, value in outputs.items()})

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        batches = [batch for rank in _gather(self._batches) for batch in rank]
        index = torch.cat([batch["index"] for batch in batches])
        order = index.argsort()
        self.index, self.predict = index[order], torch.cat([batch["predict"] for batch in batches])[order]
