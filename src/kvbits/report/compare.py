"""Plans side by side at equal effective bits, and the grids the figures draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvbits.report.collect import Point, Run, Sensitivity

BASELINE_ORIGINS = ("uniform", "ladder", "random")
# What counts as equal size: a searched plan at most this much larger than the baseline, or this
# much smaller. One side of one layer in twelve moves a plan's mean by 0.17 bits, so that plans of
# exactly equal size are rare; the search gets the short end.
MORE_BITS, FEWER_BITS = 0.05, 0.2


class Comparison(NamedTuple):
    """A baseline and the searched plan of equal size (``MORE_BITS``, ``FEWER_BITS``).

    ``ratios`` holds searched / baseline KL per domain: below one, the search did better.
    """

    baseline: Point
    searched: Point
    ratios: Mapping[str, float]


class Grid(NamedTuple):
    """One domain's sensitivities: ``rows[layer][column]`` in nats, None where not measured."""

    domain: str
    columns: tuple[str, ...]
    layers: tuple[int, ...]
    rows: tuple[tuple[float | None, ...], ...]


def compare_at_equal_bits(points: Sequence[Point]) -> tuple[Comparison, ...]:
    """Pair every measured baseline with the largest searched plan of equal size, if any."""
    searched = [point for point in points if point.is_searched and point.measured_kl]
    found = []
    for baseline in points:
        if baseline.origin not in BASELINE_ORIGINS or not baseline.measured_kl:
            continue
        partner = _partner(searched, baseline.effective_bits)
        if partner is not None:
            found.append(Comparison(baseline, partner, _ratios(partner, baseline)))
    return tuple(found)


def _partner(points: Sequence[Point], bits: float) -> Point | None:
    low, high = bits - FEWER_BITS, bits + MORE_BITS
    fitting = [point for point in points if low <= point.effective_bits <= high]
    return max(fitting, key=lambda point: point.effective_bits, default=None)


def _ratios(searched: Point, baseline: Point) -> dict[str, float]:
    """Return searched / baseline KL for every domain measured on both."""
    return {
        domain: measured.value / baseline.measured_kl[domain].value
        for domain, measured in searched.measured_kl.items()
        if domain in baseline.measured_kl and baseline.measured_kl[domain].value > 0
    }


def sensitivity_grids(rows: Sequence[Sensitivity]) -> tuple[Grid, ...]:
    """Arrange sensitivities as layer x codec, one grid per domain, keys first, widest first."""
    sides = {row.label: (row.side != "key", -row.bits) for row in rows}
    columns = tuple(sorted(sides, key=lambda label: sides[label]))
    layers = tuple(sorted({row.layer for row in rows}))
    values = {(row.domain, row.layer, row.label): row.kl_nats for row in rows}
    return tuple(
        Grid(
            domain=domain,
            columns=columns,
            layers=layers,
            rows=tuple(
                tuple(values.get((domain, layer, label)) for label in columns) for layer in layers
            ),
        )
        for domain in dict.fromkeys(row.domain for row in rows)
    )


def log10_or_none(value: float | None) -> float | None:
    """Return log10, or None where there is no positive value to take it of."""
    return math.log10(value) if value is not None and value > 0 else None


def full_precision_tasks(run: Run) -> Mapping[str, float]:
    """Return each task's accuracy with the full-precision cache, where it was measured."""
    full = next((point for point in run.points if point.origin == "full"), None)
    return {name: task.accuracy for name, task in full.tasks.items()} if full else {}


def same_plans(points: Sequence[Point]) -> dict[str, str]:
    """Return, by name, the baseline that a searched plan is equal to, layer by layer.

    Names of ladders are long, so those only say that it is one.
    """
    baselines = {
        point.labels: point.name if point.origin == "uniform" else f"a {point.origin} plan"
        for point in sorted(points, key=lambda point: point.origin)  # uniform comes last and wins
        if point.origin in BASELINE_ORIGINS
    }
    return {p.name: baselines[p.labels] for p in points if p.is_searched and p.labels in baselines}
