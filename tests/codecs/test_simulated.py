"""Simulated codes: Affine's own where Affine has them, and what is new about the rest."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from kvbits import LayerPlan
from kvbits.codecs import Affine
from kvbits.codecs.simulated import NormalQuantiles, Simulated


def states(num_tokens=32):
    return torch.randn(2, 3, num_tokens, 16, generator=torch.Generator().manual_seed(3))


def roundtrip(codec, x):
    return codec.decode(codec.encode(x))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", [{}, {"granularity": "per_channel", "group_size": 8}])
@pytest.mark.parametrize("clip", [1.0, 0.9])
def test_ranges_decode_to_what_is_packed(bits, layout, clip):
    x, shared = states(), {"bits": bits, "clip_ratio": clip, "parameter_dtype": "float32"} | layout
    expected = roundtrip(Affine.model_validate(shared), x)
    assert torch.equal(roundtrip(Simulated.model_validate(shared), x), expected)


@pytest.mark.parametrize("bits", [1, 5, 9, 12, 15])
def test_other_widths_err_by_half_a_step(bits):
    x = states()
    step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
    error = (roundtrip(Simulated(bits=bits), x) - x).abs().amax(-1)
    assert (error <= step * 0.5 + 1e-6).all()  # float32 rounding of values near 4


def test_values_kept_apart_take_no_part_in_the_range():
    x = states()
    marked = x.clone()
    marked[..., 0], x[..., 0] = math.nan, x[..., 1]  # a copy of another changes no range
    for fit in ("range", "symmetric", "zero"):
        codec = Simulated.model_validate({"bits": 3, "fit": fit})
        assert torch.equal(roundtrip(codec, marked)[..., 1:], roundtrip(codec, x)[..., 1:])
    short = marked[..., 1:]
    for codec in (Simulated(bits=3, fit="mean"), NormalQuantiles(bits=3)):
        expected = roundtrip(codec, short)
        torch.testing.assert_close(roundtrip(codec, marked)[..., 1:], expected)


def test_a_small_range_counts_as_the_least():
    x = torch.tensor([[0.0, 1e-7, 2e-7, 4e-7]])
    assert torch.equal(roundtrip(Simulated(bits=2, least_range=1e-5), x), torch.zeros(1, 4))
    mean = roundtrip(Simulated(bits=2, fit="mean", least_range=1e-5), x)
    torch.testing.assert_close(mean, x.mean().expand(1, 4), rtol=1e-6, atol=0)


def test_widths_beyond_fifteen_are_refused():
    with pytest.raises(ValidationError, match="less than or equal to 15"):
        Simulated(bits=16)


def test_no_plan_can_name_them():
    side = {"kind": "simulated", "bits": 3}
    with pytest.raises(ValidationError, match="tag 'simulated'"):
        LayerPlan.model_validate({"groups": ({"key": side, "value": side},)})
