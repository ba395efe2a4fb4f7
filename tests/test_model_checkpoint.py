"""HeLo on disk, and the label correlation that it keeps: save_pretrained, from_pretrained, load_released, fit_correlation."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from helo_fast.model import HeLo, HeLoConfig, load_released

SIZES = dict(n_channels=3, dim_eeg=2, dim_gsr=4, dim_ppg=5, dim_video=6, feature_dim=16, hidden_size=8, heads=2, emotion_classes=7)
PRESETS = ("paper", "released")


def build(preset: str, **overrides) -> HeLo:
    return HeLo(HeLoConfig(**{**SIZES, "preset": preset, **overrides}))


def batch(size: int = 4) -> list[torch.Tensor]:
    return [torch.rand(size, 6), torch.rand(size, 4), torch.rand(size, 5), torch.rand(size, 6), torch.rand(size, 7).softmax(-1)]


def assert_same(loaded: HeLo, model: HeLo) -> None:
    assert loaded.config == model.config
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


# The label correlation


def test_fit_correlation_in_paper():
    model, labels = build("paper").eval(), torch.rand(50, 7)
    inputs = batch()
    assert model(*inputs[:4])[2] is None
    over_batch = model(*inputs)[2]
    model.fit_correlation(labels)
    expected = F.cosine_similarity(labels.mT[:, None], labels.mT[None], dim=-1)
    for given in (inputs, inputs[:4]):
        torch.testing.assert_close(model(*given)[2], expected)
    assert not torch.allclose(over_batch, expected)
    _, learned, _ = model(*inputs)
    torch.testing.assert_close(model.loss(*inputs)[1]["alignment"], (learned - expected).square().mean())


def test_fit_correlation_in_released_changes_nothing():
    model = build("released")
    before = list(model.state_dict())
    model.fit_correlation(torch.rand(50, 7))
    assert list(model.state_dict()) == before and model(*batch())[2].shape == (4, 7, 7)


def test_fitted_correlation_survives_state_dicts():
    fitted, fresh = build("paper"), build("paper")
    fitted.fit_correlation(torch.rand(50, 7))
    state = fitted.state_dict()
    assert state.keys() - fresh.state_dict().keys() == {"label_correlation"}
    unfitted = fresh.state_dict()
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(fresh.label_correlation, fitted.label_correlation)
    assert fresh.label_correlation.data_ptr() != fitted.label_correlation.data_ptr()
    inside = torch.nn.ModuleDict({"model": build("paper")})
    inside.load_state_dict({f"model.{name}": tensor for name, tensor in state.items()})
    assert torch.equal(inside["model"].label_correlation, fitted.label_correlation)
    copied = copy.deepcopy(build("paper"))
    copied.load_state_dict(state)
    assert torch.equal(copied.label_correlation, fitted.label_correlation)
    fresh.load_state_dict(unfitted, strict=True)  # its model was never fitted
    assert fresh.label_correlation is None
    with pytest.raises(RuntimeError, match="label_correlation"):
        build("released").load_state_dict({**build("released").state_dict(), "label_correlation": torch.eye(7)})


@pytest.mark.parametrize(
    ("labels", "exception", "message"),
    [
        (torch.rand(5, 6), ValueError, r"labels must be \[N, emotion_classes\], here \[N, 7\] with N at least 1, got \[5, 6\]"),
        (torch.rand(0, 7), ValueError, r"got \[0, 7\]"),
        (torch.tensor([[1.0] * 7, [1.0] * 6 + [-0.5]]), ValueError, "row 1, class 6 is -0.5"),
        (torch.tensor([[float("nan")] + [0.0] * 6]), ValueError, "row 0, class 0 is nan"),
        (torch.ones(5, 7).long(), TypeError, "labels must be float32"),
    ],
)
def test_bad_labels_to_fit(labels, exception, message):
    with pytest.raises(exception, match=message):
        build("paper").fit_correlation(labels)


# This package's file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip(tmp_path, preset, dtype):
    model = build(preset, depth=2, epsilon=0.2).to(dtype)
    model.fit_correlation(torch.rand(50, 7, dtype=dtype))
    path = tmp_path / "model.safetensors"
    build(preset).save_pretrained(path)
    model.save_pretrained(path)  # replaces
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    before = torch.get_rng_state()
    loaded = HeLo.from_pretrained(str(path))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(loaded, model)
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    assert loaded(*(t.to(dtype) for t in batch()))[0].isfinite().all()


def test_wrong_files(tmp_path):
    whole = tmp_path / "model.safetensors"
    build("paper").save_pretrained(whole)
    content = whole.read_bytes()
    broken = tmp_path / "broken.safetensors"
    for piece in (content[:-100], content[:50], content[:4], b"", b"\xff" * 200):
        broken.write_bytes(piece)
        with pytest.raises(ValueError, match=r"broken\.safetensors is not a whole safetensors file.*save the model again"):
            HeLo.from_pretrained(broken)
    with pytest.raises(FileNotFoundError, match="no file .*missing"):
        HeLo.from_pretrained(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no file"):
        HeLo.from_pretrained(tmp_path)

    def described(**description):
        save_file({"x": torch.ones(1)}, broken, metadata={"helo_fast": json.dumps(description)} if description else None)

    described()
    with pytest.raises(ValueError, match="without helo-fast's metadata; write it with HeLo.save_pretrained"):
        HeLo.from_pretrained(broken)
    described(format="helo-fast model", version=2, config={})
    with pytest.raises(ValueError, match="'helo-fast model' version 2, this helo-fast reads .* version 1; update helo-fast"):
        HeLo.from_pretrained(broken)
    described(format="helo-fast model", version=1, config={"width": 3})
    with pytest.raises(ValueError, match="unknown field 'width'"):
        HeLo.from_pretrained(broken)
    described(format="helo-fast model", version=1, config=build("paper").config.to_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        HeLo.from_pretrained(broken)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    model = build("paper")
    model.save_pretrained(path)

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        build("paper").save_pretrained(path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same(HeLo.from_pretrained(path), model)
    with pytest.raises(FileNotFoundError):
        model.save_pretrained(tmp_path / "absent" / "model.safetensors")


# Checkpoints of the released code


@pytest.mark.parametrize("nested", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_load_released(tmp_path, nested, prefix):
    model = build("released", depth=2)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    path = tmp_path / "epoch_299.pth"
    torch.save({nested: state, "epoch": 299, "optimizer": {"lr": 1e-3}} if nested else state, path)
    before = torch.get_rng_state()
    loaded = load_released(path, heads=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(loaded, model)
    assert not loaded.training and loaded.config.preset == "released"


def test_load_released_defaults_and_overrides(tmp_path):
    path = tmp_path / "half.pth"
    model = build("released", heads=4, depth=0).half()
    torch.save(model.state_dict(), path)
    loaded = load_released(path, rng="torch", n_channels=3)
    assert (loaded.config.heads, loaded.config.heads_lcd, loaded.config.rng, loaded.config.depth) == (4, 1, "torch", 0)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    with pytest.raises(ValueError, match="emotion_classes=7 by its shapes, got emotion_classes=8; leave emotion_classes out"):
        load_released(path, emotion_classes=8)
    with pytest.raises(TypeError, match="head_count"):
        load_released(path, head_count=4)


class Unsafe:
    """Nothing that weights_only accepts."""


def test_wrong_released_checkpoints(tmp_path):
    path = tmp_path / "checkpoint.pth"
    with pytest.raises(FileNotFoundError, match="no file"):
        load_released(path)
    whole = build("released")
    torch.save(whole.state_dict(), path)
    content = path.read_bytes()
    for piece in (content[: len(content) // 2], content[:10], b"", b"not a checkpoint"):
        path.write_bytes(piece)
        with pytest.raises(ValueError, match=r"checkpoint\.pth is no readable checkpoint"):
            load_released(path)
    torch.save({"state_dict": whole.state_dict(), "hook": Unsafe()}, path)
    with pytest.raises(ValueError, match=r"holds more than tensors[\s\S]*torch.save\(model.state_dict\(\), path\)"):
        load_released(path)
    for content, found in (([1, 2], "list"), ({"epoch": 3}, "keys epoch"), ({}, "keys")):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"holds no state_dict, .* but {found}"):
            load_released(path)
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(ValueError, match=r"no checkpoint of HeLo: it has no matrix 'eeg_encoder.weight' \(it has weight, bias, ...\)"):
        load_released(path)
    torch.save({name: tensor for name, tensor in whole.state_dict().items() if name != "linear.weight"}, path)
    with pytest.raises(RuntimeError, match="linear.weight"):
        load_released(path, heads=2)
