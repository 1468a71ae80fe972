"""Tables of levels, against the numbers of the literature."""

from __future__ import annotations

import pytest
import torch

from kvbits.codecs import NormScaled
from kvbits.codecs.levels import (
    MOST_STEPS,
    grid_of,
    lloyd_max,
    normal_float,
    normal_quantiles,
    on_grid,
)

# Max (1960), table I: positive levels and the error they leave.
LLOYD_MAX = {
    2: ((0.4528, 1.5104), 0.1175),
    3: ((0.2451, 0.7560, 1.3439, 2.1519), 0.0345),
    4: ((0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326), 0.0095),
}
# QLoRA's NF4, and the same construction at other widths.
NORMAL_FLOAT = {
    2: (-1, 0, 0.3379, 1),
    3: (-1, -0.4786, -0.2171, 0, 0.1609, 0.3379, 0.5626, 1),
    4: (
        *(-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0910, 0),
        *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1),
    ),
}


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_lloyd_max_levels_are_those_of_the_table(bits):
    positive, _ = LLOYD_MAX[bits]
    expected = [*(-x for x in reversed(positive)), *positive]
    assert lloyd_max(bits) == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("bits", NORMAL_FLOAT)
def test_normal_float_levels_are_those_of_the_table(bits):
    assert normal_float(bits) == pytest.approx(NORMAL_FLOAT[bits], abs=2e-4)


@pytest.mark.parametrize("bits", [0, 1, 5, 8])
@pytest.mark.parametrize("table", [lloyd_max, normal_float])
def test_other_widths_have_no_table(table, bits):
    with pytest.raises(ValueError, match=f"bits must be 2, 3 or 4, got {bits}"):
        table(bits)


@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_the_error_of_normal_states_is_that_of_the_table(bits):
    """TurboQuant without its correction, on states that are what its levels are for."""
    states = torch.randn(4, 2, 2000, 128, generator=torch.Generator().manual_seed(0))
    codec = NormScaled(levels=lloyd_max(bits), is_corrected=False)
    error = (codec.decode(codec.encode(states)) - states).square().mean()
    assert error.item() == pytest.approx(LLOYD_MAX[bits][1], rel=0.03)


def test_a_corrected_norm_makes_tokens_as_long_as_they_were():
    states = torch.randn(1, 1, 50, 64, generator=torch.Generator().manual_seed(0))
    codec = NormScaled(levels=lloyd_max(2))
    length = codec.decode(codec.encode(states)).norm(dim=-1)
    torch.testing.assert_close(length, states.norm(dim=-1), rtol=1e-3, atol=0)  # fp16 norms


def test_normal_quantiles_lie_in_the_middle_of_equal_shares():
    """Of a normal, 1/8 lies below -1.15035 and 3/8 below -0.31864."""
    inner = 0.31864 / 1.15035
    assert normal_quantiles(2) == pytest.approx((-1, -inner, inner, 1), abs=1e-5)
    assert len(normal_quantiles(8)) == 256


@pytest.mark.parametrize("table", [lloyd_max, normal_float])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_move_to_the_nearest_grid_of_bytes(table, bits):
    levels = table(bits)
    moved = on_grid(levels)
    grid = grid_of(moved)
    assert grid.places[0] == 0
    assert grid.places[-1] <= MOST_STEPS
    assert grid.levels == pytest.approx(moved)
    assert moved[0] == levels[0]
    assert moved[-1] == pytest.approx(levels[-1])
    # Half a step of the coarsest grid that may be taken instead of the finest one.
    assert max(abs(x - y) for x, y in zip(levels, moved, strict=True)) <= (
        (levels[-1] - levels[0]) / MOST_STEPS
    )


def test_levels_between_the_places_of_a_grid_are_on_none():
    assert grid_of((-1.0, -0.513, 0.1234, 0.4321, 0.61, 0.777, 0.8989, 1.0)) is None
    assert grid_of((0.0, 1.0, 2.0, 3.0)) == (0.0, 1.0, (0, 1, 2, 3))


def test_levels_that_a_grid_would_join_stay_apart():
    places = grid_of(on_grid((0.0, 1e-5, 2e-5, 1.0))).places
    assert list(places) == sorted(set(places))
