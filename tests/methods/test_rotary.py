"""Frequencies are those the model itself rotates by."""

from __future__ import annotations

import pytest
import torch

from kvbits.errors import UnsupportedModelError
from kvbits.geometry import ModelGeometry
from kvbits.methods.rotary import frequencies
from kvbits.testing import tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0} | {
    "original_max_position_embeddings": 128
}
MODELS = {
    "llama": ("llama", {}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("qwen3", {"rope_parameters": YARN}),
    "qwen2": ("qwen2", {}),
    "phi3": ("phi3", {}),
    "gemma3": ("gemma3", {}),
    "gpt_oss": ("gpt_oss", {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_frequencies_are_those_of_the_model(name):
    family, overrides = MODELS[name]
    model = tiny_model(family, **overrides)
    geometry = ModelGeometry.from_config(model.config)
    index = geometry.packable_layers[0]
    layer = geometry.layers[index]
    found = torch.tensor(frequencies(layer, model.config))
    rotary = model.model.rotary_emb
    own = getattr(rotary, f"{layer.layer_type}_inv_freq", None)
    torch.testing.assert_close(found, (rotary.inv_freq if own is None else own).float())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_change_with_the_length_are_refused(kind):
    model = tiny_model("llama")
    model.config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    (layer, *_) = ModelGeometry.from_config(model.config).layers
    with pytest.raises(UnsupportedModelError, match=f"must not depend on the length.*{kind}"):
        frequencies(layer, model.config)
