"""The HeLo model."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from . import checkpoint
from .config import HeLoConfig
from .layers import (
    Encoded,
    Encoder,
    Linear,
    MultiHeadAttention,
    TransformerLayer,
    draws_with_torch,
    gram,
    rates,
    transport,
    transport_plan,
    unchanged,
)

_NAME = "HeLo"
_BUFFER = "label_correlation"


class HeLo(nn.Module):
    r"""Emotion-distribution learning from physiological and behavioural signals.

    EEG attends to GSR and to PPG (physiological tokens); optimal transport carries these over to the tokens of the face video; a
    transformer encodes both; K label embeddings attend to the fused tokens, their correlations added to the logits; a perceptron
    classifies. In the "released" preset this is what the authors' public code computes, in the "paper" preset what the paper
    describes; :class:`HeLoConfig` names each difference.

    Args:
        config: a HeLoConfig; or the argparse namespace of the authors' training script, which gives the released model.

    Notes:
        Parameters have the names, shapes and construction order of the released code: its checkpoints load strictly, and the same
        ``torch.manual_seed`` gives the same initial weights. Under ``helo_fast.backend("eager")`` the same seed also gives the
        released code's random masks (``HeLoConfig.rng``); other back ends draw others of the same distribution.
        The released model is random in evaluation too, and with threshold_over="batch" its predictions depend on their batch-mates.

    Example:
        >>> import torch
        >>> from helo_fast.model import HeLo, HeLoConfig
        >>> model = HeLo(HeLoConfig(dim_video=32, emotion_classes=4)).eval()
        >>> eeg, gsr, ppg, video = torch.rand(2, 18, 5), torch.rand(2, 28), torch.rand(2, 27), torch.rand(2, 32)
        >>> predict, learned_correlation, _ = model(eeg, gsr, ppg, video)
        >>> predict.shape, learned_correlation.shape
        (torch.Size([2, 4]), torch.Size([4, 4]))

    Source: Zheng et al., "HeLo: Heterogeneous Multi-Modal Fusion with Label Correlation for Emotion Distribution Learning",
    ACM MM 2025, arXiv 2507.06821.
    """

    def __init__(self, config: HeLoConfig | argparse.Namespace):
        super().__init__()
        if not isinstance(config, HeLoConfig):
            config = HeLoConfig.from_namespace(config)
        self.config = config
        channels, width, classes = config.n_channels, config.feature_dim, config.emotion_classes
        # This order fixes which random numbers initialise what.
        self.eeg_encoder = Encoder(config.dim_eeg, width)
        self.gsr_encoder = Encoder(config.dim_gsr, width, channels)
        self.ppg_encoder = Encoder(config.dim_ppg, width, channels)
        self.cross_attention = MultiHeadAttention(config, config.heads)
        self.projection = Linear(width, width)
        self.behavioral_encoder = Encoder(config.dim_video, width, 2 * channels)
        self.transformer_layer = nn.ModuleList(TransformerLayer(config) for _ in range(config.depth))
        if config.unused_linear:
            self.linear = nn.Linear(classes * width, classes)
        self.fused_projection = nn.Linear(4 * channels, classes)
        self.lcd_cross_attention = MultiHeadAttention(config, config.heads_lcd)
        self.Classifier = nn.Sequential(
            nn.Linear(classes * width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
        )
        if config.learned_label_embedding:
            self.label_embedding = nn.Parameter(torch.rand(classes, width))
        # [K, K] once fit_correlation has set it; until then None, and then no part of the state_dict.
        self.register_buffer(_BUFFER, None)
        self.register_load_state_dict_pre_hook(_make_room_for_correlation)

    def forward(
        self,
        eeg: Tensor,
        gsr: Tensor,
        ppg: Tensor,
        video: Tensor,
        labels: Tensor | None = None,
        *,
        label_embedding: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Predict the distribution over the K emotions.

        Args:
            eeg: ``[B, n_channels * dim_eeg]`` or ``[B, n_channels, dim_eeg]``.
            gsr: ``[B, dim_gsr]`` or ``[B, 1, dim_gsr]``.
            ppg: ``[B, dim_ppg]`` or ``[B, 1, dim_ppg]``.
            video: ``[B, dim_video]``.
            labels: ``[B, K]``, non-negative, rows summing to 1; needed for the third output alone.
            label_embedding: ``[K, D]`` or ``[B, K, D]``, in place of the learned or drawn one.

        Returns:
            ``predict [B, K]``, rows summing to 1; ``learned_correlation`` [K, K] (paper) or [B, K, K] (released); ``gt_correlation``,
            likewise: in the paper preset what :meth:`fit_correlation` set, else of the batch's labels; None without either.

        Raises:
            TypeError, ValueError: an input of the wrong type, dtype, device or shape.
            RuntimeError: ``rng="torch"`` on another back end than eager.
        """
        logits, learned = self._logits(eeg, gsr, ppg, video, label_embedding)
        return logits.softmax(-1), learned, self._gt_correlation(labels, len(logits))

    def loss(
        self, eeg: Tensor, gsr: Tensor, ppg: Tensor, video: Tensor, labels: Tensor, *, label_embedding: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss: sum over the batch of KL(labels || predict), plus alignment_weight times the alignment term.

        Args:
            eeg, gsr, ppg, video, labels, label_embedding: as :meth:`forward`; labels are required.

        Returns:
            The scalar loss, and its parts: ``"kl"``, summed over the batch, and ``"alignment"``, the mean squared error between learned
            and ground-truth label correlations (a constant where the label embedding is not learned).

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`forward`.
        """
        if labels is None:
            raise TypeError(f"{_NAME}: labels are needed for the loss, got None; call the model itself to predict")
        logits, learned = self._logits(eeg, gsr, ppg, video, label_embedding)
        gt = self._gt_correlation(labels, len(logits))
        log_predict = logits.log_softmax(-1) if self.config.log_softmax else logits.softmax(-1).log()
        kl = F.kl_div(log_predict, labels, reduction="sum")
        alignment = F.mse_loss(*torch.broadcast_tensors(learned, gt))
        return kl + self.config.alignment_weight * alignment, {"kl": kl, "alignment": alignment}

    @torch.no_grad()
    def transport_plan(self, eeg: Tensor, gsr: Tensor, ppg: Tensor, video: Tensor) -> Tensor:
        """The plan ``[B, 2C, 2C]`` between physiological tokens (rows) and behavioural tokens (columns), total mass 1.

        Args:
            eeg, gsr, ppg, video: as :meth:`forward`.
        """
        return transport_plan(self.config, *self.tokens(eeg, gsr, ppg, video))

    def tokens(self, eeg: Tensor, gsr: Tensor, ppg: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        """Physiological and behavioural tokens, each ``[B, 2C, D]``.

        Args:
            eeg, gsr, ppg, video: as :meth:`forward`.
        """
        eeg, gsr, ppg, video = self._inputs(eeg, gsr, ppg, video)
        encoders = (self.eeg_encoder, self.gsr_encoder, self.ppg_encoder)  # to [B, C, D] each
        physiological = self.cross_attention(*map(Encoded, encoders, (eeg, gsr, ppg)))
        return self.projection(physiological), self.behavioral_encoder(video)

    @torch.no_grad()
    def fit_correlation(self, labels: Tensor) -> None:
        """Set the ground-truth label correlation: cosine similarity of the label columns over the training set.

        Kept as a buffer, saved and loaded with the model. A class that never occurs correlates with none, itself included.
        Where correlations are per sample (the released preset) there is nothing to set.

        Args:
            labels: ``[N, K]``, the training set's; non-negative.

        Raises:
            TypeError, ValueError: labels of the wrong type, shape or values.
        """
        _checks.tensor(_NAME, "labels", labels, (2,), "[N, emotion_classes]")
        classes = self.config.emotion_classes
        if labels.shape[1] != classes or len(labels) == 0:
            raise ValueError(
                f"{_NAME}: labels must be [N, emotion_classes], here [N, {classes}] with N at least 1, got {_checks.shape_text(labels)}; "
                "set emotion_classes in HeLoConfig to the data's"
            )
        bad = ~((labels >= 0) & labels.isfinite())
        if bool(bad.any()):
            row, column = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{_NAME}: labels must be finite and non-negative, row {row}, class {column} is {labels[row, column]}; mend that row"
            )
        if self.config.correlation == "cosine":
            weight = self.eeg_encoder.weight
            self.label_correlation = gram(labels.double().mT, -1).to(weight)

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write weights and config to one safetensors file (config and format version are JSON in its metadata).

        Args:
            path: the file; an existing one is replaced, whole or not at all.
        """
        checkpoint.write(path, self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *, device: torch.device | str = "cpu") -> HeLo:
        """The model that :meth:`save_pretrained` wrote, in evaluation mode.

        Args:
            path: the file.
            device: where to put the model.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is cut off, or no file of this format and version.
        """
        return cls._from_state(*checkpoint.read(path)).to(device)

    @classmethod
    def _from_state(cls, config: HeLoConfig, state: dict[str, Tensor]) -> HeLo:
        with torch.device("meta"):  # no initialisation: torch's generator stays as it is
            model = cls(config)
        model.load_state_dict(state, assign=True)
        return model.eval()

    def _logits(self, eeg: Tensor, gsr: Tensor, ppg: Tensor, video: Tensor, label_embedding: Tensor | None) -> tuple[Tensor, Tensor]:
        """(logits [B, K], learned correlation)."""
        embedding = self._embedding(eeg, label_embedding)  # [K, D] or [B, K, D]; drawn first of all
        physiological, behavioral = self.tokens(eeg, gsr, ppg, video)  # [B, 2C, D] each
        plan = transport_plan(self.config, physiological, behavioral)  # [B, 2C, 2C]
        carried = transport(plan, physiological, self.config.transport_map)  # [B, 2C, D]
        tokens = self._transformer(carried, behavioral)  # [B, 4C, D]
        fused = self._fuse(tokens)  # [B, K, D]
        learned = gram(embedding, -1 if self.config.correlation == "cosine" else -2)  # [K, K] or [B, K, K]
        return self.Classifier(self.lcd_cross_attention(embedding, fused, bias=learned).flatten(1)), learned

    def _transformer(self, carried: Tensor, behavioral: Tensor) -> Tensor:
        """Both token sets through the same layers, concatenated: [B, 4C, D]."""
        batch, n, width = carried.shape
        if any(rates(self.config, self.training)) and draws_with_torch(self.config.rng, carried):
            return torch.cat([self._layers(carried), self._layers(behavioral)], 1)  # in the released order
        return self._layers(carried, behavioral).view(batch, 2 * n, width)

    def _layers(self, tokens: Tensor, beside: Tensor | None = None) -> Tensor:
        if beside is not None and not self.transformer_layer:
            return torch.cat([tokens, beside], 1)
        for layer in self.transformer_layer:
            tokens, beside = layer(tokens, beside), None
        return tokens

    def _fuse(self, tokens: Tensor) -> Tensor:
        """fused_projection over the token axis: [B, 4C, D] to [B, K, D]."""
        fusion = self.fused_projection
        if not unchanged(fusion, nn.Linear):
            return fusion(tokens.mT).mT
        # From the left: no transposed copy of the tokens.
        return torch.baddbmm(fusion.bias.unsqueeze(-1), fusion.weight.expand(len(tokens), -1, -1), tokens)

    def _embedding(self, eeg: Tensor, given: Tensor | None) -> Tensor:
        config, weight = self.config, self.eeg_encoder.weight
        shape = (config.emotion_classes, config.feature_dim)
        if given is not None:
            _checks.tensor(_NAME, "label_embedding", given, (2, 3), "[K, D] or [B, K, D]")
            _checks.shape(_NAME, "label_embedding", given, (shape, (len(eeg), *shape)), "[K, D] or [B, K, D]")
            self._check_place("label_embedding", given)
            return given
        if config.learned_label_embedding:
            return self.label_embedding
        # The released code draws on the CPU whatever the device; away from its order, the device's own generator needs no copy.
        device = "cpu" if draws_with_torch(config.rng, weight) else weight.device
        return torch.rand(len(eeg), *shape, dtype=weight.dtype, device=device).to(weight.device)

    def _gt_correlation(self, labels: Tensor | None, batch: int) -> Tensor | None:
        """[K, K] or [B, K, K]."""
        if labels is not None:
            _checks.tensor(_NAME, "labels", labels, (2,), "[B, emotion_classes]")
            _checks.shape(_NAME, "labels", labels, ((batch, self.config.emotion_classes),), "[B, emotion_classes]")
            self._check_place("labels", labels, any_dtype=True)
        if self.label_correlation is not None:
            return self.label_correlation
        if labels is None:
            return None
        return gram(labels.mT, -1) if self.config.correlation == "cosine" else gram(labels.unsqueeze(-1), -2)

    def _inputs(self, eeg: Tensor, gsr: Tensor, ppg: Tensor, video: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Checked, and viewed as [B, C, dim_eeg], [B, dim_gsr], [B, dim_ppg], [B, dim_video]."""
        c = self.config
        accepted = {
            "eeg": (eeg, ((c.n_channels * c.dim_eeg,), (c.n_channels, c.dim_eeg)), "n_channels and dim_eeg"),
            "gsr": (gsr, ((c.dim_gsr,), (1, c.dim_gsr)), "dim_gsr"),
            "ppg": (ppg, ((c.dim_ppg,), (1, c.dim_ppg)), "dim_ppg"),
            "video": (video, ((c.dim_video,),), "dim_video"),
        }
        for name, (value, shapes, fields) in accepted.items():
            hint = " or ".join("[" + ", ".join(("B", *map(str, shape))) + "]" for shape in shapes)
            _checks.tensor(_NAME, name, value, tuple(len(shape) + 1 for shape in shapes), hint)
            if tuple(value.shape[1:]) not in shapes:
                raise ValueError(
                    f"{_NAME}: {name} must be {hint}, got {_checks.shape_text(value)}; "
                    f"set {fields} in HeLoConfig to the data's, or reshape {name}"
                )
            if len(value) != len(eeg):
                raise ValueError(f"{_NAME}: {name} has {len(value)} rows but eeg has {len(eeg)}; give every input the same batch")
            self._check_place(name, value)
        return eeg.reshape(len(eeg), c.n_channels, c.dim_eeg), gsr.flatten(1), ppg.flatten(1), video

    def _check_place(self, name: str, value: Tensor, any_dtype: bool = False) -> None:
        """On the model's device, and of its dtype unless autocast sees to that."""
        weight = self.eeg_encoder.weight
        if value.device != weight.device:
            raise ValueError(f"{_NAME}: {name} is on {value.device} but the model on {weight.device}; use {name}.to(model's device)")
        if value.dtype != weight.dtype and not any_dtype and not torch.is_autocast_enabled(value.device.type):
            raise TypeError(f"{_NAME}: {name} is {value.dtype} but the model {weight.dtype}; use {name}.to({weight.dtype})")


def _make_room_for_correlation(module: HeLo, state_dict: dict[str, Tensor], prefix: str, metadata, strict: bool, *_: object) -> None:
    """Before loading: have the buffer where the state has one; a state without one, loaded strictly, was never fitted."""
    saved = state_dict.get(prefix + _BUFFER)
    if saved is not None and module.label_correlation is None and module.config.correlation == "cosine":
        module.label_correlation = torch.empty_like(saved, device=module.eeg_encoder.weight.device)
    elif saved is None and strict:
        module.label_correlation = None


def load_released(path: str | os.PathLike, **overrides: Any) -> HeLo:
    """A checkpoint of the authors' public code, as the released preset, in evaluation mode.

    Args:
        path: a state_dict saved by ``torch.save``, or a dict that holds one under "state_dict", "model_state_dict" or "model"; with or
            without the "module." of data-parallel training. It is read with ``weights_only=True``.
        overrides: HeLoConfig fields that shapes do not tell: heads (default 4), heads_lcd (1), dropout, rng, ...

    Returns:
        HeLo: on the CPU, in float32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no state_dict of HeLo, or an override contradicts its shapes.
        RuntimeError: its names or shapes are not those of the released model (strict loading).
    """
    return HeLo._from_state(*checkpoint.read_released(path, overrides))
