"""Plans side by side at equal effective bits, and the grids the figures draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvbits.evaluation.statistics import clustered_mean
from kvbits.report.collect import GIVEN_ORIGIN, Point, Run
from kvbits.report.stages import Measurement, Sensitivity, Verified

RULES = ("uniform", "ladder", "random")
BASELINE_ORIGINS = (*RULES, GIVEN_ORIGIN)
# What counts as equal size: a searched plan at most this much larger than the baseline, or this
# much smaller. One side of one layer in twelve moves a plan's mean by 0.17 bits, so that plans of
# exactly equal size are rare; the search gets the short end.
MORE_BITS, FEWER_BITS = 0.05, 0.2


class Comparison(NamedTuple):
    """A baseline and the searched plan of equal size (``MORE_BITS``, ``FEWER_BITS``).

    ``ratios`` holds searched / baseline KL per domain, with the standard error over paired
    documents (nan without them): below one, the search did better.
    """

    baseline: Point
    searched: Point
    ratios: Mapping[str, Measurement]


class Grid(NamedTuple):
    """A heat map by layer: ``rows[layer][column]``, None where not measured."""

    domain: str
    columns: tuple[str, ...]
    layers: tuple[str, ...]
    rows: tuple[tuple[float | None, ...], ...]


def compare_at_equal_bits(run: Run) -> tuple[Comparison, ...]:
    """Pair every measured baseline with the largest searched plan of equal size, if any."""
    searched = [point for point in run.points if point.is_searched and point.measured_kl]
    found = []
    for baseline in run.points:
        if baseline.origin not in BASELINE_ORIGINS or not baseline.measured_kl:
            continue
        partner = partner_of(searched, baseline.effective_bits)
        if partner is not None:
            ratios = kl_ratios((run, partner), (run, baseline))
            found.append(Comparison(baseline, partner, ratios))
    return tuple(found)


def partner_of(points: Sequence[Point], bits: float) -> Point | None:
    """Return the largest plan of equal size, or None."""
    low, high = bits - FEWER_BITS, bits + MORE_BITS
    fitting = [point for point in points if low <= point.effective_bits <= high]
    return max(fitting, key=lambda point: point.effective_bits, default=None)


def kl_ratios(first: tuple[Run, Point], second: tuple[Run, Point]) -> dict[str, Measurement]:
    """Return first / second KL for every domain measured on both plans, of one run or of two."""
    (run, point), (other_run, other) = first, second
    found = {}
    for domain, measured in point.measured_kl.items():
        if domain not in other.measured_kl or other.measured_kl[domain].value <= 0:
            continue
        value = measured.value / other.measured_kl[domain].value
        records = (
            run.verified.get((point.labels, domain)),
            other_run.verified.get((other.labels, domain)),
        )
        found[domain] = Measurement(value, _ratio_error(*records))
    return found


def _ratio_error(first: Verified | None, second: Verified | None) -> float:
    """Standard error of a ratio of sums, linearised, with the document as the sampling unit."""
    if first is None or second is None or first.checksum != second.checksum:
        return math.nan
    sums, weights = (
        [kl * n for kl, n in zip(row.document_kl, row.document_tokens, strict=True)]
        for row in (first, second)
    )
    return clustered_mean(sums, weights)[1] if math.fsum(weights) > 0 else math.nan


def rivals_in_budget(run: Run) -> list[Point]:
    """Return each kind's best rule in the budget, by calibration data, and the given plans."""
    found = []
    for origin in RULES:
        fitting = [p for p in run.points if p.origin == origin and p.measured_kl and run.fits(p)]
        if fitting:
            found.append(min(fitting, key=lambda p: math.inf if p.loss is None else p.loss))
    return found + [p for p in run.points if p.origin == GIVEN_ORIGIN and p.measured_kl]


def in_budget(run: Run) -> list[bool]:
    """Whether each trial is within the budget: in bits, or in KL where that was given."""
    limit = run.study.get("settings", {}).get("max_kl")
    if limit is not None:
        return [max(trial.kl_nats) <= limit for trial in run.trials]
    bits = math.inf if run.budget_bits is None else run.budget_bits
    return [trial.effective_bits <= bits + 1e-6 for trial in run.trials]


def chosen_trial(run: Run) -> dict[str, float]:
    """Return the chosen plan's KLs on calibration data where the search measured them."""
    if run.chosen is None or run.pruned is None:
        return {}
    layers = [row for row in run.pruned.kept if row.isdecimal()]
    labels = tuple(run.chosen.labels[layer] for layer in sorted(map(int, layers)))
    trial = next((trial for trial in run.trials if trial.labels == labels), None)
    names = tuple(run.normalised_by) or run.domains
    return {} if trial is None else dict(zip(names, trial.kl_nats, strict=False))


def sensitivity_grids(rows: Sequence[Sensitivity]) -> tuple[Grid, ...]:
    """Arrange sensitivities as layer x codec, one grid per domain, keys first, widest first."""
    sides = {row.label: (row.side != "key", -row.bits) for row in rows}
    columns = tuple(sorted(sides, key=lambda label: sides[label]))
    layers = sorted({row.layer for row in rows})
    values = {(row.domain, row.layer, row.label): row.kl_nats for row in rows}
    return tuple(
        Grid(
            domain=domain,
            columns=columns,
            layers=tuple(map(str, layers)),
            rows=tuple(
                tuple(values.get((domain, layer, label)) for label in columns) for layer in layers
            ),
        )
        for domain in dict.fromkeys(row.domain for row in rows)
    )


def pair_grid(run: Run) -> Grid | None:
    """Arrange output errors as layer x candidate, in the order of the records; exact left out."""
    rows = [row for row in run.errors if row.output_error > 0]
    if not rows:
        return None
    columns = tuple(dict.fromkeys(row.label for row in rows))
    layers = tuple(dict.fromkeys(row.row for row in rows))
    values = {(row.row, row.label): row.output_error for row in rows}
    cells = tuple(tuple(values.get((layer, label)) for label in columns) for layer in layers)
    return Grid("output error", columns, layers, cells)


def split_by_pruning(run: Run, grid: Grid) -> tuple[Grid, Grid]:
    """Return the cells that pruning kept, all where nothing was pruned yet, and the others."""
    kept = dict.fromkeys(grid.layers, grid.columns) if run.pruned is None else run.pruned.kept
    parts = (
        tuple(
            tuple(
                value if (column in kept.get(layer, ())) == is_kept else None
                for column, value in zip(grid.columns, row, strict=True)
            )
            for layer, row in zip(grid.layers, grid.rows, strict=True)
        )
        for is_kept in (True, False)
    )
    first, second = (grid._replace(rows=rows) for rows in parts)
    return first, second


def log10_or_none(value: float | None) -> float | None:
    """Return log10, or None where there is no positive value to take it of."""
    return math.log10(value) if value is not None and value > 0 else None


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
