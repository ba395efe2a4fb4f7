"""What a trainer cannot do with some fold, told before the first one: a run keeps its options, so it could never be complete."""

from __future__ import annotations

import copy
import math

from lightning.pytorch import Trainer

from helo_fast.train.data.base import EmotionDataModule
from helo_fast.train.workers import Task


def check_folds(data: EmotionDataModule, tasks: list[Task], trainer: Trainer) -> None:
    """Holds the trainer's options to the rows of every fold, as Lightning does only in the middle of the fold.

    Raises:
        ValueError: a fold has fewer test rows than there are processes, or an option asks for batches that it does not have.
    """
    interval = getattr(trainer, "val_check_interval", 1.0)  # Lightning leaves it out where it is a time
    if trainer.world_size == interval == trainer.limit_train_batches == trainer.limit_val_batches == 1:
        return  # any fold will do
    data, found = copy.copy(data), []
    for seed, fold in tasks:
        data.seed = seed
        try:
            split = data.split(fold)
        except Exception:  # this fold's own failure, which must not cost the others
            continue
        if len(split.test) < trainer.world_size:
            raise ValueError(
                f"--trainer.devices: {trainer.world_size} processes share the test rows, of which fold {fold} has {len(split.test)}: "
                "use fewer devices, or leave that fold out of --folds"
            )
        batches = {}
        for part, rows in (("train", split.train), ("val", split.validation)):
            limit, every = getattr(trainer, f"limit_{part}_batches"), math.ceil(len(rows) / (data.batch_size * trainer.world_size))
            batches[part] = int(every * limit) if isinstance(limit, float) else min(every, limit)
            if batches[part] == 0 < limit:
                name = "overfit_batches" if trainer.overfit_batches else f"limit_{part}_batches"
                raise ValueError(f"--trainer.{name}: {limit} of the {every} batches of fold {fold} is none: give more, or leave it out")
        found.append((batches["train"], fold))
    fewest, fold = min(found, default=(interval, ""))
    validates = trainer.limit_val_batches > 0 and trainer.check_val_every_n_epoch is not None
    if validates and isinstance(interval, int) and interval > fewest:
        raise ValueError(
            f"--trainer.val_check_interval: {interval} is more than the {fewest} training batches of fold {fold}: "
            f"give at most {fewest}, or leave it out"
        )
