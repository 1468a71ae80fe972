"""fp8 and fp4, against their definitions."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvbits.codecs import Float4, Float8


def through(codec, values):
    x = torch.tensor(values)[None, None]
    return codec.decode(codec.encode(x))[0, 0].tolist()


def e4m3_values():
    """Every finite value of fp8 e4m3 by its definition: 1.mmm * 2**(e - 7), or 0.mmm * 2**-6."""
    for e, m in itertools.product(range(16), range(8)):
        if (e, m) != (15, 7):  # NaN
            yield (m / 8) * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)


def test_fp8_stores_its_own_values_exactly():
    row = [sign * value for value in e4m3_values() for sign in (1, -1)]
    assert through(Float8(), [row]) == [row]


def test_fp8_takes_the_nearest_value_and_saturates():
    """From 16 on the step is 2, and 19 goes to the even one; the least magnitude is 2**-9."""
    row = [17.9, 19.0, 500.0, -1e6, 0.0016, 0.0009]
    assert through(Float8(), [row]) == [[18.0, 20.0, 448.0, -448.0, 2.0**-9, 0.0]]


def test_the_scale_of_fp8_multiplies_its_range():
    assert through(Float8(tensor_scale=2.0), [[800.0, 1000.0]]) == [[768.0, 896.0]]


def test_nvfp4_rounds_ties_to_even_and_keeps_the_sign():
    """A block whose largest magnitude is 6 has scale 1, so values are magnitudes of e2m1."""
    row = [
        6.0,
        0.25,
        0.75,
        1.25,
        1.75,
        2.5,
        3.5,
        5.0,
        -0.26,
        -0.75,
        -2.4,
        -5.1,
        0.0,
        1.0,
        3.0,
        4.0,
    ]
    expected = [6, 0, 1, 1, 2, 2, 4, 4, -0.5, -1, -2, -6, 0, 1, 3, 4]
    assert through(Float4(format="nvfp4"), [row]) == [expected]


def test_nvfp4_scales_are_fp8_of_a_sixth_of_the_largest():
    row = [10.0] + [0.0] * 15 + [0.001] * 16
    first, *_ = decoded = through(Float4(format="nvfp4"), [row])[0]
    assert first == 1.625 * 6  # 10 / 6 = 1.667 lies between 1.625 and 1.75
    assert decoded[16:] == [0.0] * 16  # a scale below half the least fp8 number is 0


def test_mxfp4_scales_are_powers_of_two():
    """floor(log2 10) - 2 = 1: the scale is 2, and 10 is 5 of it, which rounds to even 4."""
    row = [10.0, -3.0, 0.9] + [0.0] * 29
    assert through(Float4(format="mxfp4"), [row])[0][:3] == [8.0, -3.0, 1.0]


@pytest.mark.parametrize(("codec", "bits"), [("nvfp4", 4.5), ("mxfp4", 4.25)])
def test_stored_bits_are_those_of_the_format(codec, bits):
    assert Float4(format=codec).stored_bits(128) == bits
    with pytest.raises(ValueError, match="head_dim must be a multiple of"):
        Float4(format=codec).check_head_dim(24)
