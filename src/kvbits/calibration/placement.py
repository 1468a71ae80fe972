"""Models that lie on several devices, or partly on disk: where their inputs and weights are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def input_device(model: Any) -> torch.device:
    """Return where a model takes its token ids: that of its embedding, wherever the rest is.

    An embedding that accelerate keeps on disk or in the host's memory is on the device that it is
    brought to for every forward.
    """
    embedding = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    if device.type != "meta":
        return device
    places = [getattr(hook, "execution_device", None) for hook in _hooks(embedding)]
    return torch.device(next((place for place in places if place is not None), "cpu"))


def stored_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter by name; the values of those that are kept on disk, too.

    Names are those of ``named_parameters``, tied ones once. A parameter whose values cannot be
    found is on the device ``meta``.
    """
    for path, parameter in model.named_parameters():
        prefix, _, name = path.rpartition(".")
        yield path, _stored(model.get_submodule(prefix), name, parameter)


def _stored(module: Any, name: str, parameter: Tensor) -> Tensor:
    if parameter.device.type != "meta":
        return parameter
    for hook in _hooks(module):
        weights = getattr(hook, "weights_map", None)
        if weights is not None:
            value: Tensor = weights[name]
            return value
    return parameter


def _hooks(module: Any) -> list[Any]:
    """The hooks that accelerate put on a module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
