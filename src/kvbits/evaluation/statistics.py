"""Standard errors and intervals: clustered means, proportions, paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


class Difference(NamedTuple):
    """A difference with its 95 % interval."""

    difference: float
    low: float
    high: float


class Ratio(NamedTuple):
    """A ratio with its 95 % interval."""

    ratio: float
    low: float
    high: float


def clustered_mean(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """Return the mean over all units of all clusters and its standard error.

    Tokens of one document are not independent, so the document is the sampling unit: with cluster
    sums ``s`` and sizes ``n``, mean m = sum(s) / sum(n) and se = sqrt(D / (D - 1) * sum((s - m *
    n)^2)) / sum(n), the usual linearised error of a ratio.

    Returns:
        The mean, and nan as its error for fewer than two clusters.
    """
    total = math.fsum(counts)
    if total <= 0:
        raise ValueError(f"counts must sum to more than 0, got {total}")
    mean = math.fsum(sums) / total
    size = len(counts)
    if size < 2:
        return mean, math.nan
    squares = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return mean, math.sqrt(size / (size - 1) * squares) / total


def proportion(outcomes: Sequence[bool]) -> tuple[float, float]:
    """Return the share of true outcomes and its standard error sqrt(p (1 - p) / n)."""
    if not outcomes:
        raise ValueError("outcomes must not be empty, got none")
    share = sum(outcomes) / len(outcomes)
    return share, math.sqrt(share * (1 - share) / len(outcomes))


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion, which stays honest at 0 and at 100 %."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"successes must be between 0 and n > 0, got {successes} of {n}")
    share, z2 = successes / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(a: Sequence[bool], b: Sequence[bool]) -> Difference:
    """Return the share of ``a`` minus that of ``b`` on the same problems, with a 95 % interval.

    The interval is Wald's with one added to each count of discordant pairs, so that it keeps a
    width where the two never disagree. The difference itself is not adjusted.

    Source: Bonett and Price (2012), Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data, Journal of Educational and Behavioral Statistics
    37(4).
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"a and b must be of the same problems, got {len(a)} and {len(b)}")
    n = len(a)
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    p, q = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = Z95 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return Difference((only_a - only_b) / n, max(-1.0, p - q - half), min(1.0, p - q + half))


def paired_mean_difference(
    a: Sequence[float], b: Sequence[float], counts: Sequence[float]
) -> Difference:
    """Return the mean of ``a`` minus that of ``b`` on the same documents, with a 95 % interval.

    Args:
        a: mean of each document, for example `Divergence.document_kl_nats` of one plan.
        b: the same of the other plan.
        counts: tokens of each document.
    """
    sums = [(x - y) * n for x, y, n in zip(a, b, counts, strict=True)]
    mean, error = clustered_mean(sums, counts)
    return Difference(mean, mean - Z95 * error, mean + Z95 * error)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the p-value of McNemar's exact test: two-sided, on the problems where two disagree.

    If neither is better, each of them falls to either with probability 1/2.

    Args:
        only_a: problems that only one of the two solves.
        only_b: problems that only the other solves.
    """
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def mean_ratio(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """Return the geometric mean of ``a / b``, pair by pair, with a 95 % interval.

    Of ratios the arithmetic mean is above 1 both ways round where nothing but noise differs; this
    one turns into its inverse. The interval is normal on the logarithms.

    Args:
        a: Positive numbers, for example the tokens of each answer on one cache.
        b: The same of the other.
    """
    if len(a) != len(b) or len(a) < 2 or min(*a, *b) <= 0:
        raise ValueError(
            f"a and b must be positive numbers of two pairs or more, got {len(a)} and {len(b)}"
        )
    logs = [math.log(x / y) for x, y in zip(a, b, strict=True)]
    mean, error = clustered_mean(logs, [1.0] * len(logs))
    half = Z95 * error
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half))
