"""Codebooks over the range of a group."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from pydantic import ValidationError

from kvbits.codecs import Codebook
from kvbits.codecs.levels import normal_float

EVEN = tuple(-1 + 2 * i / 15 for i in range(16))


def states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("granularity", ["per_token", "per_channel"])
def test_every_value_takes_the_level_that_is_nearest(granularity):
    codec = Codebook(levels=normal_float(3), granularity=granularity, group_size=8)
    x = states(2, 3, 16, 24)
    encoded = codec.encode(x)
    grouped = codec.grouped(x)
    scale, offset = encoded.parameters["affine"].float().split(1, -1)
    levels = torch.tensor(codec.levels) * scale[..., None] + offset[..., None]
    nearest = (levels - grouped[..., None]).abs().amin(-1)
    error = (codec.grouped(codec.decode(encoded)) - grouped).abs()
    assert (error <= nearest + 1e-5 * scale).all()


def test_the_range_of_a_group_is_covered():
    codec = Codebook(levels=EVEN)
    x = states(1, 2, 40, 32) * 7 + 3
    step = 2 / 15 * codec.encode(x).parameters["affine"].float()[..., :1, 0]
    assert ((codec.decode(codec.encode(x)) - x).abs() <= step / 2 * 1.001).all()


def test_codes_follow_the_levels_and_states_the_decoded_levels():
    """1.4 is nearest to 0.5 of half a range of 2, whatever that level is decoded to."""
    levels, decoded = (-1.0, 0.0, 0.5, 1.0), (-0.9, 0.1, 0.6, 0.95)
    codec = Codebook(levels=levels, decoded_levels=decoded)
    encoded = codec.encode(torch.tensor([[[[-2.0, 0.3, 1.4, 2.0]]]]))
    assert encoded.codes.flatten().tolist() == [0, 1, 2, 3]
    assert codec.decode(encoded).flatten().tolist() == pytest.approx([-1.8, 0.2, 1.2, 1.9])


def test_a_constant_group_comes_back():
    codec = Codebook(levels=normal_float(2))
    x = torch.full((1, 1, 3, 8), 2.5)
    assert torch.equal(codec.decode(codec.encode(x)), x)


def test_stored_bits_count_two_numbers_a_group():
    assert Codebook(levels=EVEN).stored_bits(128) == 4 + Fraction(32, 128)
    per_channel = Codebook(levels=EVEN, granularity="per_channel", group_size=64)
    assert per_channel.stored_bits(128) == 4 + Fraction(32, 64)


@pytest.mark.parametrize(
    ("levels", "rule"),
    [
        ((0.0, 0.5, 0.25, 1.0), "levels must ascend"),
        ((0.0, 0.1, 0.2, 0.3, 0.4), "levels must number 4, 8, 16 or 256, got 5"),
        ((-2.0, 0.0, 0.5, 1.0), r"levels must lie in \[-1, 1\]"),
    ],
)
def test_levels_that_cannot_be_are_refused(levels, rule):
    with pytest.raises(ValidationError, match=rule):
        Codebook(levels=levels)
