"""A model on disk: a folder (local path or fsspec URL) with `model.safetensors` and `config.json`. Never a pickle."""

from __future__ import annotations

import json
from typing import Any

import fsspec
import safetensors.torch
import torch
from torch import Tensor, nn


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
        return read_weights(f"{folder}/model.safetensors"), config
    except FileNotFoundError as error:
        raise ValueError(f"no model in {folder}: it needs config.json and model.safetensors") from error


def read_weights(path: str) -> dict[str, Tensor]:
    """State dict from `.safetensors`, or from a PyTorch file of which only tensors are loaded."""
    try:
        with fsspec.open(path, "rb") as file:
            if path.endswith(".safetensors"):
                return safetensors.torch.load(file.read())
            state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
            return state
    except FileNotFoundError as error:
        raise ValueError(f"no weights at {path}") from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"cannot read the weights in {path}: {reason}") from error
