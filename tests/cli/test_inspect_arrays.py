"""``kvbits inspect`` counts what a plan holds beside its cache."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

from kvbits import CachePlan
from kvbits.cli import app
from kvbits.codecs import Affine, Array, Permuted
from kvbits.layer_plan import LayerPlan


@pytest.fixture
def path(tiny_model_dir, tmp_path):
    order = Array("order", torch.arange(64, dtype=torch.int32).view(2, 32))
    layer = LayerPlan.uniform(Permuted(inner=Affine(bits=4), order=order), Affine(bits=4))
    plan = CachePlan.from_layers(AutoConfig.from_pretrained(tiny_model_dir), [layer] * 3)
    plan.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def inspect(*arguments):
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_arrays_are_named_beside_the_cache(tiny_model_dir, path):
    output = inspect(tiny_model_dir, "--plan", path)
    assert "plan.json: and 256 B of arrays, once for all sequences" in " ".join(output.split())
    assert "16 bits: and" not in output


def test_arrays_take_their_part_of_a_budget(tiny_model_dir, path):
    """One page of 64 tokens in 3 layers, and the next page only with room for the arrays too."""
    plan = CachePlan.load(path)
    for budget, most in ((plan.bytes(65) + 255, 64), (plan.bytes(65) + 256, 128)):
        found = json.loads(inspect(tiny_model_dir, "--plan", path, "--memory", budget, "--json"))[
            "plans"
        ][-1]
        assert found["array_bytes"] == 256
        assert found["max_context"] == most
