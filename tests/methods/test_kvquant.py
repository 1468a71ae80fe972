"""KVQuant's calibration: what is fitted, and that it pays."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st
from typer.testing import CliRunner

from kvbits import CachePlan
from kvbits.calibration.quantiles import ChannelQuantiles
from kvbits.cli import app
from kvbits.codecs import EncodeContext, Outliers, PreRope, RangeNormalised
from kvbits.codecs.codebook import FittedTable
from kvbits.codecs.levels import normal_float, on_grid
from kvbits.errors import CalibrationError
from kvbits.methods import build_method
from kvbits.testing import tiny_model

BLOCK = {"key_ranges": "block", "block_tokens": 32}
both_ranges = pytest.mark.parametrize("settings", [{}, BLOCK], ids=["calibrated", "block"])


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
            while not isinstance(codec, FittedTable):
                codec = codec.inner
            yield codec


@both_ranges
@pytest.mark.parametrize("levels", ["fisher", "fisher_unscaled", "activations"])
def test_every_layer_and_side_gets_levels_of_its_own(levels, settings, model, documents, tmp_path):
    plan = build_method("kvquant", levels=levels, **settings).calibrate(model, documents)
    found = [codec.levels for codec in tables(plan)]
    assert len(set(found)) == len(found) == 2 * len(plan.layers)
    assert normal_float(3) not in found
    plan.save(tmp_path / "plan.json")
    assert CachePlan.load(tmp_path / "plan.json") == plan  # to the last bit of every level


def test_calibration_is_deterministic(model, documents):
    method = build_method("kvquant")
    assert method.calibrate(model, documents) == method.calibrate(model, documents)


@both_ranges
@pytest.mark.parametrize("bits", [2, 3])
def test_fitted_levels_leave_less_error_than_those_of_a_normal(bits, settings, model, documents):
    """On the states they were fitted to, with the weights they were fitted under."""
    errors = {}
    for levels in ("activations", "normal_float"):
        method = build_method("kvquant", key_bits=bits, value_bits=bits, levels=levels, **settings)
        plan = method.calibrate(model, documents)
        cache = plan.new_cache(model)
        exact = model(documents[0][None]).past_key_values
        model(documents[0][None], past_key_values=cache)
        errors[levels] = sum(
            (layer.packed.states().dense("key") - own.keys).square().mean().item()
            for layer, own in zip(cache.layers, exact.layers, strict=True)
        )
    assert errors["activations"] < errors["normal_float"]


@both_ranges
def test_q_norm_widens_the_decoded_levels(settings, model, documents):
    """A level is the mean of what takes it, so rounding keeps the mean and loses spread."""
    plan = build_method("kvquant", key_bits=2, value_bits=2, q_norm=True, **settings)
    for codec in tables(plan.calibrate(model, documents)):
        assert codec.decoded_levels[0] < codec.levels[0]
        assert codec.decoded_levels[-1] > codec.levels[-1]


def test_the_variant_without_data_needs_no_model(model):
    method = build_method("kvquant", levels="normal_float", key_ranges="block")
    assert not method.needs_data
    assert {codec.levels for codec in tables(method.plan(model.config))} == {
        on_grid(normal_float(3))
    }


def test_progress_is_told_per_document(model, documents):
    for settings, passes in ((BLOCK, 1), ({}, 2), ({"levels": "uniform"}, 1)):
        calls: list[int] = []
        method = build_method("kvquant", **settings)
        method.calibrate(model, documents, lambda calls=calls: calls.append(1))
        assert method.passes == passes
        assert len(calls) == passes * len(documents)


def test_text_shorter_than_a_block_is_refused(model, documents):
    with pytest.raises(CalibrationError, match=r"a document of at least 129 tokens, .*a block of"):
        build_method("kvquant", key_ranges="block").calibrate(model, documents[1:])
    with pytest.raises(
        CalibrationError, match=r"at least 201 tokens, more than sinks; .*fewer sink"
    ):
        build_method("kvquant", sink_tokens=200).calibrate(model, documents)


def test_the_command_writes_what_was_fitted_and_on_what(tiny_model_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("kvbits " * 4000)
    result = CliRunner().invoke(
        app,
        [
            *("calibrate", str(tiny_model_dir), "--method", "kvquant", "--bits", "2"),
            *("--set", "levels=activations", "--documents", "3"),
            *("--text", str(text), "--device", "cpu", "-o", str(tmp_path / "made")),
        ],
    )
    assert result.exit_code == 0, result.output
    made = json.loads((tmp_path / "made" / "plan.json").read_text())
    assert next(each["domain"] for each in made["provenance"]["datasets"]) == "text"
    plan = CachePlan.load(tmp_path / "made" / "plan.json")
    assert len({codec.levels for codec in tables(plan)}) > 1
    assert plan.arrays


@pytest.mark.parametrize(("share", "is_pre_rope"), [(0.01, True), (0.1, False), (0.0, True)])
def test_ranges_are_percentiles_of_all_keys(share, is_pre_rope, model, documents):
    """Against numpy over all keys at once, sinks left out."""
    sinks = 2
    settings = {"outlier_share": share, "is_pre_rope": is_pre_rope, "sink_tokens": sinks}
    plan = build_method("kvquant", levels="uniform", **settings).calibrate(model, documents)
    codec = plan.layers[1].groups[0].key
    keys = []
    for document in documents:
        states = model(document[None]).past_key_values.layers[1].keys[:, :, sinks:].detach()
        if is_pre_rope:
            position = torch.arange(sinks, len(document))[None]
            states = codec.apply(states, EncodeContext(position))
        keys.append(states[0].numpy())
    ranges = codec.inner if is_pre_rope else codec
    assert isinstance(ranges, RangeNormalised)
    everything = np.concatenate(keys, 1)  # [H_kv, T, D]
    low, high = np.percentile(everything, (50 * share, 100 - 50 * share), axis=1)
    middle, half = ranges.middle.tensor.numpy(), ranges.half_range.tensor.numpy()
    np.testing.assert_allclose(middle - half, low, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(middle + half, high, rtol=1e-4, atol=1e-5)


def test_calibrated_keys_are_stored_token_by_token(model, documents):
    """3 bits and 2 slots of 24 bits; no number of a range is stored for any token."""
    plan = build_method("kvquant", residual_length=20).calibrate(model, documents)
    (layer, *_) = plan.layers
    assert layer.residual_length == 20
    key = layer.groups[0].key
    assert isinstance(key, PreRope)
    assert isinstance(key.inner, RangeNormalised)
    assert isinstance(key.inner.inner, Outliers)
    assert layer.quantum == 1
    assert key.stored_bits(32) == 3 + 48 / 32
    assert set(plan.arrays) == {
        f"layers.{index}.key.{name}" for index in range(4) for name in ("middle", "half_range")
    }


@torch.no_grad()
def test_calibrated_ranges_are_about_as_good_as_those_of_a_block(model, documents):
    """The paper finds them equal with outliers: the ranges are those of texts like this one."""
    exact = model(documents[0][None]).past_key_values
    errors = []
    for settings in ({}, BLOCK):
        plan = build_method("kvquant", levels="activations", **settings).calibrate(
            model, documents
        )
        cache = plan.new_cache(model)
        model(documents[0][None], past_key_values=cache)
        errors.append(
            sum(
                (layer.packed.states().dense("key") - own.keys).square().mean().item()
                for layer, own in zip(cache.layers, exact.layers, strict=True)
            )
        )
    assert errors[0] < 2 * errors[1]


def test_a_channel_that_never_moves_has_a_range(documents):
    model = tiny_model("llama").eval()
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data[5] = 0  # before the rotary embedding
    plan = build_method("kvquant", levels="uniform").calibrate(model, documents)
    cache = plan.new_cache(model)
    logits = model(documents[0][None], past_key_values=cache).logits
    assert logits.isfinite().all()
    assert cache.layers[0].packed.states().dense("key").isfinite().all()


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    share=st.sampled_from([0.0, 0.005, 0.05, 0.25, 0.49]),
    seed=st.integers(0, 99),
)
@settings_of(deadline=None, max_examples=40)
def test_quantiles_of_pieces_are_those_of_the_whole(lengths, share, seed):
    generator = torch.Generator().manual_seed(seed)
    pieces = [torch.randn(1, 2, length, 3, generator=generator) for length in lengths]
    found = ChannelQuantiles(sum(lengths), share)
    for piece in pieces:
        assert not found.is_complete
        found.add(piece)
    low, high = found.bounds()
    whole = torch.cat(pieces, 2)[0].double().numpy()
    expected = np.quantile(whole, (share, 1 - share), axis=1)
    np.testing.assert_allclose(low, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(high, expected[1], rtol=1e-5, atol=1e-6)
