"""Starting a model's forward pass at a later decoder layer, from stored hidden states.

The decoder layers are found by structure: the one outermost module list whose length is the
number of hidden layers. Where a model is built otherwise, nothing is captured and every
measurement runs all layers. `stream.py` is the only user.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer

from kvbits.geometry import SHARING_LAYER_TYPE, ModelGeometry


class LayerInputs(NamedTuple):
    """Hidden states entering each decoder layer.

    Attributes:
        states: one tensor ``[B, T, hidden_size]`` per layer, on the CPU, in the model's dtype.
    """

    states: tuple[torch.Tensor, ...]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.states)

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(state.nbytes for state in self.states)

    def chunk(self, layer: int, start: int, stop: int) -> torch.Tensor:
        """Return the states of some positions, ``[B, stop - start, hidden_size]``."""
        return self.states[layer][:, start:stop]


class Captured:
    """Collects the layers' inputs while a pass runs."""

    def __init__(self, num_layers: int) -> None:
        self.parts: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]
        self.returns_tensors = True

    def collect(self) -> LayerInputs | None:
        """Join the chunks; None if nothing was seen or a layer returns more than states."""
        if not self.parts or not self.returns_tensors or not all(self.parts):
            return None
        return LayerInputs(tuple(torch.cat(parts, dim=1) for parts in self.parts))


class _SkippedLayer(DynamicLayer):  # type: ignore[misc]
    """Stands in the cache for a layer that is not run: counts tokens, holds none."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_tokens + query_length, 0


class _PassThrough(nn.Module):
    """Stands for a decoder layer that is not run: returns what it is given, or stored states."""

    def __init__(self, original: nn.Module, states: torch.Tensor | None) -> None:
        super().__init__()
        self.__dict__["original"] = original  # not a submodule: it must not be moved or counted
        self.__dict__["states"] = states

    def __getattr__(self, name: str) -> Any:
        # models read attributes such as attention_type off their layers
        return getattr(self.__dict__["original"], name)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = _hidden_states(args, kwargs)
        states: torch.Tensor | None = self.__dict__["states"]
        return hidden if states is None else states.to(hidden.device)


def layer_list(model: Any) -> nn.ModuleList | None:
    """Return the outermost module list of ``num_hidden_layers``, None unless there is just one.

    Also None where layers read the states of earlier ones, which may then not be left out.
    """
    geometry = ModelGeometry.from_config(model.config)
    if any(layer.layer_type == SHARING_LAYER_TYPE for layer in geometry.layers):
        return None
    num_layers = model.config.get_text_config().num_hidden_layers
    base = getattr(model, "base_model", model)
    found = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    }
    outermost = [
        module
        for name, module in found.items()
        if not any(name.startswith(f"{other}.") for other in found if other != name)
    ]
    return outermost[0] if len(outermost) == 1 else None


@contextmanager
def capturing(model: Any) -> Iterator[Captured]:
    """Record what enters every decoder layer while the block runs."""
    layers = layer_list(model)
    captured = Captured(0 if layers is None else len(layers))
    hooks = []
    for index, layer in enumerate(layers or ()):

        def before(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index
        ) -> None:
            captured.parts[index].append(
                _hidden_states(args, kwargs).detach().to("cpu", copy=True)
            )

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            captured.returns_tensors &= isinstance(output, torch.Tensor)

        hooks += [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after),
        ]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def resuming(model: Any, start_layer: int, states: torch.Tensor) -> Iterator[None]:
    """Let the layers before ``start_layer`` pass ``states`` on while the block runs."""
    layers = layer_list(model)
    assert layers is not None, "layer inputs can only have been captured from a known structure"
    originals = list(layers[:start_layer])
    try:
        for index, original in enumerate(originals):
            layers[index] = _PassThrough(original, states if index == 0 else None)
        yield
    finally:
        for index, original in enumerate(originals):
            layers[index] = original


def can_skip_in_chunks(cache: Any, start_layer: int) -> bool:
    """Return whether stand-ins can report for the skipped layers; not for sliding windows."""
    return not any(getattr(layer, "is_sliding", False) for layer in cache.layers[:start_layer])


def skip_cache_layers(cache: Any, start_layer: int, num_tokens: int) -> None:
    """Let the cache's skipped layers report ``num_tokens``, which masks and positions follow."""
    if not can_skip_in_chunks(cache, start_layer):
        return  # one chunk only: the layers are empty, and say so rightly
    for index in range(start_layer):
        cache.layers[index] = _SkippedLayer(num_tokens)


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    states: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return states
