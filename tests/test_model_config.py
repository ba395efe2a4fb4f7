"""HeLoConfig: presets, namespaces, dictionaries and bad values."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from helo_fast.model import HeLo, HeLoConfig

SIZES = dict(n_channels=3, dim_eeg=2, dim_gsr=4, dim_ppg=5, dim_video=6, feature_dim=16, hidden_size=8, heads=2, emotion_classes=7)


def test_namespace_gives_the_released_model():
    namespace = argparse.Namespace(**SIZES, lr=0.1, transport="unknown", epochs=300)
    model = HeLo(namespace)
    assert model.config == HeLoConfig.released(**SIZES)
    assert HeLo(argparse.Namespace(dim_video=3)).config == HeLoConfig.released(dim_video=3)
    with pytest.raises(TypeError, match="from_dict"):
        HeLo({"dim_video": 3})


def test_presets():
    assert HeLoConfig() == HeLoConfig.paper()
    assert (HeLoConfig().transport, HeLoConfig.released().transport) == ("sinkhorn", "gromov")
    released = HeLoConfig.released(correlation="cosine")
    assert released.correlation == "cosine" and released.dropkey_in_evaluation
    assert all(value is not None for value in HeLoConfig().to_dict().values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        released.heads = 2


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_dict_round_trip(preset):
    made = HeLoConfig(preset=preset, epsilon=0.2, transport_map="plan")
    assert HeLoConfig.from_dict(made.to_dict()) == made
    with pytest.raises(ValueError, match="unknown field 'head'.*the fields are n_channels"):
        HeLoConfig.from_dict({"head": 2})


@pytest.mark.parametrize(
    ("values", "exception", "message"),
    [
        ({"heads": 3}, ValueError, r"heads must divide feature_dim, got heads=3 and feature_dim=128; set heads to 2 or feature_dim to 129"),
        ({"heads_lcd": 5}, ValueError, "heads_lcd must divide feature_dim"),
        ({"n_channels": 0}, ValueError, "n_channels must be at least 1, got 0"),
        ({"dim_eeg": 2.5}, TypeError, "dim_eeg must be an int, got 2.5"),
        ({"dropout": 1.0}, ValueError, r"dropout must be a number in \[0, 1\), got 1.0"),
        ({"epsilon": 0.0}, ValueError, "epsilon must be a finite number above 0"),
        ({"transport": "emd"}, ValueError, "transport must be one of 'gromov', 'sinkhorn', 'fused', got 'emd'"),
        ({"preset": "best"}, ValueError, "preset must be one of"),
        ({"log_softmax": 1}, TypeError, "log_softmax must be True, False or None"),
        ({"alignment_weight": -1.0}, ValueError, "alignment_weight must be"),
        ({"transport": "gromov", "plan_gradient": "implicit"}, ValueError, "plan_gradient='implicit' needs transport='sinkhorn'"),
    ],
)
def test_bad_config(values, exception, message):
    with pytest.raises(exception, match=f"HeLoConfig: {message}"):
        HeLoConfig(**values)
