"""HeLo on disk: this package's safetensors file, and the released code's checkpoints."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import HeLoConfig

FORMAT = "helo-fast model"
VERSION = 1
_METADATA_KEY = "helo_fast"  # one JSON object: {"format": FORMAT, "version": VERSION, "config": {...}}
_NESTED_UNDER = ("state_dict", "model_state_dict", "model")


def write(path: str | os.PathLike, config: HeLoConfig, state: Mapping[str, Tensor]) -> None:
    """Write the file whole or not at all: into a temporary file beside it, which then takes its name."""
    from safetensors.torch import save

    description = {"format": FORMAT, "version": VERSION, "config": config.to_dict()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    content = save(tensors, metadata={"format": "pt", _METADATA_KEY: json.dumps(description)})
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | os.PathLike) -> tuple[HeLoConfig, dict[str, Tensor]]:
    """The config and state that :func:`write` wrote."""
    from safetensors import SafetensorError, safe_open

    path = _existing(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle, not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy it again, or save the model again") from error
    try:
        description = json.loads(metadata[_METADATA_KEY])
        found, version, values = description["format"], description["version"], description["config"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is a safetensors file without helo-fast's metadata; write it with HeLo.save_pretrained, "
            "or load a released checkpoint with load_released"
        ) from error
    if found != FORMAT or version != VERSION:
        raise ValueError(f"{path} holds {found!r} version {version}, this helo-fast reads {FORMAT!r} version {VERSION}; update helo-fast")
    return HeLoConfig.from_dict(values), state


def read_released(path: str | os.PathLike, overrides: Mapping[str, Any]) -> tuple[HeLoConfig, dict[str, Tensor]]:
    """The state of a checkpoint of the released code in float32, and the config that its shapes tell."""
    path = _existing(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{path} is no readable checkpoint, or holds more than tensors ({error}); "
            "save it again with torch.save(model.state_dict(), path)"
        ) from error
    state = _state_of(content, path)
    config = _released_config(state, path, overrides)
    return config, {name: tensor.float() for name, tensor in state.items()}


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give the path of a saved model")
    return path


def _state_of(content: Any, path: Path) -> dict[str, Tensor]:
    for key in _NESTED_UNDER:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        keys = f"keys {', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(
            f"{path} holds no state_dict, neither itself nor under {', '.join(map(repr, _NESTED_UNDER))}, but {keys}; "
            "save it with torch.save(model.state_dict(), path)"
        )
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def _released_config(state: Mapping[str, Tensor], path: Path, overrides: Mapping[str, Any]) -> HeLoConfig:
    def shape(name: str) -> torch.Size:
        if name not in state or state[name].dim() != 2:
            raise ValueError(
                f"{path} is no checkpoint of HeLo: it has no matrix {name!r} (it has {', '.join(list(state)[:5])}, ...); give another file"
            )
        return state[name].shape

    width, dim_eeg = shape("eeg_encoder.weight")
    layers = {int(match[1]) for match in map(re.compile(r"transformer_layer\.(\d+)\.").match, state) if match}
    sizes = {
        "n_channels": shape("gsr_encoder.weight")[0] // width,
        "dim_eeg": dim_eeg,
        "dim_gsr": shape("gsr_encoder.weight")[1],
        "dim_ppg": shape("ppg_encoder.weight")[1],
        "dim_video": shape("behavioral_encoder.weight")[1],
        "depth": len(layers),
        "feature_dim": width,
        "emotion_classes": shape("fused_projection.weight")[0],
    }
    if layers:
        sizes["hidden_size"] = shape("transformer_layer.0.feed_forward.w1.weight")[0]
    for name, value in overrides.items():
        if name in sizes and sizes[name] != value:
            raise ValueError(f"{path} has {name}={sizes[name]} by its shapes, got {name}={value!r}; leave {name} out")
    return HeLoConfig.released(**{**sizes, **overrides})
