"""Two runs of the same tasks, example by example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvbits.errors import RecordError
from kvbits.evaluation.samples import Sample
from kvbits.evaluation.statistics import (
    Difference,
    Ratio,
    clustered_mean,
    mcnemar,
    mean_ratio,
    paired_difference,
    paired_mean_difference,
)


class Comparison(NamedTuple):
    """Two runs by one metric, on the same examples.

    Attributes:
        task: Name of the task.
        filter: How answers were read.
        metric: Name of the metric.
        n: Examples.
        first: Mean of the first run.
        second: Mean of the second.
        difference: Second minus first, with its 95 % interval.
        gained: Examples wrong in the first and right in the second; None if not right or wrong.
        lost: Examples right in the first and wrong in the second.
        p_value: Of McNemar's exact test, for right and wrong.
        length_ratio: How many times as many tokens the second run's answers have, whatever the
            metric; None for fewer than two generated answers. At the same accuracy a damaged
            cache may still ramble.
    """

    task: str
    filter: str
    metric: str
    n: int
    first: float
    second: float
    difference: Difference
    gained: tuple[int, ...] | None = None
    lost: tuple[int, ...] | None = None
    p_value: float | None = None
    length_ratio: Ratio | None = None


def compare(first: Sequence[Sample], second: Sequence[Sample]) -> list[Comparison]:
    """Compare two runs by every metric of every task, on the examples both have.

    Raises:
        RecordError: If they share no example, a number means another example or another prompt
            in the two, or an example occurs twice in one.
    """
    a, b = _by_key(first), _by_key(second)
    shared = [key for key in a if key in b]
    if not shared:
        raise RecordError(f"runs must share examples, got {len(a)} and {len(b)} with none shared")
    for key in shared:
        for field in ("doc_hash", "prompt_hash"):
            if getattr(a[key], field) != getattr(b[key], field):
                raise RecordError(
                    f"example {key[2]} of {key[0]} must have the same {field} in both runs, got "
                    f"{getattr(a[key], field)[:12]} and {getattr(b[key], field)[:12]}; run both "
                    "on the same data, with the same few-shot examples and chat template"
                )
    groups: dict[tuple[str, str, str], list[tuple[Sample, Sample]]] = {}
    for key in shared:
        for metric in a[key].metrics:
            if metric in b[key].metrics:
                groups.setdefault((*key[:2], metric), []).append((a[key], b[key]))
    return [_comparison(*name, pairs) for name, pairs in groups.items()]


def _by_key(samples: Sequence[Sample]) -> dict[tuple[str, str, int], Sample]:
    found: dict[tuple[str, str, int], Sample] = {}
    for sample in samples:
        if sample.key in found:
            raise RecordError(f"examples must occur once in a run, got {sample.key} twice")
        found[sample.key] = sample
    return found


def _comparison(
    task: str, filter: str, metric: str, pairs: Sequence[tuple[Sample, Sample]]
) -> Comparison:
    old = [a.metrics[metric] for a, _ in pairs]
    new = [b.metrics[metric] for _, b in pairs]
    counts = [a.weights.get(metric, 1.0) for a, _ in pairs]
    made = Comparison(
        task,
        filter,
        metric,
        len(pairs),
        clustered_mean([x * n for x, n in zip(old, counts, strict=True)], counts)[0],
        clustered_mean([x * n for x, n in zip(new, counts, strict=True)], counts)[0],
        paired_mean_difference(new, old, counts),
        length_ratio=_length_ratio(pairs),
    )
    if not {*old, *new} <= {0.0, 1.0}:
        return made
    gained = tuple(a.doc_id for (a, _), x, y in zip(pairs, old, new, strict=True) if y > x)
    lost = tuple(a.doc_id for (a, _), x, y in zip(pairs, old, new, strict=True) if x > y)
    return made._replace(
        difference=paired_difference([y == 1 for y in new], [x == 1 for x in old]),
        gained=gained,
        lost=lost,
        p_value=mcnemar(len(gained), len(lost)),
    )


def _length_ratio(pairs: Sequence[tuple[Sample, Sample]]) -> Ratio | None:
    """Tokens of the second answers over those of the first; an empty answer counts as one."""
    counts = [(a.response_tokens, b.response_tokens) for a, b in pairs]
    known = [(max(x, 1), max(y, 1)) for x, y in counts if x is not None and y is not None]
    if len(known) < 2:
        return None
    return mean_ratio([y for _, y in known], [x for x, _ in known])
