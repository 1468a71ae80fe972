"""The published plans: complete, and of the average widths that are published with them."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
from transformers import AutoConfig

from kvbits import CachePlan
from kvbits.errors import PlanError
from kvbits.methods import build_method
from kvbits.methods.kvtuner import presets
from kvbits.testing import tiny_model

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LAYERS = {"Llama-3.1-8B": 32, "Mistral-7B": 32, "Qwen2.5-3B": 36, "Qwen2.5-7B": 28}
PUBLISHED = {
    entry["name"]: entry
    for entry in json.loads((files("kvbits.methods") / "kvtuner_presets.json").read_text())
}


def test_there_are_eight_plans_of_four_models():
    models = [name.split("/")[0] for name in presets()]
    assert {model: models.count(model) for model in models} == dict.fromkeys(LAYERS, 8)


@pytest.mark.parametrize("name", presets())
def test_widths_average_to_what_is_published(name):
    preset, published = presets()[name], PUBLISHED[name]
    assert len(preset.pairs) == LAYERS[name.split("/")[0]]
    keys, values = (sum(widths) / len(preset.pairs) for widths in zip(*preset.pairs, strict=True))
    assert keys == pytest.approx(published["key_bits"], abs=0.006)
    assert values == pytest.approx(published["value_bits"], abs=0.006)
    assert (keys + values) / 2 == pytest.approx(preset.average_bits, abs=0.001)
    assert preset.mode == name.split("/")[1]


def test_what_is_wrong_with_a_plan_is_said():
    flawed = {name for name, preset in presets().items() if preset.note}
    assert flawed == {"Qwen2.5-3B/kivi/6_0", "Qwen2.5-3B/per_token/4_1"}
    assert presets()["Qwen2.5-3B/kivi/6_0"].pairs == presets()["Qwen2.5-3B/kivi/4_0"].pairs


@pytest.mark.parametrize(("number", "name"), [("4_1", "c3.25"), ("6_1", "c4.91")])
def test_a_preset_is_the_plan_of_its_file(number, name):
    config = AutoConfig.from_pretrained(BENCHMARKS / "shapes" / "llama-3.1-8b")
    plan = build_method("kvtuner", preset=f"Llama-3.1-8B/kivi/{number}").plan(config)
    file = BENCHMARKS / "plans" / f"kvtuner-llama-3.1-8b-{name}.yaml"
    assert plan.layers == CachePlan.from_kvtuner_yaml(file, config, mode="kivi").layers


def test_a_preset_of_another_model_is_refused():
    config = tiny_model("llama").config
    with pytest.raises(PlanError, match=r"must be for a model of 4 layers, got .* for 28"):
        build_method("kvtuner", preset="Qwen2.5-7B/kivi/4_0").plan(config)
    with pytest.raises(ValueError, match=r"preset must be one of Llama-3\.1-8B/kivi/4_0, "):
        build_method("kvtuner", preset="Llama").plan(config)
    with pytest.raises(ValueError, match="preset must be given, got nothing"):
        build_method("kvtuner")
