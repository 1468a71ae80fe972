"""Levels of least error, against brute force and known tables."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kvbits.calibration.fitting import Histogram
from kvbits.codecs.levels import lloyd_max
from kvbits.errors import CalibrationError


def histogram_of(values, weights=None):
    values = torch.as_tensor(values)
    made = Histogram()
    made.add(values, torch.ones_like(values) if weights is None else torch.as_tensor(weights))
    return made


def error(levels, values, weights):
    nearest = np.abs(np.asarray(values)[:, None] - np.asarray(levels)).min(1)
    return float((np.asarray(weights) * nearest**2).sum())


@pytest.mark.parametrize("seed", range(5))
def test_no_cut_is_better(seed):
    random = np.random.default_rng(seed)
    values = np.sort(random.uniform(-1, 1, 9))
    weights = random.uniform(0.1, 3, 9)
    best = min(
        error(
            [
                np.average(values[a:b], weights=weights[a:b])
                for a, b in itertools.pairwise((0, *cuts, 9))
            ],
            values,
            weights,
        )
        for cuts in itertools.combinations(range(1, 9), 3)
    )
    levels = histogram_of(values, weights).levels(2)
    assert error(levels, values, weights) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_of_a_normal_are_those_of_the_table(bits):
    """Scaled to fit in [-1, 1]; half a million draws leave about a percent of noise."""
    draws = torch.randn(500_000, generator=torch.Generator().manual_seed(0)) / 6
    found = np.array(histogram_of(draws).levels(bits)) * 6
    assert found == pytest.approx(np.array(lloyd_max(bits)), abs=0.05)


def test_weights_draw_levels_to_them():
    values = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    weights = torch.where(values > 0.5, 100.0, 1.0)
    levels = histogram_of(values, weights).levels(3)
    assert sum(level > 0.5 for level in levels) >= 4
    assert list(levels) == sorted(levels)


def test_what_has_no_weight_does_not_count():
    values = torch.linspace(-1, 1, 500)
    weights = (values.abs() < 0.5).double()
    assert max(map(abs, histogram_of(values, weights).levels(2))) < 0.5


def test_moments_are_those_of_the_values():
    values = torch.tensor([-0.5, 0.25, 0.75], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    made = histogram_of(values, weights)
    mean, spread = made.moments
    assert mean == pytest.approx(0.1875)
    assert spread == pytest.approx(float(np.sqrt(0.25 * (0.25 + 0.125 + 0.5625) - 0.1875**2)))
    # -0.5 and 0.25, which is as near to either, take 0; 0.75 takes 0.5
    assert made.rounded_moments((0.0, 0.5)) == pytest.approx((0.125, 0.2165), abs=1e-4)


def test_weights_of_any_size_make_levels():
    weights = torch.full((64,), 1e-24, dtype=torch.float64)
    weights[:40] = 1e-6
    levels = histogram_of(torch.linspace(-1, 1, 64, dtype=torch.float64), weights).levels(3)
    assert np.isfinite(levels).all()
    assert (np.diff(levels) > 0).all()


def test_too_few_states_are_refused():
    with pytest.raises(CalibrationError, match=r"must bring 8 distinct states.*got 3"):
        histogram_of([0.1, 0.2, 0.3]).levels(3)
