"""Standard errors and intervals, against published values and by simulation."""

from __future__ import annotations

import math
import random

import pytest

from kvbits.evaluation.statistics import (
    clustered_mean,
    mean_ratio,
    paired_difference,
    paired_mean_difference,
    proportion,
    wilson_interval,
)


def test_clusters_of_one_give_the_ordinary_standard_error():
    mean, error = clustered_mean([1.0, 2.0, 6.0], [1, 1, 1])
    assert mean == 3.0
    assert error == pytest.approx(math.sqrt(7 / 3))  # variance 7, three of them


def test_copies_within_a_cluster_add_no_information():
    single = clustered_mean([1.0, 2.0, 6.0], [1, 1, 1])
    copied = clustered_mean([100.0, 200.0, 600.0], [100, 100, 100])
    assert copied == pytest.approx(single)


def test_clustered_error_is_the_spread_of_repeated_samples():
    """Documents with their own level: tokens taken as independent would claim a third of this."""
    rng = random.Random(0)
    means, errors = [], []
    for _ in range(1500):
        sums, counts = [], []
        for _ in range(20):
            size, level = rng.randint(5, 40), rng.gauss(0, 1)
            sums.append(sum(level + rng.gauss(0, 1) for _ in range(size)))
            counts.append(size)
        mean, error = clustered_mean(sums, counts)
        means.append(mean)
        errors.append(error)
    spread = math.sqrt(sum(m * m for m in means) / len(means))
    # 1500 repeats know the spread to 2 %; the linearised error is a few % low for 20 clusters
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.1)


def test_one_cluster_has_no_error():
    assert math.isnan(clustered_mean([3.0], [4])[1])


def test_empty_clusters_are_refused():
    with pytest.raises(ValueError, match="counts must sum to more than 0, got 0"):
        clustered_mean([], [])


def test_proportion():
    assert proportion([True, True, False, False]) == (0.5, 0.25)
    with pytest.raises(ValueError, match="outcomes must not be empty"):
        proportion([])


def test_wilson_interval_at_the_border():
    """Published: 0 of 10 gives 0 to 0.2775 (Brown, Cai and DasGupta 2001 use the same form)."""
    low, high = wilson_interval(0, 10)
    assert low == 0
    assert high == pytest.approx(0.2775, abs=1e-4)
    with pytest.raises(ValueError, match="successes must be between 0 and n > 0, got 3 of 2"):
        wilson_interval(3, 2)


def test_paired_difference_by_hand():
    a = [True] * 8 + [False] * 2
    b = [True] * 5 + [False] * 3 + [True] + [False]
    found = paired_difference(a, b)
    p, q = 4 / 12, 2 / 12  # 3 and 1 discordant pairs, one added to each, two to n
    half = 1.959964 * math.sqrt((p + q - (p - q) ** 2) / 12)
    assert found.difference == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((p - q - half, p - q + half))


def test_equal_outcomes_still_have_an_interval():
    found = paired_difference([True] * 500, [True] * 500)
    assert found.difference == 0
    assert -0.01 < found.low < 0 < found.high < 0.01


def test_paired_interval_covers_the_truth():
    rng = random.Random(1)
    covered = 0
    for _ in range(2000):
        a, b = [], []
        for _ in range(100):
            right = rng.random() < 0.9
            a.append(right)
            b.append(right and rng.random() < 0.96)
        truth = 0.9 * 0.04
        found = paired_difference(a, b)
        covered += found.low <= truth <= found.high
    # 95 % within four standard errors of 2000 repeats (0.5 % each); above is conservative
    assert covered / 2000 > 0.93


def test_outcomes_of_other_problems_are_refused():
    with pytest.raises(ValueError, match="a and b must be of the same problems, got 2 and 1"):
        paired_difference([True, False], [True])


def test_paired_means_cancel_what_documents_share():
    a, b, counts = [1.1, 2.1, 9.1], [1.0, 2.0, 9.0], [10, 20, 30]
    found = paired_mean_difference(a, b, counts)
    assert found.difference == pytest.approx(0.1)
    assert found.high - found.low < 1e-9


def test_the_mean_ratio_is_geometric_and_inverts_with_its_interval():
    """Logs of 2, 1/2 and 4: mean ln(2) * 2 / 3, standard error of three values by hand."""
    a, b = [20.0, 5.0, 40.0], [10.0, 10.0, 10.0]
    ratio, low, high = mean_ratio(a, b)
    assert ratio == pytest.approx(2 ** (2 / 3))
    logs = [1.0, -1.0, 2.0]  # in units of ln 2
    spread = math.sqrt(sum((x - 2 / 3) ** 2 for x in logs) / 2)
    half = 1.959964 * math.log(2) * spread / math.sqrt(3)
    assert (low, high) == pytest.approx((ratio * math.exp(-half), ratio * math.exp(half)))
    assert mean_ratio(b, a) == pytest.approx((1 / ratio, 1 / high, 1 / low))


def test_the_interval_of_a_mean_ratio_covers_it_95_times_in_100():
    """1000 runs of 60 lengths that noise moves by half: 925 to 975 is 3.6 standard errors."""
    rng, covered = random.Random(3), 0
    for _ in range(1000):
        a = [100 * math.exp(rng.gauss(0.1, 0.5)) for _ in range(60)]
        _, low, high = mean_ratio(a, [100.0] * 60)
        covered += low <= math.exp(0.1) <= high
    assert 915 <= covered <= 975  # a normal interval of 60 covers 94.5 times in 100


@pytest.mark.parametrize(
    ("a", "b"), [([1.0], [1.0]), ([1.0, 0.0], [1.0, 1.0]), ([1.0, 2.0], [1.0])]
)
def test_ratios_that_have_no_mean_are_refused(a, b):
    with pytest.raises(ValueError, match="positive numbers of two pairs or more"):
        mean_ratio(a, b)
