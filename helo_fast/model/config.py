"""HeLoConfig: the sizes of a HeLo model, and every behaviour in which its two presets differ."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .. import _checks

_NAME = "HeLoConfig"

# What a preset decides. A field of these that is given explicitly stands.
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "transport": "sinkhorn",
        "learned_label_embedding": True,
        "dropkey_in_evaluation": False,
        "dropped_row_gradient": False,
        "threshold_over": "sample",
        "transport_map": "barycentric",
        "correlation": "cosine",
        "log_softmax": True,
        "unused_linear": False,
    },
    "released": {
        "transport": "gromov",
        "learned_label_embedding": False,
        "dropkey_in_evaluation": True,
        "dropped_row_gradient": True,
        "threshold_over": "batch",
        "transport_map": "plan",
        "correlation": "column",
        "log_softmax": False,
        "unused_linear": True,
    },
}
_CHOICES = {
    "preset": tuple(_PRESETS),
    "transport": ("gromov", "sinkhorn", "fused"),
    "plan_gradient": ("none", "implicit"),
    "rng": ("auto", "torch", "philox"),
    "threshold_over": ("sample", "batch"),
    "transport_map": ("barycentric", "plan"),
    "correlation": ("cosine", "column"),
}
_SIZES = (
    "n_channels",
    "dim_eeg",
    "dim_gsr",
    "dim_ppg",
    "dim_video",
    "depth",
    "feature_dim",
    "hidden_size",
    "heads",
    "heads_lcd",
    "emotion_classes",
)
_ITERATIONS = ("sinkhorn_iterations", "gromov_outer_iterations", "gromov_inner_iterations")


@dataclass(frozen=True)
class HeLoConfig:
    """Sizes and behaviour of :class:`~helo_fast.model.HeLo`.

    ``HeLoConfig()`` is the paper's model. Fields that default to None take the value of ``preset`` when the config is made
    (and are never None afterwards); given explicitly, they stand.

    Args:
        n_channels: C, EEG channels, and tokens of each physiological modality.
        dim_eeg: features of one EEG channel.
        dim_gsr: features of the skin-conductance input.
        dim_ppg: features of the pulse input.
        dim_video: features of the behavioural input.
        depth: transformer layers.
        feature_dim: D, width of a token; ``heads`` and ``heads_lcd`` must divide it.
        hidden_size: width of the feed-forward layers.
        heads: H, attention heads.
        heads_lcd: heads of the label-correlation-driven cross-attention.
        dropout: rate of the dropout on attention weights and feed-forward outputs, in [0, 1).
        emotion_classes: K, classes of the predicted distribution.
        preset: "paper", the model as described with the released code's quirks mended; "released", what the public code computes.
        plan_gradient: "none" holds the transport plan constant in the backward; "implicit" differentiates it (sinkhorn only).
        dropkey: rate at which DropKey drops attention logits, in [0, 1).
        alignment_weight: weight of the squared error between learned and ground-truth label correlations in the loss.
        rng: who draws the masks: "torch" in the released code's order (eager back end only), "philox" inside the operators,
            "auto" torch on the eager back end and Philox elsewhere (also under ``torch.compile``).
        epsilon: strength of the transport's regularisation (of the proximal term for gromov and fused), in units of cost.
        sinkhorn_iterations: iterations of the sinkhorn transport.
        gromov_outer_iterations: linearisations of the gromov and fused transports.
        gromov_inner_iterations: scaling steps for each of them.
        threshold: the gromov costs are cut off below min + threshold (max - min), in [0, 1].
        fused_alpha: weight of the Gromov term of the fused transport, in [0, 1]; the cosine cost has the rest.
        transport: optimal transport between physiological and behavioural tokens: "gromov", "sinkhorn" or "fused".
        learned_label_embedding: a learned [K, D] parameter; else U[0, 1) drawn per sample at every call.
        dropkey_in_evaluation: DropKey also in evaluation, where predictions then differ from call to call.
        dropped_row_gradient: logits of a row whose keys DropKey drops entirely still have a gradient, that of adding -1e12 (masks drawn
            with torch only: the operators' own rule is none).
        threshold_over: what the gromov costs take their min and max over: each "sample", or the whole "batch".
        transport_map: "barycentric" gives each behavioural token the mean of the physiological tokens sent to it,
            diag(1 / T'1) T' P; "plan" multiplies by the plan as it stands, T P.
        correlation: "cosine" is [K, K], of the label embeddings and of the label columns over the training set; "column" is per sample,
            with every feature column scaled to unit norm over the classes (so its diagonal is not 1).
        log_softmax: the loss takes its logarithm by log-softmax; else of the softmax, which may underflow to 0.
        unused_linear: hold the released checkpoints' ``linear``, which nothing uses.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a field out of range, or fields that contradict each other.

    Example:
        >>> from helo_fast.model import HeLoConfig
        >>> HeLoConfig() == HeLoConfig.paper()
        True
        >>> HeLoConfig.released(emotion_classes=7).transport
        'gromov'

    Source: Zheng et al., "HeLo: Heterogeneous Multi-Modal Fusion with Label Correlation for Emotion Distribution Learning",
    ACM MM 2025, arXiv 2507.06821; sizes are those of the authors' training script.
    """

    n_channels: int = 18
    dim_eeg: int = 5
    dim_gsr: int = 28
    dim_ppg: int = 27
    dim_video: int = 768
    depth: int = 1
    feature_dim: int = 128
    hidden_size: int = 64
    heads: int = 4
    heads_lcd: int = 1
    dropout: float = 0.5
    emotion_classes: int = 10
    preset: Literal["paper", "released"] = "paper"
    plan_gradient: Literal["none", "implicit"] = "none"
    dropkey: float = 0.5
    alignment_weight: float = 1.0
    rng: Literal["auto", "torch", "philox"] = "auto"
    epsilon: float = 0.1
    sinkhorn_iterations: int = 100
    gromov_outer_iterations: int = 5
    gromov_inner_iterations: int = 20
    threshold: float = 0.1
    fused_alpha: float = 0.5
    transport: Literal["gromov", "sinkhorn", "fused"] | None = None
    learned_label_embedding: bool | None = None
    dropkey_in_evaluation: bool | None = None
    dropped_row_gradient: bool | None = None
    threshold_over: Literal["sample", "batch"] | None = None
    transport_map: Literal["barycentric", "plan"] | None = None
    correlation: Literal["cosine", "column"] | None = None
    log_softmax: bool | None = None
    unused_linear: bool | None = None

    def __post_init__(self) -> None:
        _checks.choice(_NAME, "preset", self.preset, _CHOICES["preset"])
        for name, value in _PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in (*_SIZES, *_ITERATIONS):
            _checks.at_least(_NAME, name, getattr(self, name), 0 if name == "depth" else 1)
        for name, accepted in _CHOICES.items():
            _checks.choice(_NAME, name, getattr(self, name), accepted)
        for name in ("dropout", "dropkey"):
            _checks.fraction(_NAME, name, getattr(self, name))
        for name in ("threshold", "fused_alpha"):
            _checks.fraction(_NAME, name, getattr(self, name), below_one=False)
        _checks.positive(_NAME, "epsilon", self.epsilon, "it is in units of cost, and the cosine cost lies in [0, 2]")
        if self.alignment_weight != 0:
            _checks.positive(_NAME, "alignment_weight", self.alignment_weight, "0 switches the alignment term off")
        for name in ("learned_label_embedding", "dropkey_in_evaluation", "dropped_row_gradient", "log_softmax", "unused_linear"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{_NAME}: {name} must be True, False or None (the preset's), got {getattr(self, name)!r}")
        for name in ("heads", "heads_lcd"):
            count, width = getattr(self, name), self.feature_dim
            if width % count:
                raise ValueError(
                    f"{_NAME}: {name} must divide feature_dim, got {name}={count} and feature_dim={width}; "
                    f"set {name} to {max(h for h in range(1, count) if width % h == 0)} or feature_dim to {(width // count + 1) * count}"
                )
        if self.plan_gradient == "implicit" and self.transport != "sinkhorn":
            raise ValueError(
                f"{_NAME}: plan_gradient='implicit' needs transport='sinkhorn', got {self.transport!r}, whose plan has no gradient; "
                "set transport='sinkhorn' or plan_gradient='none'"
            )

    @classmethod
    def paper(cls, **overrides: Any) -> HeLoConfig:
        """The paper's model, with fields overridden."""
        return cls(preset="paper", **overrides)

    @classmethod
    def released(cls, **overrides: Any) -> HeLoConfig:
        """The model of the authors' public code, with fields overridden."""
        return cls(preset="released", **overrides)

    @classmethod
    def from_namespace(cls, namespace: argparse.Namespace) -> HeLoConfig:
        """The released model that the authors' training script builds from its argparse namespace.

        Reads n_channels, dim_eeg, dim_gsr, dim_ppg, dim_video, depth, feature_dim, hidden_size, heads, heads_lcd, dropout and
        emotion_classes; what is missing takes the script's default, and anything else in the namespace is not looked at.

        Raises:
            TypeError: it is no namespace: neither argparse's nor any object with one of those attributes.
        """
        read = {name: getattr(namespace, name) for name in (*_SIZES, "dropout") if hasattr(namespace, name)}
        if not read and not isinstance(namespace, argparse.Namespace):
            raise TypeError(
                f"{_NAME}: expected an argparse namespace with attributes such as n_channels, got {type(namespace).__name__}; "
                "for a dict use HeLoConfig.from_dict"
            )
        return cls.released(**read)

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain JSON values; :meth:`from_dict` returns an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeLoConfig:
        """The config of :meth:`to_dict`; fields left out take their defaults.

        Raises:
            ValueError: a key is no field.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ValueError(f"{_NAME}: unknown field {', '.join(map(repr, unknown))}; remove it, the fields are {', '.join(names)}")
        return cls(**values)
