"""HeLo as a LightningModule: the released loss and optimiser, the six metrics, and checkpoints that explain themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from helo_fast.model import HeLo, HeLoConfig
from helo_fast.train.metrics import emotion_metrics

DATA_KEY = "data"
LEARNING_RATES = {"released": 1e-3, "paper": 1e-4}


class HeLoModule(pl.LightningModule):
    """Trains and scores HeLo on batches of an :class:`~helo_fast.train.data.EmotionDataModule`.

    The loss is HeLo's own, a sum over the batch as released. ``train_loss`` and its parts are logged per sample;
    the six metrics as ``validation_<name>`` and ``test_<name>``, averaged over all samples of all processes.

    A checkpoint loads with ``torch.load(weights_only=True)``: beside weights and hyperparameters it keeps, under
    ``"data"``, what prediction on other recordings needs (see :meth:`on_save_checkpoint`).

    Args:
        config: Model configuration, or its ``to_dict()``; the paper preset where not given.
        lr: Adam's learning rate; where not given, the released recipe's 1e-3 for the released preset and 1e-4 for the paper's,
            which overfits within a few epochs at more.
        weight_decay: Adam's L2 penalty.
        lr_gamma: Factor on the learning rate after every epoch.

    Example:
        >>> from helo_fast import HeLoConfig
        >>> module = HeLoModule(HeLoConfig(feature_dim=16), lr=1e-3)
        >>> module.hparams["config"]["feature_dim"]
        16

    Source: Zheng et al., "HeLo", ACM MM 2025, section 4.2 and the released training script.
    """

    def __init__(
        self,
        config: HeLoConfig | Mapping[str, Any] | None = None,
        *,
        lr: float | None = None,
        weight_decay: float = 1e-5,
        lr_gamma: float = 0.99,
    ) -> None:
        super().__init__()
        if config is None:
            config = HeLoConfig()
        elif isinstance(config, Mapping):
            config = HeLoConfig.from_dict(dict(config))
        if lr is None:
            lr = LEARNING_RATES[config.preset]
        for name, value, accepted in (
            ("lr", lr, lr > 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("lr_gamma", lr_gamma, 0 < lr_gamma <= 1),
        ):
            if not accepted:
                raise ValueError(f"{name}: {value} is out of range: lr > 0, weight_decay >= 0, 0 < lr_gamma <= 1")
        # Plain types only, so that checkpoints load without unpickling code.
        self.save_hyperparameters({"config": config.to_dict(), "lr": lr, "weight_decay": weight_decay, "lr_gamma": lr_gamma})
        self.model = HeLo(config)
        self.validation_metrics = emotion_metrics().clone(prefix="validation_")
        self.test_metrics = emotion_metrics().clone(prefix="test_")

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Predicted distributions [B, K], float32, of a batch ``{"eeg": [B, C, dim], "gsr": ..., "ppg": ..., "video": ...}``."""
        return self.model(batch["eeg"], batch["gsr"], batch["ppg"], batch["video"])[0].float()

    def setup(self, stage: str) -> None:
        if stage == "fit" and self._datamodule is not None:
            self.model.fit_correlation(self._datamodule.train_labels)

    @property
    def _datamodule(self) -> Any:
        return getattr(self._trainer, "datamodule", None)

    # ---- steps

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, parts = self.model.loss(batch["eeg"], batch["gsr"], batch["ppg"], batch["video"], batch["labels"])
        size = len(batch["labels"])
        logged = {"train_loss": loss.detach() / size, "train_kl": parts["kl"].detach() / size}
        logged["train_alignment"] = parts["alignment"].detach()
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validation_metrics.update(preds=self(batch), target=batch["labels"])
        self.log_dict(self.validation_metrics, batch_size=len(batch["labels"]))

    def on_validation_epoch_end(self) -> None:
        # Every process computes the same value, so every process raises.
        kl = self.validation_metrics["kl"].compute()
        if not torch.isfinite(kl):
            raise RuntimeError(
                f"epoch {self.current_epoch}: the validation KL is {kl.item()}: the weights have diverged. Lower "
                "--optimizer.lr, clip gradients (--trainer.gradient_clip_val 1), or use --trainer.precision 32-true"
            )

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        predict = self(batch)
        self.test_metrics.update(preds=predict, target=batch["labels"])
        self.log_dict(self.test_metrics, batch_size=len(batch["labels"]))
        return {"index": batch["index"], "predict": predict}

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"index": batch["index"], "predict": self(batch)}

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"])
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=self.hparams["lr_gamma"]),
        }

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds ``checkpoint["data"]``: label names, modality of each place and its width, split, normalisation tensors."""
        data = self._datamodule
        if data is not None:
            checkpoint[DATA_KEY] = describe_data(data)


def row_checksum(data: Any) -> str:
    """SHA-256 of subject and trial of every row of an ``EmotionData``: where equal, the same seed splits alike."""
    return hashlib.sha256(repr((data.subject.tolist(), data.trial.tolist())).encode()).hexdigest()


def describe_data(data: Any) -> dict[str, Any]:
    """What a checkpoint must remember of an ``EmotionDataModule`` to predict on other recordings; plain types and tensors."""
    return {
        "label_names": list(data.label_names),
        "places": dict(data.places),
        "dims": dict(data.dims),
        "rows": row_checksum(data.data),
        "protocol": data.protocol,
        "fold": data.current.fold,
        "seed": data.seed,
        "validation": data.validation,
        "batch_size": data.batch_size,
        "normalise": data.normalise,
        "normalisation": {name: torch.as_tensor(value) for name, value in data.normalisation.items()},
    }
