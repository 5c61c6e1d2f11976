"""A model on disk: a folder (local path or fsspec URL) with `model.safetensors` and `config.json`. Never a pickle."""

from __future__ import annotations

import io
import json
from typing import Any

import fsspec
import safetensors.torch
import torch
from torch import Tensor, nn

from cae.data import first_line


def save_model(folder: str, module: nn.Module, config: dict[str, Any]) -> None:
    """Write the module's state and the plain values in `config`, the latter last."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    with fsspec.open(f"{folder}/model.safetensors", "wb", auto_mkdir=True) as file:
        file.write(safetensors.torch.save(state))
    with fsspec.open(f"{folder}/config.json", "w", auto_mkdir=True) as file:
        json.dump(config, file, indent=1)


def read_model(folder: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and configuration of a saved model. Raises ValueError where the folder holds none."""
    try:
        with fsspec.open(f"{folder}/config.json") as file:
            config = json.load(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"no model in {folder}: it needs config.json and model.safetensors") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {folder}/config.json: {error}") from error
    return read_weights(f"{folder}/model.safetensors"), config


def read_weights(path: str, entry: str = "") -> dict[str, Tensor]:
    """State dict from `.safetensors`, or from a PyTorch file of which only tensors are loaded. Raises ValueError.

    `entry` names the one that the PyTorch file keeps the state dict under. Without, that is the file itself or, of a
    training's checkpoint, the only entry that is a state dict.
    """
    try:
        with fsspec.open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError as error:
        raise ValueError(f"no weights at {path}") from error
    except Exception as error:
        raise ValueError(f"cannot read the weights in {path}: {first_line(error)}") from error
    try:
        if path.endswith(".safetensors"):
            return safetensors.torch.load(data)
        held: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if entry:
            held = held[entry]
        elif not _is_state(held):
            (held,) = filter(_is_state, held.values())
        if not _is_state(held):
            raise TypeError("not a state dict")
    # PyTorch's own message is long, and advises to load the file unsafely.
    except Exception as error:
        raise ValueError(
            f"the weights in {path} are damaged or no state dict, or several: save net.state_dict() alone, "
            "as .safetensors"
        ) from error
    return held


def _is_state(held: object) -> bool:
    return isinstance(held, dict) and bool(held) and all(isinstance(value, Tensor) for value in held.values())
