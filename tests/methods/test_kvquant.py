"""KVQuant's calibration: what is fitted, and that it pays."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from kvbits import CachePlan
from kvbits.cli import app
from kvbits.codecs import Codebook
from kvbits.codecs.levels import normal_float
from kvbits.errors import CalibrationError
from kvbits.methods import build_method
from kvbits.testing import tiny_model

SMALL = {"block_tokens": 32}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama").eval()


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 90, (n,), generator=generator) for n in (200, 90, 33)]


def tables(plan):
    """Levels of every layer: keys, values."""
    for layer in plan.layers:
        for codec in (layer.groups[0].key, layer.groups[0].value):
            while not isinstance(codec, Codebook):
                codec = codec.inner
            yield codec


@pytest.mark.parametrize("levels", ["fisher", "fisher_unscaled", "activations"])
def test_every_layer_and_side_gets_levels_of_its_own(levels, model, documents, tmp_path):
    plan = build_method("kvquant", levels=levels, **SMALL).calibrate(model, documents)
    found = [codec.levels for codec in tables(plan)]
    assert len(set(found)) == len(found) == 2 * len(plan.layers)
    assert normal_float(3) not in found
    plan.save(tmp_path / "plan.json")
    assert CachePlan.load(tmp_path / "plan.json") == plan  # to the last bit of every level


def test_calibration_is_deterministic(model, documents):
    method = build_method("kvquant", **SMALL)
    assert method.calibrate(model, documents) == method.calibrate(model, documents)


@pytest.mark.parametrize("bits", [2, 3])
def test_fitted_levels_leave_less_error_than_those_of_a_normal(bits, model, documents):
    """On the states they were fitted to, with the weights they were fitted under."""
    errors = {}
    for levels in ("activations", "normal_float"):
        method = build_method("kvquant", key_bits=bits, value_bits=bits, levels=levels, **SMALL)
        plan = method.calibrate(model, documents)
        cache = plan.new_cache(model)
        exact = model(documents[0][None]).past_key_values
        model(documents[0][None], past_key_values=cache)
        errors[levels] = sum(
            (layer.packed.states().dense("key") - own.keys).square().mean().item()
            for layer, own in zip(cache.layers, exact.layers, strict=True)
        )
    assert errors["activations"] < errors["normal_float"]


def test_q_norm_widens_the_decoded_levels(model, documents):
    """A level is the mean of what takes it, so rounding keeps the mean and loses spread."""
    plan = build_method("kvquant", key_bits=2, value_bits=2, q_norm=True, **SMALL)
    for codec in tables(plan.calibrate(model, documents)):
        assert codec.decoded_levels[0] < codec.levels[0]
        assert codec.decoded_levels[-1] > codec.levels[-1]


def test_the_variant_without_data_needs_no_model(model):
    method = build_method("kvquant", levels="normal_float")
    assert not method.needs_data
    assert {codec.levels for codec in tables(method.plan(model.config))} == {normal_float(3)}


def test_progress_is_told_per_document(model, documents):
    calls = []
    build_method("kvquant", **SMALL).calibrate(model, documents, lambda: calls.append(1))
    assert len(calls) == len(documents)


def test_text_shorter_than_a_block_is_refused(model, documents):
    with pytest.raises(CalibrationError, match="a document of more than 129 tokens"):
        build_method("kvquant").calibrate(model, documents[1:])


def test_the_command_writes_what_was_fitted_and_on_what(tiny_model_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("kvbits " * 4000)
    result = CliRunner().invoke(
        app,
        [
            *("calibrate", str(tiny_model_dir), "--method", "kvquant", "--bits", "2"),
            *("--set", "block_tokens=32", "--set", "levels=activations", "--documents", "3"),
            *("--text", str(text), "--device", "cpu", "-o", str(tmp_path / "made")),
        ],
    )
    assert result.exit_code == 0, result.output
    made = json.loads((tmp_path / "made" / "plan.json").read_text())
    assert next(each["domain"] for each in made["provenance"]["datasets"]) == "text"
    assert len({codec.levels for codec in tables(CachePlan.from_json(json.dumps(made)))}) > 1
