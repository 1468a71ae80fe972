"""Models to measure: with their weights, or of a config's shape with random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def has_weights(model: str) -> bool:
    """Whether a model's folder holds weights; a hub id is taken to."""
    folder = Path(model)
    return not folder.is_dir() or any(folder.glob("*.safetensors"))


def load(model: str, device: str, dtype: str) -> Any:
    """A model folder's model, ready to run; random weights where the folder has none."""
    if not has_weights(model):
        return random_model(AutoConfig.from_pretrained(model), device, dtype)
    made = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    return made.to(device).eval()


def random_model(config: Any, device: str, dtype: str = "auto") -> Any:
    """Build a model with random weights on a device.

    Args:
        config: Of transformers.
        device: A torch device.
        dtype: ``auto`` is the config's own on a GPU and float32 on a CPU.
    """
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else str(config.dtype).removeprefix("torch.")
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model.eval()
