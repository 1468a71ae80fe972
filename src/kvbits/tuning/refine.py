"""The last step of the exact search: measure a few good plans at the budget.

Isolated KLs nearly add up at four bits; below three, errors of several layers can break what none
breaks alone. So the additive model proposes, and a measurement of the whole plans on the same
calibration data may overrule it, but only beyond its own noise: in reasoning and recall a single
token of a single document can hold most of the KL. Held-out data takes no part.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvbits.evaluation.statistics import paired_mean_difference
from kvbits.tuning.problem import Objective, Problem
from kvbits.tuning.search import baselines
from kvbits.tuning.search.exact import solve
from kvbits.tuning.tables import Choice
from kvbits.tuning.team import Record


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


def better_measured(problem: Problem, measured: Mapping[Choice, Record], first: Choice) -> Choice:
    """Return the first choice or one that measured surely better on calibration data.

    Another is better if its measured loss is smaller and, in the domain that makes most of the
    difference, the 95 % interval of the paired difference lies above zero.
    """
    proposal = measured[first]
    better = [c for c in measured if _is_surely_better(problem, measured[c], proposal)]
    return min(better, key=lambda c: float(measured[c]["loss"]), default=first)


def _is_surely_better(problem: Problem, rival: Record, first: Record) -> bool:
    if rival["loss"] >= first["loss"]:
        return False
    gains = [(a - b) for a, b in zip(first["kl_nats"], rival["kl_nats"], strict=True)]
    shares = [w * g / n for w, g, n in zip(problem.weights, gains, problem.norms, strict=True)]
    domain = shares.index(max(shares))
    first_kl, rival_kl = (each["document_kl_nats"][domain] for each in (first, rival))
    difference = paired_mean_difference(first_kl, rival_kl, first["document_tokens"][domain])
    return difference.low > 0  # false for a single document, whose interval is nan
