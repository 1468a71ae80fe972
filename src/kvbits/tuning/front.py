"""Writing what a study found: ``front.json`` for people and pages, ``plan.json`` to run.

Neither holds a time or a duration: the same study writes the same bytes, however often it was
interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvbits.evaluation.token_set import TokenSet, dataset
from kvbits.layer_plan import LayerPlan
from kvbits.plan import CachePlan, Metric, Provenance
from kvbits.tuning import rivals
from kvbits.tuning.budget import bought, memory_curve
from kvbits.tuning.problem import Problem
from kvbits.tuning.rivals import Entry
from kvbits.tuning.sensitivity import Meter, rounded
from kvbits.tuning.settings import TuneSettings
from kvbits.tuning.tables import Allocation
from kvbits.tuning.verify import Labels, Verifier

SCHEMA_VERSION = 2


class Findings(NamedTuple):
    """A finished study before it is written."""

    settings: TuneSettings
    problem: Problem
    domains: tuple[str, ...]
    bits: float  # the budget, or the size of the plan chosen by quality
    entries: Sequence[Entry]
    front: Sequence[Allocation]
    chosen: Allocation
    verifier: Verifier
    drop: dict[str, Any] | None = None  # what the task said of the chosen plan, if it decided

    @property
    def origin(self) -> str:
        """What the search's own plans are called, apart from the rivals of the same kind."""
        return rivals.searched_origin(self.settings.strategy)

    @property
    def meter(self) -> Meter:
        return self.verifier.meter

    def labels(self, plan: Allocation) -> Labels:
        """Return the plan's label of every layer of the model."""
        return self.meter.candidates.labels(plan.choice)

    def plan(self, plan: Allocation) -> CachePlan:
        """Return the plan that can be run."""
        return self.meter.candidates.plan(plan.choice)

    def is_chosen(self, entry: Entry) -> bool:
        """Whether this is the plan the search chose (a rival may equal it)."""
        return entry.origin == self.origin and entry.allocation.choice == self.chosen.choice


def front_document(findings: Findings) -> dict[str, Any]:
    """Return ``front.json``: the verified plans, and the rest of the front as predicted."""
    settings = findings.settings
    verified = {e.allocation.choice for e in findings.entries if e.origin == findings.origin}
    rest = [
        Entry(f"{findings.origin} {plan.effective_bits:.2f}", findings.origin, plan)
        for plan in findings.front
        if plan.choice not in verified
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "context": settings.context or settings.report_context,
        "budget_counted_at": settings.context,
        "mode": settings.mode,
        "candidates": list(settings.candidates),
        "strategy": settings.strategy,
        "objective": settings.objective,
        "budget_bits": findings.bits,
        "max_kl": settings.max_kl,
        "drop": _drop(findings),
        "bought": bought(findings.plan(findings.chosen), settings),
        "memory": memory_curve(findings.plan(findings.chosen), settings),
        "normalised_by": dict(
            zip(findings.domains, map(rounded, findings.problem.norms), strict=True)
        ),
        "points": [_point(findings, entry) for entry in [*findings.entries, *rest]],
        "comparisons": _comparisons(findings),
    }


def _point(findings: Findings, entry: Entry) -> dict[str, Any]:
    labels, plan = findings.labels(entry.allocation), findings.plan(entry.allocation)
    context = findings.settings.context or findings.settings.report_context
    predicted = entry.allocation.predicted_kl
    measured = findings.verifier.kl(labels)
    return {
        "name": entry.name,
        "origin": entry.origin,
        "labels": list(labels),
        "summary": plan.describe(),
        "pairs": [_mean_pair(layer) for layer in plan.layers],
        "effective_bits": rounded(plan.effective_bits),
        "effective_bits_at_context": rounded(plan.effective_bits_at(context)),
        "loss": rounded(entry.allocation.loss),
        "predicted_kl": dict(zip(findings.domains, map(rounded, predicted), strict=True)),
        "measured_kl": {d: {"value": r["kl_nats"], "se": r["kl_se"]} for d, r in measured.items()}
        or None,
        "tasks": _tasks(findings, labels) or None,
        "chosen": findings.is_chosen(entry),
    }


def _mean_pair(layer: LayerPlan) -> list[float]:
    """Widths of a layer's keys and values; the mean over its heads where those differ."""
    heads = [len(group.heads or (0,)) for group in layer.groups]
    sums = [
        sum(n * bits for n, bits in zip(heads, widths, strict=True))
        for widths in (
            [group.key.bits for group in layer.groups],
            [group.value.bits for group in layer.groups],
        )
    ]
    return [_whole(each / sum(heads)) for each in sums]


def _whole(value: float) -> float:
    return int(value) if value == int(value) else rounded(value)


def _drop(findings: Findings) -> dict[str, Any] | None:
    """The drop that the plan was chosen by, and that on the problems it is reported on."""
    if findings.drop is None:
        return None
    heldout = _tasks(findings, findings.labels(findings.chosen))[findings.drop["task"]]
    return {**{k: _rounded(v) for k, v in findings.drop.items()}, "heldout": heldout}


def _rounded(value: Any) -> Any:
    return rounded(value) if isinstance(value, float) else value


def _full(findings: Findings) -> Labels:
    return findings.labels(next(e.allocation for e in findings.entries if e.origin == "full"))


def _tasks(findings: Findings, labels: Labels) -> dict[str, Any]:
    verifier, full, found = findings.verifier, _full(findings), {}
    for name in verifier.tasks.names:
        record = verifier.task(labels, name)
        if record is None:
            continue
        found[name] = {"accuracy": record["accuracy"], "se": record["accuracy_se"]}
        found[name]["n"] = record["n"]
        if labels != full:
            difference = verifier.task_difference(labels, full, name)
            found[name] |= {k: rounded(v) for k, v in difference._asdict().items()}
        else:
            found[name] |= {"difference": None, "low": None, "high": None}
    return found


def _comparisons(findings: Findings) -> list[dict[str, Any]]:
    """The chosen plan's KL minus that of others, paired by document.

    The others are its neighbours on the front, rules within the budget, and given rivals.
    """
    chosen = findings.labels(findings.chosen)
    found = []
    for entry in findings.entries:
        if not _is_compared(findings, entry):
            continue
        rival = findings.labels(entry.allocation)
        found += [
            {
                "baseline": entry.name,
                "origin": entry.origin,
                "baseline_effective_bits": rounded(entry.allocation.effective_bits),
                "domain": domain,
                **_finite(findings.verifier.kl_difference(chosen, rival, domain)),
            }
            for domain in findings.domains
        ]
    return found


def _is_compared(findings: Findings, entry: Entry) -> bool:
    if entry.origin in rivals.RULES:
        return entry.fits(findings.bits)
    is_other = entry.allocation.choice != findings.chosen.choice
    return entry.origin == rivals.GIVEN or (entry.origin == findings.origin and is_other)


def _finite(difference: Any) -> dict[str, float | None]:
    return {k: None if math.isnan(v) else rounded(v) for k, v in difference._asdict().items()}


def plan_with_account(
    findings: Findings, calibration: Sequence[TokenSet], versions: Mapping[str, str]
) -> CachePlan:
    """Return the chosen plan with how it was made and what was measured on held-out data."""
    labels = findings.labels(findings.chosen)
    provenance = Provenance(
        method=findings.settings.strategy,
        mode=findings.settings.mode,
        datasets=tuple(dataset(token_set) for token_set in calibration),
        seed=findings.settings.seed,
        versions=dict(versions),
    )
    metrics = [*_kl_metrics(findings, labels), *_task_metrics(findings, labels)]
    return findings.plan(findings.chosen).with_provenance(provenance).with_metrics(metrics)


def _kl_metrics(findings: Findings, labels: Labels) -> list[Metric]:
    return [
        Metric(
            name="kl_nats",
            value=record["kl_nats"],
            standard_error=record["kl_se"],
            dataset=dataset(findings.meter.token_sets[domain]),
            num_samples=record["n"],
        )
        for domain, record in findings.verifier.kl(labels).items()
    ]


def _task_metrics(findings: Findings, labels: Labels) -> list[Metric]:
    records = {n: findings.verifier.task(labels, n) for n in findings.verifier.tasks.names}
    return [
        Metric(
            name=f"{name}_accuracy",
            value=record["accuracy"],
            standard_error=record["accuracy_se"],
            num_samples=record["n"],
        )
        for name, record in records.items()
        if record is not None
    ]
