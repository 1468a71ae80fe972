"""The last step of the exact search: measure a few good plans at the budget.

Isolated KLs nearly add up at four bits; below three, errors of several layers can break what none
breaks alone. So the additive model proposes, and a measurement of the whole plans on the same
calibration data may overrule it, but only beyond its own noise: in reasoning and recall a single
token of a single document can hold most of the KL. Held-out data takes no part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from kvbits.evaluation.statistics import paired_mean_difference
from kvbits.tuning.problem import Objective, Problem
from kvbits.tuning.progress import Progress
from kvbits.tuning.rundir import RunDir
from kvbits.tuning.search import baselines
from kvbits.tuning.search.exact import solve
from kvbits.tuning.tables import Allocation, Choice

Evaluate: TypeAlias = Callable[[Choice], Sequence[Mapping[str, Any]]]
"""Measure a choice: per domain ``kl_nats``, ``document_kl_nats`` and ``document_tokens``."""
Record: TypeAlias = Mapping[str, Any]

RECORDS = "search.jsonl"


def refinement_candidates(problem: Problem, bits: float) -> list[Choice]:
    """Return the distinct plans worth measuring within the budget, the search's own first.

    The solutions for every objective, and the best uniform plan and ladder, so that the choice is
    never one that a rule of thumb is surely better than.
    """
    budget = problem.costs.budget(bits)
    names: tuple[Objective, ...] = (problem.objective, "balanced", "minimax", "sum")
    objectives = [problem._replace(objective=name) for name in names]
    choices = [solve(variant, budget) for variant in objectives]
    uniform = baselines.best(problem, baselines.uniform(problem), bits)
    for best in (uniform, baselines.best_ladder(problem, bits)):
        choices.append(best[1].choice if best is not None else None)
    return list(dict.fromkeys(choice for choice in choices if choice is not None))


def refine(
    problem: Problem,
    candidates: Sequence[Choice],
    evaluate: Evaluate,
    *,
    run: RunDir,
    progress: Progress,
) -> Allocation:
    """Measure the candidates on calibration data; return the first or a surely better one.

    Another is better if its measured loss is smaller and, in the domain that makes most of the
    difference, the 95 % interval of the paired difference lies above zero. Measurements are lines
    of ``search.jsonl`` and are not repeated.
    """
    measured: dict[Choice, Record] = {tuple(r["choice"]): r for r in run.records(RECORDS)}
    progress.start("search", len(candidates))
    for choice in candidates:
        if choice not in measured:
            measured[choice] = _record(problem, choice, evaluate(choice))
            run.append(RECORDS, measured[choice])
        progress.advance()
    progress.finish()
    first = measured[candidates[0]]
    better = [c for c in candidates if _is_surely_better(problem, measured[c], first)]
    best = min(better, key=lambda c: float(measured[c]["loss"]), default=candidates[0])
    return problem.allocation(best)


def _is_surely_better(problem: Problem, rival: Record, first: Record) -> bool:
    if rival["loss"] >= first["loss"]:
        return False
    gains = [(a - b) for a, b in zip(first["kl_nats"], rival["kl_nats"], strict=True)]
    shares = [w * g / n for w, g, n in zip(problem.weights, gains, problem.norms, strict=True)]
    domain = shares.index(max(shares))
    first_kl, rival_kl = (each["document_kl_nats"][domain] for each in (first, rival))
    difference = paired_mean_difference(first_kl, rival_kl, first["document_tokens"][domain])
    return difference.low > 0  # false for a single document, whose interval is nan


def _record(problem: Problem, choice: Choice, domains: Sequence[Record]) -> dict[str, Any]:
    kl_nats = [float(domain["kl_nats"]) for domain in domains]
    return {
        "choice": choice,
        "labels": problem.costs.labels(choice),
        "effective_bits": problem.costs.effective_bits(choice),
        "kl_nats": kl_nats,
        "document_kl_nats": [domain["document_kl_nats"] for domain in domains],
        "document_tokens": [domain["document_tokens"] for domain in domains],
        "loss": problem.score(kl_nats),
        "predicted_loss": problem.allocation(choice).loss,
    }
